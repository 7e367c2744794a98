"""Nodes and values of a lowered graph are named after the modules that they come from."""

import re

import onnx_ir as ir
import pytest

from export.rewrites.names import MODULE
from export.source import Source


@pytest.fixture(scope="module", params=["dense", "experts", "hybrid"])
def graph(request, exported):
    checkpoint, artifact, _ = exported(request.param)
    modules = {name for name, _ in Source(str(checkpoint)).load_model().named_modules()}
    return ir.load(artifact / "model.onnx").graph, modules


def nodes(graph):
    return list(ir.traversal.RecursiveGraphIterator(graph))


def test_a_node_is_called_by_its_module_and_its_operator(graph):
    graph, modules = graph
    named = [node for node in nodes(graph) if MODULE in node.metadata_props]
    assert len(named) > 0.8 * len(nodes(graph))
    for node in named:
        module = node.metadata_props[MODULE]
        assert any(module.startswith(known) for known in modules if known)  # a form may have modules of its own
        assert (node.name or "").startswith(module.removeprefix("model").removeprefix("."))
    attention = next(node for node in graph if node.op_type == "Attention")
    assert re.fullmatch(r"layers\.\d+\.self_attn\.attention", attention.name or "")


def test_nothing_has_a_name_of_the_exporters(graph):
    graph, _ = graph
    names = [value.name for node in nodes(graph) for value in node.outputs]
    names += [node.name for node in nodes(graph)] + list(graph.initializers)
    names = [name or "" for name in names]
    assert not [name for name in names if re.search(r"node_|val_\d|_symbolic|_empty_nn_module|model\.model", name)]
    for node in nodes(graph):
        assert set(node.metadata_props) <= {MODULE}


def test_names_are_unique_and_parameters_keep_theirs(graph):
    graph, _ = graph
    values = [value.name for node in nodes(graph) for value in node.outputs] + list(graph.initializers)
    assert len(values) == len(set(values))
    found = [node.name for node in nodes(graph)]
    assert len(found) == len(set(found))
    assert "layers.0.input_layernorm.weight" in graph.initializers
