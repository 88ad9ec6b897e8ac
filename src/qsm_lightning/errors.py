"""The three ways a command of this package ends early, each with its own exit status."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting cannot be used. The message is one sentence that names the setting and the mend (exit status 2)."""


class TrainingFault(RuntimeError):
    """Training cannot go on: NaN or inf in the data or in a loss (exit status 3)."""


class Interrupted(Exception):
    """A signal stopped the run; ``checkpoint`` is what it wrote before, if anything (exit status 128 + number)."""

    def __init__(self, signum: int, checkpoint: str | None) -> None:
        where = (
            f"the state of the run is in {checkpoint}" if checkpoint else "nothing was saved since the last checkpoint"
        )
        super().__init__(f"interrupted; {where}")
        self.signum = signum
        self.checkpoint = checkpoint


def require(condition: bool, message: str) -> None:
    """Raise :class:`SettingError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise SettingError(message)


def require_positive(**settings: float) -> None:
    """Raise :class:`SettingError` for the first of ``settings`` that is not above zero."""
    for name, value in settings.items():
        require(value > 0, f"{name.replace('__', '.')} is {value}: it must be greater than 0")
