"""Policies: TensorDictModules from observation to action. Exploration noise lives only here."""

from __future__ import annotations

from abc import abstractmethod

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from qsm_lightning.errors import TrainingFault, require_at_most, require_positive
from qsm_lightning.sampler import Sampler


def add_action_noise(action: Tensor, noise: Tensor, std: float) -> Tensor:
    """Perturb actions in [-1, 1] by ``std`` times standard normal ``noise`` of the same shape, and clip again."""
    return (action + std * noise).clamp(-1, 1)


class Policy(TensorDictModuleBase):
    """Writes ``action`` [..., A] for ``observation`` [..., O]; subclasses change :meth:`act`.

    Observations are moved to the device of the networks and actions back, so environments may live elsewhere.

    Raises:
        TrainingFault: when an action is NaN or infinite.
    """

    in_keys = ["observation"]
    out_keys = ["action"]

    @abstractmethod
    def act(self, observation: Tensor) -> Tensor:
        """Observation [N, O] -> action [N, A] in [-1, 1]."""

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict["observation"]
        action = self.checked_action(observation.reshape(-1, observation.shape[-1]))
        return tensordict.set("action", action.view(*observation.shape[:-1], -1))

    @torch.no_grad()
    def checked_action(self, observation: Tensor) -> Tensor:
        """Observation [N, O] -> action [N, A], where and in what precision the observation is."""
        action = self.act(observation.to(next(self.parameters()))).to(observation)
        if not action.isfinite().all():  # before an environment meets it
            raise TrainingFault("training diverged: the policy's action is NaN or infinite")
        return action


class DiffusionPolicy(Policy):
    """One sample of the reverse process, whose noise may be given."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        self.sampler = sampler

    def noise_shape(self, batch: int) -> tuple[int, ...]:
        """The shape of the noise that :meth:`act` takes for ``batch`` observations: [T + 1, N, A]."""
        return self.sampler.noise_shape(batch)

    def act(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Observation [N, O] -> action [N, A]; the sampler's noise is drawn unless given."""
        return self.sampler(observation, noise)


class ExplorationPolicy(Policy):
    """Another policy with Gaussian noise of deviation ``noise_std`` added to its action, as when collecting."""

    def __init__(self, policy: Policy, noise_std: float = 0.1) -> None:
        super().__init__()
        self.policy = policy
        self.noise_std = noise_std

    def act(self, observation: Tensor) -> Tensor:
        action = self.policy.act(observation)
        return add_action_noise(action, torch.randn_like(action), self.noise_std)


MOST_SAMPLES = 10_000  # memory grows with them


def check_samples(n: int, setting: str) -> None:
    """Raise :class:`SettingError` that names ``setting`` unless there can be ``n`` samples of each observation."""
    require_positive(**{setting: n})
    require_at_most(MOST_SAMPLES, **{setting: n})


class BestOfNPolicy(DiffusionPolicy):
    """Draws ``n`` actions per observation and takes the one that the smallest critic values most.

    Args:
        critics: (observation [N, O], action [N, A]) -> values [ensemble, N].
        n: number of candidates.
    """

    def __init__(self, sampler: Sampler, critics: nn.Module, n: int) -> None:
        super().__init__(sampler)
        self.critics = critics
        self.n = n

    def noise_shape(self, batch: int) -> tuple[int, ...]:
        """[T + 1, N, n, A]."""
        steps, _, action_dim = self.sampler.noise_shape(batch)
        return steps, batch, self.n, action_dim

    def act(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        candidates = observation.repeat_interleave(self.n, 0)  # [N * n, O]
        actions = super().act(candidates, None if noise is None else noise.flatten(1, 2))
        values = self.critics(candidates, actions).min(0).values.view(-1, self.n)  # [N, n]
        best = values.argmax(1)
        return actions.view(*values.shape, -1)[torch.arange(best.shape[0], device=best.device), best]
