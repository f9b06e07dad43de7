"""The tables of `results/*.json` in Markdown: printed, written between markers, or compared with what stands there.

Only the standard library: no package that is measured needs to be installed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bytes_tables
import coded_fit_tables
import error_tables
import file_bytes_tables
import find_tables
import growth_tables
import history_tables
import measured
import merging_tables
import profile_tables
import recorded
import training_memory_tables
import vllm_tables
from markdown_table import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUN, DEMO, TUNER, REPORT, CONTINUAL, BANK, VLLM, SDXL = (
    RESULTS / f"{name}.json" for name in ("run", "demo", "tuner", "report", "continual", "bank", "vllm", "sdxl")
)
BYTES, CORES, HISTORIES, PROFILE, CODED_FIT, GROWTH, FILE_BYTES = (
    RESULTS / f"{name}.json" for name in ("bytes", "cores", "histories", "profile", "coded_fit", "growth", "file_bytes")
)
TRAINING_MEMORY = RESULTS / "training_memory.json"
FIND = RESULTS / "find.json"
MERGING, MERGING_REFERENCES = RESULTS / "merging.json", RESULTS / "merging_references.json"
WHO = ("bank", "peft", "tuner")

Json = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="replace the text between the markers")
    action.add_argument("--check", action="store_true", help="exit with 1 if the text between the markers differs")
    arguments = parser.parse_args()
    demo, tuner, report = (json.loads(path.read_text(encoding="utf-8")) for path in (DEMO, TUNER, REPORT))
    continual, bank, vllm, sdxl = (
        json.loads(path.read_text(encoding="utf-8")) for path in (CONTINUAL, BANK, VLLM, SDXL)
    )
    run = json.loads(RUN.read_text(encoding="utf-8")) if RUN.is_file() else {"runs": [], "cases": {}}
    stored = json.loads(BYTES.read_text(encoding="utf-8")) if BYTES.is_file() else {"runs": [], "cells": {}}
    histories = json.loads(HISTORIES.read_text(encoding="utf-8")) if HISTORIES.is_file() else {"series": {}}
    docs = ROOT / "docs"
    blocks = {
        (docs / "growing.md", "results"): continual_table(continual),
        (docs / "bank.md", "results"): bank_table(bank),
        (docs / "report.md", "results"): report_table(report),
        (ROOT / "benchmarks" / "README.md", "results"): f"{measured.markdown(run)}\n\n{vllm_tables.markdown(vllm)}",
        (ROOT / "benchmarks" / "README.md", "bytes"): bytes_tables.markdown(stored),
        (ROOT / "benchmarks" / "README.md", "histories"): history_tables.markdown(histories),
        (docs / "benchmarks.md", "results"): measured.page(run),
        (docs / "benchmarks.md", "profile"): profile_tables.markdown(json.loads(PROFILE.read_text(encoding="utf-8"))),
        (docs / "benchmarks.md", "coded-fit"): coded_fit_tables.markdown(
            json.loads(CODED_FIT.read_text(encoding="utf-8"))
        ),
        (docs / "benchmarks.md", "growth"): growth_tables.markdown(json.loads(GROWTH.read_text(encoding="utf-8"))),
        (docs / "merging.md", "speed"): merging_tables.markdown(
            *(json.loads(path.read_text(encoding="utf-8")) for path in (MERGING, MERGING_REFERENCES))
        ),
        (docs / "find.md", "results"): find_tables.markdown(json.loads(FIND.read_text(encoding="utf-8"))),
        (docs / "histories.md", "results"): history_tables.page(histories),
        (docs / "bytes-results.md", "bytes"): bytes_tables.page(stored),
        (docs / "bytes-results.md", "file-bytes"): file_bytes_tables.markdown(
            json.loads(FILE_BYTES.read_text(encoding="utf-8"))
        ),
        (docs / "bytes-results.md", "cores"): cores_table(json.loads(CORES.read_text(encoding="utf-8"))),
        (docs / "get-started" / "is-it-for-you.md", "sharing"): sharing_table(demo),
        (ROOT / "README.md", "results"): figures_table(run, demo),
        (docs / "training-memory.md", "memory"): training_memory_tables.markdown(
            json.loads(TRAINING_MEMORY.read_text(encoding="utf-8"))
        ),
        (docs / "training-memory.md", "results"): tuner_table(tuner),
        (docs / "diffusion.md", "sdxl"): sdxl_table(sdxl),
        (docs / "vllm.md", "serving-bytes"): vllm_tables.computed_bytes(vllm),
        (docs / "vllm.md", "serving-speed"): vllm_tables.speed(vllm),
    }
    if not (arguments.write or arguments.check):
        print("\n\n".join(blocks.values()))
        return 0
    stale = {place: block for place, block in blocks.items() if replaced(*place, block) != place[0].read_text("utf-8")}
    for (page, mark), block in stale.items():
        if arguments.write:
            page.write_text(replaced(page, mark, block), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}, {mark}: {'written' if arguments.write else 'not the tables of the results'}")
    if stale and arguments.check:
        print("python benchmarks/table.py --write mends it.", file=sys.stderr)
        return 1
    return 0


def replaced(page: Path, mark: str, block: str) -> str:
    """The page with `block` between the two comments that have this mark."""
    begins, ends = (f"<!-- {mark}:{which} -->" for which in ("begin", "end"))
    head, begin, rest = page.read_text(encoding="utf-8").partition(begins)
    _, end, tail = rest.partition(ends)
    if not (begin and end):
        raise SystemExit(f"{page} lacks {begins} or, after it, {ends}: there is nowhere to write the tables.")
    return f"{head}{begins}\n{block}\n{ends}{tail}"


def report_table(report: Json) -> str:
    """Return processor time and size of reports beside the fit, and how both grow."""
    where = report["environment"]
    rows = [
        [
            figures["label"],
            f"{figures['fit_seconds']:.1f}",
            f"{figures['report_seconds']:.1f}",
            f"{figures['ratio']:.1f}",
            f"{figures['measured']} of {figures['modules']}",
            f"{figures['left_out']}",
            f"{figures['page_bytes'] / 1e6:.2f}",
            f"{figures['json_bytes'] / 1e6:.2f}",
        ]
        for figures in report["collections"]
    ]
    header = ("collection", "fit, s", "report, s", "ratio", "modules", "left out", "page, MB", "JSON, MB")
    growth = [
        [
            field,
            ", ".join(map(str, figures["sizes"])),
            *(
                f"{', '.join(f'{seconds:.1f}' for seconds in figures[verb]['seconds'])} ({figures[verb]['exponent']})"
                for verb in ("fit", "report")
            ),
        ]
        for field, figures in report["growth"].items()
    ]
    return (
        "Processor seconds of `fit` without a report, and of `report` from the pack to the page and the JSON. Both\n"
        "start Python and import torch.\n\n"
        f"{table(header, rows)}\n\n"
        "Growth from 40 planted adapters of 24 modules, 384 wide, r = 8: processor seconds, and in brackets the\n"
        "exponent over the upper half of the sizes.\n\n"
        f"{table(('size', 'sizes', 'fit, s', 'report, s'), growth)}\n\n"
        f"`{report['command']}`; {where['processor']}, torch {where['torch']}, one thread."
    )


def cores_table(cores: Json) -> str:
    """Bytes and errors of packs with cores, beside a fit for the same worst error."""
    where, rows = cores["environment"], []
    for one in cores["rows"]:
        coded = one["coded"]
        basis, own = one["basis_bytes"], one["coefficient_bytes"]
        rows.append(
            [
                str(one["k"]),
                {None: "–", "full": "full", "diagonal": "diagonal"}[one["cores"]],
                f"{basis / 1e3:.0f}",
                f"{own / 1e3:.1f}",
                f"{one['ratio']:.1f}",
                f"{one['mean']:.3f}",
                f"{one['worst']:.3f}",
                f"{(coded['basis_bytes'] + coded['coefficient_bytes']) / (basis + own):.2f}",
            ]
        )
    header = (
        "k",
        "cores",
        "basis, kB",
        "adapters, kB",
        "ratio",
        "mean error",
        "worst error",
        "`--max-error` ÷ these bytes",
    )
    return (
        f"{table(header, rows)}\n\n"
        f"{cores['adapters']} adapters, r = 8, {cores['dtype']}. Last column: the bytes of a pack fitted with "
        f"`--max-error` at this worst error, as a share of the bytes of this one.\n\n"
        f"`{cores['command']}`; {where['processor']}, torch {where['torch']}."
    )


def sdxl_table(sdxl: Json) -> str:
    """Bytes and seconds of SDXL's shapes, by the number of components."""
    where, n = sdxl["environment"], sdxl["adapters"]
    rows = []
    for k, one in sdxl["sizes"].items():
        each = one["coefficient_bytes"] / n
        lora = one["lora_bytes"] / n
        rows.append(
            [
                k,
                f"{one['basis_bytes'] / 1e6:.0f}",
                f"{each / 1e6:.2f}",
                f"{one['ratio']:.1f}",
                f"{100 * lora / (one['basis_bytes'] + 100 * each):.0f}",
                f"{one['ratio_without_basis']:.0f}",
                f"{one['fit_seconds']:.0f} ({one['fit_cpu_seconds']:.0f})",
                f"{one['export_seconds']:.1f}",
            ]
        )
    header = (
        "k",
        "basis, MB",
        "a style, MB",
        f"ratio, {n} styles",
        "100 styles",
        "without the basis",
        "fit, s (of the CPU)",
        "open and export one, s",
    )
    return (
        f"{n} LoRAs of rank {sdxl['rank']} on {sdxl['modules']} linear layers of SDXL's UNet, as files of "
        f"{sdxl['file_bytes'] / n / 1e6:.0f} MB in float16, from files to a pack in memory. The weights are random: "
        "bytes and times depend on shapes alone, and the errors of real styles at such k do not.\n\n"
        f"{table(header, rows)}\n\n"
        f"`{sdxl['command']}`; {where['processor']}, one thread, torch {where['torch']}, "
        f"diffusers {where['diffusers']}, seed {sdxl['seed']}."
    )


def continual_table(continual: Json) -> str:
    """Errors after the last adapter has come, by collection and method of adding."""
    where, parts = continual["environment"], []
    for name, one in continual["collections"].items():
        rows = []
        for method, runs in one["methods"].items():
            last = [{field: values[-1] for field, values in run.items()} for run in runs]
            errors = [
                f"{sum(step[field] for step in last) / len(last):.3f}"
                for field in ("first", "early", "mean", "worst", "new", "recorded")
            ]
            widest = max(step["k"] for step in last)
            ratio = sum(step["lora_bytes"] / step["stored_bytes"] for step in last) / len(last)
            rows.append([method, *errors, str(widest), f"{ratio:.2f}"])
        header = ("method", "first", "first 5", "all", "worst", "last", "recorded", "k", "ratio")
        kind = {"demo": "The demo's adapters", "planted": "Synthetic adapters that share 24 directions per side"}
        title = f"**{kind[name.partition(' ')[0]]}**, {one['adapters']} of them, at most k = {one['k']}:"
        parts.append(f"{title}\n\n{table(header, rows)}")
    orders = continual["orders"]
    made = f"`{continual['command']}`; means over {orders} orders of the adapters, seeds 0 to {orders - 1}"
    return "\n\n".join([*parts, f"{made}; {where['processor']}, torch {where['torch']}."])


def bank_table(bank: Json) -> str:
    """Loading a thousand adapters; a step of decoding, an encoder and prompts with one adapter and with several."""
    loading, where = bank["loading"], bank["environment"]
    n, first, last = loading["adapters"], loading["peft_milliseconds_of_the_first_five"], loading["peft_adapters"]
    peft_last = loading["peft_milliseconds_of_the_last_five"]
    loaded = [
        [
            f"{n:,} adapters of a BERT-base, from a pack on disk: median / least / of the CPU",
            f"{loading['median_seconds']:.1f} / {loading['least_seconds']:.1f} / {loading['cpu_seconds']:.1f} s",
        ],
        [
            f"one more, `add`: of the first {n // 10} / of the last {n // 10}",
            f"{loading['milliseconds_of_the_first_tenth']:.2f} / {loading['milliseconds_of_the_last_tenth']:.2f} ms",
        ],
        [
            f"PEFT, `load_adapter` of the same as LoRAs: of the first 5 / of the last 5 of {last}",
            f"{first:.0f} / {peft_last:.0f} ms",
        ],
        [
            "bytes: the bank ÷ basis and coefficients in the pack",
            f"{loading['bank_bytes']:,} ÷ {loading['basis_bytes'] + loading['coefficient_bytes']:,} = "
            f"{loading['bank_bytes_ratio']:.3f}",
        ],
        ["`set_adapter`", f"{loading['set_adapter_milliseconds']:.2f} ms"],
        [f"`using` with {bank['rows']} adapters, once a request", f"{loading['using_64_milliseconds']:.1f} ms"],
    ]
    counts = [name.removeprefix("bank ") for name in bank["decode"] if name.startswith("bank ")]
    mixed = [
        [count, *(ratio(bank[part].get(f"{who} {count}")) for part in ("decode", "encoder") for who in WHO)]
        for count in sorted(counts, key=int)
    ]
    prompts = [
        [shape.replace("x", "×"), f"{1e3 * one['base']['median_seconds']:.0f}", ratio(one["bank"]), ratio(one["peft"])]
        for shape, one in bank["prefill"].items()
    ]
    return (
        f"Random adapters of r = {bank['r']} and k = {bank['k']} on random models; modules are query and value "
        "(BERT-base: 12 layers, 768 wide; MiniLM: 6 layers, 384 wide) or q, k, v and o (Llama: 4 layers, 768 "
        "wide, a vocabulary of 1,000).\n\n"
        f"{table(('', 'measured'), loaded)}\n\n"
        f"{opening_table(bank['opening'])}\n\n"
        f"{generation_table(bank['generation'], bank['rows'])}\n\n"
        f"Time ÷ that of the base model, {bank['rows']} rows that use so many adapters in turn. A step of the Llama's "
        f"decoding has a cache of {bank['cached_tokens']} tokens; the MiniLM encodes 32 tokens a row. `tuner` is "
        "`adapter_names=` of our PEFT method.\n\n"
        f"{table(('adapters', *(f'{part}, {who}' for part in ('decode', 'encode') for who in WHO)), mixed)}\n\n"
        "One adapter, prompts of the Llama (rows × tokens): milliseconds of the base model, and time ÷ that.\n\n"
        f"{table(('prompt', 'base, ms', 'bank', 'peft'), prompts)}\n\n"
        f"`{bank['command']}`; {where['processor']}, one thread, torch {where['torch']}, peft {where['peft']}, "
        f"transformers {where['transformers']}, seed {bank['seed']}. Runs are interleaved on a machine that others use "
        "too; ratios are medians over rounds of the ratio within a round."
    )


def opening_table(opening: Json) -> str:
    """Seconds to open packs and to read an adapter."""
    labels = {"floats": "float32", "coded": "entropy-coded"}
    rows = [
        [
            f"{each['adapters']:,}, {labels[name]}",
            *(f"{1e3 * each[key]:.0f}" for key in ("open_seconds", "first_seconds", "adapter_seconds")),
        ]
        for name, each in opening.items()
    ]
    coded = opening["coded"]
    return (
        "Milliseconds of the processor to open a pack, and to read an adapter as a LoRA: 24 modules of a BERT-base, "
        "r = 16 in floats; 24 modules 768 wide, r = 8, entropy-coded for an error of 0.1. The first adapter reads the "
        "bases.\n\n"
        f"{table(('pack', 'open', 'first adapter', 'one more'), rows)}\n\n"
        f"`export` of all adapters of the entropy-coded pack takes {coded['export_seconds']:.1f} s for "
        f"{coded['export_bytes'] / 1e6:.0f} MB."
    )


def generation_table(generation: Json, rows: int) -> str:
    """Prompts and decoding of a Llama block and MiniLM, beside the ratio of multiplications."""
    cells = []
    for label, each in generation["parts"].items():
        for name in ("64 adapters", "1 adapter"):
            low, high = each[name]["interval"]
            cells.append(
                [
                    label.replace("llama", "Llama").replace("minilm", "MiniLM"),
                    name.split()[0],
                    f"{each['base_seconds']:.2f}",
                    f"{each[name]['to_base']:.3f} ({low:.3f}–{high:.3f})",
                    f"{each[name]['multiplications_to_base']:.3f}",
                ]
            )
    header = ("", "adapters", "base, s", "bank ÷ base", "multiplications ÷ base")
    return (
        f"{rows} rows with prompts of {generation['prompt']} tokens, which are processed at once (prefill), and in the "
        f"Llama {generation['steps']} steps of decoding after them. The Llama is one block 2,048 wide with 16 heads, 4 "
        "of keys and values, and an MLP 7,168 wide, in float32; adapters are on q, k, v and o. Processor time; medians "
        f"over {generation['rounds']} rounds with 95 % intervals. The last column is the ratio if all products ran at "
        "one speed: products 16 numbers wide are bound by memory, and do not.\n\n"
        f"{table(header, cells)}"
    )


def ratio(timing: Json | None) -> str:
    return "–" if timing is None else f"{timing['to_base']:.2f}"


def tuner_table(tuner: Json) -> str:
    """Bytes of one layer and seconds of a step, beside LoRA and VeRA."""
    layer, minilm = tuner["layer"], tuner["minilm"]
    where = tuner["environment"]
    rows = [
        [
            name,
            f"{one['trained_numbers']:,}",
            f"{one['activation_bytes'] / 2**20:.2f}",
            f"{(one['parameter_bytes'] + one['gradient_bytes'] + one['optimizer_bytes']) / 2**10:.0f}",
            f"{minilm['methods'][name]['median_seconds']:.3f}",
            f"{minilm['methods'][name]['to_lora_r8']:.3f}",
        ]
        for name, one in sorted(layer["bytes"].items())
    ]
    header = (
        "",
        "trained numbers",
        "kept for backward, MiB",
        "trained + gradient + AdamW, KiB",
        "s a step",
        "÷ LoRA r=8",
    )
    batch = " × ".join(map(str, minilm["batch"]))
    return (
        f"The first three columns are of one layer {layer['width']} wide with {layer['rows']} rows of input and "
        f"k = {layer['k']}, in float32; the last two of a training step of MiniLM (query and value, a batch of {batch} "
        f"tokens), medians of {len(minilm['methods']['LoRA r=8']['all_seconds'])} interleaved runs.\n\n"
        f"{table(header, rows)}\n\n"
        f"`{tuner['command']}`; {where['processor']}, one thread, torch {where['torch']}, peft {where['peft']}, "
        f"transformers {where['transformers']}, seed {tuner['seed']}."
    )


def sharing_table(demo: Json) -> str:
    """What adapters share, and what storing them gains: checkpoints of one run, and adapters of other tasks."""
    history, left_out = demo["history"], demo["subspace"]["left_out"]
    checkpoints = {version["step"]: version["left_out_error"] for version in history["versions"]}
    rows = [
        [
            f"**versions of one run**: {len(checkpoints)} checkpoints of a RoBERTa",
            f"**{sum(checkpoints.values()) / len(checkpoints):.2f}**",
            f"**{history['source_bytes'] / history['stored_bytes']:.1f}× fewer bytes** as a history "
            f"(`eigenlorax track`), {history['baseline_bytes'] / history['stored_bytes']:.1f}× fewer than the best "
            f"baseline, each within {max(version['delta_error'] for version in history['versions']):.2f}",
        ],
        [
            f"**trained separately**: {len(demo['outcomes'])} adapters of a MiniLM for several tasks",
            f"**{sum(left_out.values()) / len(left_out):.2f}**",
            f"{demo['summary']['bytes']['ratio']:.1f}× fewer bytes in a pack (`eigenlorax fit`), each within "
            f"{max(outcome['delta_error'] for outcome in demo['outcomes']):.2f}; no basis for new adapters",
        ],
    ]
    header = ("adapters", "mean error of an adapter that was left out", "stored")
    return (
        f"{table(header, rows)}\n\n"
        f"Errors are relative, from 0 to 1; k = {history['n_components']}; bytes against files with LoRAs in 16 bits, "
        "without heads. `eigenlorax demo --json`."
    )


def figures_table(run: Json, demo: Json) -> str:
    """The README's figures: what the demo found, and how the fit compares."""
    outcomes, where = demo["outcomes"], demo["environment"]
    subspace, history = demo["subspace"], demo["history"]
    left_out_checkpoints = {version["step"]: version["left_out_error"] for version in history["versions"]}
    attempts = {one["method"]: one for one in demo["new_task"]}
    k = subspace["n_components"]
    rows = [
        [
            f"{len(outcomes)} adapters of a MiniLM, trained separately",
            f"**{demo['summary']['bytes']['ratio']:.1f} times smaller**, each within "
            f"{max(outcome['delta_error'] for outcome in outcomes):.2f}; accuracy "
            f"{mean_of(outcomes, 'original'):.3f} → {mean_of(outcomes, 'recycled'):.3f}",
        ],
        [
            f"{len(history['versions'])} checkpoints of a RoBERTa as a history",
            f"**{history['source_bytes'] / history['stored_bytes']:.1f} times smaller**, each within "
            f"{max(version['delta_error'] for version in history['versions']):.2f}; the best baseline "
            f"{history['source_bytes'] / history['baseline_bytes']:.1f} times",
        ],
        [
            f"error of an adapter that was left out of the fit, at k = {k}",
            f"checkpoints of one run **{mean_worst(left_out_checkpoints)}**; trained separately "
            f"{mean_worst(subspace['left_out'])}",
        ],
        [
            f"a new task on {attempts['coefficients']['trained_numbers']:,} coefficients, accuracy",
            f"{attempts['coefficients']['accuracy']:.3f}; random basis "
            f"{attempts['coefficients, random basis']['accuracy']:.3f}; LoRA of "
            f"{attempts['LoRA r=8']['trained_numbers']:,} numbers {attempts['LoRA r=8']['accuracy']:.3f}",
        ],
    ]
    measured_rows = run_rows(run, k)
    count = {1: "row is", 2: "two rows are"}.get(len(measured_rows), "")
    last = (
        f"the last {count} from `python benchmarks/run.py` ([all of it](benchmarks/README.md)), the others"
        if count
        else "all are"
    )
    note = (
        f"Errors are relative, mean / worst; bytes without task heads; {last} from `eigenlorax demo --json`; "
        f"{where['processor']}, 1 thread, torch {where['torch']}. Files: [benchmarks/results](benchmarks/results)."
    )
    return f"{table(('', 'measured'), [*rows, *measured_rows])}\n\n{note}"


def run_rows(run: Json, k: int) -> list[list[str]]:
    """What the benchmark found, as far as it was measured: errors at equal k, and seconds."""
    rows = []
    collection, equal_k = (error_tables.found(run, what) for what in ("collection", "equal k"))
    if collection and equal_k:
        row = next(row for row in equal_k if row["k"] == k)
        rows.append(
            [
                f"error at k = {k}, {len(collection['adapters'])} adapters",
                f"**{mean_and_worst(row, 'delta')}**; paper's `factors` {mean_and_worst(row, 'factors')}; "
                f"lorashare {mean_and_worst(row, 'lorashare')}",
            ]
        )
    fits = recorded.by_method(recorded.section(run, "fit"))
    if {"delta", "lorashare"} <= fits.keys():
        figures = [f"{recorded.median_seconds(each):.2f} {recorded.NAMES[method]}" for method, each in fits.items()]
        shape = recorded.words_of(fits["delta"][0]["shape"])
        rows.append([f"seconds to fit {shape}", "; ".join(figures)])
    return rows


def mean_of(outcomes: Sequence[Json], field: str) -> float:
    return sum(outcome[field] for outcome in outcomes) / len(outcomes)


def mean_worst(errors: dict[str, float]) -> str:
    return f"{sum(errors.values()) / len(errors):.3f} / {max(errors.values()):.3f}"


def mean_and_worst(row: Json, method: str) -> str:
    figures = row["methods"][method]
    return f"{figures['mean']:.3f} / {figures['worst']:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
