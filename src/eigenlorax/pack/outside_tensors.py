"""Heads and carried tensors of an adapter, outside the subspace: stored exactly, or coded within an error bound."""

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..codec import tensor_codes
from ..codec.quantised_tensor import QuantisedTensor, quantise_tensor
from ..codec.storage import coded
from ..codec.tensor_codes import CodedTensor, References
from ..core import keys
from ..core.adapter import Adapter, LazyMapping
from ..core.limits import damaged_on_error
from .record import baseline_bytes
from .scanned_adapter import ScannedAdapter

MIN_HEAD_ERROR, MAX_HEAD_ERROR = 0.1, 0.3
"""Range of default error bounds of heads, within which answers stay the same (docs/bytes.md, "Heads")."""
PRETRAINED_ERROR = 0.002
"""Error bound of tensors that are close to those of the base model: about the precision of bfloat16.

An error relative to such a tensor is many times larger relative to what training has changed."""
SAMPLED_NUMBERS = 4096
"""Number of elements by which tensors are compared with each other."""
SMALL_TENSOR = 2**14
"""Number of elements up to which the coded tensors of an adapter are decoded together."""
ENCODED_TOGETHER = 2**20
"""Number of elements from which tensors of an adapter are entropy-coded; fewer wait for others."""
_EMBEDDING = re.compile(r"embed\w*|\w*_embeddings|wte|wpe|shared|lm_head")


class DecodedTensors(LazyMapping[Tensor]):
    """Tensors by key, of which those with codes are decoded when they are used.

    Small ones are decoded together and stay in memory; a large one is decoded at each access.

    Args:
        exact: Tensors that are stored exactly.
        codes: Codes of the other tensors.
        references: Reference tensors that the codes refer to.
    """

    __slots__ = ("blob", "codes", "exact", "references")

    def __init__(self, exact: Mapping[str, Tensor], codes: Mapping[str, CodedTensor], references: References) -> None:
        self.exact, self.codes, self.references = exact, codes, references
        self.blob = coded.blob(tensor_codes.to_bytes(sorted(codes.items())))

        small = [key for key, code in sorted(codes.items()) if math.prod(code.shape) <= SMALL_TENSOR]
        decoded: dict[str, Tensor] = {}

        def read(key: str) -> Tensor:
            if key in exact:
                return exact[key]
            with damaged_on_error(f"tensor {key} of a coded adapter"):
                if key not in small:
                    return codes[key].decode(references)
                if not decoded:
                    tensors = tensor_codes.decode_tensors([codes[each] for each in small], references)
                    decoded.update(zip(small, tensors, strict=True))
                # a caller may change the tensor
                return decoded[key].clone()

        super().__init__(dict.fromkeys(sorted([*exact, *codes])), read)

    def reference(self, key: str) -> CodedTensor | None:
        """Return the reference of a tensor, itself as a code; None if it has none."""
        number = self.codes[key].reference
        return None if number is None else self.references.coded[number]


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The heads, or the carried tensors, of an adapter as they are stored.

    Attributes:
        tensors: The tensors by PEFT's keys, decoded when they are used where they are coded.
        error: Largest relative error of a coded tensor.
        source_bytes: Bytes of the tensors in the source.
        numbers: Number of their elements.
        is_coded: True if some of them are coded, here or in the pack that they were read from.
    """

    tensors: Mapping[str, Tensor]
    error: float
    source_bytes: int
    numbers: int
    is_coded: bool

    @property
    def size(self) -> int:
        """Bytes of the tensors in a pack."""
        return sum(tensor.nbytes for tensor in file_tensors(self.tensors, "").values())


@dataclass(frozen=True, slots=True)
class OutsideTensors:
    """Heads and carried tensors of an adapter.

    Attributes:
        heads: Task heads, trained biases and saved embeddings.
        carried: Tensors that change the model, and that a subspace cannot represent.
    """

    heads: StoredTensors
    carried: StoredTensors

    @property
    def error(self) -> float:
        """Largest relative error of a coded tensor."""
        return max(self.heads.error, self.carried.error)

    @property
    def size(self) -> int:
        """Bytes of all tensors in a pack."""
        return self.heads.size + self.carried.size

    @property
    def baseline_bytes(self) -> int:
        """Bytes of all tensors in an uncompressed adapter, with which a compression ratio compares."""
        # codes that are kept add no error, but are as coarse as before
        is_coded = self.heads.is_coded or self.carried.is_coded
        return sum(
            baseline_bytes(each.source_bytes, each.numbers, is_coded=is_coded) for each in (self.heads, self.carried)
        )


@dataclass(frozen=True, slots=True)
class OutsideCoding:
    """Storage of heads and carried tensors: their error bounds, and the references that they refer to.

    Attributes:
        head_error: Error bound of heads; None to store all tensors exactly.
        references: Reference tensors of the pack.
    """

    head_error: float | None = None
    references: References = field(default_factory=References)

    def encode(self, scanned: ScannedAdapter) -> OutsideTensors:
        """Return the heads and carried tensors of an adapter as they are stored."""
        return OutsideTensors(
            self._encode_all(scanned.adapter.heads, is_head=True),
            self._encode_all(carried_tensors(scanned.adapter, scanned.subspace_names), is_head=False),
        )

    def _encode_all(self, tensors: Mapping[str, Tensor], *, is_head: bool) -> StoredTensors:
        if self.head_error is None:
            exact = dict(tensors)
            source_bytes = sum(tensor.nbytes for tensor in exact.values())
            numbers = sum(tensor.numel() for tensor in exact.values())
            return StoredTensors(exact, 0.0, source_bytes, numbers, isinstance(tensors, DecodedTensors))
        source_bytes, numbers, waiting = 0, 0, 0
        codes: dict[str, CodedTensor] = {}
        errors: dict[str, float] = {}
        quantised: dict[str, QuantisedTensor] = {}
        for key in tensors:
            tensor = tensors[key]
            source_bytes, numbers = source_bytes + tensor.nbytes, numbers + tensor.numel()
            if (known := self._known_code(tensors, key)) is not None:
                self._add_codes(codes, {key: known})
                continue
            bound = error_bound(key, tensor, self.head_error, is_head=is_head)
            if (candidate := self._quantise(tensor, bound)) is not None:
                quantised[key], errors[key] = candidate, candidate.error
                waiting += tensor.numel()
            if waiting >= ENCODED_TOGETHER:
                self._add_codes(codes, _encode(quantised))
                quantised, waiting = {}, 0
        self._add_codes(codes, _encode(quantised))
        exact = {key: tensors[key] for key in tensors if key not in codes}
        error = max((errors[key] for key in codes if key in errors), default=0.0)
        stored = DecodedTensors(exact, codes, self.references) if codes else exact
        is_coded = bool(codes) or isinstance(tensors, DecodedTensors)
        return StoredTensors(stored, error, source_bytes, numbers, is_coded)

    def _add_codes(self, codes: dict[str, CodedTensor], new: Mapping[str, CodedTensor]) -> None:
        """Add those new codes that can be read beside the others."""
        for key, code in new.items():
            if tensor_codes.can_be_read([*codes.values(), code], self.references.coded):
                codes[key] = code

    def _known_code(self, tensors: Mapping[str, Tensor], key: str) -> CodedTensor | None:
        """Return the code of a tensor that was decoded from a pack, which adds no error; None if it has none."""
        if not isinstance(tensors, DecodedTensors) or key not in tensors.codes:
            return None
        code, reference = tensors.codes[key], tensors.reference(key)
        if reference is None:
            return code
        if reference not in self.references.coded:
            return None
        return code.referring_to(self.references.coded.index(reference))

    def _quantise(self, tensor: Tensor, bound: float) -> QuantisedTensor | None:
        """Quantise a tensor, by itself or as the difference to the closest reference, whichever takes fewer bits."""
        closest = self._closest_reference(tensor)
        reference = (closest, self.references[closest]) if closest is not None else None
        return quantise_tensor(tensor, bound, reference)

    def _closest_reference(self, tensor: Tensor) -> int | None:
        """Return the number of the reference that a tensor resembles most; None if it resembles none."""
        sample = sample_elements(tensor)
        distances = {
            number: float((sample_elements(self.references[number]) - sample).norm())
            for number, reference in enumerate(self.references.coded)
            if reference.shape == tuple(tensor.shape)
        }
        closest = min(distances, key=lambda number: distances[number], default=None)
        return closest if closest is not None and distances[closest] < float(sample.norm()) else None


def _encode(quantised: Mapping[str, QuantisedTensor]) -> dict[str, CodedTensor]:
    """Return the codes of tensors, without those that would not become smaller."""
    encoded = tensor_codes.encode_tensors(list(quantised.values()))
    return {key: code for key, code in zip(quantised, encoded, strict=True) if code is not None}


def carried_tensors(adapter: Adapter, subspace_modules: Container[str]) -> Mapping[str, Tensor]:
    """Return the carried tensors of an adapter, and the LoRA weights of its modules outside the subspace.

    Args:
        adapter: The adapter.
        subspace_modules: Its modules that the subspace contains, by its own names.
    """
    weights = {
        keys.lora_key(module, side): (module, number)
        for module in adapter.modules
        if module not in subspace_modules
        for number, side in enumerate(keys.SIDES)
    }
    if not weights:
        return adapter.carried

    def read(key: str) -> Tensor:
        if key in adapter.carried:
            return adapter.carried[key]
        module, number = weights[key]
        return adapter.modules[module].weights[number]

    return LazyMapping(dict.fromkeys([*adapter.carried, *weights]), read)


def error_bound(key: str, tensor: Tensor, head_error: float, *, is_head: bool) -> float:
    """Return the relative error that a tensor outside the subspace may have.

    Weights of a task head may have `head_error`. All other tensors may have `PRETRAINED_ERROR` at most: vectors,
    embeddings, layers of the base model, and carried tensors.

    Args:
        key: PEFT's key of the tensor.
        tensor: The tensor.
        head_error: Error bound of heads.
        is_head: False for a carried tensor.
    """
    names = key.removeprefix(keys.MODEL_PREFIX).split(".")
    # `classifier.dense.weight` is a head; `encoder.layer.3.output.dense.weight` is a layer of the base model
    is_task_head = is_head and tensor.ndim > 1 and len(names) <= 3
    if is_task_head and not any(_EMBEDDING.fullmatch(name) for name in names):
        return head_error
    return min(head_error, PRETRAINED_ERROR)


def sample_elements(tensor: Tensor) -> Tensor:
    """Return at most about `SAMPLED_NUMBERS` elements of a tensor, evenly spaced, in float64."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED_NUMBERS)].double()


def file_tensors(tensors: Mapping[str, Tensor], coded_key: str) -> dict[str, Tensor]:
    """Return tensors as they are in a file: exact ones by their keys, and all coded ones together by `coded_key`.

    Each coded head also has an empty tensor under its own key, because PEFT looks its keys up before our tuner can
    decode anything. Its shape is (0, number of the head).
    """
    if not isinstance(tensors, DecodedTensors):
        return dict(tensors)
    marks = {}
    if coded_key == keys.CODED_HEADS:
        marks = {key: torch.zeros(0, number, dtype=torch.uint8) for number, key in enumerate(sorted(tensors.codes))}
    return {**tensors.exact, **marks, coded_key: tensors.blob}


def from_file(tensors: Mapping[str, Tensor], coded_key: str, references: References) -> Mapping[str, Tensor]:
    """Return the tensors of a file that `file_tensors` returned, with coded tensors.

    Raises:
        FormatError, ValueError: The codes are not valid, or a tensor is there twice.
    """
    listed = tensor_codes.from_bytes(coded.tensor_bytes(tensors, coded_key))
    codes = dict(listed)
    tensor_codes.check_total(codes.values(), references.coded)
    exact = {
        key: tensor
        for key, tensor in tensors.items()
        if key != coded_key and not (coded_key == keys.CODED_HEADS and key in codes and tensor_codes.is_mark(tensor))
    }
    if len(codes) != len(listed) or codes.keys() & exact.keys():
        raise ValueError(f"a tensor of {coded_key} is there twice")
    return DecodedTensors(exact, codes, references)
