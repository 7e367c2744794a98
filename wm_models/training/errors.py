"""What stops a training run."""


class TrainingError(ValueError):
    """A run that cannot begin or go on; the message is one line that says what to change."""
