"""Replace DequantizeLinear and what reads it by ONNX Runtime's own operators for a CPU, over the same stored codes.

N rows (output features), K columns (input features).
"""

import numpy as np
import onnx_ir as ir

from export.rewrites.initializer import add_initializer

BITS = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}


def use_cpu_quantized_operators(model: ir.Model) -> ir.Model:
    """The saved graph with MatMulNBits, and with look-ups that widen the rows they need; both read the weights' file.

    MatMulNBits reads unsigned codes, 2^(bits-1) larger than the signed ones: the same bytes with each code's highest
    bit flipped. ONNX Runtime computes that flip once, when it loads the graph, and packs the codes in its own order.
    Look-ups read the signed codes in the mapped file, of which memory then holds only the rows that were looked up.
    """
    graph = model.graph
    flips: dict[int, ir.Value] = {}
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        codes = node.inputs[0]
        assert codes is not None
        if codes.const_value is None:  # of a cache
            continue
        bits = BITS[_stored(codes).dtype]
        if bits not in flips:
            mask = np.array(0x80 if bits == 8 else 0x88, np.uint8)
            flips[bits] = add_initializer(graph, ir.tensor(mask, name=f"highest.bit.{bits}"))
        users = [user for user, _ in node.outputs[0].uses()]
        for look_up in [user for user in users if user.op_type == "Gather"]:
            _fuse_look_up(graph, node, look_up, bits)
        if turned := [user for user in users if user.op_type == "Transpose"]:
            block = node.attributes["block_size"].as_int()
            signed = add_initializer(graph, _as_bytes(_stored(codes), bits, block))
            unsigned = ir.node("BitwiseXor", [signed, flips[bits]])
            graph.insert_before(node, unsigned)
            for transpose in turned:
                _fuse_products(graph, node, unsigned.outputs[0], transpose)
        graph.remove(node, safe=True)
        if not codes.uses():
            del graph.initializers[codes.name or ""]
    model.opset_imports["com.microsoft"] = 1
    return model


def _as_bytes(stored: ir.TensorProtocol, bits: int, block: int) -> ir.TensorProtocol:
    """The codes (N, K) as bytes (N, K / block, block · bits / 8): of the weights' file, or of a small tensor's own."""
    rows, columns = stored.shape.numpy()
    if not isinstance(stored, ir.ExternalTensor):  # too small for the file, so it lies in the graph
        data = np.frombuffer(stored.tobytes(), np.uint8).reshape(rows, columns // block, -1)
        return ir.tensor(data, name=f"{stored.name}.bytes")
    return ir.ExternalTensor(
        stored.location, stored.offset, stored.length, ir.DataType.UINT8,
        shape=ir.Shape((rows, columns // block, block * bits // 8)), name=f"{stored.name}.bytes",
        base_dir=stored.base_dir,
    )  # fmt: skip


def _fuse_look_up(graph: ir.Graph, node: ir.Node, gather: ir.Node, bits: int) -> None:
    """In the place of a DequantizeLinear and a Gather of its rows, widen those rows alone.

    Four bits: one GatherBlockQuantized. ONNX Runtime has none for signed bytes, so their codes and scales are gathered,
    then multiplied.
    """
    codes, scales = node.inputs
    ids = gather.inputs[1]
    if bits == 4:
        attributes = {**_blocks(node), "gather_axis": 0, "quantize_axis": 1}
        parts = [_fused("GatherBlockQuantized", [codes, ids, scales], gather, attributes)]
    else:
        rows = [ir.node("Gather", [each, ids]) for each in (codes, scales)]
        attributes = {"axis": -1, "block_size": node.attributes["block_size"].as_int()}
        parts = [*rows, _fused("DequantizeLinear", [row.outputs[0] for row in rows], gather, attributes, domain="")]
    graph.insert_before(gather, parts)
    graph.remove(gather, safe=True)


def _fuse_products(graph: ir.Graph, node: ir.Node, unsigned: ir.Value, transpose: ir.Node) -> None:
    """Put a MatMulNBits in the place of each MatMul with a transposed DequantizeLinear."""
    codes, scales = node.inputs
    assert codes is not None
    rows, columns = _stored(codes).shape.numpy()
    attributes = {**_blocks(node), "K": columns, "N": rows, "accuracy_level": 4}
    for product, _ in list(transpose.outputs[0].uses()):
        fused = _fused("MatMulNBits", [product.inputs[0], unsigned, scales], product, attributes)
        graph.insert_before(product, fused)
        graph.remove(product, safe=True)
    graph.remove(transpose, safe=True)


def _stored(codes: ir.Value) -> ir.TensorProtocol:
    assert codes.const_value is not None
    return codes.const_value


def _blocks(node: ir.Node) -> dict[str, int]:
    """The attributes that both operators share."""
    assert node.inputs[0] is not None
    return {"bits": BITS[_stored(node.inputs[0]).dtype], "block_size": node.attributes["block_size"].as_int()}


def _fused(
    kind: str, inputs: list[ir.Value | None], old: ir.Node, attributes: dict[str, int], domain: str = "com.microsoft"
) -> ir.Node:
    """A node in place of `old`, by default of ONNX Runtime's own, with its output's name, shape and type."""
    result = ir.Value(name=old.outputs[0].name, shape=old.outputs[0].shape, type=old.outputs[0].type)
    ir.convenience.replace_all_uses_with(old.outputs[0], result, replace_graph_outputs=True)
    return ir.node(kind, inputs, attributes, domain=domain, outputs=[result])
