"""What a graph's weights are: their shapes, how they are stored, and what each layer takes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

CODES, SCALES = ".codes", ".scales"  # of a quantised weight
LAYER = re.compile(r"(layers\.\d+)\.")
PARTS = (("attention", ".self_attn."), ("SSD", ".ssd."), ("MLP and experts", ".mlp."))
TABLES, REST = ("embedding and head", "norms, residuals and other")


@dataclass(frozen=True)
class StoredWeight:
    """A weight by its name in the graph. `numbers`: elements; `size`: bytes, with its scales; `dtype`: as stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numbers: int
    size: int

    @property
    def bits(self) -> float:
        """Bits a number, scales included."""
        return 8 * self.size / self.numbers

    @property
    def layer(self) -> str:
        """`layers.i`, or the module outside of the layers."""
        found = LAYER.match(self.name)
        return found[1] if found else self.name.rpartition(".")[0] or self.name

    @property
    def part(self) -> str:
        """What of the model it is."""
        for part, infix in PARTS:
            if infix in self.name:
                return part
        return TABLES if self.name.startswith(("lm_head.", "embed_tokens.", "head.")) else REST


def stored_weights(path: Path) -> list[StoredWeight]:
    """The float and quantised weights of the ONNX file at `path`, in its order; constants of shapes are left out."""
    initializers = ir.load(path).graph.initializers
    found = []
    for name, value in initializers.items():
        tensor = value.const_value
        if tensor is None or name.endswith(SCALES):
            continue
        quantized = name.endswith(CODES)
        if not (quantized or tensor.dtype.is_floating_point()):
            continue
        scales = initializers[name.removesuffix(CODES) + SCALES].const_value if quantized else None
        found.append(
            StoredWeight(
                name.removesuffix(CODES),
                tuple(tensor.shape.numpy()),
                tensor.dtype.name.lower(),
                tensor.size,
                tensor.nbytes + (scales.nbytes if scales is not None else 0),
            )
        )
    return found


def totals(weights: Sequence[StoredWeight], by: str) -> dict[str, tuple[int, int]]:
    """Numbers and bytes by a property of the weights, `layer` or `part`, in the order of their first weight."""
    found: dict[str, tuple[int, int]] = {}
    for weight in weights:
        numbers, size = found.get(key := getattr(weight, by), (0, 0))
        found[key] = numbers + weight.numbers, size + weight.size
    return found
