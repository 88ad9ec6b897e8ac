"""The authors' algorithm as one would write it down in eager PyTorch: the yardstick of the other benchmarks.

Nothing of the package is used, nothing is tuned: modules called layer by layer, torch's Mish, the time code computed
anew at every denoising step, Adam as it comes, one parameter after the other in the target update.
"""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # observation, action, reward, terminated, next observation


def mlp(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


class Denoiser(nn.Module):
    """eps(s, a_t, t)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden: list[int]) -> None:
        super().__init__()
        self.fourier = nn.Parameter(0.2 * torch.randn(32, 1))
        self.time = mlp([64, 128, 128], nn.Mish)
        self.trunk = mlp([action_dim + observation_dim + 128, *hidden, action_dim], nn.Mish)

    def forward(self, observation: Tensor, action: Tensor, t: Tensor) -> Tensor:
        """[B, O], [B, A], [B, 1] -> [B, A]."""
        f = 2 * math.pi * t @ self.fourier.T
        code = self.time(torch.cat([f.cos(), f.sin()], -1))
        return self.trunk(torch.cat([action, observation, code], -1))


class Port:
    """Networks, optimizers and one update."""

    def __init__(self, observation_dim: int, action_dim: int, hidden: list[int], T: int, m_q: float = 50.0) -> None:
        self.action_dim, self.T, self.m_q = action_dim, T, m_q
        self.denoiser = Denoiser(observation_dim, action_dim, hidden)
        self.critics = nn.ModuleList(mlp([observation_dim + action_dim, *hidden, 1], nn.ReLU) for _ in range(2))
        self.targets = deepcopy(self.critics)
        self.actor_optimizer = torch.optim.Adam(self.denoiser.parameters(), 3e-4)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), 3e-4)
        t = torch.arange(1, T + 1)
        self.betas = 1 - torch.exp(-0.1 / T - 0.5 * 9.9 * (2 * t - 1) / T**2)
        self.alphas = 1 - self.betas
        self.alpha_hats = self.alphas.cumprod(0)

    @torch.no_grad()
    def act(self, observation: Tensor) -> Tensor:
        """[B, O] -> [B, A]: the reverse process and the noise of exploration."""
        a = torch.randn(len(observation), self.action_dim)
        for t in reversed(range(self.T)):
            eps = self.denoiser(observation, a, torch.full((len(a), 1), float(t)))
            a = (a - self.betas[t] / (1 - self.alpha_hats[t]).sqrt() * eps) / self.alphas[t].sqrt()
            if t > 0:
                a = a + self.betas[t].sqrt() * torch.randn_like(a)
            a = a.clamp(-1, 1)
        return (a + 0.1 * torch.randn_like(a)).clamp(-1, 1)

    def update(self, batch: Batch) -> None:
        """Both terms, both optimizers, the targets."""
        observation, action, reward, terminated, next_observation = batch
        with torch.no_grad():
            following = torch.cat([next_observation, self.act(next_observation)], -1)
            value = torch.min(*(target(following) for target in self.targets))
            y = reward + 0.99 * (1 - terminated.float()) * value
        now = torch.cat([observation, action], -1)
        critic_loss = sum(F.mse_loss(critic(now), y) for critic in self.critics)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()  # type: ignore[union-attr]
        self.critic_optimizer.step()

        t = torch.randint(self.T, (len(action), 1))
        noise = torch.randn_like(action)
        kept = self.alpha_hats[t]
        noisy = (kept.sqrt() * action + (1 - kept).sqrt() * noise).requires_grad_()
        q = sum(critic(torch.cat([observation, noisy], -1)) for critic in self.critics) / 2
        (gradient,) = torch.autograd.grad(q.sum(), noisy)
        noisy = noisy.detach()
        actor_loss = (self.denoiser(observation, noisy, t.float()) + self.m_q * gradient).square().mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        with torch.no_grad():
            for online, target in zip(self.critics.parameters(), self.targets.parameters(), strict=True):
                target.mul_(0.995).add_(0.005 * online)
