"""What a checkpoint's settings may name before its owner is trusted: classes of a few packages, and nothing else."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning import Callback
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import CheckpointIO, LayerSync, Precision
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.strategies import Strategy

from qsm_lightning.continuous import CONTINUOUS
from qsm_lightning.errors import SettingError
from qsm_lightning.losses import OffPolicyLoss

PACKAGES = ("qsm_lightning", "torch", "torchrl", "pytorch_lightning", "lightning_fabric")
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
# Strings that are names of folders, not of classes.
_FOLDERS = ("name", "default_root_dir", "storage_dir")


def check_class(import_path: str, where: str) -> None:
    """Raise :class:`SettingError` unless ``import_path`` is a loss or a part of a Trainer, and of a trusted package."""
    if import_path.partition(".")[0] in PACKAGES:
        found = import_class(import_path)
        defined_in = getattr(found, "__module__", "").partition(".")[0]
        if isinstance(found, type) and issubclass(found, _kinds()) and defined_in in PACKAGES:
            return
    raise _refusal(where, f"names {import_path!r}, which is not a loss, callback or the like of {', '.join(PACKAGES)}")


def _kinds() -> tuple[type, ...]:
    """What settings may name: a loss, and what Lightning's Trainer is made of."""
    parts = (Callback, Logger, Strategy, Accelerator, Profiler, Precision, CheckpointIO, ClusterEnvironment, LayerSync)
    return (OffPolicyLoss, *parts)


def check_env(name: str, where: str) -> None:
    """Raise :class:`SettingError` for an environment name that would import a module."""
    if name.startswith(f"{CONTINUOUS}:"):
        name = name.removeprefix(f"{CONTINUOUS}:").partition("?")[0]
    module, colon, _ = name.partition(":")
    if colon and module not in ("dmc", "envpool"):
        raise _refusal(where, f"names the environment {name!r}, which imports the module {module!r}")


def check_config(path: Path) -> None:
    """Refuse a stored configuration that names code outside of the trusted packages, before any of it is imported.

    Raises:
        SettingError: for the first such name, and for a setting that would load another file or hide a name.
    """
    try:
        settings = yaml.safe_load(path.read_bytes())
        _check_settings(settings, path)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{path} is not readable ({type(error).__name__}); choose another") from error


def _check_settings(settings: Any, path: Path) -> None:
    if not isinstance(settings, dict):
        raise SettingError(f"{path} holds no settings; choose another")
    for key in ("model", "data", "trainer"):
        if not isinstance(settings.get(key, {}), dict):
            raise _refusal(str(path), f"takes {key} from another file")
    _check_tree(settings, path, "")


def _check_tree(node: Any, path: Path, key: str) -> None:
    if isinstance(node, dict):
        for name, value in node.items():
            if not isinstance(name, str) or name == "config" or "$" in name:
                raise _refusal(str(path), f"has the setting {name!r}, which may load something else")
            _check_tree(value, path, name.rpartition(".")[2])
    elif isinstance(node, list):
        for value in node:
            _check_tree(value, path, key)
    elif isinstance(node, str):
        _check_string(node, path, key)


def _check_string(value: str, path: Path, key: str) -> None:
    where, text = str(path), value.strip()
    if "${" in value:
        raise _refusal(where, f"has {key}: {value!r}, which may hide a name")
    if key in _FOLDERS:
        return
    if key == "dataset":
        if not text.endswith(".npz") and _is_file(Path(text).expanduser()):  # an .npz has arrays and runs no code
            raise _refusal(where, f"takes {key} from the file {value!r}")
        return
    if key == "env":
        check_env(value, where)
    elif key == "class_path" or _IMPORT_PATH.fullmatch(text):
        check_class(text, where)
    elif "://" in value or "::" in value:
        raise _refusal(where, f"has {key}: {value!r}, which may lead elsewhere")
    elif text and any(_is_file(place) for place in (Path(text).expanduser(), path.parent / text)):
        raise _refusal(where, f"takes {key} from the file {value!r}")
    elif isinstance(inner := _parsed(value, where, key), (dict, list)):  # the command line's parser looks inside
        _check_tree(inner, path, key)


def _parsed(value: str, where: str, key: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise _refusal(where, f"has {key}: {value!r}, which may hide a name") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, for example
        return False


def check_state(state: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint's content whose settings name code outside of the trusted packages.

    Raises:
        SettingError: naming it.
    """
    try:
        loss, env = state["hyper_parameters"]["loss"]["class_path"], state["datamodule_hyper_parameters"]["env"]
    except (KeyError, TypeError) as error:
        raise SettingError(f"{path} has settings that qsm-fit does not write ({error}); choose another") from error
    check_class(str(loss), str(path))
    check_env(str(env), str(path))


def import_class(import_path: str) -> Any:
    """The object at a dotted path."""
    module, _, name = import_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"{import_path} cannot be imported ({error}); install what it belongs to") from error


def _refusal(where: str, what: str) -> SettingError:
    return SettingError(f"{where} {what}: add --trust if you trust whoever made it")
