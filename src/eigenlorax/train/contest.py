"""A contest of methods on a user's own rows: rates chosen on rows held out, then seeds; kept in a file as it goes.

What each method adds to the model is in `entries`, the rows are in `parts`, one training in `trial`, the file in
`ledger`; what the scores say is in `verdicts`.
"""

import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..errors import EigenloraxWarning, NonFiniteError, OptionError
from ..fitting.fit import Progress
from ..pack.pack import Pack
from . import data, entries, examples, ledger, methods, models, parts, trial, verdicts
from .data import Labels
from .entrants import Contest
from .entries import Entry
from .parts import Rows
from .verdicts import Line, Run, some

Key = tuple[str, float, int | None]
"""Method, learning rate, seed: None for the choice of a rate."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A contest, checked. asked: what its trainings depend on, as JSON; done: those that are in the file already."""

    contest: Contest
    output: Path
    asked: dict[str, Any]
    base: str
    revision: str | None
    labels: Labels
    tokenizer: Any
    rows: Rows
    entries: Mapping[str, Entry]
    basis_bytes: int
    done: Mapping[Key, Run]

    @property
    def left(self) -> int:
        """How many trainings are left to do."""
        return sum(_left(self.contest, name, self.done) for name in self.contest.methods)

    @property
    def plan(self) -> str:
        """What is going to be done, in a sentence."""
        contest = self.contest
        choosing = [len(rates) for name in contest.methods if len(rates := contest.rates_of(name)) > 1]
        each = f" for each of {len(contest.methods)} methods" if len(contest.methods) > 1 else ""
        whole = f"{some(contest.seeds, 'seed')} on {len(self.rows.whole):,} rows{each}"
        choice = f"{sum(choosing)} on {len(self.rows.part):,} of them, which choose learning rates by the others"
        total = sum(choosing) + contest.seeds * len(contest.methods)
        left = f"{self.left} of " if self.done else ""
        return (
            f"{left}{some(total, 'training')} of {some(contest.epochs, 'epoch')}: "
            f"{whole}{f', and {choice}' if choosing else ''}."
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a contest came to.

    majority: the share of the most frequent class among the rows for evaluation. rows, held_out, evaluated: how many to
    train on, of which held out to choose rates; and for evaluation, of which rows_on_the_way served for scores on the
    way. steps: of a training, and of an epoch. points: after how many epochs scores were taken on the way. trainings,
    seconds: of this run alone.
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
    methods: list[Line]
    findings: list[str]
    trainings: int
    seconds: float


def prepare(pack: Path, contest: Contest, output: Path, *, resume: bool = False) -> Prepared:
    """Find what is wrong with what was asked for, before anything is trained.

    resume: go on with what the file `output` has: with the same data and options, but for methods, rates and seeds.
    """
    opened = Pack.open(pack)
    ledger.check(output, resume)
    table, tests = (data.read(path, contest.columns.label) for path in (contest.train, contest.evaluation))
    models.check_installed()
    with models.quiet(), models.own_random_numbers():
        base, revision = models.of_pack(opened, contest.model)
        tokenizer = models.tokenizer_of(base, revision)
        most = examples.length(contest.task, contest.max_length, tokenizer, models.config_of(base, revision))
        labels = data.labels_of(table, contest.columns)
        rows = parts.divide(contest, table, tests, labels, tokenizer, most)
        asked = {
            "task": contest.task,
            "train": data.digest(table),
            "evaluation": data.digest(tests),
            "columns": asdict(contest.columns),
            "model": base,
            "revision": revision,
            "subspace": opened.info.fingerprint,
            **{name: getattr(contest, name) for name in ("rank", "epochs", "batch_size", "bf16")},
            "max_length": most,
        }
        runs = ledger.read(output, asked) if resume else []
        done = {(run.method, run.learning_rate, run.seed): run for run in runs}
        waiting = [name for name in contest.methods if _left(contest, name, done)]
        made = entries.make(
            opened, contest.methods, waiting, contest.rank, lambda: models.load(base, revision, labels, tokenizer)
        )
    prepared = Prepared(
        contest=contest,
        output=output,
        asked=asked,
        base=base,
        revision=revision,
        labels=labels,
        tokenizer=tokenizer,
        rows=rows,
        entries=made,
        basis_bytes=opened.info.stored_bytes,
        done=done,
    )
    ledger.write(output, asked, done.values(), None)
    return prepared


def run(prepared: Prepared, progress: Progress | None = None) -> Outcome:
    """Train what is not done yet, and say what it all came to. The file has every training as soon as it is done."""
    started, report = time.perf_counter(), progress or (lambda stage, done, total: None)
    contest, found = prepared.contest, dict(prepared.done)
    left, trained = prepared.left, 0

    def train(key: Key) -> None:
        nonlocal trained
        if key not in found:
            report("training", trained, left)
            found[key] = _train(prepared, key)
            trained += 1
            ledger.write(prepared.output, prepared.asked, found.values(), None)

    with models.quiet(), models.own_random_numbers(), warnings.catch_warnings():
        # what there is to be said of the pack and the rank, `prepare` has said
        warnings.simplefilter("ignore", EigenloraxWarning)
        for name in contest.methods:
            rates = contest.rates_of(name)
            for rate in rates if len(rates) > 1 else ():
                train((name, rate, None))
            for seed in range(contest.seeds):
                best = _chosen(contest, name, found)
                assert best is not None
                train((name, best, seed))
                if found[name, best, seed].score is None:
                    raise NonFiniteError(
                        f"{name} has diverged with seed {seed} at the learning rate {best:g}. Try lower ones "
                        f"(rates={{{name!r}: [A, B, C]}}, --learning-rates {name}=A,B,C); resume=True (--resume) keeps "
                        "what has been done."
                    )
    report("training", left, left)
    outcome = _outcome(prepared, found, trained, time.perf_counter() - started)
    ledger.write(prepared.output, prepared.asked, found.values(), asdict(outcome))
    return outcome


def _chosen(contest: Contest, name: str, found: Mapping[Key, Run]) -> float | None:
    """The rate with the highest score on the rows held out; the lower loss decides between equals. None as long as one
    is not tried."""
    rates = contest.rates_of(name)
    if len(rates) == 1:
        return rates[0]
    if any((name, rate, None) not in found for rate in rates):
        return None
    ranked = [
        (-run.score, run.loss, rate)
        for rate in rates
        if (run := found[name, rate, None]).score is not None and run.loss is not None
    ]
    if not ranked:
        raise NonFiniteError(
            f"{name} has diverged at each of the learning rates {', '.join(f'{rate:g}' for rate in rates)}. Try lower "
            f"ones (rates={{{name!r}: [A, B, C]}}, --learning-rates {name}=A,B,C), or leave it out (methods=, "
            "--methods). resume=True (--resume) keeps what has been done."
        )
    return min(ranked)[2]


def _left(contest: Contest, name: str, found: Mapping[Key, Run]) -> int:
    rates = contest.rates_of(name)
    choice = sum((name, rate, None) not in found for rate in rates) if len(rates) > 1 else 0
    if choice:
        # which rate it will be is not known
        return choice + contest.seeds
    rate = _chosen(contest, name, found)
    assert rate is not None
    return sum((name, rate, seed) not in found for seed in range(contest.seeds))


def _train(prepared: Prepared, key: Key) -> Run:
    """One training, from a model that is loaded anew: its head has the same numbers whatever the method is."""
    name, rate, seed = key
    contest, rows, choosing = prepared.contest, prepared.rows, seed is None
    number = parts.CHOICE_SEED if seed is None else seed
    torch.manual_seed(number)
    base = models.load(prepared.base, prepared.revision, prepared.labels, prepared.tokenizer)
    model = prepared.entries[name].applied(base)
    numbers, head_numbers = methods.counted(model)
    steps = trial.Recipe(
        learning_rate=rate,
        optimizer=prepared.entries[name].optimizer,
        epochs=contest.epochs,
        batch_size=contest.batch_size,
        evaluations=1 if choosing else max(1, round(2 * contest.epochs)),
        bf16=contest.bf16,
    )
    # where there is nothing but a head, it is the head's rate that is chosen
    recipe = steps if numbers else trial.Recipe(**{**asdict(steps), "head_learning_rate": rate})
    test = rows.held_out if choosing else rows.test
    size = entries.file_bytes(model)
    try:
        found = trial.run(
            model,
            rows.part if choosing else rows.whole,
            rows.held_out if choosing else rows.way,
            test,
            examples.collator(contest.task, prepared.tokenizer),
            recipe,
            seed=number,
        )
    except NonFiniteError:
        # another rate may do better; that none did is said where rates are chosen
        return Run(name, rate, seed, numbers, head_numbers, size, None, None, "", [], [], 0.0)
    except torch.cuda.OutOfMemoryError as error:
        raise OptionError(
            "the device has no memory left. A smaller batch_size= (--batch-size) or max_length= (--max-length), in "
            "another file, needs less; resume=True (--resume) goes on where there is more."
        ) from error
    logits, wanted = torch.from_numpy(found.predicted).double(), torch.tensor([row["labels"] for row in test])
    right = "".join(str(int(one)) for one in logits.argmax(dim=-1) == wanted)
    return Run(
        method=name,
        learning_rate=rate,
        seed=seed,
        numbers=numbers,
        head_numbers=head_numbers,
        file_bytes=size,
        score=found.score,
        loss=float(cross_entropy(logits, wanted)),
        right="" if choosing else right,
        steps=[point.step for point in found.points],
        scores=[point.score for point in found.points],
        seconds=found.seconds,
    )


def _outcome(prepared: Prepared, found: Mapping[Key, Run], trained: int, seconds: float) -> Outcome:
    contest, rows = prepared.contest, prepared.rows
    runs: dict[str, list[Run]] = {}
    tried: dict[str, dict[float, float | None]] = {}
    for name in contest.methods:
        rate = _chosen(contest, name, found)
        assert rate is not None
        runs[name] = [found[name, rate, seed] for seed in range(contest.seeds)]
        rates = contest.rates_of(name)
        tried[name] = {one: found[name, one, None].score if len(rates) > 1 else None for one in rates}
    per_epoch = -(-len(rows.whole) // contest.batch_size)
    table = verdicts.lines(runs, tried, contest.yardstick)
    majority = max(Counter(row["labels"] for row in rows.test).values()) / len(rows.test)
    steps = runs[contest.yardstick][0].steps
    return Outcome(
        task=contest.task,
        model=prepared.base,
        labels=list(prepared.labels.names),
        majority=majority,
        rows=len(rows.whole),
        held_out=len(rows.held_out),
        evaluated=len(rows.test),
        rows_on_the_way=len(rows.way),
        epochs=contest.epochs,
        steps=steps[-1],
        steps_per_epoch=per_epoch,
        points=[round(step / per_epoch, 3) for step in steps],
        seeds=contest.seeds,
        yardstick=contest.yardstick,
        basis_bytes=prepared.basis_bytes,
        methods=table,
        findings=verdicts.words(runs, table, contest.yardstick, len(rows.test), majority, prepared.basis_bytes),
        trainings=trained,
        seconds=seconds,
    )
