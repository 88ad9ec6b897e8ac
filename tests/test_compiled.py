"""Compiled updates and actions against the plain ones, and when there are any."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.training import quiet_trainer
from benchmarks.update import compiled_update, plain_update
from pytorch_lightning import Callback, LightningModule, Trainer
from tensordict import TensorDictBase
from torch import Tensor, fx

from qsm_lightning import compiled
from qsm_lightning.compiled import CPU, WORTHWHILE_UPDATES, compile_acting
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import SettingError
from qsm_lightning.losses import QSM, SAC, SDAC, TD3, DiffusionQL
from qsm_lightning.losses.base import Metrics, OffPolicyLoss
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.passes import NoiseInOrder, ThinProducts
from tests.compare import state
from tests.helpers import SHIPPED, SHRINK, needs_compiler, replay_batch
from tests.processes import fit

SMALL: dict[str, Any] = {"hidden": (16, 16), "time_dim": 8, "T": 3}


class LastMetrics(Callback):
    """What the last update was said to be."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics = dict(pl_module.metrics)  # type: ignore[arg-type, call-overload]


def run(
    folder: Path,
    compile: bool | str,
    loss: Callable[..., OffPolicyLoss] = QSM,
    sizes: dict[str, Any] = SMALL,
    updates: int = 40,
    precision: Any = "32-true",
    **settings: Any,
) -> tuple[dict[str, Tensor], Trainer]:
    """Train; returns every tensor that updates change, and the trainer."""
    torch.manual_seed(0)
    module = OffPolicyModule(3, 1, partial(loss, **sizes), compile=compile, ema=0.9)  # type: ignore[arg-type]
    module.set_gradient_clipping(**settings)
    data = OffPolicyDataModule("Pendulum-v1", 1, 1, 20 + updates, 20, 8, eval_every_frames=60, eval_episodes=1)
    last = LastMetrics()
    trainer = quiet_trainer(folder, accelerator="cpu", precision=precision, callbacks=[last])
    trainer.fit(module, data)
    found: dict[str, Tensor] = {**module.state_dict(), **last.metrics}
    for i, optimizer in enumerate(trainer.optimizers):
        for j, kept in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {i}, parameter {j}, {name}": value for name, value in kept.items()}
    return found, trainer


@needs_compiler
@pytest.mark.parametrize(
    "settings",
    [
        {"updates": 1, "value": None, "loss": SHIPPED},
        pytest.param({"precision": "64-true", "value": 0.5}, marks=pytest.mark.slow),
        pytest.param({"precision": "64-true", "value": 0.02, "algorithm": "value"}, marks=pytest.mark.slow),
        pytest.param({"precision": "64-true", "value": None, "loss": DiffusionQL}, marks=pytest.mark.slow),
        pytest.param({"precision": "64-true", "value": None, "loss": SDAC}, marks=pytest.mark.slow),
        pytest.param({"precision": "64-true", "value": 0.5, "loss": partial(QSM, m_q="auto")}, marks=pytest.mark.slow),
        pytest.param({"precision": "64-true", "value": 0.5, "loss": SHIPPED}, marks=pytest.mark.slow),
        pytest.param(
            {"precision": "64-true", "value": 0.5, "loss": partial(SHIPPED, candidates=2, entropy_bonus=0.4)},
            marks=pytest.mark.slow,
        ),
        pytest.param({"value": None, "loss": SAC, "sizes": {"hidden": (16, 16)}}, marks=pytest.mark.slow),
        pytest.param(
            {"precision": "64-true", "value": 0.5, "loss": TD3, "sizes": {"hidden": (16, 16), "policy_delay": 3}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "one update in float32",
        "clipped by norm",
        "clipped by value",
        "Diffusion-QL",
        "SDAC",
        "m_q auto",
        "m_q auto, denoised",
        "m_q auto, denoised, best of two, entropy bonus",
        "SAC",
        "TD3",
    ],
)
def test_compiled_training_equals_plain_training(settings: dict[str, Any], tmp_path: Path) -> None:
    """To 1e-5: noise, targets, averages, clipping, both optimizers' states, and what is logged.

    Forty updates in float64: in float32 Adam may make differences in the last bit of a gradient near zero into steps.
    """
    plain, plain_trainer = run(tmp_path, False, **settings)
    fast, trainer = run(tmp_path, True, **settings)
    assert trainer.lightning_module._compiled is not None
    assert plain_trainer.lightning_module._compiled is None
    updates, every = settings.get("updates", 40), trainer.lightning_module.loss.every
    steps = sum(updates // every.get(term, 1) for term in trainer.lightning_module.loss.terms)
    assert trainer.global_step == plain_trainer.global_step == steps
    assert fast.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-5, atol=1e-5 * value.abs().max().item(), msg=name)


@needs_compiler
def test_precision_is_mixed_in_the_same_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled, run as it stands, in bfloat16: also the backward pass is where the plain update has it."""
    plain, _ = run(tmp_path, False, updates=1, precision="bf16-mixed", value=None)
    monkeypatch.setattr(compiled, "compiled", lambda function, device: function)
    monkeypatch.setattr("qsm_lightning.datamodule.compile_acting", lambda policy, device: None)
    same, trainer = run(tmp_path, True, updates=1, precision="bf16-mixed", value=None)
    assert trainer.lightning_module._compiled is not None
    for name, value in plain.items():
        torch.testing.assert_close(same[name], value, rtol=1e-6, atol=1e-6 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_compiler)], ids=["plain", "compiled"])
def test_gradients_at_the_default_size_are_the_same_every_time(fast: bool) -> None:
    """Bitwise, with several threads: none of them adds up in the order in which it happens to come."""
    torch.manual_seed(0)
    loss, batch = QSM(11, 3), replay_batch(256, 11, 3)
    noise, t = torch.randn(256, 3), torch.randint(5, (256,))
    parameters = list(loss.denoiser.parameters())

    def gradients(batch: TensorDictBase) -> list[Tensor]:
        value, *_ = loss.score_matching(batch["observation"], batch["action"], t, noise)
        return list(torch.autograd.grad(value, parameters))

    call = compiled.compiled(gradients) if fast else gradients
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with torch._dynamo.config.patch(trace_autograd_ops=True) if fast else contextlib.nullcontext():
            first, *others = (call(batch) for _ in range(50))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(map(torch.equal, first, other))


@needs_compiler
def test_lightning_counts_and_measures_compiled_steps(tmp_path: Path) -> None:
    """Its profiler has every step, and its saved loops are those of plain updates; fit may be called again."""
    torch.manual_seed(0)
    module = OffPolicyModule(3, 1, partial(QSM, **SMALL), compile=True)
    loops = []
    for compile in (True, False):
        module.hparams["compile"] = compile
        data = OffPolicyDataModule("Pendulum-v1", 1, 1, 30, 20, 8, eval_every_frames=30, eval_episodes=1)
        trainer = quiet_trainer(tmp_path, accelerator="cpu", profiler="simple")
        trainer.fit(module, data)
        assert (module._compiled is not None) is compile
        assert len(trainer.profiler.recorded_durations["optimizer_step"]) == 20  # type: ignore[attr-defined]
        loops.append(trainer.fit_loop.state_dict())
        assert {float(s["step"]) for o in trainer.optimizers for s in o.state_dict()["state"].values()} == {10.0}
    assert loops[0] == loops[1]


class Untraceable(QSM):
    """Asks Python for a number in the middle of a loss."""

    compilable = True

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        assert len(str(tensordict["action"].sum().item())) > 0
        return super().actor_loss(tensordict)


@needs_compiler
def test_a_loss_that_cannot_be_compiled_trains_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bitwise, with a warning; where compiling was asked for, it is an error instead."""
    monkeypatch.setattr("qsm_lightning.module.WORTHWHILE_UPDATES", 1)
    # compiled actions are equal to rounding
    monkeypatch.setattr("qsm_lightning.datamodule.compile_acting", lambda policy, device: None)
    plain, _ = run(tmp_path, False, Untraceable, value=None)
    with caplog.at_level(logging.WARNING):
        tried, trainer = run(tmp_path, "auto", Untraceable, value=None)
    assert "Untraceable cannot be compiled" in caplog.text
    assert trainer.lightning_module._compiled is None
    assert plain.keys() == tried.keys()
    assert all(torch.equal(tried[name], value) for name, value in plain.items())
    with pytest.raises(SettingError, match="model.compile is true, but Untraceable cannot be compiled"):
        run(tmp_path, True, Untraceable, value=None)


class LateUntraceable(Untraceable):
    """Its first update can be compiled, its second cannot."""

    compilable = True
    every = {"actor": 2}


@needs_compiler
@pytest.mark.slow
def test_plain_updates_go_on_after_compiled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Optimizers count on from the steps that they have made."""
    monkeypatch.setattr("qsm_lightning.module.WORTHWHILE_UPDATES", 1)
    settings: dict[str, Any] = {"precision": "64-true", "value": None}
    plain, _ = run(tmp_path, False, LateUntraceable, **settings)
    tried, trainer = run(tmp_path, "auto", LateUntraceable, **settings)
    assert "LateUntraceable cannot be compiled" in caplog.text
    assert trainer.lightning_module._compiled is None
    assert {name: value.item() for name, value in tried.items() if name.endswith("parameter 0, step")} == {
        "optimizer 0, parameter 0, step": 40,
        "optimizer 1, parameter 0, step": 20,
    }
    for name, value in plain.items():
        torch.testing.assert_close(tried[name], value, rtol=1e-5, atol=1e-5 * value.abs().max().item(), msg=name)


class Counting(QSM):
    """Steps its targets every other time, by a number in Python, as a user's loss may."""

    count = 0

    def update_targets(self) -> None:
        self.count += 1
        if self.count % 2 == 0:
            super().update_targets()


def test_a_loss_that_does_not_say_it_is_fit_is_not_compiled(tmp_path: Path) -> None:
    """What a class says does not hold for its subclasses."""
    long = OffPolicyDataModule("Pendulum-v1", total_frames=1_000_000)
    trainer = quiet_trainer(tmp_path, accelerator="cpu")
    assert not OffPolicyModule(3, 1, partial(Counting, **SMALL)).compiles(trainer, long)
    with pytest.raises(SettingError, match="Counting is not compilable, or does not say so; use auto or false"):
        OffPolicyModule(3, 1, partial(Counting, **SMALL), compile=True).compiles(trainer, long)


def test_a_scalar_in_float64_is_not_compiled(tmp_path: Path) -> None:
    """SAC's entropy coefficient: it would stay where it is."""
    long = OffPolicyDataModule("Pendulum-v1", total_frames=1_000_000)
    for precision, compiles in (("32-true", bool(not compiled.missing_for_compiling())), ("64-true", False)):
        trainer = quiet_trainer(tmp_path, accelerator="cpu", precision=precision)
        assert OffPolicyModule(3, 1, partial(SAC, hidden=(16,))).compiles(trainer, long) is compiles
    with pytest.raises(SettingError, match="loses the gradient of a scalar in float64, and SAC learns one; use auto"):
        OffPolicyModule(3, 1, partial(SAC, hidden=(16,)), compile=True).compiles(trainer, long)


class OwnOptimizers(OffPolicyModule):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()


def test_optimizers_of_ones_own_are_stepped_plainly(tmp_path: Path) -> None:
    module, trainer, data = settings(tmp_path, True, total_frames=1_000_000)
    with pytest.raises(SettingError, match="OwnOptimizers has optimizers of its own"):
        OwnOptimizers(3, 1, partial(QSM, **SMALL), compile=True).compiles(trainer, data)


@needs_compiler
@pytest.mark.parametrize("n", [1, 5])
def test_compiled_actions_are_the_plain_ones(n: int) -> None:
    """With the same noise, also after the weights have changed in place."""
    torch.manual_seed(0)
    loss, observation = QSM(3, 2, **SMALL), torch.randn(n, 3)
    plain, fast = loss.exploration_policy(), loss.exploration_policy()
    compile_acting(fast)
    for _ in range(3):
        actions = []
        for policy in (plain, fast):
            torch.manual_seed(1)
            actions.append(policy.checked_action(observation))
        torch.testing.assert_close(*actions)
        with torch.no_grad():
            for p in loss.parameters():
                p.add_(0.1 * torch.randn_like(p))


@needs_compiler
def test_a_run_goes_on_compiled_or_not(tmp_path: Path) -> None:
    """The checkpoints are the same; that it differs by rounding is said, and the steps of Adam go on being counted."""
    tiny = ["--config=pendulum", *SHRINK, "--data.eval_selector=sample", "--data.eval_episodes=1"]
    fit(tmp_path, *tiny)
    run_folder = next(tmp_path.glob("runs/*/version_0"))
    ends = [("true", 70, "plain and are compiled"), ("false", 80, "compiled and are plain"), ("false", 90, "")]
    for compile, frames, said in ends:
        out = fit(tmp_path, "--resume", run_folder, f"--model.compile={compile}", f"--data.total_frames={frames}")
        assert ("from here on (model.compile)" in out) is bool(said)
        assert said in out
        optimizers = state(run_folder)["optimizer_states"]
        assert [{float(s["step"]) for s in o["state"].values()} for o in optimizers] == [{frames - 40.0}] * 3


class Watched(ThinProducts):
    """Keeps what is left of a graph; not that of an earlier run, which would be found on disk."""

    own = os.urandom(8)

    def uuid(self) -> bytes:
        return self.own

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        self.targets = [node.target for node in graph.nodes]


@needs_compiler
def test_thin_products_become_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, in float64; wide products stay what they are."""
    watched = Watched()
    monkeypatch.setattr("qsm_lightning.passes.NoiseInOrder", lambda: watched)
    torch.manual_seed(0)
    bias, wide, thin = (torch.randn(size, dtype=torch.float64) for size in ((5,), (32, 40), (40, 5)))

    def products(batch: Tensor) -> Tensor:
        wider = (batch @ wide).relu()  # [20, 40]
        return torch.addmm(bias, wider, thin).tanh() @ thin.T + wider

    batch = torch.randn(20, 32, dtype=torch.float64)
    torch.testing.assert_close(compiled.compiled(products)(batch), products(batch), rtol=1e-12, atol=1e-12)
    assert watched.targets.count(torch.ops.aten.mm.default) == 1
    assert torch.ops.aten.addmm.default not in watched.targets


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("loss", [QSM, SHIPPED, partial(QSM, T=20), TD3, SDAC, DiffusionQL])
def test_updates_with_sums_in_place_of_thin_products(
    loss: Callable[..., OffPolicyLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of a GPU's updates, on a CPU: equal to the plain update in float64."""
    monkeypatch.setattr("qsm_lightning.passes.NoiseInOrder", ThinProducts)
    batch = replay_batch(64, 11, 3).apply(lambda value: value.double() if value.is_floating_point() else value)
    ends = []
    for make in (compiled_update, plain_update):
        torch.manual_seed(0)
        trained = loss(11, 3, hidden=(32, 32)).double()
        torch.manual_seed(1)
        update = make(trained, batch)
        for _ in range(20):
            update()
        ends.append(trained.state_dict())
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-9, atol=1e-9 * value.abs().max().item(), msg=name)


def test_noise_comes_first_in_its_order() -> None:
    """As far as it depends on nothing but a shape; what cannot come first ends it, and keeps its place."""
    aten, graph = torch.ops.aten, fx.Graph()
    batch = graph.placeholder("batch")
    batch.meta["val"] = torch.ones(4, 4)
    sin = graph.call_function(aten.sin.default, (batch,))
    first = graph.call_function(aten.randn.default, ([4, 4],), {"device": CPU})
    like = graph.call_function(aten.randn_like.default, (sin,))
    turned = graph.call_function(aten.randn_like.default, (sin,))
    last = graph.call_function(aten.rand.default, ([4],))
    like.meta["val"], turned.meta["val"] = torch.ones(4, 4, dtype=torch.float64), torch.ones(4, 4).T[:2]
    graph.output((first, like, turned, last))
    NoiseInOrder()(graph)
    graph.lint()
    assert list(graph.nodes)[:6] == [batch, first, like, sin, turned, last]
    assert (like.target, like.args) == (aten.randn.default, ([4, 4],))
    assert like.kwargs == {"dtype": torch.float64, "device": CPU}


@needs_compiler
def test_noise_is_drawn_in_the_order_in_which_it_is_written() -> None:
    """Also where the first loop needs the last noise, as two loops over the same numbers have become one."""

    def noisy(batch: Tensor) -> list[Tensor]:
        early = batch.sin()
        return [early, torch.randn(8, 8) @ batch, torch.randn_like(early) @ batch, batch + torch.randn(8, 8)]

    batch, ends = torch.randn(8, 8), []
    for function in (noisy, compiled.compiled(noisy)):
        torch.manual_seed(3)
        ends.append(function(batch))
    torch.testing.assert_close(*ends)


def settings(tmp_path: Path, compile: Any, **data: Any) -> tuple[OffPolicyModule, Trainer, OffPolicyDataModule]:
    module = OffPolicyModule(3, 1, partial(QSM, **SMALL), compile=compile)
    return module, quiet_trainer(tmp_path, accelerator="cpu"), OffPolicyDataModule("Pendulum-v1", **data)


@needs_compiler
@pytest.mark.parametrize(
    ("compile", "data", "expected"),
    [
        ("auto", {"total_frames": 10_000 + WORTHWHILE_UPDATES}, True),
        ("auto", {"total_frames": 9_999 + WORTHWHILE_UPDATES}, False),
        ("auto", {"total_frames": 10_000 + 4 * WORTHWHILE_UPDATES, "utd": 0.25}, True),
        ("auto", {"total_frames": 10_000 + WORTHWHILE_UPDATES, "utd": 0.25}, False),
        (True, {"total_frames": 10_100}, True),
        (False, {}, False),
    ],
)
def test_long_runs_are_compiled(compile: Any, data: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    module, trainer, datamodule = settings(tmp_path, compile, **data)
    assert module.compiles(trainer, datamodule) is expected


@pytest.mark.parametrize("compile", ["auto", True])
def test_without_a_compiler_updates_are_plain(compile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("no g++")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    module, trainer, data = settings(tmp_path, compile, total_frames=1_000_000)
    if compile == "auto":
        assert not module.compiles(trainer, data)
        return
    with pytest.raises(SettingError, match=r"there is no C\+\+ compiler \(no g\+\+\); use auto or false"):
        module.compiles(trainer, data)


def test_an_older_torch_updates_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "can_trace_gradients", lambda: False)
    module, trainer, data = settings(tmp_path, True, total_frames=1_000_000)
    with pytest.raises(SettingError, match="cannot compile a whole update"):
        module.compiles(trainer, data)
