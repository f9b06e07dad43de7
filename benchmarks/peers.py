"""eigenlorax beside lorashare and vlora-dev, in one process: seconds, errors at equal k, errors at equal bytes.

README.md beside this file says what is measured and how to read it; `table.py` makes the tables out of the result.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from collection import Shape, copies_in_float32
from fidelity import describe, measure_equal_bytes, measure_equal_k, measure_scaling
from methods import versions
from speed import SEED, measure_speed

from eigenlorax.cli import env

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = Path("src/eigenlorax/tasks/demo_data/adapters")
RESULT = Path("benchmarks/results/peers.json")
SHAPES = (Shape(32, 16, 4096, 1), Shape(32, 8, 768, 4))
QUICK_SHAPES = (Shape(6, 4, 96, 2),)
COMPONENTS = (4, 8, 16, 32, 48, 64, 96)
QUICK_COMPONENTS = (4, 32)
LORASHARE_TARGET, DELTA_TARGET = 40.0, 4.0

Json = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        result = run(arguments, Path(scratch))
    text = json.dumps(result, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
        print(f"wrote {arguments.output}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapters", type=Path, default=ADAPTERS, help="a folder of PEFT folders (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help=f"the result (default: {RESULT}; with --quick: standard output)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each timing, interleaved (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small shapes, few k, one repetition")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repetitions = 1
    elif arguments.output is None:
        arguments.output = ROOT / RESULT
    return arguments


def run(arguments: argparse.Namespace, scratch: Path) -> Json:
    load = os.getloadavg()[0]
    components = QUICK_COMPONENTS if arguments.quick else COMPONENTS
    sources = copies_in_float32(arguments.adapters, scratch / "adapters")
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    results: Json = {
        "speed": [
            measure_speed(shape, arguments.repetitions, scratch / f"shape-{index}")
            for index, shape in enumerate(shapes)
        ],
        "collection": describe(sources, arguments.adapters),
        "equal_k": measure_equal_k(sources, components, scratch),
        "equal_bytes": measure_equal_bytes(sources, scratch, 2 if arguments.quick else None),
        "scaling": measure_scaling(sources, scratch / "exported"),
    }
    return {
        "command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cores": os.cpu_count(),
            "cpu": env.collect()["processor"],
            "load_at_start": load,
            "system": platform.system(),
        },
        "quick": arguments.quick,
        "seeds": {"synthetic": SEED},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions()},
        "results": {**results, "claims": check_claims(results)},
    }


def check_claims(results: Json) -> Json:
    """What the project says of itself, and where the figures above do not bear it out."""
    claims: Json = {}
    for other in ("factors", "lorashare"):
        for figure in ("mean", "mean_square", "worst"):
            claims[f"equal k: {words(figure)} of delta no higher than {other}"] = verdict(
                {f"k = {row['k']}": row["delta_no_higher_than"][other][figure] for row in results["equal_k"]}
            )
    within = [row for row in results["equal_bytes"] if row["within_half"]]
    for figure in ("mean", "mean_square", "worst"):
        claims[f"equal bytes, up to half of the LoRAs': {words(figure)} of delta no higher than vlora-dev"] = verdict(
            {f"k = {row['k']}": row["delta_no_higher_than"]["vlora"][figure] for row in within}
        )
    large = SHAPES[0].label
    ratios = {row["shape"]: row["ratios"]["whole"] for row in results["speed"]}
    claims[f"{large}: factors at least {LORASHARE_TARGET:g} times as fast as lorashare"] = verdict(
        {shape: each["lorashare_to_factors"] >= LORASHARE_TARGET for shape, each in ratios.items() if shape == large}
    )
    claims[f"delta takes at most {DELTA_TARGET:g} times as long as factors"] = verdict(
        {shape: each["delta_to_factors"] <= DELTA_TARGET for shape, each in ratios.items()}
    )
    return claims


def verdict(cases: Mapping[str, bool]) -> Json:
    return {"cases": len(cases), "fails_at": [case for case, holds in cases.items() if not holds]}


def words(figure: str) -> str:
    return figure.replace("_", " ")


if __name__ == "__main__":
    main()
