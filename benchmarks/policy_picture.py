"""The policy's picture of a finished run, as a file.

Usage: python -m benchmarks.policy_picture RUN OUT.png
"""

from __future__ import annotations

import sys

import torch

from qsm_lightning import datasets
from qsm_lightning.callbacks.policy_picture import draw_policy
from qsm_lightning.commands.trained import load


def main(run: str, out: str, states: int = 3) -> None:
    """Draw the best checkpoint's policy in ``states`` observations spread over the run's replay buffer."""
    module = load(run).module
    frames = datasets.load(run, module.hparams["observation_dim"], module.hparams["action_dim"])
    rows = torch.linspace(0, len(frames) - 1, states).long()
    with module.averaged_weights():
        draw_policy(module.loss, frames[rows]["observation"]).savefig(out, dpi=90)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
