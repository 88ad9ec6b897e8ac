"""Policies: TensorDictModules from observation to action. Exploration noise lives only here."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from qsm_lightning.networks import Denoiser
from qsm_lightning.sampler import sample_action
from qsm_lightning.schedule import NoiseSchedule

Selector = Literal["sample", "best_of_n"]


def add_action_noise(action: Tensor, noise: Tensor, std: float) -> Tensor:
    """Perturb actions in [-1, 1] by ``std`` times standard normal ``noise`` of the same shape, and clip again."""
    return (action + std * noise).clamp(-1, 1)


class Policy(TensorDictModuleBase):
    """Writes ``action`` [..., A] for ``observation`` [..., O]; subclasses define :meth:`act` on [N, O].

    Observations are moved to the device of the networks and actions back, so environments may live elsewhere.
    """

    in_keys = ["observation"]
    out_keys = ["action"]

    def __init__(self, denoiser: Denoiser, schedule: NoiseSchedule, temperature: float = 1.0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = schedule
        self.temperature = temperature

    def act(self, observation: Tensor) -> Tensor:
        """Observation [N, O] -> action [N, A] in [-1, 1]: one sample of the reverse process."""
        return sample_action(self.denoiser, self.schedule, observation, self.temperature)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict["observation"]
        weight = next(self.parameters())
        action = self.act(
            observation.flatten(0, -2).to(weight) if observation.ndim > 1 else observation[None].to(weight)
        )
        return tensordict.set("action", action.view(*observation.shape[:-1], -1).to(observation))


class ExplorationPolicy(Policy):
    """The diffusion policy with Gaussian noise of deviation ``noise_std`` added to its action, as when collecting."""

    def __init__(
        self, denoiser: Denoiser, schedule: NoiseSchedule, temperature: float = 1.0, noise_std: float = 0.1
    ) -> None:
        super().__init__(denoiser, schedule, temperature)
        self.noise_std = noise_std

    def act(self, observation: Tensor) -> Tensor:
        action = super().act(observation)
        return add_action_noise(action, torch.randn_like(action), self.noise_std)


class BestOfNPolicy(Policy):
    """Draws ``n`` actions per observation and takes the one that the smallest critic values most.

    Args:
        critics: (observation [N, O], action [N, A]) -> values [ensemble, N].
        n: number of candidates.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        critics: nn.Module,
        n: int,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(denoiser, schedule, temperature)
        self.critics = critics
        self.n = n

    def act(self, observation: Tensor) -> Tensor:
        candidates = observation.repeat_interleave(self.n, 0)  # [N * n, O]
        actions = super().act(candidates)
        values = self.critics(candidates, actions).min(0).values.view(-1, self.n)  # [N, n]
        best = values.argmax(1)
        return actions.view(len(observation), self.n, -1)[torch.arange(len(best)), best]
