"""Pictures of sampled actions and their modes: a row for each state, a column for each policy."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsm_lightning.modes import Modes, Sampled

NEIGHBOURS = 15  # UMAP's default


def draw_modes(names: list[str], found: list[list[Sampled]], projection: str, seed: int) -> Figure:
    """A row for each state and a column for each run, in one colour for each mode, and grey for none.

    Actions of one dimension are histograms, each as high as its tallest bar; those of two are points; those of more are
    projected to two, with one projection for all runs in a row.
    """
    rows, columns = len(found[0]), len(found)
    lines = found[0][0].actions.shape[-1] == 1
    figure = Figure(figsize=(3.4 * columns + 0.4, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex="row", sharey=False if lines else "row")
    for row, states in enumerate(zip(*found, strict=True)):
        points, labels = project([state.actions for state in states], projection, seed)
        for axis, name, state, place in zip(axes[row], names, states, points, strict=True):
            (_draw_line if lines else _draw_plane)(axis, place, state.modes)
            counted = "1 mode" if len(state.modes) == 1 else f"{len(state.modes)} modes"
            axis.set_title(f"{name}\n{counted}: {state.modes.in_percent(4)}", fontsize=10)
            axis.set_xlabel(labels[0])
        axes[row, 0].set_ylabel(f"step {states[0].step}\n{labels[1]}")
    return figure


def project(actions: list[np.ndarray], projection: str, seed: int) -> tuple[list[np.ndarray], tuple[str, str]]:
    """Actions [N, A] of each run in at most two dimensions, and what the axes are called.

    UMAP puts equal actions at one point, and has to have more than ``NEIGHBOURS`` that differ: fewer are projected to
    their principal components.
    """
    width = actions[0].shape[-1]
    if width == 1:
        return actions, ("action", "share of the samples")
    if width == 2:
        return actions, ("action 1", "action 2")
    together = np.concatenate(actions)
    if projection == "umap" and len(np.unique(together, axis=0)) > NEIGHBOURS:
        from umap import UMAP

        placed = UMAP(n_neighbors=NEIGHBOURS, unique=True, random_state=seed, n_jobs=1).fit_transform(together)
        return np.split(placed, len(actions)), ("UMAP 1", "UMAP 2")
    from sklearn.decomposition import PCA

    placed = PCA(2, random_state=seed).fit_transform(together)
    return np.split(placed, len(actions)), ("principal component 1", "principal component 2")


def _colours(modes: Modes) -> list[tuple[np.ndarray, Any]]:
    """Which actions are of each mode, with its colour."""
    wheel = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]  # in pairs, dark and light
    wheel = [*wheel[::2], *wheel[1::2]]
    return [(modes.labels == k, wheel[k] if k >= 0 else "0.7") for k in range(-1, len(modes))]


def _draw_line(axis: Axes, actions: np.ndarray, modes: Modes) -> None:
    parts = [(actions[mask, 0], colour) for mask, colour in _colours(modes)]
    weights = [np.full(len(part), 1 / len(actions)) for part, _ in parts]
    colours = [colour for _, colour in parts]
    axis.hist([part for part, _ in parts], bins=40, range=(-1, 1), weights=weights, color=colours, stacked=True)
    axis.set_xlim(-1.05, 1.05)


def _draw_plane(axis: Axes, points: np.ndarray, modes: Modes) -> None:
    for mask, colour in _colours(modes):
        axis.scatter(points[mask, 0], points[mask, 1], s=10, color=colour, alpha=0.4, linewidths=0)
