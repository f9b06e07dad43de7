"""Search by words: BM25 over the texts of a pack's adapters, with the package bm25s.

Words are compared by their first characters, so that "classify" finds "classification": truncation is the simplest
stemming, and it needs no language. A word that is equal as a whole scores higher.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtraError, OptionError
from . import documents as texts
from .documents import Document
from .match import TOP, Match, check_top

if TYPE_CHECKING:
    from ..pack.pack import Pack

_STEM = 6
"""Number of characters by which longer words are compared as well."""
_NAME_WEIGHT = 3
"""Number of times that words of a name count: a name is short, and says most."""
# a word, or a run of digits; a change from lower to upper case starts a word, and so does the last of several capitals
_WORD = re.compile(r"[^\W\d_]+|\d+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case. Names are split at -, _, /, digits and changes of case."""
    return [part.lower() for word in _WORD.findall(text) for part in _CAMEL.split(word)]


def terms(word: str) -> list[str]:
    """Return what a word is compared by: the word without a plural s, and the first characters of a longer one."""
    whole = word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
    return [whole, f"{whole[:_STEM]}*"] if len(whole) >= _STEM else [whole]


@dataclass(frozen=True, slots=True)
class TextIndex:
    """Index of the texts of a pack's adapters: name, task type, base model, metadata of image LoRAs, and model cards.

    A pack does not keep the model cards of its adapters: pass their folder.

    Attributes:
        documents: The texts of each adapter.
        retriever: The BM25 index of bm25s; None if there is no document.

    Example:
        >>> index = eigenlorax.TextIndex.from_pack(pack)
        >>> [match.name for match in index.find("sequence classification")]
        ['a', 'b', 'c']
    """

    documents: tuple[Document, ...]
    retriever: Any

    @classmethod
    def from_pack(cls, pack: "Pack", *, cards: Path | None = None) -> "TextIndex":
        """Return the index of a pack.

        Args:
            pack: The pack.
            cards: Folder with the model cards of the adapters, NAME/README.md or NAME.md, such as the folder that the
                pack was fitted from. Default: no cards are searched.

        Raises:
            MissingExtraError: bm25s is not installed.
            OptionError: The folder has no card of an adapter.

        Example:
            >>> index = eigenlorax.TextIndex.from_pack(pack)
            >>> [document.name for document in index.documents]
            ['a', 'b', 'c']
        """
        return index_documents(texts.of_pack(pack), cards=cards)

    def find(self, text: str, top: int = TOP) -> list[Match]:
        """Return the adapters whose texts have words of `text`, the best first.

        Args:
            text: Words to look for. Common English words do not count, unless there are no others.
            top: Maximum number of results, at least 1.

        Returns:
            Matches with their BM25 scores, which depend on the pack and the text: compare scores of one search only.
            Equal scores are in the order of names.

        Raises:
            OptionError: The text has no word, or `top` is below 1.

        Example:
            >>> match = eigenlorax.TextIndex.from_pack(pack).find("an adapter like b")[0]
            >>> match.name, match.reason
            ('b', "Matches 'b' in the name.")
        """
        top = check_top(top)
        wanted = _query_words(text)
        if self.retriever is None:
            return []
        scores: np.ndarray = self.retriever.get_scores([term for word in wanted for term in terms(word)])
        # stable, so that equal scores stay in the order of names
        order = np.argsort(-scores, kind="stable")[:top]
        return [
            Match(self.documents[index].name, float(scores[index]), _reason(wanted, self.documents[index]))
            for index in order.tolist()
            if scores[index] > 0
        ]


def index_documents(documents: Sequence[Document], *, cards: Path | None = None) -> TextIndex:
    """Return the index of documents; `cards` and errors as `TextIndex.from_pack`."""
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError(
            "a search by words needs bm25s, which is not installed: pip install 'eigenlorax[search]'."
        ) from error
    if cards is not None:
        documents = texts.with_cards(documents, cards)
    if not documents:
        return TextIndex((), None)
    retriever = bm25s.BM25()
    retriever.index([_all_terms(document) for document in documents], show_progress=False)
    return TextIndex(tuple(documents), retriever)


def _all_terms(document: Document) -> list[str]:
    return [
        term
        for label, text in document.fields.items()
        for word in words(text) * (_NAME_WEIGHT if label == texts.NAME else 1)
        for term in terms(word)
    ]


def _query_words(text: str) -> list[str]:
    """Return the different words of a query; `OptionError` if there are none."""
    from bm25s.stopwords import STOPWORDS_EN

    all_words = list(dict.fromkeys(words(text)))
    if not all_words:
        raise OptionError(f"{text!r} has no word to search for. Pass words, such as 'classify legal questions'.")
    return [word for word in all_words if word not in STOPWORDS_EN] or all_words


def _reason(wanted: Sequence[str], document: Document) -> str:
    """Return which words were found in which fields, as a sentence."""
    found: dict[str, list[str]] = {}
    for label, text in document.fields.items():
        present = {term for word in words(text) for term in terms(word)}
        if matched := [word for word in wanted if present & set(terms(word))]:
            found[label] = matched
    parts = [f"{_listed(matched)} in the {label}" for label, matched in found.items()]
    return f"Matches {'; '.join(parts)}."


def _listed(matched: Sequence[str]) -> str:
    quoted = [repr(word) for word in matched]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
