"""On GPUs vLLM compiles its models, on CPUs not where there are LoRAs. Here a part of one is compiled by itself."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax
from families import FAMILIES, made_adapters
from offline import in_worker, slots, with_engine

pytestmark = pytest.mark.slow

TOKENS = 5


def test_layers_with_bases_compile_to_one_graph(tmp_path):
    base = FAMILIES["llama"].made(tmp_path / "base")
    made_adapters(FAMILIES["llama"], base, tmp_path / "adapters", n=3)
    eigenlorax.fit(tmp_path / "adapters", n_components=11).save(tmp_path / "pack")

    def check(llm):
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context

        runner = in_worker(llm)
        mlp = runner.model.model.layers[0].mlp
        wrapper = next(iter(slots(llm).values())).punica_wrapper
        # every row has the adapter in the first slot, which is some adapter
        wrapper.is_prefill, wrapper.indices_len[0] = False, TOKENS
        wrapper._token_lora_indices.zero_()
        x = torch.randn(TOKENS, mlp.gate_up_proj.input_size, generator=torch.Generator().manual_seed(1))
        with (
            torch.no_grad(),
            set_current_vllm_config(runner.vllm_config),
            set_forward_context(None, runner.vllm_config),
        ):
            without = mlp(x)
            for layer in slots(llm).values():
                for stacked in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                    stacked.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
            wanted = mlp(x)
            assert (wanted - without).norm() > 0.1 * without.norm()
            for backend in ("eager", "inductor"):
                found = torch.compile(mlp.forward, backend=backend, fullgraph=True)(x)
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    with_engine(check, base, tmp_path / "pack", shared=True)
