"""Base models and their tokenizers, as transformers loads them; what it says by the way is kept quiet."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import FormatError, HubError, MissingExtraError, OptionError, reason
from ..formats import hub
from ..pack.pack import Pack
from . import examples
from .data import Labels

_GET = "pip install 'eigenlorax[train]'"


def check_installed() -> None:
    """`MissingExtraError` unless all that training needs is installed."""
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"this needs {error.name}, which is not installed: {_GET}.") from error


def of_pack(pack: Pack, model: str | None) -> tuple[str, str | None]:
    """The base model to load, a folder or a repository, and its revision: the pack's, unless another one is named."""
    if model is not None:
        return model, None
    if not pack.base_model:
        raise OptionError("the pack does not say which base model it belongs to: name it with model= (--model).")
    return pack.base_model, pack.revision


def tokenizer_of(model: str, revision: str | None) -> Any:
    """The model's tokenizer, made ready to pad."""
    from transformers import AutoTokenizer

    with _loading(model) as how:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, **how)
    examples.prepare_tokenizer(tokenizer)
    return tokenizer


def config_of(model: str, revision: str | None) -> Any:
    """The model's config."""
    from transformers import AutoConfig

    with _loading(model) as how:
        return AutoConfig.from_pretrained(model, revision=revision, **how)


def load(model: str, revision: str | None, labels: Labels | None, tokenizer: Any) -> Any:
    """The model with a new head for these classes, or, without any, the language model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    with _loading(model) as how:
        if labels is None:
            found = AutoModelForCausalLM.from_pretrained(model, revision=revision, adapter_kwargs=how, **how)
        else:
            found = AutoModelForSequenceClassification.from_pretrained(
                model,
                revision=revision,
                id2label=dict(enumerate(labels.names)),
                label2id={name: number for number, name in enumerate(labels.names)},
                # a head that was there for other classes gives way
                ignore_mismatched_sizes=True,
                # it looks for an adapter among the model's files, and tells that search nothing of its own options
                adapter_kwargs=how,
                **how,
            )
    if found.config.pad_token_id is None:
        # without it, decoders do not see where a padded row ends
        found.config.pad_token_id = tokenizer.pad_token_id
    return found


@contextmanager
def _loading(model: str) -> Iterator[dict[str, bool]]:
    """Give what transformers is told of the network, and raise our errors in the place of its own.

    A folder is read without a request, and so is the Hub's cache where the Hub does not answer: transformers would
    repeat each of its requests for 23 s.
    """
    from huggingface_hub.errors import StrictDataclassError

    is_local = Path(model).exists()
    unasked = hub.unreachable() if not is_local and hub.may_be_model(model) else None
    local_only = is_local or unasked is not None
    try:
        # not all that transformers asks for goes by its argument
        with hub.offline() if local_only else nullcontext():
            yield {"local_files_only": local_only}
    except StrictDataclassError as error:
        # its first line only says in which field
        said = " ".join(str(error).split())
        raise FormatError(f"{model} is not a model that transformers can load: {said}") from error
    except (OSError, ValueError, ImportError, KeyError) as error:
        if is_local:
            raise FormatError(f"{model} is not a model that transformers can load: {reason(error)}") from error
        why = reason(error)
        if unasked is not None:
            why = f"it is not in the cache, or not all of it, and the Hub cannot be asked ({unasked})."
        raise HubError(
            f"the model {model} is no folder here, and could not be had from the Hub: {why} model= (--model) "
            "names a folder or another repository."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and its kin say a lot that would drown the figures; TRANSFORMERS_VERBOSITY lets them speak."""
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" in os.environ:
        yield
        return
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)\.")
            # the tuner sets it right by itself
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """A block in which seeds may be set: the states of random, NumPy and torch are put back at its end."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
