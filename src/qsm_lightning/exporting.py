"""A trained policy as a file that acts without this package: an ONNX model, or a program of torch.export.

In it is one function, (observation [B, O], noise) -> action [B, A] in [-1, 1], for any batch size B. A diffusion policy
has all its denoising steps in there, unrolled; its noise, standard normal, is an input of the shape that
:meth:`~qsm_lightning.policy.DiffusionPolicy.noise_shape` gives. Other policies are a function of the observation alone.
All numbers in it are float32, whatever the precision of the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qsm_lightning.errors import SettingError, first_line, require
from qsm_lightning.policy import DiffusionPolicy, Policy

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
OPSET = 18  # below the default of torch: more runtimes read it
BATCH_AXIS = {"observation": 0, "noise": 1}
METADATA = "metadata.json"  # in a .pt2 file
TOLERANCE = 1e-5
ROUNDING = 1e-6  # relative change of the weights that does more than rounding in float32

Inputs = dict[str, Tensor]


def check_installed(file_format: str) -> None:
    """Raise :class:`SettingError` when a package is missing that writes ``file_format``."""
    for package in ("onnx", "onnxscript") if file_format == "onnx" else ():
        require(
            importlib.util.find_spec(package) is not None,
            f"--format is onnx: {package} is not installed; pip install 'qsm-lightning[export]', or use torch-export",
        )


class Acting(nn.Module):
    """A float32 copy of a policy as a function of tensors: observation [B, O] and, if any, noise -> action [B, A]."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = deepcopy(policy).float().requires_grad_(False)

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.policy.act(*(value for value in (observation, noise) if value is not None))


def exported(policy: Policy, observation_dim: int, file_format: str, metadata: dict[str, str]) -> tuple[bytes, str]:
    """The content of a file that acts as ``policy`` does, and how that was checked.

    Args:
        policy: of float32 or float64 weights, on the CPU.
        observation_dim: O.
        file_format: ``onnx`` or ``torch-export``.
        metadata: kept in the file.

    Raises:
        SettingError: when the policy cannot be exported, or the file acts otherwise.
    """
    program = traced(policy, observation_dim)
    try:
        content = WRITERS[file_format](program, metadata)
        found = reader(file_format, content)
    except Exception as error:  # of many kinds
        raise SettingError(
            f"--format is {file_format}, which cannot be written and read here for {type(policy).__name__} "
            f"({first_line(error)}): try the other one, or other versions of torch and onnxruntime"
        ) from error
    if found is None:
        return content, "onnx.checker alone, as onnxruntime is not installed"
    runtime, act = found
    return content, f"{runtime}, largest difference from PyTorch {largest_difference(policy, observation_dim, act):.1e}"


def input_shapes(policy: Policy, observation_dim: int, batch: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what ``policy`` takes for ``batch`` observations, by name."""
    shapes: dict[str, tuple[int, ...]] = {"observation": (batch, observation_dim)}
    return shapes | ({"noise": policy.noise_shape(batch)} if isinstance(policy, DiffusionPolicy) else {})


def described_inputs(policy: Policy, observation_dim: int) -> dict[str, str]:
    """The same in words, by name."""
    described = {}
    for name, sizes in input_shapes(policy, observation_dim, 1).items():
        words = list(map(str, sizes))
        words[BATCH_AXIS[name]] = "batch"
        described[name] = f"[{', '.join(words)}]{' standard normal' if name == 'noise' else ''}"
    return described


def example_inputs(policy: Policy, observation_dim: int, batch: int) -> Inputs:
    """Standard normal inputs of ``policy`` for ``batch`` observations, by name."""
    return {name: torch.randn(shape) for name, shape in input_shapes(policy, observation_dim, batch).items()}


def traced(policy: Policy, observation_dim: int) -> ExportedProgram:
    """The policy as a graph of operations on tensors, its batch size open.

    Raises:
        SettingError: when torch cannot make one, or the policy draws noise of its own.
    """
    name, shapes = type(policy).__name__, input_shapes(policy, observation_dim, 2)
    inputs, batch = tuple(map(torch.zeros, shapes.values())), torch.export.Dim("batch")
    axes = {key: {BATCH_AXIS[key]: batch} for key in shapes}
    try:
        with quiet():
            program = torch.export.export(Acting(policy), inputs, dynamic_shapes=axes, strict=False)
    except Exception as error:  # of many kinds, and a policy of the user's own may raise any
        raise SettingError(
            f"{name} cannot be exported ({first_line(error)}): its act must be operations on tensors, for a batch of "
            "any size, which is x.shape[0] and not len(x)"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
        require(
            torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()),
            f"{name} cannot be exported: it draws noise inside ({node.target}); make it a DiffusionPolicy, which takes "
            "noise as an input",
        )
    return program


def onnx_file(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    """An ONNX model with inputs ``observation`` and ``noise``, output ``action``, and properties ``metadata``."""
    onnx = importlib.import_module("onnx")
    names = list(program.graph_signature.user_inputs)
    with quiet():
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=names, output_names=["action"], verbose=False
        )
    assert made is not None
    model = made.model_proto
    graph: Any = model.graph
    del graph.value_info[:]  # shapes in between, which a runtime finds itself
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]  # about the Python that it was made from
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = "batch"
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def torch_export_file(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    """What ``torch.export.load`` reads, with ``metadata`` as JSON in the extra file ``metadata.json``."""
    file = io.BytesIO()
    with quiet():
        torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
    return file.getvalue()


WRITERS = {"onnx": onnx_file, "torch-export": torch_export_file}


def reader(file_format: str, content: bytes) -> tuple[str, Callable[[Inputs], Tensor]] | None:
    """What runs a file, by name, and its function inputs -> action; None where it is not installed."""
    if file_format == "torch-export":
        with quiet():
            program = torch.export.load(io.BytesIO(content)).module()
        return f"torch {torch.__version__}", lambda inputs: program(*inputs.values())
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def act(inputs: Inputs) -> Tensor:
        return torch.from_numpy(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])

    return f"onnxruntime {onnxruntime.__version__}", act


@torch.no_grad()
def largest_difference(policy: Policy, observation_dim: int, act: Callable[[Inputs], Tensor]) -> float:
    """The largest difference of ``act``'s actions to the policy's in float64, on random inputs of several batch sizes.

    Raises:
        SettingError: when one differs by more than 1e-5 and more than rounding explains.
    """
    largest = 0.0
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for batch in (1, 2, 64):
            inputs = example_inputs(policy, observation_dim, batch)
            exact, rounding = exact_action(policy, inputs)
            difference = (act(inputs) - exact).abs()
            require(
                (difference <= rounding.clamp(min=TOLERANCE)).all(),
                f"the file would act otherwise than PyTorch (up to {difference.max().item():.1e}) and was not written: "
                "try another --format, or other versions of torch, onnxscript and onnxruntime",
            )
            largest = max(largest, difference.max().item())
    return largest


def exact_action(policy: Policy, inputs: Inputs, draws: int = 8) -> tuple[Tensor, Tensor]:
    """The action computed in float64 [B, A], and how far from it rounding in float32 may lead, [B, A].

    What is computed with rounding is what slightly other weights give without. Such weights are drawn at random: where
    a policy turns from one action to another they move it by more than 1e-5.
    """
    acting = Acting(policy).double()
    given = [value.double() for value in inputs.values()]
    exact, weights = acting(*given), [p.clone() for p in acting.parameters()]
    largest = torch.zeros_like(exact)
    for _ in range(draws):
        for p, weight in zip(acting.parameters(), weights, strict=True):
            p.copy_(weight * (1 + ROUNDING * torch.randn_like(weight)))
        largest = torch.maximum(largest, (acting(*given) - exact).abs())
    return exact, largest


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what torch and onnxscript say about optional packages and about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
