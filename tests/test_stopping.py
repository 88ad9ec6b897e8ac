"""Signals and faults of one process alone; of several, see test_ranks.py."""

from __future__ import annotations

import signal

import pytest

from qsm_lightning.distributed import Ranks
from qsm_lightning.errors import EnvironmentFault, Interrupted
from qsm_lightning.stopping import Stopping


def test_nothing_happens_until_something_is_asked_for() -> None:
    stopping = Stopping(Ranks())
    stopping.check()
    stopping.leave()
    assert stopping.together(lambda: 7) == 7
    assert not stopping.save_agreed
    stopping.save_wanted = True
    stopping.check()
    assert stopping.save_agreed
    stopping.saved()
    stopping.check()
    assert not stopping.save_agreed


def test_a_signal_stops_at_the_next_check_and_within_what_is_done_together() -> None:
    stopping = Stopping(Ranks())
    stopping.signal = signal.SIGTERM
    with pytest.raises(Interrupted) as stop:
        stopping.check()
    assert stop.value.signum == signal.SIGTERM
    assert stopping.together(lambda: 7) == 7, "what is done is kept"
    with pytest.raises(Interrupted) as stop:
        stopping.together(stopping.leave)
    assert not stop.value.at_once


def test_a_second_ctrl_c_is_not_agreed_on() -> None:
    """Otherwise it would end with a checkpoint, from the middle of things."""
    stopping = Stopping(Ranks())
    stopping.signal = signal.SIGINT

    def interrupted() -> None:
        raise Interrupted(signal.SIGINT, at_once=True)

    with pytest.raises(Interrupted) as stop:
        stopping.together(interrupted)
    assert stop.value.at_once


def test_a_fault_is_marked_as_everybodys() -> None:
    def fails() -> None:
        raise EnvironmentFault("the robot fell over")

    with pytest.raises(EnvironmentFault, match="^the robot fell over$") as error:
        Stopping(Ranks()).together(fails)
    assert error.value.agreed
    assert not EnvironmentFault().agreed
