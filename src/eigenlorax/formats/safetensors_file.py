"""The bytes of a safetensors file, the same for the same tensors and metadata; and the tensors of such bytes."""

import json
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from . import header
from .header import LENGTH_BYTES, METADATA

_ALIGNED = 8


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole file. The library writes several texts of metadata in an order of its own, which differs by the run."""
    plain = save(dict(tensors))
    end = LENGTH_BYTES + int.from_bytes(plain[:LENGTH_BYTES], "little")
    described = json.loads(plain[LENGTH_BYTES:end])
    text = json.dumps(
        {METADATA: dict(sorted(metadata.items())), **described} if metadata else described,
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + plain[end:]


def from_bytes(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a whole file, each in memory of its own. `FormatError` if it is not whole.

    The library reads fewer dtypes from bytes than it writes, and than it reads from a file: a head of four bits would
    come into a pack, and out of none.
    """
    end = LENGTH_BYTES + header.length(data, len(data), where)
    entries, _ = header.parse(data[LENGTH_BYTES:end], len(data), where)
    return {
        name: _flat(data[entry.begin : entry.end]).view(entry.dtype).reshape(entry.shape)
        for name, entry in entries.items()
    }


def _flat(data: bytes) -> Tensor:
    # torch makes no tensor of a buffer that is empty
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
