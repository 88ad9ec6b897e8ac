"""TorchRL's TD3 as a loss of this package: the target by hand, delays, who is trained by what, and the policies."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.training import quiet_trainer
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import SettingError
from qsm_lightning.losses import TD3
from qsm_lightning.losses.td3 import DeterministicPolicy
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.policy import ExplorationPolicy
from tests.helpers import replay_batch, twin_values

OBS, A = 3, 2


def made() -> TD3:
    torch.manual_seed(0)
    return TD3(OBS, A, hidden=(16, 16), gamma=0.9)


def acted(params: Any, observation: Tensor) -> Tensor:
    """The policy's action [B, A], written out."""
    params, x = params.flatten_keys(), observation
    for i in range(3):
        x = torch.nn.functional.linear(
            x if i == 0 else x.relu(), params[f"module.0.layers.{i}.weight"], params[f"module.0.layers.{i}.bias"]
        )
    return torch.tanh(x)


def test_the_losses_by_hand() -> None:
    """y = r + gamma (1 - terminated) min Qbar(s', clip(pibar(s') + clip(noise))); the policy climbs one critic."""
    loss, batch = made(), replay_batch()
    inner, following = loss.inner, batch["next"]
    for params in (inner.target_qvalue_network_params, inner.target_actor_network_params):
        for p in params.values(True, True):
            p.data.mul_(1.2)
    torch.manual_seed(5)
    value, _ = loss.qvalue_loss(batch)
    torch.manual_seed(5)
    with torch.no_grad():
        noise = (0.2 * torch.randn_like(batch["action"])).clamp(-0.5, 0.5)
        action = (acted(inner.target_actor_network_params, following["observation"]) + noise).clamp(-1, 1)
        next_value = twin_values(inner.target_qvalue_network_params, following["observation"], action).min(0).values
        y = following["reward"][:, 0] + 0.9 * (~following["terminated"][:, 0]) * next_value
        q = twin_values(inner.qvalue_network_params, batch["observation"], batch["action"])
        climbed = acted(inner.actor_network_params, batch["observation"])
        first = twin_values(inner.qvalue_network_params, batch["observation"], climbed)[0]
    torch.testing.assert_close(value.detach(), (q - y).square().mean(1).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.actor_loss(batch)[0].detach(), -first.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("term", ["qvalue", "actor"])
def test_gradients_are_isolated(term: str) -> None:
    loss = made()
    loss.term_loss(term, replay_batch())[0].backward()
    for other in loss.terms:
        parameters = loss.term_parameters(other)
        assert parameters
        assert all((p.grad is not None and bool(p.grad.any())) == (other == term) for p in parameters)


class Moves(Callback):
    """Which of critics, policy and targets moved in each update."""

    def __init__(self) -> None:
        self.moved: list[str] = []
        self.before: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        inner, updates = pl_module.loss.inner, pl_module.updates
        now = {
            "q": next(iter(inner.qvalue_network_params.values(True, True))).clone(),
            "p": next(iter(inner.actor_network_params.values(True, True))).clone(),
            "t": next(iter(inner.target_qvalue_network_params.values(True, True))).clone(),
            "u": next(iter(inner.target_actor_network_params.values(True, True))).clone(),
        }
        if updates:
            self.moved.append("".join(name for name in now if not torch.equal(now[name], self.before[name])))
        self.before = now


def test_policy_and_targets_are_delayed(tmp_path: Path) -> None:
    """At every third update here; tests/test_resume.py stops a run between two of them."""
    moves = Moves()
    make = partial(
        OffPolicyDataModule, "Pendulum-v1", 1, 1, init_random_frames=20, batch_size=8, eval_every_frames=30,
        eval_episodes=1, rounds_per_batch=1,
    )  # fmt: skip
    module = OffPolicyModule(3, 1, partial(TD3, hidden=(8,), policy_delay=3))
    quiet_trainer(tmp_path, callbacks=[moves], accelerator="cpu").fit(module, make(total_frames=27))
    assert moves.moved == ["q", "q", "qptu", "q", "q", "qptu", "q"]
    assert module.updates == 7


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
    loss, observation = made(), torch.zeros(4000, OBS)
    explores, evaluated = loss.exploration_policy(), loss.evaluation_policy()
    assert isinstance(evaluated, DeterministicPolicy)
    assert isinstance(explores, ExplorationPolicy)
    assert isinstance(explores.policy, DeterministicPolicy)
    with torch.no_grad():
        action = acted(loss.inner.actor_network_params, observation)
        assert torch.equal(evaluated.act(observation), action)
        noise = explores.act(observation) - action
        assert abs(noise.mean()) < 0.01
        assert abs(noise.std() - 0.1) < 0.01
        for p in loss.inner.actor_network_params.values(True, True):
            p.data.zero_()
        assert not evaluated.act(observation).any()
    assert loss.selectors == ("sample",)


@pytest.mark.parametrize(
    "setting",
    [{"gamma": 2}, {"policy_delay": 0}, {"policy_noise": -1}, {"noise_clip": -1}, {"action_noise": -1}],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        TD3(OBS, A, **setting)  # type: ignore[arg-type]
