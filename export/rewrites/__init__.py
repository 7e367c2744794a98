"""Compiler passes: each file rewrites an ONNX graph into one that computes the same."""
