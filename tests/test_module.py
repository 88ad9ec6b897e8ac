"""The LightningModule: optimizers, schedules, hyper-parameters that rebuild it."""

from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer

from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import SettingError
from qsm_lightning.losses import QSM
from qsm_lightning.module import OffPolicyModule, loss_from_spec, loss_spec

SMALL = partial(QSM, hidden=(8,), time_dim=4, T=2)


def test_each_optimizer_holds_its_terms_parameters_at_its_rate() -> None:
    module = OffPolicyModule(3, 2, SMALL, critic_lr=1e-3, actor_lr=2e-3)
    (critic, actor), (scheduler,) = module.configure_optimizers()
    assert {id(p) for p in critic.param_groups[0]["params"]} == {id(p) for p in module.loss.critics.parameters()}  # type: ignore[union-attr]
    assert {id(p) for p in actor.param_groups[0]["params"]} == {id(p) for p in module.loss.denoiser.parameters()}  # type: ignore[union-attr]
    assert (critic.param_groups[0]["lr"], actor.param_groups[0]["lr"]) == (1e-3, 2e-3)
    assert scheduler.optimizer is actor


@pytest.mark.parametrize("decay", [0, 10])
def test_the_actors_rate_follows_a_cosine_to_zero_and_stays_there(decay: int) -> None:
    module = OffPolicyModule(3, 2, SMALL, actor_lr=2e-3, actor_lr_decay_updates=decay)
    (_, actor), (scheduler,) = module.configure_optimizers()
    for update in range(15):
        expected = 2e-3 * (0.5 * (1 + math.cos(math.pi * min(update, decay) / decay)) if decay else 1)
        assert actor.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12)
        actor.step()
        scheduler.step()


def test_a_training_step_is_the_plain_loop(tmp_path: Path) -> None:
    """30 updates by the Trainer equal the same updates written out with two Adams, bitwise."""

    class Recorded(OffPolicyDataModule):
        given: list[torch.Tensor] = []
        states: list[torch.Tensor] = []

        def next_batch(self) -> torch.Tensor:  # type: ignore[override]
            batch = super().next_batch()
            self.given.append(batch.clone())
            self.states.append(torch.get_rng_state())
            return batch  # type: ignore[return-value]

    data = Recorded("Pendulum-v1", 1, 5, 50, 20, 8, utd=1, eval_every_frames=1000, eval_episodes=1)
    torch.manual_seed(0)
    module = OffPolicyModule(3, 1, SMALL, actor_lr_decay_updates=50)
    torch.manual_seed(0)
    plain = SMALL(3, 1)
    Trainer(
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    ).fit(module, data)
    critic = torch.optim.Adam(plain.critics.parameters(), 3e-4, fused=True)
    actor = torch.optim.Adam(plain.denoiser.parameters(), 3e-4, fused=True)
    updates = 0
    for batch, state in zip(data.given, data.states, strict=True):
        torch.set_rng_state(state)
        for row in batch:
            actor.param_groups[0]["lr"] = 3e-4 * 0.5 * (1 + math.cos(math.pi * updates / 50))
            for loss_of, optimizer in ((plain.qvalue_loss, critic), (plain.actor_loss, actor)):
                optimizer.zero_grad()
                loss_of(row)[0].backward()
                optimizer.step()
            plain.update_targets()
            updates += 1
    assert updates == 30
    trained = module.loss.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in plain.state_dict().items())


def test_hyper_parameters_rebuild_the_module_through_a_safe_file() -> None:
    module = OffPolicyModule(3, 2, SMALL, critic_lr=1e-3)
    file = io.BytesIO()
    torch.save(dict(module.hparams), file)
    file.seek(0)
    rebuilt = OffPolicyModule(**torch.load(file, weights_only=True))
    assert dict(rebuilt.hparams) == dict(module.hparams)
    rebuilt.load_state_dict(module.state_dict())


def test_a_checkpoint_can_only_name_a_loss() -> None:
    spec = loss_spec(SMALL)
    assert spec == {"class_path": "qsm_lightning.losses.qsm.QSM", "init_args": {"hidden": (8,), "time_dim": 4, "T": 2}}
    assert isinstance(loss_from_spec(spec)(3, 2), QSM)
    for name in ("os.system", "qsm_lightning.losses.deepcopy", "evil.QSM", "builtins.print"):
        with pytest.raises(SettingError, match="is not an OffPolicyLoss|cannot be imported"):
            loss_from_spec({"class_path": name, "init_args": {}})


@pytest.mark.parametrize("name", ["critic_lr", "actor_lr"])
def test_rates_must_be_positive(name: str) -> None:
    with pytest.raises(SettingError, match=f"model.{name}"):
        OffPolicyModule(3, 2, SMALL, **{name: 0.0})  # type: ignore[arg-type]


def test_a_losss_setting_is_named_in_full() -> None:
    with pytest.raises(SettingError, match=r"model\.loss\.T is 0"):
        OffPolicyModule(3, 2, partial(QSM, T=0))
