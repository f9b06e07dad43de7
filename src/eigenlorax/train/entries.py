"""From the names of a contest's methods to what each adds to this model, and how large it is. No training here."""

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import keys
from ..errors import EigenloraxError, EigenloraxWarning, OptionError, reason
from ..pack.pack import Pack
from . import methods
from .methods import Method, Setting

TASK_TYPE = "SEQ_CLS"
SOAP = ("core", "factors", "random", "lora-soap")
"""Methods whose numbers `tuner.SOAP` trains; the others have AdamW, as in their papers."""
_VECTORS = 256
"""PEFT's defaults of VB-LoRA: the most vectors, and the most numbers in one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One method of a contest, made to fit a model; and the optimizer of its numbers, as in `trial.Recipe`."""

    method: Method
    setting: Setting
    optimizer: str = "adamw"

    def applied(self, base: Any) -> Any:
        """The base model, ready to be trained."""
        return methods.applied(self.method, base, self.setting)


@dataclass(frozen=True, slots=True)
class Place:
    """A module of the model that is in the subspace: its name in the model, and its widths."""

    name: str
    in_features: int
    out_features: int

    @property
    def sides(self) -> int:
        return self.in_features + self.out_features


def make(
    pack: Pack, names: Sequence[str], checked: Sequence[str], rank: int, load: Callable[[], Any]
) -> dict[str, Entry]:
    """Every method as it fits the model, on the modules that the pack has. `checked` are tried out on it."""
    places, numbers = _places(pack, rank, load())
    random = methods.random_basis(pack) if "random" in names else None
    found = {name: _entry(name, pack, random, rank, places, numbers) for name in names}
    with warnings.catch_warnings():
        # once is enough
        warnings.simplefilter("ignore", EigenloraxWarning)
        for name in checked:
            try:
                found[name].applied(load())
            except EigenloraxError:
                raise
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                raise OptionError(
                    f"{name} does not work on the modules of this pack: {reason(error)} Leave it out (methods=, "
                    "--methods)."
                ) from error
    return found


def _places(pack: Pack, rank: int, base: Any) -> tuple[list[Place], int]:
    """The modules, in the model's order, and how many numbers factors of this rank are in them."""
    from peft import get_peft_model

    from ..tuner import EigenLoraxConfig
    from ..tuner.layer import EigenLoraxLayer

    config = EigenLoraxConfig(subspace=pack, r=rank, lora_alpha=rank, core=False, task_type=TASK_TYPE)
    model = get_peft_model(base, config)
    numbers, head_numbers = methods.counted(model)
    if not head_numbers:
        raise OptionError(
            f"the model's head has none of the names that PEFT trains, {' and '.join(methods.HEAD[:2])}: no method "
            "would learn to tell classes apart."
        )
    places = [
        Place(name.removeprefix(keys.MODEL_PREFIX), layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, EigenLoraxLayer)
    ]
    return places, numbers


def _entry(name: str, pack: Pack, random: Pack | None, rank: int, places: Sequence[Place], numbers: int) -> Entry:
    targets = [place.name for place in places]
    scale = {"r": rank, "lora_alpha": 2 * rank}
    if name == "lora-small":
        small, targets = _small_lora(places, numbers)
        return Entry(Method("lora", {"r": small, "lora_alpha": 2 * small}), Setting(targets, TASK_TYPE))
    made: Mapping[str, tuple[str, Mapping[str, Any]]] = {
        "lora": ("lora", scale),
        "core": ("eigenlorax", {**scale, "core": True}),
        "factors": ("eigenlorax", {**scale, "core": False}),
        "random": ("eigenlorax", {**scale, "core": False}),
        # its random matrices come from a seed, as a basis comes with the pack: they are no part of an adapter's file
        "vera": ("vera", {"save_projection": False}),
        "vblora": ("vblora", _vblora(places, numbers)),
        "lora-xs": ("lora_xs", {"r": _lora_xs_rank(places, numbers)}),
        "init": ("init", scale),
        "lora-soap": ("lora", scale),
        "full": ("full", {}),
        "head": ("head", {}),
    }
    kind, options = made[name]
    setting = Setting(targets, TASK_TYPE, pack=random if name == "random" else pack)
    return Entry(Method(kind, options), setting, "soap" if name in SOAP else "adamw")


def _small_lora(places: Sequence[Place], numbers: int) -> tuple[int, list[str]]:
    """The highest rank that is no larger than `numbers`; if even 1 is, that on the last modules, as many as fit."""
    rank = numbers // sum(place.sides for place in places)
    if rank:
        return rank, [place.name for place in places]
    kept: list[str] = []
    for place in reversed(places):
        numbers -= place.sides
        if numbers < 0 and kept:
            break
        kept.append(place.name)
    return 1, kept


def _lora_xs_rank(places: Sequence[Place], numbers: int) -> int:
    """The highest rank with at most `numbers` in all, that every module has."""
    most = min(min(place.in_features, place.out_features) for place in places)
    return min(max(1, math.isqrt(numbers // len(places))), most)


def _vblora(places: Sequence[Place], numbers: int) -> dict[str, Any]:
    """Vectors as long as divide every width, and as many of them as are no more than `numbers` in all."""
    common = math.gcd(*(width for place in places for width in (place.in_features, place.out_features)))
    # the largest power of two in it
    length = min(common & -common, _VECTORS)
    rank, chosen = 4, 2
    each = length + rank * sum(place.sides for place in places) // length
    count = min(max(chosen, numbers // each), _VECTORS)
    return {
        "r": rank,
        "topk": chosen,
        "num_vectors": count,
        "vector_length": length,
        "save_only_topk_weights": True,
    }


def file_bytes(model: Any) -> int:
    """Bytes of the file that PEFT saves, heads included; of a model without adapters, of what is trained."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size
