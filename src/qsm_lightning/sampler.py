"""The reverse process: how a diffusion policy turns noise into an action (arXiv 2312.11752, authors' code)."""

from __future__ import annotations

import torch
from torch import Tensor

from qsm_lightning.networks import Denoiser
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
    for t in reversed(range(schedule.T)):  # T-1, ..., 0
        eps = denoiser(observation, a, torch.tensor([t], device=a.device))
        a = (a - schedule.eps_coefs[t] * eps) * schedule.inv_sqrt_alphas[t]  # posterior mean
        if t > 0:
            a = a + schedule.sigmas[t] * temperature * z[t]
        if clip:
            a = a.clamp(-1, 1)
        trajectory.append(a)
    return trajectory


def sample_action(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    observation: Tensor,
    temperature: float = 1.0,
    clip: bool = True,
) -> Tensor:
    """Draw an action [B, A] for each observation [B, O], with noise from torch's global generator."""
    noise = torch.randn(
        (schedule.T + 1, len(observation), denoiser.action_dim),
        dtype=observation.dtype,
        device=observation.device,
    )
    return reverse_process(denoiser, schedule, observation, noise[-1], noise[:-1], temperature, clip)[-1]
