"""Text to ids, and ids back to text piece by piece."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer

from runtime.artifact.manifest import TOKENIZER, Artifact
from runtime.errors import ArtifactError, RequestError
from runtime.text.limits import check_growth, check_length, guarded

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(artifact: Artifact) -> Tokenizer | None:
    """The artifact's tokenizer, or None where it has none. Raises `ArtifactError` for one that is unfit for use.

    Truncation and padding, which a tokenizer.json keeps from its training, are left out: a prompt is read as it is.
    """
    text = artifact.texts.get(TOKENIZER)
    if text is None:
        return None

    def unfit(reason: object) -> ArtifactError:
        return ArtifactError(f"{artifact.path / TOKENIZER}: is no tokenizer: {reason}")

    tokenizer = guarded(lambda: Tokenizer.from_buffer(text), unfit)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        check_growth(tokenizer)
    except ValueError as error:
        raise unfit(error) from error
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer | None, artifact: Artifact) -> Tokenizer:
    """The tokenizer. Raises `RequestError` where the artifact has none."""
    if tokenizer is None:
        raise RequestError(f"{artifact.path}: has no {TOKENIZER}; give token ids instead (--ids, generate_ids)")
    return tokenizer


def check_same_tokens(tokenizer: Tokenizer | None, other: Tokenizer | None, name: str) -> None:
    """Raise `RequestError` where both exist and the other, that of the model `name`, gives a token another id."""
    if tokenizer is None or other is None:
        return
    known, found = tokenizer.get_vocab(), other.get_vocab()
    if known != found:
        token = min(token for token in known.keys() | found.keys() if known.get(token) != found.get(token))
        raise RequestError(
            f"{name}: the token {token[:60]!r} has id {found.get(token)}; expected {known.get(token)}, as in the other "
            "model's tokenizer: expected two models over one tokenizer"
        )


def encode(tokenizer: Tokenizer | None, prompt: str, artifact: Artifact, capacity: int | None = None) -> list[int]:
    """The prompt's ids, which are to fit `capacity` tokens, by default all that a slot of the artifact holds.

    Raises `RequestError` where the artifact has no tokenizer, or it cannot read the prompt.
    """
    known = check_tokenizer(tokenizer, artifact)
    if not isinstance(prompt, str):
        raise RequestError(f"the prompt is {type(prompt).__name__}; expected a text")
    check_length(known, prompt, artifact.graph.max_length if capacity is None else capacity)
    return guarded(
        lambda: known.encode(prompt).ids,
        lambda reason: RequestError(f"{artifact.path / TOKENIZER}: cannot read the prompt: {reason}"),
    )


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of ids, with that of special tokens where `special` is set.

    Raises `RequestError` where the tokenizer cannot write it.
    """
    return guarded(
        lambda: tokenizer.decode(ids, skip_special_tokens=not special),
        lambda reason: RequestError(f"{TOKENIZER}: cannot write the text: {reason}"),
    )


class TextStream:
    """Text of ids that arrive one by one; a character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._said = tokenizer, ""
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain with this id and was not before."""
        self._held.append(token)
        text = decode(self._tokenizer, self._held)
        if text.endswith(UNFINISHED):
            return ""
        new = text[len(self._said) :]
        # Keep one token of context: how a token is spelt can depend on the one before it.
        self._held = self._held[-1:]
        self._said = decode(self._tokenizer, self._held)
        return new

    def finish(self) -> str:
        """What is held back, when no more ids come."""
        text = decode(self._tokenizer, self._held) if self._held else ""
        return text[len(self._said) :]


class StopStrings:
    """Text before the first of `stops`, which may lie across pieces; what could begin one is held back.

    `found`: whether one was there. Raises `RequestError` for an empty stop.
    """

    def __init__(self, stops: Sequence[str]):
        if any(not stop for stop in stops):
            raise RequestError("a stop string is empty; expected at least one character")
        self.stops, self.found, self._held = stops, False, ""

    def push(self, text: str) -> str:
        """The text that is certain with this piece and was not before; none after a stop."""
        if not self.stops or self.found:
            return "" if self.found else text
        held = self._held + text
        starts = [at for at in (held.find(stop) for stop in self.stops) if at >= 0]
        if starts:
            self.found, self._held = True, ""
            return held[: min(starts)]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The pieces of text of a `TextStream` over `ids`."""
    stream = TextStream(tokenizer)
    for token in ids:
        if text := stream.push(token):
            yield text
    if text := stream.finish():
        yield text


def until(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """`texts` up to the first of `stops`."""
    found = StopStrings(stops)
    for text in texts:
        if new := found.push(text):
            yield new
        if found.found:
            return
    if text := found.finish():
        yield text
