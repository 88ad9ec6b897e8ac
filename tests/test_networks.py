"""Networks: initialisation, and the pieces written out again."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from qsm_lightning.networks import MLP, Critics, Denoiser, FourierFeatures, eps_given, mish


def test_mish_equals_torchs_over_its_range() -> None:
    x = torch.linspace(-60, 60, 40001, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mish(x), F.mish(x), rtol=1e-12, atol=1e-14)
    ours = torch.autograd.grad(mish(x).sum(), x)[0]
    theirs = torch.autograd.grad(F.mish(x).sum(), x)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_layers_are_xavier_uniform_with_zero_biases() -> None:
    torch.manual_seed(0)
    mlp = MLP([100, 300, 50], F.relu)
    for layer in mlp.layers:
        weight, bound = layer.weight, math.sqrt(6 / sum(layer.weight.shape))  # type: ignore[arg-type, union-attr]
        assert weight.abs().max() <= bound  # type: ignore[union-attr, operator]
        assert math.isclose(weight.std().item(), bound / math.sqrt(3), rel_tol=0.02)  # type: ignore[union-attr, operator]
        assert not layer.bias.any()  # type: ignore[union-attr, operator]


def test_fourier_features_take_the_integer_time() -> None:
    features = FourierFeatures(8)
    t = torch.tensor([0, 3])
    angles = 2 * math.pi * t[:, None] * features.weight[:, 0]
    torch.testing.assert_close(features(t), torch.cat([angles.cos(), angles.sin()], -1))
    assert torch.equal(features(t)[0], torch.tensor([1.0] * 4 + [0.0] * 4))


def test_fourier_features_begin_with_a_deviation_of_a_fifth() -> None:
    torch.manual_seed(0)
    assert math.isclose(FourierFeatures(40_000).weight.std().item(), 0.2, rel_tol=0.02)


def test_one_time_index_serves_the_whole_batch() -> None:
    torch.manual_seed(0)
    denoiser, observation, action = Denoiser(3, 2, (8,)), torch.randn(5, 3), torch.randn(5, 2)
    one = denoiser(observation, action, torch.tensor([4]))
    torch.testing.assert_close(one, denoiser(observation, action, torch.full((5,), 4)))


def test_a_prepared_denoiser_is_the_same_function() -> None:
    """Values and every gradient, for one time index and for one of each frame."""
    torch.manual_seed(0)
    denoiser, observation = Denoiser(3, 2, (16, 16)).double(), torch.randn(50, 3).double()
    action, indices = torch.randn(50, 2).double(), torch.randint(7, (50,))
    eps = denoiser.prepared(observation, 7)
    for t, prepared in [(indices, eps(action, indices)), *((torch.tensor([t]), eps(action, t)) for t in range(7))]:
        plain = denoiser(observation, action, t)
        torch.testing.assert_close(prepared, plain, rtol=1e-12, atol=1e-12)
        gradients = [
            torch.autograd.grad(out.square().sum(), list(denoiser.parameters()), retain_graph=True)
            for out in (prepared, plain)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Shifted(Denoiser):
    def forward(self, observation: torch.Tensor, action: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(observation, action, t) + t[:, None]


def test_a_denoiser_with_a_forward_of_its_own_is_called() -> None:
    torch.manual_seed(0)
    denoiser, observation, action = Shifted(3, 2, (8,)), torch.randn(5, 3), torch.randn(5, 2)
    eps = eps_given(denoiser, observation, 4)
    assert torch.equal(eps(action, 3), denoiser(observation, action, torch.tensor([3])))
    t = torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(eps(action, t), denoiser(observation, action, t))


def test_critics_are_independent() -> None:
    torch.manual_seed(0)
    critics = Critics(3, 2, (8,))
    q = critics(torch.randn(5, 3), torch.randn(5, 2))
    assert q.shape == (2, 5)
    assert not torch.allclose(q[0], q[1])
    q[0].sum().backward()
    assert not any(p.grad.any() for p in critics.critics[1].parameters())  # type: ignore[union-attr, operator]
