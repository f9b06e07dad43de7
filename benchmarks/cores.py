"""Bytes and errors of packs with cores and without, and what a fit for the same error takes: `results/cores.json`.

The adapters are those that come with the package. Bytes are those of all tensors, the basis counted and heads aside.
"""

import json
from pathlib import Path
from typing import Any

from core_packs import fit_with_cores

import eigenlorax as ex
from eigenlorax.cli.env import collect
from eigenlorax.train import demo

RESULTS = Path(__file__).with_name("results") / "cores.json"
DTYPE = "float16"
SIZES = (8, 16, 32, 64)
KINDS = (None, "full", "diagonal")


def figures(pack: ex.Pack) -> dict[str, Any]:
    found, errors = pack.summary.bytes, pack.summary.in_fit
    assert errors is not None
    return {
        "basis_bytes": found.basis,
        "coefficient_bytes": found.coefficients,
        "ratio": found.ratio,
        "mean": errors.mean,
        "worst": errors.worst,
    }


def main() -> None:
    adapters, rows = demo.data() / "adapters", []
    for k in SIZES:
        for kind in KINDS:
            pack = (
                ex.fit(adapters, n_components=k, dtype=DTYPE, warn_above=1.0)
                if kind is None
                else fit_with_cores(adapters, kind, n_components=k, dtype=DTYPE)
            )
            row = figures(pack)
            coded = ex.fit(adapters, max_error=row["worst"], warn_above=1.0)
            rows.append({"k": k, "cores": kind, **row, "coded": figures(coded)})
            print(json.dumps(rows[-1]))
    found = {
        "command": "python benchmarks/cores.py",
        "environment": collect(),
        "dtype": DTYPE,
        "adapters": len(list(adapters.iterdir())),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
