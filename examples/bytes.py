"""Packs for a size and for an error, on the demo's adapters, offline.

    pip install . && python examples/bytes.py          # writes bytes/

`eigenlorax fit --ratio`, `fit --max-error`, `inspect --verify` and `export` do the same from the shell.
"""

from pathlib import Path

import eigenlorax as ex
from eigenlorax.train import demo

OUT = Path("bytes")

adapters = sorted(path.parent for path in (demo.data() / "adapters").glob("*/adapter_config.json"))
*first, late = adapters[:7]

pack = ex.fit(first, ratio=10.0)
summary = pack.summary
print(f"{summary.bytes.ratio_with_heads:.1f} times smaller, with heads; delta error at most {summary.in_fit.worst:.3f}")
for point in pack.frontier:
    print(f"  at most {point.error:.3f} would take about {point.bytes:,.0f} bytes")

# an adapter that the fit has not seen is stored within the same error
record = pack.add(late)
print(f"{late.name}: {record.delta_error:.3f} lost, {record.coefficient_bytes:,} bytes")
pack.save(OUT / "pack", overwrite=True)

opened = ex.Pack.open(OUT / "pack")
found = ex.verify(opened, adapters[:7])
print("measured from the files:", "holds" if found.holds else "does not hold")

# ordinary LoRAs again
opened.export(OUT / "loras", [late.name], overwrite=True)
