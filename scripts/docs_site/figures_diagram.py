#!/usr/bin/env python3
"""Draws docs/concepts/figures.svg: which bytes of the sources and of the pack each compression ratio counts."""

from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "figures.svg"
BASIS, COEFFICIENTS, ADAPTER, HEADS, INK = "#3f51b5", "#b35c00", "#5d6770", "#0b6e4f", "#333333"
SOURCES = [("LoRA", 380, ADAPTER), ("heads", 110, HEADS)]
PACK = [("basis", 150, BASIS), ("coefficients", 110, COEFFICIENTS), ("carried", 80, ADAPTER), ("heads", 110, HEADS)]
LEFT, GAP = 150, 4
SOURCES_Y, PACK_Y, BAR = 20, 180, 40


def bar(y: int, name: str, parts: list[tuple[str, int, str]]) -> str:
    """Rectangles side by side, with the name of the bar before them."""
    drawn, x = [text(LEFT - 12, y + 25, name, anchor="end")], LEFT
    for label, width, colour in parts:
        drawn.append(f'<rect x="{x}" y="{y}" width="{width}" height="{BAR}" rx="3" fill="{colour}"/>')
        drawn.append(text(x + width // 2, y + 25, label, "#ffffff"))
        x += width + GAP
    return "".join(drawn)


def bracket(y: int, first: int, count: int, parts: list[tuple[str, int, str]]) -> str:
    """A bracket below consecutive parts of a bar."""
    start = LEFT + sum(width + GAP for _, width, _ in parts[:first])
    end = start + sum(width + GAP for _, width, _ in parts[first : first + count]) - GAP
    return f'<path d="M{start} {y}V{y + 7}H{end}V{y}" fill="none" stroke="{INK}" stroke-width="1.5"/>'


def text(x: int, y: int, words: str, colour: str = INK, size: int = 13, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def ratio(row: int, name: str, sources: tuple[int, int], pack: tuple[int, int]) -> str:
    """Brackets below the sources and below the pack, in a row of their own, with the name of the ratio before each."""
    drawn = []
    for bar_y, part, parts in ((SOURCES_Y, sources, SOURCES), (PACK_Y, pack, PACK)):
        y = bar_y + BAR + 16 + 26 * row
        drawn += [bracket(y, *part, parts), text(LEFT - 12, y + 8, name, INK, 12, "end")]
    return "".join(drawn)


def draw() -> str:
    parts = [
        bar(SOURCES_Y, "sources, bytes", SOURCES),
        bar(PACK_Y, "pack, bytes", PACK),
        ratio(0, "ratio", (0, 1), (0, 3)),
        ratio(1, "ratio_with_heads", (0, 2), (0, 4)),
        ratio(2, "ratio_without_basis", (0, 1), (1, 2)),
        text(400, 330, "Each ratio: the bytes marked in the sources ÷ the bytes marked in the pack."),
    ]
    drawn = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 345" font-family="sans-serif" role="img">\n'
        "<title>ratio: LoRA by basis, coefficients and carried tensors; ratio_with_heads: with heads on both sides; "
        "ratio_without_basis: without the basis</title>\n"
        f'<rect width="680" height="345" fill="#ffffff"/>\n{drawn}\n</svg>\n'
    )


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
