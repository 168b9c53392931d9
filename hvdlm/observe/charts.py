"""Charts as SVG text: lines, stacked bars, steps over time. Standard library only; no script runs in the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

__all__ = ["COLOURS", "bars", "lines", "number"]

COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
"""Distinguishable on white and in print, also with the usual colour deficiencies."""

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 38


def number(value: float) -> str:
    """A number for an axis or a tile.

    >>> number(0.00123), number(12345.6), number(3.0), number(2.718)
    ('0.00123', '12,346', '3', '2.72')
    """
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span a range."""
    raw = (high - low) / count or 1.0
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if raw <= m * unit)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [round(k * step, 12) for k in range(first, last + 1)]


def lines(
    title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, x: str, y: str, zero: bool = False
) -> str:
    """A line chart.

    Args:
        title: For readers of the page and for screen readers.
        series: (name, points); points that are not finite are left out.
        x: What the horizontal axis is, with its unit.
        y: What the vertical axis is, with its unit.
        zero: Whether the vertical axis starts at 0.
    """
    clean = [
        (name, [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b)])
        for name, points in series
        if points
    ]
    every = [point for _, points in clean for point in points]
    if not every:
        return ""
    xs, ys = [a for a, _ in every], [b for _, b in every]
    across, up = _ticks(min(xs), max(xs)), _ticks(0.0 if zero else min(ys), max(ys))
    low_x, high_x, low_y, high_y = min(xs), max(xs), up[0], up[-1]
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(a: float, b: float) -> tuple[float, float]:
        u = (a - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        v = (b - low_y) / (high_y - low_y) if high_y > low_y else 0.5
        return _LEFT + u * width, _TOP + (1 - v) * height

    parts = []
    for tick in up:
        _, level = at(low_x, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in across:
        if low_x <= tick <= high_x:
            column, _ = at(tick, low_y)
            side = "end" if column > _WIDTH - 30 else "middle"
            parts.append(
                f'<text class="tick" x="{column:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="{side}">'
                f"{number(tick)}</text>"
            )
    for (name, points), colour in zip(clean, COLOURS * (1 + len(clean) // len(COLOURS)), strict=False):
        path = " ".join("{:.1f},{:.1f}".format(*at(a, b)) for a, b in points)
        shape = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>'
        if len(points) == 1:
            column, level = at(*points[0])
            shape = f'<circle cx="{column:.1f}" cy="{level:.1f}" r="4" fill="{colour}"/>'
        parts.append(f"<g><title>{html.escape(name)}</title>{shape}</g>")
    parts.append(
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{html.escape(x)}</text>'
    )
    return _figure(title, y, [name for name, _ in clean], "".join(parts), _HEIGHT)


def bars(title: str, names: Sequence[str], stacks: Sequence[tuple[str, Sequence[float]]], *, unit: str) -> str:
    """Stacked horizontal bars, one for each name.

    Args:
        title: For readers of the page and for screen readers.
        names: What each bar is.
        stacks: (name, one value for each bar) for each part of the bars.
        unit: Of the values.
    """
    if not names:
        return ""
    row = 26 if len(names) <= 24 else max(7, 560 // len(names))
    height = _TOP + row * len(names) + _BOTTOM
    longest = max(sum(values[i] for _, values in stacks) for i in range(len(names))) or 1.0
    ticks = _ticks(0.0, longest)
    scale = (_WIDTH - _LEFT - _RIGHT) / ticks[-1]
    parts = []
    for tick in ticks:
        column = _LEFT + tick * scale
        parts.append(f'<line class="grid" x1="{column:.1f}" x2="{column:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{column:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">'
            f"{number(tick)}</text>"
        )
    for i, name in enumerate(names):
        start, top = float(_LEFT), _TOP + i * row
        if row >= 14 or i % 4 == 0:
            parts.append(
                f'<text class="tick" x="{_LEFT - 8}" y="{top + row / 2 + 4:.1f}" text-anchor="end">'
                f"{html.escape(name)}</text>"
            )
        for (what, values), colour in zip(stacks, COLOURS, strict=False):
            width = values[i] * scale
            parts.append(
                f'<rect x="{start:.1f}" y="{top + row * 0.12:.1f}" width="{max(0.0, width):.1f}" '
                f'height="{row * 0.76:.1f}" fill="{colour}"><title>{html.escape(name)}, {html.escape(what)}: '
                f"{number(values[i])} {html.escape(unit)}</title></rect>"
            )
            start += width
    parts.append(
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{height - 4}" text-anchor="end">{html.escape(unit)}</text>'
    )
    return _figure(title, "", [name for name, _ in stacks], "".join(parts), height)


def _figure(title: str, y: str, names: Sequence[str], body: str, height: int) -> str:
    keys = ""
    if len(names) > 1:
        items = "".join(
            f'<span class="key"><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{html.escape(name)}</span>'
            for i, name in enumerate(names)
        )
        keys = f'<div class="keys">{items}</div>'
    unit = f" <small>{html.escape(y)}</small>" if y else ""
    return (
        f'<figure><figcaption>{html.escape(title)}{unit}</figcaption>{keys}<svg viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="{html.escape(title)}">{body}</svg></figure>'
    )
