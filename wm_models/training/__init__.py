"""From a folder of text to a checkpoint: data, tokenizer, rows, trainer, report."""

from .recipe import Recipe, TrainingError
from .run import train

__all__ = ["Recipe", "TrainingError", "train"]
