"""Scores of adapters on their tasks, before and after the pack, as data of a report. Units are as in `data`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One adapter on a file of rows: the original, and the one reconstructed from the pack ("recycled").

    task: "text-classification" or "causal-lm". Accuracies only for labelled rows, perplexities for language models.
    agreement: share of rows, or of predicted tokens, with equal predictions.
    kl: mean KL divergence of the recycled from the original prediction, in nats per row or token.
    without_*: the base model with the adapter's head but no update.
    """

    name: str
    data: str
    task: str
    rows: int
    tokens: int | None
    labelled: bool
    original_accuracy: float | None
    recycled_accuracy: float | None
    without_accuracy: float | None
    agreement: float
    without_agreement: float
    kl: float
    without_kl: float
    original_perplexity: float | None
    recycled_perplexity: float | None
    without_perplexity: float | None


@dataclass(frozen=True, slots=True)
class TaskRun:
    """One version of an adapter on a file of rows; fields as in `Evaluation`, of this version."""

    name: str
    data: str
    accuracy: float | None
    perplexity: float | None
    agreement: float
    kl: float


@dataclass(frozen=True, slots=True)
class TaskPoint:
    """One method of storing the adapters, measured on their task.

    way: "pack", "fit" (a new fit at a ratio), or a key of `frontier.TASK_METHODS`. ratio: the requested one; for a
        baseline, that of the fit whose bytes it takes at most.
    stored_bytes: of all adapters, with carried tensors, without heads. worst, mean: delta errors.
    accuracy, agreement, kl: means of `runs`, accuracy of those that have one. perplexity: exponential of the mean loss.
    """

    way: str
    ratio: float | None
    stored_bytes: int
    worst: float
    mean: float
    accuracy: float | None
    perplexity: float | None
    agreement: float
    kl: float
    runs: list[TaskRun]


@dataclass(frozen=True, slots=True)
class TaskFrontier:
    """Bytes against scores on a task: the pack first, then by ratio a fit and its baseline.

    adapters: those whose bytes are counted. lora_float16: of their factors at two bytes per number, and what is
    carried. original_*: scores of the original adapters; without_*: with their heads but no update. Means as in
    `TaskPoint`.
    """

    task: str
    adapters: int
    lora_float16: int
    original_accuracy: float | None
    original_perplexity: float | None
    without_accuracy: float | None
    without_perplexity: float | None
    without_kl: float
    points: list[TaskPoint]
