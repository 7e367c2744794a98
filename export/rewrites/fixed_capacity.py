"""Fix the number of rows of every cache, for a compiler that needs it static.

C cache capacity.
"""

from collections.abc import Iterable

import onnx_ir as ir


def fix_capacity(graph: ir.Graph, capacity: int, caches: Iterable[str]) -> None:
    """Give the inputs named `caches`, and their outputs `NAME.out`, C = `capacity` rows (dimension 2).

    The shapes inside the graph may name the dynamic capacity, so they are removed; the parser infers them again.
    """
    caches = set(caches)
    for value in [*graph.inputs, *graph.outputs]:
        if (value.name or "").removesuffix(".out") in caches:
            assert value.shape is not None
            value.shape = ir.Shape([dim if index != 2 else capacity for index, dim in enumerate(value.shape)])
    outputs = {id(value) for value in graph.outputs}
    for node in graph:
        for value in node.outputs:
            if id(value) not in outputs:
                value.shape = None
