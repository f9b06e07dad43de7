"""The example of docs/vllm.md, as it stands there."""

import re
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

from transformers import AutoTokenizer

import eigenlorax
import eigenlorax.vllm
from families import FAMILIES, made_adapters
from offline import greedy, with_engine

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"


def test_the_example_says_what_each_adapter_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FAMILIES["llama"].made(Path("base"))
    made_adapters(FAMILIES["llama"], Path("base"), Path("adapters"), n=2)
    named = [f"{name}=adapters/a{i}" for i, name in enumerate(("sst2", "letters"))]
    eigenlorax.fit(named, n_components=10).save("pack")
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    # the page leaves to vLLM what depends on the machine
    before, call, after = block.partition('LLM("base/", ')
    assert call

    def run(llm):
        names = {"LLM": lambda *args, **options: llm}
        exec(compile(before.replace("import LLM, ", "import ") + call + after, str(PAGE), "exec"), names)
        prompts = AutoTokenizer.from_pretrained("base")(["It was", "Dear"])["input_ids"]
        adapters = eigenlorax.vllm.Adapters("pack")
        found = [list(answer.outputs[0].token_ids) for answer in names["answers"]]
        alone = [greedy(llm, [p], [adapters[name]])[0] for p, name in zip(prompts, ("sst2", "letters"), strict=True)]
        return found, alone

    found, alone = with_engine(run, Path("base"), Path("pack"), shared=True)
    # some end before they have to
    assert [one[: len(other)] for one, other in zip(alone, found, strict=True)] == found
    assert all(found)
    assert found[0] != found[1]
