"""What one action costs, by the trainer's own policy and by the files of qsm-export.

Usage: python -m benchmarks.export [--hidden 256 512] [--batch 1 64] [--T 5] [--observation 11] [--json FILE]

From observations to actions, noise included, in one process, taking turns with the same number of threads:

eager          the policy that qsm-eval runs
compiled       the same as one compiled function, as collecting has it in a run with model.compile true
torch-export   the .pt2 file, loaded with torch.export.load
  compiled     the same through torch.compile
onnxruntime    the .onnx file, with numpy's noise
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.machine import described, machine
from benchmarks.report import first_calls, in_turn, markdown, quartiles, save, told
from qsm_lightning.compiled import compile_acting
from qsm_lightning.exporting import exported
from qsm_lightning.losses import QSM
from qsm_lightning.policy import DiffusionPolicy

ACTION = 3
Act = Callable[[], Any]


def ways_to_act(hidden: int, T: int, observation: int) -> tuple[dict[str, Callable[[torch.Tensor], Any]], dict[str, int]]:
    """Observations [N, O] -> actions by each way, of one set of weights; sizes of the files in bytes."""
