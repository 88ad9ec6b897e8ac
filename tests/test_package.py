"""The built wheel, away from the checkout: commands, configurations and callbacks are inside."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.helpers import CONFIGS, ROOT, SHRINK


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist, as an index would serve it; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        capture_output=True,
        check=True,
    )
    return next(folder.glob("*.whl"))


def test_configurations_and_callbacks_ship(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in CONFIGS:
        assert f"qsm_lightning/conf/{path.relative_to(ROOT / 'conf')}" in names
    for path in (ROOT / "callbacks").glob("*.py"):
        assert f"qsm_lightning/callbacks/{path.name}" in names
    assert "qsm_lightning/py.typed" in names
    assert not any(name.startswith(("tests", "benchmarks", "callbacks", "conf")) for name in names)
    requirements = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Requires-Dist: pytorch-lightning" in requirements
    assert "Requires-Dist: lightning" not in requirements
    for extra in ("dmc", "envpool", "export", "modes", "offline", "ray", "report", "umap", "video", "dev"):
        assert f"Provides-Extra: {extra}" in requirements


def test_every_command_has_its_function(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    parser = ConfigParser()
    parser.read_string(archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode())
    commands = parser["console_scripts"]
    assert {"qsm-fit", "qsm-eval", "qsm-export"} <= commands.keys()
    for command in commands.values():
        module, _, function = command.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_installed_commands_work_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    run = [sys.executable, "-c"]
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = "import qsm_lightning, pathlib; print(pathlib.Path(qsm_lightning.__file__).parent)"
    out = subprocess.run([*run, where], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(site / "qsm_lightning")
    fit = "import sys; from qsm_lightning.cli import fit; fit(sys.argv[1:])"
    result = subprocess.run(
        [*run, fit, "--config", "pendulum", *SHRINK], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert "final return: " in result.stdout, result.stderr
    evaluate = "import sys; from qsm_lightning.commands.evaluate import main; main(sys.argv[1:])"
    result = subprocess.run(
        [*run, evaluate, "runs/Pendulum-v1/version_0", "--episodes", "1"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert "mean: " in result.stdout, result.stderr
