"""Runs as what they measured: found on disk, told apart by their settings, checked to be comparable, kept."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qsm_lightning import checkpoints, durable, runs
from qsm_lightning.errors import SettingError, one_line, require
from qsm_lightning.losses import ALGORITHMS
from qsm_lightning.precision import precision_name
from qsm_lightning.report.statistics import Array
from qsm_lightning.resume import BEFORE
from qsm_lightning.tables import csv_text

VERSIONS = "versions.json"
PRECISION = "trainer.precision"
# What does not change what is learned, or is told on its own.
NOT_COMPARED = re.compile(
    r"seed_everything|name|ckpt_path|resume|trust|(checkpoint|metrics|picture)\..*|model\.compile|"
    r"trainer\.(?!precision|gradient_clip).*|"
    r"data\.(env|total_frames|eval_.*|storage.*|save_buffer|env_.*|rank_timeout|rounds_per_batch)"
)


@dataclass(frozen=True)
class Result:
    """A run's evaluations.

    Args:
        run: its folder.
        config: its settings, as resolved by ``qsm-fit``.
        versions: of the packages that it was made with, as far as they are known.
        frames: where it was evaluated, [E].
        returns: mean return of each evaluation, [E].
    """

    run: Path
    config: dict[str, Any]
    versions: dict[str, str]
    frames: Array
    returns: Array

    @property
    def env(self) -> str:
        """The environment's name."""
        return str(self.settings["data.env"])

    @property
    def total_frames(self) -> int:
        """For how many frames it was to be trained."""
        return int(self.settings["data.total_frames"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.settings["seed_everything"])

    @property
    def algorithm(self) -> str:
        """The name of its loss, or the class if it has none."""
        path = str(self.settings["model.loss.class_path"])
        return next((name for name, cls in ALGORITHMS.items() if path.rpartition(".")[2] == cls.__name__), path)

    @cached_property
    def compared(self) -> dict[str, str]:
        """The settings that make it another algorithm."""
        settings = BEFORE | self.settings | {PRECISION: precision_name(self.settings.get(PRECISION))}
        return {key: _told(value) for key, value in settings.items() if not NOT_COMPARED.fullmatch(key)}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration, flat: model.loss.m_q and so on."""
        return dict(_flat(self.config))


def _told(value: Any) -> str:
    """A value in words, the same for 1 and 1.0."""
    return repr(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find(path: Path) -> list[Path]:
    """The folders of runs at or below ``path``.

    Raises:
        SettingError: when there is none.
    """
    found = _below(path)
    require(found, f"RUNS has {str(path)!r}: there is no run of qsm-fit at or below it; name one that has")
    return found


def _below(path: Path) -> list[Path]:
    """The folders of runs at or below ``path``, if any: some that were stopped at once have no curves."""
    folders = (config.parent for config in path.rglob(runs.CONFIG))
    return sorted(f for f in folders if (f / runs.METRICS).is_file() or (f / runs.CHECKPOINTS).is_dir())


def read(run: Path, selector: str, force: bool = False) -> Result | None:
    """The evaluations with ``selector`` of the run in a folder; None if it has not been evaluated yet.

    Raises:
        SettingError: when its files cannot be read, or it was evaluated with another selector (unless ``force``).
    """
    try:
        config = yaml.safe_load((run / runs.CONFIG).read_text())
        evaluated = config["data"]["eval_selector"]
        _, rows = runs.metrics(run / runs.METRICS)
        columns = {key for row in rows for key, value in row.items() if value and key}
        own = evaluated == selector or (evaluated == "both" and selector == "sample")
        column = "eval/return" if own else f"eval_{selector}/return"
        if column not in columns and "eval/return" in columns:
            require(
                force,
                f"{run} was not evaluated with {selector}: choose another --selector, or compare all with --force",
            )
            column = "eval/return"
        points = {int(float(row["step"])): float(row[column]) for row in rows if row.get(column)}
        require(all(map(math.isfinite, points.values())), f"{run} has returns that are NaN or infinite: leave it out")
        result = Result(run, config, _versions(run), *(np.array(list(v), float) for v in (points, points.values())))
        result.env, result.seed, result.algorithm, result.total_frames  # noqa: B018
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, SettingError):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise SettingError(f"{run} is not a run of qsm-fit that can be read ({reason}): leave it out") from error
    return result if points else None


def _versions(run: Path) -> dict[str, str]:
    """Of the packages that a run was made with: kept beside it, or from its newest checkpoint."""
    if (run / VERSIONS).is_file():
        return {str(name): str(version) for name, version in dict(json.loads((run / VERSIONS).read_text())).items()}
    for saved in reversed(checkpoints.complete(run / runs.CHECKPOINTS)):
        with suppress(checkpoints.DamagedError, SettingError):
            return saved.manifest()["versions"]
    return {}


def label(results: list[Result]) -> list[str]:
    """A name for each: its algorithm, and the settings by which its runs in a same environment differ."""
    names = []
    differing: dict[str, set[str]] = {}
    for algorithm in {result.algorithm for result in results}:
        same = sorted((r for r in results if r.algorithm == algorithm), key=lambda result: result.env)
        differing[algorithm] = set()
        for _, members_of in groupby(same, lambda result: result.env):
            members = [result.compared for result in members_of]
            keys = {key for member in members for key in member}
            differing[algorithm] |= {k for k in keys if len({m.get(k) for m in members}) > 1}
    for result in results:
        told = sorted(differing[result.algorithm])
        settings = BEFORE | result.settings
        values = [f"{key.rpartition('.')[2]}={_short(settings.get(key))}" for key in told]
        names.append(" ".join([result.algorithm, *values]))
    return names


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


Comparison = dict[str, dict[str, list[Result]]]  # environment -> label -> runs, one per seed


def compare(
    labelled: Iterable[tuple[str, Result]], selector: str = "sample", force: bool = False
) -> tuple[Comparison, list[str]]:
    """Runs by environment and label, and sentences on what a reader has to know of them.

    Raises:
        SettingError: for what does not compare, unless ``force``: two versions of one environment, one label for
            different settings, the best of different numbers of samples; and for runs without a common evaluation.
    """
    comparison: Comparison = {}
    notes = ["--force: what does not compare was not looked for"] if force else []
    for name, result in sorted(labelled, key=lambda pair: (pair[1].env, pair[0], pair[1].seed, -pair[1].frames[-1])):
        same = comparison.setdefault(result.env, {}).setdefault(name, [])
        require(
            force or not same or same[-1].compared == result.compared,
            f"{name} stands for runs of {result.env} with different settings, such as {result.run}: give each its own "
            "LABEL=FOLDER, or insist with --force",
        )
        if same and _identity(same[-1]) == _identity(result):
            notes.append(f"{result.run} is left out: {same[-1].run} has the same settings and seed, and is as long")
        else:
            same.append(result)
    for base, group in groupby(sorted(comparison, key=_base), _base):
        versions = list(group)
        require(
            force or len(versions) == 1,
            f"RUNS has {' and '.join(versions)}: returns of different versions of {base} do not compare; "
            "leave one out, or insist with --force",
        )
    for env, by_label in comparison.items():
        every = [result for results in by_label.values() for result in results]
        candidates = {result.settings.get("data.eval_candidates") for result in every}
        require(
            force or selector != "best_of_n" or len(candidates) == 1,
            f"runs of {env} were evaluated with the best of different numbers of samples ({candidates}): compare by "
            "--selector sample, or insist with --force",
        )
        frames, short = measured(by_label)
        times = Counter(frame for result in every for frame in result.frames)
        odd = min(every, key=lambda result: max(times[frame] for frame in result.frames))
        require(
            all(frames.values()),
            f"the runs of {env} were never evaluated at the same frame, {odd.run} least often with others: leave it "
            "out, or compare runs with one data.eval_every_frames and one data.num_envs",
        )
        for name in short:
            first = min(by_label[name], key=_end)
            notes.append(
                f"{name} is shown on {env} up to {frames[name][-1]:,} frames, where {first.run} ends, and left out "
                "where algorithms are compared"
            )
        compared = {name: results for name, results in by_label.items() if name not in short}
        whole = [result for results in compared.values() for result in results]
        first, common, longest = min(whole, key=_end), frames[next(iter(compared))][-1], max(map(_end, whole))
        if common < longest:
            notes.append(
                f"{env} is compared up to {common:,} of {longest:,.0f} frames, where all were evaluated: "
                f"{first.run} ends at {_end(first):,.0f}"
            )
    everywhere = set.intersection(*(set(by_label) for by_label in comparison.values()))
    notes += [
        f"{name} is left out where tasks are taken together: it has no run on some"
        for name in dict.fromkeys(name for by_label in comparison.values() for name in by_label)
        if name not in everywhere
    ]
    return comparison, notes


def _identity(result: Result) -> tuple[Any, ...]:
    """What runs share of which one replaces another."""
    return result.env, result.seed, *sorted(result.compared.items())


def _end(result: Result) -> float:
    """The frame of a run's last evaluation."""
    return float(result.frames[-1])


def _base(env: str) -> str:
    """The name of an environment without its version and where it comes from."""
    return re.sub(r"-v\d+(?=\?|$)", "", re.sub(r"^(?!dmc:)[\w.]+:", "", env))


def measured(by_label: Mapping[str, list[Result]]) -> tuple[dict[str, list[int]], list[str]]:
    """Where each label of a task is measured, and the labels that are too short to compare.

    Those are, if there are others, the ones with a run that ended before its own ``data.total_frames`` or before half
    of the task's greatest. They are measured where all of their own runs were evaluated, and all others where all of
    these were.
    """
    every = [result for results in by_label.values() for result in results]
    half = max(result.total_frames for result in every) / 2
    short = [n for n, rs in by_label.items() if any(_end(r) < max(r.total_frames, half) for r in rs)]
    short = short if len(short) < len(by_label) else []
    frames: dict[str, list[int]] = {}
    for group in ([name for name in by_label if name not in short], *([name] for name in short)):
        sets = [set(result.frames.astype(int)) for name in group for result in by_label[name]]
        frames |= dict.fromkeys(group, sorted(int(frame) for frame in set.intersection(*sets)))
    return frames, short


def at(results: list[Result], frames: list[int]) -> Array:
    """The returns of several runs at ``frames``: [runs, frames]."""
    return np.array([[dict(zip(r.frames.astype(int), r.returns, strict=True))[f] for f in frames] for r in results])


def archive(comparison: Comparison, folder: Path, named: Collection[str] = ()) -> None:
    """Keep each run's settings, versions and evaluations below ``folder``, as a run that can be reported again.

    A run that is there already is replaced by one with the same settings and seed that is as long. It stays in its
    place, whatever else there is by now to tell it apart from, unless a user gave its label (``named``).

    Raises:
        SettingError: when runs with different settings would have the same place, or what is there cannot be read.
        OSError: when the disk is full or cannot be written.
    """
    there = {_identity(kept): kept.run for run in _below(folder) if (kept := read(run, "sample", force=True))}
    places: dict[Path, Result] = {}
    for env, by_label in comparison.items():
        for name, results in by_label.items():
            for result in results:
                place = folder / re.sub(r"[/: ]+", "-", env) / re.sub(r"[/: ]+", "-", name) / f"seed={result.seed}"
                if name not in named:
                    place = there.get(_identity(result), place)
                kept = read(place, "sample", force=True) if (place / runs.METRICS).is_file() else None
                before = places.get(place, kept)
                require(
                    before is None or before.compared == result.compared,
                    f"--archive: {place} is of a run with other settings than {result.run}: give that its own "
                    "LABEL=FOLDER",
                )
                if before is None or _end(before) <= _end(result):
                    places[place] = result
    for place, result in places.items():
        trainer = {k: v for k, v in (result.config.get("trainer") or {}).items() if k != "default_root_dir"}
        config = result.config | {"trainer": trainer}  # not where it was written
        content = {
            runs.CONFIG: yaml.safe_dump(config, sort_keys=False),
            VERSIONS: json.dumps(result.versions, indent=2),
            runs.METRICS: _evaluations(result.run),  # last: what has it is a run
        }
        durable.write_files(place, {name: text.encode() for name, text in content.items()})


def _evaluations(run: Path) -> str:
    """The rows and columns of a run's metrics that are evaluations, as CSV."""
    columns, found = runs.metrics(run / runs.METRICS)
    names = ["step", *(name for name in columns if name.startswith("eval"))]
    return csv_text(names, ([row[name] for name in names] for row in found if row.get("eval/return")))
