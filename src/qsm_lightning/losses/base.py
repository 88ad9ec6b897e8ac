"""What the trainer needs of an algorithm, on top of TorchRL's LossModule contract."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.objectives import LossModule

from qsm_lightning.errors import require

Metrics = dict[str, Tensor]
WIDEST = 100_000  # layer


def non_finite(metrics: Metrics) -> str | None:
    """Which of an update's losses and metrics is NaN or infinite, in words; None when none is."""
    if not metrics or torch.stack(list(metrics.values())).isfinite().all():
        return None
    return next(f"{name} is {value.item()}" for name, value in metrics.items() if not value.isfinite())


class OffPolicyLoss(LossModule):
    """Base of the algorithms in this folder.

    A subclass names its ``terms`` in the order in which they are optimized. For each term x it defines
    ``x_loss(tensordict) -> (loss, detached metrics)`` and lists its modules in ``term_modules(x)``, or, where it trains
    a parameter that is in none, that in ``term_parameters(x)``; the trainer makes one optimizer per term. Networks,
    targets and the maths are the loss's own; how often and with what they are stepped is not. ``every`` says of terms,
    and of ``targets``, at which updates they are stepped where that is not all of them: at every second, say.
    ``learning_rates`` are of terms that have one of their own; ``actor_lr_decay_updates`` is what the trainer's setting
    of that name is by default. ``selectors`` are the kinds of :meth:`evaluation_policy` that there are. With a
    ``window`` of more than 1, each entry of a replay batch is that many consecutive frames
    (:meth:`~qsm_lightning.replay.FrameBuffer.sample_windows`). ``fixed`` are settings of a base class that this one
    sets itself.

    A class may say of itself, not for its subclasses, that it is ``compilable``: that ``x_loss`` and
    ``update_targets`` read and change nothing between two updates but the content of tensors. A number that is counted
    up or annealed would keep its first value in a compiled update; as a buffer it does not.
    """

    @dataclass
    class _AcceptedKeys:
        observation: NestedKey = "observation"
        action: NestedKey = "action"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    terms: tuple[str, ...] = ()
    window: int = 1
    every: Mapping[str, int] = {}
    learning_rates: Mapping[str, float] = {}
    actor_lr_decay_updates: int = 0
    selectors: tuple[str, ...] = ("sample", "best_of_n")
    fixed: tuple[str, ...] = ()
    compilable = False

    @property
    def functional(self) -> bool:
        """False: networks are ordinary modules with parameters of their own."""
        return False

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys read from a replay batch."""
        keys = self.tensor_keys
        return [
            keys.observation,
            keys.action,
            ("next", keys.observation),
            ("next", keys.reward),
            ("next", keys.terminated),
        ]

    @property
    def out_keys(self) -> list[str]:
        """Names of the losses that :meth:`forward` returns; metrics come beside them."""
        return [f"loss_{term}" for term in self.terms]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Every term's loss as ``loss_<term>`` and its detached metrics, from a replay batch [B].

        All are of the parameters as they are. Training asks for one term after the other (:meth:`term_loss`), each
        after the step of the one before.
        """
        out: dict[str, Tensor] = {}
        for term in self.terms:
            loss, metrics = self.term_loss(term, tensordict)
            out |= {f"loss_{term}": loss, **metrics}
        return TensorDict(out)

    def term_loss(self, term: str, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The loss (scalar) and detached metrics of one term on a replay batch [B]."""
        return getattr(self, f"{term}_loss")(tensordict)

    @abstractmethod
    def term_modules(self, term: str) -> list[nn.Module]:
        """The modules whose parameters ``term`` trains."""

    def term_parameters(self, term: str) -> list[nn.Parameter]:
        """The parameters that ``term`` trains."""
        return [p for module in self.term_modules(term) for p in module.parameters()]

    def check_selector(self, selector: str, setting: str, also: tuple[str, ...] = ()) -> None:
        """Raise :class:`SettingError` that names ``setting`` unless ``selector`` is one of these policies.

        Args:
            selector: what was asked for.
            setting: by what.
            also: what may be asked for there besides this algorithm's ``selectors``.
        """
        known = (*self.selectors, *also)
        require(selector in known, f"{setting} is {selector}: {type(self).__name__} has {' and '.join(known)}")

    def check_env(self, env: EnvBase) -> None:
        """Raise :class:`SettingError` when the environment lacks something that this algorithm needs of it."""

    @abstractmethod
    def update_targets(self) -> None:
        """Move the target networks after the optimizers have stepped."""

    @abstractmethod
    def exploration_policy(self) -> TensorDictModuleBase:
        """The policy that collects data; it shares parameters with the loss."""

    @abstractmethod
    def evaluation_policy(self, selector: str = "sample", n: int = 32) -> TensorDictModuleBase:
        """The policy without exploration noise; ``selector`` is ``sample`` or ``best_of_n`` of ``n`` samples."""

    def stochastic_policy(self) -> TensorDictModuleBase:
        """The learned distribution: a draw for every action, and no noise that is added to explore."""
        return self.evaluation_policy()


def check_gamma(gamma: float) -> None:
    """Raise :class:`SettingError` unless ``gamma`` is a discount per step."""
    require(0 <= gamma <= 1, f"gamma is {gamma}: it must be between 0 and 1")


def check_entropy(target_entropy: float | None) -> None:
    """Raise :class:`SettingError` unless ``target_entropy``, in nats, is finite or None."""
    require(
        target_entropy is None or math.isfinite(target_entropy),
        f"target_entropy is {target_entropy}: it must be a finite number, or null for the default",
    )


def check_tau(tau: float) -> None:
    """Raise :class:`SettingError` unless ``tau`` is a Polyak rate."""
    require(0 < tau <= 1, f"tau is {tau}: it must be above 0 and at most 1")


def check_hidden(hidden: Sequence[int]) -> None:
    """Raise :class:`SettingError` unless ``hidden`` has widths of layers."""
    require(len(hidden) > 0, "hidden is empty: give at least one layer width, such as [256, 256]")
    require(
        all(0 < width <= WIDEST for width in hidden),
        f"hidden is {list(hidden)}: every width must be greater than 0 and at most {WIDEST}",
    )


@torch.no_grad()
def polyak_update(online: nn.Module, target: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
