"""The folder of a run: which it is, that one process uses it, and its curves cut back to where a run goes on."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import math
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from qsm_lightning import checkpoints, durable, trust
from qsm_lightning.distributed import Ranks
from qsm_lightning.errors import SettingError
from qsm_lightning.tables import csv_text

CHECKPOINTS, CONFIG, METRICS = "checkpoints", "config.yaml", "metrics.csv"


def begun_at(trainer: Trainer) -> checkpoints.Checkpoint | None:
    """The checkpoint that a run goes on from."""
    return checkpoints.Checkpoint(Path(trainer.ckpt_path).parent) if trainer.ckpt_path else None


def run_folder(trainer: Trainer) -> Path:
    """The run's folder: that of the checkpoint that it goes on from, or the first logger's.

    Unlike ``trainer.log_dir`` it can be asked for on one rank alone.
    """
    if checkpoint := begun_at(trainer):
        return checkpoint.run
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return Path(next(filter(None, folders), trainer.default_root_dir))


def agreed_folder(trainer: Trainer, ranks: Ranks) -> Path:
    """The first rank's run folder, for all: others, which start later, would take its folder for an older run's."""
    folder = Path(ranks.gather(str(run_folder(trainer)))[0])
    for logger in trainer.loggers if ranks.rank > 0 else []:
        if isinstance(logger, TensorBoardLogger | CSVLogger) and folder == Path(logger.root_dir) / folder.name:
            logger._version = folder.name
    return folder


def mapped_folder(run: Path, storage_dir: str | None, rank: int = 0) -> Path:
    """Where a rank's mapped replay frames are while it trains: the same for every process that goes on with the run."""
    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
    return Path(storage_dir or run) / f"replay-{identity}-{rank}"


def resume_command(checkpoint: Path) -> str:
    """The command that goes on with the run of a checkpoint, its newest."""
    run = checkpoint.parent.parent
    if not (run / CONFIG).is_file():
        return shlex.join(["qsm-fit", "--config", "CONFIG", "--ckpt_path", str(checkpoint)])
    try:
        trust.check_config(run / CONFIG)
    except SettingError:
        return shlex.join(["qsm-fit", "--resume", str(run), "--trust"])  # it is the user's own
    return shlex.join(["qsm-fit", "--resume", str(run)])


def and_now(checkpoint: Path | None) -> str:
    """Where the run's state is and how to go on with it, behind what ended it."""
    if checkpoint is None:
        return "; nothing was saved"
    return f"; the run's last state is in {checkpoint}\nresume with: {resume_command(checkpoint)}"


def and_now_of(run: Path) -> str:
    """:func:`and_now` for a run's newest checkpoint."""
    newest = checkpoints.complete(run / CHECKPOINTS)[-1:]
    return and_now(newest[0].path if newest else None)


def lock(run: Path) -> Any:
    """Hold a run's folder for this process until it ends, however it ends; returns what must be kept to hold it.

    Raises:
        SettingError: when another process holds it, or it cannot be written.
    """
    folder = run / CHECKPOINTS
    with durable.writing(folder, "the run's folder"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    if not hold(file):
        file.close()
        raise SettingError(
            f"{run} is in use: another qsm-fit trains there; wait for its end, or start again for a new folder"
        )
    return file


def hold(file: TextIO) -> bool:
    """Hold a file while it is open, here or in a child process; False where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def remember(run: Path) -> Callable[[], None]:
    """Remember a run's settings and curves; what is returned puts them back as they were.

    A resume that is refused while Lightning sets up has cut the curves by then, and begun files of its own.
    """

    def files() -> list[Path]:
        found = [run / CONFIG, run / METRICS, run / "hparams.yaml", *run.glob("events.out.tfevents.*")]
        return [path for path in found if path.is_file()]

    before = {path: path.read_bytes() for path in files()}

    def put_back() -> None:
        for path in set(files()) - before.keys():
            path.unlink()
        durable.write_files(run, {path.name: content for path, content in before.items()})

    return put_back


def cut_curves(run: Path, frames: int, evaluated: bool) -> None:
    """Remove from the curves what lies after ``frames``, so that nothing stands there twice when a run goes on.

    Args:
        run: the run's folder, with metrics.csv and event files as far as there are any.
        frames: the frame it goes on from.
        evaluated: whether the evaluation at that very frame is part of the past.
    """

    def keeps(step: int, names: Iterable[str]) -> bool:
        repeated = not evaluated and any(name.startswith(("eval", "policy", "episode")) for name in names)
        return step < frames or (step == frames and not repeated)

    for path in run.glob(".*.[0-9]*"):  # a killed process was about to rename it
        path.unlink()
    _cut_csv(run / METRICS, keeps)
    for path in sorted(run.glob("events.out.tfevents.*")):
        _cut_events(path, keeps)


def metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a metrics.csv, if there is one, but for a row that a killed process left unfinished."""
    content = path.read_bytes() if path.is_file() else b""
    content = content[: content.rfind(b"\n") + 1]  # a torn last line is not whole
    content = b"".join(line for line in content.splitlines(True) if b"\0" not in line)  # blocks lost in a power cut
    csv.field_size_limit(max(len(content), csv.field_size_limit()))  # a stray quote may make all that follows one
    reader = csv.DictReader(io.StringIO(content.decode(errors="replace"), newline=""))
    rows = [row for row in reader if None not in row.values() and None not in row and _is_number(row.get("step"))]
    return list(reader.fieldnames or []), rows


def _cut_csv(path: Path, keeps: Any) -> None:
    names, rows = metrics(path)
    if "step" not in names:
        return
    kept = (row for row in rows if keeps(int(float(row["step"])), [k for k in names if row[k] != ""]))
    durable.write_file(path, csv_text(names, ([row[k] for k in names] for row in kept)).encode())


def _is_number(text: str | None) -> bool:
    try:
        return 0 <= float(text or "") < math.inf
    except ValueError:
        return False


def _cut_events(path: Path, keeps: Any) -> None:
    content = io.BytesIO()
    writer = RecordWriter(content)
    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        names = [value.tag for value in event.summary.value]
        settings = any(name.startswith("_hparams_") for name in names)
        if not names or settings or keeps(event.step, names):
            writer.write(record)
    durable.write_file(path, content.getvalue())
