"""What the forms of layers need to know of the graph that they are lowered into."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FormOptions:
    """`evicts`: whether the runtime takes rows out of the caches, for a key head as a whole."""

    evicts: bool = False
