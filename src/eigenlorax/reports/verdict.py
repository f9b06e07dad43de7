"""What the figures say, in plain words, and what to do about it. Nothing is computed here but comparisons.

The main question is answered by adapters that the fit has not seen. Where others' directions keep three quarters of
their squared norm and more, beyond what as many random directions would keep (an error of about 0.5 at most), the
collection shares a subspace; below one quarter it does not. What chance scatters counts for nothing. What the fit
itself keeps is compared with the null model: the same singular values in random directions.
"""

from collections.abc import Sequence

from ..codec.storage.table import CODED, storage_by_name
from . import spreads
from .chance import is_above
from .data import Finding, LeftOut, ReportData, SizePoint, Verdict
from .frontier import at_equal_error, cheapest
from .numbers import error, plural, ratio, share

SHARED, NOT_SHARED = 0.75, 0.25
"""Shares of squared norm that an adapter keeps in the subspace of the others."""
CHANCE = 0.7
"""The error in random directions below which nothing can be told: they are half of all there are."""
LOSS = 0.5
"""The delta error above which an adapter is named as one that lost much."""
MEAN = 0.25
"""The share of squared norm from which on a common mean is spoken of."""
NOTHING = 1e-3
"""A delta error that is no loss."""
FINE = 0.1
"""A delta error that is small."""


def of(report: ReportData) -> Verdict:
    """The verdict on a report's figures."""
    headline, main = _main(report)
    found = [
        main,
        *_start(report),
        *_mean(report),
        *_clusters(report, main),
        *_outliers(report, main),
        *_duplicates(report),
        *_untrained(report),
        *_task(report),
        *_loss(report),
        *_bytes(report, main),
        *_rivals(report),
        *_rounding(report),
        *_cores(report),
    ]
    return Verdict(headline, found)


def _main(report: ReportData) -> tuple[str, Finding]:
    left_out, in_fit = report.left_out, report.in_fit
    if in_fit is None:
        text = "No adapter of the fit is left in this pack."
        return text, Finding("unknown", text)
    who = f"These {in_fit.adapters:,} adapters"
    if left_out is None:
        return _unknown(report)
    chance, kept = left_out.chance, left_out.kept
    by_more = is_above(kept, 0.0, left_out.kept_spread)
    measured = f"left out of the fit, an adapter loses {error(left_out.errors.mean)} of its update"
    against = f"{measured} in the directions of the others (in random ones: {error(chance)})"
    if chance < CHANCE:
        return (
            f"{who} were fitted with so many directions that any adapter would mostly fit in (an error of "
            f"{error(chance)} in random ones).",
            Finding(
                "unknown",
                f"Whether they share a subspace does not show at this k: {against}.",
                "Fit with fewer directions to find out.",
            ),
        )
    if by_more and kept >= SHARED:
        return (
            f"{who} share a subspace: {measured}.",
            Finding(
                "shared",
                f"They share a subspace: {against}; in the fit, the same adapters lose {error(left_out.in_fit.mean)}.",
                "Recycle them: a new adapter of this kind will mostly fit in as well.",
                good=True,
            ),
        )
    divided = _divided(report, left_out)
    if divided is not None:
        return divided
    more = _wider(report)
    if more is not None and more.ratio > 1:
        return (
            f"{who} share a subspace of more directions than were kept: {measured}, and {error(more.left_out)} with "
            f"k = {more.k}.",
            Finding(
                "partly-shared",
                f"They share a subspace, but k is too small for it: {against}.",
                f"Fit again with `n_components={more.k}` (`-k {more.k}`): an adapter left out then loses "
                f"{error(more.left_out)}, and the pack is {ratio(more.ratio)} smaller than the LoRAs, basis counted.",
                good=None,
            ),
        )
    emerging = _emerging(report, left_out)
    if emerging is not None:
        return emerging
    if by_more and kept >= NOT_SHARED:
        return (
            f"{who} share a part of their subspace: {measured}.",
            Finding(
                "partly-shared",
                f"They share a part of their directions: {against}; in the fit, the same adapters lose "
                f"{error(left_out.in_fit.mean)}.",
                f"{_enough(report)} An adapter that comes later is best put into a new fit.",
                good=None,
            ),
        )
    return (
        f"{who} do not share a subspace: {measured}.",
        Finding(
            "not-shared",
            f"They do not share a subspace: {against}. {_beyond_chance(kept) if by_more else _BY_CHANCE} "
            f"{_in_the_fit(report, in_fit.mean)}",
            f"{_enough(report)} An adapter that comes later "
            + ("takes as many bytes as it would alone." if _is_coded(report) else "will not fit in."),
            good=False,
        ),
    )


_BY_CHANCE = "That is no more than chance keeps."


def _beyond_chance(kept: float) -> str:
    return f"Beyond chance it keeps {share(kept)} of its squared norm: they share a little, but no subspace."


def _unknown(report: ReportData) -> tuple[str, Finding]:
    if not report.collection.with_originals:
        text = "The pack alone does not tell whether its adapters share a subspace."
        advice = (
            "Name the original adapters (`adapters=`, `--adapters`): then each is left out of the fit in turn, which "
            "tells."
        )
        return text, Finding("unknown", text, advice)
    if report.duplicates:
        text = "All of these adapters have copies of themselves in the fit, so that none can be left out of it."
        return text, Finding("unknown", text, "Keep one of each, and fit again.")
    text = "One adapter alone shares its subspace with nobody."
    return text, Finding("unknown", text)


def _kept(report: ReportData, chance: float) -> dict[str, tuple[float, float]]:
    """Of each adapter that was left out, the share that is kept beyond chance, and its error; copies aside."""
    return {
        row.name: (spreads.beyond_chance(row.left_out_error, chance), row.left_out_error)
        for row in report.adapters
        if row.left_out_error is not None and not any(row.name in group for group in report.duplicates)
    }


def _divided(report: ReportData, left_out: LeftOut) -> tuple[str, Finding] | None:
    """The answer where some adapters share a subspace and nearly all others have none of it."""
    chance = left_out.chance
    kept = _kept(report, chance)
    inside = [name for name in kept if name in left_out.sharing]
    outside = [name for name, (share_kept, _) in kept.items() if share_kept < NOT_SHARED and name not in inside]
    if len(inside) < 2 or len(outside) < 1 or len(inside) + len(outside) < 0.8 * len(kept):
        return None
    losses = [sum(kept[name][1] for name in group) / len(group) for group in (inside, outside)]
    sampled = left_out.sampled < left_out.of
    who = f"{len(inside):,} of {'the' if sampled else 'these'} {len(kept):,} adapters"
    if sampled:
        who += " that were left out in turn"
    return (
        f"{who} share a subspace: left out of the fit, they lose {error(losses[0])} of their updates, the others "
        f"{error(losses[1])}.",
        Finding(
            "partly-shared",
            f"A part of them shares a subspace: left out of the fit, {len(inside):,} of {len(kept):,} lose "
            f"{error(losses[0])} of their updates on average in the directions of the others, and "
            f"{len(outside):,} lose {error(losses[1])} (in random directions: {error(chance)}).",
            "Fit those that share by themselves (`exclude_adapters=`, `--exclude-adapter`), and keep the others as "
            "they are.",
            good=None,
            adapters=sorted(inside),
        ),
    )


def _emerging(report: ReportData, left_out: LeftOut) -> tuple[str, Finding] | None:
    """The answer where some adapters share a subspace that shows with more directions, in a pack that still pays."""
    largest = _largest_k(report)
    points = [p for p in report.sizes if p.k > largest and p.ratio > 1 and (p.random or 0.0) >= CHANCE]
    most = max((len(point.sharing) for point in points), default=0)
    point = next((point for point in points if len(point.sharing) == most), None)
    if point is None or most < 2:
        return None
    others = [kept for name, (kept, _) in _kept(report, left_out.chance).items() if name not in point.sharing]
    if not others or sum(kept < NOT_SHARED for kept in others) < 0.8 * len(others):
        return None
    n = left_out.sampled
    which = "these" if n == left_out.of else "the"
    turn = "" if n == left_out.of else " that were left out in turn"
    return (
        f"{most:,} of {which} {n:,} adapters{turn} share a subspace of more directions than were kept: it shows with "
        f"k = {point.k}.",
        Finding(
            "partly-shared",
            "A part of them shares a subspace, but k is too small for it: left out of the fit, an adapter loses "
            f"{error(left_out.errors.mean)} of its update on average; with k = {point.k}, {most:,} of {n:,} "
            "keep half of their squared norm and more.",
            "Fit those by themselves (`exclude_adapters=`, `--exclude-adapter`), or again with "
            f"`n_components={point.k}` (`-k {point.k}`).",
            good=None,
            adapters=sorted(point.sharing),
        ),
    )


def _largest_k(report: ReportData) -> int:
    return max((side.k for module in report.modules for side in (module.down, module.up)), default=0)


def _in_the_fit(report: ReportData, lost: float) -> str:
    """What the fit keeps of adapters that share no subspace, and why."""
    if _is_coded(report):
        return (
            f"In the fit they lose {error(lost)} too."
            if lost > LOSS
            else f"In the fit they lose {error(lost)}, since what directions miss of each is kept beside it."
        )
    null = report.null
    if null is None or not _is_like_the_null(report):
        return f"In the fit they lose {error(lost)}."
    said = f"In the fit they lose {error(lost)}"
    beside = f"with the same singular values in random directions they would lose {error(null.errors.mean)}"
    if lost > LOSS:
        return f"{said} too; {beside}."
    by_less = is_above(-lost, -null.errors.mean, null.spread)
    if by_less and spreads.beyond_chance(lost, null.errors.mean) >= NOT_SHARED:
        return f"{said}; {beside}. What makes the difference is common to some of them."
    sizes = {side.k for module in report.modules for side in (module.down, module.up)}
    room = f"k = {max(sizes)} has" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)} directions have"
    structure = "next to no" if by_less else "no"
    return (
        f"{said}, since {room} room to hold them side by side; {beside}. That is compression, and {structure} common "
        "structure."
    )


def _is_like_the_null(report: ReportData) -> bool:
    """Whether the pack keeps adapters in the form that the null model was measured in: coefficients of full cores are
    the same updates, those of diagonal ones are not."""
    storage = storage_by_name(report.collection.coefficient_dtype)
    return not storage.pairs_components


def _enough(report: ReportData) -> str:
    """Which k would keep them well, or that none that saves anything does."""
    if _is_coded(report):
        return "Keep the pack for its size, which needs nothing in common."
    if report.in_fit is not None and report.in_fit.mean <= FINE:
        return "Keep the pack for its size." if report.bytes.ratio > 1 else "Keep them as they are."
    largest = _largest_k(report)
    found = next((point for point in report.sizes if point.mean <= FINE and point.k > largest), None)
    if found is None:
        return "Keep them as they are."
    if found.ratio <= 1:
        return (
            f"Keep them as they are: a mean loss of {FINE} takes k = {found.k}, and then the pack is "
            f"{ratio(1 / found.ratio)} larger than the LoRAs."
        )
    return (
        f"Keep them as they are, or raise k to {found.k}: the mean loss is then {error(found.mean)}, and the pack "
        f"{ratio(found.ratio)} smaller than the LoRAs."
    )


def _is_coded(report: ReportData) -> bool:
    """Whether more is kept of each adapter than what lies in the pack's directions."""
    return report.collection.coefficient_dtype == CODED.name


def _wider(report: ReportData) -> SizePoint | None:
    """The fewest directions, more than there are, in which adapters left out are mostly kept, and not by chance."""
    return next(
        (
            point
            for point in report.sizes
            if point.k > _largest_k(report)
            and point.left_out is not None
            and (point.random or 1.0) >= CHANCE
            and spreads.beyond_chance(point.left_out, point.random or 1.0) >= SHARED
        ),
        None,
    )


def _start(report: ReportData) -> list[Finding]:
    if report.starts is None:
        return []
    found = []
    energies = {row.who: row for row in report.starts.energies}
    for number, group in enumerate(report.starts.groups, 1):
        row = energies.get(f"group {number}")
        kept = ""
        if row is not None:
            kept = (
                f" {row.k} directions hold {share(row.factors_down)} of their A and {share(row.factors_up)} of B; "
                f"in random directions {share(row.null_down)} and {share(row.null_up)}."
            )
        found.append(
            Finding(
                "start",
                f"{len(group.adapters):,} adapters began from the same random A (mean cosine {group.cosine_down:.2f}; "
                f"of their B {group.cosine_up:.2f}). What they share on that side is what training left of the start, "
                f"not what it found.{kept}",
                "Do not take a steep spectrum of A for a structure of the tasks: look at B, and at adapters left out.",
                good=None,
                adapters=group.adapters,
            )
        )
    return found


def _mean(report: ReportData) -> list[Finding]:
    one = report.similarity
    if one is None or one.mean_energy is None or one.mean_energy < MEAN:
        return []
    return [
        Finding(
            "mean",
            f"They have a strong common mean: the mean of the others explains {share(one.mean_energy)} of an adapter's "
            f"squared norm (mean cosine between updates {one.mean_cosine:.2f}).",
            "Compare with the mean adapter on your task before crediting the subspace.",
            good=None,
        )
    ]


def _clusters(report: ReportData, main: Finding) -> list[Finding]:
    clusters = report.similarity.clusters if report.similarity is not None else []
    if not clusters:
        return []
    sizes = " and ".join(", ".join(f"{len(one.adapters):,}" for one in clusters).rsplit(", ", 1))
    inside = max(one.overlap for one in clusters)
    outside = max(one.overlap_with_others for one in clusters)
    listed = "; ".join(_few(one.adapters) for one in clusters)
    unrelated = report.similarity.chance_overlap if report.similarity is not None else None
    by_chance = f" (random ones: {share(unrelated)})" if unrelated is not None else ""
    return [
        Finding(
            "clusters",
            f"They fall into {len(clusters)} groups, of {sizes} adapters: within a group directions overlap up to "
            f"{share(inside)}, between groups at most {share(outside)} on average{by_chance}. {listed}.",
            "What they share lies within these groups."
            if main.kind == "not-shared"
            else "Fit each group by itself: fewer directions then do the same.",
            good=None,
        )
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def _outliers(report: ReportData, main: Finding) -> list[Finding]:
    if not report.outliers or main.kind == "not-shared":
        return []
    many = len(report.outliers) > 1
    return [
        Finding(
            "outlier",
            f"{plural(len(report.outliers), 'adapter')} {'have' if many else 'has'} far less in common with the rest "
            "than those have with one another.",
            f"Leave {'them' if many else 'it'} out of the fit (`exclude_adapters=`, `--exclude-adapter`), and keep "
            f"{'those LoRAs as they are' if many else 'that LoRA as it is'}.",
            good=False,
            adapters=report.outliers,
        )
    ]


def _duplicates(report: ReportData) -> list[Finding]:
    if not report.duplicates:
        return []
    listed = "; ".join(" = ".join(group[:4]) + " = …" * (len(group) > 4) for group in report.duplicates[:3])
    others = len(report.duplicates) - 3
    more = f"; and {plural(others, 'group')} more" if others > 0 else ""
    return [
        Finding(
            "duplicate",
            f"The same update under several names: {listed}{more}.",
            "Keep one of each: a duplicate counts twice in the fit.",
            good=None,
        )
    ]


def _untrained(report: ReportData) -> list[Finding]:
    if not report.untrained:
        return []
    return [
        Finding(
            "untrained",
            f"{plural(len(report.untrained), 'adapter')} {'are' if len(report.untrained) > 1 else 'is'} untrained: "
            "every update is zero. Kept in the pack, left out of the fit and of all figures.",
            "Remove what was added by mistake: `eigenlorax remove`.",
            good=None,
            adapters=report.untrained,
        )
    ]


def _task(report: ReportData) -> list[Finding]:
    found = []
    scored = [
        (one.original_accuracy, one.recycled_accuracy)
        for one in report.evaluations
        if one.original_accuracy is not None and one.recycled_accuracy is not None
    ]
    if scored:
        original, recycled = (sum(column) / len(scored) for column in zip(*scored, strict=True))
        text = f"On {plural(len(scored), 'labelled task')}, accuracy is {original:.3f} with the original adapters and "
        found.append(
            Finding(
                "task", f"{text}{recycled:.3f} with the recycled ones, on average.", good=recycled >= original - 0.01
            )
        )
    if report.evaluations:
        agreement = sum(one.agreement for one in report.evaluations) / len(report.evaluations)
        kl = sum(one.kl for one in report.evaluations) / len(report.evaluations)
        found.append(
            Finding(
                "task",
                f"Original and recycled adapters give the same answer on {share(agreement)} of the rows, or tokens; "
                f"the mean divergence is {error(kl)} nats.",
                good=agreement >= 0.95,
            )
        )
    return found


def _loss(report: ReportData) -> list[Finding]:
    lossy = [row for row in report.adapters if not row.untrained and row.delta_error > LOSS]
    if not lossy:
        return []
    names = [row.name for row in lossy]
    advice = "Fit the pack again with those that were projected, or keep those LoRAs as they are."
    if _is_coded(report):
        advice = f"Ask for less (`max_error={LOSS}`, `--max-error {LOSS}`), or for more bytes."
    elif any(row.in_fit for row in lossy):
        point = next((point for point in report.sizes if point.worst <= LOSS), None)
        advice = (
            f"`n_components={point.k}` (`-k {point.k}`) would bring every adapter of the fit to {error(point.worst)} "
            "or less, in a pack "
            + (f"{ratio(point.ratio)} smaller than the LoRAs" if point.ratio > 1 else "no smaller than the LoRAs")
            + f"; `max_error={LOSS}` (`--max-error {LOSS}`) finds the smallest one."
            if point is not None
            else f"`max_error={LOSS}` (`--max-error {LOSS}`) finds the smallest pack that keeps them; or keep those "
            "LoRAs as they are."
        )
    return [
        Finding(
            "loss",
            f"{plural(len(lossy), 'adapter')} {'lose' if len(lossy) > 1 else 'loses'} more than half of "
            f"{'their updates' if len(lossy) > 1 else 'its update'} ({error(lossy[0].delta_error)} at worst).",
            advice,
            good=False,
            adapters=names,
        )
    ]


def _bytes(report: ReportData, main: Finding) -> list[Finding]:
    b, in_fit = report.bytes, report.in_fit
    cost = (
        f"Recycling costs {error(in_fit.mean)} of an update on average, {error(in_fit.worst)} at worst. "
        if in_fit is not None
        else ""
    )
    even = (
        f"if others fit this basis, it pays from {plural(b.break_even, 'such adapter')} on"
        if b.break_even is not None
        else "it never pays at this k"
    )
    if b.ratio < 1:
        return [
            Finding(
                "bytes",
                f"{cost}The pack is {ratio(1 / b.ratio)} larger than the LoRAs with the basis counted; {even}.",
                "Gather more adapters of this base model, or fit with a smaller k.",
                good=False,
            )
        ]
    return [
        Finding(
            "bytes",
            f"{cost}The pack is {ratio(b.ratio)} smaller than the LoRAs with the basis counted"
            + ("." if main.kind == "not-shared" else f", {ratio(b.limit)} in the limit of many adapters; {even}."),
            good=True if in_fit is None or in_fit.mean <= LOSS else None,
        )
    ]


def _rivals(report: ReportData) -> list[Finding]:
    """What does better for as many bytes, said as it is."""
    known = {one.key: one for one in report.baselines}
    pack = known.get("pack")
    if pack is None or pack.stored_bytes is None or pack.errors.mean < NOTHING:
        return []
    found = []
    cut = known.get("truncated")
    if cut is not None and cut.errors.mean <= pack.errors.mean:
        found.append(
            Finding(
                "baseline",
                f"Cutting each LoRA by SVD to the same bytes loses less: {error(cut.errors.mean)} on average, against "
                f"{error(pack.errors.mean)} here.",
                "A shared basis does not pay for these adapters at this k.",
                good=False,
            )
        )
    for key, bits in (("int4", 4), ("int8", 8)):
        one = known.get(key)
        if (
            one is not None
            and one.stored_bytes is not None
            and one.errors.mean <= pack.errors.mean
            and one.stored_bytes <= pack.stored_bytes
        ):
            found.append(
                Finding(
                    "baseline",
                    f"Rounding each LoRA to {bits} bits takes fewer bytes and loses less: {error(one.errors.mean)} on "
                    "average.",
                    "For storage alone, round; a pack is for serving and training in one subspace.",
                    good=False,
                )
            )
            break
    beside = cheapest(report.frontier) if report.frontier is not None else None
    if (
        beside is not None
        and report.frontier is not None
        and beside.stored_bytes < report.frontier.points[0].stored_bytes
    ):
        found.append(Finding("baseline", at_equal_error(report.frontier), good=False))
    return found


def _cores(report: ReportData) -> list[Finding]:
    """Which figures are not of the pack's own form."""
    storage = storage_by_name(report.collection.coefficient_dtype)
    if storage.core_kind is None or not report.collection.with_originals:
        return []
    figures = {
        "full": "Figures at other k are",
        "diagonal": "Figures of adapters left out, of random directions, of the null model and at other k are",
    }
    text = f"The pack keeps {storage.core_kind} cores. {figures[storage.core_kind]} those of packs without cores."
    return [Finding("cores", text, good=None)]


def _rounding(report: ReportData) -> list[Finding]:
    if _is_coded(report):
        # where all is rounded, and as coarsely as was asked for
        return []
    trained = [row for row in report.adapters if not row.untrained]
    worst = max(trained, key=lambda row: row.rounding_error, default=None)
    if worst is None or worst.rounding_error < NOTHING or worst.rounding_error < worst.delta_error / 2:
        return []
    return [
        Finding(
            "rounding",
            f"Rounding to {report.collection.dtype} is most of what is lost: {error(worst.rounding_error)} of "
            f"{worst.name}'s update.",
            "`dtype='float32'` (`--dtype float32`) stores it in full.",
            good=None,
            adapters=[worst.name],
        )
    ]
