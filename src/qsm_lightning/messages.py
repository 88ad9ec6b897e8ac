"""What the command line says about bad settings: one sentence that names the setting and the mend."""

from __future__ import annotations

import difflib
import inspect
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

import qsm_lightning
from qsm_lightning import losses
from qsm_lightning.errors import SettingError, one_line, require

GROUPS = {"trainer", "model", "data", "checkpoint", "metrics", "picture"}
OPTIONS = {"resume", "print_config"}
SHIPPED = Path(qsm_lightning.__file__).parent / "conf"


def shipped_config(value: str) -> str:
    """``value`` itself if it is a file, else the shipped configuration of that name (``hopper``, ``dmc/walker_walk``).

    Raises:
        SettingError: when there is neither, or the file is not a YAML mapping.
    """
    name = str(value).removesuffix(".yaml").removeprefix("conf/")
    path = Path(value) if Path(value).is_file() else SHIPPED / f"{name}.yaml"
    if not path.is_file():
        known = sorted(str(p.relative_to(SHIPPED).with_suffix("")) for p in SHIPPED.rglob("*.yaml"))
        raise SettingError(f"--config is {value!r}: there is no such file; shipped ones are {', '.join(known)}")
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingError(f"--config is {value!r}, which cannot be read ({error}): choose another") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = one_line(getattr(error, "problem", None) or error)
        raise SettingError(f"--config is {value!r}: not valid YAML, {problem}{where}; mend it there") from error
    require(
        isinstance(content, dict),
        f"--config is {value!r}: it must hold settings, such as 'data:' and 'model:'",
    )
    for group in GROUPS & content.keys():
        require(
            isinstance(content[group], dict),
            f"--config is {value!r}: {group} must hold settings, and is {content[group]!r}; give some, or leave it out",
        )
    for option in OPTIONS & content.keys():
        require(
            content[option] in (None, False),
            f"--config is {value!r}: {option} is for the command line alone; leave it out there, and give --{option}",
        )
    return str(path)


def sentence(message: str, known: list[str]) -> str:
    """jsonargparse's error message as one sentence; ``known`` are the valid settings, dotted."""
    keys = re.findall(r'Parser key "([^"]+)":', message)
    text = re.sub(r'Parser key "[^"]+":', "", message)
    key = ".".join(keys)
    unknown = re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", text)
    option = re.search(r"[Oo]ption '([^']+)'", text)
    if unknown is not None:
        return _unknown(unknown[1], known)
    if option is not None and "accept" in text:
        group = re.search(r"Group '([^']+)'", text)
        return _unknown(".".join(filter(None, [group[1] if group else key, option[1]])), known)
    missing = re.search(r"class_path '([\w.]+)':\s*Requirement '([^']+)' not met", text)
    if missing is not None:
        return f"{missing[1]} needs {missing[2]}: pip install '{missing[2]}'"
    needed = re.search(r"class_path '([\w.]+)':\s*the following arguments are required: ([^\n]+)", text)
    if key and needed is not None:
        return f"{key}: {needed[1]} needs {needed[2]}; give it among its settings (init_args)"
    if key == "model.loss" and ("import path" in text or "expects a function" in text):
        names = ", ".join(losses.ALGORITHMS)
        return (
            f"model.loss: there is no such loss, or its init_args are empty; choose {names} on the command line, or a "
            "class_path such as QSM"
        )
    unknown_class = re.search(r"Expected a dot import path string: (\S+)", text)
    if key and unknown_class is not None:
        return f"{key}: there is no class {unknown_class[1]}; give its path, or the name of Lightning's own"
    return _expected(key, one_line(text)) if key else one_line(text)


def _expected(key: str, text: str) -> str:
    """'Expected a X. Got value: v', perhaps for several X, as '<key> is v: it must be X'."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal(\[[^\]]*\])", r"one of \1", text)
    text = re.sub(r"Not of type \w+: does not conform to restriction v([<>]=?\S+)", r"Expected a number \1", text)
    text = text.replace("Expected a Sequence", "Expected a list such as [256, 256]")
    wanted = re.findall(r"Expected an? (.+?)(?=\. Got value| - Expected| Given value|$)", text)
    value = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value| - Expected|$)", text)
    if not wanted or value is None:
        return f"{key}: {text}"
    return f"{key} is {value[1]!r}: it must be {' or '.join(dict.fromkeys(wanted)).replace('NoneType', 'null')}"


def _unknown(key: str, known: list[str]) -> str:
    if key in known:
        owners = [name for name, cls in losses.ALGORITHMS.items() if key.rpartition(".")[2] in loss_settings(cls)]
        return (
            f"{key} is a setting of {', '.join(owners)}, not of what model.loss names: leave it out, or choose another "
            "(an algorithm's configuration goes after the task's)"
        )
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    best = next(iter(same_leaf or near), None)
    return f"{key} is not a setting; " + (f"did you mean {best}?" if best else "see qsm-fit --help")


def loss_settings(cls: type[losses.OffPolicyLoss]) -> dict[str, Any]:
    """Names and defaults of a loss's settings; ``**settings`` stands for its base class's, but for those ``fixed``."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        own = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        parameters |= {name: p for name, p in own.items() if name not in parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty and name not in cls.fixed}


class ParserErrors:
    """Mixin for a jsonargparse parser: its errors as :class:`SettingError`, without the usage before them."""

    _actions: list[Any]
    exit_on_error: bool

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as one sentence; a parser inside another's leaves that to it."""
        if not self.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        known = [action.dest for action in self._actions if action.dest not in ("help", "config")]
        settings = {name for cls in losses.ALGORITHMS.values() for name in loss_settings(cls)}
        known += [f"model.loss.{name}" for name in sorted(settings)]
        raise SettingError(sentence(message, known)) from ex
