from .loader import CheckpointError, find_checkpoint

__all__ = ["CheckpointError", "find_checkpoint"]
