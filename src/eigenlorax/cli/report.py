"""`eigenlorax report`: report whether a pack's adapters share a subspace, and the error that the pack adds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.options import suggestion
from ..train.options import EVALUATION_BATCH, TASKS, Columns
from . import arguments, console, verbs
from .evaluate import class_names

if TYPE_CHECKING:
    from ..core.progress import Progress
    from ..pack.pack import Pack
    from ..reports import Report
    from ..reports.originals import Originals

EXAMPLES = r"""
eigenlorax report pack/ --adapters demo/adapters -o report.html
eigenlorax report pack/ -a demo/adapters -o report.md -o report.json
eigenlorax report history/ -o history.html
eigenlorax report pack/ -a demo/adapters -o report.html \
    --evaluate sms-spam-a=demo/spam.csv --labels ham,spam --model demo/model
"""

MEASUREMENTS = "Measurements"
"""Title of a panel in the help text."""
MAX_NAMES = 6
"""Maximum number of adapter names per finding in the terminal."""
MARKS = {True: "✓", False: "!", None: "·"}
_ALL = 2**62
"""More adapters than any collection has."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, report, EXAMPLES)


@dataclass(frozen=True, slots=True)
class _MeasureOptions:
    """Options of measuring the original adapters.

    Attributes:
        adapters: The adapters, as for `fit`.
        reading: Keywords for reading them.
        left_out: Number of adapters for leave-one-out fits. None: as many as time allows.
        full: True to measure all modules, and to leave out each adapter.
        seed: Seed of samples and of random subspaces.
    """

    adapters: Sequence[str]
    reading: Mapping[str, Any]
    left_out: int | None
    full: bool
    seed: int

    @property
    def passed(self) -> dict[str, bool]:
        """True for each option that was passed, by name; those that need the original adapters."""
        return {
            "--left-out": self.left_out is not None,
            "--full": self.full,
            "--seed": self.seed != 0,
            "--allow-pickle": self.reading["allow_pickle"],
            "--base-config": self.reading["base_config"] is not None,
            "--revision": self.reading["revision"] is not None,
        }

    def report(self, pack: "Pack", matched: "Originals", progress: "Progress") -> "Report":
        """Return the report of a pack with these originals."""
        from ..reports import report as make_report

        return make_report(pack, matched, left_out=self.left_out, full=self.full, seed=self.seed, progress=progress)


@dataclass(frozen=True, slots=True)
class _EvaluationOptions:
    """Options of an evaluation on rows, as passed on the command line.

    Attributes:
        targets: Values of `--evaluate`.
        ratios: Compression ratios at which packs are evaluated too.
        model: Base model, or None for the pack's.
        task: Task, or None for the adapter's task type.
        labels: Values of `--labels`.
        columns: Names of the rows' columns.
        batch_size: Rows per batch.
        max_length: Maximum number of tokens per row, or None for the task's default.
    """

    targets: Sequence[str]
    ratios: Sequence[float]
    model: str | None
    task: str | None
    labels: Sequence[str]
    columns: Columns
    batch_size: int
    max_length: int | None

    @property
    def passed(self) -> dict[str, bool]:
        """True for each option that was passed, by name; all of them need the original adapters."""
        return {"--evaluate": bool(self.targets), **self.passed_for_rows}

    @property
    def passed_for_rows(self) -> dict[str, bool]:
        """True for each option that was passed, by name; those that need rows to evaluate on."""
        default = Columns()
        return {
            "--frontier": bool(self.ratios),
            "--model": self.model is not None,
            "--task": self.task is not None,
            "--labels": bool(self.labels),
            "--batch-size": self.batch_size != EVALUATION_BATCH,
            "--max-length": self.max_length is not None,
            "--text-column": self.columns.text != default.text,
            "--label-column": self.columns.label != default.label,
            "--pair-column": self.columns.pair is not None,
        }


def report(
    pack: arguments.PackSource,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write: .html (one page), .md or .json. Only a report is replaced. Can be repeated.",
            parser=arguments.path,
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "-a",
            metavar="ADAPTER",
            help="Original adapters of the pack, as for `fit`; matched by content. Can be repeated.",
        ),
    ] = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Evaluate the original and the stored adapters on these rows, for one adapter or all. Can be "
            "repeated.",
        ),
    ] = None,
    model: arguments.Model = None,
    json: arguments.Json = False,
    left_out: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="Number of adapters for leave-one-out fits (default: up to 32).",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Measure all modules, and leave out each adapter (default: of a large collection, a sample).",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(metavar="S", help="Seed of samples and of random subspaces.", rich_help_panel=MEASUREMENTS),
    ] = 0,
    frontier: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,…",
            help="With --evaluate: also evaluate packs fitted at these ratios, and each LoRA truncated and rounded to "
            "the same size.",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help=f"Task: {' or '.join(TASKS)} (default: the adapter's task type).",
            rich_help_panel=verbs.ROWS,
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]A,B,…|OUT",
            help="Class names in the order of the head, or the OUT folder of `train`; for one adapter or all. Can be "
            "repeated.",
            rich_help_panel=verbs.ROWS,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Rows per batch.", rich_help_panel=verbs.ROWS)
    ] = EVALUATION_BATCH,
    text_column: arguments.TextColumn = "text",
    label_column: arguments.LabelColumn = "label",
    pair_column: arguments.PairColumn = None,
    max_length: arguments.MaxLength = None,
    pack_revision: arguments.PackRevision = None,
    allow_pickle: arguments.AllowPickle = False,
    base_config: arguments.BaseConfig = None,
    revision: arguments.Revision = None,
) -> None:
    """Report whether a pack's adapters share a subspace, its errors, the path of its histories, and what to do."""
    from ..pack.pack import Pack
    from ..reports import files, json_document

    reading = {"allow_pickle": allow_pickle, "base_config": base_config, "revision": revision}
    measure = _MeasureOptions(adapters or (), reading, _parse_left_out(left_out), full, seed)
    evaluation = _EvaluationOptions(
        targets=evaluate or (),
        ratios=_parse_ratios(frontier),
        model=model,
        task=task,
        labels=labels or (),
        columns=Columns(text_column, label_column, pair_column),
        batch_size=batch_size,
        max_length=max_length,
    )
    if not adapters:
        _check_unused(measure.passed | evaluation.passed, "--adapters with the original adapters")
    if not evaluate:
        _check_unused(evaluation.passed_for_rows, "--evaluate with a file of rows")
    for path in output or ():
        files.check(path)
    pack_report = _make_report(Pack.from_pretrained(pack, revision=pack_revision), measure, evaluation, output or ())
    if json:
        console.print_document(json_document.to_json(pack_report))
        return
    print_verdict(pack_report)
    for path in output or ():
        console.note(f"{path} was written.")


def _make_report(
    pack: "Pack", measure: _MeasureOptions, evaluation: _EvaluationOptions, output: Sequence[Path]
) -> "Report":
    """Return the report of a pack, and write it to files."""
    from ..errors import OptionError
    from ..reports import files, stored
    from ..reports import report as make_report
    from ..reports.build import HISTORIES_ONLY

    if measure.adapters and not pack.names and pack.histories:
        raise OptionError(HISTORIES_ONLY)
    seconds = stored.seconds(pack, measure.full) if measure.adapters and pack.names else 0.0
    with console.working("The report", seconds) as progress:
        if measure.adapters:
            pack_report = _report_on_originals(pack, measure, evaluation, progress)
        else:
            pack_report = stored.load(pack) or make_report(pack, seed=measure.seed, progress=progress)
        for done, path in enumerate(output):
            progress("writing the report", done, len(output))
            files.write(pack_report, path)
        progress("writing the report", len(output), len(output))
    return pack_report


def _report_on_originals(
    pack: "Pack", measure: _MeasureOptions, evaluation: _EvaluationOptions, progress: "Progress"
) -> "Report":
    """Return the report, including the measurements that need the original adapters."""
    from ..reports import originals, with_evaluations

    matched = originals.find(pack, measure.adapters, progress, **measure.reading)
    if not evaluation.targets:
        return measure.report(pack, matched, progress)
    from ..train import ratios, recycled_evaluation

    # wrong options are errors before hours of measuring, not after
    plan = recycled_evaluation.prepare(
        pack,
        matched.adapters,
        [_parse_target(target, pack) for target in evaluation.targets],
        model=evaluation.model,
        task=evaluation.task,
        labels=_parse_labels(evaluation.labels, pack),
        columns=evaluation.columns,
        batch_size=evaluation.batch_size,
        max_length=evaluation.max_length,
    )
    versions = None
    if evaluation.ratios:
        versions = ratios.prepare(pack, matched.adapters, plan, evaluation.ratios, progress)
    measured = measure.report(pack, matched, progress)
    if versions is not None:
        return with_evaluations(measured, *ratios.run(matched.adapters, plan, versions, progress))
    return with_evaluations(measured, recycled_evaluation.run(pack, matched.adapters, plan, progress))


def print_verdict(report: "Report") -> None:
    """Print the headline and the findings to stdout, and notes to stderr."""
    console.say(report.verdict.headline)
    for finding in report.verdict.findings:
        names = ", ".join(finding.adapters[:MAX_NAMES]) + (", …" if len(finding.adapters) > MAX_NAMES else "")
        console.say()
        console.say(f"{MARKS[finding.good]} {finding.text}" + (f" ({names})" if names else ""))
        if finding.advice:
            console.say(f"  → {finding.advice}")
    for note in report.notes:
        console.note(note)


def _check_unused(is_given: Mapping[str, bool], needed: str) -> None:
    """Raise `OptionError` if one of these options was given, because each needs another option."""
    from ..errors import OptionError

    for option, was_given in is_given.items():
        if was_given:
            raise OptionError(f"{option} needs {needed}. Pass that too, or remove {option}.")


def _parse_left_out(argument: str | None) -> int | None:
    from ..errors import OptionError

    if argument is None:
        return None
    if argument == "all":
        return _ALL
    if not argument.isdecimal() or int(argument) < 1:
        raise OptionError(f"--left-out must be an integer of at least 1, or `all`, got {argument!r}.")
    return int(argument)


def _parse_ratios(argument: str | None) -> list[float]:
    from ..errors import OptionError

    if argument is None:
        return []
    try:
        numbers = [float(number) for number in argument.split(",")]
    except ValueError:
        raise OptionError(f"--frontier takes ratios separated by commas, such as 5,20,50, got {argument!r}.") from None
    from ..train import ratios

    return ratios.check(numbers)


def _parse_target(argument: str, pack: "Pack") -> tuple[str | None, Path]:
    """Parse NAME=FILE, where NAME is an adapter of the pack, or a file for all adapters."""
    name, equals, file = argument.partition("=")
    if equals and name in pack.names and file:
        return name, arguments.path(file)
    # a file name may contain "=": the name is only wrong if there is no such file, and one without NAME= exists
    if equals and not Path(argument).exists() and Path(file).exists():
        from ..core import keys

        keys.check_known(name, pack.names)
    return None, arguments.path(argument)


def _parse_labels(values: Sequence[str], pack: "Pack") -> Mapping[str, Sequence[str]] | Sequence[str] | None:
    if not values:
        return None
    by_adapter = {name: labels for name, equals, labels in (value.partition("=") for value in values) if equals}
    unknown = sorted(by_adapter.keys() - set(pack.names))
    if not by_adapter and len(values) == 1:
        return class_names(values[0])
    if len(by_adapter) != len(values) or unknown:
        from ..errors import OptionError

        hint = "."
        if unknown:
            hint = f"; the pack has no {', '.join(unknown)}.{suggestion(unknown[0], pack.names)}"
        raise OptionError(
            f"--labels {', '.join(values)}: pass A,B,… once, for all adapters, or NAME=A,B,… for each{hint}"
        )
    return {name: class_names(labels) for name, labels in by_adapter.items()}
