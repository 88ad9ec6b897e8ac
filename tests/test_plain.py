"""State of Python and NumPy as a checkpoint holds it: written, loaded with ``weights_only=True``, as it was."""

from __future__ import annotations

import enum
import io
import random
from collections import OrderedDict, deque, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsm_lightning.plain import NotPlainError, decode, encode, generators_state, load_generators_state

Pair = namedtuple("Pair", "a b")


class Colour(enum.IntEnum):
    RED = 1


class Metres(float):
    pass


class Name(str):
    __slots__ = ()


class Trail(list):
    pass


def through_file(value: Any) -> Any:
    """What comes back from a file that is opened as checkpoints are."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(one: Any, two: Any) -> bool:
    """Equal in type, dtype, shape and bits, all the way down."""
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    if isinstance(one, np.generic):
        return one.dtype == two.dtype and one.tobytes() == two.tobytes()
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(*pair) for pair in zip(one.values(), two.values(), strict=True))
    if isinstance(one, (list, tuple, deque)):
        ends = getattr(one, "maxlen", None) == getattr(two, "maxlen", None)
        return ends and len(one) == len(two) and all(same(*pair) for pair in zip(one, two, strict=True))
    return one == two or (one != one and two != two)


DTYPES = [*"?bBhHiIlLefdFD"]
VALUES: dict[str, Any] = {
    "nothing": None,
    "truth": True,
    "number": -3,
    "128 bits": 2**127 + 1,
    "float": 0.1,
    "infinity": -float("inf"),
    "not a number": float("nan"),
    "negative zero": -0.0,
    "text": "Grüße\n",
    "bytes": b"\x00\xff",
    "tensor": torch.arange(6.0).reshape(2, 3),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "empty list": [],
    "empty tuple": (),
    "empty dict": {},
    "empty array": np.zeros((0, 3), np.float32),
    "zero-dimensional array": np.array(2.5),
    "strided array": np.arange(12).reshape(3, 4)[::-1, ::2],
    "column-major array": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "read-only array": np.broadcast_to(np.float64(3), (2, 2)),
    "deque": deque([1, 2.0, "three"]),
    "bounded deque": deque([1, 2, 3], maxlen=3),
    "deque with room": deque([1], maxlen=5),
    "deque without room": deque([], maxlen=0),
    "tuple in tuple": ((1, (2,)), ()),
    "tuple that looks encoded": ("dict", [(1, 2)]),
    "list that looks encoded": ["tensor", "array"],
    "keys of many kinds": {1: "a", "1": "b", (1, 2): "c", None: "d", np.int64(7): "e", 2.5: "f", False: "g"},
    "order of keys": {"z": 1, "a": 2, "m": 3},
    "nested": {"a": [(1, np.float32(0.5)), deque([np.zeros(2, np.int8), {"x": None}], maxlen=2)], "b": {"c": [[]]}},
    **{f"array of {d}": np.array([0, 1, 1]).astype(d) for d in DTYPES},
    **{f"scalar of {d}": np.array(1).astype(d)[()] for d in DTYPES},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_as_it_was(name: str) -> None:
    value = VALUES[name]
    assert same(decode(through_file(encode(value))), value)


def test_what_comes_back_is_a_copy() -> None:
    """The environment goes on writing into its arrays while a checkpoint is held."""
    array, tensor = np.zeros(2), torch.zeros(2)
    state = encode([array, tensor])
    array += 1
    tensor += 1
    first = decode(state)
    first[0] += 5
    first[1] += 5
    second = decode(state)
    assert same(second, [np.zeros(2), torch.zeros(2)])


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        1 + 2j,
        range(3),
        bytearray(b"x"),
        lambda: None,
        int,
        random.Random(0),
        torch.Generator(),
        Path("x"),
        np.array([object()]),
        np.array(["text"]),
        np.str_("text"),
        np.datetime64("2020-01-01"),
        np.zeros(1, [("a", np.int32)]),
        Pair(1, 2),
        Trail([1]),
        [1, {"deep": ({"deeper": object()},)}],
        {object(): 1},
        deque([object()]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_known_is_refused(value: Any) -> None:
    with pytest.raises(NotPlainError):
        encode(value)


@pytest.mark.parametrize(
    "value",
    [
        *(Colour.RED, Metres(2), Name("x"), OrderedDict(a=1)),
        *(np.longdouble(1), np.zeros(2, np.longdouble), np.zeros(2, np.ulonglong), np.zeros(2, ">f8")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_like_a_known_kind_comes_back_as_it_was_or_is_refused(value: Any) -> None:
    try:
        state = encode(value)
    except NotPlainError:
        return
    assert same(decode(through_file(state)), value)


def test_the_name_of_what_is_refused_is_its_type() -> None:
    with pytest.raises(NotPlainError, match="^Path|PosixPath$"):
        encode({"a": Path("x")})


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_a_generator_goes_on_in_the_one_that_is_there(kind: str) -> None:
    generator = np.random.Generator(getattr(np.random, kind)(3))
    generator.normal(size=5)
    generator.integers(10, dtype=np.int32)  # leaves half of a 64-bit draw behind
    state = through_file(encode(generator))
    expected = (generator.normal(size=3), generator.integers(1000, size=3, dtype=np.int32))
    other = np.random.Generator(getattr(np.random, kind)(99))
    assert decode(state, other) is other
    drawn = (other.normal(size=3), other.integers(1000, size=3, dtype=np.int32))
    assert same(drawn, expected)


def test_a_legacy_generator_goes_on_in_the_one_that_is_there() -> None:
    generator = np.random.RandomState(3)
    generator.normal()  # keeps the second of a pair
    state = through_file(encode(generator))
    expected = generator.normal(size=3)
    other = np.random.RandomState(99)
    assert decode(state, other) is other
    assert same(other.normal(size=3), expected)


def test_generators_in_containers_go_on_as_well() -> None:
    def generators(seed: int) -> dict[str, Any]:
        wind, rain = np.random.default_rng(seed), np.random.RandomState(seed)
        return {"wind": wind, "several": [wind, (rain,)]}

    def draws(of: dict[str, Any]) -> list[float]:
        return [of["wind"].normal(), of["several"][1][0].normal()]

    here, there = generators(1), generators(2)
    draws(here)
    state = through_file(encode(here))
    expected = draws(here)
    assert draws(decode(state, there)) == expected


def test_a_kind_of_a_later_version_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown kind 'set'"):
        decode(("set", [1]))


def test_global_generators_go_on_exactly() -> None:
    def draws() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.normal(),
            np.random.randint(1 << 30),
            torch.randn(3),
            torch.randint(1 << 30, (3,)),
        ]

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    draws()  # an odd number of normal draws: each generator keeps a second one
    state = through_file(generators_state())
    expected = draws()
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    draws()
    for _ in range(2):  # loading does not use the state up
        load_generators_state(state)
        assert same(draws(), expected)


def test_taking_the_state_draws_nothing() -> None:
    before = generators_state()
    again = generators_state()
    assert before["python"] == again["python"]
    assert same(decode(before["numpy"]), decode(again["numpy"]))
    assert torch.equal(before["torch"], again["torch"])
    assert len(before["cuda"]) == torch.cuda.device_count()


def test_the_state_of_another_number_of_gpus_leaves_theirs_alone() -> None:
    state = generators_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    before = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    load_generators_state(state)
    after = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    assert same(before, after)
