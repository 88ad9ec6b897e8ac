"""The loss outside this trainer: a plain TorchRL loop."""

from __future__ import annotations

import inspect

import torch
from benchmarks import plain_torchrl

from qsm_lightning.losses import QSMLoss
from qsm_lightning.networks import Critics, Denoiser


def test_the_plain_loop_runs_and_trains_every_network() -> None:
    loss, final_return = plain_torchrl.train(frames=60, warm_up=40, hidden=(16, 16))
    torch.manual_seed(0)
    fresh = {"denoiser": Denoiser(3, 1, (16, 16)), "critics": Critics(3, 1, (16, 16))}
    for name, network in fresh.items():
        trained = getattr(loss, name).state_dict()
        assert not any(torch.equal(value, trained[key]) for key, value in network.state_dict().items())
    assert all(p.isfinite().all() for p in loss.parameters())
    assert -2000 < final_return < 0
    assert isinstance(loss, QSMLoss)


def test_the_plain_loop_is_short_and_knows_no_lightning() -> None:
    source = inspect.getsource(plain_torchrl)
    assert len(source.splitlines()) < 65
    assert "lightning" not in source.replace("qsm_lightning", "").replace("without Lightning", "").lower()
