"""Two tensor-parallel processes: each has its slices of the bases. Models whose layers are cut in every way: queries
and keys in one layer, one head of keys that both have, projections that are fused for LoRAs too."""

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax
from families import FAMILIES, Family, made_adapters
from offline import peft_greedy, printed_by

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PROMPTS = [[5, 6, 7, 8 + i] for i in range(4)]


def with_fields(kind: str, **fields: int) -> Family:
    return Family(FAMILIES[kind].config, FAMILIES[kind].suffixes, {**FAMILIES[kind].fields, **fields})


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(with_fields("llama", num_key_value_heads=1), id="one head of keys"),
        pytest.param(FAMILIES["phi3"], id="fused for LoRAs"),
    ],
)
def test_two_ranks_say_what_peft_says(family, tmp_path):
    base = family.made(tmp_path / "base")
    made_adapters(family, base, tmp_path / "adapters", n=len(PROMPTS))
    pack = eigenlorax.fit(tmp_path / "adapters", n_components=9)
    pack.save(tmp_path / "pack")
    exported = pack.export(tmp_path / "exported")
    said = printed_by(HERE / "parallel.py", base, tmp_path / "pack", "1", "2", json.dumps(PROMPTS))
    (line,) = [line for line in said.splitlines() if line.startswith("TOKENS ")]
    wanted = peft_greedy(base, PROMPTS, [exported[name] for name in pack.names])
    assert json.loads(line.removeprefix("TOKENS ")) == wanted
    assert wanted != peft_greedy(base, PROMPTS, [None] * len(PROMPTS))
