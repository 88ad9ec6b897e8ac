"""qsm-report: its statistics against brute force, what it reads and refuses, and the page it writes."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qsm_lightning.commands import report
from qsm_lightning.errors import SettingError
from qsm_lightning.report import pictures, results
from qsm_lightning.report.statistics import improvement, interval, iqm, share
from qsm_lightning.report.summary import LEVELS, Band, Summary, summarize
from tests.conftest import FullDisk
from tests.helpers import SHRINK
from tests.processes import trained

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_interquartile_mean_by_sorting(count: int) -> None:
    samples = [RNG.normal(size=count), RNG.normal(size=count + 2)]
    pooled = sorted(np.concatenate(samples))
    cut = len(pooled) // 4
    assert iqm(*samples) == pytest.approx(np.mean(pooled[cut : len(pooled) - cut]))


def test_improvement_by_counting_pairs() -> None:
    ours = [np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0])]
    theirs = [np.array([2.0, 2.0]), np.array([1.0, 6.0, 7.0])]
    each = [
        np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in xs for y in ys])
        for xs, ys in zip(ours, theirs, strict=True)
    ]
    assert improvement(*ours, *theirs) == pytest.approx(np.mean(each))
    assert improvement(*theirs, *ours) == pytest.approx(1 - np.mean(each))


def test_the_interval_is_that_of_all_resamples() -> None:
    """Of 4 runs there are 256 resamples, all as likely: the ends lie between neighbours of the exact percentiles."""
    sample = np.array([1.0, 2.0, 4.0, 8.0])
    exact = np.array([iqm(np.array(draw)) for draw in itertools.product(sample, repeat=4)])
    low, high = interval(iqm, sample)
    assert np.percentile(exact, 1) <= low <= np.percentile(exact, 4)
    assert np.percentile(exact, 96) <= high <= np.percentile(exact, 99)


def test_resamples_keep_to_their_task() -> None:
    """Tasks that differ and runs that do not leave nothing to chance; runs of unequal number have their weight."""
    same = np.full(3, 10.0), np.full(5, 90.0)
    np.testing.assert_allclose(interval(iqm, *same), iqm(*same))
    assert share(*same) == pytest.approx((3 * 10 + 5 * 90) / 8)


def test_one_run_has_no_interval() -> None:
    low, high = interval(iqm, np.array([[1.0, 2.0]]))
    assert np.isnan(low).all()
    assert low.shape == high.shape == (2,)


def test_curves_are_resampled_frame_by_frame() -> None:
    sample = RNG.normal(size=(5, 3))
    each = [interval(iqm, sample[:, i]) for i in range(3)]
    np.testing.assert_allclose(interval(iqm, sample), np.transpose(each))


# Runs, written as qsm-fit writes them.

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a real run."""
    run = trained(tmp_path_factory.mktemp("run"), "--config=pendulum", *SHRINK, "--model.loss.m_q=1")
    found = results.read(run, "sample")
    assert found is not None
    assert found.frames.tolist() == [60]
    assert found.versions["mujoco"], "from its checkpoint"
    assert results.read(run, "best_of_n") is not None
    return yaml.safe_load((run / "config.yaml").read_text())


@pytest.fixture
def make(config: dict[str, Any], tmp_path: Path) -> Make:
    """Write a run with given settings (dotted, under model, data or the top) and returns by frame."""

    def write(folder: str, returns: dict[int, float], versions: dict[str, str] | None = None, **settings: Any) -> Path:
        changed = json.loads(json.dumps(config))
        for key, value in settings.items():
            *path, last = key.split("__")
            node = changed
            for part in path:
                node = node[part]
            node[last] = value
        run = tmp_path / folder
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(changed))
        (run / "versions.json").write_text(json.dumps(versions or {"mujoco": "3.17.0"}))
        with (run / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["eval/return", "eval_best_of_n/return", "loss/actor", "step"])
            writer.writerow(["", "", 0.5, 7])
            writer.writerows([value, value + 1, "", frame] for frame, value in returns.items())
        return run

    return write


def summary_of(folder: Path) -> Summary:
    """The figures of the runs below a folder."""
    found = [r for f in results.find(folder) if (r := results.read(f, "sample"))]
    comparison, _ = results.compare(zip(results.label(found), found, strict=True))
    return summarize(comparison)


SAC, TD3 = ({"model__loss": {"class_path": f"qsm_lightning.losses.{name}", "init_args": {}}} for name in ("SAC", "TD3"))


def test_names_tell_what_differs(make: Make) -> None:
    runs = [
        make("a", {10: 1}, seed_everything=0, data__total_frames=70),
        make("b", {10: 1}, seed_everything=1, model__loss__init_args__m_q="auto"),
        make("c", {10: 1}, **SAC),
        make("d", {10: 1}, data__env="dmc:walker/walk", model__loss__init_args__m_q=50.0),
    ]
    found = [result for run in runs if (result := results.read(run, "sample"))]
    assert results.label(found) == ["qsm m_q=1", "qsm m_q=auto", "sac", "qsm m_q=50"]
    assert results.label([found[0], found[2], found[3]]) == ["qsm", "sac", "qsm"], "a task's own setting tells nothing"
    full, short = (make(str(value), {10: 1}, trainer__precision=value) for value in ("32-true", 32))
    found = [result for run in (runs[0], full, short) if (result := results.read(run, "sample"))]
    assert results.label(found) == ["qsm"] * 3, "three names of one precision"


def test_what_changes_nothing_that_is_learned_makes_no_other_algorithm(make: Make) -> None:
    other = {
        **{"name": "other", "ckpt_path": "a/state.ckpt", "resume": "a", "trust": True, "seed_everything": 1},
        **{"checkpoint__every_frames": 7, "metrics__every_frames": 7, "picture__samples": 7, "model__compile": True},
        **{"trainer__accelerator": "cpu", "trainer__max_time": "1h", "trainer__default_root_dir": "b"},
        **{"data__total_frames": 70, "data__storage": "memmap", "data__storage_dir": "c", "data__save_buffer": False},
        **{"data__eval_every_frames": 7, "data__eval_episodes": 7, "data__eval_candidates": 7},
        **{"data__env_processes": True, "data__env_timeout": 7.0, "data__env_restarts": 7},
        **{"data__rank_timeout": 7.0, "data__rounds_per_batch": 7},
    }
    found = [r for run in (make("a", {10: 1}), make("b", {10: 1}, **other)) if (r := results.read(run, "sample"))]
    assert results.label(found) == ["qsm", "qsm"]
    assert found[0].compared == found[1].compared


def test_the_table_ends_where_all_were_evaluated(make: Make, tmp_path: Path) -> None:
    """And says final and best apart, as numbers that a reader can recompute."""
    for seed, scale in enumerate((1.0, 2.0, 4.0)):
        make(f"all/q{seed}", {10: 9 * scale, 20: 50 * scale, 30: 7 * scale, 40: 100}, seed_everything=seed)
    make("all/s0", {10: 8.0, 30: 6.0}, seed_everything=0, **SAC)
    report.run([str(tmp_path / "all"), "--out", str(tmp_path / "out")])
    with (tmp_path / "out/table.csv").open() as file:
        qsm, sac = csv.DictReader(file)
    assert (qsm["algorithm"], qsm["runs"], qsm["frames"]) == ("qsm", "3", "30")
    finals, bests = [7.0, 14.0, 28.0], [9.0, 18.0, 36.0]  # at 20 not all were evaluated
    assert float(qsm["final_mean"]) == float(qsm["final_iqm"]) == pytest.approx(np.mean(finals))
    assert float(qsm["final_deviation"]) == pytest.approx(np.std(finals, ddof=1))
    assert float(qsm["best_iqm"]) == pytest.approx(np.mean(bests))
    for kind, three in (("final", finals), ("best", bests)):  # of three runs the interval is from least to greatest
        assert [float(qsm[f"{kind}_{end}"]) for end in ("low", "high")] == [min(three), max(three)]
    assert (sac["final_iqm"], sac["final_low"], sac["best_iqm"]) == ("6.0", "nan", "8.0")
    table = (tmp_path / "out/table.md").read_text()
    assert "| qsm | 3 | 30 | 16.3 [7.0, 28.0] | 16.3 ± 10.7 | 21.0 [9.0, 36.0] |" in table
    assert "| Pendulum-v1 | sac | 1 | 30 | 6.0 | 6.0 | 8.0 |" in table


def test_every_evaluation_is_listed(make: Make, tmp_path: Path) -> None:
    written = {("qsm", 5): {10: -3.0, 20: 2.5}, ("qsm", 6): {10: 4.0, 20: 7.0}, ("sac", 5): {10: 1.0, 20: -8.0}}
    for (name, seed), returns in written.items():
        make(f"all/{name}{seed}", returns, seed_everything=seed, **(SAC if name == "sac" else {}))
    report.run([str(tmp_path / "all"), "--out", str(tmp_path / "out")])
    with (tmp_path / "out/evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["env"] for row in rows} == {"Pendulum-v1"}
    for row in rows:
        assert written[row["algorithm"], int(row["seed"])][int(row["frames"])] == float(row["return"])


def test_tasks_are_taken_together_by_scaled_returns(make: Make, tmp_path: Path) -> None:
    for seed in range(2):
        make(f"p{seed}", {10: -1500.0, 20: -500.0 - 100 * seed}, seed_everything=seed)
        make(f"w{seed}", {10: 100.0, 20: 400.0}, seed_everything=seed, data__env="dmc:walker/walk")
    make("s", {10: -1400.0, 20: -100.0}, **SAC)
    found = [(results.label([r])[0], r) for f in results.find(tmp_path) if (r := results.read(f, "sample"))]
    comparison, _ = results.compare(found)
    summary = summarize(comparison)
    assert summary.scale == {"Pendulum-v1": (-1500, -100), "dmc:walker/walk": (0, 1000)}
    assert summary.labels == ["qsm"], "sac has no run on walker"
    scaled = [1000 / 1400, 900 / 1400, 0.4, 0.4]
    assert summary.aggregate["qsm"].value == pytest.approx(np.mean(sorted(scaled)[1:3]))
    expected = [(np.array(scaled) > level).mean() for level in LEVELS]
    assert summary.profiles["qsm"].value == pytest.approx(expected)


def test_equal_returns_are_scaled_to_0(make: Make, tmp_path: Path) -> None:
    for seed in range(2):
        make(f"q{seed}", {10: 5.0}, seed_everything=seed)
    assert summary_of(tmp_path).aggregate == {"qsm": Band(np.array(0.0), np.array(0.0), np.array(0.0))}


def along_lines(figure: Figure) -> dict[str, list[float]]:
    """What is drawn along each labelled horizontal line: the ends of the interval and the value."""
    (axis,) = figure.axes
    names = dict(zip(axis.get_yticks(), (text.get_text() for text in axis.get_yticklabels()), strict=True))
    found: dict[str, list[float]] = {name: [] for name in names.values()}
    for line in axis.get_lines():
        x, y = np.asarray(line.get_xydata()).T
        if (y == y[0]).all():  # not the upright line at one half
            found[names[y[0]]] += x.tolist()
    return found


def test_pictures_show_the_figures(make: Make, tmp_path: Path) -> None:
    """Read back off their axes."""
    for seed in range(3):
        make(f"q{seed}", {10: 1.0 + seed, 20: 2.0 + seed**2}, seed_everything=seed)
        make(f"s{seed}", {10: 9.0 - seed, 20: 8.0 - seed}, seed_everything=seed, **SAC)
        make(f"t{seed}", {10: 4.0 * seed, 20: 3.0 * seed}, seed_everything=seed, **TD3)
    summary = summary_of(tmp_path)
    curves = summary.curves["Pendulum-v1"]
    for figure, bands, x in (
        (pictures.learning_curves(summary), curves, np.array([0.01, 0.02])),
        (pictures.profiles(summary), summary.profiles, LEVELS),
    ):
        axis = figure.axes[0]
        assert {line.get_label() for line in axis.get_lines()} == {"qsm", "sac", "td3"}
        for line, area in zip(axis.get_lines(), axis.collections, strict=True):
            band = bands[str(line.get_label())]
            np.testing.assert_allclose(np.asarray(line.get_xydata()).T, [x, band.value])
            corners = np.asarray(area.get_paths()[0].vertices)
            for place, low, high in zip(x, band.low, band.high, strict=True):
                ys = corners[np.isclose(corners[:, 0], place), 1]
                assert (ys.min(), ys.max()) == pytest.approx((low, high))
    both = {name: [band.low, band.high, band.value] for name, band in summary.aggregate.items()}
    assert along_lines(pictures.aggregate(summary)) == both
    assert len({band.value.item() for band in summary.aggregate.values()}) == 3
    above = {f"{a} above {b}": [band.low, band.high, band.value] for (a, b), band in summary.improvements.items()}
    assert along_lines(pictures.improvements(summary)) == above
    assert above["qsm above sac"][2] == pytest.approx(1 / 18), "one pair of the nine is a tie"


def test_the_page_needs_nothing_else(make: Make, tmp_path: Path) -> None:
    make("q", {10: 1.0, 20: 2.0}, model__loss__init_args__m_q="<auto>")
    make("q2", {10: 1.0, 20: 2.0}, versions={"mujoco": "3.3.0"})
    make("s", {10: 1.5, 20: 3.0}, **SAC)
    report.run([str(tmp_path), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out/index.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 4
    assert "m_q=&lt;auto&gt;" in page, "settings are escaped"
    assert "3.17.0, 3.3.0" in page


def test_returns_are_shown_as_finely_as_they_differ(make: Make, tmp_path: Path) -> None:
    for env, unit in (("A-v0", 1e-3), ("B-v0", 1.0), ("C-v0", 1000.0)):
        make(env, {10: -0.67 * unit, 20: -0.10 * unit}, data__env=env)
    report.run([str(tmp_path), "--out", str(tmp_path / "out")])
    table = (tmp_path / "out/table.md").read_text()
    assert [line.split(" | ")[4] for line in table.splitlines()[2:]] == ["-0.0001", "-0.100", "-100"]
    assert "A-v0: -0.0007 and -0.0001; B-v0: -0.670 and -0.100; C-v0: -670 and -100" in (
        (tmp_path / "out/index.html").read_text()
    )


def test_pictures_of_an_earlier_report_do_not_stay(make: Make, tmp_path: Path) -> None:
    make("q", {10: 1.0, 20: 2.0})
    make("s", {10: 1.5, 20: 3.0}, **SAC)
    out = tmp_path / "out"
    report.run([f"{tmp_path}/q", f"{tmp_path}/s", "--out", str(out)])
    assert (out / "improvement.png").is_file()
    report.run([f"{tmp_path}/q", "--out", str(out)])
    assert {path.name for path in out.glob("*.png")} == {"curves.png", "aggregate.png", "profiles.png"}


def test_no_two_labels_look_alike(make: Make, tmp_path: Path) -> None:
    for i in range(20):
        make(f"q{i}", {10: 1.0, 20: 2.0}, model__loss__init_args__m_q=i + 1)
    figure = pictures.learning_curves(summary_of(tmp_path))
    lines = [(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()]
    assert len(lines) == len(set(lines)) == 20


@pytest.mark.parametrize("label", ["", ".", "..", " "])
def test_a_label_is_a_name(label: str, make: Make, tmp_path: Path) -> None:
    make("q", {10: 1.0})
    with pytest.raises(SettingError, match=r"RUNS has '.*=.*q': give a LABEL before the ="):
        report.run([f"{label}={tmp_path}/q", "--out", str(tmp_path / "out")])


def test_settings_without_a_trainer_are_kept(make: Make, tmp_path: Path) -> None:
    config = make("q", {10: 1.0}) / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"trainer": None}))
    report.run([f"{tmp_path}/q", "--out", str(tmp_path / "out"), "--archive", str(tmp_path / "kept")])
    assert yaml.safe_load((tmp_path / "kept/Pendulum-v1/qsm/seed=0/config.yaml").read_text())["trainer"] == {}


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_legend_is_on_the_picture(count: int, make: Make, tmp_path: Path) -> None:
    """However many labels there are, and however long."""
    for i in range(count):
        make(f"q{i}", {10: 1.0, 20: 2.0}, model__loss__init_args__a_setting_with_a_name_that_is_long_for_a_legend=i)
    figure = pictures.learning_curves(summary_of(tmp_path))
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == count
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_kept_results_are_runs_again(make: Make, tmp_path: Path) -> None:
    make("runs/q0", {10: 1.0, 20: 2.0})
    make("runs/q1", {10: 1.0, 20: 4.0}, seed_everything=1, trainer__default_root_dir="/home/me")
    report.run([str(tmp_path / "runs"), "--out", str(tmp_path / "one"), "--archive", str(tmp_path / "kept")])
    kept = (tmp_path / "kept/Pendulum-v1/qsm/seed=1/config.yaml").read_text()
    assert "/home/me" not in kept
    assert yaml.safe_load(kept)["model"] == yaml.safe_load((tmp_path / "runs/q1/config.yaml").read_text())["model"]
    assert "loss/actor" not in (tmp_path / "kept/Pendulum-v1/qsm/seed=1/metrics.csv").read_text()
    report.run([str(tmp_path / "kept"), "--out", str(tmp_path / "two")])
    for name in ("table.csv", "evaluations.csv", "curves.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_kept_stays_where_it_is_when_there_is_more_to_tell_it_apart_from(make: Make, tmp_path: Path) -> None:
    def keep() -> set[str]:
        report.run([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--archive", str(tmp_path / "kept")])
        return {f.parent.relative_to(tmp_path / "kept").as_posix() for f in (tmp_path / "kept").rglob("metrics.csv")}

    make("runs/q", {10: 1.0})
    assert keep() == {"Pendulum-v1/qsm/seed=0"}
    make("runs/later", {10: 1.0, 20: 2.0})
    make("runs/other", {10: 1.0, 20: 3.0}, model__loss__init_args__m_q=2.0)
    assert keep() == {"Pendulum-v1/qsm/seed=0", "Pendulum-v1/qsm-m_q=2/seed=0"}
    assert "2.0" in (tmp_path / "kept/Pendulum-v1/qsm/seed=0/metrics.csv").read_text(), "and goes on"
    report.run([str(tmp_path / "kept"), "--out", str(tmp_path / "again")])
    tables = [(tmp_path / name / "table.csv").read_bytes() for name in ("out", "again")]
    assert tables[0] == tables[1]


def test_what_is_kept_is_replaced_by_the_same_run_only_and_by_no_shorter_one(make: Make, tmp_path: Path) -> None:
    def kept_with(*names: str, force: bool = False) -> None:
        named = [f"QSM={tmp_path / name}" for name in names]
        places = ["--out", str(tmp_path / "out"), "--archive", str(tmp_path / "kept")]
        report.run([*named, *places, *(["--force"] if force else [])])

    make("short", {10: 1.0})
    make("long", {10: 1.0, 20: 2.0})
    make("other", {10: 5.0}, model__loss__init_args__m_q=2.0)
    kept_with("short")
    kept_with("long")
    (kept,) = (tmp_path / "kept").rglob("metrics.csv")
    longer = kept.read_text()
    assert len(longer.splitlines()) == 3
    kept_with("short")
    assert kept.read_text() == longer
    with pytest.raises(SettingError, match="--archive: .*QSM/seed=0 is of a run with other settings .*LABEL=FOLDER"):
        kept_with("other")
    with pytest.raises(SettingError, match="--archive: .*QSM/seed=0 is of a run with other settings"):
        kept_with("long", "other", force=True)
    assert kept.read_text() == longer
    config = kept.with_name("config.yaml")
    config.write_text("- damaged")
    with pytest.raises(SettingError, match="QSM/seed=0 is not a run of qsm-fit that can be read"):
        kept_with("long")
    assert config.read_text() == "- damaged"


def test_what_is_kept_is_replaced_by_one_as_long(make: Make, tmp_path: Path) -> None:
    for value in (2.0, 3.0):
        found = results.read(make(f"{value}", {10: value}), "sample")
        assert found is not None
        results.archive({found.env: {"qsm": [found]}}, tmp_path / "kept")
    kept = results.read(tmp_path / "kept/Pendulum-v1/qsm/seed=0", "sample")
    assert kept is not None
    assert kept.returns.tolist() == [3.0]


@pytest.mark.parametrize("option", ["--out", "--archive"])
def test_a_full_disk_ends_in_a_sentence(option: str, make: Make, tmp_path: Path, full_disk: FullDisk) -> None:
    make("runs/q", {10: 1.0})
    full_disk(tmp_path / option)
    places = [f"{name}={tmp_path / name}" for name in ("--out", "--archive")]
    with pytest.raises(SettingError, match=f"{option} is .*, which cannot be written .*No space left"):
        report.run([str(tmp_path / "runs"), *places])


def test_a_name_given_on_the_command_line(make: Make, tmp_path: Path) -> None:
    make("one=1", {10: 1.0})
    make("two", {10: 2.0}, seed_everything=1)
    report.run([f"Ours={tmp_path / 'two'}", str(tmp_path / "one=1"), "--out", str(tmp_path / "out")])
    table = (tmp_path / "out/table.md").read_text()
    assert "| Ours | 1 |" in table
    assert "| qsm | 1 |" in table


def test_the_longer_of_two_of_the_same_counts(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("version_0", {10: 1.0})
    make("version_1", {10: 1.0, 20: 8.0})
    report.run([str(tmp_path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "| qsm | 1 | 20 | 8.00 |" in said
    assert "version_0 is left out" in said


@pytest.mark.parametrize(
    ("second", "args", "pattern"),
    [
        ({"data__env": "Pendulum-v0"}, [], "Pendulum-v0 and Pendulum-v1.*versions"),
        ({"data__eval_selector": "best_of_n"}, [], "was not evaluated with sample: choose another --selector"),
        ({"data__eval_selector": "sample"}, ["gone"], "'gone'.*no run"),
        ({"model__loss": {}}, [], "is not a run of qsm-fit that can be read .KeyError"),
        ({}, [""], "name a folder"),
        ({}, ["A="], "name a folder"),
        ({"data__env": "some_module:Pendulum-v0"}, [], "different versions of Pendulum"),
        ({}, ["--selector=worst"], "worst"),
        ({}, ["--archive=pyproject.toml"], "--archive is"),
        ({}, ["_hidden=."], "begins with no _"),
    ],
)
def test_what_does_not_compare_is_refused(
    second: dict[str, Any], args: list[str], pattern: str, make: Make, tmp_path: Path
) -> None:
    make("one", {10: 1.0})
    make("two", {10: 2.0}, seed_everything=1, **second)
    with pytest.raises(SettingError, match=pattern):
        report.run([str(tmp_path), *args, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_versions_of_an_environment_in_continuous_time_do_not_compare(make: Make, tmp_path: Path) -> None:
    for version in (0, 1):
        make(str(version), {10: 1.0}, data__env=f"continuous:Pendulum-v{version}?sigma=1")
    with pytest.raises(SettingError, match="different versions of Pendulum"):
        report.run([str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("damage", ["list", "yaml", "brackets", "nan", "inf"])
def test_a_damaged_run_is_named(damage: str, make: Make, tmp_path: Path) -> None:
    run = make("one", {10: 1.0})
    if damage == "list":
        (run / "versions.json").write_text("[1, 2]")
    elif damage == "yaml":
        (run / "config.yaml").write_text("data: {")
    elif damage == "brackets":
        (run / "config.yaml").write_text("[" * 3000)
    else:
        (run / "metrics.csv").write_text(f"eval/return,step\n{damage},10\n")
    reason = "(is not a run of qsm-fit that can be read .*|has returns that are NaN or infinite)"
    with pytest.raises(SettingError, match=f"{run} {reason}: leave it out") as caught:
        report.run([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "object at 0x" not in str(caught.value)


def test_versions_come_from_the_newest_checkpoint_that_tells_them(make: Make, tmp_path: Path) -> None:
    run = make("one", {10: 1.0})
    (run / "versions.json").unlink()
    whole = {"format": 1, "frames": 5, "files": {}, "replay": {}, "versions": {"mujoco": "3"}}
    for name, manifest in (("000000010", "{"), ("000000005", json.dumps(whole))):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "manifest.json").write_text(manifest)
    result = results.read(run, "sample")
    assert result is not None
    assert result.versions == {"mujoco": "3"}
    (run / "checkpoints/000000005/manifest.json").write_text('{"format": 99}')
    report.run([str(run), "--out", str(tmp_path / "out")])
    assert "do not say with which versions" in (tmp_path / "out/index.html").read_text()


def test_runs_of_older_versions_stand_beside_todays(make: Make, tmp_path: Path) -> None:
    """Settings that they do not have are at what they were then; and 1 is 1.0."""
    make("all/old", {10: 1.0}, trainer__gradient_clip_val=1)
    old = yaml.safe_load((tmp_path / "all/old/config.yaml").read_text())
    for section, names in ((old["data"], ("collector", "offline_share", "dataset")), (old["model"], ("ema",))):
        for name in names:
            del section[name]
    (tmp_path / "all/old/config.yaml").write_text(yaml.safe_dump(old))
    make("all/new", {10: 2.0}, seed_everything=1, trainer__gradient_clip_val=1.0)
    report.run([f"{tmp_path}/all", "--out", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert [(row["algorithm"], row["runs"]) for row in rows] == [("qsm", "2")]


def test_values_with_dollars_are_drawn(make: Make, tmp_path: Path) -> None:
    for i in range(2):
        make(f"{i}", {10: 1.0}, data__dataset=f"$x^$_{i}.npz")
    report.run([f"{tmp_path}", "--out", str(tmp_path / "out")])
    assert "dataset=$x^$_1.npz" in (tmp_path / "out/table.md").read_text()


def test_runs_that_are_named_twice_count_once(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make("all/one", {10: 1.0})
    report.run([f"{tmp_path}/all", str(run), "--out", str(tmp_path / "out")])
    assert "is left out" not in capsys.readouterr().out
    assert len((tmp_path / "out/evaluations.csv").read_text().splitlines()) == 2


def test_it_can_be_insisted_on(make: Make, tmp_path: Path) -> None:
    make("one", {10: 1.0})
    make("two", {10: 2.0}, data__env="Pendulum-v0")
    make("three", {10: 2.0}, seed_everything=1, data__eval_selector="best_of_n")
    report.run([str(tmp_path), "--force", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/index.html").is_file()


def test_runs_without_a_common_frame_are_refused(make: Make, tmp_path: Path) -> None:
    make("one", {10: 1.0})
    make("two", {15: 2.0}, seed_everything=1)
    make("three", {10: 2.0}, seed_everything=2)
    with pytest.raises(
        SettingError, match="Pendulum-v1 were never evaluated at the same frame, .*two least.* leave it out"
    ):
        report.run([str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_run_that_was_not_evaluated_yet_is_passed_over(make: Make, tmp_path: Path) -> None:
    make("one", {})
    stopped = make("stopped at once", {})
    (stopped / "metrics.csv").unlink()
    (stopped / "checkpoints").mkdir()
    for runs in (tmp_path, stopped):
        with pytest.raises(SettingError, match="none of the runs has been evaluated"):
            report.run([str(runs), "--out", str(tmp_path / "out")])
    run = make("two", {10: 2.0, 20: 3.0})
    with (run / "metrics.csv").open("a") as file:
        file.write("-13")  # killed in the middle of a row
    report.run([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "| 20 | 3.00 |" in (tmp_path / "out/table.md").read_text()


def test_what_shortens_or_leaves_out_is_noted(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("long", {10: 1.0, 20: 2.0})
    make("short", {10: 1.0}, seed_everything=1)
    make("walk", {10: 1.0}, data__env="dmc:walker/walk")
    make("sac", {10: 1.0}, **SAC)
    report.run([str(tmp_path), "--out", str(tmp_path / "out")])
    said, page = capsys.readouterr().out, (tmp_path / "out/index.html").read_text()
    for note in ("Pendulum-v1 is compared up to 10 of 20 frames", "sac is left out where tasks are taken together"):
        assert note in said
        assert note in page


def test_a_run_that_ends_early_does_not_shorten_complete_ones(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        make(f"ended/{seed}", {10: 1.0, 20: 2.0}, seed_everything=seed, data__total_frames=20)
        make(f"stopped/{seed}", {5: 7.0, 10: 9.0}, seed_everything=seed, data__total_frames=20 - 10 * seed, **SAC)
        make(f"other/{seed}", {10: 3.0, 20: 4.0}, seed_everything=seed, data__total_frames=20, **TD3)
    report.run([str(tmp_path), "--out", str(tmp_path / "out")])
    table = (tmp_path / "out/table.md").read_text()
    assert "| Pendulum-v1 | qsm | 2 | 20 | 2.00 [2.00, 2.00]" in table
    assert "| Pendulum-v1 | td3 | 2 | 20 | 4.00 [4.00, 4.00]" in table
    assert "| Pendulum-v1 | sac | 2 | 10 | 9.00 [9.00, 9.00]" in table
    said = capsys.readouterr().out
    assert f"sac is shown on Pendulum-v1 up to 10 frames, where {tmp_path / 'stopped/0'} ends, and left out" in said
    found = summary_of(tmp_path)
    assert found.labels == ["qsm", "td3"]
    assert found.scale == {"Pendulum-v1": (1, 4)}, "of those that are compared"
    assert {pair: band.value for pair, band in found.improvements.items()} == {("qsm", "td3"): 0}
    assert (tmp_path / "out/improvement.csv").read_text().splitlines()[1:] == ["qsm,td3,0.0,0.0,0.0"]
    scaled = (tmp_path / "out/aggregate.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:2] for line in scaled] == [["qsm", str(1 / 3)], ["td3", "1.0"]]
    assert found.frames == {"Pendulum-v1": {"qsm": [10, 20], "td3": [10, 20], "sac": [5, 10]}}


def test_complete_runs_of_different_lengths_are_compared_unless_much_shorter(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("q", {5: 1.0, 10: 1.0, 20: 2.0}, data__total_frames=20)
    make("sac", {5: 3.0, 10: 3.0}, data__total_frames=10, **SAC)
    make("td3", {5: 4.0}, data__total_frames=5, **TD3)
    report.run([str(tmp_path), "--out", str(tmp_path / "out")])
    rows = [line.split(" | ")[1:4] for line in (tmp_path / "out/table.md").read_text().splitlines()[2:]]
    assert rows == [["qsm", "1", "10"], ["sac", "1", "10"], ["td3", "1", "5"]]
    said = capsys.readouterr().out
    assert f"compared up to 10 of 20 frames, where all were evaluated: {tmp_path / 'sac'} ends at 10" in said
    assert f"td3 is shown on Pendulum-v1 up to 5 frames, where {tmp_path / 'td3'} ends" in said


@pytest.mark.parametrize(
    ("second", "selector", "pattern"),
    [
        ({"model__loss__init_args__T": 9}, "sample", "Q stands for runs of Pendulum-v1 with different settings"),
        ({"data__eval_candidates": 9}, "best_of_n", "best of different numbers of samples"),
    ],
)
def test_one_name_for_different_things_is_refused(
    second: dict[str, Any], selector: str, pattern: str, make: Make, tmp_path: Path
) -> None:
    make("all/one", {10: 1.0})
    make("all/two", {10: 2.0}, seed_everything=1, **second)
    args = [f"Q={tmp_path / 'all'}", f"--selector={selector}", "--out", str(tmp_path / "out")]
    with pytest.raises(SettingError, match=pattern):
        report.run(args)
    report.run([*args, "--force"])
    assert "--force: what does not compare was not looked for" in (tmp_path / "out/index.html").read_text()
