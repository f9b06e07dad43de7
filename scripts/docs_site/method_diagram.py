#!/usr/bin/env python3
"""Draws docs/concepts/method.svg: adapters of one module become a pair of bases, and coefficients of each adapter."""

from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "method.svg"
BASIS, COEFFICIENTS, ADAPTER, INK = "#3f51b5", "#e08a1e", "#9aa3ad", "#333333"


def rectangle(x: int, y: int, width: int, height: int, colour: str, label: str = "") -> str:
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{colour}"/>'
    return shape + (text(x + width // 2, y + height // 2 + 4, label, "#ffffff") if label else "")


def text(x: int, y: int, words: str, colour: str = INK, size: int = 13) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="middle" fill="{colour}">{words}</text>'


def adapter(y: int, name: str) -> str:
    """One adapter: `up` is a column, `down` a row."""
    return (
        text(40, y + 40, name) + rectangle(80, y, 24, 80, ADAPTER, "B") + rectangle(112, y + 28, 100, 24, ADAPTER, "A")
    )


def encoded(y: int, name: str) -> str:
    """The coefficients of one adapter."""
    two = rectangle(610, y + 22, 24, 36, COEFFICIENTS, "C") + rectangle(642, y + 28, 36, 24, COEFFICIENTS, "C")
    return two + text(718, y + 44, name)


def arrow(x: int, y: int, words: str) -> str:
    line = f'<path d="M{x} {y}h56m-8 -6l8 6l-8 6" fill="none" stroke="{INK}" stroke-width="2"/>'
    return line + text(x + 28, y - 12, words)


def draw() -> str:
    rows = [(60, "adapter 1"), (160, "adapter 2"), (260, "adapter 3")]
    parts = [
        text(140, 30, "LoRA adapters of one module", size=15),
        text(410, 30, "Two bases, stored once", size=15),
        text(665, 30, "Coefficients of each adapter", size=15),
        *(adapter(y, name) for y, name in rows),
        arrow(232, 200, "fit"),
        rectangle(320, 120, 60, 160, BASIS, "Uᵀ"),
        rectangle(400, 170, 130, 60, BASIS, "V"),
        text(350, 300, "out × k"),
        text(465, 250, "k × in"),
        arrow(545, 200, "project"),
        *(encoded(y, name) for y, name in rows),
        text(380, 370, "stored update of an adapter = scaling · Uᵀ · C of B · C of A · V", size=15),
    ]
    drawn = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 390" font-family="sans-serif" role="img">\n'
        "<title>Adapters become two shared bases and small coefficients of each adapter</title>\n"
        f'<rect width="770" height="390" fill="#ffffff"/>\n{drawn}\n</svg>\n'
    )


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
