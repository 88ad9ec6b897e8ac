"""TorchRL's SAC as a loss of this package: the target by hand, who is trained by what, and the policies."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from qsm_lightning.errors import SettingError
from qsm_lightning.losses import SAC
from qsm_lightning.losses.sac import TanhGaussianPolicy
from tests.helpers import replay_batch, twin_values

OBS, A = 3, 2


def made(**settings: Any) -> SAC:
    torch.manual_seed(0)
    return SAC(OBS, A, hidden=(16, 16), gamma=0.9, alpha_init=0.3, **settings)


def test_the_critics_loss_by_hand() -> None:
    """y = r + gamma (1 - terminated) (min Qbar(s', a') - alpha log pi(a' | s')); truncation bootstraps."""
    loss, batch = made(), replay_batch()
    for p in loss.inner.target_qvalue_network_params.values(True, True):
        p.data.mul_(1.1)  # another than the online critics
    following = batch["next"]
    torch.manual_seed(5)
    value, _ = loss.qvalue_loss(batch)
    torch.manual_seed(5)
    with torch.no_grad():
        mean, std = loss._actor().module[0].module(following["observation"])
        z = torch.randn_like(mean)
        u = mean + std * z
        action = torch.tanh(u)
        log_pi = (-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi) - torch.log(1 - action.square())).sum(-1)
        next_value = (
            twin_values(loss.inner.target_qvalue_network_params, following["observation"], action).min(0).values
            - 0.3 * log_pi
        )
        y = following["reward"][:, 0] + 0.9 * (~following["terminated"][:, 0]) * next_value
        q = twin_values(loss.inner.qvalue_network_params, batch["observation"], batch["action"])
        expected = (q - y).square().mean(1).sum()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("term", ["qvalue", "actor", "alpha"])
def test_gradients_are_isolated(term: str) -> None:
    loss, batch = made(), replay_batch()
    loss.actor_loss(batch)  # alpha's loss takes its actions
    value, metrics = loss.term_loss(term, batch)
    value.backward()
    for other in loss.terms:
        parameters = loss.term_parameters(other)
        assert parameters
        assert all((p.grad is not None and bool(p.grad.any())) == (other == term) for p in parameters)
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize(("target", "too_random"), [(-50.0, True), (50.0, False)])
def test_alpha_moves_to_the_target_entropy(target: float, too_random: bool) -> None:
    """A step against the gradient lowers it when the entropy is high."""
    loss, batch = made(target_entropy=target), replay_batch()
    _, found = loss.actor_loss(batch)
    value, metrics = loss.alpha_loss(batch)
    value.backward()
    assert (found["entropy"] > target) == too_random
    assert (loss.inner.log_alpha.grad > 0) == too_random
    assert metrics["alpha"].item() == pytest.approx(0.3)


def test_the_entropy_that_is_logged_is_minus_the_mean_log_probability() -> None:
    loss, batch = made(), replay_batch()
    assert loss.inner.target_entropy == -A
    torch.manual_seed(5)
    _, metrics = loss.actor_loss(batch)
    torch.manual_seed(5)
    _, found = loss.inner.actor_loss(batch.copy())
    assert metrics["entropy"].item() == pytest.approx(-found["log_prob"].mean().item())


def test_targets_follow_by_polyak() -> None:
    loss = made()
    online, target = loss.inner.qvalue_network_params, loss.inner.target_qvalue_network_params
    for p in online.values(True, True):
        p.data += 1
    expected = [
        (0.995 * t + 0.005 * p).clone() for t, p in zip(*(p.values(True, True) for p in (target, online)), strict=True)
    ]
    loss.update_targets()
    for value, wanted in zip(target.values(True, True), expected, strict=True):
        torch.testing.assert_close(value.data, wanted.data)


def test_targets_of_a_copy_follow_the_copy() -> None:
    loss = copy.deepcopy(made())
    online, target = (
        next(iter(params.values(True, True))).data
        for params in (loss.inner.qvalue_network_params, loss.inner.target_qvalue_network_params)
    )
    online += 1
    before = target.clone()
    loss.update_targets()
    torch.testing.assert_close(target, before + 0.005 * (online - before))


def test_policies_act_with_the_weights_under_training() -> None:
    loss, observation = made(), torch.randn(4000, OBS)
    explores, evaluated = loss.exploration_policy(), loss.evaluation_policy()
    assert isinstance(explores, TanhGaussianPolicy)
    with torch.no_grad():
        mean, std = explores.gaussian(observation)
        torch.manual_seed(1)
        z = torch.atanh(explores.act(observation).double()).sub(mean).div(std)
        assert abs(z.mean()) < 0.05
        assert abs(z.std() - 1) < 0.05
        assert torch.equal(evaluated.act(observation), torch.tanh(mean))
        for p in loss.inner.actor_network_params.values(True, True):
            p.data.zero_()
        assert not evaluated.act(observation).any()
    assert loss.selectors == ("sample",)


@pytest.mark.parametrize(
    "setting", [{"gamma": 2}, {"tau": 0}, {"hidden": ()}, {"alpha_init": 0}, {"target_entropy": float("nan")}], ids=str
)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        SAC(OBS, A, **setting)  # type: ignore[arg-type]
