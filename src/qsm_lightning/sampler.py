"""The reverse process: how a diffusion policy turns noise into an action (arXiv 2312.11752, authors' code)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsm_lightning.networks import Denoiser, eps_given
from qsm_lightning.schedule import NoiseSchedule


def reverse_process(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    observation: Tensor,
    x_T: Tensor,
    z: Tensor,
    temperature: float = 1.0,
    clip: bool = True,
) -> list[Tensor]:
    """Denoise ``x_T`` step by step with given noise.

    Args:
        denoiser: eps_theta(s, a_t, t).
        schedule: the noise schedule, T steps.
        observation: s, [B, O].
        x_T: the starting noise, [B, A].
        z: standard normal noise of each step, [T, B, A]; z[0] is not used.
        temperature: factor on the injected noise.
        clip: whether the action is clipped to [-1, 1] after every step.

    Returns:
        The T partly denoised actions [B, A] in the order t = T-1 .. 0; the last is the action.
    """
    a = x_T
    trajectory = []
    eps = eps_given(denoiser, observation, schedule.T)
    for t in reversed(range(schedule.T)):  # T-1, ..., 0
        a = schedule.reverse_mean(a, t, eps(a, t))
        if t > 0:
            a = a + schedule.sigmas[t] * temperature * z[t]
        if clip:
            a = a.clamp(-1, 1)
        trajectory.append(a)
    return trajectory


class Sampler(nn.Module):
    """Draws actions in [-1, 1], with noise from torch's global generator or given.

    Args:
        denoiser: eps_theta(s, a_t, t).
        schedule: the noise schedule.
        temperature: factor on the noise injected at each step.
        clip: whether every step is clipped to [-1, 1]; the final action always is.
    """

    def __init__(
        self, denoiser: Denoiser, schedule: NoiseSchedule, temperature: float = 1.0, clip: bool = True
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = schedule
        self.temperature = temperature
        self.clip = clip

    def noise_shape(self, batch: int) -> tuple[int, int, int]:
        """The shape of the noise of ``batch`` actions, [T + 1, B, A]."""
        return self.schedule.T + 1, batch, self.denoiser.action_dim

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Observation [B, O] -> action [B, A].

        Args:
            observation: s.
            noise: standard normal, [T + 1, B, A]: z of each step, then x_T. It is drawn unless given.
        """
        if noise is None:
            shape = self.noise_shape(len(observation))
            noise = torch.randn(shape, dtype=observation.dtype, device=observation.device)
        trajectory = reverse_process(
            self.denoiser, self.schedule, observation, noise[-1], noise[:-1], self.temperature, self.clip
        )
        return trajectory[-1].clamp(-1, 1)
