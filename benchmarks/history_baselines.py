"""Baselines of `histories.py`: bytes of a series by methods that code versions alone, together, or one after another.

Every lossy baseline has the same bounds as a history: the relative error of the whole update, and that of each other
tensor. Integers are entropy-coded with the package's own coder, each row in the class of its spread; the classes count.
"""

import lzma
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from history_files import SavedVersion, is_lora
from safetensors.numpy import load_file

import eigenlorax as ex
from eigenlorax.codec import entropy, logistic

BISECTIONS = 14
TRUNCATED = (0.0, 0.3, 0.5, 0.7, 0.85, 0.95)
"""Shares of the error bound that truncation may use; rounding has the rest."""
COMPONENTS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192)

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
Json = dict[str, Any]


def rounded(version: SavedVersion, bound: float) -> int:
    """Return the bytes of a version's factors, rounded as they are."""
    return _rounded_bytes(version.updates, version.updates, bound)


def truncated(version: SavedVersion, bound: float) -> int:
    """Return the bytes of a version's updates, truncated by SVD and rounded, at the best division of the error."""
    decomposed = {module: _decompose(up, down) for module, (up, down) in version.updates.items()}
    strengths = np.sort(np.concatenate([np.linalg.norm(down, axis=1) ** 4 for _, down in decomposed.values()]))
    sizes = []
    for share in TRUNCATED:
        # strengths are squared singular values: both factors have their square roots
        dropped = np.searchsorted(np.cumsum(strengths), (share * bound) ** 2 * strengths.sum())
        least = strengths[min(int(dropped), len(strengths) - 1)] if dropped else 0.0
        kept = {module: _strong_components(up, down, least) for module, (up, down) in decomposed.items()}
        sizes.append(_rounded_bytes(kept, version.updates, bound))
    return min(sizes)


def rounded_tensors(version: SavedVersion, bound: float) -> int:
    """Return the bytes of all tensors beside the LoRA, each rounded to the bound that a history has for it.

    Args:
        version: The version, whose tensors are a task head.
        bound: The error bound of the update. Matrices have it as well, at least 0.1 and at most 0.3; vectors 0.002.
    """
    streams = []
    for tensor in version.tensors.values():
        rows = np.atleast_2d(tensor).reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else max(tensor.size, 1))
        limit = (min(max(bound, 0.1), 0.3) if tensor.ndim > 1 else 0.002) * float(np.linalg.norm(rows))
        if limit:
            step = _bisect(lambda step, rows=rows: float(np.linalg.norm(np.rint(rows / step) * step - rows)), limit)
            streams.append(np.rint(rows / step))
    return _entropy_bytes(streams)


def shared_basis(folders: Sequence[Path], bound: float, scratch: Path) -> Json:
    """Return the bytes of a pack of all versions, entropy-coded at the error bound."""
    pack = ex.fit(list(folders), max_error=bound, warn_above=1.0)
    pack.save(scratch / "coded")
    sizes = pack.summary.bytes
    errors = [record.delta_error for record in pack.records.values()]
    return {
        "lora": sizes.basis + sizes.coefficients,
        "tensors": sizes.heads + sizes.carried,
        "files": folder_bytes(scratch / "coded"),
        "worst_error": max(errors),
    }


def components_in_8_bits(folders: Sequence[Path], bound: float, scratch: Path) -> Json | None:
    """Return the bytes of the LoRA in a pack in 8 bits with the fewest components that keep the bound, by xz.

    None if no number of `COMPONENTS` keeps it.
    """
    for k in COMPONENTS:
        pack = ex.fit(list(folders), n_components=k, dtype="int8", warn_above=1.0)
        worst = max(record.delta_error for record in pack.records.values())
        if worst <= bound:
            target = pack.save(scratch / f"components-{k}")
            sizes = [_xz_of_tensors(path) for path in sorted(target.rglob("*.safetensors"))]
            return {"k": k, "lora": sum(sizes), "worst_error": worst}
    return None


def _xz_of_tensors(file: Path) -> int:
    """Return the bytes of a file's bases or coefficients by xz, without heads and without spectra."""
    is_basis = file.name.startswith("subspace")
    tensors = {
        key: tensor
        for key, tensor in load_file(file).items()
        if not key.endswith("singular_values") and (is_basis or ".eigenlorax_" in key)
    }
    return len(_xz(b"".join(tensor.tobytes() for tensor in tensors.values())))


def xz_float16(versions: Sequence[SavedVersion], differences: bool) -> list[Json]:
    """Return the bytes of each version in float16, compressed by xz.

    Args:
        versions: The versions, in their order.
        differences: If true, differences to the version before, as integers in the order of the numbers.
    """
    sizes = []
    earlier: Mapping[str, np.ndarray] = {}
    for version in versions:
        current = {key: _ordered_float16(tensor) for key, tensor in version.raw.items()}
        streams: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for key, integers in current.items():
            has_earlier = differences and key in earlier and earlier[key].shape == integers.shape
            streams[is_lora(key)].append(integers - earlier[key] if has_earlier else integers)
        sizes.append({"lora": _xz_integers(streams[True]), "tensors": _xz_integers(streams[False])})
        earlier = current
    return sizes


def xz_of_float16_files(versions: Sequence[SavedVersion]) -> int:
    """Return the bytes of all versions as float16 tensors in one stream each, compressed by xz."""
    return sum(
        len(_xz(b"".join(tensor.astype(np.float16).tobytes() for tensor in version.raw.values())))
        for version in versions
    )


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _decompose(up: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of the same update whose rows are its singular vectors times roots of singular values."""
    left_q, left_r = np.linalg.qr(up)
    right_q, right_r = np.linalg.qr(down.T)
    left, values, right = np.linalg.svd(left_r @ right_r.T)
    roots = np.sqrt(values)
    return left_q @ left * roots, (right_q @ right.T * roots).T


def _strong_components(up: np.ndarray, down: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the components whose squared singular values are at least `least`; arguments as `_decompose` returns."""
    is_strong = np.linalg.norm(down, axis=1) ** 4 >= least
    return up[:, is_strong], down[is_strong]


def _rounded_bytes(factors: Factors, updates: Factors, bound: float) -> int:
    """Return the bytes of factors that are rounded until the updates have the error bound."""
    norm = np.sqrt(sum(_squared_difference(up, down, up * 0, down) for up, down in updates.values()))

    def error(step: float) -> float:
        squared = 0.0
        for module, (up, down) in factors.items():
            (up_integers, up_steps), (down_integers, down_steps) = _round(up, down, step)
            squared += _squared_difference(*updates[module], up_integers * up_steps, down_integers * down_steps)
        return float(np.sqrt(squared))

    step = _bisect(error, bound * norm) if norm else 1.0
    streams = []
    for up, down in factors.values():
        (up_integers, _), (down_integers, _) = _round(up, down, step)
        streams += [up_integers.T, down_integers]
    # the step sizes of rows follow from norms, one number of 16 bits for each row
    return _entropy_bytes(streams) + sum(2 * len(stream) for stream in streams)


def _round(up: np.ndarray, down: np.ndarray, step: float) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Return integers and step sizes of both factors.

    A number's error is multiplied by the norm of the row or column of the other factor: step sizes divide by it.
    """
    up_steps = step / np.maximum(np.linalg.norm(down, axis=1), 1e-30)
    down_steps = step / np.maximum(np.linalg.norm(up, axis=0), 1e-30)[:, None]
    return (np.rint(up / up_steps), up_steps), (np.rint(down / down_steps), down_steps)


def _squared_difference(up: np.ndarray, down: np.ndarray, other_up: np.ndarray, other_down: np.ndarray) -> float:
    """Return ‖up · down − other_up · other_down‖², without the matrices."""
    ups, downs = np.hstack([up, -other_up]), np.vstack([down, other_down])
    return max(float(((ups.T @ ups) * (downs @ downs.T)).sum()), 0.0)


def _bisect(error: Any, bound: float) -> float:
    """Return the largest step size whose error is at most the bound, to a part in thousands."""
    high = bound
    while error(high) < bound and high < 1e30 * bound:
        high *= 2
    low = high / 2
    while error(low) > bound:
        high, low = low, low / 2
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if error(middle) <= bound else (low, middle)
    return float(low)


def _entropy_bytes(streams: Sequence[np.ndarray]) -> int:
    """Return the bytes of rows of integers, and of their classes."""
    if not streams:
        return 0
    rows = [row for stream in streams for row in stream if row.any()]
    spreads = torch.tensor([float(np.sqrt((row**2).mean())) for row in rows], dtype=torch.float64)
    classes = logistic.classes_of_spread(spreads).numpy()
    integers = np.concatenate([row.astype(np.int64) for row in rows])
    repeated = np.repeat(classes, [len(row) for row in rows])
    (data,) = entropy.encode([(integers, repeated)])
    return len(data) + len(zlib.compress(classes.astype(np.uint8).tobytes(), 9))


def _ordered_float16(tensor: np.ndarray) -> np.ndarray:
    """Return float16 numbers as integers in the same order."""
    bits = np.atleast_1d(tensor.astype(np.float16)).view(np.int16)
    return bits ^ (bits >> 15 & np.int16(0x7FFF))


def _xz_integers(streams: Sequence[np.ndarray]) -> int:
    """Return the bytes of 16-bit integers by xz: whole, or high and low bytes apart, whichever is smaller."""
    if not streams:
        return 0
    integers = np.concatenate([stream.reshape(-1) for stream in streams])
    folded = ((integers << 1) ^ (integers >> 15)).view(np.uint8).reshape(-1, 2)
    return min(len(_xz(integers.tobytes())), len(_xz(folded.T.tobytes())))


def _xz(content: bytes) -> bytes:
    return lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
