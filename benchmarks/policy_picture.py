"""The policy's picture of a finished run, as a file.

Usage: python benchmarks/policy_picture.py RUN_OR_CHECKPOINT OUT.png
"""

from __future__ import annotations

import sys

import torch

from qsm_lightning import checkpoints
from qsm_lightning.callbacks.policy_picture import draw_policy
from qsm_lightning.commands.trained import find
from qsm_lightning.module import OffPolicyModule


def main(run: str, out: str, states: int = 3) -> None:
    """Draw ``states`` observations spread over the replay buffer that the checkpoint holds."""
    checkpoint = checkpoints.load(find(run))
    module = OffPolicyModule(**checkpoint["hyper_parameters"])
    module.load_state_dict(checkpoint["state_dict"])
    observations = checkpoint["OffPolicyDataModule"]["buffer"]["frames"]["observation"]
    rows = torch.linspace(0, len(observations) - 1, states).long()
    draw_policy(module.loss, observations[rows]).savefig(out, dpi=90)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
