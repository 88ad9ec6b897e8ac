"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905): TorchRL's ``SACLoss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss

from qsm_lightning.errors import require_positive
from qsm_lightning.losses.base import Metrics, check_entropy
from qsm_lightning.losses.wrapped import WrappedLoss
from qsm_lightning.networks import MLP
from qsm_lightning.policy import Policy


class SAC(WrappedLoss):
    """TorchRL's SAC with two critics and an adaptive entropy coefficient.

    Evaluated is the mean action, tanh of the Gaussian's mean.

    Args:
        observation_dim: O, width of the observation; known from the environment.
        action_dim: A, width of the action; known from the environment.
        hidden: widths of the hidden layers of policy and critics.
        gamma: discount, in [0, 1].
        tau: Polyak rate of the target critics, in (0, 1].
        alpha_init: the entropy coefficient at the start.
        target_entropy: the entropy in nats that the coefficient is adapted to; -A by default.

    Raises:
        SettingError: for a value outside its range.
    """

    compilable = True
    terms = ("qvalue", "actor", "alpha")
    inner_class: type[SACLoss] = SACLoss
    inner: SACLoss
    _log_prob: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (512, 512),
        gamma: float = 0.99,
        tau: float = 0.005,
        alpha_init: float = 1.0,
        target_entropy: float | None = None,
    ) -> None:
        require_positive(alpha_init=alpha_init)
        check_entropy(target_entropy)
        target = "auto" if target_entropy is None else target_entropy
        super().__init__(observation_dim, action_dim, hidden, gamma, tau, alpha_init=alpha_init, target_entropy=target)

    def make_actor(self, observation_dim: int, action_dim: int, hidden: Sequence[int]) -> TensorDictModuleBase:
        mlp = MLP([observation_dim, *hidden, 2 * action_dim], F.relu)
        gaussian = TensorDictModule(nn.Sequential(mlp, NormalParamExtractor()), ["observation"], ["loc", "scale"])
        return ProbabilisticActor(
            gaussian, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True
        )

    def make_inner(self, actor: TensorDictModuleBase, critics: list[ValueOperator], **settings: Any) -> SACLoss:
        loss = self.inner_class(actor, critics, **settings)
        _ = loss.target_entropy  # it becomes part of the state at its first use: then the state is the same always
        return loss

    def policy(self, actor: Any, explores: bool) -> Policy:
        return TanhGaussianPolicy(actor.module[0].module, explores)

    def stochastic_policy(self) -> Policy:
        """Samples, which is also how it collects."""
        return self.exploration_policy()

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The critics' loss on a replay batch [B]."""
        loss, found = self.inner.qvalue_v2_loss(tensordict)
        return loss, {"td_error": found["td_error"].mean()}

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The policy's loss on a replay batch [B]."""
        loss, found = self.inner.actor_loss(tensordict.copy())  # into which it writes
        self._log_prob = found["log_prob"]
        return loss, {"entropy": -self._log_prob.mean()}

    def alpha_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The entropy coefficient's loss, with the actions that the policy's loss was computed with."""
        loss = self.inner.alpha_loss(self._log_prob).mean()
        return loss, {"alpha": self.inner.log_alpha.detach().exp()}

    def term_parameters(self, term: str) -> list[nn.Parameter]:
        return [self.inner.log_alpha] if term == "alpha" else super().term_parameters(term)


class TanhGaussianPolicy(Policy):
    """tanh of a Gaussian's sample, or of its mean.

    Args:
        gaussian: observation [N, O] -> mean and deviation, each [N, A].
        explores: whether actions are samples.
    """

    def __init__(self, gaussian: nn.Module, explores: bool) -> None:
        super().__init__()
        self.gaussian, self.explores = gaussian, explores

    def act(self, observation: Tensor) -> Tensor:
        mean, std = self.gaussian(observation)
        return torch.tanh(mean + std * torch.randn_like(mean) if self.explores else mean)
