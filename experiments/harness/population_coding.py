"""Differences to a common adapter, coded within a number of bytes per user by the parts of the library's codec.

The factors of a difference are coded by `singular_codes`, as the adapters of a pack are: each user alone, or over bases
of other users. The head is coded by `quantised_tensor`. No user's bytes depend on another user whose bytes are stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.codec import basis_bytes, bitstream, singular_codes, tensor_codes
from eigenlorax.codec.adapter_codes import AdapterCodes, ModuleCodes, ModuleLayout, dequantise_module
from eigenlorax.codec.module_stages import BasisPair
from eigenlorax.codec.packed_codes import PackedCodes
from eigenlorax.codec.quantised_basis import QuantisedBasis, quantise_basis
from eigenlorax.codec.quantised_tensor import quantise_tensor
from eigenlorax.codec.step_sizes import as_written
from eigenlorax.codec.svd_batch import SvdBatch

from .population_training import Factors, Weights, difference

ROUNDS = 12
"""Rounds of bisection of the step sizes: from a range of 2^14 to 0.3 %."""
OCTAVES = 14

Bases = Mapping[str, BasisPair]


@dataclass(frozen=True, slots=True)
class CodedUser:
    """A user's adapter after coding.

    Attributes:
        weights: The decoded difference and the decoded head.
        update_bytes, head_bytes: Bytes of both.
        error: Relative error of the difference over all modules.
    """

    weights: Weights
    update_bytes: int
    head_bytes: int
    error: float


def lora_factors(factors: Factors) -> dict[str, ex.LoRAFactors]:
    """Return factors as the library's, without a scaling."""
    return {name: ex.LoRAFactors(down, up, 1.0) for name, (down, up) in factors.items()}


def svd_batches(users: Sequence[Weights], common: Weights) -> dict[str, SvdBatch]:
    """Return the differences of users to the common adapter as singular components, by module."""
    differences = [lora_factors(difference(user.factors, common.factors)) for user in users]
    return {name: SvdBatch.of([factors[name] for factors in differences]) for name in common.factors}


def empty_bases(batches: Mapping[str, SvdBatch]) -> dict[str, BasisPair]:
    """Return bases without a row."""
    return {
        name: (QuantisedBasis.empty(batch.v.shape[2]), QuantisedBasis.empty(batch.u.shape[2]))
        for name, batch in batches.items()
    }


def pack_bases(pack: ex.Pack, others: Mapping[str, SvdBatch], step_size: float, members: int) -> dict[str, BasisPair]:
    """Quantise a pack's bases as finely as a population of so many members, like these other users, asks for.

    Args:
        pack: The pack of the others' differences.
        others: Differences of the others.
        step_size: Step size that members are coded with.
        members: Number of members.
    """
    bases = {}
    for name, batch in others.items():
        module, pair = pack.subspace.modules[name], []
        for side in ("down", "up"):
            components = module.side(side).components.double()
            energy = ((batch.rows(side) @ components.mT) * batch.s[..., None]).square().sum((0, 1))
            importance = (energy * members / len(batch)).sqrt() / step_size
            pair.append(quantise_basis(components, importance, energy))
        bases[name] = pair[0], pair[1]
    return bases


def bases_size(bases: Bases) -> int:
    """Return the bytes of bases."""
    return sum(len(data) for data in basis_bytes.encode([basis for pair in bases.values() for basis in pair]))


def encode_heads(heads: Sequence[Tensor], reference: Tensor, error: float) -> list[tuple[bytes, Tensor]]:
    """Code heads within a relative error of their difference to a reference. Returns bytes and decoded heads."""
    quantised = [
        quantise_tensor(head, error * float((head - reference).norm() / head.norm()), (0, reference)) for head in heads
    ]
    coded = tensor_codes.encode_tensors(quantised)
    decoded = tensor_codes.decode_tensors(coded, [reference])
    return [(tensor_codes.to_bytes([("head", code)]), head) for code, head in zip(coded, decoded, strict=True)]


def encode_within(batches: Mapping[str, SvdBatch], bases: Bases, limits: Tensor) -> list[bytes]:
    """Code the updates of users, each with the smallest step size whose bytes are within its limit, (n,)."""
    norms = torch.stack([batch.s.square().sum(1) for batch in batches.values()]).sum(0).sqrt()
    small, large = norms.log2() - OCTAVES, norms.log2()
    # no component is left at the largest step size
    best = _encode(batches, bases, as_written(large.exp2()))
    for _ in range(ROUNDS):
        middle = (small + large) / 2
        attempt = _encode(batches, bases, as_written(middle.exp2()))
        fits = torch.tensor([len(data) for data in attempt]) <= limits
        best = [new if fit else old for new, old, fit in zip(attempt, best, fits.tolist(), strict=True)]
        small, large = torch.where(fits, small, middle), torch.where(fits, middle, large)
    return best


def _encode(batches: Mapping[str, SvdBatch], bases: Bases, step_sizes: Tensor) -> list[bytes]:
    codes: list[dict[str, ModuleCodes]] = [{} for _ in step_sizes]
    for name, batch in batches.items():
        updates = singular_codes.encode_updates(batch, step_sizes, *bases[name])
        packed = PackedCodes.of(updates)
        for row, modules in enumerate(codes):
            modules[name] = packed.codes(row)
    adapters = [AdapterCodes(step, 0, modules) for step, modules in zip(step_sizes.tolist(), codes, strict=True)]
    return bitstream.encode_adapters([(adapter, _layouts(bases)) for adapter in adapters])


def _layouts(bases: Bases) -> dict[str, ModuleLayout]:
    return {name: ModuleLayout.of(pair, 0) for name, pair in bases.items()}


def decode(data: bytes, bases: Bases, ranks: Mapping[str, int]) -> tuple[Factors, float]:
    """Return the factors that a user's bytes stand for, and their step size."""
    layouts = _layouts(bases)
    codes = bitstream.decode_adapter(data, layouts, ranks)
    factors = {}
    for name, (down_basis, up_basis) in bases.items():
        decoded = dequantise_module(codes.modules[name], codes.step_size, layouts[name], rank=ranks[name], scaling=1.0)
        down, up = decoded.down @ down_basis.rows, up_basis.rows.mT @ decoded.up
        if decoded.down_residual is not None:
            down = down + decoded.down_residual
        if decoded.up_residual is not None:
            up = up + decoded.up_residual
        factors[name] = down, up
    return factors, codes.step_size


def code_users(
    users: Sequence[Weights], common: Weights, bases: Bases, limit: int, head_error: float
) -> list[CodedUser]:
    """Code users within `limit` bytes each, head included, and decode them from their bytes.

    Args:
        users: The users' adapters.
        common: The common adapter.
        bases: Bases of all modules, possibly without rows.
        limit: Bytes of a user.
        head_error: Relative error of a head's difference to the common head.
    """
    heads = encode_heads([user.head for user in users], common.head, head_error)
    batches = svd_batches(users, common)
    limits = torch.tensor([limit - len(data) for data, _ in heads])
    coded = []
    for index, (data, (head_data, head)) in enumerate(zip(encode_within(batches, bases, limits), heads, strict=True)):
        ranks = {name: int(batch.ranks[index]) for name, batch in batches.items()}
        factors, _ = decode(data, bases, ranks)
        exact = difference(users[index].factors, common.factors)
        error = (squared_norm(difference(factors, exact)) / squared_norm(exact)) ** 0.5
        coded.append(CodedUser(Weights(factors, head), len(data), len(head_data), error))
    return coded


def squared_norm(factors: Factors) -> float:
    """Return the squared Frobenius norm of an update over all modules."""
    total = 0.0
    for down, up in factors.values():
        down, up = down.double(), up.double()
        total += float(((down @ down.mT) * (up.mT @ up)).sum())
    return max(total, 0.0)
