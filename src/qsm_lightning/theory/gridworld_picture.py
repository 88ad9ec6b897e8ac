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

SCORE, GRADIENT, WALL = "black", "#E69F00", "0.35"
LONGEST = 0.46  # of an arrow, in cells from the centre


def draw_gridworld(world: Gridworld, found: dict[float, list[Round]], soft: bool = False) -> Figure:
    """A row for each alpha, a column for the first policy, the next and the last.

    In every cell a thin arrow is the score and a wide one alpha times the Q-gradient: where they are equal the thin one
    lies in the wide one. Lengths go with the square root, scaled alike in a picture. The colour is the value.
    """
    rows, columns = np.ptp(world.cells, axis=0) + 1
    width = 3.3 * min(1.0, columns / rows)
    figure = Figure(figsize=(3 * width + 1, len(found) * (3.3 * min(1.0, rows / columns) + 0.75) + 0.4), layout="constrained")
    axes = figure.subplots(len(found), 3, squeeze=False)
    for line, (alpha, policies) in zip(axes, found.items(), strict=True):
        top = max(float((r.soft_value if soft else r.value).max()) for r in policies)
        last = len(policies) - 1
        for axis, k in zip(line, (0, min(1, last), last), strict=True):
            image = _draw_policy(axis, world, policies[k], alpha, soft, top)
            named = "last" if k == last and policies[k].is_fixed(alpha) else ""
            axis.set_title(_title(world, policies[k], k, policies[k].is_fixed(alpha)), fontsize=10)
        line[0].set_ylabel(rf"$\alpha$ = {alpha:g}", fontsize=13)
        figure.colorbar(image, ax=line, shrink=0.9, pad=0.01, label="soft value" if soft else "value")
    handles = [
        Line2D([], [], color=SCORE, lw=1.3, label=r"score: differences of $\log\,\pi$"),
        Line2D([], [], color=GRADIENT, lw=5, label=r"Q-gradient: differences of $\alpha\,Q^\pi$"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _title(world: Gridworld, policy: Round, number: int, fixed: bool) -> str:
    name = "random policy" if number == 0 else f"round {number}{', fixed point' if fixed else ''}"
    return f"{name}\nentropy {entropy(policy.log_policy)[world.away].mean():.2f}, cosine {policy.cosine:.2f}"


def _draw_policy(axis: Axes, world: Gridworld, policy: Round, alpha: float, soft: bool, top: float) -> AxesImage:
    image = np.full(world.cells.max(0) + 1, np.nan)
    image[tuple(world.cells.T)] = policy.soft_value if soft else policy.value
    blues = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.02, 0.6, 256)), "blues").with_extremes(bad=WALL)
    drawn = axis.imshow(image, cmap=blues, vmin=0, vmax=top)
    row, column = world.cells[world.goal]
    axis.plot(column, row, "*", ms=13, color="#009E73", mec="white", mew=0.8)
    _arrows(axis, world, alpha * policy.q_gradient, GRADIENT, 0.2)
    _arrows(axis, world, policy.score, SCORE, 0.06)
    axis.set_xticks(np.arange(-0.5, image.shape[1]), [])
    axis.set_yticks(np.arange(-0.5, image.shape[0]), [])
    axis.grid(color="white", lw=0.6)
    axis.tick_params(length=0)
    return drawn


def _arrows(axis: Axes, world: Gridworld, field: Array, colour: str, width: float) -> None:
    """Arrows from the centre of each cell, as long as the square root of their norm says."""
    norm = np.linalg.norm(field, axis=-1, keepdims=True)
    x, y = (field / np.sqrt(np.maximum(norm * norm[world.away].max(), 1e-300)) * LONGEST).T[:, world.away]
    rows, columns = world.cells[world.away].T
    axis.quiver(
        columns, rows, x, y, color=colour, angles="xy", scale_units="xy", scale=1, units="xy", width=width,
        headwidth=2.2, headlength=1.6, headaxislength=1.6, minlength=0, zorder=3,
    )
