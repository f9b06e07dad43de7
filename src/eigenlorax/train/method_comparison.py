"""A comparison of training methods on the user's rows.

For each method, a learning rate is chosen on rows held out from training; then the method is trained with several seeds
at that rate. Every finished run is written to the results file, so that a comparison can be resumed.
"""

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from ..errors import EigenloraxWarning, NonFiniteError, OptionError
from ..fitting.options import Progress
from ..pack.pack import Pack
from . import (
    comparison_summary,
    data,
    examples,
    method_presets,
    methods,
    models,
    results_file,
    row_split,
    training_run,
)
from .comparison_summary import MethodRun, MethodSummary, plural
from .data import Labels
from .method_presets import Preset
from .row_split import RowSplit
from .search_space import ComparisonOptions
from .training_run import Recipe, RunData


class RunKey(NamedTuple):
    """Identity of one run. seed: None if the run serves to choose the learning rate."""

    method: str
    learning_rate: float
    seed: int | None


Runs = Mapping[RunKey, MethodRun]


@dataclass(frozen=True, slots=True)
class PreparedComparison:
    """A comparison, checked and ready to run.

    settings: all that its runs depend on, as JSON. finished: runs that the results file already has.
    """

    options: ComparisonOptions
    output: Path
    settings: dict[str, Any]
    base_model: str
    revision: str | None
    labels: Labels
    tokenizer: Any
    rows: RowSplit
    presets: Mapping[str, Preset]
    basis_bytes: int
    finished: Runs

    @property
    def runs_left(self) -> int:
        """Number of runs to do."""
        return sum(_runs_left(self.options, method, self.finished) for method in self.options.methods)

    @property
    def plan(self) -> str:
        """One sentence that says which runs will be done."""
        options = self.options
        search_runs = sum(len(options.rates_of(name)) for name in options.methods if options.searches(name))
        each = f" for each of {len(options.methods)} methods" if len(options.methods) > 1 else ""
        final = f"{plural(options.seeds, 'seed')} on {len(self.rows.train):,} rows{each}"
        search = f", and {search_runs} on {len(self.rows.search_train):,} of them, which choose learning rates"
        total = search_runs + options.seeds * len(options.methods)
        left = f"{self.runs_left} of " if self.finished else ""
        return (
            f"{left}{plural(total, 'training')} of {plural(options.epochs, 'epoch')}: "
            f"{final}{search if search_runs else ''}."
        )


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """Result of a comparison; the field names are those of the results file and of `--json`.

    majority: fraction of the most frequent class among the test rows. rows, held_out, evaluated: numbers of training
    rows, of those held out to choose rates, and of test rows. rows_on_the_way: number of test rows that were scored
    during training. steps, steps_per_epoch: of one run. points: epochs after which scores were taken. yardstick: the
    baseline method. trainings, seconds: of this call, without resumed runs.
    """

    task: str
    model: str
    labels: list[str]
    majority: float
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
    """Check everything that a comparison needs, and create the results file. Nothing is trained.

    Args:
        resume: Continue the comparison in `output`. Data and options must be the same, except for methods, rates and
            seeds.

    Raises `OptionError`, `FormatError` or `PackExistsError` if the pack, the rows, the options or the file do not fit.
    """
    opened = Pack.open(pack)
    results_file.check_output(output, resume)
    train, test = (data.read(path, options.columns.label) for path in (options.train, options.evaluation))
    models.check_installed()
    with models.quiet(), models.preserved_random_state():
        base_model, revision = models.base_model_of(opened, options.model)
        tokenizer = models.load_tokenizer(base_model, revision)
        model_config = models.load_config(base_model, revision)
        max_length = examples.max_tokens(options.task, options.max_length, tokenizer, model_config)
        labels = data.infer_labels(train, options.columns)
        rows = row_split.split_rows(options, train, test, labels, tokenizer, max_length)
        settings = {
            "task": options.task,
            "train": data.rows_sha256(train),
            "evaluation": data.rows_sha256(test),
            "columns": asdict(options.columns),
            "model": base_model,
            "revision": revision,
            "subspace": opened.info.fingerprint,
            **{name: getattr(options, name) for name in ("rank", "epochs", "batch_size", "bf16")},
            "max_length": max_length,
        }
        stored = results_file.read_runs(output, settings) if resume else []
        finished = {RunKey(run.method, run.learning_rate, run.seed): run for run in stored}
        unfinished = [name for name in options.methods if _runs_left(options, name, finished)]
        presets = method_presets.make_presets(
            opened,
            options.methods,
            unfinished,
            options.rank,
            lambda: models.load_model(base_model, revision, labels, tokenizer),
        )
    results_file.write(output, settings, finished.values(), None)
    return PreparedComparison(
        options=options,
        output=output,
        settings=settings,
        base_model=base_model,
        revision=revision,
        labels=labels,
        tokenizer=tokenizer,
        rows=rows,
        presets=presets,
        basis_bytes=opened.info.stored_bytes,
        finished=finished,
    )


def run(prepared: PreparedComparison, progress: Progress | None = None) -> ComparisonResult:
    """Do the runs that are left, and summarise all.

    Raises `NonFiniteError` if a method diverges at every learning rate, or with one of the seeds at the chosen rate.
    """
    started, report = time.perf_counter(), progress or (lambda stage, done, total: None)
    runs, runs_left = dict(prepared.finished), prepared.runs_left
    trained = 0
    with models.quiet(), models.preserved_random_state(), warnings.catch_warnings():
        # `prepare` has shown the warnings about the pack and the rank
        warnings.simplefilter("ignore", EigenloraxWarning)
        for method in prepared.options.methods:
            for key in _keys(prepared.options, method, runs):
                if key not in runs:
                    report("training", trained, runs_left)
                    runs[key] = _train(prepared, key)
                    trained += 1
                    results_file.write(prepared.output, prepared.settings, runs.values(), None)
                if key.seed is not None and runs[key].score is None:
                    raise NonFiniteError(
                        f"{method} diverged with seed {key.seed} at the learning rate {key.learning_rate:g}. Try lower "
                        f"rates (rates={{{method!r}: [A, B, C]}}, --learning-rates {method}=A,B,C); resume=True "
                        "(--resume) keeps the finished runs."
                    )
    report("training", runs_left, runs_left)
    result = _summarise(prepared, runs, trained, time.perf_counter() - started)
    results_file.write(prepared.output, prepared.settings, runs.values(), asdict(result))
    return result


def _keys(options: ComparisonOptions, method: str, runs: Runs) -> Iterator[RunKey]:
    """Yield the runs of a method in their order. The chosen rate is read from `runs` after the search is done."""
    if options.searches(method):
        for rate in options.rates_of(method):
            yield RunKey(method, rate, None)
    best_rate = _chosen_rate(options, method, runs)
    assert best_rate is not None
    for seed in range(options.seeds):
        yield RunKey(method, best_rate, seed)


def _chosen_rate(options: ComparisonOptions, method: str, runs: Runs) -> float | None:
    """Return the rate with the highest accuracy on the rows held out; of equals, that with the lowest loss.

    None if a rate has not been tried yet. Raises `NonFiniteError` if the method diverged at every rate.
    """
    rates = options.rates_of(method)
    if len(rates) == 1:
        return rates[0]
    tried = [runs.get(RunKey(method, rate, None)) for rate in rates]
    if None in tried:
        return None
    ranking = [
        (-run.score, run.loss, run.learning_rate)
        for run in tried
        if run is not None and run.score is not None and run.loss is not None
    ]
    if not ranking:
        raise NonFiniteError(
            f"{method} diverged at each of the learning rates {', '.join(f'{rate:g}' for rate in rates)}. Try lower "
            f"rates (rates={{{method!r}: [A, B, C]}}, --learning-rates {method}=A,B,C), or remove it from methods= "
            "(--methods). resume=True (--resume) keeps the finished runs."
        )
    return min(ranking)[2]


def _runs_left(options: ComparisonOptions, method: str, runs: Runs) -> int:
    search_left = 0
    if options.searches(method):
        search_left = sum(RunKey(method, rate, None) not in runs for rate in options.rates_of(method))
    if search_left:
        # the chosen rate may change, and with it all runs at that rate
        return search_left + options.seeds
    return sum(key.seed is not None and key not in runs for key in _keys(options, method, runs))


def _train(prepared: PreparedComparison, key: RunKey) -> MethodRun:
    """Do one run. The base model is loaded anew, so that its head has the same initial values for every method."""
    options, rows, preset = prepared.options, prepared.rows, prepared.presets[key.method]
    searching = key.seed is None
    seed = row_split.SEARCH_SEED if key.seed is None else key.seed
    torch.manual_seed(seed)
    base = models.load_model(prepared.base_model, prepared.revision, prepared.labels, prepared.tokenizer)
    model = preset.apply(base)
    run_data = RunData(
        train=rows.search_train if searching else rows.train,
        validation=rows.held_out if searching else rows.validation,
        test=rows.held_out if searching else rows.test,
        collate=examples.collator(options.task, prepared.tokenizer),
    )
    recipe = Recipe(
        learning_rate=key.learning_rate,
        optimizer=preset.optimizer,
        epochs=options.epochs,
        batch_size=options.batch_size,
        evaluations=1 if searching else max(1, round(2 * options.epochs)),
        bf16=options.bf16,
    )
    parameters, head_parameters = methods.count_parameters(model)
    diverged = MethodRun(
        *key, parameters, head_parameters, methods.saved_bytes(model), None, None, "", steps=[], scores=[], seconds=0.0
    )
    try:
        training = training_run.run(model, run_data, recipe, seed=seed)
    except NonFiniteError:
        # another learning rate may work; an error is raised when none does
        return diverged
    except torch.cuda.OutOfMemoryError as error:
        raise OptionError(
            "the device has no memory left. Pass a smaller batch_size= (--batch-size) or max_length= (--max-length) "
            "and another results file, or continue on a larger device with resume=True (--resume)."
        ) from error
    logits = torch.from_numpy(training.predictions).double()
    classes = torch.tensor([row["labels"] for row in run_data.test])
    correct = (logits.argmax(dim=-1) == classes).int().tolist()
    return replace(
        diverged,
        score=training.score,
        loss=float(cross_entropy(logits, classes)),
        right="" if searching else "".join(map(str, correct)),
        steps=[checkpoint.step for checkpoint in training.checkpoints],
        scores=[checkpoint.score for checkpoint in training.checkpoints],
        seconds=training.seconds,
    )


def _summarise(prepared: PreparedComparison, runs: Runs, trained: int, seconds: float) -> ComparisonResult:
    options, rows = prepared.options, prepared.rows
    runs_by_method: dict[str, list[MethodRun]] = {}
    search_scores: dict[str, dict[float, float | None]] = {}
    for method in options.methods:
        keys = list(_keys(options, method, runs))
        runs_by_method[method] = [runs[key] for key in keys if key.seed is not None]
        search_scores[method] = dict.fromkeys(options.rates_of(method)) | {
            key.learning_rate: runs[key].score for key in keys if key.seed is None
        }
    steps_per_epoch = -(-len(rows.train) // options.batch_size)
    summaries = comparison_summary.summarise(runs_by_method, search_scores, options.baseline)
    majority = max(Counter(row["labels"] for row in rows.test).values()) / len(rows.test)
    steps = runs_by_method[options.baseline][0].steps
    return ComparisonResult(
        task=options.task,
        model=prepared.base_model,
        labels=list(prepared.labels.names),
        majority=majority,
        rows=len(rows.train),
        held_out=len(rows.held_out),
        evaluated=len(rows.test),
        rows_on_the_way=len(rows.validation),
        epochs=options.epochs,
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
        trainings=trained,
        seconds=seconds,
    )
