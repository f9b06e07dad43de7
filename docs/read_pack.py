"""A reader of packs that needs no eigenlorax: the weight updates of one adapter, as docs/pack-format.md specifies them.

float64, float32, float16, int8, int4 and coded packs, and such with cores; bfloat16 is not a dtype of NumPy.

Packs of earlier format versions are read too. Each differs from the next one as follows:

7. No short form of bytes, no `histories`, no `shared_fields` in `subspace`, no `files` in `shared_fields`, no
   `eigenlorax_modules`, `eigenlorax_indent`, `eigenlorax_end` and `deflated_metadata`. `rests` in place of
   `residual_sides`.
6. No `basis`, `shared_fields`, `source_fields`, `purpose`, `head_error`, `source_head_bytes`, `source_carried_bytes`
   (equal to `head_bytes` and `carried_bytes`). Configs are whole, heads exact. Only `coded` packs.
5. No `parent`. `coded` packs have a tensor `<module>.<side>.components.coded` per side.
4. No `max_bytes` and `ratio`. Float dtypes only, no residuals.
3. No `kernels` and `source_file.json`.
2. No `solver` ("exact"), `shortfall` (0) and `bound` (false). In place of `growth` and `grown`, a list `augmentations`
   of `n_extra` and `seed` for all sides. All adapters have the fingerprint of the subspace.
1. No `max_error` and `auto`.
"""

import json
import math
import re
import zlib
from bisect import bisect_right
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors.numpy import load


def delta_weights(pack, name):
    """Module name → delta weight, (out, in) float64, of every module that adapter `name` has in the subspace.

    Of a convolution, `in` is channels · height · width.
    """
    pack = Path(pack)
    manifest = read_manifest(pack)
    subspace, entry = whole(manifest["subspace"]), entry_of(manifest, name)
    growth = subspace["growth"] if "growth" in subspace else subspace["augmentations"]
    tensors = load(checked(pack / subspace["file"], subspace["sha256"]))
    files = read_files(pack, name, entry)
    coefficients = load(files["adapter_model.safetensors"])
    source = source_config(files["source_config.json"], manifest.get("source_fields", {}), subspace["modules"])
    found = {}
    config = json.loads(files["adapter_config.json"])
    names = config.get("target_modules", sorted(subspace["modules"]))
    places = {module: config.get("subspace_modules", {}).get(module, module) for module in names}
    if manifest["coefficient_dtype"] == "coded":
        assert config["subspace_fingerprint"] in [subspace["fingerprint"], *(step["fingerprint"] for step in growth)]
        modules = {places[module]: (subspace["modules"][places[module]], rank(source, module)) for module in places}
        parent = entry.get("parent")
        if parent is not None:
            assert "eigenlorax_coded" not in coefficients
            coefficients = load(read_files(pack, parent, entry_of(manifest, parent))["adapter_model.safetensors"])
            codes = {"name": parent, "sha256": sha256(coefficients["eigenlorax_coded"].tobytes()).hexdigest()}
            assert config["parent"] == codes, "the parent's codes are others"
        blobs = coded_bases(tensors, subspace["modules"], joined=manifest["format_version"] >= 6)
        updates = coded_updates(coefficients["eigenlorax_coded"].tobytes(), blobs, modules)
        return {module: updates[places[module]] for module in places}
    for module, key in places.items():
        sides = [(f"{key}.{side}", subspace["modules"][key][side]) for side in ("down", "up")]
        # versions 1 and 2 have grown by augmentations alone
        grown = [side.get("grown") or [step["n_extra"] for step in growth] for _, side in sides]
        down, up = (
            basis(tensors, label, side["dimension"], n, growth) for (label, side), n in zip(sides, grown, strict=True)
        )
        kind = manifest["coefficient_dtype"].partition("-")[0]
        if kind in ("full", "diagonal"):
            core = coefficients[f"base_model.model.{module}.eigenlorax_core_{kind}"].astype(float)
            c_up = np.diag(core) if kind == "diagonal" else of_rank(core, rank(source, module))
            c_down = np.eye(c_up.shape[1])
        else:
            c_down, c_up = (
                matrix(coefficients, f"base_model.model.{module}.eigenlorax_{side}") for side in ("down", "up")
            )
        if kind in ("int8", "int4"):
            c_up = c_up.T
        # an adapter from before a step of growth is as wide as the bases were then
        then = [step.get("fingerprint") for step in growth] + [subspace["fingerprint"]]
        later = then.index(config["subspace_fingerprint"])
        k_down, k_up = (side["k"] - sum(n[later:]) for (_, side), n in zip(sides, grown, strict=True))
        assert (c_down.shape[1], c_up.shape[0]) == (k_down, k_up)
        # what the bases do not hold of the two factors, where something is kept of that
        rest_down, rest_up = (
            coefficients.get(f"base_model.model.{module}.eigenlorax_{side}_rest", np.zeros(1)).astype(float)
            for side in ("down", "up")
        )
        found[module] = (
            scaling(source, module)
            * (up[:k_up].T @ c_up + rest_up)
            @ (c_down.astype(float) @ down[:k_down] + rest_down)
        )
    return found


def read_manifest(pack):
    """The manifest of a pack, without its digest."""
    manifest = json.loads((pack / "subspace_config.json").read_bytes())
    digest = manifest.pop("digest")
    canonical = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
    assert manifest["format"] == "eigenlorax-pack"
    assert manifest["format_version"] in range(1, 9)
    assert digest == sha256(canonical.encode()).hexdigest(), "the manifest was changed"
    return manifest


def version_files(pack, history, label):
    """The files that a version is decoded from, a key version first (read_version.py). label: of the version."""
    pack = Path(pack)
    listed = read_manifest(pack)["histories"][history]
    entries = {entry["version"]: {**listed["shared_fields"], **entry} for entry in listed["versions"]}
    chain = [entries[label]]
    while chain[-1].get("reference") is not None:
        chain.append(entries[chain[-1]["reference"]])
    return [version_file(pack / "versions", entry) for entry in reversed(chain)]


def version_file(folder, entry):
    """The bytes of a version: a file, or a part of a bundle of several versions."""
    bundle = entry.get("bundle")
    if bundle is None:
        return checked(folder / f"{entry['sha256'][:16]}.bin", entry["sha256"])
    start, size = entry["offset"], entry["lora_bytes"] + entry["tensor_bytes"]
    data = (folder / f"{bundle[:16]}.bin").read_bytes()[start : start + size]
    assert sha256(data).hexdigest() == entry["sha256"]
    return data


def training_basis(pack):
    """Module name → components (down, up) of the basis for training of a coded pack, (k, in) and (k, out) float64."""
    manifest = json.loads((Path(pack) / "subspace_config.json").read_bytes())
    subspace = whole(manifest["basis"]["subspace"])
    tensors = load(checked(Path(pack) / subspace["file"], subspace["sha256"]))
    return {
        module: tuple(
            basis(tensors, f"{module}.{side}", sides[side]["dimension"], sides[side]["grown"], subspace["growth"])
            for side in ("down", "up")
        )
        for module, sides in subspace["modules"].items()
    }


def coded_tensors(pack, name):
    """Key → numbers, of the heads and carried tensors of an adapter that are coded, in float64 before rounding."""
    pack = Path(pack)
    manifest = json.loads((pack / "subspace_config.json").read_bytes())
    subspace, entry = manifest["subspace"], entry_of(manifest, name)
    shared = load(checked(pack / subspace["file"], subspace["sha256"])).get("references.coded")
    references = [numbers.astype(np.float32).astype(float) for _, numbers in from_blob(shared, [])]
    files, found = read_files(pack, name, entry), {}
    for file, key in (("adapter_model.safetensors", "eigenlorax_heads"), ("carried.safetensors", "eigenlorax_carried")):
        blob = blob_of(files.get(file), key)
        found |= dict(from_blob(blob, references))
    return found


def blob_of(file, key):
    """The bytes of one tensor of a safetensors file, whatever the dtypes of the others are; None if it has none."""
    if file is None:
        return None
    size = int.from_bytes(file[:8], "little")
    place = json.loads(file[8 : 8 + size]).get(key)
    start, end = place["data_offsets"] if place else (0, 0)
    return np.frombuffer(file[8 + size + start : 8 + size + end], np.uint8) if place else None


def from_blob(blob, references):
    """Names and numbers of coded tensors."""
    if blob is None:
        return []
    data, parts, at = blob.tobytes(), [], 0
    for _ in range(2):
        size, at = varint(data, at)
        parts.append(zlib.decompress(data[at : at + size], -15))
        at += size
    classes, found, first = np.frombuffer(parts[1], np.uint8), [], 0
    for name, _, shape, mantissa, exponent, reference, n_classes, size in json.loads(parts[0]):
        numbers = np.zeros(shape) if reference is None else references[reference].reshape(shape).copy()
        if size:
            per_row = np.repeat(classes[first : first + n_classes], numbers.size // n_classes)
            integers = decoded(data[at : at + size], per_row.astype(int))
            numbers += integers.reshape(shape) * math.ldexp(mantissa, exponent)
        first, at = first + n_classes, at + size
        found.append((name, numbers))
    assert (first, at) == (len(classes), len(data))
    return found


def entry_of(manifest, name):
    """The fields of an adapter in the manifest, with those that it shares with most others."""
    shared, own = manifest.get("shared_fields", {}), manifest["adapters"][name]
    return {**shared, **own, "files": {**shared.get("files", {}), **own["files"]}}


def whole(subspace):
    """The description of a subspace, with all fields of each side in it."""
    modules = {}
    for module, fields in subspace["modules"].items():
        alike = {**subspace.get("shared_fields", {}), **fields}
        modules[module] = {side: {**alike, **fields.get(side, {})} for side in ("down", "up")}
    return {**subspace, "modules": modules}


def source_config(data, shared, modules):
    """The fields of a source's config, from its file, the fields that it shares with most others, and the names of
    all modules of the subspace."""
    fields = json.loads(data)
    if "eigenlorax_changed" not in fields:
        return fields
    kept = {key: value for key, value in shared.items() if key not in fields.get("eigenlorax_removed", [])}
    targets = {"target_modules": sorted(modules)} if fields.get("eigenlorax_modules") else {}
    return {**kept, **fields["eigenlorax_changed"], **targets}


def read_files(pack, name, entry):
    """The files of an adapter, by name."""
    spare = sha256("".join(file + digest for file, digest in sorted(entry["files"].items())).encode()).hexdigest()[:8]
    place = pack / "adapters" / f"{name}@{spare}"
    place = place if place.is_dir() else pack / "adapters" / name
    return {file: checked(place / file, digest) for file, digest in entry["files"].items()}


def checked(path, wanted):
    """The bytes of a file whose sha256 is known."""
    data = path.read_bytes()
    assert sha256(data).hexdigest() == wanted, f"{path} was changed"
    return data


def matrix(tensors, name):
    """A matrix of floats, or one of integers as the float32 numbers that they stand for."""
    if name in tensors:
        return tensors[name]
    codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
    if codes.dtype == np.uint8:
        halves = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), 2 * codes.shape[1])
        # half a byte of zeros at the end fills up a row of odd width
        odd = halves.size > 0 and not halves[:, -1].any()
        codes = halves[:, : halves.shape[1] - odd].astype(np.int8) - 8
    assert scales.shape == (len(codes), -(-codes.shape[1] // 64))
    numbers = codes * np.repeat(scales.astype(float), 64, axis=1)[:, : codes.shape[1]]
    return np.ldexp(numbers, tensors.get(f"{name}.exponent", 0)).astype(np.float32)


def of_rank(core, r):
    """The best approximation of a core that has a rank."""
    left, sigma, right = np.linalg.svd(core, full_matrices=False)
    return (left[:, :r] * sigma[:r]) @ right[:r]


def scaling(source, module):
    """lora_alpha / r, or lora_alpha / √r for rsLoRA."""
    alpha = fitting(source.get("alpha_pattern"), module, source.get("lora_alpha", 8))
    return alpha / rank(source, module) ** (0.5 if source.get("use_rslora") else 1)


def rank(source, module):
    """The r of a module."""
    return fitting(source.get("rank_pattern"), module, source.get("r", 8))


def fitting(patterns, module, default):
    """The value of the first pattern that fits the module."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)


def basis(tensors, label, dimension, grown, growth):
    """The components of one side, (k, dimension) float64: the fitted ones, then those of each step of its growth, of
    which augmented ones are rebuilt and checked."""
    stored, sums = matrix(tensors, f"{label}.components"), []
    in_one = f"{label}.components" in tensors  # floats of all steps are
    at = len(stored) - in_one * sum(n for n, step in zip(grown, growth, strict=True) if step["seed"] is None)
    rows = stored[:at, :dimension]  # without a row, none says whether four bits are of an odd width
    for index, (n, step) in enumerate(zip(grown, growth, strict=True)):
        if step["seed"] is None and not in_one:
            more = matrix(tensors, f"{label}.components.{index}") if n else rows[:0]
        elif step["seed"] is None:
            more, at = stored[at : at + n], at + n
        else:
            extra = orthonormal(normal(n, rows.shape[1], step["seed"], label), rows.astype(float))
            more = extra.astype(stored.dtype)
            sums.extend(more.astype(float).sum(axis=1))
        rows = np.concatenate([rows, more])
    if sums:
        assert np.abs(sums - tensors[f"{label}.extra_check"]).max() <= 1e-3, "rebuilt differently here"
    return rows.astype(float)


def normal(n, dimension, seed, label):
    """Standard normal numbers, (n, dimension), from Philox and Box–Muller."""
    key = np.frombuffer(sha256(f"{seed}\0{label}".encode()).digest()[:16], dtype="<u8")
    raw = np.random.Philox(key=key).random_raw(2 * n * dimension)
    u = ((raw >> np.uint64(11)).astype(float) + 0.5) * 2.0**-53
    return (np.sqrt(-2 * np.log(u[0::2])) * np.cos(2 * np.pi * u[1::2])).reshape(n, dimension)


def orthonormal(rows, against):
    """Rows made orthonormal to each other and to the rows of `against`."""
    clean = qr(against)
    for _ in range(2):
        rows = qr(rows - (rows @ clean.T) @ clean)
    return rows


def qr(rows):
    """Orthonormal rows of the same span, in order, the largest entry of each positive."""
    q = np.linalg.qr(rows.T)[0].T
    largest = np.take_along_axis(q, np.abs(q).argmax(axis=1, keepdims=True), axis=1)
    return np.where(largest < 0, -q, q)


def coded_bases(tensors, modules, joined):
    """(module, side) → the bytes of its basis, of those that have components. joined: whether they are one tensor."""
    names = [(name, side) for name in sorted(modules) for side in ("down", "up")]
    names = [(name, side) for name, side in names if modules[name][side]["k"] > sum(modules[name][side]["grown"])]
    if not joined:
        return {(name, side): tensors[f"{name}.{side}.components.coded"].tobytes() for name, side in names}
    data, at, found = tensors["components.coded"].tobytes(), 0, {}
    for key in names:
        size, at = varint(data, at)
        found[key], at = data[at : at + size], at + size
    assert at == len(data)
    return found


def coded_updates(data, blobs, modules):
    """Module name in the subspace → its update, of a coded adapter. blobs: bytes of bases by module and side. modules:
    sides and rank, by name in the subspace."""
    first = int.from_bytes(data[:3], "little")
    kind, is_short = first >> 21, first >> 21 in (2, 3, 4)
    if is_short:
        logarithm, flags, at = (first & 2**21 - 1) - 2**20, 2 * (kind == 3), 3
    else:
        assert kind != 5
        logarithm = int.from_bytes(data[:3], "little", signed=True)
        flags, at = varint(data, 3)
    step = 2.0 ** (logarithm / 2**14)
    if flags & 2:
        size, at = varint(data, at)
        levels, end = coded_levels(zlib.decompress(data[at : at + size], -15), len(modules), wide=flags & 1)
        stream = data[at + size :]
    elif kind == 4:
        levels, stream = [(data[at], [])] * len(modules), data[at + 1 :]
    else:
        levels, end = coded_levels(data[at:], len(modules), wide=flags & 1)
        stream = data[at + end :]
    bases = {}
    for name, (sides, _) in modules.items():
        for side in ("down", "up"):
            blob = blobs.get((name, side))
            clusters = coded_basis(blob, sides[side]["dimension"]) if blob is not None else []
            assert sum(len(rows) for rows, _ in clusters) == sides[side]["k"] - sum(sides[side]["grown"])
            nothing = np.zeros((0, sides[side]["dimension"])), np.zeros(0, int)
            bases[name, side] = clusters[flags >> 2] if clusters else nothing
    parts = []  # of the stream: how many numbers in a row, and their classes
    for name, (core, terms) in zip(sorted(modules), levels, strict=True):
        profiles = {side: bases[name, side][1] for side in ("down", "up")}
        if core:
            parts += [core - 1 - p - profiles["down"] for p in profiles["up"]]
        for side, own in (("down", 0), ("up", 2)):
            parts += [known[own] - 1 - profiles[side] for _, known in terms if known[own]]
            parts += [
                np.full(bases[name, side][0].shape[1], known[own + 1] - 1) for _, known in terms if known[own + 1]
            ]
    classes = np.maximum(np.concatenate([np.zeros(0, int), *parts]), 0)
    numbers = short_stream(stream, classes.tolist()) if is_short else decoded(stream, classes)
    rows = iter(np.split(numbers, np.cumsum([len(part) for part in parts])[:-1]) if parts else [])
    found = {}
    for name, (core, terms) in zip(sorted(modules), levels, strict=True):
        (v, _), (u, _) = (bases[name, side] for side in ("down", "up"))
        update = np.zeros((u.shape[1], v.shape[1]))
        if core:
            whole = np.array([next(rows) for _ in u]).reshape(len(u), len(v))
            update += u.T @ of_rank(whole, modules[name][1]) @ v
        sums = {"down": np.zeros((len(terms), v.shape[1])), "up": np.zeros((len(terms), u.shape[1]))}
        for side, own, basis_rows in (("down", 0, v), ("up", 2, u)):
            for index, (_, known) in enumerate(terms):
                sums[side][index] += next(rows) @ basis_rows if known[own] else 0.0
            for index, (_, known) in enumerate(terms):
                sums[side][index] += next(rows) if known[own + 1] else 0.0
        weights = np.array([2.0 ** (-scale / 8) for scale, _ in terms])
        found[name] = step * (update + (sums["up"].T * weights) @ sums["down"])
    return found


def coded_basis(data, dimension):
    """The components of each cluster of a side, and their profiles."""
    g = data[0]
    counts = np.frombuffer(data[1 : 1 + 2 * g], "<u2").astype(int)
    k, at = int(counts.sum()), 1 + 2 * g
    fineness, profile = (np.frombuffer(data[start : start + k], "u1").astype(int) for start in (at, at + k))
    unit = math.floor(16.5 + 4 * math.log2(math.sqrt(3) / math.pi) - 2 * math.log2(dimension))
    numbers = decoded(data[at + 2 * k :], np.repeat(np.clip(fineness + unit, 0, 127), dimension))
    rows = (numbers.reshape(k, dimension) * 2.0 ** (-fineness / 4)[:, None]).astype(np.float32).astype(float)
    edges = np.cumsum(counts)[:-1]
    return list(zip(np.split(rows, edges), np.split(profile, edges), strict=True))


def coded_levels(data, n, wide):
    """Of each of n modules, the level of its core, and its terms: each one's scale and four levels, 0 where it has no
    such numbers: coefficients and rest on down, coefficients and rest on up. And how many bytes these are."""
    size, data = len(data), np.frombuffer(data, "u1").astype(int)
    counts, data = data[:n], data[n:]
    if wide:
        counts, data = counts + 256 * data[:n], data[n:]
    total = int(counts.sum())
    cores, scales, flags = data[:n], np.cumsum(data[n : n + total]) % 256, data[n + total : n + 2 * total]
    data, levels = data[n + 2 * total :], np.zeros((total, 4), int)
    for bit in range(4):
        there = (flags >> bit & 1).astype(bool)
        levels[there, bit] = (data[: there.sum()] + scales[there] // 2) % 256
        data = data[there.sum() :]
    terms = list(zip(scales.tolist(), levels.tolist(), strict=True))
    parts = zip(cores.tolist(), np.cumsum(counts).tolist(), counts, strict=True)
    return [(core, terms[end - count : end]) for core, end, count in parts], size - len(data)


def varint(data, at):
    """A whole number, and where it ends."""
    number = shift = 0
    while True:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number, at


@cache
def table(c):
    """Of a class: how many bits are written as they are, what the first symbol stands for, and where symbols begin."""
    w, scale = max(0, (c - 24) // 4 + 1), 2.0 ** (c / 4 - 4)
    reach = int(16 * scale / 2**w) + 2
    spread = 2**15 - 2 * reach - 2
    inner = [
        i + math.floor(spread / (1 + math.exp((0.5 - (i - reach) * 2**w) / scale)) + 0.5)
        for i in range(1, 2 * reach + 1)
    ]
    return w, -reach, [0, *inner, 2**15 - 1, 2**15]


def hundredths(table):
    """Of a bit: what a number of a class takes on average, from its table."""
    w, _, bounds = table
    shares = np.diff(bounds)[:-1]
    return math.floor(100 * (shares / 2**15 * (15 - np.log2(shares) + w)).sum() + 0.5)


def short_stream(data, classes):
    """The whole numbers of a short stream, from its bytes and their classes."""
    remainder, width, numbers = int.from_bytes(data, "big"), 256 ** len(data), []
    for w, first, bounds in map(table, classes):
        place = remainder * 2**15 // width
        symbol = bisect_right(bounds, place) - 1
        start, end = bounds[symbol : symbol + 2]
        remainder, width = remainder * 2**15 - start * width, (end - start) * width
        is_escape = symbol == len(bounds) - 2
        w = 32 if is_escape else w
        low, remainder = divmod(remainder * 2**w, width)
        numbers.append(low - (low >> 31 << 32) if is_escape else ((symbol + first) << w) + low)
    return np.array(numbers, int)


def decoded(data, classes, tables=None):
    """The whole numbers of a stream, from its bytes and their classes, and the tables of classes."""
    classes = classes.tolist()
    tables = tables or {c: table(c) for c in set(classes)}
    bits = {c: hundredths(tables[c]) for c in tables}
    n = len(classes)
    lanes = min(max(sum(bits[c] for c in classes) // 409600, n // 16384, 1), n, 16384)
    states, at = np.frombuffer(data[: 4 * lanes], "<u4").tolist(), 4 * lanes
    numbers, raw, escapes = np.zeros(n, np.int64), [], []
    for i, c in enumerate(classes):
        w, first, bounds = tables[c]
        x, s = divmod(states[i % lanes], 2**15)
        symbol = bisect_right(bounds, s) - 1
        x = (bounds[symbol + 1] - bounds[symbol]) * x + s - bounds[symbol]
        if x < 2**16:
            x, at = x << 16 | int.from_bytes(data[at : at + 2], "little"), at + 2
        states[i % lanes] = x
        if symbol == len(bounds) - 2:
            escapes.append(i)
        else:
            numbers[i] = (symbol + first) << w
            raw += [(i, bit) for bit in reversed(range(w))]
    assert all(state == 2**16 for state in states), "not such a stream"
    end = at + -(-len(raw) // 8)
    bits = np.unpackbits(np.frombuffer(data[at:end], "u1"), count=len(raw))
    for (i, shift), bit in zip(raw, bits.tolist(), strict=True):
        numbers[i] += bit << shift
    numbers[escapes] = np.frombuffer(data[end:], "<i4")
    return numbers
