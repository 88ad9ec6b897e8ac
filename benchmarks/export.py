"""What an action costs: by the trainer's own policy, and by the files of qsm-export.

Usage: python -m benchmarks.export [--hidden 256 512] [--batch 1 64] [--T 5] [--observation 11] [--json FILE]

From a batch of observations to actions, noise included, in one process with one number of threads, taking turns:

eager           the policy of qsm-eval
compiled        the same as one compiled function, as when collecting in a run with model.compile true
torch-export    the .pt2 file, loaded
  and compiled  the same through torch.compile
onnxruntime     the .onnx file, with noise by numpy
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
from torch import Tensor

from benchmarks.machine import described, machine
from benchmarks.report import first_calls, in_turn, quartiles, save, told
from qsm_lightning.compiled import compile_acting
from qsm_lightning.exporting import exported
from qsm_lightning.losses import QSM
from qsm_lightning.policy import DiffusionPolicy
from qsm_lightning.tables import markdown

ACTION = 3
WAYS = ["eager", "compiled", "torch-export", "torch-export, compiled", "onnxruntime"]


def files(hidden: int, T: int, observation: int) -> tuple[DiffusionPolicy, dict[str, bytes]]:
    """A policy with random weights, and what qsm-export writes of it."""
    policy = QSM(observation, ACTION, hidden=(hidden, hidden), T=T).evaluation_policy()
    assert isinstance(policy, DiffusionPolicy)
    return policy, {kind: exported(policy, observation, kind, {})[0] for kind in ("torch-export", "onnx")}


def ways(policy: DiffusionPolicy, content: dict[str, bytes], seen: Tensor) -> dict[str, Callable[[], Any]]:
    """One batch's actions [N, A] by each way, for observations ``seen`` [N, O]."""
    compiled = DiffusionPolicy(policy.sampler)
    compile_acting(compiled)
    program = torch.export.load(io.BytesIO(content["torch-export"])).module()
    fast = torch.compile(program)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content["onnx"], options, providers=["CPUExecutionProvider"])
    shape, generator, array = policy.noise_shape(len(seen)), np.random.default_rng(0), seen.numpy()

    def by_onnxruntime() -> Any:
        return session.run(None, {"observation": array, "noise": generator.standard_normal(shape, np.float32)})

    return {
        "eager": partial(policy.checked_action, seen),
        "compiled": partial(compiled.checked_action, seen),
        "torch-export": lambda: program(seen, torch.randn(shape)),
        "torch-export, compiled": lambda: fast(seen, torch.randn(shape)),
        "onnxruntime": by_onnxruntime,
    }


def measure(hidden: int, T: int, observation: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each size of batch, milliseconds of every call."""
    policy, content = files(hidden, T, observation)
    rows = []
    for batch in options.batch:
        acts = ways(policy, content, torch.randn(batch, observation))
        started = first_calls(acts, 3)
        seconds = in_turn(acts, options.rounds, options.calls)
        rows.append(
            {
                "setting": {"hidden": hidden, "T": T, "observation": observation, "batch": batch},
                "file_bytes": {kind: len(found) for kind, found in content.items()},
                "first_calls_s": started,
                "act_ms": {way: quartiles([1e3 * s for s in of_way]) for way, of_way in seconds.items()},
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds for a batch of actions, and how many times faster the ONNX file is."""
    names, out = list(rows[0]["setting"]), []
    for row in rows:
        found = row["act_ms"]
        ratios = [found[way][0] / found["onnxruntime"][0] for way in ("eager", "compiled")]
        setting = [str(row["setting"][name]) for name in names]
        out.append([*setting, *(told(found[way], 3) for way in WAYS), *(f"{ratio:.2f}" for ratio in ratios)])
    head = [*names, *WAYS, "eager / onnxruntime", "compiled / onnxruntime"]
    return "\n".join(["ms for a batch of actions: median (quartiles)", "", markdown(head, out)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512], help="width of the two hidden layers")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="observations (default: %(default)s)")
    parser.add_argument("--T", type=int, nargs="+", default=[5], help="denoising steps (default: %(default)s)")
    parser.add_argument("--observation", type=int, nargs="+", default=[11], help="its size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="turns (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=50, help="measured calls in a turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all measurements to this file")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine() | {"onnxruntime": onnxruntime.__version__}, "rows": []}
    for hidden, T, observation in product(options.hidden, options.T, options.observation):
        results["rows"] += measure(hidden, T, observation, options)
    print(f"{described(results['machine'])}, onnxruntime {onnxruntime.__version__}\n\n{table(results['rows'])}")
    save(options.json, results)


if __name__ == "__main__":
    main()
