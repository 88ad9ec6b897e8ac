"""Bad input through the command line: exit status 2, one sentence, no traceback, nothing written."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from qsm_lightning.errors import SettingError
from qsm_lightning.losses import DACER
from qsm_lightning.messages import sentence, shipped_config
from qsm_lightning.module import OffPolicyModule
from tests.conftest import Command
from tests.helpers import SHRINK

PENDULUM = ["--config", "pendulum"]
HUGE = ["--data.buffer_size", "1000000000000", "--data.total_frames", "1000000000000"]
FILES = {
    "broken.yaml": "data: [1\n  env: }",
    "text.yaml": "just text\n",
    "unknown.yaml": "data:\n  envv: x\n",
    "nested.yaml": "model:\n  loss:\n    m_z: 3\n",
    "interpolated.yaml": "data:\n  env: ${oc.env:NO_SUCH_VARIABLE}\n",
    "stopping.yaml": "trainer: {callbacks: {class_path: EarlyStopping, init_args: {monitor: eval/retrun, mode: max}}}",
    "monitorless.yaml": "trainer: {callbacks: [{class_path: EarlyStopping}]}",
    "misspelled.yaml": "trainer: {callbacks: [{class_path: EarlyStoping, init_args: {monitor: eval/return}}]}",
    "lossless.yaml": "model: {loss: null}\n",
    "scalar.yaml": "data: 5\n",
    "empty.yaml": "data:\n",
    "resume.yaml": "resume: foo\n",
    "not_a.ckpt": "this is text",
    "file": "a file where a folder is wanted",
}
CASES = {
    "unknown key": ([*PENDULUM, "--data.total_framez", "3"], "data.total_framez .* did you mean data.total_frames"),
    "unknown group": ([*PENDULUM, "--dat.env", "x"], "dat.env .* did you mean data.env"),
    "unknown loss key": ([*PENDULUM, "--model.loss.m_z", "3"], "model.loss.m_z .* did you mean model.loss.m_q"),
    "another loss's key": (
        [*PENDULUM, "--model.loss", "td3", "--model.loss.m_q", "3"],
        "m_q is a setting of qsm, .* leave it out",
    ),
    "what an algorithm sets itself": (
        [*PENDULUM, "--model.loss", "cqsm_diffusion", "--model.loss.m_q", "3"],
        "m_q is a setting of qsm, not of what",
    ),
    "unknown key in file": (["--config", "unknown.yaml"], "data.envv .* did you mean data.env"),
    "unknown loss key in file": (["--config", "nested.yaml"], "model.loss.m_z .* did you mean model.loss.m_q"),
    "unknown word": ([*PENDULUM, "hopper"], "hopper is not a setting"),
    "wrong type": ([*PENDULUM, "--data.num_envs", "many"], "data.num_envs is 'many': it must be int"),
    "wrong choice": ([*PENDULUM, "--data.storage", "disk"], "data.storage is 'disk'.*memory.*memmap"),
    "wrong loss type": ([*PENDULUM, "--model.loss.hidden", "256"], r"model.loss.hidden is '256'.*list such as \[256"),
    "unknown loss": ([*PENDULUM, "--model.loss", "SACK"], "model.loss.*QSM"),
    "negative seed": ([*PENDULUM, "--seed_everything", "-3"], "seed_everything is -3: it must be from 0 to 4294967295"),
    "large seed": ([*PENDULUM, "--seed_everything", "4294967296"], "seed_everything is 4294967296: it must be from 0"),
    "no seed": ([*PENDULUM, "--seed_everything", "true"], "seed_everything is 'True': it must be int"),
    "zero envs": ([*PENDULUM, "--data.num_envs", "0"], "data.num_envs is 0"),
    "negative frames": ([*PENDULUM, "--data.total_frames", "-1"], "data.total_frames is -1"),
    "zero width": ([*PENDULUM, "--model.loss.hidden", "[64,0]"], "model.loss.hidden"),
    "zero logging": ([*PENDULUM, "--metrics.every_frames", "0"], "metrics.every_frames is 0"),
    "large batch": ([*PENDULUM, "--data.batch_size", "5000"], "data.batch_size is 5000.*init_random_frames"),
    "infinite": ([*PENDULUM, "--model.loss.m_q", ".inf"], "m_q is inf: it must be finite"),
    "not a number": ([*PENDULUM, "--model.loss.m_q", ".nan"], "m_q is nan: it must be greater than 0"),
    "infinite rate": ([*PENDULUM, "--model.loss.bc_coef", "1.0e+400"], "bc_coef is inf: it must be finite"),
    "no steps": ([*PENDULUM, "--model.loss.T", "0"], "model.loss.T is 0"),
    "unknown env": ([*PENDULUM, "--data.env", "Pendulun-v1"], "data.env is 'Pendulun-v1'.*Pendulum-v1"),
    "discrete actions": ([*PENDULUM, "--data.env", "CartPole-v1"], "data.env is 'CartPole-v1'.*Discrete"),
    "unbounded actions": ([*PENDULUM, "--data.env", "tests.fake_envs:Unbounded-v0"], "data.env.*unbounded"),
    "missing file": (["--config", "nowhere.yaml"], "'nowhere.yaml'.*no such file.*hopper"),
    "malformed file": (["--config", "broken.yaml"], "'broken.yaml'.*not valid YAML.*line"),
    "text file": (["--config", "text.yaml"], "'text.yaml'.*must hold settings"),
    "unresolved": (["--config", "interpolated.yaml"], "NO_SUCH_VARIABLE"),
    "no checkpoint": ([*PENDULUM, "--ckpt_path", "not_a.ckpt"], "not_a.ckpt is not a checkpoint.*manifest"),
    "missing checkpoint": ([*PENDULUM, "--ckpt_path", "gone.ckpt"], "--ckpt_path is 'gone.ckpt'.*no such file"),
    "no last checkpoint": ([*PENDULUM, "--ckpt_path", "last"], "--ckpt_path is last.*no checkpoint"),
    "too many candidates": ([*PENDULUM, "--data.eval_candidates", "100000"], "data.eval_candidates is 100000: .*10000"),
    "too many environments": (
        [*PENDULUM, "--data.num_envs=99999999999"],
        "data.num_envs is 99999999999: .*at most 10000",
    ),
    "too many episodes": (
        [*PENDULUM, "--data.eval_episodes=99999999999"],
        "data.eval_episodes is 99999999999: .*10000",
    ),
    "unwritable folder": ([*PENDULUM, "--trainer.default_root_dir", "file/runs"], "trainer.default_root_dir"),
    "a class that needs networks": ([*PENDULUM, "--model.loss", "QSMLoss"], "model.loss.*such as QSM"),
    "a policy that there is not": (
        [*PENDULUM, "--model.loss", "sac", "--data.eval_selector", "best_of_n"],
        "data.eval_selector is best_of_n: SAC has sample",
    ),
    "matrix actions": ([*PENDULUM, "--data.env", "tests.fake_envs:Matrix-v0"], r"data.env.*shape \(2, 3\).*flatten"),
    "nothing to learn": ([*PENDULUM, "--data.total_frames", "1000"], "data.total_frames is 1000.*init_random_frames"),
    "Lightning's cadence": ([*PENDULUM, "--trainer.check_val_every_n_epoch", "2"], "data.eval_every_frames"),
    "a limit of batches": ([*PENDULUM, "--trainer.limit_train_batches=2"], "batches is 2, .*data.eval_every_frames"),
    "batches to fit": ([*PENDULUM, "--trainer.overfit_batches=1"], "overfit_batches is 1, .*data.total_frames"),
    "accumulated gradients": ([*PENDULUM, "--trainer.accumulate_grad_batches=2"], "batches is 2, .*data.batch_size"),
    "a bare trainer": ([*PENDULUM, "--trainer.barebones=true"], "barebones is True, .*trainer.logger"),
    "a limit of one batch": ([*PENDULUM, "--trainer.limit_train_batches=1"], "batches is 1, .*data.eval_every_frames"),
    "half an evaluation": ([*PENDULUM, "--trainer.limit_val_batches=0.5"], "batches is 0.5, .*data.eval_episodes"),
    "a callback twice": (
        [*PENDULUM, "--trainer.callbacks+=qsm_lightning.callbacks.TrainingMetrics"],
        "trainer.callbacks: .*TrainingMetrics.*give each once",
    ),
    "an average of weights with evaluation": (
        [*PENDULUM, "--trainer.callbacks+=EMAWeightAveraging"],
        "trainer.callbacks has WeightAveraging, .*use model.ema",
    ),
    "a search for a batch size": (
        [*PENDULUM, "--trainer.callbacks+=BatchSizeFinder"],
        "trainer.callbacks has BatchSizeFinder, .*data.batch_size",
    ),
    "no loss": ([*PENDULUM, "--config", "lossless.yaml"], "model.loss is null: name an algorithm"),
    "a number for a group": (["--config", "scalar.yaml"], "'scalar.yaml': data must hold settings, and is 5"),
    "an empty group": (["--config", "empty.yaml"], "'empty.yaml': data must hold settings, and is None"),
    "a resume in a file": ([*PENDULUM, "--config", "resume.yaml"], "'resume.yaml': resume is for the command line"),
    "a count in floating point": (
        [*PENDULUM, "--model.actor_lr_decay_updates=1e6"],
        "model.actor_lr_decay_updates is '(1e6|1000000.0)': it must be int or null",
    ),
    "a callback without what it needs": (
        [*PENDULUM, "--config", "monitorless.yaml"],
        "trainer.callbacks: pytorch_lightning.callbacks.EarlyStopping needs monitor; give it among its settings",
    ),
    "a callback that there is not": (
        [*PENDULUM, "--config", "misspelled.yaml"],
        "trainer.callbacks: there is no class EarlyStoping; give its path",
    ),
    "a logger without what it needs": ([*PENDULUM, "--trainer.logger=CSVLogger"], "CSVLogger needs save_dir"),
    "accumulated gradients, by a callback": (
        [*PENDULUM, "--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}"],
        "GradientAccumulationScheduler.*data.batch_size",
    ),
    "an average of weights by Lightning": (
        [*PENDULUM, "--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=1e-3"],
        "StochasticWeightAveraging.*use model.ema",
    ),
    "no run": ([*PENDULUM, "--resume", "nowhere"], "--resume is 'nowhere'.*folder of a run"),
    "zero checkpoints": ([*PENDULUM, "--checkpoint.keep_last", "0"], "checkpoint.keep_last is 0"),
    "negative restarts": ([*PENDULUM, "--data.env_restarts", "-1"], "data.env_restarts is -1"),
    "too little memory": ([*PENDULUM, *HUGE], "data.buffer_size is 1000000000000.*of memory.*memmap"),
    "too little disk": ([*PENDULUM, *HUGE, "--data.storage", "memmap"], "data.buffer_size is 1000000000000.*of disk"),
    "spawned processes": (
        [*PENDULUM, "--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp_spawn"],
        "trainer.strategy is ddp_spawn.*use ddp",
    ),
    "sharded networks": ([*PENDULUM, "--trainer.strategy", "fsdp"], "trainer.strategy is fsdp.*use ddp"),
    "unequal parts": (
        [*PENDULUM, "--trainer.devices", "2", "--trainer.accelerator", "cpu", "--data.batch_size", "255"],
        "data.batch_size is 255.*over all 2 processes.*such as 256",
    ),
    "no devices": ([*PENDULUM, "--trainer.devices", "0"], "devices"),
    "unknown devices": ([*PENDULUM, "--trainer.devices", "foo"], "trainer.devices is 'foo': give a number"),
    "listed devices": (
        [*PENDULUM, "--trainer.accelerator=cpu", "--trainer.devices=[0,0]"],
        "trainer: `devices` .* int",
    ),
    "an accelerator that is not there": ([*PENDULUM, *SHRINK, "--trainer.accelerator", "tpu"], "torch_xla|accelerator"),
    "a long name": ([*PENDULUM, *SHRINK, "--name", "a" * 300], "the run's folder,.*a name in it is too long"),
    "a file for a folder": (
        [*PENDULUM, *SHRINK, "--trainer.default_root_dir=.", "--name=file"],
        "the run's folder,.*file cannot be written",
    ),
    "mapped files nowhere": (
        [*PENDULUM, *SHRINK, "--data.storage=memmap", "--data.storage_dir=file"],
        "data.storage_dir is 'file': file cannot be written",
    ),
    "unknown precision": ([*PENDULUM, "--trainer.precision", "8"], "trainer.precision is '8'.*'bf16-mixed'"),
    "half precision": ([*PENDULUM, "--trainer.precision", "16-true"], "trainer.precision is '16-true': choose 32-true"),
    "zero clipping": ([*PENDULUM, "--trainer.gradient_clip_val", "0"], "trainer.gradient_clip_val is 0: .* or null"),
    "unknown clipping": ([*PENDULUM, "--trainer.gradient_clip_algorithm", "x"], "clip_algorithm is 'x': choose norm"),
    "a metric that is not logged": (
        [*PENDULUM, "--config", "stopping.yaml"],
        "EarlyStopping's monitor is 'eval/retrun', .* from eval/return, .*, eval_best_of_n/return,",
    ),
    "a metric of a policy that is not evaluated": (
        [*PENDULUM, "--config", "stopping.yaml", "--data.eval_selector=sample"],
        "'eval/retrun', .* from eval/return, eval/return_std, eval/length$",
    ),
    "an average of nothing": ([*PENDULUM, "--model.ema", "1"], "model.ema is 1.0: .* such as 0.999, or null"),
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(command: Command, tmp_path: Path, name: str, args: list[str], pattern: str) -> None:
    before = snapshot(tmp_path)
    result = command(name, *args)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith(f"{name}: ")]
    assert len(lines) == 1, result.stderr
    assert re.search(pattern, lines[0]), lines[0]
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stdout
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", CASES)
def test_qsm_fit_refuses(case: str, quick_command: Command, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    check_refused(quick_command, tmp_path, "qsm-fit", *CASES[case])


def test_a_folder_named_like_a_configuration_does_not_hide_it(quick_command: Command, tmp_path: Path) -> None:
    (tmp_path / "pendulum").mkdir()
    assert "Pendulum-v1" in quick_command("qsm-fit", *PENDULUM, "--print_config").stdout


def test_the_whole_configuration_is_printed_wherever_that_is_asked_for(quick_command: Command) -> None:
    settings = [*PENDULUM, "--model.loss", "sac", "--model.actor_lr=1e-3"]
    first, last = (
        quick_command("qsm-fit", *args).stdout
        for args in (["--print_config", *settings], [*settings, "--print_config"])
    )
    assert first == last
    assert "class_path: qsm_lightning.losses.SAC" in first
    assert "actor_lr: 0.001" in first


def test_a_configuration_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError(13, "Permission denied")))
    (tmp_path / "own.yaml").touch()
    with pytest.raises(SettingError, match="--config is .*own.yaml', which cannot be read .*Permission denied"):
        shipped_config(str(tmp_path / "own.yaml"))


def test_a_package_of_an_algorithm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsm_lightning.errors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match="^model.loss.dacer: sklearn is not installed"):
        OffPolicyModule(3, 1, DACER)


def test_what_lightning_refuses_at_the_start_of_training(command: Command) -> None:
    args = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.logger=false"]
    result = command("qsm-fit", *PENDULUM, *SHRINK, *args)
    assert result.returncode == 2
    assert "no logger" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(command: Command, tmp_path: Path) -> None:
    args = [*PENDULUM, "--trainer.accelerator", "gpu"]
    check_refused(command, tmp_path, "qsm-fit", args, "trainer.accelerator is 'gpu'.*no GPU")


@pytest.mark.parametrize("precision", ["16-mixed", "16"])
def test_loss_scaling_on_a_cpu(precision: str, quick_command: Command, tmp_path: Path) -> None:
    args = [*PENDULUM, "--trainer.accelerator=cpu", f"--trainer.precision={precision}"]
    check_refused(
        quick_command, tmp_path, "qsm-fit", args, f"trainer.precision is '?{precision}.*GPU: use bf16-mixed on a CPU"
    )


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["gone"], "'gone' is neither a checkpoint nor"),
        (["not_a.ckpt"], "not_a.ckpt is not a checkpoint"),
        (["weights.ckpt"], "weights.ckpt is not a checkpoint of qsm-fit"),
        (["not_a.ckpt", "--episodes", "0"], "--episodes is 0"),
        (["not_a.ckpt", "--episodes", "99999999999"], "--episodes is 99999999999"),
        (["not_a.ckpt", "--video", ""], "--video is "),
        (["not_a.ckpt", "--episodes", "some"], "episodes.*some"),
        (["not_a.ckpt", "--selector", "worst"], "selector.*worst"),
        (["not_a.ckpt", "--video", "not_a.ckpt/film.gif"], "not_a.ckpt cannot be written"),
        (["not_a.ckpt", "--video", "film.avi"], r"film.avi.*\.mp4 or \.gif"),
        ([], "RUN_OR_CHECKPOINT"),
    ],
)
def test_qsm_eval_refuses(args: list[str], pattern: str, quick_command: Command, tmp_path: Path) -> None:
    (tmp_path / "not_a.ckpt").write_text("this is text")
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    check_refused(quick_command, tmp_path, "qsm-eval", args, pattern)


def test_a_checkpoint_of_another_environment(quick_command: Command, tmp_path: Path) -> None:
    settings = [*PENDULUM, *SHRINK, "--model.loss.m_q=1"]
    done = quick_command("qsm-fit", *settings, "--data.eval_selector=sample")
    assert done.returncode == 0, done.stderr
    checkpoint = next(tmp_path.glob("runs/*/*/checkpoints/0*"))
    before = snapshot(tmp_path)
    result = quick_command("qsm-fit", "--config", "hopper", *SHRINK, "--ckpt_path", checkpoint)
    assert result.returncode == 2
    assert "data.env ('Pendulum-v1' there, 'Hopper-v5' here)" in result.stderr
    assert "model.loss.m_q (1.0 there, 'auto' here)" in result.stderr
    assert "Traceback" not in result.stderr
    again = quick_command("qsm-fit", *settings, "--ckpt_path", checkpoint)
    assert again.returncode == 2
    assert "already at 60 frames" in again.stderr
    assert snapshot(tmp_path) == before


def test_a_logger_that_is_not_installed_is_named() -> None:
    """In place of all that jsonargparse tells of it."""
    told = "Errors: - Problem with given class_path 'a.WandbLogger': Requirement 'wandb>=0.12.10' not met. HINT: Try"
    assert sentence(told, []) == "a.WandbLogger needs wandb>=0.12.10: pip install 'wandb>=0.12.10'"
