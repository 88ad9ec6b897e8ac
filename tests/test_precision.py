"""Precision: what stays in full, how near bfloat16 comes, and a loss scaler that skips steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.training import quiet_trainer
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins import MixedPrecision
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from qsm_lightning import callbacks as cb
from qsm_lightning import checkpoints
from qsm_lightning.commands import evaluate
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import SettingError, TrainingFault
from qsm_lightning.evaluation import run_episodes
from qsm_lightning.losses import ALGORITHMS, CQSM, QSM, SDAC, DiffusionQL, QSMLoss
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.networks import MLP, Critics, Denoiser
from qsm_lightning.precision import check_precision
from tests.compare import differences, state
from tests.helpers import SHRINK, replay_batch
from tests.processes import trained
from tests.test_parity import CASES, rebuilt

SIZES: dict[str, Any] = {"hidden": (8,), "time_dim": 4, "T": 2}


def parity_batch(x: dict[str, Tensor]) -> TensorDict:
    """The reference file's batch as a replay batch."""
    following = {
        "observation": x["batch/next_observation"],
        "reward": x["batch/reward"][:, None],
        "terminated": x["batch/terminated"].bool()[:, None],
    }
    size = [len(x["batch/action"])]
    return TensorDict(
        {
            "observation": x["batch/observation"],
            "action": x["batch/action"],
            "next": TensorDict(following, size),
        },
        size,
    )


def losses(loss: QSMLoss, batch: TensorDict, dtype: torch.dtype | None) -> TensorDict:
    """Both losses and their metrics, always with the same noise; ``dtype`` is autocast's, None for none."""
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return loss(batch)


@pytest.mark.parametrize("score_at", ["noisy", "clean", "denoised"])
@pytest.mark.parametrize("case", CASES)
def test_losses_in_bfloat16_are_within_two_percent_of_float32(case: str, score_at: Any) -> None:
    loss, x = rebuilt(case, torch.float32)
    loss.score_at = score_at
    full, low = (losses(loss, parity_batch(x), dtype) for dtype in (None, torch.bfloat16))
    for key in loss.out_keys:
        assert low[key].dtype == torch.float32
        assert low[key].item() != full[key].item(), "the trained pass is not in bfloat16"
        assert low[key].item() == pytest.approx(full[key].item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_networks_give_values_that_the_low_precision_does_not_have(dtype: torch.dtype) -> None:
    """1000.3 is 1000 in either: without it neighbouring actions of a large value would be worth the same."""
    critics, denoiser = Critics(3, 1, (8, 8)), Denoiser(3, 1, (8, 8), 4)
    with torch.no_grad():
        for network in (*critics.critics, denoiser.trunk):
            weight, bias = list(network.parameters())[-2:]
            weight.zero_()
            bias.fill_(1000.3)
    observation, action, t = torch.randn(5, 3), torch.rand(5, 1), torch.zeros(5, dtype=torch.int64)
    with torch.autocast("cpu", dtype):
        assert torch.equal(critics(observation, action), torch.full((2, 5), 1000.3))
        assert torch.equal(denoiser(observation, action, t), torch.full((5, 1), 1000.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_targets_and_action_gradients_are_float32_under_autocast(case: str, dtype: torch.dtype) -> None:
    """Bitwise what they are without it; so are the next actions."""
    loss, x = rebuilt(case, torch.float32)
    observation, action = x["batch/next_observation"], x["batch/action"]
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=enabled):
            next_action = loss.next_action(observation)
            y = loss.td_target(x["batch/reward"], x["batch/terminated"].bool(), observation, next_action)
            results.append((next_action, y, loss.q_gradient(observation, action)))
    for full, cast in zip(*results, strict=True):
        assert cast.dtype == torch.float32
        assert torch.equal(full, cast)
    full, low = (losses(loss, parity_batch(x), d) for d in (None, dtype))
    for key in ("td_target_mean", "q_grad_norm"):
        assert torch.equal(full[key], low[key])


DEEP: dict[str, Any] = SIZES | {"hidden": (8, 8)}  # products of hidden layers are what autocast makes low
FULL: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor, Tensor], Any]]] = {
    "qsm slope_left": (
        lambda: QSM(3, 2, **DEEP, m_q="auto", score_at="denoised"),
        lambda loss, s, a: loss.slope_left(s, a, torch.randn_like(a)),
    ),
    "sdac next_action": (lambda: SDAC(3, 2, **DEEP), lambda loss, s, a: loss.next_action(s)),
    "sdac target_noise": (
        lambda: SDAC(3, 2, **DEEP),
        lambda loss, s, a: loss.target_noise(s, a, torch.zeros(len(a), dtype=torch.long), torch.randn(8, *a.shape)),
    ),
    "diffusion_ql next_action": (lambda: DiffusionQL(3, 2, **DEEP), lambda loss, s, a: loss.next_action(s)),
    "diffusion_ql climbing": (
        lambda: DiffusionQL(3, 2, **DEEP),
        lambda loss, s, a: loss.climbing(s, torch.tensor(True)),
    ),
    "dacer next_action": (lambda: ALGORITHMS["dacer"](3, 2, **DEEP), lambda loss, s, a: loss.next_action(s)),
    "dacer climbing": (lambda: ALGORITHMS["dacer"](3, 2, **DEEP), lambda loss, s, a: loss.climbing(s)),
    "dacer entropy": (
        lambda: ALGORITHMS["dacer"](3, 2, **DEEP, entropy_samples=5),
        lambda loss, s, a: loss.entropy(s[:4]),
    ),
    "cqsm target": (lambda: CQSM(3, 2, (8, 8)), lambda loss, s, a: loss.target(s, timed_batch(s, a))),
    "cqsm best_velocity": (lambda: CQSM(3, 2, (8, 8)), lambda loss, s, a: loss.best_velocity(s)),
}


def timed_batch(observation: Tensor, action: Tensor) -> TensorDict:
    """Frames with a time step, of an action that is part of the observation."""
    batch = replay_batch(len(action), 3, 2)
    batch["observation"], batch["action"] = observation, action
    batch["next", "time_step"] = torch.full((len(action), 1), 0.05)
    return batch


@pytest.mark.parametrize("what", FULL)
def test_what_is_compared_with_is_in_full_precision(what: str) -> None:
    """Bitwise what it is without autocast."""
    if what.startswith("dacer"):
        pytest.importorskip("sklearn")
    torch.manual_seed(0)
    make, call = FULL[what]
    loss, observation, action = make(), torch.randn(16, 3), torch.rand(16, 2)
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(call(loss, observation, action))
    assert torch.equal(*results)


def test_first_and_last_layers_are_in_full_precision_and_those_between_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlp, seen, linear = MLP([3, 8, 8, 8, 2], torch.relu), [], F.linear

    def watched(*args: Any) -> Tensor:
        out = linear(*args)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(F, "linear", watched)
    with torch.autocast("cpu", torch.bfloat16):
        mlp(torch.randn(5, 3))
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("precision", "accelerator", "gpu"),
    [
        *((name, "auto", False) for name in (None, "32-true", "64-true", "bf16-mixed", 32, "32", 64, "64", "bf16")),
        *((name, "auto", True) for name in ("16-mixed", 16, "16")),
    ],
)
def test_four_precisions_and_their_short_names(
    precision: Any, accelerator: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    check_precision(precision, accelerator)
    if gpu:
        with pytest.raises(SettingError, match="use bf16-mixed on a CPU"):
            check_precision(precision, "cpu")


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "transformer-engine", 8])
def test_other_precisions_are_refused(precision: Any) -> None:
    with pytest.raises(SettingError, match=f"trainer.precision is {precision!r}: choose 32-true, 64-true, bf16-mixed"):
        check_precision(precision, "auto")


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ("qsm", "loss.denoiser.trunk.layers.0.weight"),
        ("sac", "loss.inner.actor_network_params.module.0.module.0.layers.0.weight"),
    ],
)
def test_a_run_in_float64_is_evaluated_in_float64(
    loss: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, "--config=pendulum", f"--model.loss={loss}", *SHRINK, "--trainer.precision=64-true")
    saved = state(run)
    weight = saved["state_dict"][name]
    assert not torch.equal(weight, weight.float().double()), "it was rounded to float32"
    assert saved["OffPolicyDataModule"]["ranks"][0]["replay"]["observation"].dtype == torch.float32
    seen: list[Tensor] = []

    def spy(env: Any, policy: Any, *args: Any) -> dict[str, Tensor]:
        seen.extend(policy.parameters())
        return run_episodes(env, policy, *args)

    monkeypatch.setattr(evaluate, "run_episodes", spy)
    evaluate.run([str(run), "--episodes=1"])
    assert any(p.dtype == weight.dtype and torch.equal(weight, p) for p in seen)


# Loss scaling, with a scaler for the CPU: what 16-mixed does on a GPU.


class Planted(QSM):
    """QSM whose loss ``term`` overflows in the updates ``at``."""

    def __init__(
        self, observation_dim: int, action_dim: int, term: str = "actor", at: tuple[int, ...] = (), **settings: Any
    ) -> None:
        super().__init__(observation_dim, action_dim, **settings)
        self.term, self.at, self.calls = term, at, 0

    def term_loss(self, term: str, tensordict: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().term_loss(term, tensordict)
        if term == self.term:
            self.calls += 1
            loss = loss * (torch.inf if self.calls in self.at else 1)
        return loss, metrics


class Seen(Callback):
    """The module's weights, scale and metrics after every batch of one update."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.scales: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.states.append({key: value.clone() for key, value in pl_module.state_dict().items()})
        self.scales.append(trainer.scaler.get_scale())  # type: ignore[union-attr]


def scaled_run(
    folder: Path, module: OffPolicyModule, *callbacks: Callback, frames: int = 40, ckpt_path: Path | None = None
) -> Trainer:
    """Train on a CPU in 16-mixed: an update per frame after the 20th."""
    torch.manual_seed(0)
    data = OffPolicyDataModule(
        "Pendulum-v1", 1, 1, frames, 20, 8, eval_every_frames=10, eval_episodes=1, rounds_per_batch=1
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=16)
    trainer = quiet_trainer(
        folder,
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[cb.StopOnNonFinite(), *callbacks],
        enable_checkpointing=any(isinstance(callback, cb.RunCheckpoint) for callback in callbacks),
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def expected_scales(updates: int, overflows: dict[int, str]) -> list[float]:
    """The scale after each update: halved by an overflow, doubled by 16 steps in a row, of both optimizers together."""
    scale, good, scales = 1024.0, 0, []
    for update in range(1, updates + 1):
        for term in ("qvalue", "actor"):
            good = 0 if overflows.get(update) == term else good + 1
            scale = scale / 2 if good == 0 else scale * 2 if good == 16 else scale
            good %= 16
        scales.append(scale)
    return scales


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("term", ["qvalue", "actor"])
def test_an_overflow_skips_the_step_and_says_so(
    term: str, clip: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    module = OffPolicyModule(3, 1, partial(Planted, term=term, at=(5,), **SIZES), ema=0.9)
    module.set_gradient_clipping(clip)
    seen = Seen()
    with caplog.at_level(logging.WARNING):
        trainer = scaled_run(tmp_path, module, seen)
    warnings = [record.getMessage() for record in caplog.records if "overflowed" in record.getMessage()]
    assert warnings == [
        f"the gradients of loss/{term} overflowed at frame 25: the step was skipped (1 in all), and the loss scale is "
        "512 from now on"
    ]
    assert module.skipped_steps == 1
    before, after = seen.states[23], seen.states[24]
    changed = {key.split(".")[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == ({"denoiser"} if term == "qvalue" else {"critics"})
    assert seen.scales[20:] == expected_scales(20, {5: term})
    steps = [next(iter(optimizer.state.values()))["step"].item() for optimizer in trainer.optimizers]
    assert steps == ([19, 20] if term == "qvalue" else [20, 19])
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert all(group["fused"] == (clip is None) for o in trainer.optimizers for group in o.param_groups)


def test_a_loss_that_goes_on_overflowing_ends_the_run(tmp_path: Path) -> None:
    module = OffPolicyModule(3, 1, partial(Planted, term="qvalue", at=tuple(range(3, 100)), **SIZES))
    with pytest.raises(TrainingFault, match=r"loss/qvalue are NaN or infinite at frame 42, 20 times in a row.*scale"):
        scaled_run(tmp_path, module, frames=60)


def test_a_stopped_run_goes_on_with_its_loss_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    at = partial(Planted, at=(3, 13), **SIZES)
    ends = []
    for stop in (False, True):
        folder = tmp_path / str(stop)
        torch.manual_seed(0)
        module = OffPolicyModule(3, 1, at)
        trainer = scaled_run(folder, module, cb.RunCheckpoint(keep_last=9))
        if stop:
            there = next(c for c in checkpoints.complete(folder / "checkpoints") if c.order[0] == 30)
            saved = checkpoints.load(there.state)
            assert saved["MixedPrecision"]["scale"] == 512.0
            assert saved["MixedPrecision"]["_growth_tracker"] == 14
            assert saved["skipped_steps"] == 1
            torch.manual_seed(1)
            module = OffPolicyModule(3, 1, partial(Planted, at=(3,), **SIZES))  # counts anew: the second one
            checkpoints.set_aside_after(there)
            trainer = scaled_run(folder, module, cb.RunCheckpoint(), ckpt_path=there.state)
        ends.append((module.state_dict(), trainer.precision_plugin.state_dict(), module.skipped_steps))
    assert not differences(ends[0], ends[1])
    assert ends[0][2] == 2
