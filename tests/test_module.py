"""The LightningModule: optimizers, schedules, hyper-parameters that rebuild it."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from benchmarks.training import quiet_trainer
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from tensordict import TensorDictBase
from torch import nn

from qsm_lightning.commands import evaluate
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import Interrupted, SettingError
from qsm_lightning.evaluation import run_episodes
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
    """And so does that of M_q, which adapts to it."""
    adapting = partial(SMALL, m_q="auto", m_q_lr=1e-2)
    module = OffPolicyModule(3, 2, adapting, actor_lr=2e-3, actor_lr_decay_updates=decay)
    (critic, *others), schedulers = module.configure_optimizers()
    assert [scheduler.optimizer for scheduler in schedulers] == others
    for update in range(15):
        left = 0.5 * (1 + math.cos(math.pi * min(update, decay) / decay)) if decay else 1
        rates = [optimizer.param_groups[0]["lr"] for optimizer in (critic, *others)]
        assert rates == pytest.approx([3e-4, 2e-3 * left, 1e-2 * left], abs=1e-12)
        for optimizer, scheduler in zip(others, schedulers, strict=True):
            optimizer.step()
            scheduler.step()


def test_monitors_of_what_evaluations_or_the_users_callbacks_log() -> None:
    """The command line's refusals are in test_bad_input.py."""
    module, data = OffPolicyModule(3, 1, SMALL), OffPolicyDataModule("Pendulum-v1")
    for monitor in ("eval/return", "eval_best_of_n/length", "step"):
        module.check_callbacks(Trainer(logger=False, callbacks=[EarlyStopping(monitor)]), data)
    with pytest.raises(SettingError, match="ModelCheckpoint's monitor is 'own/metric', which is not logged"):
        module.check_callbacks(Trainer(logger=False, callbacks=[ModelCheckpoint(monitor="own/metric")]), data)

    class Own(Callback):
        """May log it."""

    module.check_callbacks(Trainer(logger=False, callbacks=[EarlyStopping("own/metric"), Own()]), data)


def test_what_is_logged_is_of_the_evaluated_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and deviation of the returns and the mean length, of each selector."""
    episodes = {"eval": ([1.0, 4.0, 10.0], [10.0, 20.0, 90.0]), "eval_best_of_n": ([2.0, 2.0, 8.0], [1.0, 2.0, 6.0])}
    given = iter([dict(zip(("return", "length"), map(torch.tensor, one), strict=True)) for one in episodes.values()])
    monkeypatch.setattr("qsm_lightning.datamodule.run_episodes", lambda *_: next(given))
    data = OffPolicyDataModule("Pendulum-v1", 1, 1, 9, 8, 8, eval_every_frames=9, eval_selector="both", eval_episodes=3)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(OffPolicyModule(3, 1, SMALL), data)
    logged = trainer.callback_metrics
    for prefix, (returns, lengths) in episodes.items():
        expected = statistics.mean(returns), statistics.pstdev(returns), statistics.mean(lengths)
        found = [logged[f"{prefix}/{name}"].item() for name in ("return", "return_std", "length")]
        assert found == pytest.approx(expected)


def clipped(gradients: list[torch.Tensor], value: float, algorithm: str | None) -> list[torch.Tensor]:
    """The gradients of one optimizer, scaled down to a norm of ``value`` over all of them, or each entry cut."""
    if algorithm == "value":
        return [g.clamp(-value, value) for g in gradients]
    norm = sum(g.square().sum() for g in gradients) ** 0.5
    return [g * min(1.0, value / float(norm)) for g in gradients]


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=["full", "bfloat16", "float16, scaled"])
@pytest.mark.parametrize(("clip", "algorithm"), [(None, None), (0.5, None), (0.02, "value")])
def test_a_training_step_is_the_plain_loop(
    clip: float | None, algorithm: Literal["value"] | None, low: torch.dtype | None, tmp_path: Path
) -> None:
    """30 updates by the Trainer equal the same updates written out with two Adams; bitwise, but for clipping."""

    class Recorded(OffPolicyDataModule):
        given: list[list[TensorDictBase]] = []
        states: list[torch.Tensor] = []

        def next_round(self) -> list[TensorDictBase]:
            updates = super().next_round()
            self.given.append([minibatch.clone() for minibatch in updates])
            self.states.append(torch.get_rng_state())
            return updates

    scale = 64.0 if low == torch.float16 else 1.0
    plugin = {
        None: None,
        torch.bfloat16: MixedPrecision("bf16-mixed", "cpu"),
        torch.float16: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale)),
    }[low]
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
        plugins=[plugin] if plugin else None,
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
                with torch.autocast("cpu", low, enabled=low is not None, cache_enabled=False):
                    loss = loss_of(row)[0]
                (loss * scale).backward()
                parameters = optimizer.param_groups[0]["params"]
                for p in parameters:
                    p.grad = p.grad / scale
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


@pytest.mark.parametrize("ema", [0, 1, -0.5, 2, math.nan])
def test_the_decay_of_the_average_lies_between_0_and_1(ema: float) -> None:
    with pytest.raises(SettingError, match="model.ema is"):
        OffPolicyModule(3, 2, SMALL, ema=ema)


# The average of the denoiser's weights.


class Weights(Callback):
    """The denoiser's weights when training begins and after every batch of one update."""

    def __init__(self) -> None:
        self.denoiser: list[list[torch.Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.denoiser.append(copied(pl_module.loss.denoiser))  # type: ignore[union-attr, arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.denoiser.append(copied(pl_module.loss.denoiser))  # type: ignore[union-attr, arg-type]


def copied(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def trained_with_average(folder: Path, *callbacks: Callback) -> OffPolicyModule:
    """20 frames of warm-up, and 10 of an update each, with an evaluation at the end."""
    torch.manual_seed(0)
    module = OffPolicyModule(3, 1, SMALL, critic_lr=1e-2, actor_lr=1e-2, ema=0.7)
    data = OffPolicyDataModule(
        "Pendulum-v1", 1, 1, 30, 20, 8, eval_every_frames=30, eval_episodes=1, rounds_per_batch=1
    )
    quiet_trainer(folder, callbacks=list(callbacks)).fit(module, data)
    return module


def test_the_average_is_exponential_over_updates(tmp_path: Path) -> None:
    weights = Weights()
    module = trained_with_average(tmp_path, weights)
    first, *after = weights.denoiser[20:]  # before the first update, and after each of ten
    assert len(after) == 10
    for i, average in enumerate(module.averages.parameters()):
        expected = 0.7**10 * first[i] + sum(0.3 * 0.7 ** (9 - n) * after[n][i] for n in range(10))
        torch.testing.assert_close(average, expected)
        assert not average.requires_grad
        assert not torch.equal(average, after[-1][i])


def test_evaluation_uses_the_average_and_collection_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also qsm-eval, and an evaluation that is interrupted leaves every weight in its place."""
    acting: list[list[torch.Tensor]] = []

    def spy(env: Any, policy: Any, *args: Any) -> dict[str, torch.Tensor]:
        acting.append(copied(policy.sampler.denoiser))
        return run_episodes(env, policy, *args)

    monkeypatch.setattr("qsm_lightning.datamodule.run_episodes", spy)
    weights = Weights()
    module = trained_with_average(tmp_path, weights)
    online, average = copied(module.loss.denoiser), copied(module.averages)  # type: ignore[arg-type]
    assert len(acting) == 2, "one evaluation with each selector"
    assert all(map(torch.equal, acting[0] + acting[1], average + average))
    assert all(map(torch.equal, online, weights.denoiser[-1]))
    collecting = module.loss.exploration_policy()
    with contextlib.suppress(Interrupted), module.averaged_weights():
        assert all(map(torch.equal, collecting.parameters(), average))
        raise Interrupted(15)
    assert all(map(torch.equal, collecting.parameters(), online))
    assert all(map(torch.equal, module.averages.parameters(), average))
    state = {
        "hyper_parameters": dict(module.hparams),
        "datamodule_hyper_parameters": {"env": "Pendulum-v1"},
        "state_dict": module.state_dict(),
        "OffPolicyDataModule": {"progress": {"frames": 30}},
    }
    torch.save(state, tmp_path / "weights.ckpt")
    acting.clear()
    monkeypatch.setattr(evaluate, "run_episodes", spy)
    evaluate.run([str(tmp_path / "weights.ckpt"), "--episodes=1"])
    assert all(map(torch.equal, acting[0], average))


def test_the_average_is_saved_and_without_it_nothing_is_added() -> None:
    plain, averaged = OffPolicyModule(3, 2, SMALL), OffPolicyModule(3, 2, SMALL, ema=0.9)
    assert all(key.startswith("loss.") for key in plain.state_dict())
    added = averaged.state_dict().keys() - plain.state_dict().keys()
    denoiser = {key.removeprefix("loss.denoiser.") for key in plain.state_dict() if key.startswith("loss.denoiser.")}
    assert added == {f"averages.0.{key}" for key in denoiser}
    again = OffPolicyModule(**dict(averaged.hparams))
    again.load_state_dict(averaged.state_dict())
    assert all(map(torch.equal, again.averages.parameters(), averaged.averages.parameters()))
    (critic, actor), _ = averaged.configure_optimizers()
    optimized = {id(p) for o in (critic, actor) for group in o.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in averaged.averages.parameters()}
    with plain.averaged_weights():
        pass
