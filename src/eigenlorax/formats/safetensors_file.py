"""The bytes of a safetensors file, the same for the same tensors and metadata."""

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from .header import LENGTH_BYTES, METADATA

_ALIGNED = 8


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole file. The library writes several texts of metadata in an order of its own, which differs by the run."""
    plain = save(dict(tensors))
    end = LENGTH_BYTES + int.from_bytes(plain[:LENGTH_BYTES], "little")
    described = json.loads(plain[LENGTH_BYTES:end])
    header = json.dumps(
        {METADATA: dict(sorted(metadata.items())), **described} if metadata else described,
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()
    header += b" " * (-len(header) % _ALIGNED)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + plain[end:]
