"""A picture of the policy: sampled actions over the critic's landscape with its gradient field."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import Any, cast

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from qsm_lightning.datamodule import datamodule_of
from qsm_lightning.errors import require_at_most, require_not_negative, require_positive
from qsm_lightning.losses import OffPolicyLoss
from qsm_lightning.policy import check_samples

GRID = 41  # points per axis of the landscape
MOST_STATES = 20  # a row each, drawn while training waits


class PolicyPicture(Callback):
    """After evaluations, write ``policy`` to TensorBoard: the sampled actions in fixed states.

    One-dimensional actions: Q over the action, arrows along grad_a Q, and the samples' histogram. More dimensions: a
    row per state and a column per pair of neighbouring components, Q as colours, grad_a Q as arrows, samples as discs
    whose area is their share; the components not shown stay at the samples' mean. A loss without ``critics`` and
    ``q_gradient`` gets no picture.

    Args:
        every_evaluations: evaluations between two pictures; 0 for none.
        states: number of states, taken from the replay buffer, or the dataset, at the first picture and kept.
        samples: actions sampled per state.
    """

    def __init__(self, every_evaluations: int = 1, states: int = 3, samples: int = 200) -> None:
        require_not_negative("picture.", every_evaluations=every_evaluations)
        require_positive("picture.", states=states)
        require_at_most(MOST_STATES, "picture.", states=states)
        check_samples(samples, "picture.samples")
        self.every_evaluations = every_evaluations
        self.states = states
        self.samples = samples
        self._count = 0
        self._observations: Tensor | None = None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._count += 1
        if not self.every_evaluations or self._count % self.every_evaluations or not trainer.is_global_zero:
            return
        loss = cast(OffPolicyLoss, pl_module.loss)
        if not hasattr(loss, "q_gradient"):
            return
        data = datamodule_of(trainer)
        frames: Any = data.buffer if len(data.buffer) else data.experience.offline
        if self._observations is None and frames is None:  # a run that goes on without its buffer
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if self._observations is None:
                    rows = torch.linspace(0, len(frames) - 1, self.states).long()
                    self._observations = frames[rows]["observation"].clone()
                with pl_module.averaged_weights():  # type: ignore[operator]
                    figure = draw_policy(loss, self._observations, self.samples)
                with contextlib.suppress(OSError):  # a full disk costs a picture
                    logger.experiment.add_figure("policy", figure, data.progress.frames)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "observations": self._observations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._count, self._observations = state_dict["count"], state_dict["observations"]


def draw_policy(loss: OffPolicyLoss, observations: Tensor, samples: int = 200) -> Figure:
    """Sampled actions over Q and grad_a Q for each of ``observations`` [N, O]; global generators are untouched.

    The loss must offer ``critics`` and ``q_gradient``, as :class:`~qsm_lightning.losses.QSMLoss` does.
    """
    observations = observations.to(next(loss.denoiser.parameters()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = loss.evaluation_policy()
        actions = [policy.act(o.expand(samples, -1)).detach() for o in observations]
    action_dim = actions[0].shape[-1]
    pairs = list(pairwise(range(action_dim)))[:4] if action_dim > 1 else [(0, 0)]
    rows, columns = (1, len(observations)) if action_dim == 1 else (len(observations), len(pairs))
    figure = matplotlib.figure.Figure(figsize=(4 * columns + 1, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(len(observations), len(pairs))
    for row, (observation, action) in enumerate(zip(observations, actions, strict=True)):
        for column, pair in enumerate(pairs):
            draw = _draw_line if action_dim == 1 else _draw_plane
            draw(axes[row, column], loss, observation, action, *pair)
            axes[row, column].set_title(f"state {row + 1}")
    return figure


def _values(loss: OffPolicyLoss, observation: Tensor, actions: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Q (mean of the critics) [N] and grad_a Q [N, A] at ``actions`` [N, A]."""
    observations = observation.expand(len(actions), -1)
    with torch.no_grad():
        q = loss.critics(observations, actions).mean(0)
    return q.cpu().numpy(), loss.q_gradient(observations, actions).cpu().numpy()


def _draw_line(axis: Axes, loss: OffPolicyLoss, observation: Tensor, actions: Tensor, i: int, j: int) -> None:
    grid = torch.linspace(-1, 1, GRID, device=actions.device)[:, None]
    q, g = _values(loss, observation, grid)
    x = grid[:, 0].cpu().numpy()
    axis.plot(x, q, color="C0")
    axis.quiver(x[::4], q[::4], np.sign(g[::4, 0]), 0 * x[::4], color="C3", scale=20, width=0.005, zorder=3)
    axis.set(xlabel="action", ylabel="Q, arrows along its gradient")
    counts = axis.twinx()
    counts.hist(actions[:, 0].cpu().numpy(), bins=40, range=(-1, 1), color="C1", alpha=0.5)
    counts.set_ylabel("sampled actions")


def _draw_plane(axis: Axes, loss: OffPolicyLoss, observation: Tensor, actions: Tensor, i: int, j: int) -> None:
    line = torch.linspace(-1, 1, GRID, device=actions.device)
    grid = actions.mean(0).repeat(GRID * GRID, 1)
    grid[:, i], grid[:, j] = (part.flatten() for part in torch.meshgrid(line, line, indexing="xy"))
    values, g = _values(loss, observation, grid)
    plane = grid.cpu().numpy()
    x, y, q, u, v = (part.reshape(GRID, GRID) for part in (plane[:, i], plane[:, j], values, g[:, i], g[:, j]))
    axis.figure.colorbar(axis.contourf(x, y, q, levels=20, cmap="viridis"), ax=axis, label="Q")
    skip = (slice(2, None, 4), slice(2, None, 4))
    axis.quiver(x[skip], y[skip], u[skip], v[skip], color="white", alpha=0.7)
    cells, counts = ((actions[:, [i, j]] * 10).round() / 10).unique(dim=0, return_counts=True)
    sizes = 12 + 400 * counts.cpu().numpy() / len(actions)
    x, y = cells.cpu().numpy().T
    axis.scatter(x, y, s=sizes, color="C1", edgecolors="black", lw=0.5, clip_on=False, zorder=3)
    axis.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), xlabel=f"action {i + 1}", ylabel=f"action {j + 1}")
