"""Lightning's loggers, able to go on in a run's folder and to outlast a full disk."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from qsm_lightning import durable
from qsm_lightning.tables import csv_text


def run_loggers(folder: Path | None, root: Path, name: str) -> list[Any]:
    """The loggers of a run: of a new one below ``root``/``name``, or going on in the run's ``folder``."""
    version: str | int | None = None
    if folder is not None:
        whole = folder if len(folder.parts) > 2 else folder.resolve()
        root, name, version = whole.parent.parent, whole.parent.name, whole.name
    board = RunTensorBoardLogger(str(root), name, version, default_hp_metric=False)
    return [board, RunCSVLogger(str(root), name, board.version, flush_logs_every_n_steps=1)]


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's event files. Nothing is written while the disk is full; after a failed write a new one is begun."""

    _full = False

    @property
    @override
    def experiment(self) -> Any:
        """The writer; one that does nothing while there is no room."""
        if _failed(self._experiment):
            self._experiment = None
        full = not _has_room(Path(self.root_dir))
        if full and not self._full:
            warnings.warn("the disk is full: curves and pictures for TensorBoard are left out", stacklevel=2)
        self._full = full
        return _DummyExperiment() if full else super().experiment

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except (OSError, ValueError) as error:  # Lightning takes a failed write for a value of the wrong kind
            if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
                raise
            warnings.warn(f"curves for TensorBoard were left out ({error.__cause__ or error})", stacklevel=2)


def _has_room(folder: Path) -> bool:
    """Whether a few more megabytes fit where ``folder`` is or will be."""
    return shutil.disk_usage(durable.nearest_existing(folder)).free > 4 * 2**20


def _failed(writer: Any) -> bool:
    """Whether the thread that writes a SummaryWriter's events has ended with an error."""
    files = (getattr(writer, "all_writers", None) or {}).values()
    return any(file.event_writer._async_writer._worker.exception is not None for file in files)


class RunCSVLogger(CSVLogger):
    """``metrics.csv``, appended to; a run that goes on keeps its rows."""

    @property
    @rank_zero_experiment
    @override
    def experiment(self) -> Any:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _Writer(self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    """Lightning's writer, which never removes a row: it reads what columns there are and adds to them."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    @override
    def _check_log_dir_exists(self) -> None:
        """A folder that exists is the run's own."""

    @override
    def save(self) -> None:
        """Append the rows since the last call; on a full disk they wait for the next."""
        path, columns = Path(self.metrics_file_path), list(self.metrics_keys)
        self._whole = path.stat().st_size if path.is_file() else 0  # bytes of whole rows
        try:
            super().save()
        except OSError as error:
            self.metrics_keys = columns
            with contextlib.suppress(OSError):
                os.truncate(path, self._whole)  # half a row would spoil the file
            warnings.warn(f"{self.metrics_file_path} could not be written ({error}): trying again", stacklevel=2)

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        text = csv_text(fieldnames, ([row.get(name, "") for name in fieldnames] for row in rows))
        durable.write_file(path, text.encode())
        self._whole = path.stat().st_size
