"""Loading of base models and tokenizers with transformers, without its log messages."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import EigenloraxWarning, FormatError, HubError, MissingExtraError, OptionError, reason
from ..formats import hub_client
from . import examples
from .data import Labels

_INSTALL = "pip install 'eigenlorax[train]'"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")


def check_installed() -> None:
    """Raise `MissingExtraError` unless the packages that training needs are installed."""
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"this needs {error.name}, which is not installed: {_INSTALL}.") from error


class StatesBaseModel(Protocol):
    """Pack or adapter that states its base model, which is None if it is unknown."""

    @property
    def base_model(self) -> str | None: ...

    @property
    def revision(self) -> str | None: ...


def resolve_base_model(stated: StatesBaseModel, model: str | None, noun: str = "pack") -> tuple[str, str | None]:
    """Return the base model to load, and its revision.

    Args:
        stated: Pack of the adapters, or adapter.
        model: Folder or Hub id that the user passed. Default: the stated base model and revision.
        noun: Name of `stated` for the message.

    Raises:
        OptionError: `model` is None, and no base model is stated.
    """
    if model is not None:
        return model, None
    if not stated.base_model:
        raise OptionError(f"the {noun} does not say which base model it belongs to. Pass model= (--model).")
    return stated.base_model, stated.revision


def load_tokenizer(model: str, revision: str | None) -> Any:
    """Load the model's tokenizer, and set it to pad on the right.

    Args:
        model: Folder or Hub id of the model.
        revision: Revision on the Hub. Default: the main branch.

    Raises:
        FormatError: The folder has no tokenizer that transformers can load.
        HubError: The tokenizer could not be loaded from the Hub.
        OptionError: The tokenizer has no token to pad with.
    """
    from transformers import AutoTokenizer

    folder = Path(model)
    # transformers may make a tokenizer without any words
    if (folder / "config.json").is_file() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        raise FormatError(
            f"{model} has no tokenizer, such as tokenizer.json. Save it there: tokenizer.save_pretrained({model!r})."
        )
    with _loading(model) as network:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, **network)
    examples.prepare_tokenizer(tokenizer)
    return tokenizer


def load_config(model: str, revision: str | None) -> Any:
    """Load the model's config.

    Args:
        model: Folder or Hub id of the model.
        revision: Revision on the Hub. Default: the main branch.

    Raises:
        FormatError: The folder is not a model that transformers can load.
        HubError: The config could not be loaded from the Hub.
    """
    from transformers import AutoConfig

    with _loading(model) as network:
        return AutoConfig.from_pretrained(model, revision=revision, **network)


def load_model(model: str, revision: str | None, labels: Labels | None, tokenizer: Any) -> Any:
    """Load a model as a classifier or as a language model.

    Args:
        model: Folder or Hub id of the model.
        revision: Revision on the Hub. Default: the main branch.
        labels: Classes of a new head; None for a language model.
        tokenizer: Tokenizer of the model, whose padding token is used if the config has none.

    Raises:
        FormatError: The folder is not a model that transformers can load.
        HubError: The model could not be loaded from the Hub.
        OptionError: The model is an encoder, and no classes were passed.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if labels is None:
        check_is_decoder(model, load_config(model, revision))
    with _loading(model) as network:
        if labels is None:
            loaded = AutoModelForCausalLM.from_pretrained(model, revision=revision, **network)
        else:
            loaded = AutoModelForSequenceClassification.from_pretrained(
                model,
                revision=revision,
                id2label=dict(enumerate(labels.names)),
                label2id={name: number for number, name in enumerate(labels.names)},
                # replace an existing head for other classes
                ignore_mismatched_sizes=True,
                **network,
            )
    if loaded.config.pad_token_id is None:
        # decoders with a classification head use it to find the last token of a padded row
        loaded.config.pad_token_id = tokenizer.pad_token_id
    return loaded


def load_base_model(model: str, revision: str | None) -> Any:
    """Load a model without a head.

    Args:
        model: Folder or Hub id of the model.
        revision: Revision on the Hub. Default: the main branch.

    Raises:
        FormatError: The folder is not a model that transformers can load.
        HubError: The model could not be loaded from the Hub.
    """
    from transformers import AutoModel

    with _loading(model) as network:
        return AutoModel.from_pretrained(model, revision=revision, **network)


def check_is_decoder(model: str, config: Any) -> None:
    """Raise `OptionError` if a model cannot be a causal language model.

    transformers loads encoders such as BERT as language models, too. Their tokens see those that they should predict,
    so that a trained adapter is useless.

    Args:
        model: Folder or Hub id of the model, for the message.
        config: Its config.
    """
    from transformers.models.auto import modeling_auto

    model_type = config.model_type
    has_causal_class = model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # decoders have no class for masked tokens; encoders that were made decoders say so
    is_encoder = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder
    if has_causal_class and not (is_encoder and not config.is_encoder_decoder):
        return
    raise OptionError(
        f"{model} is a {model_type} model, an encoder, whose tokens see those that come after them: it cannot be used "
        "for causal-lm. Pass task='text-classification' (--task text-classification), or a decoder such as GPT-2 or "
        "Llama as model= (--model)."
    )


@contextmanager
def _loading(model: str) -> Iterator[dict[str, bool]]:
    """Replace errors of transformers in the block by `FormatError` or `HubError`.

    No requests are sent if the model is a folder. If the Hub cannot be reached, its cache is read without requests,
    because transformers would repeat each request for 23 s.

    Yields:
        Keyword arguments of `from_pretrained` that allow or forbid requests.
    """
    from huggingface_hub.errors import StrictDataclassError

    is_local = Path(model).exists()
    unreachable = hub_client.unreachable() if not is_local and hub_client.may_be_model(model) else None
    local_only = is_local or unreachable is not None
    try:
        # some of transformers' requests ignore local_files_only
        with hub_client.offline() if local_only else nullcontext():
            yield {"local_files_only": local_only}
    except StrictDataclassError as error:
        # the first line names only the field, so join all lines
        message = " ".join(str(error).split())
        raise FormatError(f"{model} is not a model that transformers can load: {message}") from error
    except (OSError, ValueError, ImportError, KeyError) as error:
        if is_local:
            raise FormatError(f"{model} is not a model that transformers can load: {reason(error)}") from error
        cause = reason(error)
        if unreachable is not None:
            cause = f"it is not in the cache, or not completely, and the Hub cannot be reached ({unreachable})."
        raise HubError(
            f"the model {model} is not a local folder, and could not be loaded from the Hub: {cause} Pass a folder or "
            "another repository with model= (--model)."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages and warnings of transformers and PEFT, but not ours, unless TRANSFORMERS_VERBOSITY is set."""
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" in os.environ:
        yield
        return
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)\.")
            # those that our code issues on behalf of a caller in PEFT
            warnings.filterwarnings("always", category=EigenloraxWarning, module=r"peft\.")
            # PEFT corrects this option itself
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch after the block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
