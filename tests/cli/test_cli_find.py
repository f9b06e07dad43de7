"""`find`: three searches, their JSON and tables, and options that do not go together."""

import json

import pytest

import eigenlorax as ex
from adapters import change_config, make_adapter
from outcomes import assert_refused, json_of, succeeded
from runs import make_run


def test_by_words(cli, pack):
    found = json_of(cli("find", pack, "Alpha_classifier", "--top", 1, "--json"))
    (match,) = found.pop("matches")
    assert found == {"pack": str(pack), "by": "words", "query": "Alpha_classifier", "skipped": {}}
    assert (match["name"], match["reason"]) == (
        "alpha",
        "Matches 'alpha' in the name; 'classifier' in the task type.",
    )
    out = succeeded(cli("find", pack, "alpha")).out
    assert "alpha" in out
    assert "Matches 'alpha' in the name." in " ".join(out.split())


def test_cards_are_read_on_request(cli, pack, tmp_path):
    done = succeeded(cli("find", pack, "sonnets"))
    assert done.out == ""
    assert "no adapter has one of these words" in done.err
    (tmp_path / "in/beta/README.md").write_text("writes sonnets")
    (match,) = json_of(cli("find", pack, "sonnets", "--cards", tmp_path / "in", "--json"))["matches"]
    assert (match["name"], match["reason"]) == ("beta", "Matches 'sonnets' in the card.")


def test_by_similarity(cli, pack, tmp_path):
    found = json_of(cli("find", pack, "--like", "alpha", "--json"))
    expected = ex.SimilarityIndex.from_pack(ex.Pack.open(pack)).find("alpha")
    assert (found["by"], found["query"]) == ("similarity", "alpha")
    assert [(match["name"], match["score"], match["reason"]) for match in found["matches"]] == [
        (match.name, match.score, match.reason) for match in expected
    ]
    (match,) = json_of(cli("find", pack, "--like", tmp_path / "in/gamma", "--top", 1, "--candidates", 1, "--json"))[
        "matches"
    ]
    assert match["name"] == "gamma"
    out = succeeded(cli("find", pack, "--like", "alpha")).out
    assert "cosine" in out
    assert "over 3 common modules" in " ".join(out.split())


def test_options_of_reading_reach_the_reader(cli, pack, tmp_path):
    other = change_config(make_adapter(tmp_path / "other", seed=9, pickled=True), base_model_name_or_path="org/other")
    assert_refused(cli("find", pack, "--like", other), 3, "--allow-pickle")
    assert_refused(cli("find", pack, "--like", other, "--allow-pickle"), 3, "--same-base")
    succeeded(cli("find", pack, "--like", other, "--allow-pickle", "--same-base"))


def test_histories_are_named_where_they_are_not_searched(cli, pack, tmp_path):
    make_run(tmp_path / "run", (10,))
    with ex.Pack.edit(pack) as edited:
        edited.append(tmp_path / "run/checkpoint-10", "10", name="run")
    done = succeeded(cli("find", pack, "--like", "run@10"))
    assert "versions of histories are not searched by similarity: 1 in the pack" in " ".join(done.err.split())
    (match,) = json_of(cli("find", pack, "run", "--json"))["matches"]
    assert match["name"] == "run@latest"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass one of TEXT, --like ADAPTER and --rows FILE"),
        (["words", "--like", "alpha"], "pass one of TEXT, --like ADAPTER and --rows FILE"),
        (["--like", "alpha", "--cards", "in"], "--cards has no effect on this search"),
        (["words", "--candidates", 3], "--candidates has no effect on this search"),
        (["words", "--same-base"], "--same-base has no effect on this search"),
        (["--like", "alpha", "--task", "causal-lm"], "--task has no effect on this search"),
        (["words", "--text-column", "body"], "--text-column has no effect on this search"),
        (["--like", "alpha", "--batch-size", 3], "--batch-size has no effect on this search"),
        (["--like", ""], "--like is empty"),
        (["words", "--router", "router"], "--router has no effect on this search"),
        (["--rows", "rows.csv", "--router", "router", "--task", "causal-lm"], "--task has no effect on this search"),
        (["--rows", "rows.csv", "--labels", "ham"], "expected two or more class names with commas between them"),
        (["--like", "delta"], "no adapter named 'delta' in the pack"),
        (["--like", "alpha", "--top", 0], "top (--top) is the number of results, at least 1, got 0"),
        (["words", "--cards", "nowhere"], "nowhere is not a folder"),
        (["--rows", "nowhere.jsonl", "--task", "causal-lm"], "nowhere.jsonl does not exist"),
        (["--rows", "nowhere.jsonl", "--task", "chess"], "no task 'chess'"),
    ],
)
def test_what_is_refused(cli, pack, monkeypatch, arguments, message):
    monkeypatch.chdir(pack.parent)
    assert_refused(cli("find", pack, *arguments), 3, message)


@pytest.fixture
def models(_trainable, tmp_path):
    """A folder with what `trainable.make_all` makes."""
    import trainable

    trainable.copy_all(_trainable, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_by_loss(cli, models):
    path, rows = models / "lm-pack", models / "lm-eval.jsonl"
    found = json_of(cli("find", path, "--rows", rows, "--task", "causal-lm", "--json"))
    expected = ex.rank_by_loss(ex.Pack.open(path), rows, task="causal-lm")
    assert [match["name"] for match in found["matches"]] == [match.name for match in expected.matches]
    assert (found["by"], found["query"], found["skipped"]) == ("loss", str(rows), {})
    refused = cli("find", models / "pack", "--rows", models / "eval.jsonl", "--task", "text-classification")
    assert_refused(refused, 3, "no adapter of the pack can be evaluated on these rows", "has no head")


@pytest.mark.slow
def test_by_centroids(cli, models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, rows = models / "lm-pack", models / "lm-eval.jsonl"
    pack = ex.Pack.open(path)
    options = {"model": AutoModelForCausalLM.from_pretrained(pack.base_model), "tokenizer": None}
    options["tokenizer"] = AutoTokenizer.from_pretrained(pack.base_model)
    router = ex.Router.from_pack(pack, pack.names[:2], **options)
    router.add_centroids({pack.names[0]: ["a b c"], pack.names[1]: ["d e", "c c b"]})
    file = router.save(models / "router.safetensors")
    found = json_of(cli("find", path, "--rows", rows, "--router", file, "--json"))
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    expected = router.rank(texts)
    assert (found["by"], found["query"], found["skipped"]) == ("centroids", str(rows), {})
    assert [match["name"] for match in found["matches"]] == [match.name for match in expected]
    assert [match["score"] for match in found["matches"]] == pytest.approx([match.score for match in expected])
    assert "cosine" in succeeded(cli("find", path, "--rows", rows, "--router", file)).out
    assert_refused(cli("find", path, "--rows", rows, "--router", rows), 3, "lm-eval.jsonl")
    assert_refused(cli("find", path, "--rows", rows, "--router", models / "no"), 3, "there is no file")
    assert_refused(cli("find", path, "--rows", rows, "--router", file, "--text-column", "body"), 3, "no column 'body'")
