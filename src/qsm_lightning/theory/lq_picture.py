"""The picture of what the time step does: Q and score of both methods against continuous time's."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from qsm_lightning.theory.time_steps import CONTINUOUS, DISCRETE, METHODS, Point

COLOURS = {CONTINUOUS: "#0072B2", DISCRETE: "#D55E00"}
MARKERS = {CONTINUOUS: "o", DISCRETE: "s"}
PANELS = {
    "q_mean": "mean Q / exact mean Q",
    "q": "relative error of Q",
    "score": "relative error of the score",
}


def draw_time_steps(points: Sequence[Point], set_at: Fraction) -> Figure:
    """Three panels: mean Q over that of continuous time, the error of Q and that of the score.

    Lines are exact fixed points and open markers what was learned. The time step falls to the right; the dotted line is
    ``set_at``, the one that the discrete method's gamma was set for.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (quantity, title) in zip(axes, PANELS.items(), strict=True):
        axis.set_title(title, fontsize=11)
        axis.axvline(float(set_at), color="0.6", lw=1, ls=":", label=rf"$\gamma$ was set for dt = {set_at}")
        axis.set_yscale("log")
        axis.grid(color="0.92")
        if quantity == "q_mean":
            axis.axhline(1, color="0.6", lw=1)
        for method in METHODS:
            _draw(axis, [point for point in points if point.method == method], quantity)
        _label_steps(axis, sorted({point.dt for point in points}))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw(axis: Axes, points: Sequence[Point], quantity: str) -> None:
    """One method: a line through its fixed points, and markers on what was learned."""
    method = points[0].method
    exact = [(point.dt, getattr(point.exact, quantity)) for point in points if point.exact]
    learned = [(point.dt, getattr(point.learned, quantity)) for point in points if point.learned]
    colour, marker = COLOURS[method], MARKERS[method]
    if exact:
        axis.plot(*zip(*exact, strict=True), ".-", color=colour, ms=4, lw=1.6, label=f"{method}, exact fixed point")
    if learned:
        axis.plot(*zip(*learned, strict=True), marker, color=colour, ms=8, mfc="none", label=f"{method}, learned")


def _label_steps(axis: Axes, steps: Sequence[Fraction]) -> None:
    """The time steps as fractions, the longest on the left."""
    axis.set_xscale("log")
    if len(steps) > 1:
        axis.invert_xaxis()
    axis.xaxis.set_major_locator(FixedLocator([float(step) for step in steps]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([str(step) for step in steps], rotation=45 if len(steps) > 8 else 0)
    axis.set_xlabel("time step dt, ever shorter")
