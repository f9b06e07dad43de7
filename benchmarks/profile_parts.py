"""Processor time of a block by part of the work, and floating-point operations of torch in it."""

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import eigenlorax

PARTS = ("reading", "mathematics", "coding", "writing", "other")
INTERVAL = 0.002
"""Seconds of processor time between two samples."""

_PACKAGE = f"{Path(eigenlorax.__file__).parent}/"
FUNCTIONS = {
    ("formats/peft.py", "write"): "writing",
    ("formats/peft.py", "to_files"): "writing",
    ("formats/safetensors_file.py", "to_bytes"): "writing",
    ("pack/manifest_json.py", "to_bytes"): "writing",
}
# the longest prefix of a module's path that is listed decides
MODULES = {
    "core/": "mathematics",
    "codec/": "mathematics",
    "fitting/": "mathematics",
    "reports/analysis/": "mathematics",
    "codec/basis_bytes.py": "coding",
    "codec/bitstream.py": "coding",
    "codec/class_tables.py": "coding",
    "codec/entropy.py": "coding",
    "codec/group_integers.py": "coding",
    "codec/stream_tables.py": "coding",
    "codec/tensor_codes.py": "coding",
    "codec/varint.py": "coding",
    "codec/versions/blocks.py": "coding",
    "codec/versions/byte_planes.py": "coding",
    "codec/versions/container.py": "coding",
    "codec/versions/lossless.py": "coding",
    "formats/": "reading",
    "pack/adapter_files.py": "reading",
    "pack/folder": "reading",
    "pack/manifest": "reading",
    "pack/subspace_file.py": "reading",
    "core/json_dataclasses.py": "reading",
    "core/limits.py": "reading",
    "core/atomic_files.py": "writing",
    "core/staging.py": "writing",
    "pack/card.py": "writing",
    "pack/writable_contents.py": "writing",
    "pack/writer.py": "writing",
    "reports/render/": "writing",
}


def part_of(path: str, function: str) -> str | None:
    """Return the part of the work that a function of eigenlorax does; None if its callers decide.

    Args:
        path: Path of the module in the package, such as "codec/entropy.py".
        function: Name of the function.
    """
    if (path, function) in FUNCTIONS:
        return FUNCTIONS[path, function]
    prefixes = [prefix for prefix in MODULES if path.startswith(prefix)]
    return MODULES[max(prefixes, key=len)] if prefixes else None


class PartTimes:
    """Context manager that samples the stack, and adds the processor time since the last sample to a part of the work.

    The innermost function that `part_of` knows decides. A call into C, such as a decomposition, is sampled when it
    returns, and gets all of its time.

    Attributes:
        seconds: Processor time of each part.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = 0.0

    def __enter__(self) -> "PartTimes":
        self._last = time.process_time()
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        self._add("other")

    def _sample(self, _: int, frame: FrameType | None) -> None:
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(_PACKAGE):
                part = part_of(path.removeprefix(_PACKAGE), frame.f_code.co_name)
                if part is not None:
                    self._add(part)
                    return
            frame = frame.f_back
        self._add("other")

    def _add(self, part: str) -> None:
        now = time.process_time()
        self.seconds[part] += now - self._last
        self._last = now


def _product(left: Tensor, right: Tensor) -> float:
    return 2.0 * left.numel() * right.shape[-1]


def _eigh(matrix: Tensor, _: str = "L", compute_vectors: bool = True) -> float:
    return _batch(matrix) * matrix.shape[-1] ** 3 * (9.0 if compute_vectors else 4 / 3)


def _svd(matrix: Tensor, _: bool = False, compute_vectors: bool = True, **__: Any) -> float:
    n, m = sorted(matrix.shape[-2:])
    return _batch(matrix) * (6.0 * m * n**2 + 20.0 * n**3 if compute_vectors else 2.0 * m * n**2 + 2.0 * n**3)


def _qr(matrix: Tensor, mode: str = "reduced") -> float:
    m, n = matrix.shape[-2:]
    triangular = 2.0 * m * min(m, n) * n - 2 / 3 * min(m, n) ** 3
    return _batch(matrix) * triangular * (1.0 if mode == "r" else 2.0)


def _batch(matrix: Tensor) -> int:
    return math.prod(matrix.shape[:-2])


_aten = torch.ops.aten
_COUNTS: Mapping[Any, Callable[..., float]] = {
    _aten.mm: _product,
    _aten.bmm: _product,
    _aten.mv: lambda matrix, vector: 2.0 * matrix.numel(),
    _aten.addmm: lambda added, left, right, **_: _product(left, right),
    _aten.baddbmm: lambda added, left, right, **_: _product(left, right),
    _aten._linalg_eigh: _eigh,
    _aten._linalg_svd: _svd,
    _aten.linalg_qr: _qr,
    _aten.linalg_cholesky_ex: lambda matrix, **_: _batch(matrix) * matrix.shape[-1] ** 3 / 3,
    _aten.linalg_solve_triangular: lambda matrix, right, **_: matrix.numel() * float(right.shape[-1]),
}
"""Floating-point operations of products, and of decompositions as textbooks count them (Golub and Van Loan)."""


class OperationCount(TorchDispatchMode):
    """Context manager that counts the floating-point operations of torch's products and decompositions.

    Attributes:
        operations: Number of operations by dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        count = _COUNTS.get(function.overloadpacket)
        if count is not None:
            tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
            self.operations[str(tensor.dtype).removeprefix("torch.")] += int(count(*arguments, **(options or {})))
        return function(*arguments, **(options or {}))
