"""Two tensor-parallel processes: each has its slices of the bases. Models whose layers are cut in every way: queries
and keys in one layer, one head of keys that both have, projections that are fused for LoRAs too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax
from families import FAMILIES, Family, made_adapters
from offline import peft_greedy

HERE = Path(__file__).parent
PROMPTS = [[5, 6, 7, 8 + i] for i in range(4)]
SECONDS = 400


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
    ran = subprocess.run(
        [sys.executable, str(HERE / "parallel.py"), str(base), str(tmp_path / "pack"), "1", "2", json.dumps(PROMPTS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("TOKENS ")]
    wanted = peft_greedy(base, PROMPTS, [exported[name] for name in pack.names])
    assert json.loads(line.removeprefix("TOKENS ")) == wanted
    assert wanted != peft_greedy(base, PROMPTS, [None] * len(PROMPTS))
