#!/usr/bin/env python3
"""Draws docs/concepts/codec.svg: how a fit for an error bound turns updates into integers, and measures the error."""

from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "codec.svg"
BASIS, COEFFICIENTS, ADAPTER, MEASURED, INK = "#3f51b5", "#e08a1e", "#7b8691", "#0b6e4f", "#333333"


def box(x: int, y: int, width: int, colour: str, title: str, *lines: str) -> str:
    """A filled rectangle with a title and smaller lines below it."""
    height = 34 + 18 * len(lines)
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{colour}"/>'
    middle = x + width // 2
    words = [text(middle, y + 22, title, "#ffffff", 14)]
    words += [text(middle, y + 42 + 18 * row, line, "#ffffff", 12) for row, line in enumerate(lines)]
    return shape + "".join(words)


def text(x: int, y: int, words: str, colour: str = INK, size: int = 13) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="middle" fill="{colour}">{words}</text>'


def arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="2" marker-end="url(#head)"/>'


def draw() -> str:
    parts = [
        box(10, 122, 164, ADAPTER, "Update", "singular components", "divided by the step size"),
        box(230, 20, 170, BASIS, "Bases", "shared by all adapters", "finer where used more"),
        box(230, 122, 170, COEFFICIENTS, "Coefficients", "of the adapter", "in the bases"),
        box(230, 224, 170, ADAPTER, "Residual", "outside the bases", "where worth its bits"),
        box(460, 122, 130, INK, "Integers", "rounding,", "entropy coder"),
        box(650, 122, 120, MEASURED, "Error", "decoded and", "measured"),
        arrow("M174 140L222 70"),
        arrow("M174 157H222"),
        arrow("M174 174L222 244"),
        arrow("M400 70L452 140"),
        arrow("M400 157H452"),
        arrow("M400 244L452 174"),
        arrow("M590 157H642"),
        arrow("M710 192V330H95V200"),
        text(402, 350, "search: the largest step size of each adapter whose measured error is within the bound"),
    ]
    drawn = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 790 365" font-family="sans-serif" role="img">\n'
        "<title>Updates become bases, coefficients and residuals, then integers; the error is measured</title>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="790" height="365" fill="#ffffff"/>\n{drawn}\n</svg>\n'
    )


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
