"""What a checkpoint's settings may name before its owner is trusted: classes of four packages, and nothing else."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import yaml

from qsm_lightning.errors import SettingError

PACKAGES = ("qsm_lightning", "torch", "torchrl", "pytorch_lightning")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# Strings that are names of folders, not of classes.
_FOLDERS = ("name", "default_root_dir", "storage_dir")


def check_class(import_path: str, where: str) -> None:
    """Raise :class:`SettingError` unless ``import_path`` is a class that a trusted package itself defines."""
    if import_path.partition(".")[0] in PACKAGES:
        found = import_class(import_path)
        if isinstance(found, type) and found.__module__.partition(".")[0] in PACKAGES:
            return
    raise _refusal(where, f"names {import_path!r}, which is not a class of {', '.join(PACKAGES)}")


def check_env(name: str, where: str) -> None:
    """Raise :class:`SettingError` for an environment name that would import a module."""
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
    except (OSError, yaml.YAMLError) as error:
        raise SettingError(f"{path} is not readable ({type(error).__name__}); choose another") from error
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
    where = str(path)
    if "${" in value or (key not in _FOLDERS and re.search(r"[{}\[\]\n]", value)):
        raise _refusal(where, f"has {key}: {value!r}, which may hide a name")
    if key in _FOLDERS:
        return
    if key == "env":
        check_env(value, where)
    elif key == "class_path" or _IMPORT_PATH.fullmatch(value):
        check_class(value, where)
    elif value and (Path(value).is_file() or (path.parent / value).is_file()):
        raise _refusal(where, f"takes {key} from the file {value!r}")


def check_state(state: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint's content whose settings name code outside of the trusted packages.

    Raises:
        SettingError: naming it.
    """
    check_class(str(state["hyper_parameters"]["loss"]["class_path"]), str(path))
    check_env(str(state["datamodule_hyper_parameters"]["env"]), str(path))


def import_class(import_path: str) -> Any:
    """The object at a dotted path."""
    module, _, name = import_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"{import_path} cannot be imported ({error}); install what it belongs to") from error


def _refusal(where: str, what: str) -> SettingError:
    return SettingError(f"{where} {what}: add --trust if you trust whoever made it")
