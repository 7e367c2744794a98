"""How a dataclass declares that its fields are command-line options too. `runtime.console` makes commands of them."""

from dataclasses import field
from typing import TypeVar

T = TypeVar("T")


def option(default: T, help: str, *, flag: str | None = None) -> T:
    """A dataclass field that is a command-line option too: its default and its help stand here alone.

    `flag` names the option where it is not the field's own name. A list is copied for each instance.
    """
    metadata = {"help": help, "flag": flag}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)  # type: ignore[return-value]
    return field(default=default, metadata=metadata)
