"""Reports made up in memory: plausible figures of collections that never were."""

import dataclasses

import numpy as np

from eigenlorax.reports import Report, data
from eigenlorax.reports.comparison_data import (
    Baseline,
    Bytes,
    Frontier,
    FrontierPoint,
    LeftOut,
    Null,
    Sampling,
    SideEnergy,
    SizePoint,
    Spread,
)
from eigenlorax.reports.history_data import HistoryFigures, Run, VersionFigures
from eigenlorax.reports.task_data import Evaluation, TaskFrontier, TaskPoint, TaskRun

BERT = ("attention.self.query", "attention.self.value")
LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA = (*LLAMA, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
HOSTILE = "<script>alert(1)</script>&\"'|`*$x$"


def hostile_names():
    """Names that want to be markup, code, or a layout's end."""
    return [
        "untrained",
        HOSTILE,
        "x" * 200,
        "ünï—çødé 名前 \u202eabc",
        "a\nb\n\n# c",
        '" onmouseover="alert(1)',
        "</title></style></script><script>alert(2)//",
        "${x}`y`",
        "[a](javascript:alert(1))",
        "]]>&amp;--><!--",
        "<img src=https://example.com/x.png onerror=alert(3)>",
        "__a__ ~~b~~ 1. c | d \\| e",
    ]


def report(
    adapters=30, *, layers=12, kinds=BERT, width=768, k=32, seed=3, names=None, base_model="FacebookAI/roberta-base"
):
    """A report with every field filled. Adapters come in four clusters, the last is an outlier, the first untrained."""
    random = np.random.default_rng(seed)
    names = names or [
        f"{('sst2', 'mnli-genre', 'org--intent-classifier', 'spam')[i % 4]}-{i:03d}" for i in range(adapters)
    ]
    modules = [f"encoder.layer.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    similarity, order = _similarity(names, random)
    figures = _adapters(names, similarity, random, len(modules), k)
    return Report(
        eigenlorax_version="0.1.0",
        collection=data.Collection(
            base_model=base_model,
            revision="e2da8e2f811d1448a5b465c236feacd80ffbac7b",
            adapters=adapters,
            modules=len(modules),
            ranks=[8, 16],
            purpose="training",
            weighting="delta",
            sweeps=2,
            size=f"at most {k} components",
            dtype="float32",
            coefficient_dtype="float32",
            fingerprint="9f2c" * 16,
            n_extra=4,
            excluded_modules=["classifier.dense"],
            skipped={"broken-one": "NaN in encoder.layer.3.attention.self.query"},
            with_originals=True,
        ),
        verdict=_verdict(names),
        adapters=figures,
        modules=[_module(name, width, k, adapters, names, random) for name in modules],
        module_errors=[[float(a.delta_error * random.uniform(0.7, 1.3)) for _ in modules] for a in figures],
        in_fit=_spread(figures, "delta_error"),
        projected=_spread(figures[:2], "delta_error"),
        left_out=LeftOut(
            sampled=min(adapters, 40),
            of=adapters,
            seed=7,
            method="each in a subspace fitted anew without it",
            errors=_spread(figures, "left_out_error"),
            standard_error=0.0041,
            in_fit=_spread(figures, "delta_error"),
            chance=0.99,
            kept=0.441,
            kept_spread=0.0012,
            kept_standard_error=0.0021,
            sharing=names[2 : max(4, adapters // 2)],
        ),
        null=Null(
            draws=2,
            seed=7,
            errors=dataclasses.replace(_spread(figures, "delta_error"), mean=0.88),
            spread=0.0003,
            down=SideEnergy(0.912, 0.574, 0.0002),
            up=SideEnergy(0.884, 0.571, 0.0002),
        ),
        baselines=_baselines(figures),
        frontier=_frontier(figures),
        starts=data.Starts(
            groups=[data.StartGroup(names[: max(2, adapters // 3)], 0.912, 0.013)],
            energies=[
                data.StartEnergy("all", adapters, 8, 0.741, 0.623, 0.124, 0.231, 0.902, 0.885),
                data.StartEnergy("group 1", max(2, adapters // 3), 8, 0.988, 0.651, 0.224, 0.301, 0.931, 0.917),
                data.StartEnergy(
                    "others", adapters - max(2, adapters // 3), 8, 0.522, 0.609, 0.171, 0.266, 0.871, 0.866
                ),
            ],
        ),
        similarity=similarity,
        duplicates=[names[1:3]],
        outliers=[order[-1]],
        untrained=[names[0]],
        runs=[Run(names[2:5], 0.123)],
        histories=[history("run", 7), history(HOSTILE, 3, steps=False)],
        bytes=_bytes(adapters, len(modules), width, k),
        sizes=_sizes(adapters, len(modules), width),
        evaluations=_evaluations(names),
        task_frontiers=_task_frontiers(names),
        sampling=Sampling(len(modules) - 1, len(modules), 7, {"left_out_error": 0.0123, "int8_error": 0.0004}),
        notes=["Left-out errors are of a sample of 40 adapters, drawn with seed 7.", "Rounding is that of float32."],
    )


def history(name, versions, *, steps=True, metrics=("eval_loss", "epoch", HOSTILE)):
    """A history on a straight path to the last version; the second version is not sampled."""
    figures = []
    for index in range(versions):
        left = (versions - 1 - index) / versions
        sampled = index != 1
        figures.append(
            VersionFigures(
                version=str(500 * (index + 1)),
                sha256=f"{index:x}" * 64,
                step=500 * (index + 1) if steps else None,
                metrics=dict.fromkeys(metrics, 1 / (index + 1)),
                delta_error=0.049,
                lora_stored=90_000 // (index + 1),
                tensors_stored=30_000,
                source_bytes=3_600_000,
                change=None if index == 0 else 1 / versions,
                to_final=left if sampled else None,
                left_out_error=0.07 if index % 2 else None,
                x=left if sampled else None,
                y=0.1 * left if sampled else None,
            )
        )
    return HistoryFigures(name, figures, path_share=0.93, k=32, fitted=versions)


def even(adapters, *, error=5e-8, cosine=0.0):
    """A report of adapters and modules that are all alike: errors and places equal, spectra and angles of one value.

    cosine: of each adapter with each other; their overlap is its square.
    """
    full = report(adapters + 1)
    trained = [
        dataclasses.replace(
            one,
            **dict.fromkeys(
                ("delta_error", "left_out_error", "mean_scaled_error", "random_error", "truncated_error"), error
            ),
            x=0.0,
            y=0.0,
        )
        for one in full.adapters
        if not one.untrained
    ]
    names = [one.name for one in trained]
    table = np.where(np.eye(adapters, dtype=bool), 1.0, cosine)
    # each joins at the height of all
    tree = [
        [float(adapters + n - 2 if n > 1 else 0), float(n), 1.0 - cosine**2, float(n + 1)] for n in range(1, adapters)
    ]
    spread = Spread(adapters, error, error, error, names[0])
    side = {"k": 1, "rank": 1, "energy": 1.0, "spectrum": [1.0], "null": [1.0], "null_energy": 1.0, "angles": [0.0]}
    side |= {"null_angles": [0.0], "halves_overlap": 1.0, "null_halves_overlap": 1.0}
    return dataclasses.replace(
        full,
        collection=dataclasses.replace(full.collection, adapters=adapters),
        adapters=trained,
        modules=[
            dataclasses.replace(
                one,
                delta_error=error,
                worst=names[0],
                worst_error=error,
                down=dataclasses.replace(one.down, **side),
                up=dataclasses.replace(one.up, **side),
            )
            for one in full.modules
        ],
        module_errors=[[error for _ in full.modules] for _ in trained],
        in_fit=spread,
        projected=None,
        left_out=dataclasses.replace(full.left_out, sampled=adapters, of=adapters, errors=spread, in_fit=spread),
        null=dataclasses.replace(full.null, errors=spread),
        baselines=[dataclasses.replace(one, errors=spread) for one in full.baselines],
        starts=None,
        similarity=dataclasses.replace(
            full.similarity,
            names=names,
            cosine=table.tolist(),
            overlap=(table**2).tolist(),
            tree=tree,
            clusters=[],
            mean_cosine=cosine,
        ),
        bytes=dataclasses.replace(full.bytes, over_n=full.bytes.over_n[:1]),
        sizes=[dataclasses.replace(full.sizes[0], k=1, mean=error, worst=error, left_out=error, random=error)],
        evaluations=[],
        task_frontiers=[],
        **{name: [] for name in ("duplicates", "outliers", "untrained", "notes")},
    )


def wide(adapters=25):
    """A report of figures that take as much room as they may: many digits, exponents, large units, long names."""
    full = report(adapters, names=[f"organisation--a-long-task-name-{n:03d}-lora" for n in range(adapters)], layers=13)
    long, small = 0.99999, 5.25e-8
    errors = ("delta_error", "left_out_error", "mean_scaled_error", "random_error", "truncated_error", "int8_error")
    errors += ("int4_error", "rounding_error", "factor_error_down", "factor_error_up")
    sizes = ("lora_bytes", "coefficient_bytes", "carried_bytes", "head_bytes")
    side = {"dimension": 14_336, "k": 1_024, "rank": 14_336, "energy": long, "halves_overlap": long}
    side |= {"null_energy": long, "null_halves_overlap": long}
    return dataclasses.replace(
        full,
        adapters=[
            dataclasses.replace(
                one,
                overlap=long,
                norm=1.234e-5,
                ranks=[8, 16, 32, 64],
                **dict.fromkeys(errors, small),
                **dict.fromkeys(sizes, 876_500_000),
            )
            for one in full.adapters
        ],
        modules=[
            dataclasses.replace(
                one,
                down=dataclasses.replace(one.down, **side),
                up=dataclasses.replace(one.up, **side),
                **dict.fromkeys(("delta_error", "worst_error", "factor_error_down", "factor_error_up"), small),
            )
            for one in full.modules
        ],
        evaluations=[
            dataclasses.replace(one, tokens=one.tokens and 123_456_789, agreement=long, kl=small, without_kl=12.345)
            for one in full.evaluations
        ],
    )


def bare(adapters=3):
    """A report of which everything that may be missing is."""
    full = report(adapters)
    keep = {"name", "in_fit", "untrained", "ranks", "modules", "delta_error", "rounding_error", "energy_kept"}
    keep |= {"lora_bytes", "file_bytes", "coefficient_bytes", "carried_bytes", "head_bytes"}
    blank = {f.name: None for f in dataclasses.fields(data.AdapterFigures) if f.name not in keep}
    side = {"spectrum": [], "null": [], "null_energy": None, "angles": [], "null_angles": [], "halves_overlap": None}
    side["null_halves_overlap"] = None
    return dataclasses.replace(
        full,
        collection=dataclasses.replace(
            full.collection,
            base_model=None,
            revision=None,
            n_extra=0,
            excluded_modules=[],
            skipped={},
            with_originals=False,
        ),
        verdict=data.Verdict("The figures of this pack alone cannot tell.", []),
        adapters=[dataclasses.replace(one, **blank) for one in full.adapters],
        modules=[
            dataclasses.replace(
                one,
                layer=None,
                down=dataclasses.replace(one.down, **side),
                up=dataclasses.replace(one.up, **side),
                delta_error=None,
                worst=None,
                worst_error=None,
            )
            for one in full.modules
        ],
        module_errors=[],
        bytes=dataclasses.replace(full.bytes, lora_stored=None, break_even=None, over_n=[]),
        **dict.fromkeys(("in_fit", "projected", "left_out", "null", "starts", "similarity", "frontier")),
        **{
            name: []
            for name in (
                "baselines",
                "duplicates",
                "outliers",
                "untrained",
                "runs",
                "histories",
                "sizes",
                "evaluations",
                "task_frontiers",
                "notes",
            )
        },
    )


def _adapters(names, similarity, random, modules, k):
    made = []
    clusters = {name: n for n, group in enumerate(similarity.clusters) for name in group.adapters}
    places = dict(zip(similarity.names, random.normal(size=(len(similarity.names), 2)), strict=True))
    for i, name in enumerate(names):
        trained = i > 0
        error = float(np.clip(random.normal(0.31, 0.05), 0.02, 0.6)) if trained else 0.0
        cluster = clusters.get(name)
        x, y = places.get(name, (0.0, 0.0)) + (
            3.0 * np.array([np.cos((cluster or 0) * 1.6), np.sin((cluster or 0) * 1.6)])
        )
        made.append(
            data.AdapterFigures(
                name=name,
                in_fit=trained,
                untrained=not trained,
                ranks=[8] if i % 5 else [8, 16],
                modules=modules,
                norm=float(random.uniform(0.4, 3)) if trained else 0.0,
                delta_error=error,
                rounding_error=2.1e-7,
                energy_kept=1 - error**2,
                factor_error_down=error * 1.1,
                factor_error_up=error * 0.8,
                left_out_error=min(0.97, error * 2.4) if trained else None,
                mean_error=1.2 if trained else None,
                mean_scaled_error=0.96 if trained else None,
                random_error=0.99 if trained else None,
                truncated_error=0.71 if trained else None,
                int8_error=0.007 if trained else None,
                int4_error=0.11 if trained else None,
                nearest=names[i - 1] if trained else None,
                nearest_cosine=float(random.uniform(-0.2, 0.6)) if trained else None,
                overlap=float(random.uniform(0.05, 0.4)) if trained else None,
                cluster=cluster,
                x=float(x) if name in places else None,
                y=float(y) if name in places else None,
                lora_bytes=modules * 8 * 1536 * 4,
                file_bytes=modules * 8 * 1536 * 4 + 2345,
                coefficient_bytes=modules * 8 * 2 * k * 4,
                carried_bytes=0 if i % 7 else 3072,
                head_bytes=6152,
            )
        )
    return sorted(made, key=lambda one: -one.delta_error)


def _similarity(names, random):
    trained = names[1:]
    n = len(trained)
    group = np.arange(n) * 4 // max(n, 1)
    rows = random.normal(size=(n, 24)) + 1.2 * random.normal(size=(4, 24))[group]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows.T
    found = data.Similarity(
        of="originals",
        names=trained,
        cosine=cosine.tolist(),
        overlap=(np.abs(cosine) ** 1.5).tolist(),
        tree=_tree(n, random),
        clusters=[
            data.Cluster([trained[i] for i in np.flatnonzero(group == g)], 0.41, 0.12)
            for g in range(4)
            if (group == g).sum() > 1
        ],
        silhouette=0.213,
        map_share=0.334,
        chance_overlap=0.011,
        mean_cosine=0.061,
        mean_energy=0.084,
    )
    return found, trained


def _tree(n, random):
    rows = []

    def merge(first, last):
        if last - first == 1:
            return first, 0.05
        middle = (first + last + int(random.integers(0, 2))) // 2
        middle = min(max(middle, first + 1), last - 1)
        (a, low), (b, high) = merge(first, middle), merge(middle, last)
        height = min(0.98, max(low, high) + float(random.uniform(0.02, 0.2)))
        rows.append([float(a), float(b), height, float(last - first)])
        return n + len(rows) - 1, height

    if n > 1:
        merge(0, n)
    return rows


def _module(name, width, k, adapters, names, random):
    layer = int(name.split(".")[2])
    kind = "encoder.layer.*." + name.split(".", 3)[3]
    error = float(np.clip(0.2 + 0.012 * layer + 0.05 * ("value" in name) + random.normal(0, 0.02), 0.02, 1))
    return data.ModuleFigures(
        name=name,
        layer=layer,
        kind=kind,
        adapters=adapters,
        down=_side(width, k, adapters, 0.9 + 0.02 * random.random(), random),
        up=_side(width, k, adapters, 0.86 + 0.05 * random.random(), random),
        delta_error=error,
        energy_kept=1 - error**2,
        factor_error_down=error * 1.2,
        factor_error_up=error * 0.9,
        worst=names[-1],
        worst_error=error * 1.6,
    )


def _side(dimension, k, adapters, decay, random):
    rank = min(dimension, adapters * 8)
    spectrum = decay ** np.arange(rank) + 0.002
    null = 1.0 - 0.5 * np.arange(rank) / rank
    spectrum, null = spectrum / spectrum.sum(), null / null.sum()
    kept = min(k, rank)
    return data.SideFigures(
        dimension=dimension,
        k=kept,
        rank=rank,
        energy=float(spectrum[:kept].sum()),
        spectrum=spectrum[: data.SPECTRUM].tolist(),
        null=null[: data.SPECTRUM].tolist(),
        null_energy=float(null[:kept].sum()),
        angles=np.sort(np.clip(90 * np.linspace(0.1, 1, kept) ** 0.7 + random.normal(0, 2, kept), 0, 90)).tolist(),
        null_angles=np.linspace(70, 90, kept).tolist(),
        halves_overlap=0.274,
        null_halves_overlap=kept / dimension,
    )


def _spread(figures, field):
    known = [(getattr(one, field), one.name) for one in figures if getattr(one, field) is not None]
    values = np.array([value for value, _ in known])
    worst, name = max(known)
    return Spread(len(known), float(values.mean()), float(np.sqrt((values**2).mean())), worst, name)


def _baselines(figures):
    total = sum(one.lora_bytes for one in figures)
    rows = [
        ("pack", "this pack", 0.31, total // 6),
        ("left-out", "an adapter left out of the fit", 0.74, None),
        ("mean", "the mean adapter in place of each", 1.2, total // len(figures)),
        ("mean-scaled", "the best multiple of the mean adapter", 0.96, total // len(figures)),
        ("random", "random bases of equal k", 0.99, total // 6),
        ("null", "the same singular values in random directions", 0.88, None),
        ("truncated", "each adapter alone, cut by SVD to equal bytes", 0.71, total // 6),
        ("int8", "each adapter in int8", 0.007, total // 4),
        ("int4", "each adapter in int4", 0.11, total // 8),
    ]
    worst = figures[0].name
    return [
        Baseline(key, label, Spread(len(figures), mean, mean * 1.01, mean * 1.3, worst), stored)
        for key, label, mean, stored in rows
    ]


def _frontier(figures):
    total = sum(one.lora_bytes for one in figures)
    ways = {
        "codec": [("", 80, 0.7), ("", 30, 0.2), ("", 7, 0.02)],
        "bound": [("", 90, 0.7), ("", 33, 0.2), ("", 8, 0.02)],
        "rounded": [("", 16, 0.48), ("", 8, 0.13), ("", 4, 0.009)],
        "truncated by energy": [("", 12, 0.7), ("", 4, 0.2), ("", 2, 0.02)],
        "truncated and rounded": [("", 60, 0.7), ("", 20, 0.2), ("", 5, 0.02)],
        "shared basis": [("k = 4, 4 bits", 90, 0.78), ("k = 32, 4 bits and 8", 21, 0.29), ("k = 64, 8 bits", 6, 0.04)],
        "joint, full cores": [("k = 8, 8 bits", 50, 0.75), ("k = 64, 8 bits", 5, 0.04)],
        "joint, diagonal cores": [("k = 8, 8 bits", 70, 0.76), ("k = 64, 8 bits", 9, 0.11)],
    }
    worst = max(one.delta_error for one in figures)
    mean = sum(one.delta_error for one in figures) / len(figures)
    return Frontier(
        adapters=len(figures),
        modules=2,
        of=4,
        relative_error=0.031,
        lora_float16=total // 2,
        points=[
            FrontierPoint("pack", "", total // 6, worst, mean),
            *(
                FrontierPoint(way, words, total // smaller, error, error * 0.9)
                for way, points in ways.items()
                for words, smaller, error in points
            ),
        ],
    )


def _bytes(adapters, modules, width, k):
    each, coefficients, basis = modules * 8 * width * 2 * 4, modules * 8 * 2 * k * 4, modules * 2 * k * width * 4
    over = sorted({1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, adapters})
    return Bytes(
        lora_files=adapters * (each + 2345),
        lora_stored=adapters * each,
        lora=adapters * each,
        lora_float16=adapters * each // 2,
        basis=basis,
        coefficients=adapters * coefficients,
        carried=0,
        heads=adapters * 6152,
        ratio=adapters * each / (basis + adapters * coefficients),
        limit=each / coefficients,
        break_even=basis // (each - coefficients) + 1,
        over_n=[(n, n * each / (basis + n * coefficients)) for n in over],
    )


def _sizes(adapters, modules, width):
    points = []
    for k in (2, 4, 8, 16, 32, 64, 96, 128):
        stored = modules * 2 * k * width * 4 + adapters * modules * 8 * 2 * k * 4
        mean = 0.9 * 0.97**k
        lora = adapters * modules * 8 * width * 2 * 4
        points.append(
            SizePoint(
                k,
                mean,
                min(1.0, mean * 1.3),
                mean**0.5,
                0.0003,
                0.5 + mean / 2,
                1 - k / width,
                stored,
                lora / stored,
                [],
            )
        )
    return points


def _evaluations(names):
    made = [
        Evaluation(
            name, "rows/test.jsonl", "text-classification", 872, None, True,
            0.923, 0.919, 0.508, 0.985, 0.523, 0.0021, 0.61, None, None, None,
        )
        for name in names[1:3]
    ]  # fmt: skip
    made.append(
        Evaluation(
            names[-1],
            "rows/stories.jsonl",
            "causal-lm",
            200,
            41_233,
            False,
            None,
            None,
            None,
            0.941,
            0.713,
            0.0122,
            0.37,
            8.412,
            8.471,
            13.92,
        )
    )
    return made


def _task_frontiers(names):
    """Of both kinds of task: the pack, and two ratios, at the smaller of which the fit is nearer, at the other not."""
    ways = [("pack", None, 3_000_000), ("fit", 5.0, 4_000_000), ("truncated and rounded", 5.0, 3_990_000)]
    ways += [("fit", 50.0, 400_000), ("truncated and rounded", 50.0, 399_000)]
    kl = [0.0121, 0.0004, 0.0007, 0.91, 0.83]
    found = []
    for task, accuracy, perplexity, tested in (
        ("text-classification", 0.9, None, names[1:3]),
        ("causal-lm", None, 8.5, names[-1:]),
    ):
        score = {"accuracy": accuracy, "perplexity": perplexity}
        points = [
            TaskPoint(
                way=way,
                ratio=ratio,
                stored_bytes=stored,
                worst=0.3,
                mean=0.2,
                **score,
                agreement=0.95,
                kl=lost,
                runs=[TaskRun(name, "rows/test.jsonl", **score, agreement=0.95, kl=lost) for name in tested],
            )
            for (way, ratio, stored), lost in zip(ways, kl, strict=True)
        ]
        bare = (accuracy and 0.508, perplexity and 13.92, 0.61)
        found.append(TaskFrontier(task, len(names) - 1, 20_000_000, accuracy, perplexity, *bare, points))
    return found


def _verdict(names):
    return data.Verdict(
        "These adapters share a subspace in part: 32 directions a side keep 0.904 of their energy, "
        "but an adapter left out loses most of its own.",
        [
            data.Finding(
                "partly-shared",
                "Left-out adapters come back with an error of 0.741; with random bases it would be 0.990.",
                "Add new adapters by `eigenlorax add`, and look at the error that it prints.",
                None,
                [],
            ),
            data.Finding(
                "start",
                f"{max(2, len(names) // 3)} adapters began with the same random A, and look alike there for that.",
                "Judge the collection by the updates, not by A.",
                False,
                names[: max(2, len(names) // 3)],
            ),
            data.Finding("bytes", "The pack is smaller than the LoRAs from 5 adapters on.", "", True, []),
            data.Finding(
                "outlier", "One adapter shares little with the others.", "Keep it as a LoRA.", False, names[-1:]
            ),
            data.Finding(
                "duplicate", "Two adapters are equal but for rounding.", "Keep one of them.", None, names[1:3]
            ),
        ],
    )
