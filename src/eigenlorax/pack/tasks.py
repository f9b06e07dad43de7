"""Tasks of a pack's adapters: the class of transformers that loads their base model, and the Hub's name of the task."""

import json
from dataclasses import dataclass

from ..core import keys
from .folder import PackFolder


@dataclass(frozen=True, slots=True)
class Task:
    """A task.

    Attributes:
        model_class: Class of transformers that loads the base model with a head for the task.
        pipeline_tag: The Hub's name of the task; None if it has none.
    """

    model_class: str
    pipeline_tag: str | None


TASKS = {
    "CAUSAL_LM": Task("AutoModelForCausalLM", "text-generation"),
    "FEATURE_EXTRACTION": Task("AutoModel", "feature-extraction"),
    "QUESTION_ANS": Task("AutoModelForQuestionAnswering", "question-answering"),
    "SEQ_2_SEQ_LM": Task("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": Task("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": Task("AutoModelForTokenClassification", "token-classification"),
}
"""PEFT's task type → task."""


def common(pack: PackFolder) -> Task | None:
    """Return the task of all adapters; None if they differ, or if it is unknown for one."""
    types = set()
    for name in pack.manifest.adapters:
        config = json.loads(pack.read_files(name, [keys.ADAPTER_CONFIG])[keys.ADAPTER_CONFIG])
        # of another type in a file by others
        types.add(str(config.get("task_type")) if isinstance(config, dict) else "")
    return TASKS.get(types.pop()) if len(types) == 1 else None
