"""What a gradient update costs, against the matrix products in it and against a plain eager port.

Usage: python -m benchmarks.update [--hidden 256 512] [--batch 256] [--T 5] [--observation 11]
                                     [--others qsm sac td3] [--json FILE]

An update is everything in it: TD target through the sampler, two critics, targets, denoiser, optimizers. In one
process, taking turns:

floor       the products of matrices that an update of ours makes, alone: found by running one, repeated with torch.mm
port        the algorithm as one would write it down in eager PyTorch (benchmarks/eager_port.py)
eager       ours, as in a run with model.compile false
compiled    ours, as in a run with model.compile true

and one action for one observation, and for 64, by the last three. That is QSM as published (the class's defaults).
Updates of --others are measured without a port; qsm among them is QSM as its tasks in conf/ are set.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.eager_port import Port
from benchmarks.machine import described, machine
from benchmarks.report import first_calls, in_turn, quartiles, save, told
from qsm_lightning.compiled import CompiledUpdate, compile_acting
from qsm_lightning.losses import ALGORITHMS, QSM, OffPolicyLoss
from qsm_lightning.tables import markdown

ACTION = 3
OTHERS = {"qsm": {"m_q": "auto", "score_at": "denoised"}, "sac": {}, "td3": {}}


class Products(TorchDispatchMode):
    """Writes down every product of matrices: sizes and strides of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = {torch.ops.aten.mm.default: args[:2], torch.ops.aten.addmm.default: args[1:3]}.get(func)
        if factors is not None:
            self.found.append(tuple((tuple(x.shape), x.stride()) for x in factors))
        return func(*args, **(kwargs or {}))

    def repeat(self) -> Callable[[], None]:
        """The products alone, on numbers of no meaning."""
        pairs = [tuple(torch.empty_strided(*layout).normal_() for layout in pair) for pair in self.found]

        def multiply() -> None:
            for left, right in pairs:
                torch.mm(left, right)

        return multiply

    def flops(self) -> int:
        """Multiplications and additions."""
        return sum(2 * left[0][0] * left[0][1] * right[0][1] for left, right in self.found)


def replay_batch(batch: int, observation: int) -> TensorDict:
    """Frames of no meaning."""
    following = {
        "observation": torch.randn(batch, observation),
        "reward": torch.randn(batch, 1),
        "terminated": torch.rand(batch, 1) < 0.01,
        "done": torch.rand(batch, 1) < 0.01,
    }
    return TensorDict(
        {
            "observation": torch.randn(batch, observation),
            "action": torch.rand(batch, ACTION) * 2 - 1,
            "next": TensorDict(following, [batch]),
        },
        [batch],
    )


def optimizers(loss: OffPolicyLoss) -> dict[str, Adam]:
    """As ``OffPolicyModule.configure_optimizers`` makes them."""
    return {term: Adam(loss.term_parameters(term), 3e-4, fused=True) for term in loss.terms}


def plain_update(loss: OffPolicyLoss, batch: TensorDictBase) -> Callable[[], None]:
    """The update of ``OffPolicyModule`` without compiling."""
    adams = optimizers(loss)

    def update() -> None:
        for term, adam in adams.items():
            value, _ = loss.term_loss(term, batch)
            adam.zero_grad()
            with torch.autocast(value.device.type, enabled=False):  # as OffPolicyModule.backward
                value.backward()
            adam.step()
        loss.update_targets()

    return update


def compiled_update(loss: OffPolicyLoss, batch: TensorDictBase) -> Callable[[], Any]:
    """The update of ``OffPolicyModule`` with compiling."""
    update = CompiledUpdate(loss, optimizers(loss), lambda due: loss.update_targets())
    return lambda: update(batch)


def measure(hidden: int, batch: int, T: int, observation: int, options: argparse.Namespace) -> dict[str, Any]:
    """One setting: milliseconds of every call."""
    widths = (hidden, hidden)
    frames = replay_batch(batch, observation)
    following = frames["next"]
    port = Port(observation, ACTION, list(widths), T)
    raw = (frames["observation"], frames["action"], following["reward"], following["terminated"])
    losses = [QSM(observation, ACTION, hidden=widths, T=T) for _ in range(2)]
    with Products() as products:
        plain_update(QSM(observation, ACTION, hidden=widths, T=T), frames)()
    ways: dict[str, Callable[[], Any]] = {
        "floor": products.repeat(),
        "port": lambda: port.update((*raw, following["observation"])),
        "eager": plain_update(losses[0], frames),
        "compiled": compiled_update(losses[1], frames),
    }
    found: dict[str, Any] = {
        "setting": {"hidden": hidden, "batch": batch, "T": T, "observation": observation},
        "flops": products.flops(),
        "first_calls_s": first_calls(ways),
        "update_ms": milliseconds(ways, options.rounds, options.calls),
    }
    for n in (1, 64):
        acts = {way: policy(way, losses, port) for way in ("port", "eager", "compiled")}
        seen = torch.randn(n, observation)
        calls = {way: partial(act, seen) for way, act in acts.items()}
        first_calls(calls)
        found[f"act_{n}_ms"] = milliseconds(calls, options.rounds, 5 * options.calls)
    return found


def milliseconds(ways: Mapping[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, Any]:
    """Quartiles of every way's calls, which take turns."""
    return {way: quartiles([1e3 * s for s in seconds]) for way, seconds in in_turn(ways, rounds, calls).items()}


def measure_other(name: str, hidden: int, batch: int, observation: int, options: argparse.Namespace) -> dict[str, Any]:
    """Another algorithm's update, in which every term is stepped: milliseconds of every call."""
    frames = replay_batch(batch, observation)
    losses = [ALGORITHMS[name](observation, ACTION, hidden=(hidden, hidden), **OTHERS[name]) for _ in range(3)]
    with Products() as products:
        plain_update(losses[0], frames)()
    ways: dict[str, Callable[[], Any]] = {
        "floor": products.repeat(),
        "eager": plain_update(losses[1], frames),
        "compiled": compiled_update(losses[2], frames),
    }
    return {
        "setting": {"loss": name, "hidden": hidden, "batch": batch, "observation": observation},
        "products": len(products.found),
        "flops": products.flops(),
        "first_calls_s": first_calls(ways),
        "update_ms": milliseconds(ways, options.rounds, options.calls),
    }


def others_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of updates, and the ratio."""
    ratios = ["compiled / eager", "compiled / floor"]
    head = [*rows[0]["setting"], "products", "floor", "eager", "compiled", *ratios, "first 10 calls, s"]
    cells = [
        [
            *map(str, row["setting"].values()),
            str(row["products"]),
            *(told(ms, 2) for ms in row["update_ms"].values()),
            *(f"{row['update_ms']['compiled'][0] / row['update_ms'][way][0]:.2f}" for way in ("eager", "floor")),
            f"{row['first_calls_s']['compiled']:.0f}",
        ]
        for row in rows
    ]
    return f"ms per update: median (quartiles)\n\n{markdown(head, cells)}"


def policy(way: str, losses: list[QSM], port: Port) -> Callable[[Tensor], Tensor]:
    """Observations [N, O] -> actions as when collecting."""
    if way == "port":
        return port.act
    exploration = losses[way == "compiled"].exploration_policy()
    if way == "compiled":
        compile_acting(exploration)
    return exploration.checked_action


def tables(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of updates and actions, and the ratios."""
    names = list(rows[0]["setting"])
    ways = ["floor", "port", "eager", "compiled"]
    updates, acting = [], []
    for row in rows:
        setting = [str(row["setting"][name]) for name in names]
        middle = {way: row["update_ms"][way][0] for way in ways}
        ratios = [middle["eager"] / middle["port"], middle["compiled"] / middle["port"]]
        ratios += [middle["compiled"] / middle["floor"]]
        updates.append(
            [
                *setting,
                *(told(row["update_ms"][way], 2) for way in ways),
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{row['flops'] / middle['compiled'] / 1e6:.0f}",
                f"{row['first_calls_s']['compiled']:.0f}",
            ]
        )
        acting.append(
            [*setting, *(told(row[f"act_{n}_ms"][way], 3) for n in (1, 64) for way in ways[1:])],
        )
    head = [*names, *ways, "eager / port", "compiled / port", "compiled / floor", "GFLOP/s", "first 10 calls, s"]
    act_head = [*names, *(f"{way}, {n}" for n in (1, 64) for way in ways[1:])]
    return "\n".join(
        [
            *("ms per update: median (quartiles)", "", markdown(head, updates), ""),
            *("ms for the actions of 1 and of 64 observations", "", markdown(act_head, acting)),
        ]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512], help="width of the two hidden layers")
    parser.add_argument("--batch", type=int, nargs="+", default=[256], help="frames per update (default: %(default)s)")
    parser.add_argument("--T", type=int, nargs="+", default=[5], help="denoising steps (default: %(default)s)")
    parser.add_argument("--observation", type=int, nargs="+", default=[11], help="its size (default: %(default)s)")
    parser.add_argument(
        "--others", nargs="*", default=list(OTHERS), choices=list(OTHERS), help="other algorithms (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="turns (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=10, help="measured calls in a turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all measurements to this file")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "rows": []}
    for hidden, batch, T, observation in product(options.hidden, options.batch, options.T, options.observation):
        results["rows"].append(measure(hidden, batch, T, observation, options))
    print(f"{described(results['machine'])}\n\n{tables(results['rows'])}")
    results["others"] = [
        measure_other(*setting, options)
        for setting in product(options.others, options.hidden, options.batch, options.observation)
    ]
    if results["others"]:
        print(f"\n{others_table(results['others'])}")
    save(options.json, results)


if __name__ == "__main__":
    main()
