"""The picture of the iteration: the score and the Q-gradient in every cell, a row for each alpha."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from qsm_lightning.theory.gridworld import Array, Gridworld, Round, entropy

SCORE, GRADIENT, GOAL, WALL = "black", "#E69F00", "#009E73", "0.35"
LONGEST = 0.9  # of an arrow, in cells


def draw_gridworld(world: Gridworld, found: dict[float, list[Round]], soft: bool = False) -> Figure:
    """A row for each alpha; the first policy, the next and the last. The colour is the value, soft if ``soft``.

    In every cell a thin arrow is the score and a wide one alpha times the Q-gradient: where they are equal, the thin
    one lies in the wide one. An arrow v is as long as tanh |v|. Along an axis that is how uneven the probabilities of
    its two actions are: (p(right) - p(left)) / (p(right) + p(left)) = tanh((log p(right) - log p(left)) / 2).
    """
    rows, columns = np.ptp(world.cells, axis=0) + 1
    width, height = 3.3 * min(1, columns / rows), 3.3 * min(1, rows / columns) + 0.6
    figure = Figure(figsize=(3 * max(width, 2) + 1, len(found) * height + 0.5), layout="constrained")
    axes = figure.subplots(len(found), 3, squeeze=False)
    for line, (alpha, policies) in zip(axes, found.items(), strict=True):
        values = [policy.soft_value if soft else policy.value for policy in policies]
        last = len(policies) - 1
        for axis, k in zip(line, (0, min(1, last), last), strict=True):
            image = _draw_value(axis, world, values[k], float(np.max(values)))
            _draw_arrows(axis, world, alpha * policies[k].q_gradient, GRADIENT, 0.17)
            _draw_arrows(axis, world, policies[k].score, SCORE, 0.06)
            axis.set_title(_title(world, policies[k], k, alpha), fontsize=10)
        line[0].set_ylabel(rf"$\alpha$ = {alpha:g}", fontsize=13)
        figure.colorbar(image, ax=line, shrink=0.85, pad=0.01, label="soft value" if soft else "value")
    handles = [
        Line2D([], [], color=SCORE, lw=1.4, label=r"score: differences of $\log\,\pi$"),
        Line2D([], [], color=GRADIENT, lw=5, label=r"Q-gradient: differences of $\alpha\,Q^\pi$"),
        Line2D([], [], color=GOAL, marker="*", ms=12, lw=0, label="goal"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _title(world: Gridworld, policy: Round, number: int, alpha: float) -> str:
    name = f"round {number}" if number else "random policy"
    name += ", fixed point" if policy.is_fixed(alpha) else ""
    return f"{name}\nentropy {entropy(policy.log_policy)[world.away].mean():.2f}, cosine {policy.cosine:.2f}"


def _draw_value(axis: Axes, world: Gridworld, value: Array, top: float) -> AxesImage:
    """The map, with a colour for the value [S] of each free cell."""
    image = np.full(world.cells.max(0) + 1, np.nan)
    image[tuple(world.cells.T)] = value
    light = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.02, 0.6, 256))).with_extremes(bad=WALL)
    row, column = world.cells[world.goal]
    axis.plot(column, row, "*", ms=14, color=GOAL, mec="white", mew=0.8)
    axis.set_xticks(np.arange(-0.5, image.shape[1]), [])
    axis.set_yticks(np.arange(-0.5, image.shape[0]), [])
    axis.tick_params(length=0)
    axis.grid(color="white", lw=0.6)
    return axis.imshow(image, cmap=light, vmin=0, vmax=top)


def _draw_arrows(axis: Axes, world: Gridworld, field: Array, colour: str, width: float) -> None:
    """Arrows [S, 2] through the centres of the cells; rows are counted downwards."""
    norm = np.maximum(np.linalg.norm(field, axis=-1, keepdims=True), 1e-12)
    right, up = (field / norm * np.tanh(norm) * LONGEST)[world.away].T
    row, column = world.cells[world.away].T
    axis.quiver(
        *(column, row, right, -up),
        color=colour,
        width=width,
        pivot="mid",
        angles="xy",
        scale=1,
        scale_units="xy",
        units="xy",
        headwidth=2.6,
        headlength=2.2,
        headaxislength=2,
        minlength=0,
        zorder=3,
    )
