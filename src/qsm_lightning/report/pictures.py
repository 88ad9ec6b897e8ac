"""The pictures of a comparison."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsm_lightning.report.statistics import Array
from qsm_lightning.report.summary import LEVELS, Band, Summary

# Okabe and Ito's colours, which the colour-blind tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("", "o", "s", "^", "D", "v", "P", "X")  # of labels that come after all colours

Style = tuple[str, str]  # colour and marker


def styles(summary: Summary) -> dict[str, Style]:
    """A colour and marker for each label, the same in all pictures."""
    names = list(dict.fromkeys(row.label for row in summary.rows))
    count = len(COLOURS)
    return {name: (COLOURS[i % count], MARKERS[i // count % len(MARKERS)]) for i, name in enumerate(names)}


def _line(axis: Axes, x: Array, band: Band, style: Style, name: str) -> None:
    colour, marker = style
    single = bool(np.isnan(band.low).all())
    every = max(1, len(x) // 10)
    axis.plot(
        x, band.value, color=colour, label=name, lw=1.8, ls="--" if single else "-", marker=marker, markevery=every
    )
    axis.fill_between(x, band.low, band.high, color=colour, alpha=0.18, lw=0)


def _plain(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def learning_curves(summary: Summary) -> Figure:
    """Interquartile mean of the evaluation return over frames with its 95 % band, one plot per task."""
    count = len(summary.curves)
    columns = min(3, count)
    lines = math.ceil(count / columns)
    style = styles(summary)
    widest = 0.8 + 0.085 * max(map(len, style))  # inches in the legend
    width = max(4.2 * columns + 0.4, widest)
    beside = min(5, len(style), int(width / widest))
    below = 0.35 + 0.25 * math.ceil(len(style) / beside)
    figure = Figure(figsize=(width, 3.2 * lines + below), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (env, curves) in zip(axes.flat, summary.curves.items(), strict=False):
        for name, band in curves.items():
            _line(axis, np.array(summary.frames[env][name]) / 1000, band, style[name], name)
        axis.set(title=env, xlabel="frames / 1000")
        _plain(axis)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("evaluation return")
    drawn = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=beside, frameon=False)
    return figure


def aggregate(summary: Summary) -> Figure:
    """Interquartile mean of the scaled final return over all tasks, with its interval."""
    figure = Figure(figsize=(5.6, 0.42 * len(summary.labels) + 1.1), layout="constrained")
    axis = figure.subplots()
    style = styles(summary)
    for y, name in enumerate(reversed(summary.labels)):
        _interval(axis, y, summary.aggregate[name], style[name])
    axis.set_yticks(range(len(summary.labels)), summary.labels[::-1])
    axis.set(ylim=(-0.6, len(summary.labels) - 0.4), xlabel="interquartile mean of scaled final returns")
    _plain(axis)
    return figure


def _interval(axis: Axes, y: float, band: Band, style: Style) -> None:
    colour, marker = style
    axis.plot([band.low, band.high], [y, y], color=colour, lw=7, alpha=0.3, solid_capstyle="butt")
    axis.plot([band.value], [y], marker or "o", color=colour, ms=6)


def profiles(summary: Summary) -> Figure:
    """Share of runs whose scaled final return is above a level, over the level."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axis = figure.subplots()
    style = styles(summary)
    for name, band in summary.profiles.items():
        _line(axis, LEVELS, band, style[name], name)
    axis.set(xlabel="scaled final return", ylabel="share of runs above it", ylim=(-0.02, 1.02))
    axis.legend(frameon=False)
    _plain(axis)
    return figure


def improvements(summary: Summary) -> Figure:
    """Probability that a run of one algorithm is above a run of another on the same task; a line for each pair."""
    pairs = list(summary.improvements)
    figure = Figure(figsize=(6.2, 0.36 * len(pairs) + 1.1), layout="constrained")
    axis = figure.subplots()
    style = styles(summary)
    for y, pair in enumerate(reversed(pairs)):
        _interval(axis, y, summary.improvements[pair], style[pair[0]])
    axis.set_yticks(range(len(pairs)), [f"{a} above {b}" for a, b in reversed(pairs)])
    axis.axvline(0.5, color="0.4", lw=1, ls="--")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(pairs) - 0.4), xlabel="probability")
    _plain(axis)
    return figure
