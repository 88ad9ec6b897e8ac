"""Networks: initialisation, and the pieces written out again."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from qsm_lightning.networks import MLP, Critics, Denoiser, FourierFeatures, mish


def test_mish_equals_torchs_over_its_range() -> None:
    x = torch.linspace(-60, 60, 4001, dtype=torch.float64, requires_grad=True)
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


def test_one_time_index_serves_the_whole_batch() -> None:
    torch.manual_seed(0)
    denoiser, observation, action = Denoiser(3, 2, (8,)), torch.randn(5, 3), torch.randn(5, 2)
    one = denoiser(observation, action, torch.tensor([4]))
    torch.testing.assert_close(one, denoiser(observation, action, torch.full((5,), 4)))


def test_critics_are_independent() -> None:
    torch.manual_seed(0)
    critics = Critics(3, 2, (8,))
    q = critics(torch.randn(5, 3), torch.randn(5, 2))
    assert q.shape == (2, 5)
    assert not torch.allclose(q[0], q[1])
    q[0].sum().backward()
    assert not any(p.grad.any() for p in critics.critics[1].parameters())  # type: ignore[union-attr, operator]
