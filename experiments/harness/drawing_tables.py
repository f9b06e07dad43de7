"""What the records of the experiment on pictures say, and the grid of pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from . import records
from .pages import table
from .records import Json, percent

LEAST = 6
"""The grid is of packs that have this fraction of the LoRAs' bytes; of one k, it is the largest such that is shown."""


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Name of a block → its Markdown."""
    return {
        "images-judges": judges_table,
        "images-packs": packs_table,
        "images-bytes": bytes_table,
        "images-ways": ways_table,
        "images-styles": styles_table,
        "images-left-out": left_out_table,
        "images-new": lambda: new_table(config),
        "images-rates": lambda: rates_table(config),
    }


def packs() -> list[Json]:
    """Records of packs, by k."""
    return sorted(records.of("diffusion/packs"), key=lambda one: records.asked(one)["pack"]["k"])


def sixth() -> int:
    """The largest k at which the pack takes a sixth of the LoRAs' bytes, the basis counted."""
    return max(records.asked(one)["pack"]["k"] for one in packs() if one["bytes"]["ratio"] >= LEAST)


def styles(*, seen: bool) -> list[Json]:
    """Records of styles, in the order of the config."""
    found = [one for one in records.of("diffusion/recycled") if records.asked(one)["seen"] is seen]
    order = records.asked(found[0])["sources"]
    key = {name: n for n, name in enumerate(order)}
    return sorted(found, key=lambda one: key.get(records.asked(one)["name"], len(key)))


def row_of(one: Json, way: str, k: int | None = None) -> Json:
    return next(row for row in one["test"]["ways"] if (row["way"], row["k"]) == (way, k))


def has(one: Json, way: str, k: int | None) -> bool:
    return any((row["way"], row["k"]) == (way, k) for row in one["test"]["ways"])


def ways_of(way: str, k: int | None, *, seen: bool = True) -> Iterator[tuple[Json, Json]]:
    """(how it was kept, the distance of the base's pictures) of each style that has this way."""
    for one in styles(seen=seen):
        if has(one, way, k):
            yield row_of(one, way, k), row_of(one, "base")


HEADER = [
    "pixels, RMSE",
    "÷ base's",
    "features ÷ base's",
    "class right",
    "style right",
    "**same style as the original**",
    "least of a style",
]


def figures(rows: Sequence[tuple[Json, Json]]) -> list[str]:
    """Means over styles; distances are to the original's pictures."""
    kept = [one for one, _ in rows]
    return [
        f"{mean(one['rmse'] for one in kept):.3f}",
        f"{mean(one['rmse'] / base['rmse'] for one, base in rows):.2f}",
        f"{mean(one['class']['features'] / base['class']['features'] for one, base in rows):.2f}",
        percent(mean(one["class"]["right"] for one in kept)),
        percent(mean(one["style"]["right"] for one in kept)),
        percent(mean(one["style"]["same"] for one in kept)),
        percent(min(one["style"]["same"] for one in kept)),
    ]


def packs_table() -> str:
    """Every k: bytes, errors of updates, and what is drawn."""
    rows = []
    for one in packs():
        k, size, errors = records.asked(one)["pack"]["k"], one["bytes"], list(one["delta_errors"].values())
        found = list(ways_of("seen", k))
        name = f"**{k}**" if k == sixth() else str(k)
        lost = f"{mean(errors):.2f} / {max(errors):.2f}"
        rows.append([name, f"{size['ratio']:.1f}", f"{size['ratio_without_basis']:.0f}", lost, *figures(found)])
    head = ["k", "ratio, basis counted", "not counted", "update lost, mean / worst", *HEADER]
    n, pictures = len(styles(seen=True)), styles(seen=True)[0]["test"]["pictures"]
    return "\n\n".join(
        [
            table(head, rows),
            f"{n} styles, {pictures} pictures each. Bold: the largest k at which the pack has at most a sixth of the "
            f"bytes of the LoRAs ({packs()[0]['bytes']['lora'] / 1e6:.1f} MB in float32).",
            records.source_line("diffusion/recycled"),
        ]
    )


def bytes_table() -> str:
    """Packs whose bytes were chosen: errors of updates, and what is drawn."""
    rows = []
    for one in sorted(records.of("diffusion/ratios"), key=lambda one: -records.asked(one)["pack"]["ratio"]):
        asked, errors = records.asked(one)["pack"]["ratio"], list(one["delta_errors"].values())
        drawn = records.of("diffusion/bytes")
        found = [(row_of(style, "bytes", asked), row_of(style, "base")) for style in drawn]
        rows.append([f"{one['bytes']['ratio']:.1f}", f"{mean(errors):.3f} / {max(errors):.3f}", *figures(found)])
    head = ["ratio to 16 bits, all counted", "update lost, mean / worst", *HEADER]
    return f"{table(head, rows)}\n\n{records.source_line('diffusion/bytes')}"


def ways_table() -> str:
    """At one k: what else the same bytes would do."""
    k = sixth()
    known = [
        ("the LoRA itself", "original", None),
        (f"pack, k = {k}", "seen", k),
        ("each LoRA cut by SVD to the same bytes", "truncated", k),
        (f"random directions, k = {k}", "random", k),
        ("a LoRA of the same style, from another seed", "another seed", None),
        ("no adapter: the base", "base", None),
    ]
    rows = []
    for label, way, of in known:
        found = list(ways_of(way, of))
        if found:
            rows.append(
                [label, str(len(found)), f"{mean(one['delta_error'] for one, _ in found):.2f}", *figures(found)]
            )
    return table(["what draws", "styles", "update lost", *HEADER], rows)


def styles_table() -> str:
    """Every style at the k of a sixth of the bytes."""
    k, rows = sixth(), []
    for one in styles(seen=True):
        first, kept, base = row_of(one, "original"), row_of(one, "seen", k), row_of(one, "base")
        rows.append(
            [
                records.asked(one)["style"],
                f"{kept['delta_error']:.2f}",
                f"{kept['rmse']:.3f}",
                f"{base['rmse']:.3f}",
                f"{percent(first['class']['right'])} → {percent(kept['class']['right'])}",
                f"{percent(first['style']['right'])} → {percent(kept['style']['right'])}",
                percent(kept["style"]["same"]),
            ]
        )
    head = ["style", "update lost", "pixels, RMSE", "of the base", "class right", "style right", "same style"]
    return table(head, rows)


def left_out_table() -> str:
    """Styles that no basis has seen, projected."""
    rows = []
    for k in sorted(row["k"] for row in styles(seen=False)[0]["test"]["ways"] if row["k"]):
        found = list(ways_of("left out", k, seen=False))
        rows.append([str(k), f"{mean(one['delta_error'] for one, _ in found):.2f}", *figures(found)])
    for label, way in (("their LoRAs", "original"), ("the base", "base")):
        found = list(ways_of(way, None, seen=False))
        rows.append([label, f"{mean(one['delta_error'] for one, _ in found):.2f}", *figures(found)])
    names = ", ".join(records.asked(one)["style"] for one in styles(seen=False))
    return f"{table(['k', 'update lost', *HEADER], rows)}\n\nStyles: {names}."


def new_table(config: Json) -> str:
    """New styles, on coefficients alone and by LoRA."""
    names, rows = config["styles"]["left_out"], []
    found = {one["run_info"]["experiment_name"].rsplit("/", 1)[-1]: one for one in records.of("diffusion/targets")}
    k = config["pack"]["rival"]
    for name, label in (
        ("base", "no adapter"),
        ("lora", "LoRA r = 32"),
        ("core", f"coefficients alone: core, k = {k}"),
        ("random", "the same over random directions"),
    ):
        ours = [found[f"{name}--{style.replace(' ', '-')}"] for style in names]
        rows.append(
            [
                label,
                f"{ours[0]['train']['num_trainable']:,}",
                *(f"{one['test']['loss']:.4f}" for one in ours),
                percent(mean(one["test"]["class"]["right"] for one in ours)),
                percent(mean(one["test"]["style"]["right"] for one in ours)),
            ]
        )
    head = ["method", "trained numbers", *(f"loss, {style}" for style in names), "class right", "style right"]
    return f"{table(head, rows)}\n\n{records.source_line('diffusion/targets')}"


def rates_table(config: Json) -> str:
    """The losses that the rates were chosen by."""
    said = []
    for name, label in (("core", "coefficients alone"), ("random", "random directions")):
        losses = {
            records.asked(one)["recipe"]["learning_rate"]: one["test"]["loss"]
            for one in records.of("diffusion/rates")
            if one["run_info"]["experiment_name"].rsplit("/", 1)[-1].startswith(name)
        }
        each = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in sorted(losses.items()))
        said.append(f"{label}: {each}")
    return f"Loss on “{config['styles']['development']}”, by rate: {'; '.join(said)}."


def judges_table() -> str:
    """The networks that look at pictures, on real ones; and what the base draws."""
    drawn = records.of("diffusion/plain")[0]["test"]
    rows = []
    for one in records.of("diffusion/judges"):
        what, test = records.asked(one)["what"], one["test"]
        worst = min(test["by_style"], key=lambda name: test["by_style"][name])
        rows.append(
            [
                what,
                f"{test['rows']:,}",
                percent(test["accuracy"]),
                f"{percent(test['by_style'][worst])} ({worst})",
                percent(drawn[what]["right"]),
            ]
        )
    head = ["judge of", "held-out pictures", "right", "least of a style", f"of the base's {drawn['pictures']} drawings"]
    return table(head, rows)


def grid(config: Json, file: Path) -> None:
    """Pictures of every style, the original's above the recycled one's, at a sixth of the bytes. It needs the pictures
    that `bytes` left in work/."""
    import numpy as np
    from PIL import Image, ImageDraw

    from . import easel

    per_class = config["drawing"]["per_class"]
    classes = [0, 2, 3, 5, 7, 8, 10, 11, 12, 14, 16, 19]
    shown = [one * per_class for one in classes]
    names = [records.asked(one)["style"] for one in styles(seen=True)]
    side, gap, label = 28, 2, 78
    block = 2 * side + 3 * gap
    half = (len(names) + 1) // 2
    width = label + len(shown) * (side + gap) + 3 * gap
    sheet = Image.new("L", (2 * width, half * block), 128)
    pen = ImageDraw.Draw(sheet)
    for n, name in enumerate(names):
        drawn = easel.saved_pictures(f"{name.replace(' ', '-')}-bytes")
        left, top = (n // half) * width, (n % half) * block
        pen.text((left + 4, top + block // 2 - 6), name, fill=0)
        for row, way in enumerate(("original", f"ratio {LEAST}")):
            for column, one in enumerate(shown):
                picture = Image.fromarray(np.asarray(drawn[way][one]))
                sheet.paste(picture, (left + label + column * (side + gap), top + gap + row * (side + gap // 2)))
    sheet.save(file, lossless=True, quality=100)
