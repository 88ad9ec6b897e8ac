"""Two runs compared: everything a checkpoint holds, and every logged value."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsm_lightning import checkpoints
from qsm_lightning.checkpoints import Checkpoint


def last(run: Path) -> Checkpoint:
    """The newest checkpoint of a run; it must be whole."""
    checkpoint = checkpoints.complete(run / "checkpoints")[-1]
    checkpoint.verify()
    return checkpoint


def state(run: Path) -> dict[str, Any]:
    """The newest state, with the replay frames themselves in place of their files' names."""
    checkpoint = last(run)
    content = checkpoints.load(checkpoint.state)
    for rank in content["OffPolicyDataModule"]["ranks"]:
        chunks = [torch.load(checkpoint.replay / name, weights_only=True) for _, _, name, _ in rank["replay"]]
        first = rank["replay"][0][0]
        ring = content["datamodule_hyper_parameters"]["buffer_size"]
        rank["replay"] = {
            key: torch.cat([chunk[key] for chunk in chunks])[max(0, rank["written"] - first - ring) :]
            for key in chunks[0]
        }
    del content["datamodule_hyper_parameters"]  # total_frames may have grown
    timer = content["callbacks"].pop("Timer", None)
    assert timer is None or "time_elapsed" in timer
    return content


def differences(one: Any, two: Any, path: str = "") -> list[str]:
    """Where two nested contents differ, bit by bit."""
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return [f"{path}: keys {sorted(map(str, one.keys() ^ two.keys()))}"]
        return [d for key in one for d in differences(one[key], two[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        if len(one) != len(two):
            return [f"{path}: {len(one)} and {len(two)} items"]
        return [d for i, pair in enumerate(zip(one, two, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
        return [] if same else [f"{path}: {one.flatten()[:3]} and {two.flatten()[:3]}"]
    return [] if one == two and type(one) is type(two) else [f"{path}: {one!r} and {two!r}"]


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv by frame, without speeds and without what was not logged in a row."""
    with (run / "metrics.csv").open(newline="") as file:
        found = [
            {key: value for key, value in row.items() if value and not key.startswith("speed/")}
            for row in csv.DictReader(file)
        ]
    return sorted(found, key=lambda row: (float(row["step"]), sorted(row)))


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars as (frame, value), without speeds."""
    events = EventAccumulator(str(run), purge_orphaned_data=False)
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_same(one: Path, two: Path) -> None:
    """Both runs ended in the same state, bit by bit, and logged the same values at the same frames, each once."""
    different = differences(state(one), state(two))
    assert not different, "\n".join(different[:20])
    assert rows(one) == rows(two)
    assert curves(one) == curves(two)
