"""What the forms of layers need to know of the graph that they are lowered into."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FormOptions:
    """`evicts`: whether the runtime takes rows out of the caches, for a key head as a whole. `selects`: whether keys
    are left out by their biases, by the runtime or in the graph."""

    evicts: bool = False
    selects: bool = False
