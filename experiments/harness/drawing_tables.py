"""Tables of docs/images.md from the records of the experiment on pictures, and its grid of pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from . import records
from .drawing import slug
from .pages import table
from .records import Json, percent

RATIO = 6
"""Ratio of the packs in the grid. Of packs by k, that with the largest k of at least this ratio is shown in detail."""

DISTANCE_COLUMNS = [
    "pixels, RMSE",
    "÷ base's",
    "features ÷ base's",
    "class right",
    "style right",
    "**same style as the original**",
    "least of a style",
]


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the page, by their names."""
    return {
        "images-judges": judges_table,
        "images-packs": packs_table,
        "images-bytes": bytes_table,
        "images-ways": methods_table,
        "images-styles": styles_table,
        "images-left-out": left_out_table,
        "images-new": lambda: new_styles_table(config),
        "images-rates": lambda: rates_line(config),
    }


def packs() -> list[Json]:
    """Return the records of packs by k, ascending."""
    return sorted(records.of("diffusion/packs"), key=lambda record: records.config_of(record)["pack"]["k"])


def shown_k() -> int:
    return max(records.config_of(pack)["pack"]["k"] for pack in packs() if pack["bytes"]["ratio"] >= RATIO)


def style_records(*, seen: bool) -> list[Json]:
    """Return the records of the styles in the packs, in the order of the config, or of the others."""
    chosen = [record for record in records.of("diffusion/recycled") if records.config_of(record)["seen"] is seen]
    sources = records.config_of(chosen[0])["sources"]
    return sorted(chosen, key=lambda record: sources.index(records.config_of(record)["name"])) if seen else chosen


def rows_by_way(record: Json) -> dict[tuple[str, int | None], Json]:
    return {(row["way"], row["k"]): row for row in record["test"]["ways"]}


def update_error(rows: Sequence[Json]) -> str:
    return f"{mean(row['delta_error'] for row in rows):.2f}"


def rows_of(method: str, k: int | None, style_runs: Sequence[Json]) -> tuple[list[Json], list[str]]:
    """Return the rows of one way to store an adapter, for each style that has it, and the cells of their means.

    Distances are to the original's pictures, and relative ones are divided by the distance of the base model's.
    """
    by_style = [rows_by_way(record) for record in style_runs]
    pairs = [(rows[method, k], rows["base", None]) for rows in by_style if (method, k) in rows]
    cells = [
        f"{mean(row['rmse'] for row, _ in pairs):.3f}",
        f"{mean(row['rmse'] / base['rmse'] for row, base in pairs):.2f}",
        f"{mean(row['class']['features'] / base['class']['features'] for row, base in pairs):.2f}",
        percent(mean(row["class"]["right"] for row, _ in pairs)),
        percent(mean(row["style"]["right"] for row, _ in pairs)),
        percent(mean(row["style"]["same"] for row, _ in pairs)),
        percent(min(row["style"]["same"] for row, _ in pairs)),
    ]
    return [row for row, _ in pairs], cells


def packs_table() -> str:
    """Write bytes, errors of updates and distances of pictures for each k."""
    rows, runs = [], style_records(seen=True)
    for pack in packs():
        k, size, errors = records.config_of(pack)["pack"]["k"], pack["bytes"], list(pack["delta_errors"].values())
        name = f"**{k}**" if k == shown_k() else str(k)
        ratios = [f"{size['ratio']:.1f}", f"{size['ratio_without_basis']:.0f}"]
        rows.append([name, *ratios, f"{mean(errors):.2f} / {max(errors):.2f}", *rows_of("seen", k, runs)[1]])
    header = ["k", "ratio, basis counted", "not counted", "update lost, mean / worst", *DISTANCE_COLUMNS]
    note = (
        f"{len(runs)} styles, {runs[0]['test']['pictures']} pictures each. Bold: the largest k at which the pack has "
        f"at most a sixth of the bytes of the LoRAs ({packs()[0]['bytes']['lora'] / 1e6:.1f} MB in float32)."
    )
    return "\n\n".join([table(header, rows), note, records.source_line("diffusion/recycled")])


def bytes_table() -> str:
    """Write errors of updates and distances of pictures for each ratio."""
    rows = []
    for pack in sorted(records.of("diffusion/ratios"), key=lambda record: -records.config_of(record)["pack"]["ratio"]):
        ratio, errors = records.config_of(pack)["pack"]["ratio"], list(pack["delta_errors"].values())
        cells = rows_of("bytes", ratio, records.of("diffusion/bytes"))[1]
        rows.append([f"{pack['bytes']['ratio']:.1f}", f"{mean(errors):.3f} / {max(errors):.3f}", *cells])
    header = ["ratio to 16 bits, all counted", "update lost, mean / worst", *DISTANCE_COLUMNS]
    return f"{table(header, rows)}\n\n{records.source_line('diffusion/bytes')}"


def methods_table() -> str:
    """Write what other methods do with the bytes of one pack."""
    k, rows = shown_k(), []
    for label, method, method_k in (
        ("the LoRA itself", "original", None),
        (f"pack, k = {k}", "seen", k),
        ("each LoRA cut by SVD to the same bytes", "truncated", k),
        (f"random directions, k = {k}", "random", k),
        ("a LoRA of the same style, from another seed", "another seed", None),
        ("no adapter: the base", "base", None),
    ):
        drawn, cells = rows_of(method, method_k, style_records(seen=True))
        rows.append([label, str(len(drawn)), update_error(drawn), *cells])
    return table(["what draws", "styles", "update lost", *DISTANCE_COLUMNS], rows)


def styles_table() -> str:
    """Write the figures of each style in one pack."""
    rows = []
    for record in style_records(seen=True):
        by_way = rows_by_way(record)
        original, packed, base = by_way["original", None], by_way["seen", shown_k()], by_way["base", None]
        rows.append(
            [
                records.config_of(record)["style"],
                update_error([packed]),
                f"{packed['rmse']:.3f}",
                f"{base['rmse']:.3f}",
                f"{percent(original['class']['right'])} → {percent(packed['class']['right'])}",
                f"{percent(original['style']['right'])} → {percent(packed['style']['right'])}",
                percent(packed["style"]["same"]),
            ]
        )
    header = ["style", "update lost", "pixels, RMSE", "of the base", "class right", "style right", "same style"]
    return table(header, rows)


def left_out_table() -> str:
    """Write the figures of styles that no pack has, projected."""
    rows, runs = [], style_records(seen=False)
    projected = [(str(k), "left out", k) for method, k in rows_by_way(runs[0]) if method == "left out"]
    for label, method, k in [*projected, ("their LoRAs", "original", None), ("the base", "base", None)]:
        drawn, cells = rows_of(method, k, runs)
        rows.append([label, update_error(drawn), *cells])
    names = ", ".join(records.config_of(record)["style"] for record in runs)
    return f"{table(['k', 'update lost', *DISTANCE_COLUMNS], rows)}\n\nStyles: {names}."


def run_name(record: Json) -> str:
    return record["run_info"]["experiment_name"].rpartition("/")[2]


def new_styles_table(config: Json) -> str:
    """Write the losses of new styles by coefficients and by LoRA."""
    styles, rows = config["styles"]["left_out"], []
    by_name = {run_name(record): record for record in records.of("diffusion/targets")}
    for method, label in (
        ("base", "no adapter"),
        ("lora", "LoRA r = 32"),
        ("core", f"coefficients alone: core, k = {config['pack']['rival']}"),
        ("random", "the same over random directions"),
    ):
        runs = [by_name[f"{method}--{slug(style)}"] for style in styles]
        losses = [f"{run['test']['loss']:.4f}" for run in runs]
        right = [percent(mean(run["test"][kind]["right"] for run in runs)) for kind in ("class", "style")]
        rows.append([label, f"{runs[0]['train']['num_trainable']:,}", *losses, *right])
    header = ["method", "trained numbers", *(f"loss, {style}" for style in styles), "class right", "style right"]
    return f"{table(header, rows)}\n\n{records.source_line('diffusion/targets')}"


def rates_line(config: Json) -> str:
    """Write the losses that the learning rates were chosen by."""
    phrases = []
    for method, label in (("core", "coefficients alone"), ("random", "random directions")):
        losses = {
            records.config_of(record)["recipe"]["learning_rate"]: record["test"]["loss"]
            for record in records.of("diffusion/rates")
            if run_name(record).startswith(method)
        }
        phrases.append(f"{label}: " + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in sorted(losses.items())))
    return f"Loss on “{config['styles']['development']}”, by rate: {'; '.join(phrases)}."


def judges_table() -> str:
    """Write the accuracy of the judges on held-out pictures and on the base model's drawings."""
    drawn, rows = records.of("diffusion/plain")[0]["test"], []
    for record in records.of("diffusion/judges"):
        kind, test = records.config_of(record)["what"], record["test"]
        worst = min(test["by_style"], key=lambda name: test["by_style"][name])
        least = f"{percent(test['by_style'][worst])} ({worst})"
        rows.append([kind, f"{test['rows']:,}", percent(test["accuracy"]), least, percent(drawn[kind]["right"])])
    drawings = f"of the base's {drawn['pictures']} drawings"
    return table(["judge of", "held-out pictures", "right", "least of a style", drawings], rows)


def grid(config: Json, file: Path) -> None:
    """Arrange pictures of every style, the original's above those of the packs of `RATIO`. Needs the stage `bytes`."""
    import numpy as np
    from PIL import Image, ImageDraw
    from safetensors.torch import load_file

    from .sampler import pictures_file

    classes = [0, 2, 3, 5, 7, 8, 10, 11, 12, 14, 16, 19]
    styles = [records.config_of(record)["style"] for record in style_records(seen=True)]
    side, gap, label_width = 28, 2, 78
    block_height = 2 * side + 3 * gap
    styles_per_column = (len(styles) + 1) // 2
    column_width = label_width + len(classes) * (side + gap) + 3 * gap
    sheet = Image.new("L", (2 * column_width, styles_per_column * block_height), 128)
    pen = ImageDraw.Draw(sheet)
    for n, style in enumerate(styles):
        drawn = load_file(pictures_file(f"{slug(style)}-bytes"))
        left, top = n // styles_per_column * column_width, n % styles_per_column * block_height
        pen.text((left + 4, top + block_height // 2 - 6), style, fill=0)
        for row, method in enumerate(("original", f"bytes {RATIO}")):
            for column, label in enumerate(classes):
                picture = Image.fromarray(np.asarray(drawn[method][label * config["drawing"]["per_class"]]))
                x = left + label_width + column * (side + gap)
                sheet.paste(picture, (x, top + gap + row * (side + gap // 2)))
    sheet.save(file, lossless=True, quality=100)
