"""Compiler passes over the lowered graph, one a file. Each changes an `onnx_ir` graph in place."""
