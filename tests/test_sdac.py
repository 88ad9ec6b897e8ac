"""SDAC: the noise predictor of exp(Q / lambda), by quadrature, and who is trained by what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsm_lightning.errors import SettingError
from qsm_lightning.losses import SDAC
from tests.helpers import replay_batch

B, OBS, A = 32, 3, 2


def made(**settings: Any) -> SDAC:
    torch.manual_seed(0)
    return SDAC(OBS, A, **{"hidden": (16, 16), "time_dim": 8, "T": 3, "reverse_samples": 8, **settings})


class Parabola(nn.Module):
    """Both critics are -3 |a - 0.4|^2."""

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return (-3 * (action - 0.4).square().sum(-1)).expand(2, -1)


def test_the_target_is_the_noise_predictor_of_the_boltzmann_policy() -> None:
    """E[z | a_t] for a ~ exp(Q / lambda) on [-1, 1] under the forward process, by quadrature over a in one dimension.

    Reverse samples outside [-1, 1] are moved onto the bounds; here they are too far from the optimum to count.
    """
    torch.manual_seed(0)
    loss = SDAC(1, 1, hidden=(8,), time_dim=8, T=5, entropy_coef=0.05)
    loss.critics = Parabola()
    noisy, t = torch.tensor([[-0.2], [0.1], [0.5], [0.3], [0.0]]), torch.arange(5)
    found = loss.target_noise(torch.zeros(5, 1), noisy, t, torch.randn(400_000, 5, 1))
    a = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    for i in range(5):
        abar = loss.schedule.alpha_hats[i].double()
        z = (noisy[i].double() - abar.sqrt() * a) / (1 - abar).sqrt()
        density = torch.exp(-3 * (a - 0.4).square() / 0.05 - z.square() / 2)
        expected = (density * z).sum() / density.sum()
        assert abs(found[i].item() - expected.item()) < 0.02, i


def test_the_best_sample_is_taken_for_the_target() -> None:
    loss, observation = made(candidates=64, action_noise=0.0), torch.randn(B, OBS)
    loss.critics = Parabola()
    chosen = loss.next_action(observation)
    plain = loss.sampler(observation)
    assert (chosen - 0.4).norm(dim=-1).mean() < 0.5 * (plain - 0.4).norm(dim=-1).mean()


@pytest.mark.parametrize(("term", "trained"), [("qvalue", "critics"), ("actor", "denoiser")])
def test_gradients_are_isolated(term: str, trained: str) -> None:
    loss = made()
    value, metrics = loss.term_loss(term, replay_batch(B))
    value.backward()
    for name in ("critics", "denoiser", "target_critics"):
        grads = [p.grad is not None and bool(p.grad.any()) for p in getattr(loss, name).parameters()]
        assert all(grads) if name == trained else not any(grads)
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize(
    "setting", [{"entropy_coef": 0}, {"reverse_samples": 0}, {"reverse_samples": 10**10}, {"candidates": 0}], ids=str
)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        made(**setting)
