"""What bytes buy on the task: the originals fitted anew at several ratios, and each cut and rounded by itself to the
same bytes, all of them run on the rows that the pack is run on."""

import glob
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from ..core import keys
from ..core.adapter import Adapter, Lazy
from ..core.options import number
from ..core.stack import Stack, stack
from ..errors import OptionError
from ..fitting import fit as fitting
from ..fitting.fit import Progress
from ..pack.pack import Pack
from ..pack.summary import lora_numbers
from ..reports.analysis import per_adapter
from ..reports.analysis.per_adapter import Cut
from ..reports.data import Evaluation, TaskFrontier, TaskPoint, TaskRun
from ..reports.frontier import FIT
from ..reports.measure import own_name
from . import compare, evaluate
from .compare import RECYCLED, Comparison, Job, Scored
from .sides import ORIGINAL, WITHOUT

ALONE = per_adapter.BOTH


@dataclass(frozen=True, slots=True)
class Version:
    """One way of storing all originals; fields as in `TaskPoint`. adapter: as it comes back, by its name."""

    way: str
    ratio: float | None
    stored_bytes: int
    worst: float
    mean: float
    adapter: Callable[[str], Adapter]

    @property
    def label(self) -> str:
        """Unlike that of any other."""
        if self.ratio is None:
            return RECYCLED
        return f"ratio {self.ratio:.12g}" + ", cut and rounded" * (self.way == ALONE)


@dataclass(frozen=True, slots=True)
class Versions:
    """The pack, fits anew, and rivals; fields as in `TaskFrontier`."""

    adapters: int
    lora_float16: int
    several: Sequence[Version]


def check(ratios: Sequence[int | float]) -> list[float]:
    """The ratios in ascending order, each once. `OptionError` unless each is a number from 1 on, and there is one."""
    found = [number("ratio", one) for one in ratios]
    for one in found:
        if not 1 <= one < math.inf:
            raise OptionError(f"a ratio is by how much smaller than the LoRAs a fit is, a number from 1 on, got {one}.")
    if not found:
        raise OptionError("no ratio is given for the frontier: name some, such as 5, 20 and 50.")
    return sorted(set(found))


def prepare(
    pack: Pack,
    originals: Mapping[str, Adapter],
    asked: Comparison,
    ratios: Sequence[int | float],
    progress: Progress | None = None,
) -> Versions:
    """Fit the originals anew by `fit(…, ratio=)`, and cut and round each to the same bytes: all but running them.

    What is to be done in all is said as the first stage of progress. Modules that are kept out of the pack's subspace
    stay so. `OptionError` names a ratio that cannot be reached.
    """
    ratios = check(ratios)
    say = progress or (lambda stage, done, total: None)
    said = _cost(asked.jobs, len(ratios))
    named = [replace(one, name=name) for name, one in originals.items()]
    excluded = _excluded(pack, named)
    fits: list[Pack] = []
    for done, ratio in enumerate(ratios):
        say(said, done, len(ratios))
        fits.append(
            fitting.fit(named, ratio=ratio, exclude_modules=excluded, same_base=True, warn_above=1.0, progress=say)
        )
    say(said, len(ratios), len(ratios))
    own = [_of_pack("pack", None, pack, list(originals))]
    anew = [_of_pack(FIT, ratio, one, list(originals)) for ratio, one in zip(ratios, fits, strict=True)]
    records = fits[0].records
    carried = sum(record.carried_bytes for record in records.values())
    lora = 2 * lora_numbers(records) + carried
    others = _rivals(originals, fits[0], anew, carried, say)
    return Versions(len(named), lora, [*own, *chain.from_iterable(zip(anew, others, strict=True))])


def run(
    originals: Mapping[str, Adapter], asked: Comparison, versions: Versions, progress: Progress | None = None
) -> tuple[list[Evaluation], list[TaskFrontier]]:
    """What `compare.run` gives, and the frontier of each kind of task; what the originals predict is found once."""
    found = compare.scored(originals, {one.label: one.adapter for one in versions.several}, asked, progress)
    both = list(zip(asked.jobs, found, strict=True))
    by_task: dict[str, list[tuple[Job, Scored]]] = {}
    for job, one in both:
        by_task.setdefault(job.task, []).append((job, one))
    return [compare.evaluation(job, one) for job, one in both], [
        _frontier(task, group, versions) for task, group in by_task.items()
    ]


def _cost(jobs: Sequence[Job], ratios: int) -> str:
    """What is before us, in words."""
    rows, each = sum(len(job.rows) for job in jobs), 2 * ratios + 3
    names = len({job.name for job in jobs})
    return (
        f"frontier: {ratios} {'fit' if ratios == 1 else 'fits'}, then {each} versions of {names} "
        f"{'adapter' if names == 1 else 'adapters'}, {each * rows:,} predictions"
    )


def _excluded(pack: Pack, originals: Sequence[Adapter]) -> list[str]:
    """Patterns of the modules that were kept out of the pack's subspace, and that these originals have."""
    there = set(keys.one_name_per_module(one.specs for one in originals).values())
    return [glob.escape(name) for name in pack.fit_info.excluded_modules if name in there]


def _of_pack(way: str, ratio: float | None, pack: Pack, names: Sequence[str]) -> Version:
    records = [pack.records[name] for name in names]
    errors = [record.delta_error for record in records]
    stored = pack.info.stored_bytes + sum(record.coefficient_bytes + record.carried_bytes for record in records)
    return Version(way, ratio, stored, max(errors), statistics.fmean(errors), pack.adapter)


def _rivals(
    originals: Mapping[str, Adapter], one: Pack, fits: Sequence[Version], carried: int, say: Progress
) -> list[Version]:
    """Each original by itself, in the bytes of each fit. one: any of these fits, for its modules."""
    stage = "cutting and rounding each adapter"
    say(stage, 0, len(fits))
    packed = {name: one.packed(name) for name in originals}
    places = {name: list(found.places.items()) for name, found in packed.items()}

    def stacked(module: str) -> Stack:
        n_out, n_in = one.subspace.modules[module].shape
        owns = {name: own_name(found, module) for name, found in packed.items()}
        return stack([originals[n].modules[own] if own is not None else None for n, own in owns.items()], n_in, n_out)

    modules = list(one.subspace.modules)
    tables = per_adapter.tables(Lazy(dict.fromkeys(modules), stacked))
    index = {name: at for at, name in enumerate(originals)}

    def adapter(chosen: Cut, name: str) -> Adapter:
        factors = dict(originals[name].modules)
        at = index[name]
        for own, place in places[name]:
            rank = int(chosen.ranks[modules.index(place), at])
            factors[own] = per_adapter.cut(factors[own], rank, int(chosen.bits[at]))
        return replace(originals[name], modules=factors, specs={own: each.spec for own, each in factors.items()})

    found = []
    for done, fit in enumerate(fits, start=1):
        chosen = per_adapter.at_size(tables, fit.stored_bytes - carried)
        point = chosen.point
        stored = point.stored_bytes + carried
        found.append(Version(ALONE, fit.ratio, stored, point.worst, point.mean, partial(adapter, chosen)))
        say(stage, done, len(fits))
    return found


def _frontier(task: str, group: Sequence[tuple[Job, Scored]], versions: Versions) -> TaskFrontier:
    accuracy, perplexity, _, _ = _means(group, ORIGINAL)
    bare_accuracy, bare_perplexity, _, bare_kl = _means(group, WITHOUT)
    return TaskFrontier(
        task=task,
        adapters=versions.adapters,
        lora_float16=versions.lora_float16,
        original_accuracy=accuracy,
        original_perplexity=perplexity,
        without_accuracy=bare_accuracy,
        without_perplexity=bare_perplexity,
        without_kl=bare_kl,
        points=[_point(one, group) for one in versions.several],
    )


def _point(one: Version, group: Sequence[tuple[Job, Scored]]) -> TaskPoint:
    accuracy, perplexity, agreement, kl = _means(group, one.label)
    return TaskPoint(
        way=one.way,
        ratio=one.ratio,
        stored_bytes=one.stored_bytes,
        worst=one.worst,
        mean=one.mean,
        accuracy=accuracy,
        perplexity=perplexity,
        agreement=agreement,
        kl=kl,
        runs=[_run(job, found, one.label) for job, found in group],
    )


def _run(job: Job, found: Scored, side: str) -> TaskRun:
    score = found.scores[side]
    return TaskRun(
        name=job.name,
        data=str(job.file),
        accuracy=score.accuracy if job.labelled else None,
        perplexity=evaluate.perplexity(score.loss) if job.classes is None else None,
        agreement=score.agreement,
        kl=score.kl,
    )


def _means(group: Sequence[tuple[Job, Scored]], side: str) -> tuple[float | None, float | None, float, float]:
    """Accuracy, perplexity, agreement and KL of a version, over the adapters of one kind of task and their files."""
    scores = [(job, found.scores[side]) for job, found in group]
    right = [score.accuracy for job, score in scores if job.labelled]
    losses = [score.loss for job, score in scores if job.classes is None]
    return (
        statistics.fmean(right) if right else None,
        evaluate.perplexity(statistics.fmean(losses)) if losses else None,
        statistics.fmean(score.agreement for _, score in scores),
        statistics.fmean(score.kl for _, score in scores),
    )
