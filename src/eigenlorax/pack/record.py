"""Bytes and errors of one adapter in a pack."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes and errors of one adapter in a pack. docs/pack-format.md defines each field.

    Attributes:
        delta_error: Relative error ‖D − D̂‖ / ‖D‖ of the update over the modules of the subspace.
        rounding_error: Part of the error that is from rounding.
        in_fit: True if the subspace was fitted to the adapter.
        untrained: True if the update is zero.
        ranks: Ranks of the modules, without repetition.
        modules: Number of modules.
        lora_numbers: Number of elements of the LoRA factors.
        coefficient_bytes: Tensor bytes of the coefficients.
        carried_bytes: Tensor bytes of carried tensors, as they are stored.
        head_bytes: Tensor bytes of trained heads, as they are stored.
        source_sha256: Hash of the source's content.
        source_file_bytes: Bytes of the source's weights file.
        bound: True if delta_error is an upper bound, because the pack was refitted without the original.
        head_error: Largest relative error of a head or carried tensor; 0 if all of them are stored exactly.
        source_head_bytes: Tensor bytes of trained heads in the source.
        source_carried_bytes: Tensor bytes of carried tensors in the source.
        head_numbers: Number of elements of the heads.
        carried_numbers: Number of elements of the carried tensors.
    """

    delta_error: float
    rounding_error: float
    in_fit: bool
    untrained: bool
    ranks: list[int]
    modules: int
    lora_numbers: int
    coefficient_bytes: int
    carried_bytes: int
    head_bytes: int
    source_sha256: str
    source_file_bytes: int
    bound: bool = False
    head_error: float = 0.0
    source_head_bytes: int = 0
    source_carried_bytes: int = 0
    head_numbers: int = 0
    carried_numbers: int = 0


def baseline_bytes(source_bytes: int, numbers: int, *, is_coded: bool) -> int:
    """Return the bytes of tensors in an uncompressed adapter: in 16 bits at most, unless they are stored exactly."""
    return min(source_bytes, 2 * numbers) if is_coded else source_bytes
