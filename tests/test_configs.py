"""Every shipped configuration, shrunk, takes real steps."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from qsm_lightning import losses
from qsm_lightning.cli import fit
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.losses import ALGORITHMS, CQSM, CQSMDiffusion
from qsm_lightning.messages import loss_settings
from tests.compare import last
from tests.helpers import CONFIGS, ROOT, SHRINK, has

NAMES = [str(path.relative_to(ROOT / "conf").with_suffix("")) for path in CONFIGS]
GYM = {"pendulum", "hopper", "halfcheetah", "walker2d", "ant", "humanoid", "swimmer", "toy_two_goals"}
CONTINUOUS = {"cqsm", "cqsm_diffusion"}  # their environments are in continuous time
DMC = ["cartpole_balance", "cartpole_swingup", "cheetah_run", "hopper_hop"]
DMC += ["walker_walk", "walker_run", "quadruped_walk", "humanoid_walk"]


def test_all_promised_configurations_are_there() -> None:
    algorithms = {f"algo/{name}" for name in {*ALGORITHMS} - {*CONTINUOUS}}
    continuous = {f"cqsm/{name}" for name in ("pendulum", "hopper", "cartpole_swingup", "lq")}
    assert GYM | {f"dmc/{name}" for name in DMC} | algorithms | {"algo/qsm_offline"} | continuous == set(NAMES)


@pytest.mark.parametrize("loss", sorted({*ALGORITHMS} - {"qsm", *CONTINUOUS}))
def test_an_algorithm_is_chosen_by_its_name(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any task; what is given for all of them is kept."""
    monkeypatch.chdir(tmp_path)
    fit(["--config", "pendulum", "--model.loss", loss, *SHRINK, "--model.loss.gamma=0.9"])
    config = yaml.safe_load(next(tmp_path.glob("runs/*/version_0/config.yaml")).read_text())
    chosen = config["model"]["loss"]
    assert chosen["class_path"] == f"qsm_lightning.losses.{ALGORITHMS[loss].__name__}"
    assert (chosen["init_args"]["hidden"], chosen["init_args"]["gamma"]) == ([16, 16], 0.9)
    assert config["model"]["actor_lr_decay_updates"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if (name.startswith("dmc/") or name == "cqsm/cartpole_swingup") and not has("dm_control"):
        pytest.skip("the extra dmc is not installed")
    monkeypatch.chdir(tmp_path)
    fit(["--config", name, *SHRINK, "--data.eval_episodes=1", "--data.eval_selector=sample", "--picture.states=1"])
    out = capsys.readouterr().out
    assert "final return: " in out
    assert "best return: " in out
    run = next(tmp_path.glob("runs/*/version_0"))
    last(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    loss = config["model"]["loss"]
    if name.startswith("cqsm/"):
        chosen = CQSMDiffusion if name == "cqsm/hopper" else CQSM
        assert loss["class_path"] == f"qsm_lightning.losses.{chosen.__name__}"
    elif name.startswith("algo/"):
        algorithm = name.removeprefix("algo/").removesuffix("_offline")
        assert loss["class_path"] == f"qsm_lightning.losses.{ALGORITHMS[algorithm].__name__}"
    else:
        assert (loss["init_args"]["m_q"], loss["init_args"]["score_at"]) == ("auto", "denoised")


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_only_says_what_differs(name: str) -> None:
    content = yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())
    assert set(content) <= {"data", "model"}
    data = {k: p.default for k, p in inspect.signature(OffPolicyDataModule).parameters.items()}
    loss = dict(content.get("model", {}).get("loss", {}))
    chosen = getattr(losses, loss.pop("class_path", "QSM").rpartition(".")[2])
    for defaults, given in (
        ({**data, "env": None}, content.get("data", {})),
        (loss_settings(chosen), loss.get("init_args", loss)),
    ):
        for key, value in given.items():
            assert value != defaults[key], f"{key} repeats the default"
    if not name.startswith("algo/"):
        source = {"dmc": "dmc", "cqsm": "continuous"}.get(name.partition("/")[0] if "/" in name else "")
        assert source is None or content["data"]["env"].startswith(f"{source}:")
