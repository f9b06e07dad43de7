"""Manifests as earlier releases wrote them."""

import json
from hashlib import sha256

FIELDS = {2: ("max_error", "auto"), 3: ("solver",), 5: ("max_bytes", "ratio"), 7: ("purpose", "head_error")}
"""Of `fit`, by the version that they are new in."""
OF_ADAPTERS = {
    3: ("bound",),
    6: ("parent",),
    7: ("head_error", "source_head_bytes", "source_carried_bytes", "head_numbers", "carried_numbers"),
}
"""Of each adapter, by the version that they are new in."""


def older(body, version):
    """The content of a manifest as a release that knew this version, 1 to 7, and none later has written it.

    A subspace that was extended has no version before 3.
    """
    gone = [name for since, names in FIELDS.items() if version < since for name in names]
    fit = {key: value for key, value in body["fit"].items() if key not in gone}
    of_adapter = [name for since, names in OF_ADAPTERS.items() if version < since for name in names]
    adapters = {
        name: {key: value for key, value in entry.items() if key not in of_adapter}
        for name, entry in entries_of(body).items()
    }
    body = unfolded(body)
    body["subspace"].pop("shared_fields", None)
    body["shared_fields"].pop("files", None)
    subspace = body["subspace"]
    if version < 7:
        subspace.pop("reference_bytes", None)
    body = {**body, "adapters": adapters, "format_version": version, "fit": fit, "subspace": subspace}
    assert not body.pop("histories", None)
    if version < 7:
        assert body.pop("basis", None) is None
        body = {key: value for key, value in body.items() if key not in ("shared_fields", "source_fields")}
    if version >= 3:
        return body
    first = next(iter(subspace["modules"].values()))["down"]["grown"]
    steps = zip(first, subspace.pop("growth"), strict=True)
    subspace["augmentations"] = [{"n_extra": n, "seed": step["seed"]} for n, step in steps]
    subspace["modules"] = {
        name: {side: {k: v for k, v in one.items() if k not in ("grown", "shortfall")} for side, one in pair.items()}
        for name, pair in subspace["modules"].items()
    }
    return {**body, "subspace": subspace}


def unfolded(body):
    """The content of a manifest of version 8 with all fields in each side, and all files in each adapter's entry."""
    subspace, files = body["subspace"], body.get("shared_fields", {}).get("files", {})
    shared = subspace.get("shared_fields", {})
    modules = {
        name: {
            side: {**shared, **{k: v for k, v in fields.items() if k not in ("down", "up")}, **fields.get(side, {})}
            for side in ("down", "up")
        }
        for name, fields in subspace["modules"].items()
    }
    adapters = {name: {**entry, "files": {**files, **entry["files"]}} for name, entry in body["adapters"].items()}
    return {
        **body,
        "subspace": {**subspace, "modules": modules},
        "adapters": adapters,
        "shared_fields": dict(body.get("shared_fields", {})),
    }


def entries_of(body):
    """The entries of a manifest, with what adapters have in common."""
    complete = {name: {**body.get("shared_fields", {}), **entry} for name, entry in unfolded(body)["adapters"].items()}
    return {name: {"rounding_error": entry["delta_error"], **entry} for name, entry in complete.items()}


def write_older(folder, version):
    """Make a pack on disk one of an earlier version; its manifest."""
    path = folder / "subspace_config.json"
    body = json.loads(path.read_text())
    manifest = older(body, version)
    del manifest["digest"]
    for name, entry in manifest["adapters"].items():
        config = folder / "adapters" / name / "source_config.json"
        fields = json.loads(config.read_text())
        if "eigenlorax_changed" in fields:
            kept = {k: v for k, v in body["source_fields"].items() if k not in fields.get("eigenlorax_removed", [])}
            if "eigenlorax_modules" in fields:
                kept["target_modules"] = sorted(body["subspace"]["modules"])
            indent, end = fields.get("eigenlorax_indent", 2), fields.get("eigenlorax_end", "")
            whole = json.dumps({**kept, **fields["eigenlorax_changed"]}, indent=indent, sort_keys=True) + end
            config.write_text(whole)
            entry["files"]["source_config.json"] = sha256(config.read_bytes()).hexdigest()
    canonical = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    manifest["digest"] = sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest
