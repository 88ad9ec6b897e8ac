"""Exported policies: a file acts as the trainer does, says how it is called, and needs nothing of this package."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from qsm_lightning import exporting
from qsm_lightning.commands import evaluate, export
from qsm_lightning.commands.trained import load
from qsm_lightning.envs import make_env, make_gym
from qsm_lightning.errors import SettingError
from qsm_lightning.evaluation import run_episodes
from qsm_lightning.exporting import Acting, Inputs, exact_action, example_inputs, exported, largest_difference, traced
from qsm_lightning.losses import ALGORITHMS, CQSM, DACER, QSM, SAC, SDAC, TD3, CQSMDiffusion, DiffusionQL, OffPolicyLoss
from qsm_lightning.losses.td3 import DeterministicPolicy
from qsm_lightning.policy import DiffusionPolicy, ExplorationPolicy, Policy
from qsm_lightning.seeding import Purpose, derive_seed
from tests.conftest import FullDisk
from tests.helpers import ROOT, SHRINK, has
from tests.processes import Run, trained

needs_onnx = pytest.mark.skipif(
    not all(map(has, ("onnx", "onnxscript", "onnxruntime"))), reason="the extra export is not installed"
)
FORMATS = ["torch-export", pytest.param("onnx", marks=needs_onnx)]
POLICIES: dict[str, tuple[Callable[..., OffPolicyLoss], str]] = {
    "QSM": (partial(QSM, T=3), "sample"),
    "CQSM": (partial(CQSM, max_speed=1.0), "sample"),
    "CQSM, diffusion": (partial(CQSMDiffusion, T=2), "sample"),
    "DACER": (partial(DACER, T=2), "sample"),
    "Diffusion-QL, unclipped": (partial(DiffusionQL, T=2, clip_sampler=False, temperature=0.5), "sample"),
    "SDAC, best of n": (partial(SDAC, T=2), "best_of_n"),
    "SAC": (SAC, "sample"),
    "TD3": (TD3, "sample"),
}


def test_every_algorithm_is_among_them() -> None:
    assert {getattr(make, "func", make) for make, _ in POLICIES.values()} == set(ALGORITHMS.values())


def random_policy(name: str = "QSM") -> Policy:
    """Observation [N, 3] -> action [N, 2]; best of n takes 3 candidates."""
    make, selector = POLICIES[name]
    torch.manual_seed(0)
    policy = make(3, 2, hidden=(16, 16)).evaluation_policy(selector, 3)
    assert isinstance(policy, Policy)
    return policy


def reader(file_format: str, content: bytes) -> Callable[[Inputs], Tensor]:
    found = exporting.reader(file_format, content)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_file_acts_as_the_policy(name: str, file_format: str) -> None:
    """For any batch, given the noise that the policy would have drawn from torch's generator."""
    policy = random_policy(name)
    act = reader(file_format, exported(policy, 3, file_format, {})[0])
    for batch in (1, 2, 200):
        inputs = example_inputs(policy, 3, batch)
        assert ("noise" in inputs) is isinstance(policy, DiffusionPolicy)
        torch.manual_seed(1)
        expected = policy.act(inputs["observation"])
        torch.manual_seed(1)
        inputs |= {key: torch.randn(value.shape) for key, value in inputs.items() if key == "noise"}
        action = act(inputs)
        torch.testing.assert_close(action, expected, rtol=0, atol=1e-5)
        assert action.dtype == torch.float32
        assert torch.equal(act(inputs), action)
        one = act({key: value.narrow(exporting.BATCH_AXIS[key], batch - 1, 1) for key, value in inputs.items()})
        torch.testing.assert_close(one, action[-1:], rtol=0, atol=1e-5)


def test_all_of_the_noise_but_that_of_the_last_step_matters() -> None:
    policy = random_policy()
    act = reader("torch-export", exported(policy, 3, "torch-export", {})[0])
    inputs = example_inputs(policy, 3, 50)
    before = act(inputs)
    for i, matters in enumerate([False, True, True, True]):  # z of t = 0, 1, 2, and x_T
        noise = inputs["noise"].clone()
        noise[i] += 1
        assert torch.equal(act(inputs | {"noise": noise}), before) is not matters


def test_a_run_in_double_precision_gives_a_float32_file() -> None:
    policy = random_policy().double()
    act = reader("torch-export", exported(policy, 3, "torch-export", {})[0])
    inputs = example_inputs(policy, 3, 5)
    assert next(policy.parameters()).dtype == torch.float64, "the policy itself was changed"
    expected = policy.act(*(value.double() for value in inputs.values()))
    torch.testing.assert_close(act(inputs), expected.float(), rtol=0, atol=1e-5)


# The check of the file.


def sharp_policy() -> Policy:
    """One that turns from -1 to 1 within little, as trained ones do: rounding moves some actions by over 1e-5."""
    policy = random_policy("QSM")
    with torch.no_grad():
        policy.sampler.denoiser.trunk.linears[-1].weight.mul_(3000)
    return policy


def test_rounding_is_told_from_a_wrong_file() -> None:
    policy = sharp_policy()
    acting = Acting(policy)
    largest_difference(policy, 3, lambda inputs: acting(*inputs.values()))
    torch.manual_seed(0)
    inputs = example_inputs(policy, 3, 2000)
    exact, rounding = exact_action(policy, inputs)
    difference = (acting(*inputs.values()) - exact).abs()
    assert difference.max() > 1e-5, "nothing to explain"
    assert (difference <= rounding.clamp(min=1e-5)).all()
    assert (rounding > 1e-2).double().mean() < 0.1, "almost anything would pass"
    other = deepcopy(acting)
    with torch.no_grad():
        other.policy.sampler.denoiser.trunk.linears[0].weight.mul_(1.001)  # type: ignore[union-attr]
    with pytest.raises(SettingError, match=r"act otherwise than PyTorch \(up to .*was not written"):
        largest_difference(policy, 3, lambda inputs: other(*inputs.values()))


def test_a_wrong_action_is_noticed_in_any_place_and_so_is_nan() -> None:
    policy = random_policy()
    acting = Acting(policy)
    for batch, row, wrong in ((1, 0, 3e-5), (64, 63, 3e-5), (2, 1, float("nan"))):

        def act(inputs: Inputs, batch: int = batch, row: int = row, wrong: float = wrong) -> Tensor:
            action = acting(*inputs.values())
            if len(action) == batch:
                action[row, 1] += wrong
            return action

        with pytest.raises(SettingError, match="otherwise than PyTorch"):
            largest_difference(policy, 3, act)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert largest_difference(policy, 3, lambda inputs: acting(*inputs.values())) < 1e-5
    assert torch.equal(torch.get_rng_state(), before)


class OfOneSize(Policy):
    """Takes the size of its batch as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def act(self, observation: Tensor) -> Tensor:
        return self.layer(observation) * torch.ones(len(observation), 1)


class Silent(OfOneSize):
    def act(self, observation: Tensor) -> Tensor:
        raise ZeroDivisionError


def test_policies_that_cannot_be_a_function_of_their_inputs_are_refused() -> None:
    with pytest.raises(SettingError, match=r"OfOneSize cannot be exported \(.*x.shape\[0\] and not len\(x\)"):
        traced(OfOneSize(), 3)
    with pytest.raises(SettingError, match=r"Silent cannot be exported \(ZeroDivisionError\)"):
        traced(Silent(), 3)
    with pytest.raises(SettingError, match=r"ExplorationPolicy cannot be exported: it draws noise inside \(aten.randn"):
        traced(ExplorationPolicy(DeterministicPolicy(torch.nn.Linear(3, 2))), 3)


def test_a_file_that_cannot_be_read_again_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Unsupported model IR version: 99")

    monkeypatch.setattr(exporting, "reader", fails)
    with pytest.raises(SettingError, match=r"--format is torch-export, which cannot be written and read .*IR version"):
        exporting.exported(DeterministicPolicy(torch.nn.Linear(3, 2)), 3, "torch-export", {})


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of Pendulum with averaged weights, which differ much from the trained ones."""
    folder = tmp_path_factory.mktemp("run")
    settings = ["--model.loss.T=3", "--model.ema=0.99", "--model.actor_lr=0.03", "--data.eval_selector=sample"]
    return trained(folder, "--config=pendulum", *SHRINK, *settings)


@pytest.fixture(scope="module")
def onnx_file(run: Path) -> tuple[Path, str]:
    """That run exported by a process of its own, and what it printed."""
    process = Run(run.parent, run, "--out", "exported/policy.onnx", name="qsm-export")
    assert process.wait() == 0, process.text
    return run.parent / "exported" / "policy.onnx", process.text


def names_nothing_here(file: Path) -> None:
    """No path of this machine is in a file."""
    content = file.read_bytes()
    for path in (ROOT, file.parent, Path(torch.__file__).parent):
        assert str(path).encode() not in content


def session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(file)


@needs_onnx
def test_qsm_export_says_what_it_wrote(onnx_file: tuple[Path, str]) -> None:
    file, out = onnx_file
    checked = re.search(r"checked: onnxruntime \S+, largest difference from PyTorch (.*)", out)
    assert checked is not None
    assert float(checked[1]) < 1e-5
    assert out.splitlines() == [
        f"file: exported/policy.onnx, {file.stat().st_size:,} bytes",
        "policy: QSM (sample) after 60 frames of Pendulum-v1",
        "inputs: observation [batch, 3], noise [4, batch, 1] standard normal, float32",
        "output: action [batch, 1] in [-1, 1]; the environment's is low + (action + 1) / 2 * (high - low)",
        checked[0],
        "call: onnxruntime.InferenceSession('exported/policy.onnx').run(None, "
        "{'observation': observation, 'noise': noise})",
    ]
    assert [path.name for path in file.parent.iterdir()] == ["policy.onnx"]


@needs_onnx
def test_a_model_tells_how_it_is_called_and_nothing_of_the_machine(onnx_file: tuple[Path, str]) -> None:
    file, _ = onnx_file
    policy = session(file)
    assert {value.name: value.shape for value in (*policy.get_inputs(), *policy.get_outputs())} == {
        "observation": ["batch", 3],
        "noise": [4, "batch", 1],
        "action": ["batch", 1],
    }
    expected = {
        "environment": "Pendulum-v1",
        "algorithm": "QSM",
        "selector": "sample",
        "frames": "60",
        "observation": "[batch, 3]",
        "noise": "[4, batch, 1] standard normal",
        "action": "[batch, 1] in [-1, 1]; the environment's is low + (action + 1) / 2 * (high - low)",
    }
    assert policy.get_modelmeta().custom_metadata_map.items() >= expected.items()
    names_nothing_here(file)


@needs_onnx
def test_the_averaged_weights_are_exported(onnx_file: tuple[Path, str], run: Path) -> None:
    module = load(str(run)).module
    policy = module.loss.evaluation_policy()
    assert isinstance(policy, DiffusionPolicy)
    inputs = example_inputs(policy, 3, 50)
    action = session(onnx_file[0]).run(None, {key: value.numpy() for key, value in inputs.items()})[0]
    with torch.no_grad():
        online = policy.act(*inputs.values())
        with module.averaged_weights():
            averaged = policy.act(*inputs.values())
    torch.testing.assert_close(torch.from_numpy(action), averaged, rtol=0, atol=1e-5)
    assert (averaged - online).abs().max() > 0.1


@needs_onnx
def test_episodes_of_the_file_are_those_of_qsm_eval(
    onnx_file: tuple[Path, str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the noise that qsm-eval draws, the same returns."""
    evaluate.run([str(run), "--episodes", "3", "--seed", "4", "--json"])
    expected = json.loads(capsys.readouterr().out)
    policy = session(onnx_file[0])

    def act(tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict["observation"]
        inputs = {"observation": observation.numpy(), "noise": torch.randn(4, len(observation), 1).numpy()}
        return tensordict.set("action", torch.from_numpy(policy.run(None, inputs)[0]))

    seeds = [derive_seed(4, 0, purpose) for purpose in (Purpose.REPORT_ENV, Purpose.REPORT_NOISE)]
    returns = run_episodes(make_env("Pendulum-v1", 3), act, *seeds)["return"]  # type: ignore[arg-type]
    found = [returns.mean().item(), returns.min().item(), returns.max().item()]
    assert found == pytest.approx([expected[key] for key in ("mean", "min", "max")], rel=1e-4)


@needs_onnx
def test_the_example_acts_without_torch_and_this_package(
    onnx_file: tuple[Path, str], run: Path, tmp_path: Path
) -> None:
    """A real process in which neither can be imported; its return is that of the policy in our environment."""
    for package in ("torch", "qsm_lightning"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('{package} is not to be used')")
    example = ROOT / "examples" / "act_with_onnx.py"
    result = subprocess.run(
        [sys.executable, example, onnx_file[0], "7"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(example.read_text().splitlines()) <= 30
    module, env, generator = load(str(run)).module, make_gym("Pendulum-v1"), np.random.default_rng(7)
    policy = module.loss.evaluation_policy()
    observation, total, done = env.reset(seed=7)[0], 0.0, False
    with module.averaged_weights(), torch.no_grad():
        while not done:
            noise = torch.from_numpy(generator.standard_normal((4, 1, 1), np.float32))
            action = policy.act(torch.from_numpy(observation)[None], noise)  # type: ignore[operator]
            observation, reward, terminated, truncated, _ = env.step(action[0].numpy())
            total, done = total + float(reward), terminated or truncated
    assert float(result.stdout.removeprefix("return: ")) == pytest.approx(total, rel=1e-4, abs=0.01)


def test_the_example_acts_from_a_run(run: Path) -> None:
    """A real process; its return is that of the policy in our environment."""
    example = ROOT / "examples" / "act_with_torch.py"
    result = subprocess.run([sys.executable, example, run, "7"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    module, env = load(str(run)).module, make_gym("Pendulum-v1")
    policy = module.loss.evaluation_policy()
    torch.manual_seed(7)
    observation, total, done = env.reset(seed=7)[0], 0.0, False
    with module.averaged_weights(), torch.no_grad():
        while not done:
            action = policy.act(torch.from_numpy(observation)[None])
            observation, reward, terminated, truncated, _ = env.step(action[0].numpy())
            total, done = total + float(reward), terminated or truncated
    assert float(result.stdout.removeprefix("return: ")) == pytest.approx(total, rel=1e-4, abs=0.01)


def test_a_torch_export_file_acts_by_torch_alone(run: Path, tmp_path: Path) -> None:
    """In a process without this package: metadata, positional inputs, and the same actions."""
    file = tmp_path / "policy.pt2"
    export.run([str(run), "--format", "torch-export", "--out", str(file)])
    names_nothing_here(file)
    (tmp_path / "qsm_lightning.py").write_text("raise ImportError")
    script = (
        "import json, sys, torch\n"
        "found = {'metadata.json': ''}\n"
        "policy = torch.export.load(sys.argv[1], extra_files=found).module()\n"
        "torch.manual_seed(0)\n"
        "action = policy(torch.randn(5, 3), torch.randn(4, 5, 1))\n"
        "print(json.dumps([json.loads(found['metadata.json']), action.tolist(), action.requires_grad]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, file],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    metadata, action, requires_grad = json.loads(result.stdout)
    assert metadata["environment"] == "Pendulum-v1"
    assert metadata["noise"] == "[4, batch, 1] standard normal"
    assert not requires_grad
    module = load(str(run)).module
    torch.manual_seed(0)
    observation, noise = torch.randn(5, 3), torch.randn(4, 5, 1)
    with module.averaged_weights():
        expected = module.loss.evaluation_policy().act(observation, noise)
    torch.testing.assert_close(torch.tensor(action), expected, rtol=0, atol=1e-5)


# Bad input.


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["gone"], "'gone' is neither a checkpoint nor the folder of a run"),
        (["text.ckpt"], "text.ckpt is not a checkpoint"),
        (["text.ckpt", "--format", "tflite"], "--format.*tflite.*see qsm-export --help"),
        (["text.ckpt", "--out", "policy.pt2"], "--out is 'policy.pt2': with --format onnx the name must end in .onnx"),
        (["text.ckpt", "--out", "text.ckpt/policy.onnx"], "--out is .*text.ckpt cannot be written; choose another"),
        (["RUN", "--selector", "best_of_n", "--candidates", "0"], "--candidates is 0: it must be greater than 0"),
        (
            ["RUN", "--selector", "best_of_n", "--candidates", "99999"],
            "--candidates is 99999: it must be at most 10000",
        ),
        ([], "RUN_OR_CHECKPOINT"),
    ],
)
def test_qsm_export_refuses(
    args: list[str],
    sentence: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qsm_lightning.commands.export.check_installed", lambda file_format: None)
    (tmp_path / "text.ckpt").write_text("this is text")
    with pytest.raises(SystemExit) as ended:
        export.main([str(run) if word == "RUN" else word for word in args])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(sentence, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["text.ckpt"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(package: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else io)
    with pytest.raises(
        SettingError, match=rf"{package} is not installed; pip install 'qsm-lightning\[export\]', or use"
    ):
        export.run([str(run)])


@needs_onnx
def test_without_onnxruntime_the_format_alone_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else io)
    assert exported(random_policy("TD3"), 3, "onnx", {})[1] == "onnx.checker alone, as onnxruntime is not installed"


def test_what_is_there_stays_when_the_new_file_is_not_right(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "policy.pt2"
    file.write_text("an earlier one")
    other = DiffusionPolicy(QSM(3, 1, hidden=(8,), T=3).sampler)
    monkeypatch.setitem(
        exporting.WRITERS, "torch-export", lambda _, metadata: exporting.torch_export_file(traced(other, 3), metadata)
    )
    with pytest.raises(SettingError, match="otherwise than PyTorch .* not written"):
        export.run([str(run), "--format", "torch-export", "--out", str(file)])
    assert file.read_text() == "an earlier one"
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt2"]


def test_a_full_disk_ends_in_a_sentence(run: Path, tmp_path: Path, full_disk: FullDisk) -> None:
    full_disk(tmp_path)
    with pytest.raises(SettingError, match="--out is .*policy.pt2', which cannot be written .*No space left"):
        export.run([str(run), "--format", "torch-export", "--out", str(tmp_path / "policy.pt2")])


def test_an_output_is_a_velocity_where_the_environment_moves_the_action() -> None:
    """Whatever the algorithm."""
    stands, moves = (
        export._metadata(Mock(env=env, frames=1, module=Mock(hparams={"action_dim": 1}, loss=SAC(4, 1))), "sample", {})
        for env in ("continuous:Pendulum-v1?time_scale=1/2", "continuous:Pendulum-v1?max_speed=7.5&sigma=0.5")
    )
    assert stands["action"] == "[batch, 1] in [-1, 1]; the environment's is low + (action + 1) / 2 * (high - low)"
    assert "; a velocity: the action, which is the end of the observation, goes to clip(action + 7.5" in moves["action"]
