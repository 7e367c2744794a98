"""What a caller of a checkpoint is told."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not of this model; one line that names what is wrong, all of it."""
