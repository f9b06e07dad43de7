"""Figures as inline SVG, drawn by matplotlib and coloured by CSS variables, for light and dark themes.

Matplotlib draws placeholder colours, which are replaced by variables `--ink-…`. Text is not converted to paths, so it
has the font of the page. Equal figures give equal bytes.
"""

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ....errors import MissingExtraError

WIDE, HALF = 1000, 492
"""Width of a figure in pixels: as wide as the page, and for two figures side by side."""

SERIES = 8
"""Number of distinguishable colours, `series(0)` to `series(SERIES - 1)`."""

_NAMES = ("text", "muted", "grid", "card", "accent", "bad", *(f"series-{n}" for n in range(SERIES)))
_PLACEHOLDERS = {name: f"#0a0b{number:02x}" for number, name in enumerate(_NAMES, start=1)}

SEQUENTIAL = ("#27306b", "#2f6f9f", "#35a59b", "#8fd07a", "#f3e055")
"""Colours from small to large values, which are readable on white and on black."""

DIVERGING = ("#123f8c", "#4d84c9", "#b9bdc5", "#dd8d45", "#9c3f06")
"""Colours from −1 over 0 to 1: blue, grey, orange, which are distinguishable for colour-blind readers."""


def ink(name: str) -> str:
    """Return the placeholder of the CSS variable `--ink-{name}`."""
    return _PLACEHOLDERS[name]


def series(number: int) -> str:
    """Return the colour of the n-th series; colours repeat after `SERIES`."""
    return _PLACEHOLDERS[f"series-{number % SERIES}"]


def colour_map(stops: Sequence[str], steps: int = 256) -> Any:
    """Return matplotlib's colour map through these colours. To be called in `paint`."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("stops", stops, N=steps)


def draw(name: str, size: tuple[int, int], label: str, paint: Callable[[Any], None]) -> str:
    """Draw a figure as an `<svg>` element.

    Args:
        name: Name that is unique in the page. Ids begin with it.
        size: Width and height in CSS pixels.
        label: Description for screen readers.
        paint: Function that draws on a matplotlib `Figure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "The HTML report has figures, which need matplotlib: pip install 'eigenlorax[report]'. Reports in Markdown "
            "and JSON have no figures."
        ) from error

    with style.context(["default", _style(name)]), warnings.catch_warnings():
        # matplotlib's font lacks some scripts, but only measures the text: the browser draws it with its own fonts
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained", facecolor="none")
        canvas = FigureCanvasSVG(figure)
        paint(figure)
        for axis in figure.axes:
            axis.set_facecolor("none")
        # `savefig` would draw the figure once more, to lay it out
        layout, image_dpi = figure.get_layout_engine(), figure.dpi
        assert layout is not None
        layout.execute(figure)
        figure.set_layout_engine("none")
        # the layout has set the resolution of SVG, which heat maps would have then
        figure.set_dpi(image_dpi)
        file = io.StringIO()
        canvas.print_svg(file)
    return _inline(file.getvalue(), name, size, label)


def titled(svg: str, gid: str, titles: Sequence[str]) -> str:
    """Add a tooltip to each mark of the group that was drawn with this gid."""
    start = svg.index(f'<g id="{gid}">')
    end = svg.index("</g></g>" if "<use" in svg[start : svg.index("</g>", start)] else "</g>", start)
    queue = iter(titles)
    definitions, marks = "", svg[start:end]
    if "<defs>" in marks:
        cut = marks.index("</defs>") + len("</defs>")
        definitions, marks = marks[:cut], marks[cut:]
    marked = re.sub(
        r"<(path|use)\b([^>]*)/>",
        lambda mark: f"<{mark[1]}{mark[2]}><title>{html.escape(next(queue))}</title></{mark[1]}>",
        marks,
    )
    return svg[:start] + definitions + marked + svg[end:]


def _style(name: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        # a `$` in a name must not begin a formula
        "text.parse_math": False,
        "font.size": 12,
        "axes.titlesize": 12.5,
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 12,
        "legend.fontsize": 12,
        "legend.frameon": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": ink("text"),
        "axes.titlecolor": ink("text"),
        "axes.labelcolor": ink("muted"),
        "axes.edgecolor": ink("grid"),
        "xtick.color": ink("grid"),
        "ytick.color": ink("grid"),
        "xtick.labelcolor": ink("muted"),
        "ytick.labelcolor": ink("muted"),
        "grid.color": ink("grid"),
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.8,
    }


def _inline(svg: str, name: str, size: tuple[int, int], label: str) -> str:
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    # the style element would apply to the whole page
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r' (d|x|y)="([^"]*)"', lambda match: f' {match[1]}="{_rounded(match[2])}"', body)
    body = re.sub(r'style="[^"]*"', lambda match: _themed(match[0]), body)
    body = body.replace("xlink:href=", "href=").replace("data:image/png;base64,\n", "data:image/png;base64,")
    body = _unique_ids(body, name)
    # whitespace between elements is not drawn; whitespace in a text may be
    body = re.sub(r">\s+<", "><", body)
    width, height = size
    return (
        f'<svg class="plot" role="img" aria-label="{html.escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">{body.strip()}</svg>'
    )


def _rounded(numbers: str) -> str:
    """Round coordinates to hundredths of a pixel, so that the page is smaller."""
    shorter = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), numbers)
    return " ".join(shorter.split())


def _themed(style: str) -> str:
    style = re.sub(r"font-family:[^;]*;? ?", "", style)
    for name, placeholder in _PLACEHOLDERS.items():
        style = style.replace(placeholder, f"var(--ink-{name})")
    return style


def _unique_ids(body: str, name: str) -> str:
    """Prefix ids with the figure's name, and remove unreferenced ids, except gids that begin with the name."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))

    def renamed(match: re.Match[str]) -> str:
        if match[1] in used:
            return f' id="{name}-{match[1]}"'
        return match[0] if match[1].startswith(f"{name}-") else ""

    body = re.sub(r' id="([^"]*)"', renamed, body)
    return re.sub(r'(url\(#|href="#)', rf"\1{name}-", body)
