"""Errors of the command line in one sentence that names the setting and the mend."""

from __future__ import annotations

from pathlib import Path

import qsm_lightning
from qsm_lightning.errors import SettingError

SHIPPED = Path(qsm_lightning.__file__).parent / "conf"


def shipped_config(value: str) -> str:
    """``value`` itself if it is a file, else the shipped configuration of that name (``hopper``, ``dmc/walker_walk``)."""
    path = SHIPPED / f"{str(value).removesuffix('.yaml').removeprefix('conf/')}.yaml"
    return str(path) if not Path(value).exists() and path.is_file() else value


class ParserErrors:
    """Mixin for a jsonargparse parser: its errors as :class:`SettingError`, without the usage before them."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        raise SettingError(message) from ex
