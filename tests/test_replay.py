"""The replay buffer on disk: what is written when, and that it comes back in its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from qsm_lightning import replay
from qsm_lightning.errors import SettingError
from qsm_lightning.replay import FRAME_KEYS, Chunk, ReplayArchive, frame_bytes, make_replay_buffer


def frames(first: int, stop: int) -> TensorDict:
    """Frames that show their number."""
    number = torch.arange(first, stop, dtype=torch.float32)[:, None]
    flag = torch.zeros(stop - first, 1, dtype=torch.bool)
    following = TensorDict({"observation": number + 0.5, "reward": -number, "terminated": flag, "done": flag.clone()})
    return TensorDict({"observation": number, "action": 2 * number, "next": following}, [stop - first])


def content(buffer: object) -> list[float]:
    return buffer[:]["observation"][:, 0].tolist()  # type: ignore[index]


@pytest.mark.parametrize("storage", ["memory", "memmap"])
@pytest.mark.parametrize("steps", [[4], [10], [13], [3, 3], [8, 5], [10, 10, 1], [25, 3], [7, 40, 2], [10, 0, 5]])
def test_a_ring_comes_back_frame_by_frame(steps: list[int], storage: str, tmp_path: Path) -> None:
    """Saved after each of ``steps`` more frames; capacity 10. It also goes on at the same place."""

    def empty(name: str) -> object:
        (tmp_path / name).mkdir()
        return make_replay_buffer(10, str(tmp_path / name) if storage == "memmap" else None)

    buffer, archive, total = empty("one"), ReplayArchive(tmp_path / "replay"), 0
    for step in steps:
        for _ in range(step):
            buffer.extend(frames(total, total + 1))  # type: ignore[attr-defined]
            total += 1
        chunks = archive.save(buffer)  # type: ignore[arg-type]
    restored = empty("two")
    ReplayArchive(tmp_path / "replay", 0, chunks).load(restored, total)  # type: ignore[arg-type]
    for _ in range(2):
        assert content(restored) == content(buffer)
        for key in FRAME_KEYS:
            assert torch.equal(restored[:][key], buffer[:][key])  # type: ignore[index]
        assert len(restored) == len(buffer) == min(total, 10)  # type: ignore[arg-type]
        for ring in (buffer, restored):
            ring.extend(frames(total, total + 4))  # type: ignore[attr-defined]
        total += 4


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_a_ring_takes_the_bytes_of_its_frames_and_no_more(storage: str, tmp_path: Path) -> None:
    buffer = make_replay_buffer(1000, str(tmp_path) if storage == "memmap" else None)
    buffer.extend(frames(0, 1))
    held = buffer._storage._storage
    assert sum(leaf.untyped_storage().nbytes() for leaf in held.values(True, True)) == 1000 * frame_bytes(1, 1)


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_content_and_samples_are_torchrls(storage: str, tmp_path: Path) -> None:
    """Whatever is added when, in pieces of any size, around the end of the ring, and sampled in between."""
    capacity = 37
    ours = make_replay_buffer(capacity, str(tmp_path) if storage == "memmap" else None, seed=3)
    theirs = ReplayBuffer(storage=LazyTensorStorage(capacity))
    theirs.set_rng(torch.Generator().manual_seed(3))
    total = 0
    for n in torch.randint(1, 20, (60,), generator=torch.Generator().manual_seed(0)).tolist():
        for buffer in (ours, theirs):
            buffer.extend(frames(total, total + n))
        total += n
        drawn, expected = ours.sample(8), theirs.sample(8)
        assert set(drawn.keys(True, True)) == set(FRAME_KEYS)
        for key in FRAME_KEYS:
            assert torch.equal(drawn[key], expected[key])
            assert type(drawn[key]) is torch.Tensor
            assert torch.equal(ours[:][key], theirs[:][key])
    assert ours.write_count == theirs.write_count == total
    assert ours.writer.state_dict() == theirs.writer.state_dict()
    assert len(ours) == len(theirs) == capacity


def test_a_save_writes_what_is_new_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = replay.durable.write_file

    def counted(path: Path, data: bytes) -> None:
        written.append(len(data))
        write(path, data)

    monkeypatch.setattr(replay.durable, "write_file", counted)
    buffer, archive = make_replay_buffer(100_000), ReplayArchive(tmp_path)
    for count in (1000, 1000, 50_000, 1000, 0, 2000):
        if count:
            buffer.extend(frames(0, count))
        assert archive.save(buffer)[-1].stop == buffer.write_count
        names_and_headers = 3000
        assert count * frame_bytes(1, 1) <= sum(written) < count * frame_bytes(1, 1) + names_and_headers
        assert bool(written) == bool(count)
        written.clear()


def test_a_files_name_is_on_the_disk_when_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure leaves a checkpoint that lists a file which is not there."""
    synced: list[tuple[int, list[str]]] = []  # with the names that were in the folder then
    sync = os.fsync

    def noted(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, [path.name for path in tmp_path.iterdir()]))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    buffer = make_replay_buffer(10)
    buffer.extend(frames(0, 3))
    (chunk,) = ReplayArchive(tmp_path).save(buffer)
    assert (tmp_path.stat().st_ino, [chunk.file]) in synced


def test_large_amounts_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CHUNK_BYTES", 7 * frame_bytes(1, 1))
    buffer, archive = make_replay_buffer(100), ReplayArchive(tmp_path)
    buffer.extend(frames(0, 30))
    assert [(c.first, c.stop) for c in archive.save(buffer)] == [(0, 7), (7, 14), (14, 21), (21, 28), (28, 30)]


def test_files_that_the_ring_has_overwritten_are_no_longer_listed(tmp_path: Path) -> None:
    buffer, archive = make_replay_buffer(10), ReplayArchive(tmp_path)
    listed = []
    for first in range(0, 30, 4):
        buffer.extend(frames(first, first + 4))
        listed.append([chunk.first for chunk in archive.save(buffer)])
    assert listed[:5] == [[0], [0, 4], [0, 4, 8], [4, 8, 12], [8, 12, 16]]
    assert all(len(files) <= 3 for files in listed)


def test_the_same_frames_of_two_futures_do_not_share_a_file(tmp_path: Path) -> None:
    names = []
    for value in (1.0, 2.0):
        buffer = make_replay_buffer(10)
        buffer.extend(frames(0, 3) * value)
        names.append(ReplayArchive(tmp_path).save(buffer)[0].file)
    assert names[0] != names[1]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("what", ["text", "other tensors", "too few", "a list"])
def test_a_file_of_something_else_is_refused_by_name(what: str, tmp_path: Path) -> None:
    path = tmp_path / "chunk.pt"
    if what == "text":
        path.write_text("frames")
    else:
        saved = {"other tensors": {"weights": torch.zeros(3)}, "a list": [torch.zeros(3)]}
        torch.save(saved.get(what, frames(0, 2).flatten_keys(".").to_dict()), path)
    chunk = Chunk(0, 3, path.name, {"bytes": 0, "sha256": ""})
    with pytest.raises(SettingError, match=r"chunk.pt is not a file of replay frames"):
        ReplayArchive(tmp_path, 0, [chunk]).load(make_replay_buffer(10), 3)


def test_a_missing_file_in_between_is_noticed(tmp_path: Path) -> None:
    buffer, archive = make_replay_buffer(20), ReplayArchive(tmp_path)
    for first in (0, 5, 10):
        buffer.extend(frames(first, first + 5))
        chunks = archive.save(buffer)
    with pytest.raises(SettingError, match="10 of 15 frames"):
        ReplayArchive(tmp_path, 0, [chunks[0], chunks[2]]).load(make_replay_buffer(20), 15)


def test_a_frame_takes_what_was_announced(tmp_path: Path) -> None:
    stored = make_replay_buffer(10)
    stored.extend(frames(0, 1))
    assert sum(value.nbytes for value in stored[:1].select(*FRAME_KEYS).values(True, True)) == frame_bytes(1, 1)
