"""A picture of a run, as SVG without any library: the load and the first tokens over time, and how latencies spread."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from .config import BenchConfig
from .summary import per_token, ttft
from .target import Record

WIDTH, HEIGHT = 960, 860
LEFT, RIGHT = 76, 28
PANELS = ((64, 200), (328, 200), (592, 200))  # top and height of each
INK, FAINT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
BLUE, ORANGE, TEAL, RED = "#2563eb", "#ea580c", "#0d9488", "#dc2626"
BUCKETS = 120  # of time
DOTS, POINTS = 4000, 400  # more than the picture's pixels can show

Scale = Callable[[float], float]


def write_plot(path: Path, records: Sequence[Record], config: BenchConfig, title: str) -> None:
    """Writes the picture to an `.svg` file."""
    path.write_text(draw(records, config, title), encoding="utf-8")


def draw(records: Sequence[Record], config: BenchConfig, title: str) -> str:
    """The SVG text: tokens a second and requests under way; the first token of each request; distributions."""
    seconds = max((record.done for record in records), default=0.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 28, title, "start", 13, INK),
        *_load(records, seconds),
        *_first_tokens(records, seconds, config),
        *_distributions(records, config),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _load(records: Sequence[Record], seconds: float) -> list[str]:
    width = seconds / BUCKETS
    tokens, running = [0.0] * BUCKETS, [0.0] * BUCKETS
    for record in records:
        _spread(running, record.sent, record.done, (record.done - record.sent) / width, width)
        if record.first is not None and record.last is not None:
            _spread(tokens, record.first, record.last, record.output_tokens / width, width)
    x = _linear(0, seconds, LEFT, WIDTH - RIGHT)
    top, height = PANELS[0]
    parts = _legend(top, [("tokens a second (left)", BLUE), ("requests under way (right)", ORANGE)])
    parts += _time_axis(x, seconds, top + height)
    for values, color, side in ((tokens, BLUE, "left"), (running, ORANGE, "right")):
        marks = _round_marks(max(values))
        y = _linear(0, marks[-1], top + height, top)
        for mark in marks:
            if side == "left":
                parts.append(_across(y(mark)))
                parts.append(_text(LEFT - 8, y(mark) + 4.5, f"{mark:g}", "end"))
            else:
                parts.append(_text(WIDTH - RIGHT + 4, y(mark) + 4.5, f"{mark:g}", "start", 11))
        parts.append(_line([(x((i + 0.5) * width), y(value)) for i, value in enumerate(values)], color))
    return parts


def _first_tokens(records: Sequence[Record], seconds: float, config: BenchConfig) -> list[str]:
    top, height = PANELS[1]
    came = [(record, wait * 1e3) for record in records if record.error is None and (wait := ttft(record)) is not None]
    failed = [record for record in records if record.error is not None]
    x, (y, marks) = _linear(0, seconds, LEFT, WIDTH - RIGHT), _decades([wait for _, wait in came], top + height, top)
    parts = _legend(top, [("first token, ms after the request was due", TEAL)] + [("failed", RED)] * bool(failed))
    parts += _time_axis(x, seconds, top + height, "seconds")
    for mark in marks:
        parts += [_across(y(mark)), _text(LEFT - 8, y(mark) + 4.5, f"{mark:g}", "end")]
    if marks[0] <= config.max_ttft_ms <= marks[-1]:
        parts.append(_across(y(config.max_ttft_ms), RED, "6 5"))
    stride = max(1, len(came) // DOTS)
    for record, wait in came[::stride]:
        parts.append(f'<circle cx="{x(record.due):.1f}" cy="{y(max(wait, marks[0])):.1f}" r="2" fill="{TEAL}"/>')
    for record in failed[:: max(1, len(failed) // DOTS)]:
        parts.append(f'<path d="M{x(record.due):.1f} {top}v8" stroke="{RED}"/>')
    return parts


def _distributions(records: Sequence[Record], config: BenchConfig) -> list[str]:
    top, height = PANELS[2]
    done = [record for record in records if record.error is None]
    curves = {
        "first token": (TEAL, [value * 1e3 for record in done if (value := ttft(record)) is not None]),
        "between pieces of text": (BLUE, [gap * 1e3 for record in done for gap in record.gaps]),
        "a token after the first": (INK, [value * 1e3 for record in done if (value := per_token(record)) is not None]),
        "last token": (ORANGE, [(r.last - r.due) * 1e3 for r in done if r.last is not None]),
    }
    x, marks = _decades([value for _, values in curves.values() for value in values], LEFT, WIDTH - RIGHT)
    y = _linear(0, 100, top + height, top)
    parts = _legend(top, [(name, color) for name, (color, values) in curves.items() if values])
    for mark in (0, 25, 50, 75, 100):
        parts += [_across(y(mark)), _text(LEFT - 8, y(mark) + 4.5, f"{mark}%", "end")]
    for mark in marks:
        parts.append(f'<path d="M{x(mark):.1f} {top}v{height + 5}" stroke="{GRID}"/>')
        parts.append(_text(x(mark), top + height + 21, f"{mark:g}"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, top + height + 42, "milliseconds"))
    for color, values in curves.values():
        if values:
            values = sorted(values)
            count, stride = len(values), max(1, len(values) // POINTS)
            kept = [*range(0, count, stride), count - 1]
            points = [(x(max(values[i], marks[0])), y(100 * (i + 1) / count)) for i in kept]
            parts.append(_line(points, color))
    return parts


def _spread(buckets: list[float], begin: float, end: float, amount: float, width: float) -> None:
    """Adds `amount` evenly over the buckets from `begin` to `end`."""
    last = len(buckets) - 1
    low, high = min(max(begin / width, 0), last), min(max(end / width, 0), last + 1)
    if high - low < 1e-9:
        buckets[int(low)] += amount
        return
    for i in range(int(low), min(int(high), last) + 1):
        buckets[i] += amount * max(min(i + 1, high) - max(i, low), 0) / (high - low)


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _decades(values: Sequence[float], start: float, end: float) -> tuple[Scale, list[float]]:
    """A logarithmic scale over the values, and its marks 1, 10, 100, ...; values below 0.1 are drawn there."""
    low = math.floor(math.log10(max(min(values, default=1), 0.1)))
    high = max(math.ceil(math.log10(max(*values, 0.1)) if values else 3), low + 1)
    scale = _linear(low, high, start, end)
    return lambda value: scale(math.log10(max(value, 1e-9))), [10.0**power for power in range(low, high + 1)]


def _round_marks(most: float) -> list[float]:
    """About five round numbers from 0 to `most` or above."""
    raw = max(most, 1e-9) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    return [round(i * step, 10) for i in range(math.ceil(max(most, 1e-9) / step - 1e-9) + 1)]


def _time_axis(x: Scale, seconds: float, bottom: float, name: str = "") -> list[str]:
    parts = [_across(bottom, FAINT)]
    for mark in _round_marks(seconds):
        if mark <= seconds * 1.001:
            parts.append(f'<path d="M{x(mark):.1f} {bottom}v5" stroke="{FAINT}"/>')
            parts.append(_text(x(mark), bottom + 21, f"{mark:g}"))
    return [*parts, _text(WIDTH - RIGHT, bottom + 38, name, "end")] if name else parts


def _legend(top: float, entries: Sequence[tuple[str, str]]) -> list[str]:
    parts, left = [], float(LEFT)
    for words, color in entries:
        parts.append(f'<path d="M{left:.1f} {top - 14}h20" stroke="{color}" stroke-width="2.4"/>')
        parts.append(_text(left + 26, top - 10, words, "start", 13, INK))
        left += 7.2 * len(words) + 50
    return parts


def _across(y: float, color: str = GRID, dashes: str = "") -> str:
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{color}"{dash}/>'


def _line(points: Sequence[tuple[float, float]], color: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8" stroke-linejoin="round"/>'


def _text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12, color: str = FAINT) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{escape(words)}</text>'
    )
