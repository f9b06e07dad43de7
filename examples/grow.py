"""Add adapters to a pack without a change of the earlier ones, and fit it again; on the demo's adapters, offline.

    pip install . && python examples/grow.py          # writes grown/

`eigenlorax add --extend` and `eigenlorax refit` do the same from the shell.
"""

from hashlib import sha256
from pathlib import Path

import eigenlorax as ex
from eigenlorax.train import demo

OUT = Path("grown")


def digests(pack: Path) -> dict[str, str]:
    """Return the sha256 of every file of the pack's adapters."""
    files = (path for path in (pack / "adapters").rglob("*") if path.is_file())
    return {str(path.relative_to(pack)): sha256(path.read_bytes()).hexdigest() for path in files}


adapters = sorted(path.parent for path in (demo.data() / "adapters").glob("*/adapter_config.json"))
first, late = adapters[:12], adapters[12:]
ex.fit(first, n_components=16, warn_above=1.0).save(OUT / "pack", overwrite=True)
before = digests(OUT / "pack")

# the error of a projection on the old components; nothing is saved
alone = ex.Pack.open(OUT / "pack").add_all(late, warn_above=1.0)

with ex.Pack.edit(OUT / "pack") as pack:
    extended = pack.add_all(late, extend=4, warn_above=1.0)
for name, record in extended.items():
    print(f"{name}: {alone[name].delta_error:.3f} lost by projection, {record.delta_error:.3f} with 4 more components")

after = digests(OUT / "pack")
print("files of earlier adapters that changed:", sum(after[path] != digest for path, digest in before.items()))

found = ex.refit(OUT / "pack", adapters, n_components=24, warn_above=1.0)
found.pack.save(OUT / "refitted", overwrite=True)
for name, change in found.changes.items():
    print(f"{name}: {change.error_before:.3f} → {change.error_after:.3f}, moved by {change.moved:.3f}")
print("got worse:", ", ".join(found.worse) or "none")
