"""Charts as SVG, without a library: lines over steps, and heat maps of layers over steps.

Colours are those of the page's style sheet (`--series-N`, `--soft`, `--grid`): one picture serves light and dark.
"""

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from html import escape

#: A label, steps, and values at them.
Series = tuple[str, Sequence[int], Sequence[float]]

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 34
#: Largest height of a heat map, and of one of its rows.
MAP_HEIGHT, ROW_HEIGHT = 480, 14
#: From none to all: dark blue, violet, red, orange, pale yellow. Read on white as on black.
RAMP = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))


def lines(series: Sequence[Series], unit: str, *, log: bool = False) -> str:
    """Lines over steps, with the newest value of each in the legend. `log`: a logarithmic axis, of values above 0."""
    kept = [(label, *_finite(steps, values, log)) for label, steps, values in series]
    kept = [(label, steps, values) for label, steps, values in kept if steps]
    if not kept:
        return '<p class="none">nothing yet</p>'
    everything = [value for _, _, values in kept for value in values]
    axis = _Axis(min(everything), max(everything), log)
    first, last = min(steps[0] for _, steps, _ in kept), max(steps[-1] for _, steps, _ in kept)
    across = _across(first, last)
    parts = [_grid(axis, first, last, HEIGHT)]
    legend = []
    for i, (label, steps, values) in enumerate(kept):
        colour = f"var(--series-{i % 4})"
        points = " ".join(f"{across(s):.1f},{axis.at(v):.1f}" for s, v in zip(steps, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        dots = steps if len(steps) <= 60 else steps[-1:]
        for s, v in zip(dots, values[-len(dots) :], strict=True):
            tip = f"<title>{escape(label)}, step {s}: {number(v)}</title>"
            parts.append(f'<circle cx="{across(s):.1f}" cy="{axis.at(v):.1f}" r="2.2" fill="{colour}">{tip}</circle>')
        legend.append(f'<span><i style="background:{colour}"></i>{escape(label)} <b>{number(values[-1])}</b></span>')
    return f'<p class="legend">{"".join(legend)}<em>{escape(unit)}</em></p>{_svg(HEIGHT, parts)}'


def heat_map(rows: Sequence[str], steps: Sequence[int], values: Sequence[Sequence[float]], *, log: bool = False) -> str:
    """A colour for each row and step; the names of the rows, with their newest values, show under the pointer.

    values: [rows][steps], NaN where nothing was measured. `log`: colours by the logarithm.
    """
    known = [v for row in values for v in row if math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return '<p class="none">nothing yet</p>'
    low, high = min(known), max(known)
    scale: Callable[[float], float] = math.log if log else float
    span = scale(high) - scale(low)

    def shade(v: float) -> tuple[int, ...]:
        if not math.isfinite(v):
            return (128, 128, 128, 60)
        share = 0.0 if span == 0 or (log and v <= low) else (scale(v) - scale(low)) / span
        return (*_ramp(share), 255)

    height = min(MAP_HEIGHT, ROW_HEIGHT * len(rows))
    picture = _png([[shade(v) for v in row] for row in values])
    inner = WIDTH - LEFT - RIGHT
    parts = [
        f'<image x="{LEFT}" y="{TOP}" width="{inner}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{picture}"/>'
    ]
    each = height / len(rows)
    stride = max(1, math.ceil(11 / each))
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        newest = next((v for v in reversed(row) if math.isfinite(v)), math.nan)
        tip = f"<title>{escape(name)}: {number(newest)} at the end</title>"
        parts.append(
            f'<rect x="0" y="{TOP + i * each:.2f}" width="{WIDTH}" height="{each:.2f}" fill="transparent">{tip}</rect>'
        )
        if i % stride == 0:
            parts.append(_text(LEFT - 4, TOP + (i + 0.5) * each + 3.5, _short(name), "end"))
    total = TOP + height + BOTTOM
    # A column is as wide as the others, so steps stand in its middle.
    half = inner / len(steps) / 2
    for at, step in ((LEFT + half, steps[0]), (LEFT + inner - half, steps[-1])):
        parts.append(_text(at, TOP + height + 14, f"{step}"))
    parts.append(_text(LEFT + inner / 2, TOP + height + 28, "step"))
    swatch = f"background:linear-gradient(90deg,{','.join('rgb' + str(c) for c in RAMP)})"
    legend = f'<span>{number(low)} <i class="ramp" style="{swatch}"></i> {number(high)}</span>'
    return f'<p class="legend">{legend}</p>{_svg(total, parts)}'


def number(value: float) -> str:
    """A number in few characters."""
    if not math.isfinite(value):
        return "none"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.2e}"


class _Axis:
    """The vertical axis: where a value is drawn, and round values to write at it."""

    def __init__(self, low: float, high: float, log: bool) -> None:
        self.log = log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        margin = 0.05 * (self.high - self.low) or (0.1 if log else abs(low) * 0.05 or 1.0)
        self.low, self.high = self.low - margin, self.high + margin

    def at(self, value: float) -> float:
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        if self.log and self.high - self.low >= 1:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            return [10.0**p for p in powers][:: max(1, len(powers) // 6)]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        step = _round((high - low) / 4)
        first = math.ceil(low / step)
        return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _round(step: float) -> float:
    """The 1, 2 or 5 times a power of ten nearest above."""
    power = 10 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def _finite(steps: Sequence[int], values: Sequence[float], log: bool) -> tuple[list[int], list[float]]:
    kept = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v) and (v > 0 or not log)]
    return [s for s, _ in kept], [v for _, v in kept]


def _across(first: int, last: int) -> Callable[[float], float]:
    span = max(last - first, 1)
    return lambda step: LEFT + (step - first) / span * (WIDTH - LEFT - RIGHT)


def _grid(axis: _Axis, first: int, last: int, height: int) -> str:
    parts = []
    for value in axis.ticks():
        y = axis.at(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>')
        parts.append(_text(LEFT - 6, y + 4, number(value), "end"))
    across = _across(first, last)
    step = max(1, round(_round(max(last - first, 1) / 6)))
    for s in range(math.ceil(first / step) * step, last + 1, step):
        parts.append(_text(across(s), height - BOTTOM + 16, str(s)))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 4, "step"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _short(name: str) -> str:
    """ "layers.3.self_attn.q_proj" as "3 q"."""
    parts = name.split(".")
    layer = next((part for part in parts if part.isdigit()), "")
    return f"{layer} {parts[-1].removesuffix('_proj')}"[:10].strip()


def _ramp(share: float) -> tuple[int, int, int]:
    at = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(at), len(RAMP) - 2)
    r, g, b = (round(a + (b - a) * (at - i)) for a, b in zip(RAMP[i], RAMP[i + 1], strict=True))
    return r, g, b


def _png(pixels: Sequence[Sequence[tuple[int, ...]]]) -> str:
    """RGBA pixels as a PNG in base64 (W3C PNG, section 11.2)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 6, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(v for pixel in row for v in pixel) for row in pixels)
    parts = (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return base64.b64encode(b"".join(parts)).decode()
