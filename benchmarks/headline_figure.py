"""README's figure: quality against CPU time, few contenders, each called by its name."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from peer_figure import FAINT, INK, PAPER, Axis, colour_of
from peer_tables import BASELINE, HEADLINE, HEADLINE_GRIDS, Cell, Seeds, measured

WIDTH, HEIGHT, GAP = 320, 270, 14  # of a panel, in pixels
LEFT, TOP, BOTTOM, HEAD = 54, 30, 44, 58
OURS = "ours, "

Points = Mapping[str, tuple[float, float]]


def headline_figure() -> str:
    """Return the SVG: a panel for each grid, of the model that most is known of."""
    found = measured()
    models = dict.fromkeys(cell.model for cell in found)
    of_model = {model: _grids(found, model) for model in models}
    model = max(models, key=lambda model: sum(len(of) for of in of_model[model].values()))
    grids = of_model[model]
    width, height = len(grids) * (WIDTH + GAP) + GAP, HEAD + HEIGHT + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13" fill="{INK}">',
        "<title>Held-out KL divergence to the 16-bit model against CPU seconds</title>",
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        f'<text x="{GAP}" y="24" font-size="16" font-weight="bold">What quantizing {escape(model)} '
        "loses, and what it takes: lower left is better</text>",
        f'<text x="{GAP}" y="44">KL to 16 bit on held-out text (up) against CPU seconds (right), '
        "both logarithmic</text>",
    ]
    for number, (grid, points) in enumerate(grids.items()):
        parts += _panel(grid, points, GAP + number * (WIDTH + GAP), HEAD)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grids(found: Mapping[Cell, Seeds], model: str) -> dict[str, Points]:
    """Return where each contender is on each grid; a contender that was not run has no place."""
    grids: dict[str, Points] = {}
    for grid in HEADLINE_GRIDS:
        runs = {
            name: [run for run in found.get(Cell(model, grid, name), {}).values() if "kl" in run]
            for name in (BASELINE, *HEADLINE)
        }
        points = {
            name: (
                statistics.median(run["cpu_s"] for run in of),
                statistics.mean(run["kl"] for run in of),
            )
            for name, of in runs.items()
            if of
        }
        if points:
            grids[grid] = points
    return grids


def _panel(title: str, points: Points, x: float, y: float) -> Iterator[str]:
    right, bottom = x + WIDTH, y + HEIGHT
    seconds = Axis.over([of[0] for of in points.values()], x + LEFT, right - 8)
    losses = Axis.over([of[1] for of in points.values()], bottom - BOTTOM, y + TOP)
    yield f'<text x="{x + LEFT}" y="{y + 18}" font-weight="bold">{escape(title)}</text>'
    for tick in losses.ticks():
        at = losses(tick)
        yield f'<path d="M{x + LEFT} {at:.1f}H{right - 8}" stroke="{FAINT}"/>'
        yield f'<text x="{x + LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for tick in seconds.ticks():
        at, foot = seconds(tick), bottom - BOTTOM
        yield f'<path d="M{at:.1f} {y + TOP}V{foot}" stroke="{FAINT}"/>'
        yield f'<text x="{at:.1f}" y="{foot + 18}" text-anchor="middle">{tick:g} s</text>'
    places = {name: (seconds(cpu_s), losses(kl)) for name, (cpu_s, kl) in points.items()}
    ours = [place for name, place in places.items() if name.startswith(OURS)]
    yield _line(ours, colour_of(OURS))
    middle = (x + LEFT + right) / 2
    for name, (at, height) in places.items():
        is_left = at > middle  # its name goes where there is room
        anchor, shift = ("end", -10) if is_left else ("start", 10)
        yield (
            f'<circle cx="{at:.1f}" cy="{height:.1f}" r="6" fill="{colour_of(name)}" '
            f'stroke="{PAPER}"/>'
        )
        yield (
            f'<text x="{at + shift:.1f}" y="{height + 4.5:.1f}" text-anchor="{anchor}" '
            f'fill="{colour_of(name)}" stroke="{PAPER}" stroke-width="3" paint-order="stroke">'
            f"{escape(name)}</text>"
        )


def _line(places: Sequence[tuple[float, float]], colour: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>' if path else ""
