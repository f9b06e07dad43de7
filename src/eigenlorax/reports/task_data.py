"""Figures of a report: scores of adapters on their tasks, before and after the pack. Units are as in `data`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one adapter on a file of rows.

    Compared are the original adapter, its reconstruction from the pack ("stored", in field names "recycled"), and
    the base model with the adapter's head but no update ("without").

    Attributes:
        name: Name of the adapter.
        data: Name of the file.
        task: "text-classification" or "causal-lm".
        rows: Number of rows.
        tokens: Number of predicted tokens, for language models.
        labelled: True if the rows have labels.
        original_accuracy, recycled_accuracy, without_accuracy: Accuracies; None without labels.
        agreement: Share of rows, or of predicted tokens, with equal predictions of the original and the stored adapter.
        without_agreement: The same for the original adapter and no update.
        kl: Mean KL divergence of the stored from the original prediction, in nats per row or token.
        without_kl: The same for no update.
        original_perplexity, recycled_perplexity, without_perplexity: Perplexities, for language models.
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
    """Scores of one version of an adapter on a file of rows.

    Attributes:
        name: Name of the adapter.
        data: Name of the file.
        accuracy: Accuracy; None without labels.
        perplexity: Perplexity, for language models.
        agreement: Share of rows, or of predicted tokens, with the original adapter's prediction.
        kl: Mean KL divergence from the original adapter's prediction, in nats per row or token.
    """

    name: str
    data: str
    accuracy: float | None
    perplexity: float | None
    agreement: float
    kl: float


@dataclass(frozen=True, slots=True)
class TaskPoint:
    """One method of storing the adapters, measured on their task.

    Attributes:
        way: "pack", "fit" (a new fit at a ratio), or a key of `frontier.TASK_METHODS`.
        ratio: Requested compression ratio; None for the pack. A baseline takes at most the bytes of the fit with this
            ratio.
        stored_bytes: Bytes of all adapters, with carried tensors, without heads.
        worst: Largest delta error.
        mean: Mean delta error.
        accuracy: Mean accuracy over the runs that have one.
        perplexity: Exponential of the mean loss, for language models.
        agreement, kl: Means over the runs.
        runs: Scores of each adapter and file.
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
    """Bytes against scores on a task.

    Attributes:
        task: "text-classification" or "causal-lm".
        adapters: Number of adapters whose bytes are counted.
        lora_float16: Bytes of their factors at two bytes per number, and of carried tensors.
        original_accuracy, original_perplexity: Mean scores of the original adapters.
        without_accuracy, without_perplexity, without_kl: Mean scores with their heads but no update.
        points: The pack first, then for each ratio a fit and its baseline.
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
