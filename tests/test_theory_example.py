"""``examples/theory.py``, run as a user runs it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_python

pytestmark = pytest.mark.slow
EXAMPLE = ROOT / "examples" / "theory.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("theory")


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What it prints; its pictures are in ``folder``."""
    return run_python(EXAMPLE, folder)


def numbers(pattern: str, text: str) -> list[float]:
    """The one group of every match."""
    found = [float(match) for match in re.findall(pattern, text)]
    assert found, pattern
    return found


def test_its_pictures_are_there(folder: Path, printed: str) -> None:
    pictures = sorted(folder.iterdir())
    assert [path.name for path in pictures] == ["entropy.png", "gridworld.png", "improvement.png", "time_steps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert f"pictures: {', '.join(map(str, pictures))}" in printed


def test_score_and_q_gradient_become_parallel(printed: str) -> None:
    for alpha in (1, 10):
        cosines = numbers(rf"alpha {alpha}, round \d+: cosine ([-.\d]+)", printed)
        assert abs(cosines[0]) < 0.1
        assert cosines[-1] == 1
    entropies = numbers(r"entropy ([.\d]+) at the fixed point", printed)
    assert len(entropies) == 5
    assert all(later < earlier < 1.386 for earlier, later in pairwise(entropies))


def test_exact_score_matching_improves(printed: str) -> None:
    traces = numbers(r"lq, round \d+: trace of P ([.\d]+), nowhere worse: True", printed)
    assert len(traces) == 6
    assert all(later < earlier for earlier, later in pairwise(traces))
    assert traces[-1] == numbers(r"the best trace is ([.\d]+)", printed)[0]
    assert numbers(r"largest HJB residual ([-.\de]+)", printed)[0] < 1e-12
    assert numbers(r"P 1 % too large ([-.\de]+)", printed)[0] > 1e-3


def test_a_misaligned_score_is_worse(printed: str) -> None:
    values = dict(re.findall(r"lq, ([.\d]+) times the best score: mean value ([-.\d]+)", printed))
    assert sorted(values) == ["0.5", "1", "1.5", "2"]
    assert all(float(values["1"]) > float(value) for factor, value in values.items() if factor != "1")


def test_what_is_learned_is_near_the_fixed_point(printed: str) -> None:
    for where, most in {"continuous time": 0.05, "steps of 1/40": 0.02}.items():
        (line,) = re.findall(rf"learned against {where}: .*", printed)
        assert max(numbers(r" (\d\.\d+)", line)) < most


def test_only_cqsm_stays_where_it_is(printed: str) -> None:
    means = {method: numbers(rf"dt 1/\d+, {method}: mean Q ([.\d]+)", printed) for method in ("CQSM", "discrete QSM")}
    assert [len(values) for values in means.values()] == [7, 7]
    assert means["CQSM"][2:] == pytest.approx([1] * 5, abs=0.05)
    assert means["discrete QSM"][-1] < 0.05 < 4 < means["discrete QSM"][0]


def test_it_is_in_the_percent_format() -> None:
    """Every line of a text cell is a comment."""
    cells = EXAMPLE.read_text().split("# %%")
    texts = [cell.removeprefix(" [markdown]") for cell in cells[1:] if cell.startswith(" [markdown]")]
    assert len(texts) == 8
    assert all(line.startswith("#") for text in texts for line in text.split("\n") if line)
    assert cells[0] == ""
