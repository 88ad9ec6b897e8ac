"""The loggers of a run, on a disk that becomes full and has room again."""

from __future__ import annotations

import csv
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from qsm_lightning.loggers import RunTensorBoardLogger, _Writer
from tests.compare import curves


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes: what is written there fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def begun(folder: Path, rows: int) -> _Writer:
    """A writer that has saved so many rows."""
    folder.mkdir()
    writer = _Writer(str(folder))
    for step in range(rows):
        writer.log_metrics({"loss": step + 0.5}, step)
        writer.save()
    return writer


@pytest.mark.parametrize(("rows", "column"), [(0, "loss"), (3, "loss"), (3, "eval/return")])
def test_no_row_is_lost_wherever_the_disk_becomes_full(rows: int, column: str, tmp_path: Path) -> None:
    """At any byte, also of a row that brings a new column: earlier rows stay, and it is there after the next save."""
    writer = begun(tmp_path / "whole", rows)
    writer.log_metrics({column: 7.0}, rows)
    writer.save()
    expected = Path(writer.metrics_file_path).read_text()
    failures = 0
    for room in range(len(expected)):
        writer = begun(tmp_path / str(room), rows)
        path = Path(writer.metrics_file_path)
        writer.log_metrics({column: 7.0}, rows)
        with files_up_to((path.stat().st_size if rows else 0) + room), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            writer.save()
        failures += len(said)
        if not said:
            break
        left = path.read_text()
        assert [float(row["loss"]) for row in csv.DictReader(left.splitlines())] == [step + 0.5 for step in range(rows)]
        assert left == "" or left.endswith("\n"), "half a row is cut off"
        writer.save()
        assert path.read_text() == expected
    assert failures > 5
    assert path.read_text() == expected, "with room enough for it at once"


def test_curves_are_left_out_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TensorBoard, with one warning; then they go on in a new file."""
    disk = SimpleNamespace(free=2**40)
    monkeypatch.setattr("qsm_lightning.loggers.shutil.disk_usage", lambda path: disk)
    logger = RunTensorBoardLogger(str(tmp_path), "run", "version_0")
    logger.log_metrics({"loss": 0.5}, 0)
    writer = logger.experiment
    writer.flush()
    with files_up_to(0):
        logger.log_metrics({"loss": 1.5}, 1)
        with suppress(OSError):
            while True:  # until the thread that writes has failed
                writer.flush()
    disk.free = 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in (2, 3):
            logger.log_metrics({"loss": step + 0.5}, step)
    assert ["the disk is full" in str(warning.message) for warning in said] == [True]
    disk.free = 2**40
    logger.log_metrics({"loss": 4.5}, 4)
    logger.experiment.flush()
    assert curves(tmp_path / "run/version_0") == {"loss": [(0, 0.5), (4, 4.5)]}
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 2


def test_a_curve_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of the wrong kind is an error still."""
    logger = RunTensorBoardLogger(str(tmp_path), "run", "version_0")
    with pytest.raises(ValueError, match="you tried to log three"):
        logger.log_metrics({"loss": "three"}, 0)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger.experiment, "add_scalar", full)
    with pytest.warns(UserWarning, match="curves for TensorBoard were left out .*No space left"):
        logger.log_metrics({"loss": 3.0}, 0)
