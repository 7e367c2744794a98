"""What a layer is handed with its input: the protocol of a context, and of the cache that a layer keeps.

B batch, S new tokens, H query heads, K key/value heads, d head size, Hm rows of the bias.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch


class LayerCache(Protocol):
    """One layer's static cache: a NamedTuple of tensors whose first dimension is the slot."""

    def _asdict(self) -> dict[str, torch.Tensor]: ...

    def __iter__(self) -> Iterator[torch.Tensor]: ...


State = TypeVar("State", bound=LayerCache)


class Advance(Protocol[State]):
    """How a recurrent layer goes over the new tokens."""

    def __call__(
        self, state: State | None, real: torch.Tensor | None, first: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        """The layer's output and its next state, from the state before; None stands for a state of zeros.

        `real`, bool (B, 1, S), says which tokens are no padding; None says all. Padding must not change the state.
        `first`, bool (B, 1, S), says which tokens begin a sequence: nothing before such a token may reach it.
        """
        ...


class Context(Protocol):
    """What one run of the model knows and its layers do not: positions, caches, and which keys are visible."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, heads, S, d) turned to the positions of the new tokens."""
        ...

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Store this layer's new keys, and attend to all that are stored.

        query (B, H, S, d); key and value (B, K, S, d); bias (B, Hm, S), added to the products of query and key after
        these are multiplied by `scale`. Returns (B, H, S, d).
        """
        ...

    def carry(self, layer: int, kind: Callable[..., State], advance: Advance[State]) -> torch.Tensor:
        """Read this layer's state, advance it over the new tokens, and store the next one. Returns the output.

        `kind` is the NamedTuple of the state's tensors, the one that the layer's `new_cache` gives.
        """
        ...
