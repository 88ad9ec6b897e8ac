"""What only a GPU can show; ``pytest -m gpu`` runs it, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.training import quiet_trainer
from benchmarks.update import compiled_update, optimizers, plain_update
from tensordict import TensorDictBase
from torch import Tensor
from torch._dynamo.exc import Unsupported

from qsm_lightning.compiled import CompiledUpdate, compile_acting
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.gpu import Captured
from qsm_lightning.losses import CQSM, QSM, SAC, TD3, OffPolicyLoss
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.plain import generators_state, load_generators_state
from qsm_lightning.replay import Storage, make_replay_buffer
from tests.compare import state
from tests.conftest import Command
from tests.helpers import SHIPPED, SHRINK, needs_compiler, needs_gpu, replay_batch
from tests.processes import fit

pytestmark = needs_gpu
ON_GPU = ["--trainer.accelerator=gpu", "--trainer.devices=1"]
CAPTURED = [*ON_GPU, "--model.compile=true", "--data.storage=device"]
TINY = ["--config=pendulum", *SHRINK, *CAPTURED, "--data.eval_selector=sample", "--picture.every_evaluations=0"]


def some_batches(dtype: torch.dtype) -> list[TensorDictBase]:
    """Ten of 256 frames."""

    def frames(seed: int) -> TensorDictBase:
        found = replay_batch(256, 11, 3, seed).to("cuda")
        return found.apply(lambda value: value.to(dtype) if value.is_floating_point() else value)

    return [frames(seed) for seed in range(10)]


def after_updates(
    update: Callable[[], Any], batch: TensorDictBase, others: list[TensorDictBase], trained: OffPolicyLoss
) -> dict[str, Tensor]:
    """What a thousand updates on ``batch``, which becomes each of the others in turn, come to."""
    torch.manual_seed(1)
    for i in range(1000):
        batch.update_(others[i % 10])
        update()
    return {name: value.clone() for name, value in trained.state_dict().items()}


def check_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-4 of each tensor's norm."""
    for name, value in expected.items():
        distance = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        assert distance <= 1e-4, f"{name}: {distance:.1e}"


@needs_compiler
@pytest.mark.parametrize(
    "loss",
    [
        QSM,
        SHIPPED,
        pytest.param(
            SAC,
            marks=pytest.mark.xfail(
                torch.__version__ < "2.12", reason="torch 2.11 cannot trace it", raises=Unsupported
            ),
        ),
        TD3,
    ],
)
def test_a_graph_does_what_was_captured(loss: Callable[..., OffPolicyLoss]) -> None:
    """A thousand updates in float32, from the same start, with the same noise and the same kernels."""
    trained, batches = loss(11, 3, hidden=(64, 64)).to("cuda"), some_batches(torch.float32)
    batch = batches[0].clone()
    update = CompiledUpdate(trained, optimizers(trained), lambda due: trained.update_targets())
    update(batch)
    ((due, graph),) = update._compiled.items()
    assert isinstance(graph, Captured)
    adams = update.adams.values()
    tensors = [*trained.state_dict().values(), *(value for adam in adams for value in (*adam.means, *adam.squares))]
    start, ends = [value.clone() for value in tensors], []
    for form in (graph, graph.function):
        for value, before in zip(tensors, start, strict=True):
            value.copy_(before)
        for adam in adams:
            adam.done = 1
        update._compiled[due] = form
        ends.append(after_updates(partial(update, batch), batch, batches, trained))
    check_near(*ends)


@needs_compiler
@pytest.mark.parametrize("loss", [QSM, SHIPPED, TD3])
def test_captured_updates_equal_plain_ones(loss: Callable[..., OffPolicyLoss]) -> None:
    """In float64: in float32 a thousand updates make 1e-2 of what two orders of summation differ by."""
    batches, ends = some_batches(torch.float64), []
    for make in (compiled_update, plain_update):
        torch.manual_seed(0)
        trained, batch = loss(11, 3, hidden=(64, 64)).to("cuda", torch.float64), batches[0].clone()
        ends.append(after_updates(make(trained, batch), batch, batches, trained))
    check_near(*ends)


@needs_compiler
def test_captured_actions_are_the_plain_ones() -> None:
    """With the same noise, also after the weights have changed in place."""
    torch.manual_seed(0)
    loss, observation = QSM(11, 3, hidden=(64, 64)).to("cuda"), torch.randn(4, 11)
    plain, fast = loss.exploration_policy(), loss.exploration_policy()
    compile_acting(fast, next(loss.parameters()).device)
    for _ in range(4):
        actions = []
        for policy in (plain, fast):
            torch.manual_seed(1)
            actions.append(policy.checked_action(observation))
        torch.testing.assert_close(*actions, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for p in loss.parameters():
                p.add_(0.1 * torch.randn_like(p))


@needs_compiler
def test_the_host_does_not_wait_in_an_update() -> None:
    update = compiled_update(QSM(11, 3, hidden=(64, 64)).to("cuda"), replay_batch(256, 11, 3).to("cuda"))
    for _ in range(3):
        update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = [update() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in out[-1].values())


@needs_compiler
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--model.loss.m_q=1"],
        ["--model.loss=td3"],
        ["--config=algo/sdac"],
        ["--trainer.precision=bf16-mixed"],
    ],
    ids=" ".join,
)
def test_a_run_goes_on_from_its_checkpoint(settings: list[str], command: Command, tmp_path: Path) -> None:
    """Counters exactly; weights to what sums in varying order make of a few updates."""
    for folder, frames in (("whole", 90), ("parts", 70)):
        args = [*TINY, *settings, f"--data.total_frames={frames}", f"--trainer.default_root_dir={tmp_path / folder}"]
        result = command("qsm-fit", *args, timeout=600)
        assert result.returncode == 0, result.stderr
    whole, parts = (next((tmp_path / folder).glob("*/version_0")) for folder in ("whole", "parts"))
    result = command("qsm-fit", f"--resume={parts}", "--data.total_frames=90", timeout=600)
    assert result.returncode == 0, result.stderr
    expected, found = state(whole), state(parts)
    assert found["OffPolicyDataModule"]["progress"] == expected["OffPolicyDataModule"]["progress"]
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("storage", ["memory", "device"])
@pytest.mark.parametrize("window", [1, 3])
def test_a_buffer_is_where_it_is_asked_for(storage: Storage, window: int, tmp_path: Path) -> None:
    """And gives the same samples."""
    data = OffPolicyDataModule(
        "continuous:Pendulum-v1?max_speed=20&sigma=0.5", 1, 1, 60, 40, 8, storage=storage, eval_episodes=1
    )
    sizes: dict[str, Any] = {
        "hidden": (16, 16),
        "max_speed": 20.0,
        "window": window,
        "evaluation": "trace" if window > 1 else "orthogonality",
    }
    module = OffPolicyModule(data.observation_dim, data.action_dim, partial(CQSM, **sizes))
    quiet_trainer(tmp_path, accelerator="gpu", devices=1).fit(module, data)
    assert {leaf.device.type for leaf in data.buffer._leaves} == {"cuda" if storage == "device" else "cpu"}
    on_cpu = make_replay_buffer(60, seed=3)
    on_cpu.extend(data.buffer[:].to("cpu"))
    data.buffer.set_rng(torch.Generator().manual_seed(3))
    for draw in (lambda buffer: buffer.sample(20), lambda buffer: buffer.sample_windows(20, 3)):
        ours, theirs = (draw(buffer).flatten_keys() for buffer in (data.buffer, on_cpu))
        assert all(torch.equal(ours[key].cpu(), theirs[key]) for key in theirs.keys())  # noqa: SIM118


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision: str, tmp_path: Path) -> None:
    fit(
        tmp_path,
        "--config=pendulum",
        *SHRINK,
        *ON_GPU,
        f"--trainer.precision={precision}",
        "--trainer.gradient_clip_val=1",
    )


def test_cuda_generators_go_on_exactly() -> None:
    saved = generators_state()
    expected = torch.randn(3, device="cuda")
    torch.cuda.manual_seed_all(5)
    load_generators_state(saved)
    assert torch.equal(torch.randn(3, device="cuda"), expected)
