"""Every array of tests/data/*.npz, inputs and outputs of the authors' JAX implementation in float64, reproduced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qsm_lightning.compiled import compiled
from qsm_lightning.losses import QSMLoss
from qsm_lightning.networks import Critics, Denoiser
from qsm_lightning.policy import add_action_noise
from qsm_lightning.sampler import reverse_process
from qsm_lightning.schedule import NoiseSchedule
from tests.helpers import needs_compiler

DATA = Path(__file__).parent / "data"
CASES = sorted(path.stem for path in DATA.glob("*.npz"))
DTYPES = [torch.float64, torch.float32]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@lru_cache
def reference(case: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{case}.npz") as arrays:
        return dict(arrays)


def weights(loss: QSMLoss) -> dict[str, Any]:
    """Our parameters under the names of the reference files (kernels there are [in, out])."""
    named: dict[str, Any] = {"denoiser/FourierFeatures_0/kernel": loss.denoiser.fourier.weight}
    for prefix, mlp in (
        ("denoiser/MLP_0", loss.denoiser.time_encoder),
        ("denoiser/MLP_1", loss.denoiser.trunk),
    ):
        for i, layer in enumerate(mlp.layers):
            named |= {f"{prefix}/Dense_{i}/kernel": layer.weight, f"{prefix}/Dense_{i}/bias": layer.bias}
    for prefix, critics in (("critic", loss.critics), ("target", loss.target_critics)):
        for k, critic in enumerate(critics.critics, 1):  # type: ignore[arg-type]
            *hidden, last = critic.layers
            for i, layer in enumerate(hidden):
                named |= {
                    f"{prefix}_{k}/MLP_0/Dense_{i}/kernel": layer.weight,
                    f"{prefix}_{k}/MLP_0/Dense_{i}/bias": layer.bias,
                }
            named |= {f"{prefix}_{k}/Dense_0/kernel": last.weight, f"{prefix}_{k}/Dense_0/bias": last.bias}
    return named


def is_dense_kernel(name: str) -> bool:
    return "Dense_" in name and name.endswith("kernel")


def as_reference(name: str, value: Tensor) -> np.ndarray:
    array = value.detach().numpy()
    return array.T if is_dense_kernel(name) else array


def rebuilt(case: str, dtype: torch.dtype) -> tuple[QSMLoss, dict[str, Tensor]]:
    """The loss with the reference file's weights, and the arrays of that file."""
    ref = reference(case)
    _, schedule_name, steps = case.split("_")
    x = {k: torch.from_numpy(v).to(dtype if v.dtype == np.float64 else None) for k, v in ref.items()}
    observation_dim, action_dim = x["batch/observation"].shape[1], x["batch/action"].shape[1]
    widths = [ref[f"denoiser/MLP_1/Dense_{i}/kernel"].shape[1] for i in range(2)]
    with default_dtype(dtype):
        loss = QSMLoss(
            Denoiser(observation_dim, action_dim, widths, time_dim=16),
            Critics(observation_dim, action_dim, widths),
            NoiseSchedule(schedule_name, int(steps[1:])),  # type: ignore[arg-type]
            gamma=float(ref["td/gamma"]),
            m_q=float(ref["score/m_q"]),
            temperature=0.5 if case.startswith("pendulum") else 1.0,
        )
    for name, parameter in weights(loss).items():
        parameter.data.copy_(x[name].T if is_dense_kernel(name) else x[name])
    return loss, x


@lru_cache
def reproduced(case: str, dtype: torch.dtype, fast: bool) -> dict[str, np.ndarray]:
    """Everything the reference file holds, computed by this package from its weights, batch and noise."""
    loss, x = rebuilt(case, dtype)
    calculate = partial(calculated, loss)
    if fast:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            found = compiled(calculate)(x)
    else:
        found = calculate(x)
    return {name: as_reference(name, value) for name, value in found.items()}


def calculated(loss: QSMLoss, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by their names in the reference file."""
    schedule = loss.schedule
    observation, action = x["batch/observation"], x["batch/action"]
    next_observation = x["batch/next_observation"]
    out = {k: getattr(schedule, k) for k in ("betas", "alphas", "alpha_hats")}
    out["denoiser_out"] = torch.stack(
        [loss.denoiser(observation, action, torch.tensor([t])) for t in range(schedule.T)]
    )
    trajectory = reverse_process(
        loss.denoiser, schedule, next_observation, x["sampler/x_T"], x["sampler/z"], loss.temperature
    )
    out["sampler/trajectory"], out["sampler/action"] = torch.stack(trajectory), trajectory[-1]
    out["td/next_action"] = add_action_noise(trajectory[-1], x["td/noise"], loss.action_noise)
    out["td/target"] = y = loss.td_target(
        x["batch/reward"], x["batch/terminated"], next_observation, out["td/next_action"]
    )
    out["critic_loss_1"], out["critic_loss_2"] = (loss.critics(observation, action) - y).square().mean(1)
    out["score/noisy_action"] = schedule.add_noise(action, x["score/t"], x["score/noise"])
    found = loss.score_matching(observation, action, x["score/t"], x["score/noise"])
    out["score/loss"], _, out["score/q_grad"], _ = found
    learned = {name: p for name, p in weights(loss).items() if not name.startswith("target") and p.requires_grad}
    of = {
        "denoiser": out["score/loss"],
        "critic_1": out["critic_loss_1"],
        "critic_2": out["critic_loss_2"],
    }
    for begin, value in of.items():
        names = [name for name in learned if name.startswith(begin)]
        gradients = torch.autograd.grad(value, [learned[name] for name in names], retain_graph=True)
        renamed = (n.replace("denoiser/", "denoiser_grad/").replace("critic_", "critic_grad_") for n in names)
        out |= dict(zip(renamed, gradients, strict=True))
    return {name: value.detach() for name, value in out.items()}


INPUTS: tuple[str, ...] = (
    "denoiser/",
    "critic_1/",
    "critic_2/",
    "target_",
    "batch/",
    "sampler/x_T",
    "sampler/z",
    "td/noise",
    "td/gamma",
)
INPUTS += ("score/t", "score/noise", "score/m_q")


def outputs(case: str) -> list[str]:
    return [k for k in reference(case) if k == "score/noisy_action" or not k.startswith(INPUTS)]


def ways() -> Iterator[Any]:
    """Every case in both precisions, plain and compiled; of those that compile for a minute one."""
    for case, dtype, fast in product(CASES, DTYPES, (False, True)):
        marks = [needs_compiler] if fast else []
        if fast and (case, dtype) != ("hopper_vp_T5", torch.float64):
            marks.append(pytest.mark.slow)
        for key in outputs(case):
            name = f"{case}-{key}-{dtype}{'-compiled' if fast else ''}"
            yield pytest.param(case, key, dtype, fast, marks=marks, id=name)


@pytest.mark.parametrize(("case", "key", "dtype", "fast"), ways())
def test_array_equals_the_authors(case: str, key: str, dtype: torch.dtype, fast: bool) -> None:
    expected, actual = reference(case)[key], reproduced(case, dtype, fast)[key]
    assert actual.shape == expected.shape
    if dtype is torch.float64:
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
    else:  # relative to the array's own size: single entries near zero carry the rounding of their neighbours
        assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_every_input_is_used(case: str) -> None:
    """What is not compared is an input; all weights among them were loaded."""
    loaded = set(weights(QSMLoss(Denoiser(1, 1, (2, 2)), Critics(1, 1, (2, 2)), NoiseSchedule())))
    inputs = set(reference(case)) - set(outputs(case))
    assert loaded <= inputs
    assert {k for k in inputs if k.startswith(("denoiser/", "critic_", "target_"))} == loaded
