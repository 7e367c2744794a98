"""Text to ids, and ids back to text piece by piece."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer

from runtime.artifact.manifest import Artifact
from runtime.errors import ArtifactError, RequestError

TOKENIZER = "tokenizer.json"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(artifact: Artifact) -> Tokenizer | None:
    """The artifact's tokenizer, or None where it has none."""
    text = artifact.texts.get(TOKENIZER)
    if text is None:
        return None
    try:
        return Tokenizer.from_buffer(text)
    except BaseException as error:  # the library raises nothing narrower, and its panics are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ArtifactError(f"{artifact.path / TOKENIZER}: is no tokenizer: {error}") from error


def encode(tokenizer: Tokenizer | None, prompt: str, artifact: Artifact) -> list[int]:
    """The prompt's ids. Raises `RequestError` where the artifact has no tokenizer."""
    if tokenizer is None:
        raise RequestError(f"{artifact.path}: has no {TOKENIZER}; give token ids instead (--ids, generate_ids)")
    return tokenizer.encode(prompt).ids


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as its ids arrive; a character whose bytes are not all there yet is held back."""
    held: list[int] = []
    said = ""
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith(UNFINISHED):
            continue
        if len(text) > len(said):
            yield text[len(said) :]
        # Keep one token of context: how a token is spelt can depend on the one before it.
        held = held[-1:]
        said = tokenizer.decode(held)
    text = tokenizer.decode(held) if held else ""
    if len(text) > len(said):
        yield text[len(said) :]


def until(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text before the first of `stops`; what could be a stop's beginning is held back until it is known."""
    if any(not stop for stop in stops):
        raise RequestError("a stop string is empty; expected at least one character")
    held = ""
    for text in texts:
        held += text
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held
