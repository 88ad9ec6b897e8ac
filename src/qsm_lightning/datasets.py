"""Transitions that others have collected: Minari's datasets, files in D4RL's layout, and buffers of our own runs."""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey

from qsm_lightning import checkpoints, durable, runs
from qsm_lightning.checkpoints import Checkpoint
from qsm_lightning.continuous import TIME_STEP
from qsm_lightning.errors import SettingError, one_line, require, require_package
from qsm_lightning.replay import FRAME_KEYS, TIME_STEP_KEY, ReplayArchive, frame_keys, kept_chunks

Arrays = Mapping[str, np.ndarray]
MINARI = "minari:"
warn = rank_zero_only(logging.getLogger(__name__).warning)
NEEDED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations", "time_steps")
ENV = "qsm_env"  # the environment's name, in files of qsm-collect


def load(source: str, observation_dim: int, action_dim: int, timed: bool = False, env: str = "") -> TensorDict:
    """The frames [N] of a dataset, with the keys of the replay buffer.

    Args:
        source: ``minari:`` and the name of a dataset; a file, .npz, .h5 or .hdf5, in D4RL's layout; the folder of a run
            or a checkpoint with a saved buffer.
        observation_dim: O of the environment.
        action_dim: A of the environment; actions are in [-1, 1], to which those of Minari are scaled.
        timed: whether the environment's frames carry their time step.
        env: the environment's name; data that tell of another are taken with a warning.

    Raises:
        SettingError: when there is no such dataset, or it does not fit the environment.
    """
    made_in, source = env, os.path.expanduser(source)
    if source.startswith(MINARI):
        frames, made_in = _minari(source.removeprefix(MINARI))
    elif Path(source).is_dir():
        frames, made_in = _replay(Path(source))
    else:
        arrays = _file(Path(source))
        frames, made_in = from_d4rl(arrays, source), str(arrays.get(ENV, env))
    if env and made_in not in ("", env):
        warn("data.dataset is %r: it was made in %s, and data.env is %s", source, made_in, env)
    _check(frames, source, observation_dim, action_dim)
    require(
        not timed or TIME_STEP_KEY in frame_keys(frames),
        f"data.dataset is {source!r}: its transitions do not tell their time steps, and data.env is in continuous "
        "time; add an array time_steps [N], in seconds",
    )
    require(
        not timed or bool((frames[TIME_STEP_KEY] > 0).all()),
        f"data.dataset is {source!r}: it has time steps of 0 or less; give how many seconds each transition took",
    )
    return frames if timed else frames.select(*FRAME_KEYS)


def fingerprint(frames: TensorDictBase) -> str:
    """A hash of the content."""
    digest = hashlib.sha256()
    for key in frame_keys(frames):
        digest.update(frames[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check(frames: TensorDictBase, source: str, observation_dim: int, action_dim: int) -> None:
    require(len(frames) > 0, f"data.dataset is {source!r}: it has no transitions; choose another")
    sizes: list[tuple[NestedKey, int]] = [
        ("observation", observation_dim), ("action", action_dim), (("next", "observation"), observation_dim)
    ]  # fmt: skip
    for key, width in sizes:
        what = "observations" if "observation" in key else "actions"
        require(
            frames[key].ndim == 2 and frames[key].shape[1] == width,
            f"data.dataset is {source!r}: its {what} have the shape {list(frames[key].shape[1:])}, and data.env has "
            f"[{width}]; choose the dataset of this environment",
        )
    for key in frame_keys(frames):
        name = key if isinstance(key, str) else " ".join(key)
        value = frames[key]
        require(
            not value.is_floating_point() or bool(value.isfinite().all()),
            f"data.dataset is {source!r}: {name} has NaN or infinite values; leave these transitions out",
        )
    largest = frames["action"].abs().max().item()
    require(
        largest <= 1 + 1e-5,
        f"data.dataset is {source!r}: it has actions up to {largest:.7g}, and they must be in [-1, 1]; divide them by "
        "the bounds of the environment's actions",
    )
    frames["action"].clamp_(-1, 1)


def from_d4rl(arrays: Arrays, source: str = "dataset") -> TensorDict:
    """Frames from arrays in D4RL's layout.

    Args:
        arrays: observations [N, O], actions [N, A], rewards [N], terminals [N]; timeouts [N] and next_observations
            [N, O] where they are known, and time_steps [N] in seconds. Without next_observations, the next observation
            is the one that follows in the file, and the last frame of an episode that was not terminated is left out;
            without timeouts as well, episodes end in terminal states only, and a warning says so.
        source: what messages call it.

    Raises:
        SettingError: when an array is missing, or is of another length.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    missing = [name for name in NEEDED if name not in arrays]
    require(not missing, f"data.dataset is {source!r}: it has no {', '.join(missing)}; D4RL's layout is needed")
    present = [name for name in (*NEEDED, *OPTIONAL) if name in arrays]
    for name in present:
        kind, dims = arrays[name].dtype.kind, 2 if "ions" in name else 1
        require(
            kind in "biuf" and (arrays[name].ndim == dims or (dims == 1 and arrays[name].shape[1:] == (1,))),
            f"data.dataset is {source!r}: {name} has the shape {list(arrays[name].shape)} and the type "
            f"{arrays[name].dtype}; it must be numbers, {'[N, size]' if dims == 2 else '[N]'}",
        )
    count = len(arrays["observations"])
    lengths = {name: len(arrays[name]) for name in present}
    require(
        len(set(lengths.values())) == 1,
        f"data.dataset is {source!r}: its arrays differ in length ({lengths}); each must have an entry per transition",
    )
    for name in ("terminals", "timeouts"):
        require(
            np.isin(arrays.get(name, 0), (0, 1)).all(),
            f"data.dataset is {source!r}: {name} has other values than 0 and 1; say of each transition whether it "
            "ended so",
        )
    terminated = arrays["terminals"].astype(bool).reshape(count, 1)
    ended = terminated | arrays.get("timeouts", np.zeros(count)).astype(bool).reshape(count, 1)
    observation = arrays["observations"]
    kept: slice | np.ndarray = slice(None)
    if "next_observations" in arrays:
        following = arrays["next_observations"]
    else:
        if "timeouts" not in arrays:
            warn(
                "data.dataset is %r: it has neither timeouts nor next_observations: an episode that a time limit ended "
                "is taken to go on in the next one's start",
                source,
            )
        following = np.concatenate([observation[1:], observation[-1:]])
        known = terminated[:, 0] | ~ended[:, 0]  # what follows a terminal state is never asked for
        known[-1:] &= terminated[-1:, 0]
        kept = np.flatnonzero(known)
    columns = (observation, arrays["actions"], arrays["rewards"].reshape(count, 1), following, terminated, ended)
    frames = _frames(*(column[kept] for column in columns))
    if "time_steps" in arrays:
        time_steps = np.array(arrays["time_steps"].reshape(count, 1)[kept], np.float32)
        frames[TIME_STEP_KEY] = torch.from_numpy(time_steps)
    return frames


def _frames(
    observation: np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    following: np.ndarray,
    terminated: np.ndarray,
    done: np.ndarray,
) -> TensorDict:
    def floats(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.float32))

    after = {
        "observation": floats(following),
        "reward": floats(reward),
        "terminated": torch.from_numpy(np.array(terminated, bool)),
        "done": torch.from_numpy(np.array(done, bool)),
    }
    count = [len(observation)]
    return TensorDict(
        {"observation": floats(observation), "action": floats(action), "next": TensorDict(after, count)}, count
    )


def _file(path: Path) -> Arrays:
    """The arrays of an .npz or HDF5 file."""
    require(
        path.suffix in (".npz", ".h5", ".hdf5"),
        f"data.dataset is {str(path)!r}: give an .npz, .h5 or .hdf5 file, a run's folder, or minari:NAME",
    )
    require(path.is_file(), f"data.dataset is {str(path)!r}: there is no such file; name one that there is")
    names = (*NEEDED, *OPTIONAL)
    h5py = None if path.suffix == ".npz" else _package("h5py")
    try:
        if h5py is None:
            with np.load(path) as file:  # arrays alone: pickled objects are refused
                return {name: file[name] for name in (*names, ENV) if name in file}
        with h5py.File(path) as file:
            return {name: file[name][()] for name in names if name in file}
    except Exception as error:  # of many kinds, by how the file is damaged
        what = one_line(error)
        raise SettingError(f"data.dataset is {str(path)!r}: it cannot be read ({what}); choose another") from error


def _minari(name: str) -> tuple[TensorDict, str]:
    """A Minari dataset, downloaded if it is not there, and the environment's name if it tells one."""
    minari = _package("minari")
    try:
        dataset = minari.load_dataset(name, download=True)
    except Exception as error:  # of many kinds, by where it looks
        what = one_line(error)
        raise SettingError(
            f"data.dataset is 'minari:{name}': Minari cannot load it ({what}); see minari.list_remote_datasets()"
        ) from error
    space = dataset.action_space
    require(
        hasattr(space, "low") and bool(np.isfinite(space.low).all() and np.isfinite(space.high).all()),
        f"data.dataset is 'minari:{name}': its actions are {space}, and only bounded continuous ones can be scaled to "
        "[-1, 1]; choose another",
    )
    low, high = space.low, space.high
    pieces = []
    for episode in _episodes(dataset, name):
        observation = _flat(episode.observations)
        terminated = np.asarray(episode.terminations, bool)[:, None]
        done = terminated | np.asarray(episode.truncations, bool)[:, None]
        action = 2 * (np.asarray(episode.actions) - low) / (high - low) - 1
        pieces.append(
            _frames(observation[:-1], action, np.asarray(episode.rewards)[:, None], observation[1:], terminated, done)
        )
    require(pieces, f"data.dataset is 'minari:{name}': it has no transitions; choose another")
    spec = dataset.env_spec
    return TensorDict.cat(pieces), "" if spec is None else spec.id


def _episodes(dataset: Any, name: str) -> Iterator[Any]:
    try:
        yield from dataset.iterate_episodes()
    except Exception as error:  # of many kinds, by how its files are damaged
        what = one_line(error)
        raise SettingError(
            f"data.dataset is 'minari:{name}': Minari cannot read it ({what}); choose another"
        ) from error


def _flat(observations: Any) -> np.ndarray:
    """Observations [T, O], of a dictionary in the order of its sorted keys, as gymnasium flattens a plain one."""
    if isinstance(observations, Mapping):
        return np.concatenate([_flat(observations[key]) for key in sorted(observations)], -1)
    found = np.asarray(None if isinstance(observations, tuple) else observations)
    require(
        found.dtype.kind in "biuf",
        "data.dataset: its observations are not arrays of numbers, or dictionaries of them; choose another",
    )
    return found.reshape(len(found), -1)


def _package(name: str) -> Any:
    require_package(name, "offline", "data.dataset is of its kind")
    return importlib.import_module(name)


def _replay(folder: Path) -> tuple[TensorDict, str]:
    """The saved buffer of a run's newest checkpoint, or of the one named, of all its processes; the environment."""
    saved = [Checkpoint(folder)] if (folder / checkpoints.MANIFEST).is_file() else []
    saved = saved or checkpoints.complete(folder / runs.CHECKPOINTS)
    require(
        saved,
        f"data.dataset is {str(folder)!r}: it is neither a run with a checkpoint nor a checkpoint's folder; "
        "choose another",
    )
    try:
        saved[-1].verify()
    except checkpoints.DamagedError as fault:
        raise SettingError(
            f"data.dataset is {str(folder)!r}: {fault}; name an older checkpoint, or another dataset"
        ) from fault
    state = checkpoints.load(saved[-1].state)
    ranks = state["OffPolicyDataModule"]["ranks"]
    settings = state["datamodule_hyper_parameters"]
    pieces = [
        ReplayArchive(saved[-1].replay, rank).read(chunk)[lost:]
        for rank, chunk, lost in kept_chunks(ranks, settings["buffer_size"])
    ]
    require(
        pieces,
        f"data.dataset is {str(folder)!r}: its replay buffer was not saved (data.save_buffer); choose another",
    )
    return TensorDict.cat(pieces), settings["env"]


def save_npz(path: Path, frames: TensorDictBase, env: str = "") -> None:
    """Write frames [N] of ``env`` in D4RL's layout, next_observations and timeouts included; whole or not at all."""
    following = frames["next"]
    terminated = following["terminated"].squeeze(-1)
    timed = TIME_STEP_KEY in frame_keys(frames)
    arrays: dict[str, Any] = {
        "observations": frames["observation"].numpy(),
        "actions": frames["action"].numpy(),
        "rewards": following["reward"].squeeze(-1).numpy(),
        "terminals": terminated.numpy(),
        "timeouts": (following["done"].squeeze(-1) & ~terminated).numpy(),
        "next_observations": following["observation"].numpy(),
    }
    arrays |= {"time_steps": following[TIME_STEP].squeeze(-1).numpy()} if timed else {}
    arrays |= {ENV: np.array(env)} if env else {}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    durable.write_file(path, file.getvalue())
