"""Rows out of files, labels as numbers, and what becomes of both on the way to a model."""

import csv
import re
import sys

import pytest

import tiny
import trainable
from eigenlorax.errors import FormatError, MissingExtraError, OptionError, RowsWarning
from eigenlorax.train import data, examples, models
from eigenlorax.train.options import Columns

ROWS = [{"text": "good, w1", "label": "yes"}, {"text": 'a "b"\nc', "label": "no"}, {"text": "ü", "label": "yes"}]
COLUMNS = Columns()


def jsonl(folder, *rows):
    return data.read(trainable.write_jsonl(folder / "rows.jsonl", rows))


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


class TestReading:
    def test_the_formats_agree(self, tmp_path):
        trainable.write_jsonl(tmp_path / "a.jsonl", ROWS)
        with open(tmp_path / "b.csv", "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"])
            writer.writeheader()
            writer.writerows(ROWS)
        for name in ("a.jsonl", "b.csv"):
            table = data.read(tmp_path / name)
            assert data.column_texts(table, "text") == [row["text"] for row in ROWS]
            assert data.infer_labels(table, COLUMNS).names == ("no", "yes")

    def test_a_folder_of_datasets(self, tmp_path):
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "y", "x"])}
        )
        columns = {"text": ["one", "two"], "label": [2, 0]}
        # with a fingerprint, for which `from_list` would pickle more than every Python and dill can
        rows = datasets.Dataset(
            datasets.table.InMemoryTable.from_pydict(columns, schema=features.arrow_schema),
            info=datasets.DatasetInfo(features=features),
            fingerprint="0123456789abcdef",
        )
        rows.save_to_disk(tmp_path / "one")
        table = data.read(tmp_path / "one")
        with pytest.warns(RowsWarning, match="no rows of class y"):
            labels = data.infer_labels(table, COLUMNS)
        assert (labels.names, labels.encode(table, COLUMNS)) == (("z", "y", "x"), [2, 0])
        datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
        with pytest.raises(FormatError, match=f"It contains {tmp_path}/splits/train: pass one"):
            data.read(tmp_path / "splits")

    def test_a_folder_without_datasets(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MissingExtraError, match="pip install datasets"):
            data.read(tmp_path)

    def test_blank_lines_are_none(self, tmp_path):
        path = written(tmp_path, "a.jsonl", '\n{"text": "x"}\n\n{"text": "y"}\n')
        assert data.read(path).locations == ["line 2", "line 4"]
        path = written(tmp_path, "a.csv", "text\nx\n\ny\n")
        assert data.read(path).locations == ["line 2", "line 4"]

    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            ("a.txt", "x", "JSON lines (.jsonl, .json, .ndjson), .csv, or a folder"),
            ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl, line 2 is not JSON"),
            ("a.jsonl", "[1]\n", "line 1 is an array; an object was expected"),
            ("a.jsonl", "\n", "has no rows"),
            ("a.jsonl", b'{"text": "\xff"}', "is not text in UTF-8"),
            ("a.csv", "", "the first line has to name the columns"),
            ("a.csv", "text,text\na,b\n", "each once"),
            ("a.csv", "text,label\n", "has no rows"),
            ("a.csv", "text,label\na,b\na\n", "line 3: the number of fields is 1; the first line names 2"),
            ("a.csv", 'text\n"a"b\n', "line 2 is not CSV"),
        ],
    )
    def test_what_is_wrong_is_named_by_its_line(self, tmp_path, name, content, match):
        with pytest.raises(FormatError, match=re.escape(match)):
            data.read(written(tmp_path, name, content))

    def test_no_file(self, tmp_path):
        with pytest.raises(FormatError, match="gone.csv does not exist"):
            data.read(tmp_path / "gone.csv")

    def test_columns(self, tmp_path):
        table = jsonl(tmp_path, {"text": "x", "other": 1}, {"text": "y"}, {"text": None})
        with pytest.raises(
            OptionError, match=r"no column 'body'. It has: text, other. Pass another name with --text-column"
        ):
            data.column_texts(table, "body", "--text-column")
        with pytest.raises(FormatError, match="line 2 has no 'other', which other rows have"):
            data.column_texts(jsonl(tmp_path, {"text": "x", "other": "z"}, {"text": "y"}), "other")
        with pytest.raises(FormatError, match="line 3: 'text' is None; a text was expected"):
            data.column_texts(table, "text")

    def test_a_digest_is_of_the_rows_alone(self, tmp_path):
        one = data.read(trainable.write_jsonl(tmp_path / "one.jsonl", ROWS))
        assert data.rows_sha256(data.read(trainable.write_jsonl(tmp_path / "two.jsonl", ROWS))) == data.rows_sha256(one)
        assert data.rows_sha256(
            data.read(trainable.write_jsonl(tmp_path / "two.jsonl", ROWS[::-1]))
        ) != data.rows_sha256(one)


def of_labels(folder, *labels):
    return jsonl(folder, *({"text": "x", "label": label} for label in labels))


class TestLabels:
    @pytest.mark.parametrize(
        ("labels", "names", "numbers"),
        [
            (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
            ([2, 0, 1], ("0", "1", "2"), [2, 0, 1]),
            (["10", "9", "10"], ("10", "9"), [0, 1, 0]),
        ],
    )
    def test_numbers_and_names(self, tmp_path, labels, names, numbers):
        table = of_labels(tmp_path, *labels)
        found = data.infer_labels(table, COLUMNS)
        assert found.names == names
        assert found.encode(table, COLUMNS) == numbers

    def test_integers_of_a_csv_file_are_integers(self, tmp_path):
        table = data.read(written(tmp_path, "a.csv", "text,label\nx,1\ny,0\nz,2\n"))
        found = data.infer_labels(table, COLUMNS)
        assert found.names == ("0", "1", "2")
        assert found.encode(table, COLUMNS) == [1, 0, 2]
        assert found.encode(of_labels(tmp_path, 2, "1"), COLUMNS) == [2, 1]

    def test_a_class_without_rows_is_said(self, tmp_path):
        with pytest.warns(RowsWarning, match="no rows of class 1"):
            data.infer_labels(of_labels(tmp_path, 0, 2, 2), COLUMNS)

    @pytest.mark.parametrize(
        ("labels", "match"),
        [
            ([0, "a"], "some labels are integers and some are texts"),
            ([0, -1], "label -1 among 2 rows"),
            ([0, 4711], "label 4711 among 2 rows. Integers are class numbers from 0 on"),
            (["a", "a"], "one class only, 'a'"),
            ([0, 0], "one class only, '0'"),
            ([0.5, 1], "line 1: label 0.5; an integer or a text was expected"),
            ([True, False], "line 1: label True"),
            ([0, None], "line 2: label None"),
            (["a", ""], "line 2: the label is empty"),
            (["a", " "], "line 2: the label is empty"),
        ],
    )
    def test_what_cannot_be_classes(self, tmp_path, labels, match):
        with pytest.raises(FormatError, match=re.escape(match)):
            data.infer_labels(of_labels(tmp_path, *labels), COLUMNS)

    @pytest.mark.parametrize(
        ("names", "label", "match"),
        [
            (("a", "b"), "c", "line 1: label 'c' is not one of the 2 classes: a, b"),
            (("a", "b"), 2, "label 2 is not one of the 2 classes"),
            (("0", "1"), -1, "label -1 is not one of the 2 classes"),
            (("0", "1"), "spam", "classes: 0, 1. Name the classes in the order of the head: labels= (--labels A,B,"),
            (("1", "2"), 1, "label 1 is an integer, but the classes are texts: 1, 2"),
        ],
    )
    def test_what_is_none_of_them(self, tmp_path, names, label, match):
        with pytest.raises(FormatError, match=re.escape(match)):
            data.Labels(names).encode(of_labels(tmp_path, label), COLUMNS)

    def test_an_integer_is_a_number_where_names_are_words(self, tmp_path):
        assert data.Labels(("a", "b")).encode(of_labels(tmp_path, 1, "a"), COLUMNS) == [1, 0]


WORD = {word: number for number, word in enumerate(trainable.VOCABULARY)}


class TestExamples:
    bert = trainable.make_tokenizer()
    gpt2 = trainable.make_tokenizer(end="[SEP]")

    def test_a_classification(self, tmp_path):
        table = jsonl(tmp_path, {"text": "good a", "label": 1}, {"text": "b", "label": 0})
        one, two = examples.encode_classification(table, data.numbered_labels(2), COLUMNS, self.bert, 9)
        assert one["input_ids"] == [1, WORD["good"], WORD["a"], 2]
        assert (one["labels"], two["labels"]) == (1, 0)
        examples.prepare_tokenizer(self.bert)
        batch = examples.collator("text-classification", self.bert)([dict(one), dict(two)])
        assert batch["input_ids"].tolist() == [one["input_ids"], [*two["input_ids"], 0]]
        assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 1, 0]]
        assert batch["labels"].tolist() == [1, 0]

    def test_a_pair(self, tmp_path):
        table = jsonl(tmp_path, {"text": "a", "other": "b c", "label": 1})
        (one,) = examples.encode_classification(table, data.numbered_labels(2), Columns(pair="other"), self.bert, 9)
        assert one["input_ids"] == [1, WORD["a"], 2, WORD["b"], WORD["c"], 2]
        assert one["token_type_ids"] == [0, 0, 0, 1, 1, 1]

    def test_what_is_cut_is_said(self, tmp_path):
        table = jsonl(tmp_path, {"text": "a b c d e", "label": 1}, {"text": "b c", "label": 0})
        with pytest.warns(RowsWarning, match=r"1 of 2 rows of .* were cut after 4 tokens"):
            one, _ = examples.encode_classification(table, data.numbered_labels(2), COLUMNS, self.bert, 4)
        assert one["input_ids"] == [1, WORD["a"], WORD["b"], 2]
        with pytest.warns(RowsWarning, match=r"1 of 2 rows of .* were cut after 4 tokens"):
            one, _ = examples.encode_language_model(table, COLUMNS, self.gpt2, 4)
        assert one["input_ids"] == [WORD[letter] for letter in "abcd"]

    def test_a_text(self, tmp_path):
        (one,) = examples.encode_language_model(jsonl(tmp_path, {"text": "a b"}), COLUMNS, self.gpt2, 9)
        assert one["input_ids"] == [WORD["a"], WORD["b"], WORD["[SEP]"]]
        # nothing predicts the first one
        assert one["labels"] == [-100, WORD["b"], WORD["[SEP]"]]

    def test_the_loss_is_on_the_completion_alone(self, tmp_path):
        rows = {"prompt": "a b", "completion": "c d"}, {"prompt": "", "completion": "e f"}
        one, two = examples.encode_language_model(jsonl(tmp_path, *rows), COLUMNS, self.gpt2, 9)
        assert one["input_ids"] == [*(WORD[letter] for letter in "abcd"), 2]
        assert one["labels"] == [-100, -100, WORD["c"], WORD["d"], 2]
        assert two["labels"] == [-100, WORD["f"], 2]
        examples.prepare_tokenizer(self.gpt2)
        batch = examples.collator("causal-lm", self.gpt2)([dict(one), dict(two)])
        assert batch["labels"].tolist() == [one["labels"], [*two["labels"], -100, -100]]
        assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]

    def test_a_tokenizer_that_ends_texts_by_itself_does_not_end_prompts(self, tmp_path):
        class Ending:
            eos_token_id = 2

            def __call__(self, texts, add_special_tokens=True):
                ids = [[WORD[word] for word in text.split()] for text in texts]
                return {"input_ids": [[1, *one, 2] if add_special_tokens else one for one in ids]}

        (one,) = examples.encode_language_model(
            jsonl(tmp_path, {"prompt": "a", "completion": "b"}), COLUMNS, Ending(), 9
        )
        assert one["input_ids"] == [1, WORD["a"], WORD["b"], 2]
        (one,) = examples.encode_language_model(jsonl(tmp_path, {"text": "a"}), COLUMNS, Ending(), 9)
        assert one["input_ids"] == [1, WORD["a"], 2]

    def test_rows_without_anything_to_predict_are_left_out_and_said(self, tmp_path):
        table = jsonl(tmp_path, {"text": "a b"}, {"text": ""}, {"text": "c"})
        with pytest.warns(RowsWarning, match="1 of 3 rows of .* have no token to predict within 9"):
            found = examples.encode_language_model(table, COLUMNS, self.gpt2, 9)
        assert [len(one["input_ids"]) for one in found] == [3, 2]
        table = jsonl(tmp_path, {"prompt": "a b c", "completion": "d"})
        with pytest.raises(FormatError, match="no row has a token to predict within 3"):
            examples.encode_language_model(table, COLUMNS, self.gpt2, 3)

    @pytest.mark.parametrize(("asked", "found"), [(None, 32), (7, 7), (32, 32)])
    def test_the_length_is_at_most_the_model_s(self, asked, found):
        config = type("Config", (), {"max_position_embeddings": 40})()
        assert examples.max_tokens("causal-lm", asked, self.gpt2, config) == found
        with pytest.raises(OptionError, match="max_length 33 is more than the 32 tokens"):
            examples.max_tokens("causal-lm", 33, self.gpt2, config)

    def test_a_folder_without_a_tokenizer(self, tmp_path):
        tiny.make_bert().save_pretrained(tmp_path / "model")
        with pytest.raises(FormatError, match=r"model has no tokenizer, such as tokenizer.json. Save it there: token"):
            models.load_tokenizer(str(tmp_path / "model"), None)

    def test_a_tokenizer_with_more_tokens_than_the_model(self):
        config = type("Config", (), {"max_position_embeddings": 40, "vocab_size": 2})()
        with pytest.raises(FormatError, match=r"the tokenizer has \d+ tokens, and the model 2 embeddings"):
            examples.max_tokens("causal-lm", None, self.gpt2, config)

    def test_a_tokenizer_that_cannot_pad(self):
        tokenizer = trainable.make_tokenizer(end="[SEP]")
        tokenizer.eos_token = None
        with pytest.raises(OptionError, match="neither a padding token nor an end-of-text token"):
            examples.prepare_tokenizer(tokenizer)
