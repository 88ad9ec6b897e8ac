r"""Noise schedules of the forward process, with every coefficient derived once.

The forward process is :math:`a_t = \sqrt{\bar\alpha_t}\, a + \sqrt{1 - \bar\alpha_t}\, z`, with
:math:`\alpha_t = 1 - \beta_t`, :math:`\bar\alpha_t = \prod_{s \le t} \alpha_s` and t = 0 .. T-1
(Ho et al. 2020, arXiv 2006.11239; the three schedules as in the code of arXiv 2312.11752).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from qsm_lightning.errors import SettingError, require, require_at_most

ScheduleName = Literal["vp", "cosine", "linear"]


def vp_betas(T: int, b_min: float = 0.1, b_max: float = 10.0) -> Tensor:
    """Variance-preserving schedule, t = 1 .. T: the terminal alpha-bar is exp(-(b_min + b_max) / 2) for every T."""
    t = torch.arange(1, T + 1, dtype=torch.float64)
    return 1 - torch.exp(-b_min / T - 0.5 * (b_max - b_min) * (2 * t - 1) / T**2)


def cosine_betas(T: int, s: float = 0.008) -> Tensor:
    """Cosine schedule (Nichol and Dhariwal 2021, arXiv 2102.09672), betas clipped to [0, 0.999]."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    alpha_hats = torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2
    return (1 - alpha_hats[1:] / alpha_hats[:-1]).clamp(0, 0.999)


def linear_betas(T: int, beta_first: float = 1e-4, beta_last: float = 2e-2) -> Tensor:
    """Linear schedule (Ho et al. 2020). With few steps it leaves most of the action unnoised: prefer ``vp``."""
    return torch.linspace(beta_first, beta_last, T, dtype=torch.float64)


BETAS: dict[str, Callable[[int], Tensor]] = {"vp": vp_betas, "cosine": cosine_betas, "linear": linear_betas}


class NoiseSchedule(nn.Module):
    """Coefficients of the forward and the reverse process, each a buffer [T]; ``sigmas`` is a list of T numbers.

    Args:
        name: ``vp``, ``cosine`` or ``linear``.
        T: number of denoising steps, at least 1.

    Raises:
        SettingError: for an unknown name, T < 1 or T > 10,000.
    """

    betas: Tensor
    alphas: Tensor
    alpha_hats: Tensor
    sqrt_alpha_hats: Tensor
    sqrt_one_minus_alpha_hats: Tensor
    eps_coefs: Tensor
    inv_sqrt_alphas: Tensor

    def __init__(self, name: ScheduleName = "vp", T: int = 5) -> None:
        super().__init__()
        require(T >= 1, f"T is {T}: a diffusion policy needs at least 1 denoising step")
        require_at_most(10_000, T=T)
        if name not in BETAS:
            raise SettingError(f"schedule is {name!r}: choose one of {', '.join(BETAS)}")
        betas = BETAS[name](T)
        alphas = 1 - betas
        alpha_hats = alphas.cumprod(0)
        coefficients = {
            "betas": betas,
            "alphas": alphas,
            "alpha_hats": alpha_hats,
            # forward process q(a_t | a)
            "sqrt_alpha_hats": alpha_hats.sqrt(),
            "sqrt_one_minus_alpha_hats": (1 - alpha_hats).sqrt(),
            # reverse process p(a_{t-1} | a_t): mean = (a_t - eps_coef * eps) * inv_sqrt_alpha, deviation sigma
            "eps_coefs": betas / (1 - alpha_hats).sqrt(),
            "inv_sqrt_alphas": alphas.rsqrt(),
        }
        # the same as numbers, for one t at a time
        numbers = (coefficients[name].tolist() for name in ("eps_coefs", "inv_sqrt_alphas"))
        self._steps: list[tuple[float, float]] = list(zip(*numbers, strict=True))
        self.sigmas: list[float] = betas.sqrt().tolist()
        self._exact = coefficients
        for key, value in coefficients.items():
            self.register_buffer(key, value.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        """As ``nn.Module`` does, but that in another precision the coefficients are rounded from float64 alone."""
        before = self.betas.dtype
        super()._apply(fn, recurse)
        if self.betas.dtype != before:
            for key, exact in self._exact.items():
                getattr(self, key).copy_(exact)
        return self

    @property
    def T(self) -> int:
        """Number of denoising steps."""
        return len(self.betas)

    def add_noise(self, action: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The forward process: ``action`` [B, A] at time indices ``t`` [B] with ``noise`` [B, A] -> a_t [B, A]."""
        return self.sqrt_alpha_hats[t, None] * action + self.sqrt_one_minus_alpha_hats[t, None] * noise

    def reverse_mean(self, noisy: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """The reverse process: a_t ``noisy`` [B, A] at ``t``, a number or [B], and its noise ``eps`` [B, A] -> mean."""
        number = isinstance(t, int)
        coef, scale = self._steps[t] if number else (self.eps_coefs[t, None], self.inv_sqrt_alphas[t, None])
        return (noisy - coef * eps) * scale
