"""What bases in 8 bits cost, and what adapters with a rest cost, in the bank: beside floats, and beside PEFT's LoRA.

    python benchmarks/rests.py             # a few minutes; prints tables; docs/bank.md cites some figures

Times are of the Llama of bank.py and its decoding, and of its MiniLM's encoding: random weights and adapters, in turn
with the base model, ratios within a round. Errors are of the real adapters that come with the package.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from markdown_table import table
from torch import Tensor, nn
from transformers import DynamicCache

import bank as made
import eigenlorax as ex
from eigenlorax.core import int8_rows, metrics, projection
from eigenlorax.core.subspace import ModuleBases
from eigenlorax.train import demo

ADAPTERS = (1, 4, 16, 64)


def with_rests(pack: ex.Pack) -> ex.Pack:
    """The same adapters with random rests on both sides of every module."""
    generator = torch.Generator().manual_seed(made.SEED)

    def rest(*shape: int) -> Tensor:
        return 0.01 * torch.randn(*shape, generator=generator)

    adapters = {}
    for name in pack.names:
        packed = pack.packed(name)
        found = {}
        for module, one in packed.coefficients.items():
            n_out, n_in = pack.subspace.modules[module].shape
            found[module] = replace(one, down_residual=rest(one.rank, n_in), up_residual=rest(n_out, one.rank))
        adapters[name] = replace(packed, coefficients=found)
    return ex.Pack(
        pack.subspace,
        pack.info,
        adapters,
        pack.fit_info,
        base_model=None,
        revision=None,
        coefficient_dtype=torch.float32,
    )


def decoding() -> tuple[nn.Module, tuple[str, ...], Callable[..., made.Run]]:
    """A Llama, and a step of 64 rows with a cache of 64 tokens."""
    ids = torch.randint(5, 1000, (made.ROWS, made.CACHED), generator=torch.Generator().manual_seed(made.SEED))

    def step(model: Any, **options: Any) -> made.Run:
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache, **options)

        def run() -> None:
            model(input_ids=ids[:, :1], past_key_values=cache, **options)
            cache.crop(-1)

        return run

    return made.llama(), ("q_proj", "k_proj", "v_proj", "o_proj"), step


def encoding() -> tuple[nn.Module, tuple[str, ...], Callable[..., made.Run]]:
    """A MiniLM, and 64 rows of 32 tokens."""
    ids = torch.randint(5, 1000, (made.ROWS, 32), generator=torch.Generator().manual_seed(made.SEED))
    return made.minilm(), ("query", "value"), lambda model, **options: lambda: model(input_ids=ids, **options)


def times(rounds: int) -> str:
    """Time over that of the base model, for as many adapters as there are columns."""
    rows = []
    for what, (base, targets, make) in (("decode", decoding()), ("encode", encoding())):
        pack = made.made_pack(base, targets, max(ADAPTERS))
        packs = {
            "float32": (pack, None),
            "8 bits": (pack, "int8"),
            "float32, with rests": (with_rests(pack), None),
        }
        runs: dict[str, made.Run] = {"base": make(base)}
        for kind, (one, dtype) in packs.items():
            served = ex.AdapterBank(made.same_weights(base), one, basis_dtype=dtype)
            for n, names in _names():
                with served.using(names):
                    inner = make(served.model)
                runs[f"{kind} {n}"] = made._inside(served, names, inner)
        lora = made.peft_model(base, targets, max(ADAPTERS))
        for n, names in _names():
            lora.set_adapter("a0")
            runs[f"LoRA in PEFT {n}"] = make(lora) if n == 1 else make(lora, adapter_names=names)
        found = made.timed(runs, rounds)
        rows += [
            [f"{what}, {kind}", *(f"{found[f'{kind} {n}']['to_base']:.2f}" for n in ADAPTERS)]
            for kind in (*packs, "LoRA in PEFT")
        ]
    return table(["time ÷ the base model's", *(f"{n} adapters" if n > 1 else "1 adapter" for n in ADAPTERS)], rows)


def _names() -> Iterator[tuple[int, str | list[str]]]:
    for n in ADAPTERS:
        yield n, "a0" if n == 1 else [f"a{row % n}" for row in range(made.ROWS)]


def errors() -> str:
    """What rounding the bases changes of the updates that come back, relative to their norms; and what a pack loses."""
    rows = []
    for k in (16, 32, 64):
        pack = ex.fit(demo.data() / "adapters", n_components=k, warn_above=1.0)
        lost = [record.delta_error for record in pack.records.values()]
        found = [f"{k}", f"{sum(lost) / len(lost):.3f}"]
        for rounded in (torch.Tensor.bfloat16, lambda rows: int8_rows.quantise_rows(rows).dequantise(torch.float32)):
            changed = [_changed(pack, name, rounded) for name in pack.names]
            found += [f"{sum(changed) / len(changed):.4f}", f"{max(changed):.4f}"]
        rows.append(found)
    return table(["k", "the pack loses", "bfloat16, mean", "worst", "8 bits, mean", "worst"], rows)


def _changed(pack: ex.Pack, name: str, rounded: Callable[[Tensor], Tensor]) -> float:
    packed, found = pack.packed(name), []
    for module, one in packed.coefficients.items():
        bases = pack.subspace.modules[packed.subspace_names[module]]
        sides = (replace(side, components=rounded(side.components).float()) for side in (bases.down, bases.up))
        found.append(metrics.module_error(projection.reconstruct(one, bases), one, ModuleBases(*sides)))
    return metrics.adapter_error(found).delta_error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="of the timings")
    given = parser.parse_args()
    print(errors())
    print()
    with made.one_thread():
        print(times(given.rounds))
