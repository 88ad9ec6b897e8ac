"""The LightningModule: optimizers, schedules, hyper-parameters that rebuild it."""

from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins import MixedPrecision

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


def clipped(gradients: list[torch.Tensor], value: float, algorithm: str | None) -> list[torch.Tensor]:
    """The gradients of one optimizer, scaled down to a norm of ``value`` over all of them, or each entry cut."""
    if algorithm == "value":
        return [g.clamp(-value, value) for g in gradients]
    norm = sum(g.square().sum() for g in gradients) ** 0.5
    return [g * min(1.0, value / float(norm)) for g in gradients]


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(("clip", "algorithm"), [(None, None), (0.5, None), (0.02, "value")])
def test_a_training_step_is_the_plain_loop(
    clip: float | None, algorithm: Literal["value"] | None, scaled: bool, tmp_path: Path
) -> None:
    """30 updates by the Trainer equal the same updates written out with two Adams; bitwise, but for clipping."""

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
    module.set_gradient_clipping(clip, algorithm)
    torch.manual_seed(0)
    plain = SMALL(3, 1)
    Trainer(
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 64.0))] if scaled else None,
        default_root_dir=tmp_path,
    ).fit(module, data)
    critic = torch.optim.Adam(plain.critics.parameters(), 3e-4, fused=True)
    actor = torch.optim.Adam(plain.denoiser.parameters(), 3e-4, fused=True)
    updates = cuts = 0
    for batch, state in zip(data.given, data.states, strict=True):
        torch.set_rng_state(state)
        for row in batch:
            actor.param_groups[0]["lr"] = 3e-4 * 0.5 * (1 + math.cos(math.pi * updates / 50))
            for loss_of, optimizer in ((plain.qvalue_loss, critic), (plain.actor_loss, actor)):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16, enabled=scaled, cache_enabled=False):
                    loss = loss_of(row)[0]
                (loss * (64 if scaled else 1)).backward()
                parameters = optimizer.param_groups[0]["params"]
                for p in parameters:
                    p.grad = p.grad / (64 if scaled else 1)
                if clip is not None:
                    cut = clipped([p.grad for p in parameters], clip, algorithm)
                    for p, g in zip(parameters, cut, strict=True):
                        cuts += int(not torch.equal(p.grad, g))
                        p.grad = g
                optimizer.step()
            plain.update_targets()
            updates += 1
    assert updates == 30
    assert (cuts > 100) == (clip is not None)
    trained, written_out = module.loss.state_dict(), plain.state_dict()
    for key, value in written_out.items():
        if clip is None:
            assert torch.equal(value, trained[key])
        else:
            torch.testing.assert_close(value, trained[key])


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


@pytest.mark.parametrize("settings", [(0.0, None), (-1.0, None), (math.nan, None), (1.0, "mean")])
def test_clipping_out_of_range_is_refused(settings: Any) -> None:
    with pytest.raises(SettingError, match="trainer.gradient_clip_"):
        OffPolicyModule(3, 2, SMALL).set_gradient_clipping(*settings)
