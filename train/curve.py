"""The loss curve of a run as an SVG picture, drawn without any library."""

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 76, 28, 64, 60
INK, FAINT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
TRAIN, EVAL, ENTROPY = "#2563eb", "#ea580c", "#64748b"
POINTS = 800  # more than the picture's pixels can show

Points = Sequence[tuple[int, float]]


def write_curve(
    path: Path, train: Points, evaluated: Points = (), entropy: float | None = None, title: str = ""
) -> None:
    """Writes the picture.

    Args:
        path: the file, `.svg`.
        train: (step, loss) of the training batches, in nats per token; drawn faintly, with its moving average.
        evaluated: (step, loss) on held-out text.
        entropy: unigram entropy of the text, a dashed line: the loss of the best guess that sees no context.
        title: above the picture.
    """
    path.write_text(draw_curve(train, evaluated, entropy, title), encoding="utf-8")


def draw_curve(train: Points, evaluated: Points = (), entropy: float | None = None, title: str = "") -> str:
    """The SVG text of `write_curve`."""
    train = [(step, loss) for step, loss in train if math.isfinite(loss)]
    evaluated = [(step, loss) for step, loss in evaluated if math.isfinite(loss)]
    losses = [loss for _, loss in [*train, *evaluated]] + ([] if entropy is None else [entropy])
    last = max((step for step, _ in [*train, *evaluated]), default=1)
    x_ticks = [tick for tick in ticks(0, max(last, 1), 8) if tick == int(tick)]
    y_ticks = ticks(min(losses, default=0), max(losses, default=1), 7)
    x_end, low, high = max(last, 1), y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / x_end

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    def line(points: Points, color: str, width: float, opacity: float = 1) -> str:
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in thinned(points))
        style = f'stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity}"'
        return f'<polyline points="{path}" fill="none" stroke-linejoin="round" stroke-linecap="round" {style}/>'

    def text(at_x: float, at_y: float, words: str, anchor: str = "middle", size: int = 13, more: str = "") -> str:
        style = f'text-anchor="{anchor}" font-size="{size}" {more or f"""fill="{FAINT}" """}'
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" {style}>{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 34, title or "Training loss", "start", 18, f'font-weight="600" fill="{INK}"'),
    ]
    for tick in y_ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(text(LEFT - 10, y(tick) + 4.5, f"{tick:g}", "end"))
    for tick in x_ticks:
        parts.append(f'<path d="M{x(tick):.1f} {HEIGHT - BOTTOM}v5" stroke="{FAINT}"/>')
        parts.append(text(x(tick), HEIGHT - BOTTOM + 21, f"{tick:,.0f}"))
    parts.append(f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="{FAINT}"/>')
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, "step"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(text(22, middle, "loss, nats per token", more=f'fill="{FAINT}" transform="rotate(-90 22 {middle})"'))

    legend = []
    if entropy is not None:
        dash = f'stroke="{ENTROPY}" stroke-width="1.8" stroke-dasharray="7 5"'
        parts.append(f'<path d="M{LEFT} {y(entropy):.1f}H{WIDTH - RIGHT}" {dash}/>')
        legend.append((f"unigram entropy {entropy:.3f}", dash))
    if train:
        smooth = smoothed(train)
        parts += [line(train, TRAIN, 1, 0.3), line(smooth, TRAIN, 2.4)]
        legend.append((f"training {smooth[-1][1]:.3f}", f'stroke="{TRAIN}" stroke-width="2.4"'))
    if evaluated:
        parts.append(line(evaluated, EVAL, 2))
        dots = thinned(evaluated)
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5" fill="{EVAL}" stroke="white"/>' for s, v in dots]
        legend.append((f"held out {evaluated[-1][1]:.3f}", f'stroke="{EVAL}" stroke-width="2.4"'))
    right = WIDTH - RIGHT
    for words, style in reversed(legend):
        parts.append(text(right, 34, words, "end", 13, f'fill="{INK}"'))
        right -= 7.2 * len(words) + 10
        parts.append(f'<path d="M{right - 26:.1f} 29.5h26" {style}/>')
        right -= 50
    return "\n".join([*parts, "</svg>", ""])


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round numbers, evenly spaced, from at or below `low` to at or above `high`."""
    span = max(high - low, 1e-9, 1e-3 * abs(high))
    raw = span / (most - 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def smoothed(points: Points) -> list[tuple[int, float]]:
    """Each loss as the mean of its neighbours, a fiftieth of all points to either side: no lag, unlike a decay."""
    reach, sums = max(1, len(points) // 50), [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    found = []
    for i, (step, _) in enumerate(points):
        low, high = max(0, i - reach), min(len(points), i + reach + 1)
        found.append((step, (sums[high] - sums[low]) / (high - low)))
    return found


def thinned(points: Points) -> Points:
    """Every so-manieth point, and the last one, so that about POINTS are left."""
    stride = max(1, len(points) // POINTS)
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]
