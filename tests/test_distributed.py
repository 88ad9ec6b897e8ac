"""Several processes compute what one does with the whole batch, and stay together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.losses import QSM
from tests.compare import differences
from tests.ranked import Adapted, Fed, Normalised, Shared, frames_of, on_ranks

STRATEGIES = ["ddp", "ddp_find_unused_parameters_true"]


@pytest.mark.parametrize(
    ("loss", "strategy", "dtype"),
    [
        (Shared, "ddp", torch.float32),
        (Shared, "ddp", torch.float64),
        (Shared, STRATEGIES[1], torch.float32),
        (Normalised, "ddp", torch.float64),
        (Adapted, "ddp", torch.float64),
    ],
)
def test_gradients_are_those_of_one_process_with_the_whole_batch(
    loss: type[QSM], strategy: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Of all optimizers in each of 100 updates, with the same frames and noise; also with statistics of the batch."""
    (one,) = on_ranks(1, tmp_path / "one", loss, Fed, strategy, 100, dtype)
    two = on_ranks(2, tmp_path / "two", loss, Fed, strategy, 100, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert one["updates"] == two[0]["updates"] == 100
    assert one["frames"] == two[0]["frames"]
    assert len(one["gradients"]) == 100 * len(one["optimizers"])
    for rank in two:
        for mine, whole in zip(rank["gradients"], one["gradients"], strict=True):
            torch.testing.assert_close(mine, whole, rtol=0, atol=tolerance)
    terms = len(one["optimizers"])
    for term in range(terms):
        assert max(g.abs().max() for g in one["gradients"][term::terms]) > 1e-3, "there is something to compare"


@pytest.fixture(scope="module", params=STRATEGIES)
def apart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two ranks after 500 updates on what they collected themselves."""
    folder = tmp_path_factory.mktemp("apart") / "run"
    return on_ranks(2, folder, QSM, OffPolicyDataModule, request.param, 500)


def test_networks_targets_averages_and_optimizers_stay_bitwise_equal(apart: list[dict[str, Any]]) -> None:
    """With clipped gradients, too."""
    assert apart[0]["updates"] == 500
    assert any(key.startswith("averages") for key in apart[0]["module"])
    for content in ("gradients", "module", "optimizers", "returns"):
        assert not differences(apart[0][content], apart[1][content])


def test_experience_and_noise_differ(apart: list[dict[str, Any]]) -> None:
    first, second = (frames_of([rank["replay"]]) for rank in apart)
    assert first.shape == second.shape
    assert not torch.isin(first[:, 0], second[:, 0]).any(), "the same observation twice"
    assert not torch.equal(apart[0]["noise"], apart[1]["noise"])
