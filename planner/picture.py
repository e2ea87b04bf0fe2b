"""A picture of where memory and time go, as SVG without any library: two bars for each layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from .chips import GIB
from .verdict import Verdict

WIDTH, LEFT, RIGHT, TOP = 960, 28, 28, 64
BAR, ROW = 22, 132  # heights of a bar, and of a layout with its two bars
INK, FAINT, GRID, OVER = "#1f2933", "#616e7c", "#e4e7eb", "#dc2626"
MEMORY_COLORS = {
    "parameters": "#2563eb",
    "optimizer": "#60a5fa",
    "cache": "#0d9488",
    "inputs": "#94a3b8",
    "gradients": "#ea580c",
    "activations": "#d97706",
    "weights": "#a78bfa",
    "temporaries": "#fbbf24",
    "unused": "#e5e7eb",
}
TIME_COLORS = {"compute": "#2563eb", "memory": "#0d9488", "hidden sending": "#cbd5e1", "waiting": "#ea580c"}


def write_picture(path: Path, verdicts: Sequence[Verdict], title: str) -> None:
    """Writes the picture to an `.svg` file."""
    path.write_text(draw(verdicts, title), encoding="utf-8")


def draw(verdicts: Sequence[Verdict], title: str) -> str:
    """The SVG text: for each verdict its memory, to the size of a device's, and its time, to the longest of all."""
    height = TOP + ROW * len(verdicts) + 64
    longest = max(sum(_times(verdict).values()) for verdict in verdicts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(LEFT, 34, title, 18, INK, 'font-weight="600"'),
    ]
    for place, verdict in enumerate(verdicts):
        parts += _layout(verdict, TOP + ROW * place, longest)
    shown = {name for verdict in verdicts for name, size in _memory(verdict).items() if size}
    parts += _legend(height - 40, {name: color for name, color in MEMORY_COLORS.items() if name in shown})
    parts += _legend(height - 18, TIME_COLORS)
    return "\n".join([*parts, "</svg>", ""])


def _memory(verdict: Verdict) -> Mapping[str, float]:
    return verdict.compiled.memory if verdict.compiled else verdict.estimate.memory


def _times(verdict: Verdict) -> dict[str, float]:
    """The expected step, cut into what it waits for; what travels beside it shows only where it is longer."""
    times = verdict.roofline
    compute = times.busy if times.busy > times.memory else 0.0
    computing = max(times.busy, times.memory)
    return {
        "compute": compute,
        "memory": times.memory if not compute else 0.0,
        "hidden sending": max(0.0, times.hidden - computing),
        "waiting": times.exposed,
    }


def _layout(verdict: Verdict, top: float, longest: float) -> list[str]:
    estimate = verdict.estimate
    capacity, total = estimate.topology.chip.memory, verdict.total_memory
    rates = estimate.rates(verdict.seconds)
    name = f"{estimate.topology}, {estimate.layout.plan}"
    if estimate.workload.mode == "train":
        name += f", remat {estimate.layout.remat}, accumulation {estimate.layout.accumulation}"
    fits = f"{total / GIB:.1f} of {capacity / GIB:.1f} GiB" + ("" if verdict.fits else ": does not fit")
    speed = f"{verdict.seconds * 1e3:,.0f} ms a step, {rates['tokens_per_second_per_chip']:,.0f} tokens/s a chip"
    wide = max(capacity, total)
    memory = _bar(top + 30, wide, {k: v for k, v in _memory(verdict).items() if v}, MEMORY_COLORS)
    edge = LEFT + (WIDTH - LEFT - RIGHT) * capacity / wide
    color = INK if verdict.fits else OVER
    limit = f'<path d="M{edge:.1f} {top + 26}v{BAR + 8}" stroke="{color}" stroke-width="2"/>'
    return [
        _text(LEFT, top + 18, name, 14, INK, 'font-weight="600"'),
        _text(WIDTH - RIGHT, top + 18, fits, 13, color, 'text-anchor="end"'),
        *memory,
        limit,
        _text(LEFT, top + 74, speed, 13, FAINT),
        *_bar(top + 80, longest, _times(verdict), TIME_COLORS),
    ]


def _bar(y: float, whole: float, sizes: Mapping[str, float], colors: Mapping[str, str]) -> list[str]:
    width, x = WIDTH - LEFT - RIGHT, float(LEFT)
    parts = [f'<rect x="{LEFT}" y="{y}" width="{width}" height="{BAR}" fill="none" stroke="{GRID}"/>']
    for name, color in colors.items():
        length = width * sizes.get(name, 0.0) / whole if whole else 0.0
        if length > 0:
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>')
            x += length
    return parts


def _legend(y: float, colors: Mapping[str, str]) -> list[str]:
    parts, x = [], float(LEFT)
    for name, color in colors.items():
        parts.append(f'<rect x="{x:.1f}" y="{y - 9}" width="11" height="11" fill="{color}"/>')
        parts.append(_text(x + 16, y, name, 12, FAINT))
        x += 34 + 6.6 * len(name)
    return parts


def _text(x: float, y: float, words: str, size: int, color: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" {more}>{escape(words)}</text>'
