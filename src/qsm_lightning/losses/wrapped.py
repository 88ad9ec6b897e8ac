"""Losses of TorchRL behind this package's contract, with no maths of their own: what SAC and TD3 share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, ValueEstimators

from qsm_lightning.losses.base import Metrics, OffPolicyLoss, check_gamma, check_hidden, check_tau
from qsm_lightning.networks import MLP
from qsm_lightning.policy import Policy


class ActionValue(nn.Module):
    """An MLP over concat(s, a), as in :class:`~qsm_lightning.networks.Critics`: [..., O], [..., A] -> [..., 1]."""

    def __init__(self, observation_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.mlp = MLP([observation_dim + action_dim, *hidden, 1], F.relu)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.mlp(torch.cat([observation, action], -1))


class WrappedLoss(OffPolicyLoss):
    """One of TorchRL's actor-critic losses, ``inner``, with twin critics.

    Subclasses build the policy and the loss, and hand the terms on.

    Args:
        observation_dim: O.
        action_dim: A.
        hidden: widths of the hidden layers of policy and critics.
        gamma: discount, in [0, 1].
        tau: Polyak rate of the targets, in (0, 1].
        **settings: TorchRL's.

    Raises:
        SettingError: for a value outside its range.
    """

    selectors = ("sample",)
    _renames = False

    def __init__(
        self, observation_dim: int, action_dim: int, hidden: Sequence[int], gamma: float, tau: float, **settings: Any
    ) -> None:
        super().__init__()
        check_hidden(hidden)
        check_gamma(gamma)
        check_tau(tau)
        actor = self.make_actor(observation_dim, action_dim, hidden)
        self._empty_actor = [deepcopy(actor)]  # in a list: its weights are not this loss's
        critics = [
            ValueOperator(ActionValue(observation_dim, action_dim, hidden), ["observation", "action"]) for _ in range(2)
        ]
        bounds = Bounded(-1, 1, (action_dim,))
        settings |= {"loss_function": "l2", "action_spec": bounds, "deactivate_vmap": True}  # two critics, one by one
        self.inner = self.make_inner(actor, critics, **settings)
        self.inner.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
        self.tau = tau

    @abstractmethod
    def make_actor(self, observation_dim: int, action_dim: int, hidden: Sequence[int]) -> TensorDictModuleBase:
        """The policy in the form that TorchRL's loss wants."""

    @abstractmethod
    def make_inner(self, actor: TensorDictModuleBase, critics: list[ValueOperator], **settings: Any) -> LossModule:
        """TorchRL's loss."""

    @abstractmethod
    def policy(self, actor: TensorDictModuleBase, explores: bool) -> Policy:
        """The policy that acts with ``actor``."""

    def set_keys(self, **kwargs: Any) -> None:
        super().set_keys(**kwargs)
        self._renames = self.tensor_keys != self.default_keys()

    def term_loss(self, term: str, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        return super().term_loss(term, self._renamed(tensordict) if self._renames else tensordict)

    def _renamed(self, tensordict: TensorDictBase) -> TensorDictBase:
        """A replay batch [B] with the keys that TorchRL's loss has its networks for."""
        keys, following = self.tensor_keys, tensordict["next"]
        after = {
            "observation": following[keys.observation],
            "reward": following[keys.reward],
            "terminated": following[keys.terminated],
        }
        now = {"observation": tensordict[keys.observation], "action": tensordict[keys.action]}
        size = tensordict.batch_size
        return TensorDict({**now, "next": TensorDict(after, size)}, size)

    def term_modules(self, term: str) -> list[nn.Module]:
        return [self.inner.qvalue_network_params if term == "qvalue" else self.inner.actor_network_params]

    def update_targets(self) -> None:
        """target <- (1 - tau) target + tau online."""
        for name in ("actor_network", "qvalue_network"):
            targets = getattr(self.inner, f"target_{name}_params")
            online = getattr(self.inner, f"{name}_params")
            if next(targets.values(True, True)) is not next(online.values(True, True)):  # SAC has no target policy
                moved, by = ([p.data for p in params.values(True, True)] for params in (targets, online))
                torch._foreach_lerp_(moved, by, self.tau)

    def exploration_policy(self) -> Policy:
        return self.policy(self._actor(), explores=True)

    def evaluation_policy(self, selector: str = "sample", n: int = 32) -> Policy:
        """The deterministic policy, which is what is usually reported; there is no other ``selector``."""
        return self.policy(self._actor(), explores=False)

    def _actor(self) -> Any:
        """The policy as a module that holds the parameters under training."""
        actor = deepcopy(self._empty_actor[0])
        self.inner.actor_network_params.to_module(actor)
        return actor
