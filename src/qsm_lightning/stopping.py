"""Signals and faults, which all ranks act on at the same point: none may go on while another stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qsm_lightning.distributed import Ranks
from qsm_lightning.errors import EnvironmentFault, Interrupted, TrainingFault
from qsm_lightning.watch import beat

T = TypeVar("T")
AGREE_EVERY = 16  # updates of a batch after which ranks agree again


class Stopping:
    """What this process was asked to do, and what all ranks agreed on.

    Handlers of signals set ``signal`` and ``save_wanted`` at any time; :meth:`agree`, :meth:`together` and
    :meth:`check` are for places that all ranks come to in the same order. Alone, a process agrees at once.

    Attributes:
        signal: the signal that asked this process to stop.
        save_wanted: whether this process was asked to save.
        save_agreed: whether all ranks save after the batch under way.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.signal: int | None = None
        self.save_wanted = False
        self.save_agreed = False
        self._agreed = 0
        self._checks = 0

    def agree(self, stop: TrainingFault | Interrupted | None = None) -> None:
        """Exchange whether any rank was asked to stop or to save.

        Args:
            stop: what keeps this rank from going on.

        Raises:
            TrainingFault: when any rank has one to give.
            Interrupted: when any rank left what all have to do, because of a signal.
        """
        severity = 0 if stop is None else 1 if isinstance(stop, Interrupted) else 2
        self._agreed, save, worst = self.ranks.highest(self.signal or 0, self.save_wanted, severity)
        self.save_agreed = bool(save)
        if worst == 1:
            raise self._interrupted()
        if worst == 2:
            raise self._fault(severity, stop) from stop

    def _interrupted(self) -> Interrupted:
        stop = Interrupted(self._agreed)
        stop.agreed = True
        return stop

    def _fault(self, severity: int, mine: TrainingFault | Interrupted | None) -> TrainingFault:
        """The fault of the first rank that has one."""
        said = self.ranks.gather((severity, isinstance(mine, EnvironmentFault), str(mine)))
        rank = next(rank for rank, (how, _, _) in enumerate(said) if how == 2)
        _, of_env, why = said[rank]
        fault = (EnvironmentFault if of_env else TrainingFault)(f"rank {rank}: {why}" if len(said) > 1 else why)
        fault.agreed = True
        return fault

    def together(self, act: Callable[[], T]) -> T:
        """``act``, after which all ranks go on or none does."""
        try:
            done = act()
        except (TrainingFault, Interrupted) as stop:
            if not getattr(stop, "at_once", False):
                self.agree(stop)
            raise
        self.agree()
        return done

    def check(self) -> None:
        """Where training may be left at once and gone on with later, raise :class:`Interrupted` if that was agreed on.

        Ranks agree again every so many calls, which is once in so many updates.
        """
        beat()
        self._checks += 1
        if self.ranks.count == 1 or self._checks % AGREE_EVERY == 0:
            self.agree()
        if self._agreed:
            raise self._interrupted()

    def leave(self) -> None:
        """Raise :class:`Interrupted` if a signal came to this process; for within what :meth:`together` does."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    def saved(self) -> None:
        """What was asked for is done."""
        self.save_wanted = self.save_agreed = False
