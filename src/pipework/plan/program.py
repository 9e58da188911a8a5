"""What one rank executes: a schedule's actions with its ends of all transfers between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pipework.plan.action import Action
from pipework.plan.rules import Transfer


@final
@dataclass(frozen=True, slots=True)
class Receive:
    """Be ready for what another rank sends; the action that needs it comes later in the program.

    >>> print(Receive(Transfer(Action.parse("2F0"), to=3)))
    receive 2F0>3
    """

    transfer: Transfer

    def __str__(self) -> str:
        return f"receive {self.transfer}"


@final
@dataclass(frozen=True, slots=True)
class Compute:
    """Do this action; all that it needs has been computed here or received."""

    action: Action

    def __str__(self) -> str:
        return str(self.action)


@final
@dataclass(frozen=True, slots=True)
class Send:
    """Send what an action, computed earlier in the program, made for a stage on another rank."""

    transfer: Transfer

    def __str__(self) -> str:
        return f"send {self.transfer}"


Instruction = Receive | Compute | Send


@final
@dataclass(frozen=True, slots=True)
class Program:
    """One rank's instructions in order. Values that stay on the rank need none."""

    rank: int
    instructions: tuple[Instruction, ...]
