"""How an export or a verification says how far it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.verification.comparison import Comparison


class Progress:
    """Is told of each stage, of the work done in it, and of each comparison. This one shows nothing.

    Subclass it and override what is to be shown.
    """

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins, and the one before ends. `total`: how much `advance` will count up to, where known."""

    def advance(self, count: int = 1) -> None:
        """So much more of the stage's total is done."""

    def report(self, comparison: Comparison) -> None:
        """A comparison with the eager model was made."""


SILENT = Progress()
