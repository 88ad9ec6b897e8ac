"""``qsm-export``: the policy of what ``qsm-fit`` saved, as a file that acts without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsm_lightning import checkpoints, durable
from qsm_lightning.commands.base import Parser, run_command
from qsm_lightning.commands.trained import Trained, add_checkpoint, add_selector, load
from qsm_lightning.envs import in_continuous_time
from qsm_lightning.errors import SettingError, require
from qsm_lightning.exporting import SUFFIXES, check_installed, described_inputs, exported
from qsm_lightning.policy import Policy

SCALING = "low + (action + 1) / 2 * (high - low)"
CALLS = {
    "onnx": "onnxruntime.InferenceSession({file!r}).run(None, {{{items}}})",
    "torch-export": "torch.export.load({file!r}).module()({names})",
}


def main(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-export``: write a policy to a file. See ``qsm-export --help``."""
    run_command("qsm-export", lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "qsm-export",
        description="Write a trained policy, with all its denoising steps, to a file that acts without this package. "
        "Its numbers are float32, whatever trainer.precision was; with model.ema it has the averaged weights.",
    )
    add_checkpoint(parser)
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="onnx", help="kind of file (onnx)")
    parser.add_argument("--out", metavar="FILE", help="where to write it (policy.onnx or policy.pt2, in this folder)")
    add_selector(parser)
    return parser


def run(args: list[str] | None = None) -> None:
    """Parse, export, check, write and print."""
    options = _parser().parse_args(args)
    out = _file(options.out, options.format)
    check_installed(options.format)
    trained = load(options.checkpoint, options.trust)
    policy = trained.policy(options.selector, options.candidates)
    if not isinstance(policy, Policy):
        raise SettingError(f"{type(policy).__name__} cannot be exported: make it a qsm_lightning.policy.Policy")
    sizes = trained.module.hparams
    shapes = described_inputs(policy, sizes["observation_dim"])
    metadata = _metadata(trained, options.selector, shapes)
    with trained.module.averaged_weights():
        content, checked = exported(policy, sizes["observation_dim"], options.format, metadata)
    with durable.writing(out, "--out"):
        durable.write_files(out.parent, {out.name: content})
    items = ", ".join(f"{name!r}: {name}" for name in shapes)
    print(f"file: {out}, {len(content):,} bytes")
    print(f"policy: {metadata['algorithm']} ({options.selector}) after {trained.frames} frames of {trained.env}")
    print(f"inputs: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}, float32")
    print(f"output: action {metadata['action']}")
    print(f"checked: {checked}")
    print(f"call: {CALLS[options.format].format(file=str(out), items=items, names=', '.join(shapes))}")


def _file(out: str | None, file_format: str) -> Path:
    """Where to write, which must be possible."""
    suffix = SUFFIXES[file_format]
    path = Path(out if out is not None else f"policy{suffix}")
    require(path.suffix == suffix, f"--out is {str(path)!r}: with --format {file_format} the name must end in {suffix}")
    durable.check_writable(path, "--out")
    return path


def _metadata(trained: Trained, selector: str, shapes: dict[str, str]) -> dict[str, str]:
    """What is written into the file: where the policy comes from and how it is called."""
    action = f"[batch, {trained.module.hparams['action_dim']}] in [-1, 1]"
    _, time = in_continuous_time(trained.env)
    return {
        "environment": trained.env,
        "algorithm": type(trained.module.loss).__name__,
        "selector": selector,
        "frames": str(trained.frames),
        "qsm_lightning": checkpoints.versions().get("qsm-lightning", "unknown"),
        **shapes,
        "action": "; ".join(filter(None, [action, time.output if time else "", f"the environment's is {SCALING}"])),
    }
