"""What updates learn from: shares of buffer and dataset, and the ways to go on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qsm_lightning.distributed import Ranks
from qsm_lightning.errors import SettingError
from qsm_lightning.experience import Experience
from tests.test_replay import content, frames

OFFLINE = 1000  # the dataset's frames have numbers from here on


def seed() -> int:
    return 0


def ranks_of(rank: int, count: int) -> Ranks:
    """Without the connections between them."""
    ranks = Ranks()
    ranks.rank, ranks.count = rank, count
    return ranks


@pytest.mark.parametrize(
    ("collected", "share", "expected"),
    [(0, 0.25, 0), (3, 0.25, 3), (6, 0.25, 6), (50, 0.25, 6), (50, 0.2, 6), (50, 0.3, 6), (50, 0.0, 8), (50, 1.0, 0)],
)
def test_a_minibatch_has_the_datasets_share_and_more_while_frames_are_few(
    collected: int, share: float, expected: int
) -> None:
    experience = Experience(Ranks(), 100, seed, offline_share=share)
    experience.add_dataset(frames(OFFLINE, OFFLINE + 20), 0, "data.npz")
    if collected:
        experience.buffer.extend(frames(0, collected))
    for _ in range(5):
        numbers = experience.sample(8)["observation"][:, 0]
        assert len(numbers) == 8
        assert (numbers < OFFLINE).sum() == expected
        assert (numbers[numbers < OFFLINE] < collected).all()


def test_each_rank_has_its_part_of_a_dataset() -> None:
    parts = []
    for rank in range(3):
        experience = Experience(ranks_of(rank, 3), 30, seed)
        experience.add_dataset(frames(0, 10), 0, "data.npz")
        assert experience.offline is not None
        parts.append(content(experience.offline))
        assert experience.buffer.storage.max_size == 10
    assert sum(parts, []) == list(range(10))


def test_windows_want_frames_in_the_order_of_time() -> None:
    experience = Experience(Ranks(), 30, seed, window=3)
    with pytest.raises(SettingError, match=r"data.dataset is 'data.npz': 0% of its transitions .* order of time"):
        experience.add_dataset(frames(0, 10), 0, "data.npz")


def filled(ranks: Ranks, count: int, save_frames: bool = True) -> Experience:
    experience = Experience(ranks, 12, seed, save_frames=save_frames)
    experience.add_dataset(frames(OFFLINE, OFFLINE + 20), 0, "data.npz")
    for number in range(count):
        experience.buffer.extend(frames(number, number + 1))
    experience.sample(4)
    return experience


def saved(experience: Experience, folder: Path) -> dict[str, Any]:
    files = experience.save(folder)
    state = experience.state()
    assert {name for _, _, name, _ in state["replay"] or []} == set(files)
    assert all((folder / name).is_file() for name in files)
    return state


def test_it_goes_on_as_it_was(tmp_path: Path) -> None:
    """A ring that has wrapped, its samples and the dataset's."""
    one = filled(Ranks(), 17)
    state = saved(one, tmp_path)
    other = Experience(Ranks(), 12, lambda: 99)
    other.add_dataset(frames(OFFLINE, OFFLINE + 20), 98, "data.npz")
    other.load(state, [state], tmp_path)
    assert content(other.buffer) == content(one.buffer)
    for number in range(20, 25):
        for experience in (one, other):
            experience.buffer.extend(frames(number, number + 1))
        assert torch.equal(one.sample(8)["observation"], other.sample(8)["observation"])
    before = {path.name for path in tmp_path.iterdir()}
    assert saved(other, tmp_path)["written"] == 22
    assert len({path.name for path in tmp_path.iterdir()} - before) == 1, "only what is new is written"


def test_a_capacity_above_the_share_is_kept(tmp_path: Path) -> None:
    one = Experience(Ranks(), 20, seed)
    one.buffer.extend(frames(0, 20))
    state = saved(one, tmp_path)
    other = Experience(Ranks(), 12, seed)
    other.load(state, [state], tmp_path)
    assert content(other.buffer) == list(range(20))


def test_another_number_of_ranks_shares_every_frame(tmp_path: Path) -> None:
    states = [saved(filled(ranks_of(rank, 2), 5), tmp_path) for rank in range(2)]
    found = []
    for rank in range(3):
        experience = Experience(ranks_of(rank, 3), 12, seed)
        mine = states[rank] if rank < 2 else states[0] | {"sampler": None, "offline_sampler": None}
        experience.load(mine, states, tmp_path)
        found += content(experience.buffer)
    assert sorted(found) == sorted([*range(5)] * 2)


def test_without_saved_frames_the_samplers_alone_go_on(tmp_path: Path) -> None:
    one = filled(Ranks(), 5, save_frames=False)
    state = saved(one, tmp_path / "replay")
    assert state["replay"] is None
    assert not list(tmp_path.iterdir())
    other = Experience(Ranks(), 12, lambda: 99)
    other.load(state, [state], tmp_path)
    assert len(other.buffer) == 0
    other.buffer.extend(frames(0, 5))
    one.offline = None
    assert torch.equal(one.sample(8)["observation"], other.sample(8)["observation"])
