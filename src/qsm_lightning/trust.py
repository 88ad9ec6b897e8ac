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
_MODULE_ENV = re.compile(r"(?!dmc:|envpool:)[\w.]+:")
# Strings that are names of folders, not of classes.
_FOLDERS = ("name", "ckpt_path", "default_root_dir", "storage_dir")


def is_trusted(import_path: str) -> bool:
    """Whether a dotted path leads into one of the trusted packages."""
    return import_path.partition(".")[0] in PACKAGES


def check_class(import_path: str, where: str) -> None:
    """Raise :class:`SettingError` unless ``import_path`` is of a trusted package."""
    if not is_trusted(import_path):
        raise _refusal(where, f"names {import_path!r}, code that is not of {', '.join(PACKAGES)}")


def check_env(name: str, where: str) -> None:
    """Raise :class:`SettingError` for an environment name that would import a module."""
    if _MODULE_ENV.match(name):
        raise _refusal(where, f"names the environment {name!r}, which imports the module {name.partition(':')[0]!r}")


def check_config(path: Path) -> None:
    """Refuse a stored configuration that names code outside of the trusted packages, before any of it is imported.

    Raises:
        SettingError: for the first such name, and for a setting that would load another file.
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
    check_env(str((settings.get("data") or {}).get("env", "")), str(path))
    _check_tree(settings, str(path))


def _check_tree(node: Any, where: str, key: str = "") -> None:
    if isinstance(node, dict):
        for name, value in node.items():
            if name not in _FOLDERS:
                _check_tree(value, where, str(name))
    elif isinstance(node, list):
        for value in node:
            _check_tree(value, where, key)
    elif isinstance(node, str) and key != "env":
        if _IMPORT_PATH.fullmatch(node):
            check_class(node, where)
        elif Path(node).is_file():
            raise _refusal(where, f"takes {key} from the file {node!r}")


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
