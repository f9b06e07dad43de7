"""Picture of the difference between two adapters: heat maps over layers and kinds of modules, as SVG or PNG."""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..core import atomic_files
from ..core.module_names import layer_and_kind
from ..core.update_changes import AdapterChange
from ..errors import MissingExtraError, OptionError, PackExistsError
from . import numbers
from .render.figures import module_labels

SUFFIXES = (".svg", ".png")
"""Suffixes of the files that can be written."""

_PANELS = {
    "change": "relative change ‖D′ − D‖ / ‖D‖",
    "down": "part with new input directions (lora_A)",
    "up": "part with new output directions (lora_B)",
}
"""Titles by field of `UpdateChange`."""
_MIN_SCALE_END = 0.01
"""Smallest end of a colour scale, so that negligible changes look negligible."""
_MAX_NUMBERED = 16
"""Maximum number of columns for which each field shows its number."""
_MAX_TICKS = 24
_PIXELS_PER_INCH = 100


def check(path: Path, *, overwrite: bool = False) -> None:
    """Raise an error unless a picture can be written to a path.

    Raises:
        OptionError: The suffix is not one of `SUFFIXES`, or the path is a folder.
        PackExistsError: The file exists, and `overwrite` is not set.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{path}: the suffix of a picture must be {' or '.join(SUFFIXES)}, such as change.svg.")
    if path.is_dir():
        raise OptionError(f"{path} is a folder. Pass a file in it: {path / 'change.svg'}.")
    if path.exists() and not overwrite:
        raise PackExistsError(f"{path} exists. Pass another path, or overwrite=True (--overwrite) to replace it.")
    if find_spec("matplotlib") is None:
        raise MissingExtraError("A picture needs matplotlib: pip install 'eigenlorax[report]'.")


def save(change: AdapterChange, path: str | Path, *, overwrite: bool = False) -> Path:
    """Draw the change of each module by layer and kind of module, and return the path.

    Args:
        change: Difference between two adapters.
        path: File whose suffix selects the format: .svg or .png.
        overwrite: Replace the file if it exists.

    Raises:
        OptionError: The suffix is unknown, the path is a folder, or the adapters have no modules.
        PackExistsError: The file exists, and `overwrite` is not set.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    check(path, overwrite=overwrite)
    if not change.modules:
        raise OptionError(f"{change.before!r} and {change.after!r} have no LoRA modules, so there is nothing to draw.")
    suffix = path.suffix.lower()
    with atomic_files.ensure_folder(path.parent):
        atomic_files.write_file(path, _draw(change, suffix.removeprefix(".")))
    return path


def _draw(change: AdapterChange, suffix: str) -> bytes:
    from matplotlib import style
    from matplotlib.figure import Figure

    places = {module: layer_and_kind(module) for module in change.modules}
    short = module_labels.labels(kind for _, kind in places.values())
    rows = list(dict.fromkeys(short[kind] for _, kind in places.values()))
    # modules outside the layers, such as a pooler, have a column of their own
    layers = sorted({layer for layer, _ in places.values()}, key=lambda layer: (layer is None, layer))
    columns = [numbers.MISSING if layer is None else str(layer) for layer in layers]
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "change",
        "text.parse_math": False,
        "font.size": 10,
        "axes.titlelocation": "left",
    }
    with style.context(["default", settings]):
        height = len(_PANELS) * (0.9 + 0.28 * len(rows)) + 0.4
        figure = Figure(figsize=(10, height), dpi=_PIXELS_PER_INCH, layout="constrained")
        figure.suptitle(f"{numbers.shortened(change.before, 60)} → {numbers.shortened(change.after, 60)}")
        for axis, (field, title) in zip(figure.subplots(len(_PANELS), 1), _PANELS.items(), strict=True):
            table = np.full((len(rows), len(columns)), np.nan)
            for module, (layer, kind) in places.items():
                share = getattr(change.modules[module], field)
                # two modules with one place, such as experts: the larger change
                position = rows.index(short[kind]), layers.index(layer)
                table[position] = np.nan if share is None else np.nanmax([table[position], share])
            _paint(figure, axis, table, f"{title}; all modules: {numbers.error(getattr(change.total, field))}")
            axis.set_yticks(range(len(rows)), [numbers.shortened(row, 32) for row in rows])
            step = max(1, -(-len(columns) // _MAX_TICKS))
            axis.set_xticks(range(0, len(columns), step), columns[::step])
        axis.set_xlabel("layer")
        file = io.BytesIO()
        # without the time of writing, equal changes give equal bytes
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(file, format=suffix, metadata=metadata)
    return file.getvalue()


def _paint(figure: Any, axis: Any, table: np.ndarray, title: str) -> None:
    """Draw one heat map, (kinds of modules, layers). NaN stays white."""
    top = max(float(np.nanmax(table, initial=0)), _MIN_SCALE_END)
    image = axis.imshow(table, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="none")
    axis.set_title(title)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if table.shape[1] <= _MAX_NUMBERED:
        for (row, column), share in np.ndenumerate(table):
            if np.isfinite(share):
                # the upper half of this colour map is bright
                colour = "black" if share > 0.5 * top else "white"
                axis.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03).outline.set_visible(False)
