"""Write the report on whether adapters share a subspace, for the demo's adapters, as a page, Markdown and JSON.

    pip install ".[demo]" && python examples/report.py          # writes report/

`eigenlorax report` does the same from the shell.
"""

from pathlib import Path

import eigenlorax as ex
from eigenlorax.train import demo

OUT = Path("report")

adapters = demo.data() / "adapters"
pack = ex.fit(adapters, n_components=32)
report = ex.report(pack, adapters)

print(report.verdict.headline)
for finding in report.verdict.findings:
    print("-", finding.text, finding.advice)
worst = report.adapters[0]
print(f"worst: {worst.name}, {worst.delta_error:.3f} in the fit, {worst.left_out_error:.3f} left out of it")
for name in ("report.html", "report.md", "report.json"):
    report.save(OUT / name)
