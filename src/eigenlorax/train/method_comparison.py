"""Comparison of training methods on the user's rows.

For each method, a learning rate is chosen on rows held out from training. Then the method is trained with several seeds
at that rate. Every finished run is written to the results file, so that a comparison can be resumed.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ..core.progress import Progress
from ..errors import EigenloraxWarning, NonFiniteError, OptionError
from ..pack.pack import Pack
from ..reports.numbers import plural
from . import (
    comparison_run,
    comparison_summary,
    data,
    examples,
    method_presets,
    methods,
    metrics,
    models,
    results_file,
    row_split,
    run_plan,
)
from .comparison_run import Recipe, RunData, TrainingRun
from .comparison_summary import MethodRun, MethodSummary
from .data import Labels
from .examples import Collate
from .method_presets import Preset
from .metrics import NamedMetric
from .options import METRIC, default_epochs
from .row_split import RowSplit
from .run_plan import RunKey, Runs, RunsLeft
from .search_space import ComparisonOptions


@dataclass(frozen=True, slots=True)
class PreparedComparison:
    """A comparison whose options were checked and whose rows are encoded.

    Attributes:
        options: Options of the comparison.
        output: Results file.
        settings: Everything that the runs depend on, as JSON.
        labels: Classes of the head.
        rows: Encoded rows.
        epochs: Number of epochs of each run.
        load_base: Function that loads the base model with a new head.
        collate: Function that makes a padded batch of rows.
        presets: Method → its preset.
        metric: Metric by which learning rates are chosen and methods compared.
        basis_bytes: Size of the pack's bases, in bytes.
        finished: Runs that the results file already has.
    """

    options: ComparisonOptions
    output: Path
    settings: dict[str, Any]
    labels: Labels
    rows: RowSplit
    epochs: float
    load_base: Callable[[], Any]
    collate: Collate
    presets: Mapping[str, Preset]
    metric: NamedMetric
    basis_bytes: int
    finished: Runs

    @property
    def runs_left(self) -> int:
        """Number of runs to do."""
        return sum(left.search + left.final for left in self.runs_left_by_method.values())

    @property
    def runs_left_by_method(self) -> dict[str, RunsLeft]:
        """Method → numbers of its runs to do."""
        return {name: run_plan.runs_left(self.options, name, self.finished) for name in self.options.methods}

    @property
    def plan(self) -> str:
        """Sentence that states the runs to do."""
        options, rows = self.options, self.rows
        n_methods = len(options.methods)
        search_runs = sum(len(run_plan.search_keys(options, name)) for name in options.methods)
        total = search_runs + options.seeds * n_methods
        left = f"{self.runs_left} of " if self.finished else ""
        for_methods = f" for each of {n_methods} methods" if n_methods > 1 else ""
        plan = (
            f"{left}{plural(total, 'training')} of {plural(self.epochs, 'epoch')}: "
            f"{plural(options.seeds, 'seed')} on {len(rows.train):,} rows{for_methods}"
        )
        if search_runs:
            plan += f", and {search_runs} on {len(rows.search_train):,} of them, which choose learning rates"
        return f"{plan}."


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """Result of a comparison; the field names are those of the results file and of `--json`.

    Attributes:
        task: "text-classification".
        model: Base model that was loaded.
        labels: Class names in the order of the head.
        metric: Metric by which learning rates are chosen and methods compared.
        majority: Fraction of the most frequent class among the test rows.
        majority_score: Value of the metric if the most frequent class is always predicted; None if it has none.
        rows: Number of training rows.
        held_out: Number of training rows that are held out to choose learning rates.
        evaluated: Number of test rows.
        rows_on_the_way: Number of test rows that were scored during training.
        epochs: Number of epochs of one run.
        steps: Number of optimizer steps of one run.
        steps_per_epoch: Number of optimizer steps per epoch.
        points: Epochs after which the model was scored.
        seeds: Number of runs per method at the chosen learning rate.
        yardstick: Baseline method.
        basis_bytes: Size of the pack's bases, in bytes.
        methods: One summary per method.
        findings: Sentences about the subspace methods.
        trainings: Number of runs in this call, without the runs of a resumed file.
        seconds: Duration of this call in seconds.
    """

    task: str
    model: str
    labels: list[str]
    metric: str
    majority: float
    majority_score: float | None
    rows: int
    held_out: int
    evaluated: int
    rows_on_the_way: int
    epochs: float
    steps: int
    steps_per_epoch: int
    points: list[float]
    seeds: int
    yardstick: str
    basis_bytes: int
    methods: list[MethodSummary]
    findings: list[str]
    trainings: int
    seconds: float


def prepare(pack: Path, options: ComparisonOptions, output: Path, *, resume: bool = False) -> PreparedComparison:
    """Check options and rows of a comparison, and create the results file. No method is trained.

    Args:
        pack: Folder of the pack.
        options: Options of the comparison.
        output: Results file.
        resume: Continue the comparison in `output`. Rows and options must be the same, except for methods, rates and
            seeds.

    Raises:
        OptionError: An option does not fit the pack or the rows, or differs from the resumed comparison.
        MissingExtraError: The metric needs a package that is not installed.
        FormatError: The rows, the base model or the resumed file cannot be read.
        PackExistsError: `output` exists, and `resume` is False.
    """
    opened = Pack.open(pack).training_pack
    results_file.check_output(output, resume)
    train, test = (data.read(path, options.columns.label) for path in (options.train, options.evaluation))
    models.check_installed()
    with models.quiet(), models.preserved_random_state():
        base_model, revision = models.resolve_base_model(opened, options.model)
        tokenizer = models.load_tokenizer(base_model, revision)
        model_config = models.load_config(base_model, revision)
        max_length = examples.max_tokens(options.task, options.max_length, tokenizer, model_config)
        labels = data.infer_labels(train, options.columns)
        rows = row_split.split_rows(options, train, test, labels, tokenizer, max_length)
        metric = _find_metric(options, labels, rows)
        epochs = options.epochs
        if epochs is None:
            epochs = float(default_epochs(math.ceil(len(rows.train) / options.batch_size)))
        settings = {
            "task": options.task,
            "train": data.rows_sha256(train),
            "evaluation": data.rows_sha256(test),
            "columns": asdict(options.columns),
            "model": base_model,
            "revision": revision,
            "subspace": opened.info.fingerprint,
            "epochs": epochs,
            **{name: getattr(options, name) for name in ("rank", "batch_size", "bf16", "metric")},
            "max_length": max_length,
        }
        stored = results_file.read_runs(output, settings) if resume else []
        finished = {RunKey(run.method, run.learning_rate, run.seed): run for run in stored}
        unfinished = [name for name in options.methods if any(run_plan.runs_left(options, name, finished))]
        load_base = partial(models.load_model, base_model, revision, labels, tokenizer)
        presets = method_presets.make_presets(opened, options.methods, unfinished, options.rank, load_base)
    results_file.write(output, settings, finished.values(), None)
    return PreparedComparison(
        options=options,
        output=output,
        settings=settings,
        labels=labels,
        rows=rows,
        epochs=epochs,
        load_base=load_base,
        collate=examples.collator(options.task, tokenizer),
        presets=presets,
        metric=metric,
        basis_bytes=opened.info.stored_bytes,
        finished=finished,
    )


def _find_metric(options: ComparisonOptions, labels: Labels, rows: RowSplit) -> NamedMetric:
    """Return the chosen metric, tried on all rows that will be scored."""
    scored = [rows.validation, rows.test]
    if any(options.searches(method) for method in options.methods):
        scored.append(rows.held_out)
    return metrics.find(options.metric, len(labels.names), *([row["labels"] for row in some] for some in scored))


def run(prepared: PreparedComparison, progress: Progress | None = None) -> ComparisonResult:
    """Do the runs that are left, and summarise all runs.

    Args:
        prepared: Result of `prepare`.
        progress: Function that is called with ("training", runs done, number of runs).

    Raises:
        NonFiniteError: A method diverges at every learning rate, or with one of the seeds at the chosen rate.
        OptionError: The device has not enough memory.
    """
    started, report = time.perf_counter(), progress or (lambda stage, done, total: None)
    options, runs, runs_left = prepared.options, dict(prepared.finished), prepared.runs_left

    def train(key: RunKey) -> MethodRun:
        if key not in runs:
            report("training", len(runs) - len(prepared.finished), runs_left)
            runs[key] = _train(prepared, key)
            results_file.write(prepared.output, prepared.settings, runs.values(), None)
        return runs[key]

    with models.quiet(), models.preserved_random_state(), warnings.catch_warnings():
        # `prepare` has shown the warnings about the pack and the rank
        warnings.simplefilter("ignore", EigenloraxWarning)
        for method in options.methods:
            for key in run_plan.search_keys(options, method):
                train(key)
            for key in run_plan.final_keys(options, method, runs):
                if train(key).score is None:
                    raise NonFiniteError(
                        f"{method} diverged with seed {key.seed} at the learning rate {key.learning_rate:g}. Try lower "
                        f"rates (rates={{{method!r}: [A, B, C]}}, --learning-rates {method}=A,B,C); resume=True "
                        "(--resume) keeps the finished runs."
                    )
    report("training", runs_left, runs_left)
    result = _summarise(prepared, runs, time.perf_counter() - started)
    results_file.write(prepared.output, prepared.settings, runs.values(), asdict(result))
    return result


def _train(prepared: PreparedComparison, key: RunKey) -> MethodRun:
    """Do one run. The base model is loaded again, so that its head has the same initial values for every method."""
    options, rows, preset = prepared.options, prepared.rows, prepared.presets[key.method]
    seed = row_split.SEARCH_SEED if key.seed is None else key.seed
    torch.manual_seed(seed)
    model = preset.apply(prepared.load_base())
    if key.seed is None:
        run_data = RunData(rows.search_train, rows.held_out, rows.held_out, prepared.collate, prepared.metric.score)
    else:
        run_data = RunData(rows.train, rows.validation, rows.test, prepared.collate, prepared.metric.score)
    recipe = Recipe(
        learning_rate=key.learning_rate,
        optimizer=preset.optimizer,
        epochs=prepared.epochs,
        batch_size=options.batch_size,
        evaluations=1 if key.seed is None else run_plan.evaluations(prepared.epochs),
        bf16=options.bf16,
    )
    parameters, head_parameters = methods.count_parameters(model)
    unscored = MethodRun(
        *key,
        numbers=parameters,
        head_numbers=head_parameters,
        file_bytes=methods.saved_bytes(model),
        score=None,
        accuracy=None,
        f1_macro=None,
        loss=None,
        right="",
        resampled=[],
        steps=[],
        scores=[],
        seconds=0.0,
    )
    try:
        with memory_errors():
            training = comparison_run.run(model, run_data, recipe, seed=seed)
    except NonFiniteError:
        # another learning rate may work; `run_plan.chosen_rate` raises an error if none does
        return unscored
    return _scored(unscored, training, np.array([row["labels"] for row in run_data.test]), prepared.metric)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Replace an out-of-memory error of the device by `OptionError`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise OptionError(
            "the device has no memory left. Pass a smaller batch_size= (--batch-size) or max_length= (--max-length) "
            "and another results file, or continue on a larger device with resume=True (--resume)."
        ) from error


def _scored(run: MethodRun, training: TrainingRun, classes: np.ndarray, metric: NamedMetric) -> MethodRun:
    """Return the run with its scores.

    Args:
        run: The run without scores.
        training: Result of the training.
        classes: Class numbers of the test rows, (rows,).
        metric: The chosen metric.
    """
    logits, is_final = training.predictions, run.seed is not None
    scores = metrics.all_scores(logits, classes, metric)
    correct = (logits.argmax(axis=-1) == classes).astype(int).tolist()
    has_draws = is_final and metric.name != METRIC
    return replace(
        run,
        score=training.score,
        accuracy=scores["accuracy"],
        f1_macro=scores["f1_macro"],
        loss=float(cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(classes))),
        right="".join(map(str, correct)) if is_final else "",
        resampled=comparison_summary.resample(metric.score, logits, classes) if has_draws else [],
        steps=[checkpoint.step for checkpoint in training.checkpoints],
        scores=[checkpoint.score for checkpoint in training.checkpoints],
        seconds=training.seconds,
    )


def _summarise(prepared: PreparedComparison, runs: Runs, seconds: float) -> ComparisonResult:
    options, rows = prepared.options, prepared.rows
    runs_by_method = {name: [runs[key] for key in run_plan.final_keys(options, name, runs)] for name in options.methods}
    search_scores = {
        name: dict.fromkeys(options.learning_rates(name))
        | {key.learning_rate: runs[key].score for key in run_plan.search_keys(options, name)}
        for name in options.methods
    }
    summaries = comparison_summary.summarise(runs_by_method, search_scores, options.baseline)
    classes, n_classes = np.array([row["labels"] for row in rows.test]), len(prepared.labels.names)
    majority = max(Counter(classes.tolist()).values()) / len(classes)
    steps = runs_by_method[options.baseline][0].steps
    steps_per_epoch = -(-len(rows.train) // options.batch_size)
    return ComparisonResult(
        task=options.task,
        model=prepared.settings["model"],
        labels=list(prepared.labels.names),
        metric=prepared.metric.name,
        majority=majority,
        majority_score=metrics.constant_score(prepared.metric, classes, n_classes),
        rows=len(rows.train),
        held_out=len(rows.held_out),
        evaluated=len(rows.test),
        rows_on_the_way=len(rows.validation),
        epochs=prepared.epochs,
        steps=steps[-1],
        steps_per_epoch=steps_per_epoch,
        points=[round(step / steps_per_epoch, 3) for step in steps],
        seeds=options.seeds,
        yardstick=options.baseline,
        basis_bytes=prepared.basis_bytes,
        methods=summaries,
        findings=comparison_summary.findings(
            runs_by_method, summaries, options.baseline, majority, prepared.basis_bytes
        ),
        trainings=len(runs) - len(prepared.finished),
        seconds=seconds,
    )
