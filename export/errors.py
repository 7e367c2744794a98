"""What stops an export."""


class ExportError(ValueError):
    """A request that cannot be exported; the message is one line that says what to change."""


class VerificationError(Exception):
    """The exported graph disagrees with the eager model; the message names the worst case."""
