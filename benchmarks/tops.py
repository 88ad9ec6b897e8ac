"""How near to the best actions policies come by the critics of a run, and what more denoising steps change in that.

    python -m benchmarks.tops RUN_OR_CHECKPOINT [--steps 5 10 20] [--json FILE]

The critics of the run and its replay buffer stay as they are. A policy's number is the mean of the critics'
Q over 256 of the newest observations and 16 actions in each, as the share of the way from uniform actions (0) to
the best that 32 climbs from uniform actions find (1). The policies are the run's own, by one sample and by the best of
32; QSM's, trained anew on these critics and this buffer with another number of steps; and SAC's, a Gaussian through
tanh that climbs the smaller critic at the entropy -A, by its samples and by its mode.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import TanhNormal

from benchmarks.machine import described, machine
from benchmarks.report import save
from qsm_lightning import datasets
from qsm_lightning.commands.trained import load
from qsm_lightning.losses import QSM
from qsm_lightning.losses.wrapped import WrappedLoss
from qsm_lightning.networks import MLP
from qsm_lightning.tables import markdown

STATES, NEWEST, DRAWS, CLIMBS, BATCH = 256, 20_000, 16, 32, 256
Act = Callable[[Tensor], Tensor]


class Pair(nn.Module):
    """The critics of SAC or TD3 as :class:`~qsm_lightning.networks.Critics` are called."""

    def __init__(self, loss: WrappedLoss) -> None:
        super().__init__()
        nets = [deepcopy(loss.inner.qvalue_network) for _ in range(2)]
        for net, params in zip(nets, loss.inner.qvalue_network_params, strict=True):
            params.data.clone().to_module(net)
        self.nets = nn.ModuleList(net.module for net in nets)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """[N, O], [N, A] -> [2, N]."""
        return torch.stack([net(observation, action)[..., 0] for net in self.nets])


class Landscape:
    """Critics over the actions in some observations, with the values of uniform and of the best known actions.

    Args:
        critics: (observation [N, O], action [N, A]) -> [2, N].
        observations: [S, O].
        action_dim: A.
    """

    def __init__(self, critics: Any, observations: Tensor, action_dim: int) -> None:
        self.critics, self.observations, self.action_dim = critics, observations, action_dim
        uniform = 2 * torch.rand(len(observations) * CLIMBS, action_dim) - 1
        repeated = observations.repeat_interleave(CLIMBS, 0)
        self.least = self.value(repeated, uniform).mean()
        ends = self.value(repeated, self._climbed(repeated, uniform)).view(-1, CLIMBS)
        self.most = ends.max(1).values.mean()
        self.climbs = self.share(ends.mean())

    @torch.no_grad()
    def value(self, observation: Tensor, action: Tensor) -> Tensor:
        """The critics' mean, [N]."""
        return self.critics(observation, action).mean(0)

    def _climbed(self, observation: Tensor, action: Tensor, steps: int = 200, size: float = 0.03) -> Tensor:
        """Where steps along the gradient, of ``size`` in each component at first and 0 at last, end."""
        for step in range(steps):
            g = torch.func.grad(lambda a: self.critics(observation, a).mean(0).sum())(action)
            length = g.norm(dim=-1, keepdim=True).clamp(min=1e-9) / self.action_dim**0.5
            action = (action + size * (1 - step / steps) * g / length).clamp(-1, 1)
        return action

    def share(self, value: Tensor) -> float:
        """A mean value between that of uniform actions, 0, and that of the best, 1."""
        return ((value - self.least) / (self.most - self.least)).item()

    @torch.no_grad()
    def row(self, name: str, act: Act, draws: int = DRAWS) -> dict[str, Any]:
        """A policy's share, its deviation in a state, and how many components of its actions are at a bound."""
        repeated = self.observations.repeat_interleave(draws, 0)
        actions = act(repeated)
        return {
            "policy": name,
            "share": self.share(self.value(repeated, actions).mean()),
            "deviation": actions.view(-1, draws, self.action_dim).std(1).mean().item() if draws > 1 else 0.0,
            "at_bounds": (actions.abs() > 0.99).float().mean().item(),
        }


def minibatches(frames: TensorDictBase, updates: int) -> Any:
    """As many minibatches."""
    for _ in range(updates):
        yield frames[torch.randint(len(frames), (BATCH,))]


def fit_qsm(critics: nn.Module, settings: dict[str, Any], frames: TensorDictBase, steps: int, updates: int) -> Act:
    """QSM's policy with ``steps`` denoising steps, regressed on the slopes of the run's critics; M_q adapts to them."""
    loss = QSM(frames["observation"].shape[-1], frames["action"].shape[-1], T=steps, **settings)
    loss.critics = critics
    optimizers = {
        term: torch.optim.Adam(loss.term_parameters(term), lr)
        for term, lr in (("m_q", loss.learning_rates["m_q"]), ("actor", 1e-3))
    }
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates) for optimizer in optimizers.values()]
    for batch in minibatches(frames, updates):
        for term, optimizer in optimizers.items():
            optimizer.zero_grad()
            loss.term_loss(term, batch)[0].backward()
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    return loss.sampler


def fit_gaussian(
    critics: Any, frames: TensorDictBase, updates: int, hidden: tuple[int, ...]
) -> Callable[[Tensor], TanhNormal]:
    """SAC's policy on the run's critics: its distribution by observation."""
    action_dim = frames["action"].shape[-1]
    net = MLP([frames["observation"].shape[-1], *hidden, 2 * action_dim], F.relu)
    log_alpha = torch.zeros(1, requires_grad=True)
    optimizer, tuner = torch.optim.Adam(net.parameters(), 1e-3), torch.optim.Adam([log_alpha], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)

    def policy(observation: Tensor) -> TanhNormal:
        mean, log_std = net(observation).chunk(2, -1)
        return TanhNormal(mean, log_std.clamp(-5, 2).exp())

    for batch in minibatches(frames, updates):
        found = policy(batch["observation"])
        action = found.rsample()
        log_prob = found.log_prob(action)
        loss = (log_alpha.exp().detach() * log_prob - critics(batch["observation"], action).min(0).values).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tuner.zero_grad()
        (log_alpha.exp() * (action_dim - log_prob.detach())).mean().backward()
        tuner.step()
    return policy


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or a checkpoint's")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20], help="T of the policies trained anew")
    parser.add_argument("--updates", type=int, default=3000, help="of each of them (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    trained = load(options.run)
    loss: Any = trained.module.loss
    critics = (Pair(loss) if isinstance(loss, WrappedLoss) else loss.critics).requires_grad_(False)
    settings = trained.module.hparams["loss"]["init_args"]
    hidden = tuple(settings["hidden"])
    qsm = {"score_at": "denoised"} | {name: settings[name] for name in ("score_at", "m_q_slope") if name in settings}
    qsm |= {"hidden": hidden, "m_q": "auto", "m_q_lr": 0.01}
    observation_dim, action_dim = (trained.module.hparams[name] for name in ("observation_dim", "action_dim"))
    frames = datasets.load(str(trained.path.parent), observation_dim, action_dim)
    newest = frames["observation"][-NEWEST:]
    land = Landscape(critics, newest[torch.randperm(len(newest))[:STATES]], action_dim)
    with trained.module.averaged_weights():
        rows = [land.row("the run's", loss.evaluation_policy("sample").act)]
        if "best_of_n" in loss.selectors:
            rows.append(land.row("the run's, best of 32", loss.evaluation_policy("best_of_n", 32).act, draws=1))
    for steps in options.steps:
        act = fit_qsm(critics, qsm, frames, steps, options.updates)
        rows.append(land.row(f"QSM, T = {steps}", act))
    gaussian = fit_gaussian(critics, frames, options.updates, hidden)
    rows.append(land.row("SAC's, sampled", lambda observation: gaussian(observation).sample()))
    rows.append(land.row("SAC's, its mode", lambda observation: gaussian(observation).deterministic_sample, draws=1))
    results: dict[str, Any] = {
        "machine": machine(),
        "checkpoint": trained.name,
        "env": trained.env,
        "frames": trained.frames,
        "range": (land.most - land.least).item(),
        "climbs": land.climbs,
        "rows": rows,
    }
    print(described(results["machine"]))
    print(f"{trained.name}: {trained.env} after {trained.frames} frames")
    print(f"Q of the best actions less that of uniform ones: {results['range']:.1f}; ", end="")
    print(f"climbs from uniform ones end at {land.climbs:.2f} of that\n")
    cells = [[r["policy"], *(f"{r[key]:.2f}" for key in ("share", "deviation", "at_bounds"))] for r in rows]
    print(markdown(["policy", "share of the way", "deviation", "at the bounds"], cells))
    save(options.json, results)


if __name__ == "__main__":
    main()
