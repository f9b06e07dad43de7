"""Search by words: how names are split, what is found and why, cards, metadata, histories, and packs of all kinds."""

import json

import pytest

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from eigenlorax.core.origin import Origin
from eigenlorax.errors import FormatError, OptionError, PackDamagedError
from eigenlorax.pack import folder
from eigenlorax.search import documents
from eigenlorax.search.documents import Document
from eigenlorax.search.text_index import index_documents, terms, words
from planted import random_adapter
from runs import make_run, write_states
from users import make_users


def index_of(**fields):
    """An index of documents that have a name alone, or the texts of other fields."""
    return index_documents([Document(name, {"name": name, **texts}) for name, texts in fields.items()])


def names(matches):
    return [match.name for match in matches]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("legal-question_classification", ["legal", "question", "classification"]),
        ("org/LegalQuestions", ["org", "legal", "questions"]),
        ("SMSSpam.v2", ["sms", "spam", "v", "2"]),
        ("banking77-a", ["banking", "77", "a"]),
        ("Übersetzung ins_Ελληνικά", ["übersetzung", "ins", "ελληνικά"]),
        ("--", []),
    ],
)
def test_names_are_split(name, split):
    assert words(name) == split


@pytest.mark.parametrize(
    ("word", "other"),
    [("questions", "question"), ("classify", "classification"), ("translate", "translation"), ("law", "laws")],
)
def test_words_that_share_a_term(word, other):
    assert set(terms(word)) & set(terms(other))


@pytest.mark.parametrize(
    ("word", "other"), [("sentiment", "sentence"), ("class", "clas"), ("legal", "leg"), ("a", "as")]
)
def test_words_that_do_not(word, other):
    assert not set(terms(word)) & set(terms(other))


class TestFinding:
    def test_the_adapter_with_most_of_the_words_is_first_and_its_reason_names_them(self):
        index = index_of(**{"legal-question-classification": {}, "medical-question-answering": {}, "poems": {}})
        first, second = index.find("classify legal questions")
        assert first.name == "legal-question-classification"
        assert first.reason == "Matches 'classify', 'legal' and 'questions' in the name."
        assert (second.name, second.reason) == ("medical-question-answering", "Matches 'questions' in the name.")
        assert first.score > second.score > 0

    def test_a_word_that_is_equal_scores_higher_than_one_with_the_same_beginning(self):
        assert names(index_of(classify={}, classification={}, other={}).find("classification")) == [
            "classification",
            "classify",
        ]

    def test_a_name_counts_more_than_a_card(self):
        index = index_of(a={"card": "translation of poems"}, translation={"card": "the model of somebody"})
        assert names(index.find("translation")) == ["translation", "a"]

    def test_scores_are_those_of_bm25(self):
        """Against Lucene's formula, written out: k1 = 1.5, b = 0.75."""
        import math

        lengths = {"law": 3, "law-law": 6, "tax": 3}
        mean = sum(lengths.values()) / 3
        idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
        found = index_of(**{name: {} for name in lengths}).find("law")
        for match in found:
            count = 3 * match.name.count("law")
            expected = idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * lengths[match.name] / mean))
            assert match.score == pytest.approx(expected, rel=1e-5)
        assert names(found) == ["law-law", "law"]

    def test_equal_scores_are_in_the_order_of_names_and_top_cuts_them(self):
        index = index_of(**{f"law-{letter}": {} for letter in "cabd"})
        assert names(index_documents(sorted(index.documents, key=lambda each: each.name)).find("law", top=3)) == [
            "law-a",
            "law-b",
            "law-c",
        ]

    def test_common_words_do_not_count_unless_there_are_no_others(self):
        index = index_of(**{"to-the": {}, "law": {}})
        assert names(index.find("to the law")) == ["law"]
        assert names(index.find("to the")) == ["to-the"]

    def test_nothing_is_found(self):
        assert index_of(law={}).find("poems") == []
        assert index_documents([]).find("law") == []

    @pytest.mark.parametrize(
        ("text", "top", "match"), [(" -- ", 3, "' -- ' has no word"), ("law", 0, "at least 1, got 0")]
    )
    def test_what_is_refused(self, text, top, match):
        with pytest.raises(OptionError, match=match):
            index_of(law={}).find(text, top)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    make_adapters(folder, "spam-filter tagger", config={"task_type": "TOKEN_CLS"})
    make_adapter(folder / "poet", seed=5, config={"task_type": "CAUSAL_LM"})
    return folder


@pytest.mark.parametrize("options", [{"n_components": 4}, {"max_error": 0.1}], ids=["floats", "coded"])
class TestPacks:
    def test_documents_from_disk_are_those_of_the_pack(self, sources, options, tmp_path):
        pack = ex.fit(sources, **options)
        opened = folder.open_pack(pack.save(tmp_path / "pack"))
        assert documents.of_folder(opened) == documents.of_pack(pack)
        fields = {document.name: document.fields for document in documents.of_folder(opened)}
        assert fields["poet"]["base model"] == "org/base"
        assert "language model" in fields["poet"]["task type"]
        assert set(names(ex.TextIndex.from_pack(pack).find("token classifier"))) == {"spam-filter", "tagger"}

    def test_a_changed_config_is_damage(self, sources, options, tmp_path):
        path = ex.fit(sources, **options).save(tmp_path / "pack")
        (path / "adapters/poet/source_config.json").write_text("{}")
        with pytest.raises(PackDamagedError, match="poet/source_config.json was changed"):
            documents.of_folder(folder.open_pack(path))


def test_metadata_of_a_file_are_found(tmp_path):
    image = random_adapter(
        "style", 3, origin=Origin("peft", metadata={"ss_tag_frequency": json.dumps({"watercolor": 7})})
    )
    pack = ex.fit([image, random_adapter("other", 9)], n_components=4)
    (match,) = ex.TextIndex.from_pack(ex.Pack.open(pack.save(tmp_path / "pack"))).find("watercolors")
    assert (match.name, match.reason) == ("style", "Matches 'watercolors' in the metadata.")


def test_histories_are_found_by_their_latest_version_and_members_by_name(tmp_path):
    write_states(make_run(tmp_path / "legal-run", (10, 20)), max_steps=20)
    ex.track(tmp_path / "legal-run", tmp_path / "history")
    runs = ex.Pack.open(tmp_path / "history")
    assert names(ex.TextIndex.from_pack(runs).find("legal")) == ["legal-run@latest"]
    common, members = make_users(tmp_path / "users", ["ann", "bob"])
    population = ex.fit(members, reference=common)
    assert [each.name for each in documents.of_pack(population)] == ["members@ann", "members@bob"]


class TestCards:
    def test_both_places_are_read_without_comments(self, sources, tmp_path):
        (tmp_path / "poet").mkdir()
        (tmp_path / "poet/README.md").write_text("# Sonnets\n<!-- quatrains -->\n")
        (tmp_path / "tagger.md").write_text("Entities in sonnets")
        index = ex.TextIndex.from_pack(ex.fit(sources, n_components=4), cards=tmp_path)
        found = index.find("sonnet")
        assert {match.name: match.reason for match in found} == dict.fromkeys(
            ("poet", "tagger"), "Matches 'sonnet' in the card."
        )
        assert index.find("quatrains") == []

    @pytest.mark.parametrize(
        ("content", "error", "match"),
        [
            (None, OptionError, "has no model card of an adapter of the pack: README.md .* poet, spam-filter, tagger."),
            ("x" * (1 << 20) + "y", FormatError, "at most 1,048,576 were expected. It cannot be a model card"),
        ],
    )
    def test_what_is_refused(self, sources, tmp_path, content, error, match):
        if content is not None:
            (tmp_path / "poet.md").write_text(content)
        with pytest.raises(error, match=match):
            ex.TextIndex.from_pack(ex.fit(sources, n_components=4), cards=tmp_path)

    def test_no_folder(self, tmp_path):
        with pytest.raises(OptionError, match="nowhere is not a folder.*--cards"):
            documents.with_cards([Document("a")], tmp_path / "nowhere")
