"""What a caller can be told. Every message is one line: what, where, what was expected, what to do."""


class ArtifactError(ValueError):
    """The artifact directory is missing, damaged, unverified or made for another version."""


class SignatureError(ArtifactError):
    """The artifact is not signed, not by the expected key, or was changed after it was signed."""


class RequestError(ValueError):
    """The artifact is sound, but it cannot do what was asked."""
