"""The ways a command of this package ends early, each with its own exit status."""

from __future__ import annotations

import importlib.util
import math
import signal
from pathlib import Path
from typing import TextIO


class SettingError(ValueError):
    """A setting cannot be used. The message is one sentence that names the setting and the mend (exit status 2)."""


class TrainingFault(RuntimeError):
    """Training cannot go on: NaN or inf in a loss or an action, a failed environment (exit status 3).

    ``agreed`` means that all processes of the run end with it, and ``checkpoint`` is the last one written before it.
    """

    agreed = False
    checkpoint: Path | None = None


class EnvironmentFault(TrainingFault):
    """An environment failed. The learner's state is sound: ``checkpoint`` is where it was written, if anywhere."""


class Interrupted(BaseException):
    """A signal asked to stop; ``checkpoint`` is where the run's state was written (exit status 128 + number).

    ``at_once`` means in the middle of things, where there is no state to write, and ``agreed`` that all processes of
    the run end with it. It is not an ``Exception``: code that handles errors must let it pass.
    """

    agreed = False

    def __init__(self, signum: int, at_once: bool = False) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum
        self.at_once = at_once
        self.checkpoint: Path | None = None


def tell(line: str, stream: TextIO | None = None) -> None:
    """Print a line of a run that goes on, to standard output by default: a full disk costs the line alone."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def one_line(message: object) -> str:
    """A message without line breaks and its final stop."""
    return " ".join(str(message).split()).rstrip(".")


def first_line(error: BaseException) -> str:
    """What an error says before it goes into details, without its final stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def require(condition: object, message: str) -> None:
    """Raise :class:`SettingError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise SettingError(message)


def require_positive(prefix: str = "", /, **settings: float | None) -> None:
    """Raise :class:`SettingError` for the first of ``settings`` that is neither None nor above zero and finite.

    Args:
        prefix: what stands before their names where they are set, such as ``data.`` or ``--``.
        **settings: their values.
    """
    for name, value in settings.items():
        if value is not None:
            require(value > 0, f"{prefix}{name} is {value}: it must be greater than 0")
            require(value < math.inf, f"{prefix}{name} is {value}: it must be finite")


def require_not_negative(prefix: str = "", /, **settings: float | None) -> None:
    """As :func:`require_positive`, with 0 allowed."""
    for name, value in settings.items():
        if value is not None:
            require(value >= 0, f"{prefix}{name} is {value}: it must not be negative")
            require(value < math.inf, f"{prefix}{name} is {value}: it must be finite")


def require_at_most(most: float, prefix: str = "", /, **settings: float | None) -> None:
    """Raise :class:`SettingError` for the first of ``settings`` that is neither None nor at most ``most``."""
    for name, value in settings.items():
        if value is not None:
            require(value <= most, f"{prefix}{name} is {value}: it must be at most {most}")


def require_package(module: str, extra: str, what: str) -> None:
    """Raise :class:`SettingError` unless an optional package is installed.

    Args:
        module: its import name.
        extra: the extra that installs it.
        what: the setting that needs it, in words.
    """
    require(
        importlib.util.find_spec(module) is not None,
        f"{what}: {module} is not installed; pip install 'qsm-lightning[{extra}]'",
    )
