"""What the README says of the settings is what they are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import yaml
from pytorch_lightning import Trainer

from qsm_lightning.callbacks import PolicyPicture, RunCheckpoint, TrainingMetrics
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.losses import QSM
from qsm_lightning.module import OffPolicyModule
from tests.helpers import ROOT

OWNERS: dict[str, type] = {
    **{"data": OffPolicyDataModule, "model": OffPolicyModule, "model.loss": QSM, "trainer": Trainer},
    **{"checkpoint": RunCheckpoint, "metrics": TrainingMetrics, "picture": PolicyPicture},
}


def told() -> Iterator[tuple[str, Any]]:
    """Each setting in the README's table with its default; what is told in words is left out."""
    table = (ROOT / "README.md").read_text().split("## Settings that matter")[1].split("\n## ")[0]
    for names, cell in re.findall(r"^\| (`[a-z].*?`) \| (.*?) \|", table.split("stable-baselines3")[0], re.MULTILINE):
        settings = re.findall(r"`([\w.]+)`", names)
        plain = re.sub(r"(?<=\d),(?=\d{3})", "", re.split("; |, which ", cell)[0])
        defaults = yaml.safe_load(f"[{plain.replace('e-', '.0e-')}]")  # YAML's numbers have no comma, and a point
        for setting, default in zip(settings, defaults * (len(settings) // len(defaults)), strict=True):
            if not isinstance(default, str) or (" " not in default and f"data.{default}" not in table):
                yield setting, default


def default_of(owner: type, name: str) -> Any:
    """The default of a class's setting, which may be one of the class's bases."""
    for cls in owner.__mro__:
        parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
        if name in parameters:
            return parameters[name].default
    raise AssertionError(f"{owner.__name__} has no setting {name}")


def test_the_defaults_in_the_readme_are_the_ones_there_are() -> None:
    compared = 0
    for setting, default in told():
        owner, _, name = setting.rpartition(".")
        if owner in OWNERS:
            actual = default_of(OWNERS[owner], name)
            actual = list(actual) if isinstance(actual, tuple) else actual
            assert (default, isinstance(default, bool)) == (actual, isinstance(actual, bool)), setting
            compared += 1
    assert compared >= 35
