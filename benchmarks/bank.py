"""Many adapters on one model: a thousand loaded, and batches whose rows use up to 64 of them, beside PEFT's LoRA.

    python benchmarks/bank.py                  # minutes; writes benchmarks/results/bank.json
    python benchmarks/bank.py --only generation

Models have the shapes of BERT-base, a small Llama, MiniLM and one block of a Llama 2048 wide, with random weights;
adapters are random too. Times do not depend on the numbers. All variants of a timing are run in turn, round after
round, each round starting with another one; ratios are medians over rounds of the ratio to the base model in the same
round.
`generation` has processor time, 95 % intervals of its medians by the bootstrap, and the ratio of multiplications, which
is the ratio of times if all products were equally fast.
"""

import argparse
import copy
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import report
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel

import eigenlorax as ex
from eigenlorax.cli import env
from eigenlorax.core.basis import Basis
from eigenlorax.core.coefficients import Coefficients
from eigenlorax.core.subspace import ModuleBases, Subspace
from eigenlorax.pack import manifest
from eigenlorax.pack.manifest import FitInfo
from eigenlorax.pack.packed_adapter import PackedAdapter
from eigenlorax.pack.record import Record

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "bank.json"
K, RANK, ALPHA = 64, 16, 32
ADAPTERS, PEFT_ADAPTERS, MIXED = 1000, 60, (1, 4, 16, 64)
ROWS, CACHED, LOADS = 64, 64, 5
PROMPT, STEPS = 128, 32
DRAWS = 1000
SEED = 20261126
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

Json = dict[str, Any]
Run = Callable[[], object]


def bert_base() -> nn.Module:
    return BertModel(BertConfig(vocab_size=1000)).eval()


def minilm() -> nn.Module:
    config = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return BertModel(config).eval()


def llama() -> nn.Module:
    return LlamaForCausalLM(llama_config(width=768, layers=4, heads=12, kv_heads=12, inner=2048)).eval()


def llama_block() -> nn.Module:
    """One block in the proportions of Llama-3-8B, half as wide, without embeddings of a large vocabulary or a head."""
    return LlamaModel(llama_config(width=2048, layers=1, heads=16, kv_heads=4, inner=7168)).eval()


def llama_config(*, width: int, layers: int, heads: int, kv_heads: int, inner: int) -> LlamaConfig:
    # a small vocabulary: that of a real one would make the base model slower, and every ratio smaller
    return LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        max_position_embeddings=1024,
    )


def same_weights(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors: where they are in memory alone makes models differ by some percent."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def made_pack(model: nn.Module, targets: tuple[str, ...], n: int) -> ex.Pack:
    """A pack of n random adapters of one recipe, in a random subspace: a fit would give the same shapes."""
    generator = torch.Generator().manual_seed(SEED)

    def basis(dimension: int) -> Basis:
        rows = torch.linalg.qr(torch.randn(dimension, K, generator=generator))[0].mT.contiguous()
        return Basis(rows, torch.ones(K), energy=1.0)

    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if name.endswith(targets)}
    subspace = Subspace({name: ModuleBases(basis(shape[1]), basis(shape[0])) for name, shape in sorted(shapes.items())})
    config = {"peft_type": "LORA", "base_model_name_or_path": None, "r": RANK, "lora_alpha": ALPHA}
    text = json.dumps({**config, "target_modules": sorted(shapes), "rank_pattern": {}, "alpha_pattern": {}})
    adapters = {}
    for number in range(n):
        coefficients = {
            name: Coefficients(
                0.1 * torch.randn(RANK, K, generator=generator),
                0.1 * torch.randn(K, RANK, generator=generator),
                ALPHA / RANK,
            )
            for name in subspace.modules
        }
        record = Record(
            delta_error=0.0,
            rounding_error=0.0,
            in_fit=True,
            untrained=False,
            ranks=[RANK],
            modules=len(coefficients),
            lora_numbers=sum(RANK * sum(shape) for shape in shapes.values()),
            coefficient_bytes=sum(one.stored_bytes for one in coefficients.values()),
            carried_bytes=0,
            head_bytes=0,
            source_sha256=f"{number:064x}",
            source_file_bytes=0,
        )
        places = {name: name for name in coefficients}
        adapters[f"a{number}"] = PackedAdapter(f"a{number}", coefficients, places, {}, {}, text, record)
    return ex.Pack(
        subspace,
        manifest.describe(subspace),
        adapters,
        FitInfo(K, None, None, None, None, auto=False, weighting="delta", sweeps=2),
        base_model=None,
        revision=None,
        coefficient_dtype=torch.float32,
    )


def peft_model(base: nn.Module, targets: tuple[str, ...], n: int) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights=False)
    model = get_peft_model(same_weights(base), config, adapter_name="a0")
    for number in range(1, n):
        model.add_adapter(f"a{number}", config)
    return model.eval()


def tuner_model(base: nn.Module, targets: tuple[str, ...], pack: ex.Pack, n: int) -> Any:
    """The same by our method of PEFT: adapters that were trained on coefficients."""

    def config() -> ex.EigenLoraxConfig:
        return ex.EigenLoraxConfig(
            subspace=pack, r=RANK, lora_alpha=ALPHA, target_modules=list(targets), start="uniform", init_weights=False
        )

    model = get_peft_model(same_weights(base), config(), adapter_name="a0")
    for number in range(1, n):
        model.add_adapter(f"a{number}", config())
    return model.eval()


def measure_loading(n: int = ADAPTERS, n_peft: int = PEFT_ADAPTERS) -> Json:
    """A pack of n adapters on disk, to a bank that serves them, digests checked. Files are in the page cache."""
    targets = ("query", "value")
    with tempfile.TemporaryDirectory() as folder:
        model = bert_base()
        path = made_pack(model, targets, n).save(Path(folder) / "pack")
        ex.Pack.open(path).verify()
        walls, cpus = [], []
        for _ in range(LOADS):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            bank = ex.AdapterBank(model, path)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            bank.unload()
        pack = ex.Pack.open(path)
        bank = ex.AdapterBank(model, pack)
        basis = pack.subspace.stored_bytes
        coefficients = sum(record.coefficient_bytes for record in pack.records.values())
        held = bank.nbytes
        switching = [_seconds(lambda name=name: bank.set_adapter(name)) for name in bank.names]
        bank.unload()
        bank = ex.AdapterBank(model, pack, adapters=[])
        each = [_seconds(lambda name=name: bank.add(name)) for name in pack.names]
        names = bank.names[:ROWS]
        laying_out = [_seconds(lambda: bank.using(names)) for _ in range(20)]
        bank.unload()
        loras = pack.export(Path(folder) / "loras", pack.names[:n_peft])
        adapted = peft_model(model, targets, 1)
        theirs = [
            _seconds(lambda name=name, lora=lora: adapted.load_adapter(lora, name))
            for name, lora in list(loras.items())[1:]
        ]
    tenth = max(1, n // 10)
    return {
        "adapters": n,
        "median_seconds": statistics.median(walls),
        "least_seconds": min(walls),
        "cpu_seconds": statistics.median(cpus),
        "milliseconds_an_adapter": 1e3 * statistics.median(each),
        "milliseconds_of_the_first_tenth": 1e3 * statistics.median(each[:tenth]),
        "milliseconds_of_the_last_tenth": 1e3 * statistics.median(each[-tenth:]),
        "peft_adapters": n_peft,
        "peft_milliseconds_of_the_first_five": 1e3 * statistics.median(theirs[:5]),
        "peft_milliseconds_of_the_last_five": 1e3 * statistics.median(theirs[-5:]),
        "set_adapter_milliseconds": 1e3 * statistics.median(switching),
        "using_64_milliseconds": 1e3 * statistics.median(laying_out),
        "basis_bytes": basis,
        "coefficient_bytes": coefficients,
        "bank_bytes": held,
        "bank_bytes_ratio": held / (basis + coefficients),
    }


def measure_opening(n: int = ADAPTERS) -> Json:
    """A pack of n adapters in floats, and one of 100 that is entropy-coded, each opened in a process of its own."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made_pack(bert_base(), ("query", "value"), n).save(folder / "floats")
        planted = report.COLLECTIONS["100"][0]
        report.make(folder / "adapters", planted)
        ex.fit(folder / "adapters", warn_above=1).save(folder / "coded")
        for name in ("floats", "coded"):
            runs = [open_in_child(folder / name) for _ in range(LOADS)]
            found[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        exported = folder / "exported"
        started = time.process_time()
        ex.Pack.open(folder / "coded").export(exported)
        found["coded"]["export_seconds"] = time.process_time() - started
        found["coded"]["export_bytes"] = sum(file.stat().st_size for file in exported.rglob("*") if file.is_file())
    return found


def open_in_child(path: Path) -> Json:
    child = [sys.executable, __file__, "--open", path]
    done = subprocess.run(child, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    figures: Json = json.loads(done.stdout)
    return figures


def open_pack(path: Path) -> Json:
    """Processor seconds to open a pack, to read its first adapter, and to read one more."""

    def read(name: str) -> None:
        assert all(len(factors.down) for factors in pack.adapter(name).modules.values())

    times = [time.process_time()]
    pack = ex.Pack.open(path)
    times.append(time.process_time())
    for name in pack.names[:11]:
        read(name)
        times.append(time.process_time())
    opening, first, *others = (after - before for before, after in pairwise(times))
    return {
        "adapters": len(pack),
        "open_seconds": opening,
        "first_seconds": first,
        "adapter_seconds": statistics.median(others),
    }


def measure_decode(rounds: int = 20) -> Json:
    """A step of 64 rows with a cache of 64 tokens."""
    targets = LLAMA_TARGETS
    base = llama()
    served = same_weights(base)
    pack = made_pack(served, targets, max(MIXED))
    bank = ex.AdapterBank(served, pack)
    adapted, tuned = peft_model(base, targets, max(MIXED)), tuner_model(base, targets, pack, max(MIXED))
    ids = torch.randint(5, 1000, (ROWS, CACHED), generator=torch.Generator().manual_seed(SEED))

    def step(model: Any, **options: Any) -> Run:
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache, **options)

        def run() -> None:
            model(input_ids=ids[:, :1], past_key_values=cache, **options)
            cache.crop(-1)

        return run

    return measured(base, bank, adapted, tuned, step, rounds)


def measure_encoder(rounds: int = 20) -> Json:
    """64 rows of 32 tokens."""
    targets = ("query", "value")
    base = minilm()
    served = same_weights(base)
    pack = made_pack(served, targets, max(MIXED))
    bank = ex.AdapterBank(served, pack)
    adapted, tuned = peft_model(base, targets, max(MIXED)), tuner_model(base, targets, pack, max(MIXED))
    ids = torch.randint(5, 1000, (ROWS, 32), generator=torch.Generator().manual_seed(SEED))
    return measured(
        base, bank, adapted, tuned, lambda model, **options: lambda: model(input_ids=ids, **options), rounds
    )


def measure_prefill(rounds: int = 20) -> Json:
    """One adapter, prompts of several lengths."""
    targets = LLAMA_TARGETS
    base = llama()
    served = same_weights(base)
    bank = ex.AdapterBank(served, made_pack(served, targets, 1))
    bank.set_adapter("a0")
    adapted = peft_model(base, targets, 1)
    found = {}
    for rows, tokens in ((1, 16), (1, 128), (1, 512), (8, 128)):
        ids = torch.randint(5, 1000, (rows, tokens), generator=torch.Generator().manual_seed(SEED))
        models = {"base": base, "bank": served, "peft": adapted}
        runs = {name: lambda model=model, ids=ids: model(input_ids=ids) for name, model in models.items()}
        found[f"{rows} x {tokens}"] = timed(runs, rounds)
    return found


def measure_generation(rounds: int = 7) -> Json:
    """64 rows with an adapter each: prompts of 128 tokens, and 32 steps of decoding in the Llama block."""
    block, encoder = llama_block(), minilm()
    parts = {
        "llama block, decode": paired(block, LLAMA_TARGETS, decode_run, rounds),
        "llama block, prefill": paired(block, LLAMA_TARGETS, prefill_run, rounds),
        "minilm, prefill": paired(encoder, ("query", "value"), prefill_run, rounds),
    }
    return {"prompt": PROMPT, "steps": STEPS, "adapters": ROWS, "rounds": rounds, "parts": parts}


def prompts() -> torch.Tensor:
    return torch.randint(5, 1000, (ROWS, PROMPT), generator=torch.Generator().manual_seed(SEED))


def prefill_run(model: Any) -> Run:
    ids = prompts()
    return lambda: model(input_ids=ids)


def decode_run(model: Any) -> Run:
    ids, cache = prompts(), DynamicCache()
    model(input_ids=ids, past_key_values=cache)

    def run() -> None:
        for _ in range(STEPS):
            model(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-STEPS)

    return run


def paired(base: nn.Module, targets: tuple[str, ...], make: Callable[[Any], Run], rounds: int) -> Json:
    """The base model beside the bank with 64 adapters and with one: processor seconds, and ratios with intervals."""
    served = same_weights(base)
    bank = ex.AdapterBank(served, made_pack(served, targets, ROWS))
    runs = {"base": make(base)}
    for name, adapters in (("64 adapters", bank.names), ("1 adapter", "a0")):
        with bank.using(adapters):
            inner = make(served)
        runs[name] = _inside(bank, adapters, inner)
    multiplications = {name: count_multiplications(run) for name, run in runs.items()}
    names, seconds = list(runs), {name: [] for name in runs}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - started)
    bank.unload()
    generator = random.Random(SEED)
    found: Json = {"base_seconds": statistics.median(seconds["base"])}
    for name in names[1:]:
        ratios = [served / base for served, base in zip(seconds[name], seconds["base"], strict=True)]
        draws = sorted(statistics.median(generator.choices(ratios, k=rounds)) for _ in range(DRAWS))
        found[name] = {
            "to_base": statistics.median(ratios),
            "interval": [draws[DRAWS // 40], draws[-DRAWS // 40 - 1]],
            "multiplications_to_base": multiplications[name] / multiplications["base"],
        }
    return found


def count_multiplications(run: Run) -> int:
    """Multiplications of all products of matrices."""
    in_place = {
        torch.ops.aten.addmm_: lambda _, left, right, **options: 2 * left[0] * left[1] * right[1],
        torch.ops.aten.baddbmm_: lambda _, left, right, **options: 2 * left[0] * left[1] * left[2] * right[2],
    }
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops() // 2


def measured(base: Any, bank: ex.AdapterBank, adapted: Any, tuned: Any, make: Callable[..., Run], rounds: int) -> Json:
    """The base model, the bank, PEFT's LoRA and our method of PEFT: one adapter for all rows, or several in turn."""
    runs: dict[str, Run] = {"base": make(base)}
    for n in MIXED:
        names = [f"a{row % n}" for row in range(ROWS)]
        with bank.using("a0" if n == 1 else names):
            inner = make(bank.model)
        runs[f"bank {n}"] = _inside(bank, "a0" if n == 1 else names, inner)
        adapted.set_adapter("a0")
        runs[f"peft {n}"] = make(adapted) if n == 1 else make(adapted, adapter_names=names)
    runs[f"tuner {n}"] = make(tuned, adapter_names=names)
    return timed(runs, rounds)


def _inside(bank: ex.AdapterBank, names: str | list[str], run: Run) -> Run:
    """A step of a longer request: what its adapters multiply with was laid out when it began."""
    request = bank.using(names)

    def inside() -> None:
        with request:
            run()

    return inside


def timed(runs: Mapping[str, Run], rounds: int) -> Json:
    """Processor seconds of each, interleaved; `to_base` is the median over rounds of the ratio to "base"."""
    names, seconds = list(runs), {name: [] for name in runs}
    for run in runs.values():
        run()
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - started)
    return {
        name: {
            "median_seconds": statistics.median(each),
            "least_seconds": min(each),
            "to_base": statistics.median(one / base for one, base in zip(each, seconds["base"], strict=True)),
        }
        for name, each in seconds.items()
    }


def _seconds(run: Run) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


PARTS: dict[str, Callable[[], Json]] = {
    "opening": measure_opening,
    "loading": measure_loading,
    "decode": measure_decode,
    "encoder": measure_encoder,
    "prefill": measure_prefill,
    "generation": measure_generation,
}


def measure(parts: Sequence[str] = tuple(PARTS)) -> Json:
    """All of it, or some parts, on one thread."""
    with one_thread():
        found = {part: PARTS[part]() for part in parts}
    return {"k": K, "r": RANK, "rows": ROWS, "cached_tokens": CACHED, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part again, and keep the others")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open is not None:
        with one_thread():
            print(json.dumps(open_pack(options.open)))
        return
    transformers.logging.set_verbosity_error()
    result = {
        **(json.loads(RESULT.read_text(encoding="utf-8")) if options.only else {}),
        "command": "python benchmarks/bank.py",
        "date": datetime.now(UTC).date().isoformat(),
        "environment": env.collect(),
        "seed": SEED,
        **measure(options.only or tuple(PARTS)),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {RESULT}", file=sys.stderr)


if __name__ == "__main__":
    main()
