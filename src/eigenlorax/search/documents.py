"""Texts that a pack has of its adapters: names, configs of the sources, metadata of their files, and model cards.

Imports no torch: the texts of a pack on disk are read without its tensors.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import keys, limits
from ..core.limits import damaged_on_error
from ..errors import FormatError, OptionError
from ..pack import origin_json, source_configs
from ..pack.folder import PackFolder
from ..pack.history import History

if TYPE_CHECKING:
    from ..pack.pack import Pack

NAME, TASK, BASE, METADATA, CARD = "name", "task type", "base model", "metadata", "card"
"""Fields of a document."""
_TASK_WORDS = {
    "SEQ_CLS": "sequence text classification",
    "TOKEN_CLS": "token classification",
    "CAUSAL_LM": "causal language model text generation",
    "SEQ_2_SEQ_LM": "sequence to sequence language model text generation",
    "QUESTION_ANS": "question answering",
    "FEATURE_EXTRACTION": "feature extraction embedding",
}
"""PEFT's task type → the words that it abbreviates."""
_MAX_CARD_BYTES = 1 << 20
_MAX_CHARACTERS = 1 << 16
"""Largest number of characters of one field that are searched: trainers of image LoRAs write long metadata."""
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Document:
    """Texts of one adapter, or of a version of a history.

    Attributes:
        name: Name of the adapter or version.
        fields: Text of each field that is not empty.
    """

    name: str
    fields: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> "Document":
        """Return the document of an adapter.

        Args:
            name: Name of the adapter.
            config: The source's `adapter_config.json`, parsed.
            metadata: Metadata of the single file that the adapter was read from.
        """
        task = str(config.get("task_type") or "")
        texts = {
            NAME: name,
            TASK: f"{task} {_TASK_WORDS.get(task, '')}",
            BASE: str(config.get("base_model_name_or_path") or ""),
            METADATA: "\n".join(f"{key} {value}" for key, value in (metadata or {}).items()),
        }
        return cls(name, {label: text[:_MAX_CHARACTERS] for label, text in texts.items() if text.strip()})

    def with_card(self, card: str) -> "Document":
        """Return the document with the text of a model card, without its comments."""
        return replace(self, fields={**self.fields, CARD: _COMMENT.sub(" ", card)[:_MAX_CHARACTERS]})


def of_folder(folder: PackFolder) -> list[Document]:
    """Return a document for each adapter of a pack on disk, and for its histories. No tensor is read."""
    listed = folder.manifest
    documents = []
    for name in sorted(listed.adapters):
        names = {keys.SOURCE_CONFIG, keys.SOURCE_FILE} & listed.adapters[name].files.keys()
        files = folder.read_files(name, names)
        with damaged_on_error(folder.adapter(name).own):
            _, config = source_configs.from_bytes(
                files[keys.SOURCE_CONFIG], listed.source_fields, listed.subspace.modules
            )
            origin = origin_json.from_bytes(files[keys.SOURCE_FILE]) if keys.SOURCE_FILE in files else None
        documents.append(Document.of(name, config, origin.metadata if origin is not None else None))
    return [*documents, *_of_histories(listed.histories)]


def of_pack(pack: "Pack") -> list[Document]:
    """Return a document for each adapter of a pack, and for its histories."""
    documents = []
    for name in pack.names:
        packed = pack.packed(name)
        origin = packed.origin
        config = json.loads(packed.source_config)
        documents.append(Document.of(name, config, origin.metadata if origin is not None else None))
    return [*documents, *_of_histories(pack.histories)]


def _of_histories(histories: Mapping[str, History]) -> Iterable[Document]:
    """Yield a document for the latest version of each history, and for each member of a population."""
    for _, history in sorted(histories.items()):
        records = history.versions if history.is_population else history.versions[-1:]
        for record in records:
            if history.is_population and record.version == keys.COMMON:
                continue
            label = record.version if history.is_population else keys.LATEST
            name = history.name + keys.VERSION_MARK + label
            metadata = record.origin.metadata if record.origin is not None else None
            with damaged_on_error(f"the config of {name}"):
                yield Document.of(name, json.loads(history.config(record)), metadata)


def with_cards(documents: Iterable[Document], folder: Path) -> list[Document]:
    """Return the documents with model cards of a folder: FOLDER/NAME/README.md or FOLDER/NAME.md, where there is one.

    Raises:
        OptionError: There is no such folder, or it has no card of an adapter.
        FormatError: A card is longer than 1 MiB.
    """
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a folder. Pass the folder with the adapters' cards as cards= (--cards).")
    documents = list(documents)
    cards = {document.name: _read_card(folder, document.name) for document in documents}
    if not any(card is not None for card in cards.values()):
        raise OptionError(
            f"{folder} has no model card of an adapter of the pack: {keys.CARD} in a folder of the adapter's name, or "
            f"NAME.md. The pack has {', '.join(list(cards)[:3])}{' …' * (len(cards) > 3)}."
        )
    return [document if (card := cards[document.name]) is None else document.with_card(card) for document in documents]


def _read_card(folder: Path, name: str) -> str | None:
    for path in (folder / name / keys.CARD, folder / f"{name}.md"):
        try:
            return limits.read_file(path, _MAX_CARD_BYTES).decode("utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except FormatError as error:
            raise FormatError(f"{error} It cannot be a model card.") from error
    return None
