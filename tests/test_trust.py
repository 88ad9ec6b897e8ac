"""Runs are safe to share: going on with a stranger's run, or evaluating it, runs no code of theirs."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qsm_lightning import checkpoints, durable
from qsm_lightning.checkpoints import MANIFEST, STATE, Checkpoint
from tests.helpers import SHRINK, environment
from tests.processes import Run, trained

TINY = [
    *("--config=pendulum", *SHRINK, "--data.eval_selector=sample", "--data.eval_episodes=1", "--data.env=Pendulum-v1"),
    *("--model.loss.hidden=[8]", "--model.loss.T=2", "--picture.every_evaluations=0", "--trainer.accelerator=cpu"),
]
FURTHER = "--data.total_frames=65"
# A module as it may lie on a user's path: importing it is the harm. All it offers would be taken.
EVIL = """
from pathlib import Path

Path(__file__).with_name("marker").touch()

import gymnasium
from pytorch_lightning import callbacks, loggers, profilers, strategies
from pytorch_lightning.plugins import precision
from qsm_lightning import losses


class Loss(losses.QSM): pass
class Callback(callbacks.Callback): pass
class Logger(loggers.CSVLogger): pass
class Profiler(profilers.PassThroughProfiler): pass
class Strategy(strategies.SingleDeviceStrategy): pass
class Plugin(precision.Precision): pass


gymnasium.register("Evil-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=200)
"""


class Bomb:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@dataclass
class Shared:
    """A run from somewhere else, in a folder with an evil module that can be imported."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def modules(self) -> Path:
        return self.folder / "modules"

    @property
    def marker(self) -> Path:
        """Exists once something evil has happened."""
        return self.modules / "marker"

    @property
    def config(self) -> Path:
        return self.run / "config.yaml"

    @property
    def checkpoint(self) -> Checkpoint:
        (checkpoint,) = checkpoints.complete(self.run / "checkpoints")
        return checkpoint

    def edit_config(self, change: Callable[[Any], object]) -> None:
        settings = yaml.safe_load(self.config.read_text())
        change(settings)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        text = text.replace("HOME_TO_RUN", os.path.relpath(self.run, Path.home())).replace("RUN", str(self.run))
        self.config.write_text(text, encoding="utf-8")

    def edit_state(self, change: Callable[[Any], object]) -> None:
        state = torch.load(self.checkpoint.state, weights_only=True)
        change(state)
        torch.save(state, self.checkpoint.state)
        self.seal()

    def seal(self) -> None:
        """Put sizes and hashes of the files that are there into the manifest."""
        manifest = json.loads((self.checkpoint.path / MANIFEST).read_bytes())
        manifest["files"] = {n: durable.record_of_file(self.checkpoint.path / n) for n in manifest["files"]}
        manifest["replay"] = {n: durable.record_of_file(self.checkpoint.replay / n) for n in manifest["replay"]}
        (self.checkpoint.path / MANIFEST).write_text(json.dumps(manifest))
        self.checkpoint.verify()

    def start(self, *args: object, program: str = "qsm-fit", cwd: Path | None = None) -> tuple[int, str]:
        """Status and output of a command; it must end in order, and do nothing evil."""
        run = Run(cwd or self.folder, *args, name=program)
        status = run.wait()
        assert not self.marker.exists(), f"code of a stranger was run; status {status}, and:\n{run.text}"
        assert "Traceback" not in run.text, run.text
        return status, run.text

    def refused(self, *args: object, program: str = "qsm-fit", cwd: Path | None = None) -> str:
        """The one sentence with which a command refuses."""
        status, text = self.start(*args, program=program, cwd=cwd)
        assert status == 2, text
        lines = [line for line in text.splitlines() if line.startswith(f"{program}: ")]
        (sentence,) = [line for line in lines if not line.startswith(f"{program}: {self.run} from frame ")]
        return sentence


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 frames with one checkpoint."""
    return trained(tmp_path_factory.mktemp("base"), *TINY)


@pytest.fixture
def shared(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    shared = Shared(tmp_path)
    shutil.copytree(base, shared.run)
    shared.modules.mkdir()
    for name in ("evil.py", "ev-il.py"):
        (shared.modules / name).write_text(EVIL)
    monkeypatch.syspath_prepend(shared.modules)  # new processes get this process's path
    return shared


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is in the files.


def test_the_bombs_of_these_tests_go_off(shared: Shared) -> None:
    pickle.loads(pickle.dumps(Bomb(f"touch {shared.marker}")))
    assert shared.marker.exists()
    shared.marker.unlink()
    explosive(shared.config, "Pendulum-v1", f"touch {shared.marker}")
    yaml.unsafe_load(shared.config.read_text())
    assert shared.marker.exists()
    shared.marker.unlink()
    importlib.import_module("evil")
    assert shared.marker.exists()
    del sys.modules["evil"]


def explosive(path: Path, form: str, command: str) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(command)))
    elif form == "torch":
        torch.save(Bomb(command), path)
    elif form == "torch, within":
        content = torch.load(path, weights_only=True)
        content["bomb"] = Bomb(command)
        torch.save(content, path)
    elif form == "tag":
        path.write_text(f"{path.read_text()}\nx: !!python/object/apply:os.system ['{command}']\n")
    else:
        path.write_text(path.read_text().replace(form, f"!!python/object/apply:os.system ['{command}']"))


@pytest.mark.parametrize(
    ("file", "form", "evaluated"),
    [
        (MANIFEST, "pickle", 2),
        (STATE, "pickle", 2),
        (STATE, "torch", 2),
        (STATE, "torch, within", 2),
        ("replay", "pickle", 0),
        ("replay", "torch", 0),
        ("replay", "torch, within", 0),
        ("config.yaml", "pickle", 0),
        ("config.yaml", "tag", 0),
        ("config.yaml", "Pendulum-v1", 0),
    ],
)
def test_a_file_that_would_run_code_is_refused(file: str, form: str, evaluated: int, shared: Shared) -> None:
    checkpoint = shared.checkpoint
    paths = {
        MANIFEST: [checkpoint.path / MANIFEST],
        STATE: [checkpoint.state],
        "replay": sorted(checkpoint.replay.iterdir()),
        "config.yaml": [shared.config],
    }[file]
    for path in paths:
        explosive(path, form, f"touch {shared.marker}")
    if file != MANIFEST:
        shared.seal()
    sentence = shared.refused("--resume", shared.run, FURTHER)
    assert str(paths[0]) in sentence
    if evaluated:
        assert str(paths[0]) in shared.refused(shared.run, program="qsm-eval")
        if form == "torch":
            alone = shutil.copy(paths[0], shared.folder / "policy.ckpt")
            assert "policy.ckpt is not a checkpoint" in shared.refused(alone, program="qsm-eval")
            assert str(paths[0]) in shared.refused(*TINY, FURTHER, "--ckpt_path", paths[0])
    else:
        status, text = shared.start(shared.run, "--episodes=1", program="qsm-eval")
        assert status == 0, text


def test_files_that_are_not_read_do_no_harm(shared: Shared) -> None:
    for name in ("notes.pt", "checkpoints/notes.pt", "checkpoints/replay/notes.pt", "checkpoints/000000060/notes.pt"):
        (shared.run / name).write_bytes(pickle.dumps(Bomb(f"touch {shared.marker}")))
    explosive(shared.run / "hparams.yaml", "tag", f"touch {shared.marker}")
    status, text = shared.start("--resume", shared.run, FURTHER)
    assert status == 0, text


# Whom the settings name.

SHELL = {"class_path": "torch.os.system", "init_args": {"command": "touch modules/marker"}}
PROCESS = {
    "class_path": "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
    "init_args": {
        **{"entrypoint": "touch", "args": ["modules/marker"], "env": {}},
        **{"stdout": None, "stderr": None, "local_rank_id": 0, "numa_options": None},
    },
}
OTHER_ENV = {"class_path": "torchrl.envs.GymEnv", "init_args": {"env_name": "evil:Evil-v0"}}
HUB = {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "RUN", "model": "model", "source": "local"}}


def trainer(**settings: Any) -> Callable[[Any], object]:
    return lambda config: config["trainer"].update(settings)


def loss(value: Any) -> Callable[[Any], object]:
    return lambda config: config["model"].update(loss=value)


def env(name: str) -> Callable[[Any], object]:
    return lambda config: config["data"].update(env=name)


def top(**settings: Any) -> Callable[[Any], object]:
    return lambda config: config.update(settings)


def moved(key: str, value: Any) -> Callable[[Any], object]:
    """Write ``a: {b: ...}`` as ``a.b: value``."""

    def change(config: Any) -> None:
        group, _, name = key.partition(".")
        del config[group][name]
        config[key] = value

    return change


def callback(**settings: Any) -> Callable[[Any], object]:
    spec = {"class_path": "pytorch_lightning.callbacks.LambdaCallback", "init_args": settings}
    return trainer(callbacks=[spec])


def strategy(state: Any) -> Callable[[Any], object]:
    spec = {"class_path": "pytorch_lightning.strategies.DDPStrategy", "init_args": {"ddp_comm_state": state}}
    return trainer(strategy=spec)


NAMED: dict[str, Callable[[Any], object]] = {
    "loss": loss({"class_path": "evil.Loss"}),
    "loss, as text": loss("evil.Loss"),
    "loss, with settings": lambda config: config["model"]["loss"].update(class_path="evil.Loss"),
    "loss, dotted": moved("model.loss", "evil.Loss"),
    "callback": trainer(callbacks=[{"class_path": "evil.Callback"}]),
    "callback, as text": trainer(callbacks="evil.Callback"),
    "callback, added": lambda config: config["trainer"].update({"callbacks+": "evil.Callback"}),
    "logger": trainer(logger={"class_path": "evil.Logger", "init_args": {"save_dir": "logs"}}),
    "strategy": trainer(strategy={"class_path": "evil.Strategy"}),
    "plugin": trainer(plugins=[{"class_path": "evil.Plugin"}]),
    "profiler": trainer(profiler={"class_path": "evil.Profiler"}),
    "a function": callback(setup="evil.Loss"),
    "env": env("evil:Evil-v0"),
    "env, of a module with a hyphen": env("ev-il:Evil-v0"),
    "env, dotted": moved("data.env", "evil:Evil-v0"),
    # YAML within a string
    "loss, in quotes": loss("{class_path: evil.Loss}"),
    "loss, in a block": loss("class_path: evil.Loss\n"),
    "loss, on a line": loss("class_path: evil.Loss"),
    "loss, with spaces": loss(" evil.Loss "),
    "loss, in another alphabet": loss("evil.Été"),
    "callback, in quotes": trainer(callbacks="[{class_path: evil.Callback}]"),
    "callback, on a line": trainer(callbacks="- evil.Callback"),
    # interpolation
    "loss, elsewhere": lambda config: config.update(name="evil.Loss", model={"loss": "${name}"}),
    "loss, in two parts": lambda config: config.update(name="evil", model={"loss": {"class_path": "${name}.Loss"}}),
    "loss, decoded": loss("${oc.decode:'{class_path: evil.Loss}'}"),
    "env, elsewhere": lambda config: (config.update(name="evil:Evil-v0"), config["data"].update(env="${name}")),
    # other files: RUN/loss, RUN/callbacks, RUN/settings
    "loss, beside": loss("./loss"),
    "loss, beside, as YAML": loss("loss.yaml"),
    "loss, at a path": loss("RUN/loss"),
    "loss, at an address": loss("file://RUN/loss"),
    "loss, from home": loss("~/HOME_TO_RUN/loss"),
    "callbacks, beside": trainer(callbacks="./callbacks"),
    "callback, in a list, beside": trainer(callbacks=["./loss", "./callback"]),
    "model, beside": top(model="model"),
    "trainer, beside": top(trainer="trainer.yaml"),
    "data, beside": top(data="data"),
    "settings, beside": top(config="settings.yaml"),
    "settings, at a path": top(config="RUN/settings.yaml"),
    # packages that are trusted, for what they contain
    "a shell": loss(SHELL),
    "a shell, for a callback": callback(setup=SHELL),
    "a process": strategy(PROCESS),
    "a folder of code": loss(HUB),
    "an environment": strategy(OTHER_ENV),
    # what is merely odd
    "a text too long for a path": trainer(precision="x" * 5000),
}
BESIDE = {
    "loss": "class_path: evil.Loss\n",
    "loss.yaml": "class_path: evil.Loss\n",
    "callback": "class_path: evil.Callback\n",
    "callbacks": "- class_path: evil.Callback\n",
    "model": "loss: {class_path: evil.Loss}\n",
    "trainer.yaml": "callbacks: [{class_path: evil.Callback}]\n",
    "data": "env: evil:Evil-v0\n",
    "settings.yaml": "trainer: {callbacks: [{class_path: evil.Callback}]}\n",
}


@pytest.mark.parametrize("name", NAMED)
def test_settings_that_name_code_are_refused(name: str, shared: Shared) -> None:
    for file, content in BESIDE.items():
        (shared.run / file).write_text(content)
    hub = f"from pathlib import Path\nPath({str(shared.marker)!r}).touch()\ndef model(): pass\n"
    (shared.run / "hubconf.py").write_text(hub)
    shared.edit_config(NAMED[name])
    before = contents(shared.run)
    shared.refused("--resume", shared.run, FURTHER)
    assert contents(shared.run) == before


ANCHORED = {
    "an anchor": ("name: null", "name: &x evil.Loss\nmodel: {loss: *x}"),
    "a merge": ("  env: Pendulum-v1", "  <<: {env: 'evil:Evil-v0'}"),
    "a key twice": ("trainer:", "trainer: {callbacks: evil.Callback}\ntrainer:"),
    "two documents": ("seed_everything: 0", "seed_everything: 0\n---\ntrainer: {callbacks: evil.Callback}"),
    "depth": ("name: null", "name: " + "[" * 5000 + "]" * 5000),
    "a circle": ("name: null", "name: &x [*x]"),
    "a settings file that names itself": ("name: null", "name: null\nconfig: config.yaml"),
}


@pytest.mark.parametrize("name", ANCHORED)
def test_settings_in_unusual_yaml_are_refused(name: str, shared: Shared) -> None:
    text = shared.config.read_text()
    old, new = ANCHORED[name]
    if name == "an anchor":
        text = re.sub(r"(?s)^model:.*?(?=^data:)", "", text, flags=re.M)
    assert text.count(f"{old}\n") == 1
    shared.config.write_text(text.replace(f"{old}\n", f"{new}\n"))
    shared.refused("--resume", shared.run, FURTHER)


CHECKPOINT = "RUN/checkpoints/000000060"
# How a run is gone on with; {cwd} is the folder the command is typed in.
WAYS: dict[str, list[str]] = {
    "resume": ["--resume", "RUN"],
    "resume, with a slash": ["--resume=RUN/"],
    "a checkpoint": ["--resume", CHECKPOINT],
    "last": ["--config", "RUN/config.yaml", "--ckpt_path", "last"],
    "best": ["--config=RUN/config.yaml", "--ckpt_path=best"],
    "a path": ["-c", "RUN/config.yaml", "--ckpt_path", CHECKPOINT],
    "a state file": ["-cRUN/config.yaml", f"--ckpt_path={CHECKPOINT}/{STATE}"],
    "the checkpoint first": ["--ckpt_path", "last", "--config", "RUN/config.yaml"],
    "after a shipped one": ["--config", "pendulum", "--config", "RUN/config.yaml", "--ckpt_path", CHECKPOINT],
    "before a shipped one": ["--config", "RUN/config.yaml", "--config", "pendulum", "--ckpt_path", CHECKPOINT],
    "in the run's folder": ["--config", "config.yaml", "--ckpt_path", "last", "cwd=RUN"],
    "in the run's folder, resume": ["--resume", ".", "cwd=RUN"],
    "in the checkpoint's folder": ["--resume", ".", f"cwd={CHECKPOINT}"],
    "above it": ["--resume", "run", "cwd=RUN/.."],
    "a link to the folder": ["--resume", "link"],
    "a link to the settings": ["--config", "link.yaml", "--ckpt_path", CHECKPOINT],
    "short options": ["--conf", "RUN/config.yaml", "--ckpt", CHECKPOINT],
    "a short option": ["--config", "RUN/config.yaml", "--ckpt", CHECKPOINT],
    "trusted in vain": ["--resume", "RUN", "--trust=false"],
    "trusted in vain, at the end": ["--config", "RUN/config.yaml", "--ckpt_path", CHECKPOINT, "--trust=false"],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_going_on_checks_the_settings(way: str, shared: Shared) -> None:
    shared.edit_config(trainer(callbacks=[{"class_path": "evil.Callback"}]))
    (shared.folder / "link").symlink_to(shared.run)
    (shared.folder / "link.yaml").symlink_to(shared.config)
    args = [arg.replace("RUN", str(shared.run)) for arg in WAYS[way]]
    cwd = Path(args.pop().removeprefix("cwd=")) if args[-1].startswith("cwd=") else None
    shared.refused(*args, FURTHER, cwd=cwd)


def test_a_checkpoint_named_in_the_settings_is_one_to_go_on_from(shared: Shared) -> None:
    shared.edit_config(top(ckpt_path=f"RUN/{shared.checkpoint.path.relative_to(shared.run)}"))
    shared.edit_config(trainer(callbacks=[{"class_path": "evil.Callback"}]))
    shared.refused("--config", shared.config, FURTHER)


def test_settings_do_not_trust_themselves(shared: Shared) -> None:
    shared.edit_config(top(trust=True))
    shared.edit_state(lambda state: state["hyper_parameters"]["loss"].update(class_path="evil.Loss"))
    assert "names 'evil.Loss'" in shared.refused("--resume", shared.run, FURTHER)


def test_the_installed_command_imports_nothing_from_the_path(shared: Shared) -> None:
    """As a user types it, with the module on PYTHONPATH."""
    shared.edit_config(loss({"class_path": "evil.Loss"}))
    paths = os.pathsep.join([str(shared.modules), environment()["PYTHONPATH"]])
    result = subprocess.run(
        [Path(sys.executable).with_name("qsm-fit"), "--resume", shared.run, FURTHER],
        cwd=shared.folder,
        env=environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith(f"qsm-fit: {shared.config} names 'evil.Loss', ")
    assert "--trust" in sentence
    assert result.stdout == ""
    assert not shared.marker.exists()


# What the state names.

STATES: dict[str, Callable[[Any], object]] = {
    "loss": lambda state: state["hyper_parameters"]["loss"].update(class_path="evil.Loss"),
    "env": lambda state: state["datamodule_hyper_parameters"].update(env="evil:Evil-v0"),
    "env, of a module with a hyphen": lambda s: s["datamodule_hyper_parameters"].update(env="ev-il:Evil-v0"),
    "loss, as text": lambda state: state["hyper_parameters"].update(loss="evil.Loss"),
    "a shell": lambda state: state["hyper_parameters"].update(loss=SHELL),
    "a function": lambda state: state["hyper_parameters"].update(loss=HUB),
    "a class that is no loss": lambda state: state["hyper_parameters"].update(loss=PROCESS),
    "no loss": lambda state: state["hyper_parameters"].pop("loss"),
    "a setting that is not known": lambda state: state["hyper_parameters"].update(evil="evil.Loss"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_names_code_is_refused(name: str, shared: Shared) -> None:
    shared.edit_state(STATES[name])
    shared.refused(shared.run, "--episodes=1", program="qsm-eval")
    if name != "a setting that is not known":
        shared.refused("--resume", shared.run, FURTHER)
    if name in ("loss", "env"):
        alone = shutil.copy(shared.checkpoint.state, shared.folder / "policy.ckpt")
        assert "--trust" in shared.refused(alone, "--episodes=1", program="qsm-eval")
        assert "--trust" in shared.refused(*TINY, FURTHER, "--ckpt_path", shared.checkpoint.path)


# What is linked.


def test_a_link_in_a_run_leads_to_no_file_of_the_user(shared: Shared) -> None:
    """Archives carry links. One in place of a file that a run writes must not have its target written."""
    home = shared.folder / "home"
    home.mkdir()
    folder = shared.run / "checkpoints"
    targets = {
        name: home / name.rpartition("/")[2] for name in ("checkpoints/.lock", "metrics.csv", "config.yaml", "x.pt")
    }
    for name, target in targets.items():
        link = shared.run / name
        if link.is_file() and not name.endswith(".lock"):
            shutil.copy(link, target)
        else:
            target.write_text("precious")
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    before = contents(home)
    assert shared.start("--resume", shared.run, FURTHER)[0] == 0
    assert contents(home) == before
    assert len(checkpoints.complete(folder)) == 2


def test_a_linked_folder_of_replay_files_loses_none_of_the_users(shared: Shared) -> None:
    home = shared.folder / "home"
    shutil.move(shared.checkpoint.replay, home)
    for name in ("letter.txt", ".profile"):
        (home / name).write_text("precious")
    (home / "folder").mkdir()
    shared.checkpoint.replay.symlink_to(home)
    status, text = shared.start("--resume", shared.run, FURTHER)
    assert status == 0
    assert "no checkpoint could be written" not in text
    assert {"letter.txt", ".profile", "folder"} <= {path.name for path in home.iterdir()}


# What is trusted.


def test_a_loss_of_ones_own_is_taken_with_trust(shared: Shared) -> None:
    (shared.modules / "mine.py").write_text("from qsm_lightning.losses import QSM\n\nclass Mine(QSM):\n    pass\n")
    settings = ["--model.loss=mine.Mine", "--model.loss.m_q=1", "--name=mine"]
    status, text = shared.start(*TINY, *settings)
    assert status == 0, text
    run = shared.folder / "runs" / "mine" / "version_0"
    for further in ("65", "70"):  # that it was trusted once is not remembered
        assert "names 'mine.Mine'" in shared.refused("--resume", run, f"--data.total_frames={further}")
        status, text = shared.start("--resume", run, f"--data.total_frames={further}", "--trust")
        assert status == 0, text
        assert yaml.safe_load((run / "config.yaml").read_text())["trust"] is False
    assert "names 'mine.Mine'" in shared.refused(run, "--episodes=1", program="qsm-eval")
    status, text = shared.start(run, "--episodes=1", "--trust", program="qsm-eval")
    assert status == 0, text
    assert "env: Pendulum-v1" in text


def test_an_environment_of_ones_own_is_taken_with_trust(shared: Shared) -> None:
    shared.edit_config(env("tests.fake_envs:Wanderer-v0"))
    assert "tests.fake_envs" in shared.refused("--resume", shared.run, FURTHER)
    assert "was made with other settings: data.env" in shared.refused("--resume", shared.run, FURTHER, "--trust")


@pytest.mark.parametrize(
    "settings",
    [
        {"callbacks": [{"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"}]},
        {"plugins": [{"class_path": "lightning_fabric.plugins.environments.SLURMEnvironment"}]},
        {"profiler": {"class_path": "pytorch_lightning.profilers.SimpleProfiler"}, "max_time": "00:01:00:00"},
        {"callbacks": [{"class_path": "qsm_lightning.callbacks.StopOnNonFinite"}], "logger": True},
    ],
    ids=str,
)
def test_classes_of_the_packages_trusted_need_no_trust(settings: dict[str, Any], shared: Shared) -> None:
    shared.edit_config(trainer(**settings))
    shared.edit_config(top(name="torch.nn"))
    status, text = shared.start("--resume", shared.run, FURTHER)
    assert status == 0, text
