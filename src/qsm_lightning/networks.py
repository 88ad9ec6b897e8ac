"""The denoiser and the twin critics, as in the code of arXiv 2312.11752: plain modules on tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsm_lightning.precision import full_precision

TIME_HIDDEN = (128, 128)
FEW = 16_384  # numbers up to which one kernel of torch's own is faster than several


def mish(x: Tensor) -> Tensor:
    """x * tanh(softplus(x)) with one exponential: tanh(log(1 + u)) = n / (n + 2), n = u (u + 2), u = exp(x).

    For a batch on a CPU this is faster than ``torch.nn.functional.mish``, the more so when compiled; for few numbers
    that is, and is called. Above x = 20 the factor is 1 in float64.
    """
    if not torch.compiler.is_compiling() and x.numel() <= FEW:  # in this order: a traced batch has no known size
        return F.mish(x)
    u = x.clamp(max=20).exp()
    n = u * (u + 2)
    return x * (n / (n + 2))


class MLP(nn.Module):
    """Linear layers with ``activation`` between them and none after the last; Xavier-uniform weights, zero biases.

    Under autocast the products of hidden layers with each other alone are in low precision. bfloat16 would round what
    comes in to 0.4 %, and what comes out as well: a value of 300 to a multiple of 2.

    Args:
        sizes: input width, one or more hidden widths, output width.
        activation: applied between layers.
    """

    def __init__(self, sizes: Sequence[int], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        linears = [nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.layers = nn.ModuleList(linears)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        first = self.linears[0]
        return self.after_first(self.full_linear(x, first.weight, first.bias))

    def after_first(self, x: Tensor) -> Tensor:
        """What follows the first layer, from that layer's output."""
        _, *hidden, last = self.linears
        for layer in hidden:
            x = layer(self.activation(x)).to(x)
        return self.full_linear(self.activation(x), last.weight, last.bias)

    @property
    def linears(self) -> list[nn.Linear]:
        """The layers, from the first to the last."""
        return cast(list[nn.Linear], list(self.layers))

    @full_precision
    def full_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear``, in full precision also under autocast."""
        return F.linear(x, weight, bias)


class FourierFeatures(nn.Module):
    """Learnable Fourier features of the time index: t [B] -> concat(cos f, sin f) [B, dim], f = 2 pi t W.

    Always in full precision: in bfloat16 f is off by up to 0.04 radians at T = 5, and by more with more steps.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(dim // 2, 1))

    @full_precision
    def forward(self, t: Tensor) -> Tensor:
        f = 2 * torch.pi * t[:, None].to(self.weight.dtype) @ self.weight.T
        return torch.cat([f.cos(), f.sin()], -1)


class Denoiser(nn.Module):
    """The noise model eps_theta(s, a_t, t).

    Args:
        observation_dim: O.
        action_dim: A.
        hidden: widths of the trunk over concat(a_t, s, time code).
        time_dim: number of Fourier features, even.
    """

    def __init__(
        self, observation_dim: int, action_dim: int, hidden: Sequence[int] = (512, 512), time_dim: int = 64
    ) -> None:
        super().__init__()
        self.sizes = [action_dim, observation_dim, TIME_HIDDEN[-1]]
        self.action_dim = action_dim
        self.fourier = FourierFeatures(time_dim)
        self.time_encoder = MLP([time_dim, *TIME_HIDDEN], mish)
        self.trunk = MLP([action_dim + observation_dim + TIME_HIDDEN[-1], *hidden, action_dim], mish)

    def forward(self, observation: Tensor, action: Tensor, t: Tensor) -> Tensor:
        """Observation [B, O], noisy action [B, A], integer time indices t [B] or [1] -> noise [B, A]."""
        time_code = self.time_encoder(self.fourier(t)).expand(action.shape[0], -1)
        return self.trunk(torch.cat([action, observation, time_code], -1))

    @full_precision
    def prepared(self, observation: Tensor, T: int) -> Callable[[Tensor, int | Tensor], Tensor]:
        """The same function for given observations, with what is common to several calls computed once.

        The first layer is linear: W [a, s, c_t] + b = W_a a + W_s s + (W_c c_t + b), where the middle is the same at
        all time indices, and the last takes T values only.

        Args:
            observation: s, [B, O].
            T: number of time indices.

        Returns:
            (noisy action [B, A], t: a number or [B]) -> noise [B, A].
        """
        trunk = self.trunk
        weight, bias = trunk.linears[0].weight, trunk.linears[0].bias
        of_action, of_observation, of_time = weight.split(self.sizes, 1)
        indices = torch.arange(T, device=weight.device)
        time_codes = self.time_encoder(self.fourier(indices))
        times = F.linear(time_codes, of_time, bias)  # [T, H]
        observations = F.linear(observation, of_observation)  # [B, H]

        def eps(action: Tensor, t: int | Tensor) -> Tensor:
            # a product where t differs, as the gradient of an index is added up in no fixed order
            of_t = times[t] if isinstance(t, int) else trunk.full_linear((t[:, None] == indices).to(times), times.T)
            return trunk.after_first(trunk.full_linear(action, of_action) + observations + of_t)

        return eps


def eps_given(denoiser: nn.Module, observation: Tensor, T: int) -> Callable[[Tensor, int | Tensor], Tensor]:
    """eps_theta of given observations [B, O], for any denoiser: (a_t [B, A], t: a number or [B]) -> [B, A]."""
    if isinstance(denoiser, Denoiser) and type(denoiser).forward is Denoiser.forward:
        return denoiser.prepared(observation, T)
    return lambda action, t: denoiser(observation, action, torch.as_tensor(t, device=action.device).reshape(-1))


class Critics(nn.Module):
    """An ensemble of action-value functions (two by default) over concat(s, a)."""

    def __init__(
        self, observation_dim: int, action_dim: int, hidden: Sequence[int] = (512, 512), count: int = 2
    ) -> None:
        super().__init__()
        sizes = [observation_dim + action_dim, *hidden, 1]
        self.critics = nn.ModuleList(MLP(sizes, F.relu) for _ in range(count))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Observation [B, O], action [B, A] -> values [count, B]."""
        x = torch.cat([observation, action], -1)
        return torch.stack([critic(x).squeeze(-1) for critic in self.critics])
