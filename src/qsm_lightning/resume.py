"""Going on with a run: which checkpoint, whether these settings are its run's, and what differs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Timer

from qsm_lightning import checkpoints
from qsm_lightning.checkpoints import Checkpoint
from qsm_lightning.errors import SettingError, require
from qsm_lightning.runs import CHECKPOINTS, CONFIG

# What may change when a run goes on: how long, where frames come from and are kept, how it is evaluated and watched.
FREE = {
    *("total_frames", "storage", "storage_dir", "save_buffer", "rounds_per_batch"),
    *("eval_every_frames", "eval_episodes"),
    *("env_processes", "env_timeout", "env_restarts", "rank_timeout"),
    *("collector", "collector_workers", "collector_max_staleness"),
    "dataset",  # whose content is what counts
}

# What settings are in checkpoints from before there were these settings.
BEFORE = {
    "data.collector": "local",
    "data.collector_max_staleness": None,
    "data.collector_workers": 2,
    "data.dataset": None,
    "data.offline_frames": 0,
    "data.offline_share": 0.5,
    "model.ema": None,
    "model.loss.batch_temperature": 0.1,
    "model.loss.bc_coef": 0.0,
    "model.loss.candidates": 1,
    "model.loss.entropy_bonus": 0.0,
    "model.loss.m_q_lr": 3e-3,
    "model.loss.m_q_slope": 0.3,  # M_q was fixed then: the default will do
    "trainer.gradient_clip_val": None,
    "trainer.gradient_clip_algorithm": None,
}


def run_of(path: str) -> tuple[Path, str]:
    """The run's folder and the checkpoint, ``last`` by default, that ``--resume`` names.

    Raises:
        SettingError: when there is no run.
    """
    given = Path(path)
    checkpoint = "last"
    run = given
    if (given / checkpoints.MANIFEST).exists():
        run, checkpoint = _long(given).parent.parent, str(_long(given))
    require(
        (run / CONFIG).is_file(),
        f"--resume is {path!r}: there is no {run / CONFIG}; give the folder of a run, such as runs/Hopper-v5/version_0",
    )
    require(
        checkpoint != "last" or bool(checkpoints.complete(run / CHECKPOINTS)),
        f"--resume is {path!r}: that run left no checkpoint; begin it anew by --config {run / CONFIG}",
    )
    return run, checkpoint


def _long(path: Path) -> Path:
    """A path that shows the folders above, wherever the command was given."""
    return path if len(path.parts) > 3 else path.resolve()


def wanted(ckpt_path: str, run: Path | None, siblings: Path) -> Checkpoint:
    """The checkpoint that ``--ckpt_path`` names, which may be damaged.

    Args:
        ckpt_path: ``last``, ``best``, a checkpoint's folder, or the state file in one.
        run: the run's folder, where the configuration comes from one.
        siblings: the folder of the runs of that name; the newest of them that has checkpoints is meant otherwise.

    Raises:
        SettingError: when there is none.
    """
    if ckpt_path in ("last", "best"):
        folder = run / CHECKPOINTS if run is not None else _newest_folder(siblings)
        found = checkpoints.complete(folder) if folder is not None else []
        require(
            found,
            f"--ckpt_path is {ckpt_path}: there is no checkpoint below {run or siblings}; "
            "leave it out to start from the beginning",
        )
        return (ckpt_path == "best" and checkpoints.best(found[0].path.parent)) or found[-1]
    path = Path(ckpt_path)
    require(path.exists(), f"--ckpt_path is {ckpt_path!r}: there is no such file")
    require(
        not (path / CHECKPOINTS).is_dir(),
        f"--ckpt_path: {ckpt_path} is a run's folder; go on with the run by --resume {ckpt_path} in place of it, or "
        "give one of the checkpoints in it",
    )
    checkpoint = Checkpoint(_long(path).parent if path.is_file() else _long(path))
    require(
        (checkpoint.path / checkpoints.MANIFEST).exists(),
        f"--ckpt_path: {ckpt_path} is not a checkpoint that a run can go on from; give a folder with a "
        f"{checkpoints.MANIFEST}, such as runs/Hopper-v5/version_0/checkpoints/000005000",
    )
    require(
        checkpoint in checkpoints.complete(checkpoint.path.parent),
        f"--ckpt_path: {ckpt_path} has another name than a checkpoint's frame; rename it to "
        f"{checkpoint.path.name.partition('.')[0]} to go on from it",
    )
    return checkpoint


def whole(checkpoint: Checkpoint, replay: bool = True) -> tuple[Checkpoint, list[str]]:
    """This checkpoint or the newest older one that is whole, and a sentence for each one passed over.

    Args:
        checkpoint: the newest that may be taken.
        replay: whether its replay frames have to be whole as well.

    Raises:
        SettingError: when none is.
    """
    good, faults = checkpoints.newest_good(checkpoint.path.parent, checkpoint, replay)
    if good is None:
        raise SettingError(f"{faults[0]}: there is no older whole checkpoint to go on from")
    return good, [f"{fault}; going on from {good.path} instead" for fault in faults]


def _newest_folder(siblings: Path) -> Path | None:
    folders = [path for path in siblings.glob(f"*/{CHECKPOINTS}") if checkpoints.complete(path)]
    return max(folders, key=lambda path: checkpoints.complete(path)[-1].path.stat().st_mtime, default=None)


def check_settings(checkpoint: Checkpoint, state: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise :class:`SettingError` unless training can go on from ``checkpoint`` with these settings.

    Args:
        checkpoint: where it goes on.
        state: its content.
        here: the settings of this run, from :func:`identity`.
    """
    before = {name: value for name, value in BEFORE.items() if name in here}
    there = before | dict(identity(state["datamodule_hyper_parameters"], state["hyper_parameters"], state["run"]))
    differ = [
        f"{name} ({there[name]!r} there, {here[name]!r} here)"
        for name in sorted(there.keys() & here.keys())
        if there[name] != here[name]
    ]
    differ += [f"{name} (only there)" for name in sorted(there.keys() - here.keys()) if name.startswith("model.loss")]
    differ += [f"{name} (only here)" for name in sorted(here.keys() - there.keys()) if name.startswith("model.loss")]
    require(
        not differ,
        f"{checkpoint.path} was made with other settings: {', '.join(differ)}; go on with its own "
        f"(qsm-fit --resume {checkpoint.run}), or leave --resume or --ckpt_path out to start anew",
    )


def check_frames(checkpoint: Checkpoint, state: dict[str, Any], total_frames: int) -> None:
    """Raise :class:`SettingError` unless something is left to do after ``checkpoint`` with ``total_frames`` frames."""
    frames, owed = frames_done(state)
    same_end = total_frames == state["datamodule_hyper_parameters"]["total_frames"]
    require(
        frames < total_frames or (owed and same_end),
        f"data.total_frames is {total_frames}: {checkpoint.path} is already at {frames} frames; give a greater number",
    )


def frames_done(state: dict[str, Any]) -> tuple[int, bool]:
    """The frames of a state, and whether an evaluation is owed there."""
    progress = state["OffPolicyDataModule"]["progress"]
    return progress["frames"], progress["evaluated"] < progress["frames"]


def other_versions(checkpoint: Checkpoint) -> str:
    """The versions that a checkpoint was made with and that are not those of today, in words; empty if all are."""
    then, now = checkpoint.manifest()["versions"], checkpoints.versions()
    return ", ".join(f"{name} {then[name]} (here {now.get(name)})" for name in then if then[name] != now.get(name))


def check_time(trainer: Trainer, state: dict[str, Any]) -> None:
    """Raise :class:`SettingError` if the run has used up ``trainer.max_time``, which counts over all its processes."""
    for timer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(timer, Timer) and timer._duration is not None:
            used = state["callbacks"].get(timer.state_key, {}).get("time_elapsed", {}).get("train", 0.0)
            require(
                used < timer._duration,
                f"trainer.max_time is {timedelta(seconds=timer._duration)}: the run has trained for "
                f"{timedelta(seconds=round(used))} in all; give a greater one, or null",
            )


def identity(data: dict[str, Any], model: dict[str, Any], run: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that make a run what it is, dotted, each with its value as plain data.

    Args:
        data: hyper-parameters of the datamodule.
        model: hyper-parameters of the module.
        run: seed, precision and clipping.
    """
    data = {name: _plain(value) for name, value in data.items() if name not in FREE}
    if data["eval_selector"] == "sample":  # no curve is of candidates
        del data["eval_candidates"]
    elif data["eval_selector"] == "both":  # eval/return is of samples, too
        data["eval_selector"] = "sample"
    yield from ((f"data.{name}", value) for name, value in data.items())
    loss = model["loss"]
    yield "model.loss", loss["class_path"]
    yield from ((f"model.loss.{name}", _plain(value)) for name, value in loss["init_args"].items())
    yield from ((f"model.{name}", _plain(value)) for name, value in model.items() if name not in ("loss", "compile"))
    yield from run.items()


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
