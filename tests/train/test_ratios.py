"""What bytes buy on the task: equal to a count by hand in float64, and a planted collection whose answer is known."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import compared
import eigenlorax as ex
import tiny
import trainable
from compared import classes_by_hand, divergence, made, share, trained
from eigenlorax.cli import main
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import OptionError
from eigenlorax.reports import with_evaluations
from eigenlorax.reports.analysis import per_adapter
from eigenlorax.reports.render import markdown
from eigenlorax.reports.task_data import TaskFrontier
from eigenlorax.train import models, ratios, recycled_evaluation
from planted import normal
from reference import dense

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_without_shape_checks")]

CLASSES = {"a": 3, "b": 2, "c": 3}
RATIOS = [2.0, 8.0]


@pytest.fixture(scope="module")
def base(_made):
    return _made / "bert"


@pytest.fixture(scope="module")
def originals(base):
    return {name: made(name, n, 100 * place, base) for place, (name, n) in enumerate(CLASSES.items())}


@pytest.fixture(scope="module")
def pack(originals):
    return ex.fit(list(originals.values()), n_components=6, dtype="float32", warn_above=1.0)


@pytest.fixture(scope="module")
def rows():
    return [{**row, "label": index % 2} for index, row in enumerate(trainable.keyword_rows(31, seed=4, words=9))]


@pytest.fixture(scope="module")
def file(rows, tmp_path_factory):
    return trainable.write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def asked(pack, originals, file):
    return recycled_evaluation.prepare(pack, originals, [(None, file)])


@pytest.fixture(scope="module")
def versions(pack, originals, asked):
    return ratios.prepare(pack, originals, asked, RATIOS)


@pytest.fixture(scope="module")
def found(originals, asked, versions):
    return ratios.run(originals, asked, versions)


def lost(original, recycled):
    """The relative error of an update by dense matrices."""
    updates = [(dense(one), dense(recycled.modules[m])) for m, one in original.modules.items()]
    return math.sqrt(sum(((d - e) ** 2).sum() for d, e in updates) / sum((d**2).sum() for d, _ in updates))


class TestVersions:
    def test_the_pack_then_by_ratio_a_fit_and_its_rival(self, versions, pack, originals):
        own, *others = versions.versions
        assert (own.method, own.ratio) == ("pack", None)
        assert own.stored_bytes == pack.summary.bytes.basis + pack.summary.bytes.coefficients
        assert [(one.method, one.ratio) for one in others] == [
            (way, ratio) for ratio in RATIOS for way in ("fit", per_adapter.BOTH)
        ]
        numbers = len(originals) * len(tiny.BERT) * tiny.RANK * 2 * tiny.IN
        assert (versions.adapters, versions.lora_float16) == (3, 2 * numbers)

    def test_a_fit_is_that_of_fit(self, versions, originals):
        # heads are the originals' in all versions, and take no bytes of them
        adapters = [replace(original, heads={}) for original in originals.values()]
        expected = ex.fit(adapters, ratio=8.0, warn_above=1.0)
        one = versions.versions[3]
        assert one.stored_bytes == expected.summary.bytes.basis + expected.summary.bytes.coefficients
        assert one.stored_bytes <= versions.lora_float16 / 8
        for name in originals:
            for module, factors in one.adapter(name).modules.items():
                assert torch.equal(factors.down, expected.adapter(name).modules[module].down)

    @pytest.mark.parametrize("place", [1, 3])
    def test_a_rival_has_the_bytes_of_the_fit_and_the_error_that_it_says(self, versions, originals, place):
        fit, rival = versions.versions[place : place + 2]
        assert 0.8 * fit.stored_bytes < rival.stored_bytes <= fit.stored_bytes
        errors = [lost(one, rival.adapter(name)) for name, one in originals.items()]
        assert rival.worst == pytest.approx(max(errors), rel=1e-4)
        assert rival.mean == pytest.approx(sum(errors) / len(errors), rel=1e-4)

    def test_baselines_are_loras_of_the_rank_they_had(self, versions, originals):
        recycled = versions.versions[-1].adapter("b")
        assert recycled.source_config == originals["b"].source_config
        assert {one.rank for one in recycled.specs.values()} == {tiny.RANK}
        assert all(one.scaling == originals["b"].modules[m].scaling for m, one in recycled.modules.items())

    def test_what_is_kept_out_of_the_pack_is_carried_in_all_of_them(self, originals, asked):
        pack = ex.fit(list(originals.values()), n_components=6, exclude_modules=["query"], warn_above=1.0)
        found = ratios.prepare(pack, originals, asked, [1.3])
        kept = [m for m in tiny.BERT if m.endswith("query")]
        carried = 4 * len(originals) * len(kept) * tiny.RANK * 2 * tiny.IN
        assert found.lora_float16 == carried + carried // 2
        for one in found.versions:
            assert one.stored_bytes > carried
            for name, original in originals.items():
                for module in kept:
                    assert torch.equal(one.adapter(name).modules[module].down, original.modules[module].down)
        with pytest.raises(
            OptionError, match=r"^ratio=50, which is .* bytes, cannot be reached: heads and .* take [\d,]+ bytes"
        ):
            ratios.prepare(pack, originals, asked, [50])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([], "needs at least one ratio"),
            ([4, 0.5], "divided by that of the pack, 1 or more, got 0.5"),
            ([float("inf")], "1 or more, got inf"),
            ([float("nan")], "1 or more, got nan"),
            ([True], "ratio must be a number, got True"),
        ],
    )
    def test_what_is_no_ratio(self, pack, originals, asked, given, message):
        with pytest.raises(OptionError, match=message):
            ratios.prepare(pack, originals, asked, given)

    def test_out_of_reach(self, pack, originals, asked):
        with pytest.raises(OptionError, match=r"^ratio=5000, which is 1 bytes, cannot be reached"):
            ratios.prepare(pack, originals, asked, [5000])

    def test_what_it_costs_is_said_first(self, pack, originals, asked):
        seen = []
        ratios.prepare(pack, originals, asked, [8], progress=lambda *step: seen.append(step))
        assert seen[0] == ("frontier: 1 fit, then 5 versions of 3 adapters, 465 predictions", 0, 1)


class TestOnRows:
    def test_evaluations_are_those_without_a_frontier(self, found, pack, originals, asked):
        assert found[0] == recycled_evaluation.run(pack, originals, asked)

    def test_equals_a_count_by_hand(self, found, versions, base, originals, rows):
        (frontier,) = found[1]
        texts, labels = [(row["text"],) for row in rows], torch.tensor([row["label"] for row in rows])
        before = {n: classes_by_hand(base, one.heads, one, texts) for n, one in originals.items()}
        right = [share(one.argmax(dim=1), labels) for one in before.values()]
        assert frontier.original_accuracy == pytest.approx(sum(right) / 3)
        for version, point in zip(versions.versions, frontier.points, strict=True):
            assert (point.way, point.ratio, point.worst) == (version.method, version.ratio, version.worst)
            for run in point.runs:
                logs = classes_by_hand(base, originals[run.name].heads, version.adapter(run.name), texts)
                assert run.kl == pytest.approx(divergence(before[run.name], logs), rel=1e-3, abs=1e-9)
                assert run.accuracy == share(logs.argmax(dim=1), labels)
                assert run.agreement == share(logs.argmax(dim=1), before[run.name].argmax(dim=1))
                assert run.perplexity is None
            for field in ("accuracy", "kl", "agreement"):
                assert getattr(point, field) == pytest.approx(sum(getattr(r, field) for r in point.runs) / 3)
        assert [run.name for run in frontier.points[0].runs] == list(CLASSES)
        assert frontier.points[1].kl < 0.01 < frontier.points[3].kl

    def test_what_originals_predict_is_found_once(self, originals, asked, versions, monkeypatch):
        calls, load = [], models.load_model

        def counted(*given):
            network = load(*given)
            network.register_forward_hook(lambda *_: calls.append(1))
            return network

        monkeypatch.setattr(models, "load_model", counted)
        seen = []
        one = replace(asked, jobs=asked.jobs[:1])
        ratios.run(originals, one, versions, lambda *step: seen.append(step))
        assert len(calls) == 2 * len(RATIOS) + 3
        assert seen[-1] == ("comparing predictions", 5 * 31, 5 * 31)

    def test_a_language_model(self, base, tmp_path):
        pack, adapters = tiny.make_pack(tiny.GPT2, n=2, n_components=3)
        pack.base_model, originals = str(base.parent / "gpt2"), {one.name: one for one in adapters}
        texts = [row["text"] for row in trainable.cycle_rows(9, seed=3)]
        file = trainable.write_jsonl(tmp_path / "rows.jsonl", [{"text": one} for one in texts])
        asked = recycled_evaluation.prepare(pack, originals, [(None, file)], task="causal-lm")
        versions = ratios.prepare(pack, originals, asked, [8])
        _, (frontier,) = ratios.run(originals, asked, versions)

        def losses(adapter):
            model = compared.dense(AutoModelForCausalLM.from_pretrained(base.parent / "gpt2").double(), adapter)
            tokenizer = AutoTokenizer.from_pretrained(base.parent / "gpt2")
            found = []
            for one in texts:
                ids = torch.tensor([[*tokenizer(one).input_ids, tokenizer.eos_token_id]])
                logs = model(input_ids=ids).logits[0, :-1].detach().log_softmax(dim=1)
                found.append((logs, -logs.gather(1, ids[0, 1:, None])[:, 0]))
            return [torch.cat(each) for each in zip(*found, strict=True)]

        for version, point in zip(versions.versions, frontier.points, strict=True):
            means = []
            for run in point.runs:
                before, (logs, loss) = losses(originals[run.name])[0], losses(version.adapter(run.name))
                assert run.kl == pytest.approx(divergence(before, logs), rel=1e-3)
                assert run.perplexity == pytest.approx(float(loss.mean().exp()), rel=1e-4)
                means.append(float(loss.mean()))
            assert point.perplexity == pytest.approx(math.exp(sum(means) / 2), rel=1e-4)
            assert point.accuracy is None
        assert frontier.task == "causal-lm"

    def test_an_adapter_that_changes_the_base_model(self, tmp_path, base, file):
        original = trained(tmp_path / "peft", base, bias="all")
        pack = ex.fit([original], n_components=tiny.RANK, dtype="float32")
        asked = recycled_evaluation.prepare(pack, {"one": original}, [(None, file)])
        versions = ratios.prepare(pack, {"one": original}, asked, [2])
        evaluations, (frontier,) = ratios.run({"one": original}, asked, versions)
        assert evaluations == recycled_evaluation.run(pack, {"one": original}, asked)
        own, fit, rival = frontier.points
        assert own.kl < 1e-9 < fit.kl < 0.1 * frontier.without_kl
        assert 1e-9 < rival.kl < 0.1 * frontier.without_kl


WIDE, RANK, N = 96, 16, 12
LINEAR = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("query", "key", "value")]


def planted_base(folder):
    config = tiny.make_bert().config.to_dict()
    config = BertConfig(**{**config, "hidden_size": WIDE, "intermediate_size": WIDE, "initializer_range": 0.1})
    with torch.random.fork_rng():
        torch.manual_seed(8)
        BertModel(config).save_pretrained(folder)
    trainable.make_tokenizer().save_pretrained(folder)
    return folder


def planted_adapter(place, base):
    """One large direction of every module, the same in all adapters, and fifteen small ones of its own."""
    modules = {}
    for at, module in enumerate(LINEAR):
        down = torch.cat([normal(1, WIDE, seed=9000 + at), normal(RANK - 1, WIDE, seed=1000 * place + at)])
        up = torch.cat([normal(1, WIDE, seed=9500 + at), normal(RANK - 1, WIDE, seed=1000 * place + 500 + at)])
        down, up = (each / each.norm(dim=1, keepdim=True) for each in (down, up))
        up[0] *= 6
        modules[module] = LoRAFactors(down.float(), up.mT.float().contiguous(), 2.0)
    head = "base_model.model.classifier"
    heads = {f"{head}.weight": normal(2, WIDE, seed=place + 70, dtype=torch.float32), f"{head}.bias": torch.zeros(2)}
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2.0 * RANK,
        "target_modules": ["query", "key", "value"],
        "modules_to_save": ["classifier"],
    }
    return from_factors(f"p{place}", modules, heads=heads, base_model=str(base), source_config=json.dumps(config))


def what_is_shared(adapter):
    return replace(
        adapter,
        modules={m: replace(one, down=one.down[:1], up=one.up[:, :1]) for m, one in adapter.modules.items()},
    )


def test_a_ratio_of_200_destroys_what_a_ratio_of_4_keeps(tmp_path):
    """Rows that say how much of an adapter's own directions is there: labelled by what the original answers, and such
    that it is another answer without them."""
    base = planted_base(tmp_path / "base")
    originals = {one.name: one for one in (planted_adapter(place, base) for place in range(N))}
    texts = [row["text"] for row in trainable.keyword_rows(90, seed=9, words=9)]
    files = []
    for name in ("p1", "p4"):
        one, pairs = originals[name], [(text,) for text in texts]
        logs, poor = (classes_by_hand(base, one.heads, side, pairs) for side in (one, what_is_shared(one)))
        clear = [(each[:, 0] - each[:, 1]).abs() > gap for each, gap in ((logs, 1.0), (poor, 0.3))]
        chosen = (logs.argmax(dim=1) != poor.argmax(dim=1)) & clear[0] & clear[1]
        rows = [{"text": texts[i], "label": int(logs[i].argmax())} for i in chosen.nonzero()[:, 0].tolist()]
        assert len(rows) >= 5
        files.append((name, trainable.write_jsonl(tmp_path / f"{name}.jsonl", rows)))
    pack = ex.fit(list(originals.values()), n_components=32, dtype="float16", warn_above=1.0)
    asked = recycled_evaluation.prepare(pack, originals, files)
    versions = ratios.prepare(pack, originals, asked, [4, 200])
    _, (frontier,) = ratios.run(originals, asked, versions)
    assert (frontier.original_accuracy, frontier.adapters) == (1, N)
    points = {(one.way, one.ratio): one for one in frontier.points}
    assert points["fit", 4].accuracy > 0.9
    assert points["fit", 200].accuracy < 0.5
    assert points["fit", 4].kl < 0.05 * points["fit", 200].kl


def test_from_the_shell(tmp_path, originals, file, found, capsys, monkeypatch):
    pack = ex.fit(list(originals.values()), n_components=6, dtype="float32", warn_above=1.0)
    pack.save(tmp_path / "pack")
    for name, one in originals.items():
        ex.write_adapter(one, tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path)
    line = ["report", "pack", "-a", "in", "--left-out", "1", "--evaluate", str(file), "--frontier", "8,2"]
    with pytest.raises(SystemExit, match="^0$"):
        main([*line, "-o", "r.json", "-o", "r.md", "-o", "r.html"])
    report = ex.Report.load("r.json")
    assert report.task_frontiers == found[1]
    section = (tmp_path / "r.md").read_text("utf-8").partition("## Bytes and scores on the task: ")[2]
    assert "| fitted at a ratio | 8 |" in section
    assert "### KL of every adapter" in section
    assert "accuracy over bytes" in (tmp_path / "r.html").read_text("utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^3$"):
        main([*line[:-1], "5000"])
    assert "--ratio 5000, which is 1 bytes, cannot be reached" in capsys.readouterr().err


def test_nothing_changes_without_it(found, pack, originals):
    report = ex.report(pack, list(originals.values()), left_out=1)
    plain = with_evaluations(report, found[0])
    assert plain.task_frontiers == []
    assert "what becomes of the task" not in markdown.render(plain)
    assert all(isinstance(one, TaskFrontier) for one in with_evaluations(report, *found).task_frontiers)
