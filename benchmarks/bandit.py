"""Where rules for M_q take a policy on a bandit whose best action is inside the bounds, in several units of reward.

    python -m benchmarks.bandit

Q(a) = -H |a - 0.3|^2 / 2 in two dimensions, known exactly, and a denoiser that is the converged one: eps = -M_q grad Q,
at the noisy action or where the step ends (``score_at: denoised``).
The buffer holds the policy's own actions with a noise of 0.1, so a rule that looks at the batch sees what it caused.
Printed are mean, deviation and share at the bounds of 20,000 samples, as a table.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from qsm_lightning.losses import QSM
from qsm_lightning.sampler import reverse_process

BEST, A, ROUNDS, BATCH, COLLECTED, KEPT, NOISE = 0.3, 2, 600, 256, 32, 1000, 0.1
RULES: dict[str, dict[str, Any]] = {
    "`50`": {"m_q": 50.0},
    "size 1": {"m_q": "auto", "m_q_lr": 1e-9},
    "`batch`": {"m_q": "batch"},
    "`auto`": {"m_q": "auto", "m_q_lr": 0.01, "m_q_slope": 0.15},
    "`auto`, `denoised`": {"m_q": "auto", "m_q_lr": 0.01, "score_at": "denoised"},
}


class Bowl(nn.Module):
    """Two equal critics of curvature H."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.curvature = curvature

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return (-self.curvature * (action - BEST).square().sum(-1) / 2).expand(2, -1)


class Converged(nn.Module):
    """What regression on -M_q grad Q ends at, for an M_q of each step [T]."""

    def __init__(self, loss: Any, m_q: Tensor) -> None:
        super().__init__()
        self.slopes = m_q * loss.critics.curvature
        self.at_end, schedule = loss.score_at == "denoised", loss.schedule
        self.roots, self.coefs = schedule.alphas.sqrt(), schedule.eps_coefs

    def forward(self, observation: Tensor, action: Tensor, t: Tensor) -> Tensor:
        k = self.slopes[t, None]
        if self.at_end:  # v = (a + coef k (best - v)) / root, where the bounds leave it
            root, coef = self.roots[t, None], self.coefs[t, None]
            action = ((action + coef * k * BEST) / (root + coef * k)).clamp(-1, 1)
        return -k * (BEST - action)


def samples(loss: QSM, m_q: Tensor, count: int) -> Tensor:
    """Actions [count, A] of the converged denoiser."""
    noise = torch.randn(loss.schedule.T + 1, count, A)
    denoiser: Any = Converged(loss, m_q)
    loss.denoiser = denoiser
    return reverse_process(denoiser, loss.schedule, torch.zeros(count, 1), noise[-1], noise[:-1])[-1]


def settled(loss: QSM) -> Tensor:
    """M_q of each step [T], after updates on what the policy itself collects; the mean over the last 200."""
    steps = torch.arange(loss.schedule.T)
    optimizer = torch.optim.Adam([loss.log_size], loss.learning_rates["m_q"]) if loss.m_q == "auto" else None
    found = []
    buffer = 2 * torch.rand(KEPT, A) - 1
    for _ in range(ROUNDS):
        action = buffer[torch.randint(KEPT, (BATCH,))]
        if optimizer is not None:
            optimizer.zero_grad()
            loss.m_q_loss(TensorDict({"observation": torch.zeros(BATCH, 1), "action": action}, BATCH))[0].backward()
            optimizer.step()
        t = torch.randint(loss.schedule.T, (BATCH,))
        noisy = loss.schedule.add_noise(action, t, torch.randn_like(action))
        observation = torch.zeros(BATCH, 1)
        g = loss.slopes(observation, action, noisy, t, loss.predicted_noise(observation, noisy, t))
        m_q = torch.as_tensor(loss.scale(g, steps)).flatten().expand(len(steps))
        found.append(m_q)
        new = samples(loss, m_q, COLLECTED)
        buffer = torch.cat([buffer[COLLECTED:], (new + NOISE * torch.randn_like(new)).clamp(-1, 1)])
    return torch.stack(found[-200:]).mean(0)


def main() -> None:
    """Print the table."""
    print("| T | rule | H | M_q H | mean | deviation | at the bounds |\n| --- | --- | --- | --- | --- | --- | --- |")
    for T in (5, 10, 20):
        for name, settings in RULES.items():
            for curvature in (0.04, 4.0, 400.0):
                torch.manual_seed(0)
                loss = QSM(1, A, hidden=(8,), time_dim=8, T=T, **settings)
                loss.critics = Bowl(curvature)
                m_q = settled(loss)
                found = samples(loss, m_q, 20_000)
                told = (m_q[0] * curvature, found.mean(), found.std(), (found.abs() > 0.999).float().mean())
                print(
                    f"| {T} | {name} | {curvature:g} |", " | ".join(f"{value:.3g}" for value in told), "|", flush=True
                )


if __name__ == "__main__":
    main()
