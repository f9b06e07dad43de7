"""Manifests as earlier releases wrote them."""

import json
from hashlib import sha256

SINCE_2 = ("max_error", "auto")
SINCE_3 = ("solver",)
SINCE_5 = ("max_bytes", "ratio")


def older(body, version):
    """The content of a manifest as a release that knew this version, 1 or 2, and none later has written it.

    A subspace that was extended has no such version.
    """
    gone = (*SINCE_3, *SINCE_5) if version == 2 else (*SINCE_2, *SINCE_3, *SINCE_5)
    subspace = dict(body["subspace"])
    first = next(iter(subspace["modules"].values()))["down"]["grown"]
    steps = zip(first, subspace.pop("growth"), strict=True)
    subspace["augmentations"] = [{"n_extra": n, "seed": step["seed"]} for n, step in steps]
    subspace["modules"] = {
        name: {side: {k: v for k, v in one.items() if k not in ("grown", "shortfall")} for side, one in pair.items()}
        for name, pair in subspace["modules"].items()
    }
    fit = {key: value for key, value in body["fit"].items() if key not in gone}
    adapters = {
        name: {key: value for key, value in entry.items() if key != "bound"} for name, entry in body["adapters"].items()
    }
    return {**body, "adapters": adapters, "format_version": version, "fit": fit, "subspace": subspace}


def write_older(folder, version):
    """Make a pack on disk one of an earlier version; its manifest."""
    path = folder / "subspace_config.json"
    manifest = older(json.loads(path.read_text()), version)
    del manifest["digest"]
    canonical = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    manifest["digest"] = sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest
