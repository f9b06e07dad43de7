"""Texts by adapter, as callers pass them, checked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core import keys
from ...errors import OptionError


def check_rows(rows: Mapping[str, Any], names: Sequence[str], *, needs_all: bool) -> dict[str, Any]:
    """Return the texts, or embeddings, of each adapter in the order of `names`.

    Args:
        rows: Texts by adapter, or embeddings (rows, d) as a tensor.
        names: The router's adapters.
        needs_all: Whether each adapter needs rows.

    Raises:
        AdapterNameError: `rows` has an adapter that the router lacks.
        OptionError: An adapter has no rows, or a row is not a text or blank.
    """
    if not isinstance(rows, Mapping):
        raise OptionError(f"rows must map each adapter's name to its texts, got {type(rows).__name__}.")
    for name in rows:
        keys.check_known(name, names, "the router")
    missing = [name for name in names if name not in rows]
    if needs_all and missing:
        raise OptionError(
            f"{len(missing)} of the router's {len(names)} adapters have no rows, such as {missing[0]!r}. Pass rows for "
            "them, or a router without them: Router.from_pack(pack, adapters)."
        )
    if not rows:
        raise OptionError("rows is empty. Pass texts for each adapter: {name: [text, …]}.")
    checked = {name: rows[name] for name in names if name in rows}
    return {
        name: texts if isinstance(texts, Tensor) and len(texts) else check_texts(texts, f"rows of {name!r}")
        for name, texts in checked.items()
    }


def check_texts(texts: Any, what: str, *, allows_blank: bool = False) -> list[str]:
    """Return texts as a list.

    Args:
        texts: The texts.
        what: What they are, for the message.
        allows_blank: Whether texts of white space only are allowed.

    Raises:
        OptionError: There are none, or one of them is not a text or blank.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise OptionError(f"{what} must be a list of texts, got {type(texts).__name__}.")
    found = list(texts)
    if not found:
        raise OptionError(f"{what} are empty: there is no text.")
    for number, text in enumerate(found):
        if not isinstance(text, str) or not (allows_blank or text.strip()):
            raise OptionError(f"{what}: number {number} is {text!r}, expected a text that is not blank. Remove it.")
    return found
