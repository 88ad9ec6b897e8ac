"""One integer seeds a run; every rank and purpose gets its own stream derived from it."""

from __future__ import annotations

import os
from enum import IntEnum

import numpy as np
import torch

from qsm_lightning.errors import require


class Purpose(IntEnum):
    """What a derived seed is for. The numbers are part of a run's identity: never reuse one."""

    TRAIN_ENV = 0
    NOISE = 1
    SAMPLER = 2
    EVAL_ENV = 3
    EVAL_NOISE = 4
    REPORT_ENV = 5
    REPORT_NOISE = 6
    OFFLINE_SAMPLER = 7
    DATASET_ENV = 8
    DATASET_NOISE = 9


def check_seed(seed: int, setting: str) -> None:
    """Raise :class:`SettingError` unless NumPy takes ``seed`` for one."""
    require(0 <= seed < 2**32, f"{setting} is {seed}: it must be from 0 to {2**32 - 1}")


def derive_seed(seed: int, rank: int, purpose: Purpose, *path: int) -> int:
    """A 31-bit seed, independent between ranks, purposes and whatever numbers follow."""
    state = np.random.SeedSequence(entropy=seed, spawn_key=(rank, int(purpose), *path)).generate_state(1, np.uint32)
    return int(state[0] & 0x7FFFFFFF)


def global_seed() -> int:
    """The seed given to ``seed_everything``; without one, torch's initial seed."""
    value = os.environ.get("PL_GLOBAL_SEED")
    return int(value) if value is not None else torch.initial_seed() % 2**32
