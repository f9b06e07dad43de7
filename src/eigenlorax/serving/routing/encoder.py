"""Features of texts for the signals of a router: embeddings, and cosines of token inputs with prototypes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from ...core.layer_update import without_autograd
from ...errors import NonFiniteError, OptionError, ShapeError
from ...pack.pack import Pack
from ..bank import AdapterBank
from ..bank.bank import BASE
from ..bank.modules import match_modules
from .prototypes import PackPrototypes

Embed = Callable[[list[str]], Any]
MAX_TOKENS = 512
"""Tokens of a text that the base model reads; the remaining ones are left out."""
_BATCH = 32


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Features of some texts.

    Attributes:
        embeddings: Unit embeddings, (rows, d) float32.
        cosines: Mean over the tokens of the squared cosines with the prototypes, (rows, modules, adapters); None
            where prototypes were not asked for.
    """

    embeddings: Tensor
    cosines: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """The base model of a pack with its tokenizer, and optionally another model that embeds texts.

    Attributes:
        pack: The pack.
        model: The base model, or an `AdapterBank` on it, which is then run without adapters. None if there is only
            `embed`.
        tokenizer: Tokenizer of the base model.
        embed: Function from a list of texts to embeddings (texts, d). None embeds by the mean of the base model's last
            hidden states.
    """

    pack: Pack
    model: nn.Module | AdapterBank | None = None
    tokenizer: Any = None
    embed: Embed | None = None

    def encode(self, texts: Sequence[str], prototypes: PackPrototypes | None) -> TextFeatures:
        """Return the features of texts, none of them blank.

        Args:
            texts: The texts.
            prototypes: Prototypes to compare with; None for embeddings only.
        """
        if self.model is None and self.embed is None:
            raise OptionError(
                "this router cannot read texts: pass model= and tokenizer= of the base model, or embed=, to "
                "Router.from_pack or Router.load."
            )
        embeddings, cosines = [], []
        if self.embed is None or prototypes is not None:
            for start in range(0, len(texts), _BATCH):
                hidden, compared = self._run(texts[start : start + _BATCH], prototypes)
                embeddings.append(hidden)
                cosines.append(compared)
        if self.embed is not None:
            embeddings = [torch.as_tensor(self.embed(list(texts))).detach().float().cpu()]
        return TextFeatures(
            unit_embeddings(torch.cat(embeddings), len(texts)),
            torch.cat([each for each in cosines if each is not None]) if prototypes is not None else None,
        )

    def _run(self, texts: Sequence[str], prototypes: PackPrototypes | None) -> tuple[Tensor, Tensor | None]:
        """Return the mean of the last hidden states, (rows, d), and mean squared cosines, of one batch."""
        bank = self.model if isinstance(self.model, AdapterBank) else None
        model: Any = bank.model if bank is not None else self.model
        device = next(model.parameters()).device
        tokens, mask = self._tokenize(texts, device)
        collected: dict[str, Tensor] = {}
        with without_autograd(device), _in_evaluation(model), _observed(model, self.pack, prototypes, mask, collected):
            arguments = {"input_ids": tokens, "attention_mask": mask.long(), "output_hidden_states": True}
            output = bank(**arguments, adapter_names=BASE) if bank is not None else model(**arguments)
            hidden = output.hidden_states[-1].float()
        embeddings = masked_mean(hidden, mask).cpu()
        if prototypes is None:
            return embeddings, None
        # a module that the model did not call, such as that of another part of it, fits nothing
        unused = torch.zeros(len(texts), len(next(iter(prototypes.modules.values())).coordinates))
        return embeddings, torch.stack([collected.get(module, unused) for module in prototypes.modules], dim=1)

    def _tokenize(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return token ids and mask, (rows, tokens), padded on the right: tokenizers of decoders may lack a padding."""
        model = self.model.model if isinstance(self.model, AdapterBank) else self.model
        limits = (
            getattr(self.tokenizer, "model_max_length", None),
            getattr(getattr(model, "config", None), "max_position_embeddings", None),
        )
        limit = min([MAX_TOKENS, *(limit for limit in limits if limit)])
        ids = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        for text, row in zip(texts, ids, strict=True):
            if not row:
                raise OptionError(f"the tokenizer finds no token in the text {text[:40]!r}. Remove the text.")
        rows = [torch.tensor(row, device=device) for row in ids]
        mask = pad_sequence([torch.ones(len(row), device=device) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True), mask


def make_encoder(pack: Pack, model: nn.Module | AdapterBank | None, tokenizer: Any, embed: Embed | None) -> TextEncoder:
    """Return an encoder; arguments are those of `TextEncoder`.

    Raises:
        OptionError: There is a model without a tokenizer, or the model cannot run without inputs for its decoder.
    """
    if (model is None) != (tokenizer is None):
        raise OptionError("model and tokenizer belong together: pass both, or neither.")
    config = getattr(model.model if isinstance(model, AdapterBank) else model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise OptionError(
            "prototypes need the inputs of all modules, and the decoder of an encoder–decoder model has none before it "
            "answers. Pass embed= instead of model=, and use centroids or a classifier."
        )
    return TextEncoder(pack, model, tokenizer, embed)


def unit_embeddings(embeddings: Tensor, rows: int) -> Tensor:
    """Return embeddings scaled to unit length, (rows, d) float32.

    Raises:
        ShapeError: There is not one row for each text.
        NonFiniteError: Embeddings contain NaN or infinity.
    """
    embeddings = embeddings.detach().float().cpu()
    if embeddings.dim() != 2 or len(embeddings) != rows:
        raise ShapeError(
            f"embeddings have the shape {tuple(embeddings.shape)}; expected ({rows}, d), one row per text."
        )
    if not bool(embeddings.isfinite().all()):
        raise NonFiniteError("embeddings contain NaN or infinity. Check the model in float32, or the function embed.")
    return normalize(embeddings, dim=1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values (rows, tokens, d) over the tokens that are not padding, (rows, d)."""
    mean: Tensor = (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return mean


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Disable dropout, and restore the mode at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _observed(
    model: nn.Module,
    pack: Pack,
    prototypes: PackPrototypes | None,
    mask: Tensor,
    collected: dict[str, Tensor],
) -> Iterator[None]:
    """Write the mean squared cosines (rows, adapters) of each module that is called to `collected`."""
    names: Mapping[str, str] = {} if prototypes is None else match_modules(model, pack)
    handles = []
    for module, name in names.items():
        if prototypes is None or module not in prototypes.modules:
            continue

        def observe(_: nn.Module, args: Any, kwargs: Any, module: str = module) -> None:
            x = args[0] if args else kwargs["input"]
            assert prototypes is not None
            if x.dim() == 3 and x.shape[:2] == mask.shape:
                collected[module] = masked_mean(prototypes.squared_cosines(module, x), mask).cpu()

        handles.append(model.get_submodule(name).register_forward_pre_hook(observe, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
