"""Checkpoints: their formats, and how one is recognised and loaded."""
