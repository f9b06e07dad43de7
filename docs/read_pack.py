"""A reader of packs that needs no eigenlorax: the weight updates of one adapter, as docs/pack-format.md specifies them.

float64, float32, float16, int8 and int4 packs; bfloat16 is not a dtype of NumPy.
"""

import json
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors.numpy import load


def delta_weights(pack, name):
    """Module name → delta weight, (out, in) float64, of every module that adapter `name` has in the subspace.

    Of a convolution, `in` is channels · height · width.
    """
    pack = Path(pack)
    manifest = json.loads((pack / "subspace_config.json").read_bytes())
    digest = manifest.pop("digest")
    canonical = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
    assert manifest["format"] == "eigenlorax-pack"
    assert manifest["format_version"] in (1, 2, 3, 4, 5)
    assert digest == sha256(canonical.encode()).hexdigest(), "the manifest was changed"
    subspace, entry = manifest["subspace"], manifest["adapters"][name]
    growth = subspace["growth"] if "growth" in subspace else subspace["augmentations"]
    tensors = load(checked(pack / subspace["file"], subspace["sha256"]))
    spare = sha256("".join(file + digest for file, digest in sorted(entry["files"].items())).encode()).hexdigest()[:8]
    place = pack / "adapters" / f"{name}@{spare}"
    place = place if place.is_dir() else pack / "adapters" / name
    files = {file: checked(place / file, digest) for file, digest in entry["files"].items()}
    coefficients, source = load(files["adapter_model.safetensors"]), json.loads(files["source_config.json"])
    found = {}
    config = json.loads(files["adapter_config.json"])
    for module in config["target_modules"]:
        key = config["subspace_modules"].get(module, module)
        sides = [(f"{key}.{side}", subspace["modules"][key][side]) for side in ("down", "up")]
        # versions 1 and 2 have grown by augmentations alone
        grown = [side.get("grown") or [step["n_extra"] for step in growth] for _, side in sides]
        down, up = (
            basis(tensors, label, side["dimension"], n, growth) for (label, side), n in zip(sides, grown, strict=True)
        )
        c_down, c_up = (matrix(coefficients, f"base_model.model.{module}.eigenlorax_{side}") for side in ("down", "up"))
        if manifest["coefficient_dtype"] in ("int8", "int4"):
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


def scaling(source, module):
    """lora_alpha / r, or lora_alpha / √r for rsLoRA; the first pattern that fits the module goes before the default."""

    def value(patterns, default):
        return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)

    rank = value(source.get("rank_pattern"), source.get("r", 8))
    return value(source.get("alpha_pattern"), source.get("lora_alpha", 8)) / rank ** (
        0.5 if source.get("use_rslora") else 1
    )


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
