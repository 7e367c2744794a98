"""Cache rows of prompts, kept so that a prompt that begins alike need not be computed again.

A block has the rows of one whole piece of a prompt. It is found by the ids of that piece and of all before it. A prompt
is always cut into pieces of the same size from its beginning, so the rows of a block are, to the bit, those that the
prompt's own prefill would write. What follows the last whole piece is computed again.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

Rows = list[np.ndarray]  # of each state, what `Session.read_rows` returns


class PrefixCache:
    """Blocks of `piece` tokens, at most `memory` bytes of them: the one unused for longest goes first."""

    def __init__(self, piece: int, memory: int):
        self.piece, self.memory, self.used = piece, memory, 0
        self._blocks: OrderedDict[bytes, Rows] = OrderedDict()

    def find(self, ids: Sequence[int]) -> list[Rows]:
        """The blocks with which `ids` begin, in order. They end before the last id, whose logits are wanted."""
        keys = []
        for key in self._keys(ids[: len(ids) - 1]):
            if key not in self._blocks:
                break
            keys.append(key)
        for key in reversed(keys):  # the first is needed by most prompts, so it is the last to go
            self._blocks.move_to_end(key)
        return [self._blocks[key] for key in keys]

    def wants(self, ids: Sequence[int]) -> bytes | None:
        """The key of the block that ends where `ids` do, if it ends there and is not kept yet."""
        if not self.memory or len(ids) % self.piece:
            return None
        *_, key = self._keys(ids)
        return None if key in self._blocks else key

    def keep(self, key: bytes, rows: Rows) -> None:
        """Keep a block, in place of older ones where memory is short."""
        size = _bytes(rows)
        if size > self.memory:
            return
        while self.used + size > self.memory:
            _, old = self._blocks.popitem(last=False)
            self.used -= _bytes(old)
        self._blocks[key] = rows
        self.used += size

    def _keys(self, ids: Sequence[int]) -> Iterator[bytes]:
        key = b""
        for start in range(0, len(ids) - self.piece + 1, self.piece):
            piece = np.asarray(ids[start : start + self.piece], np.int64)
            key = blake2b(key + piece.tobytes(), digest_size=32).digest()
            yield key


def _bytes(rows: Rows) -> int:
    return sum(part.nbytes for part in rows)
