"""Checkpoints on disk: whole or absent whatever fails, checked before use, passed over when damaged, thinned out."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qsm_lightning import checkpoints, durable
from qsm_lightning.checkpoints import MANIFEST, REPLAY, STATE, Checkpoint, DamagedError
from qsm_lightning.errors import SettingError
from tests.compare import assert_same
from tests.helpers import SHRINK
from tests.processes import Run, fit, trained


def chunk(first: int, rank: int = 0) -> str:
    """The name of a file of replay frames."""
    return f"{rank}-{first:012}-{first + 10:012}-{hashlib.sha256(b'%d' % first).hexdigest()[:12]}.pt"


def write_replay(folder: Path, *names: str) -> dict[str, durable.Record]:
    """Files of replay frames, as they stand in a manifest."""
    for name in names:
        (folder / REPLAY).mkdir(parents=True, exist_ok=True)
        durable.write_file(folder / REPLAY / name, f"frames of {name}".encode())
    return {name: durable.record_of_file(folder / REPLAY / name) for name in names}


def write(folder: Path, frames: int, score: float | None = None, replay: Sequence[int] = ()) -> Checkpoint:
    listed = write_replay(folder, *map(chunk, replay))
    with checkpoints.staging(folder) as stage:
        (stage / STATE).write_bytes(f"state at frame {frames}".encode() * 100)
        return checkpoints.publish(stage, frames, score, listed)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit_manifest(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((checkpoint.path / MANIFEST).read_bytes())
    change(manifest)
    (checkpoint.path / MANIFEST).write_text(json.dumps(manifest))


# Writing.


def test_what_is_published_is_complete_and_says_what_it_is(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 30, -2.5, (0, 10))
    checkpoint.verify()
    assert names(tmp_path) == ["000000030", REPLAY]
    assert names(checkpoint.path) == [MANIFEST, STATE]
    assert checkpoint.order == (30, 0)
    assert checkpoint.state == tmp_path / "000000030" / STATE
    assert checkpoint.replay == tmp_path / REPLAY
    manifest = checkpoint.manifest()
    assert (manifest["format"], manifest["frames"], manifest["eval_return"]) == (1, 30, -2.5)
    assert manifest["files"] == {STATE: durable.record_of(checkpoint.state.read_bytes())}
    assert manifest["replay"].keys() == {chunk(0), chunk(10)}
    assert {"python", "torch", "qsm-lightning"} <= manifest["versions"].keys()


def test_an_exception_while_staging_leaves_nothing(tmp_path: Path) -> None:
    def save() -> None:
        with checkpoints.staging(tmp_path) as stage:
            (stage / STATE).write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save()
    assert names(tmp_path) == []


def test_the_leftovers_of_a_killed_process_are_not_in_the_way(tmp_path: Path) -> None:
    for name in (".staging", ".removing-000000010"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_bytes(b"half")
    (tmp_path / REPLAY).mkdir()
    (tmp_path / REPLAY / f".{chunk(0)}.123").write_bytes(b"half")
    assert checkpoints.complete(tmp_path) == []
    write(tmp_path, 20).verify()
    checkpoints.thin_out(tmp_path, 1)
    assert names(tmp_path) == ["000000020", REPLAY]
    assert names(tmp_path / REPLAY) == []


class Killed(BaseException):
    """Ends a save as an exception from anywhere does."""


class Faults:
    """Lets the ``at``-th of a save's steps on the disk fail, having done half of what it does."""

    def __init__(self, at: int, how: str) -> None:
        self.at = at
        self.how = how
        self.count = 0

    def step(self, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        self.count += 1
        if self.count != self.at:
            return act()
        if half is not None:
            half()
        if self.how == "killed":
            os._exit(9)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if self.how == "full disk" else Killed

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
            self._wrap(monkeypatch, name)
        faults, real_open = self, Path.open

        class Writer(io.BufferedWriter):
            def write(self, content: Any) -> int:
                return faults.step(lambda: super(Writer, self).write(content), lambda: self._half(content))

            def _half(self, content: Any) -> None:
                super().write(content[: len(content) // 2])
                super().flush()

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            return Writer(io.FileIO(path, "wb")) if mode == "wb" else real_open(path, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", opened)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, **kwargs: self.step(lambda: real(*args, **kwargs)))


def save(folder: Path, frames: int) -> None:
    """All that a save does: a new file of frames, the checkpoint, and the removal of what is not kept."""
    write(folder, frames, replay=(frames - 10, frames))
    checkpoints.thin_out(folder, 2)


def broken_off(folder: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Save with ``faults``; whether they broke it off."""
    if faults.how == "killed":
        if (child := os.fork()) == 0:
            with monkeypatch.context() as patch:
                faults.install(patch)
                save(folder, 40)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with monkeypatch.context() as patch:
        faults.install(patch)
        try:
            save(folder, 40)
        except (OSError, Killed):
            return True
    return faults.count >= faults.at  # in a step whose failure is of no consequence


@pytest.mark.parametrize("how", ["full disk", "exception", "killed"])
def test_a_save_that_fails_at_any_step_is_whole_or_absent(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "before"
    write(before, 10, 5.0, (0, 10))
    write(before, 20, 1.0, (10, 20))
    write(before, 30, 2.0, (20, 30))
    outcomes = set()
    for at in itertools.count(1):
        folder = tmp_path / str(at)
        shutil.copytree(before, folder)
        broken = broken_off(folder, Faults(at, how), monkeypatch)
        there = checkpoints.complete(folder)
        for checkpoint in there:
            checkpoint.verify()
        frames = [checkpoint.order[0] for checkpoint in there]
        assert frames in ([10, 20, 30], [10, 20, 30, 40], [10, 30, 40]), f"step {at}"
        assert checkpoints.newest_good(folder) == (there[-1], [])
        assert checkpoints.best(folder) == there[0]
        outcomes.add(frames[-1])
        save(folder, 50)
        kept = [10, frames[-1], 50]
        assert [checkpoint.order[0] for checkpoint in checkpoints.complete(folder)] == kept, f"step {at}"
        assert names(folder) == [f"{frame:09}" for frame in kept] + [REPLAY], f"step {at}"
        listed = {chunk(frame + past) for frame in kept for past in (-10, 0)}
        assert names(folder / REPLAY) == sorted(listed), f"step {at}"
        if not broken:
            break
    assert at > 12, "not all steps were seen"
    assert outcomes == {30, 40}


@pytest.mark.parametrize("how", ["full disk", "exception"])
def test_a_file_is_replaced_whole_or_not_at_all(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for at in itertools.count(1):
        path.write_bytes(b"before")
        faults = Faults(at, how)
        with monkeypatch.context() as patch:
            faults.install(patch)
            try:
                durable.write_file(path, b"after it")
            except (OSError, Killed):
                assert path.read_bytes() in (b"before", b"after it")
            else:
                assert path.read_bytes() == b"after it"
        for leftover in tmp_path.glob(".file.*"):
            assert faults.count == at, "only where it could not be removed"
            leftover.unlink()
        if faults.count < at:
            break
    assert at > 3, "not all steps were seen"


def test_everything_is_on_the_disk_before_a_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power failure leaves a checkpoint with its name and without its content."""
    folder = tmp_path / "version_0" / "checkpoints"
    synced: list[int] = []  # inodes: names change
    renamed: list[Path] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        real_sync(handle)

    def rename(one: Path, two: Path) -> None:
        for path in (one / STATE, one / MANIFEST, one, folder / REPLAY / chunk(0)):
            assert path.stat().st_ino in synced, f"{path} was not synced"
        assert synced.index(one.stat().st_ino) > synced.index((one / MANIFEST).stat().st_ino), "the names come last"
        synced.clear()
        assert not two.exists()
        real_rename(one, two)
        renamed.append(two)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    checkpoint = write(folder, 30, replay=(0,))
    assert renamed == [checkpoint.path]
    for parent in (folder, folder.parent, tmp_path):  # of a new run, all of them are new
        assert parent.stat().st_ino in synced, "the name itself"


# Order.


def test_checkpoints_are_ordered_by_frame_and_by_number(tmp_path: Path) -> None:
    written = [write(tmp_path, frames) for frames in (9, 10, 10, 100)]
    written += [write(tmp_path, 999_999_999), write(tmp_path, 1_000_000_000), write(tmp_path, 12_345_678_901)]
    assert checkpoints.complete(tmp_path) == written
    assert [checkpoint.path.name for checkpoint in written[1:3]] == ["000000010", "000000010-1"]
    for name in ("00000010", "000000010-", "000000010.aside", ".staging", "000000010-1.aside2", REPLAY, "x000000010"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "000000011").write_text("a file")
    assert checkpoints.complete(tmp_path) == written
    assert checkpoints.complete(tmp_path / "nowhere") == []


def test_ten_checkpoints_at_one_frame_are_in_the_order_of_writing(tmp_path: Path) -> None:
    written = [write(tmp_path, 30) for _ in range(11)]
    assert checkpoints.complete(tmp_path) == written
    assert written[-1].path.name == "000000030-10"


def test_the_newest_at_a_frame_stays_the_newest_after_older_ones_were_removed(tmp_path: Path) -> None:
    """Stopped and resumed again and again at one frame, the last state written is the one to go on from."""
    for _ in range(6):
        newest = write(tmp_path, 30)
        checkpoints.thin_out(tmp_path, 2)
        assert newest.path.is_dir()
        assert checkpoints.complete(tmp_path)[-1] == newest


# Verifying.


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "a folder": (replace_by_folder, "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes of"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has .* bytes of"),
    "extended": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "has .* bytes of"),
    "first bit": (lambda path: flip(path, 0), "was altered"),
    "last bit": (lambda path: flip(path, -1), "was altered"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "was altered"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", [f"000000030/{STATE}", f"{REPLAY}/{chunk(0)}", f"{REPLAY}/{chunk(10)}"])
def test_damage_is_named(file: str, damage: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 30, replay=(0, 10))
    act, what = DAMAGE[damage]
    act(tmp_path / file)
    with pytest.raises(DamagedError, match=f"^{tmp_path / file} {what}"):
        checkpoint.verify()
    if REPLAY in file:
        checkpoint.verify(replay=False)
    else:
        with pytest.raises(DamagedError):
            checkpoint.verify(replay=False)


MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "torn": b'{"format": 1, "files": {',
    "not JSON": b"manifest",
    "not text": b"\x80\x81\xff",
    "a pickle": pickle.dumps({"format": 1, "files": {}, "replay": {}}),
    "a list": b"[1, 2]",
    "a number": b"1",
    "null": b"null",
    "without format": b'{"files": {}, "replay": {}}',
    "format as text": b'{"format": "1", "files": {}, "replay": {}}',
    "without files": b'{"format": 1, "replay": {}}',
    "files as a list": b'{"format": 1, "files": [], "replay": []}',
    "files without hashes": b'{"format": 1, "files": {"state.ckpt": {"bytes": 1}}, "replay": {}}',
    "files as numbers": b'{"format": 1, "files": {"state.ckpt": 3}, "replay": {}}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_what_is_not_a_manifest_is_named(kind: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 30)
    (checkpoint.path / MANIFEST).write_bytes(MANIFESTS[kind])
    for act in (checkpoint.manifest, checkpoint.verify):
        with pytest.raises(DamagedError, match=f"^{checkpoint.path / MANIFEST} is missing or not a manifest"):
            act()
    assert checkpoints.eval_return(checkpoint) is None
    assert checkpoints.newest_good(tmp_path)[0] is None


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 30)
    (checkpoint.path / MANIFEST).unlink()
    with pytest.raises(DamagedError, match=f"^{checkpoint.path / MANIFEST} is missing"):
        checkpoint.verify()


def test_a_manifest_has_to_list_the_state(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 30)
    edit_manifest(checkpoint, lambda manifest: manifest["files"].clear())
    with pytest.raises(DamagedError, match=f"{MANIFEST} does not list {STATE}"):
        checkpoint.verify()


def test_a_manifest_reaches_no_replay_file_outside_of_its_folder(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 30)
    (tmp_path / "elsewhere.pt").write_bytes(b"x")
    record = durable.record_of(b"x")
    edit_manifest(checkpoint, lambda manifest: manifest["replay"].update({"../elsewhere.pt": record}))
    with pytest.raises(DamagedError, match=f"^{tmp_path / REPLAY}/elsewhere.pt is missing"):
        checkpoint.verify()


def test_a_manifest_without_a_return_is_as_one_without_an_evaluation(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 30, 4.0)
    edit_manifest(checkpoint, lambda manifest: manifest.pop("eval_return"))
    assert checkpoints.eval_return(checkpoint) is None
    assert checkpoints.best(tmp_path) is None


def test_a_later_format_is_refused_with_the_version_that_wrote_it(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 30, 4.0)
    edit_manifest(checkpoint, lambda m: m.update(format=2, versions={"qsm-lightning": "7.8.9"}))
    for act in (checkpoint.manifest, checkpoint.verify, lambda: checkpoints.newest_good(tmp_path)):
        with pytest.raises(SettingError, match=r"000000030 has format 2, .* reads up to 1: install .* \(7\.8\.9\)"):
            act()
    assert checkpoints.best(tmp_path) is None
    edit_manifest(checkpoint, lambda manifest: manifest.pop("versions"))
    with pytest.raises(SettingError, match=r"\(unknown\)"):
        checkpoint.verify()


# Finding.


def test_the_newest_good_one_is_found_and_what_is_wrong_with_newer_ones_said(tmp_path: Path) -> None:
    written = [write(tmp_path, frames, replay=(frames,)) for frames in (10, 20, 30, 40)]
    assert checkpoints.newest_good(tmp_path) == (written[3], [])
    written[3].state.write_bytes(b"short")
    (tmp_path / REPLAY / chunk(30)).unlink()
    good, faults = checkpoints.newest_good(tmp_path)
    assert good == written[1]
    assert [fault.split(" ")[0] for fault in faults] == [str(written[3].state), str(tmp_path / REPLAY / chunk(30))]
    assert checkpoints.newest_good(tmp_path, up_to=written[2]) == (written[1], faults[1:])
    assert checkpoints.newest_good(tmp_path, up_to=written[0]) == (written[0], [])
    for checkpoint in written[:2]:
        checkpoint.state.unlink()
    good, faults = checkpoints.newest_good(tmp_path)
    assert good is None
    assert len(faults) == 4
    assert checkpoints.newest_good(tmp_path / "nowhere") == (None, [])


def test_the_best_is_the_earliest_of_equals(tmp_path: Path) -> None:
    assert checkpoints.best(tmp_path) is None
    written = [write(tmp_path, i, score) for i, score in enumerate((None, -3.0, -1.0, None, -1.0, -2.0))]
    assert checkpoints.best(tmp_path) == written[2]
    (written[2].path / MANIFEST).write_bytes(b"")
    assert checkpoints.best(tmp_path) == written[4]


# Removing.


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    written = [write(tmp_path, frames, score) for frames, score in ((10, 1.0), (20, 9.0), (30, None), (40, 3.0))]
    checkpoints.thin_out(tmp_path, 10)
    assert checkpoints.complete(tmp_path) == written
    checkpoints.thin_out(tmp_path, 2)
    assert checkpoints.complete(tmp_path) == written[1:]
    checkpoints.thin_out(tmp_path, 1)
    assert checkpoints.complete(tmp_path) == [written[1], written[3]]
    better = write(tmp_path, 50, 10.0)
    checkpoints.thin_out(tmp_path, 1)
    assert names(tmp_path) == [better.path.name]


def test_replay_files_go_with_the_last_that_lists_them(tmp_path: Path) -> None:
    def there() -> list[str]:
        return names(tmp_path / REPLAY)

    write(tmp_path, 10, 9.0, (0, 10))
    write(tmp_path, 20, 1.0, (10, 20))
    write(tmp_path, 30, 2.0, (20, 30))
    write_replay(tmp_path, chunk(40))
    checkpoints.thin_out(tmp_path, 2)
    assert there() == [chunk(0), chunk(10), chunk(20), chunk(30)]
    checkpoints.thin_out(tmp_path, 1)
    assert there() == [chunk(0), chunk(10), chunk(20), chunk(30)], "the best needs its own"
    write(tmp_path, 40, 10.0, (30,))
    checkpoints.thin_out(tmp_path, 1)
    assert there() == [chunk(30)]


def test_what_was_set_aside_keeps_its_replay_files(tmp_path: Path) -> None:
    first = write(tmp_path, 10, 1.0, (0,))
    write(tmp_path, 20, 5.0, (0, 10))
    write(tmp_path, 30, 2.0, (10, 20))
    aside = sorted(checkpoints.set_aside_after(first))
    assert [path.name for path in aside] == ["000000020.aside", "000000030.aside"]
    assert checkpoints.complete(tmp_path) == [first]
    assert checkpoints.best(tmp_path) == first, "what was set aside is not this run's"
    write(tmp_path, 20, 3.0, (0, 50))
    write_replay(tmp_path, chunk(10, rank=1))
    checkpoints.thin_out(tmp_path, 1)
    assert names(tmp_path / REPLAY) == [chunk(0), chunk(10), chunk(20), chunk(50)]
    for path in aside:
        Checkpoint(path).verify()


def test_setting_aside_twice_keeps_both(tmp_path: Path) -> None:
    first = write(tmp_path, 10)
    for _ in range(3):
        write(tmp_path, 20)
        checkpoints.set_aside_after(first)
    assert names(tmp_path) == ["000000010", "000000020.aside", "000000020.aside1", "000000020.aside2"]
    second = write(tmp_path, 10)
    assert checkpoints.set_aside_after(second) == []
    assert checkpoints.set_aside_after(first) == [tmp_path / "000000010-1.aside"]


def test_setting_aside_that_breaks_off_leaves_no_newest_of_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is the beginning of one history: the newest of it does not follow on what was set aside."""
    first, second, *_ = [write(tmp_path, frames) for frames in (10, 20, 30, 40)]
    left = iter([os.rename])

    def rename(one: Path, two: Path) -> None:
        next(left, broken)(one, two)

    def broken(one: Path, two: Path) -> None:
        raise Killed

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(Killed):
        checkpoints.set_aside_after(first)
    assert [checkpoint.order[0] for checkpoint in checkpoints.complete(tmp_path)] == [10, 20, 30]


def test_only_files_of_replay_frames_are_removed_from_their_folder(tmp_path: Path) -> None:
    """It may be a link to a larger disk, or to somewhere it should never have pointed."""
    write(tmp_path, 10, replay=(0,))
    for name in (chunk(10), chunk(0, rank=1), f".{chunk(10)}.123", "notes.txt", "notes.pt", ".hidden"):
        (tmp_path / REPLAY / name).write_bytes(b"x")
    (tmp_path / REPLAY / "folder").mkdir()
    checkpoints.thin_out(tmp_path, 1)
    assert names(tmp_path / REPLAY) == sorted([chunk(0), "notes.txt", "notes.pt", ".hidden", "folder"])


def test_a_checkpoint_of_a_later_version_stops_no_run_and_keeps_its_files(tmp_path: Path) -> None:
    """A run that a later version went on with, taken up again by this one from an older checkpoint."""
    first = write(tmp_path, 10, replay=(0,))
    later = write(tmp_path, 20, replay=(0, 10))
    edit_manifest(later, lambda manifest: manifest.update(format=2))
    (aside,) = checkpoints.set_aside_after(first)
    checkpoints.thin_out(tmp_path, 1)
    assert names(tmp_path) == ["000000010", aside.name, REPLAY]
    assert names(tmp_path / REPLAY) == [chunk(0), chunk(10)]


# Through the command line.

SETTINGS = [
    *("--config=pendulum", *SHRINK, "--data.eval_every_frames=30", "--data.eval_selector=sample"),
    *("--data.eval_episodes=1", "--checkpoint.every_frames=15", "--checkpoint.keep_last=100"),
    *("--metrics.every_frames=10", "--picture.every_evaluations=0"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 frames with checkpoints at 15, 30, 45 and 60."""
    return trained(tmp_path_factory.mktemp("whole"), *SETTINGS)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    return copy


def at(run: Path, frame: int) -> Checkpoint:
    return Checkpoint(run / "checkpoints" / f"{frame:09}")


def said(text: str, program: str = "qsm-fit") -> list[str]:
    """The sentences among what a command printed, warnings included."""
    assert "Traceback" not in text, text
    text = re.sub(r"^WARNING:qsm_lightning[\w.]*:", f"{program}: ", text, flags=re.M)  # where imports set up logging
    return [line for line in text.splitlines() if line.startswith(f"{program}: ")]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def test_resuming_passes_over_a_truncated_checkpoint_in_one_line(run: Path, whole: Path, tmp_path: Path) -> None:
    truncate(at(run, 60).state)
    passed_over, begun = said(fit(tmp_path, "--resume", run))
    assert passed_over.startswith(f"qsm-fit: {at(run, 60).state} has ")
    assert passed_over.endswith(f"; going on from {at(run, 45).path} instead")
    assert begun == f"qsm-fit: {run} from frame 45"
    assert_same(run, whole)
    assert (run / "checkpoints" / "000000060.aside").is_dir(), "it is kept, and not taken for a good one"
    assert names(run.parent)[-1] == "run"


def test_resuming_passes_over_several_damaged_checkpoints(run: Path, whole: Path, tmp_path: Path) -> None:
    flip(at(run, 60).state, 1000)
    (at(run, 45).path / MANIFEST).write_bytes(pickle.dumps({}))
    *passed_over, begun = said(fit(tmp_path, "--resume", run))
    assert [line.split()[1] for line in passed_over] == [str(at(run, 60).state), str(at(run, 45).path / MANIFEST)]
    assert begun.endswith("from frame 30")
    assert_same(run, whole)


def test_a_checkpoint_named_that_is_damaged_is_passed_over_for_an_older_one(
    run: Path, whole: Path, tmp_path: Path
) -> None:
    frames = next((run / "checkpoints" / REPLAY).glob("0-000000000030-*"))  # of 45 and 60
    truncate(frames)
    args = ["--config", run / "config.yaml", "--ckpt_path", at(run, 45).state]
    passed_over, begun = said(fit(tmp_path, *args))
    assert passed_over.startswith(f"qsm-fit: {frames} has ")
    assert passed_over.endswith(f"; going on from {at(run, 30).path} instead")
    assert begun.endswith("from frame 30")
    assert_same(run, whole)


def test_without_a_whole_checkpoint_there_is_one_sentence_and_nothing_changes(run: Path, tmp_path: Path) -> None:
    frames = next((run / "checkpoints" / REPLAY).glob("0-000000000000-*"))
    frames.unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for args in (["--resume", run], ["--resume", at(run, 30).path]):
        (sentence,) = said(fit(tmp_path, *args, status=2))
        assert sentence == f"qsm-fit: {frames} is missing: there is no older whole checkpoint to go on from"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resuming_from_a_later_format_names_the_version(run: Path, tmp_path: Path) -> None:
    edit_manifest(at(run, 60), lambda m: m.update(format=2, versions={"qsm-lightning": "7.8.9"}))
    (sentence,) = said(fit(tmp_path, "--resume", run, status=2))
    assert "has format 2" in sentence
    assert "(7.8.9)" in sentence


def evaluate(folder: Path, *args: object, status: int = 0) -> str:
    run = Run(folder, *args, name="qsm-eval")
    assert run.wait() == status, run.text
    return run.text


def test_evaluating_a_damaged_checkpoint_names_what_is_wrong(run: Path, tmp_path: Path) -> None:
    flip(at(run, 45).state, 1000)
    for path in (at(run, 45).path, at(run, 45).state):
        (sentence,) = said(evaluate(tmp_path, path, status=2), "qsm-eval")
        assert sentence == (
            f"qsm-eval: {at(run, 45).state} was altered: its content is not what was written: choose another checkpoint"
        )


def test_evaluating_a_run_passes_over_its_damaged_best(run: Path, tmp_path: Path) -> None:
    best = checkpoints.best(run / "checkpoints")
    assert best is not None
    (best.path / MANIFEST).write_bytes(b"{}")
    truncate(at(run, 45).state)
    other = checkpoints.best(run / "checkpoints")
    assert other is not None
    text = evaluate(tmp_path, run, "--episodes=1")
    assert f"checkpoint: {other.path}\n" in text
    truncate(other.state)
    text = evaluate(tmp_path, run, "--episodes=1")
    assert said(text, "qsm-eval")[0].startswith(f"qsm-eval: {other.state} has ")
    assert f"using {at(run, 15).path} instead" in text
    (at(run, 15).path / MANIFEST).unlink()
    text = evaluate(tmp_path, run, status=2)
    assert said(text, "qsm-eval")[-1].endswith("choose another checkpoint")


def test_evaluation_needs_no_replay_frames(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints" / REPLAY)
    assert "frames: 60" in evaluate(tmp_path, at(run, 60).path, "--episodes=1")
