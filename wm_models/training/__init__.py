"""From a folder of text to a checkpoint: data, tokenizer, rows, trainer, report."""

from wm_models.training.recipe import Recipe, TrainingError
from wm_models.training.run import train

__all__ = ["Recipe", "TrainingError", "train"]
