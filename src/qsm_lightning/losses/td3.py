"""Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv 1802.09477): TorchRL's ``TD3Loss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import ValueOperator
from torchrl.objectives import TD3Loss

from qsm_lightning.errors import require_not_negative, require_positive
from qsm_lightning.losses.base import Metrics
from qsm_lightning.losses.wrapped import WrappedLoss
from qsm_lightning.networks import MLP
from qsm_lightning.policy import ExplorationPolicy, Policy


class TD3(WrappedLoss):
    """TorchRL's TD3: policy and targets move at every ``policy_delay``-th update.

    Args:
        observation_dim: O, width of the observation; known from the environment.
        action_dim: A, width of the action; known from the environment.
        hidden: widths of the hidden layers of policy and critics.
        gamma: discount, in [0, 1].
        tau: Polyak rate of the targets, in (0, 1].
        policy_delay: updates of the critics for one of the policy and of the targets.
        policy_noise: deviation of the noise on the target policy's actions.
        noise_clip: greatest magnitude of that noise.
        action_noise: deviation of the noise added to actions when collecting.

    Raises:
        SettingError: for a value outside its range.
    """

    compilable = True
    terms = ("qvalue", "actor")
    inner: TD3Loss

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (512, 512),
        gamma: float = 0.99,
        tau: float = 0.005,
        policy_delay: int = 2,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        action_noise: float = 0.1,
    ) -> None:
        require_positive(policy_delay=policy_delay)
        require_not_negative(policy_noise=policy_noise, noise_clip=noise_clip, action_noise=action_noise)
        super().__init__(
            observation_dim, action_dim, hidden, gamma, tau, policy_noise=policy_noise, noise_clip=noise_clip
        )
        self.action_noise = action_noise
        self.every = {"actor": policy_delay, "targets": policy_delay}

    def make_actor(self, observation_dim: int, action_dim: int, hidden: Sequence[int]) -> TensorDictModuleBase:
        mlp = MLP([observation_dim, *hidden, action_dim], F.relu)
        return TensorDictModule(nn.Sequential(mlp, nn.Tanh()), ["observation"], ["action"])

    def make_inner(self, actor: TensorDictModuleBase, critics: list[ValueOperator], **settings: Any) -> TD3Loss:
        return TD3Loss(actor, critics, **settings)

    def policy(self, actor: Any, explores: bool) -> Policy:
        policy = DeterministicPolicy(actor.module)
        return ExplorationPolicy(policy, self.action_noise) if explores else policy

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The critics' loss on a replay batch [B]."""
        loss, found = self.inner.value_loss(tensordict)
        return loss, {"q_mean": found["pred_value"].mean(), "td_target_mean": found["target_value"].mean()}

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The policy's loss on a replay batch [B]."""
        return self.inner.actor_loss(tensordict)[0], {}


class DeterministicPolicy(Policy):
    """What a network gives for an observation: [N, O] -> [N, A]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def act(self, observation: Tensor) -> Tensor:
        return self.network(observation)
