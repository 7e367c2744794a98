"""What a tokenizer may do with a text: bounds on its length before it is read, and on how much it can grow.

A tokenizer.json is a program of others. Its steps are patterns and what they put in place, and enough of them make
gigabytes of one line.
"""

import base64
import binascii
import json
import struct
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, TypeVar

from tokenizers import Tokenizer

from runtime.errors import RequestError
from runtime.host.memory import available_memory

T = TypeVar("T")

TOKEN_BYTES = 256  # a token's spelling is hardly ever longer, so a text of more for each token of the capacity is none
ENCODING_BYTES = 200  # memory that the tokenizer takes for a byte of text
LONGEST_ADDED = 1024  # characters that a step may put before a text, or special tokens around it
# How many times as many bytes a text may have after each part of a tokenizer, at most. Those of known models: a
# normalizer of many steps 2178, a pre-tokenizer 8, a template 1, a decoder 3.
MOST_GROWTH = {"normalizer": 1 << 12, "pre_tokenizer": 16, "post_processor": 2, "decoder": 64}
CHILDREN = ("normalizers", "pretokenizers", "processors", "decoders")
# Of a step's kind, how many times as many bytes its output can have. Unicode's forms grow a text once and then no more.
ONCE = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 1.5, "BertNormalizer": 8}
ALWAYS = {"ByteLevel": 2, "Metaspace": 4, "WordPiece": 2, "CTC": 2}


def check_growth(tokenizer: Tokenizer) -> None:
    """Raise ValueError where a part of the tokenizer could make too much of a text."""
    for part, most in MOST_GROWTH.items():
        if _part_growth(tokenizer, part) > most:
            raise ValueError(f"its {part} can make more than {most} bytes of one")


def check_length(tokenizer: Tokenizer, text: str, capacity: int) -> None:
    """Raise `RequestError` for a text that cannot fit `capacity` tokens, or memory, before anything reads it."""
    size, most = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")), capacity * TOKEN_BYTES
    if size > most:
        raise RequestError(
            f"the prompt has {size:,} bytes; this artifact's capacity is {capacity} tokens, which takes texts of up to "
            f"{most:,} bytes; give a shorter one"
        )
    available, need = available_memory(), size * ENCODING_BYTES
    if available is None or need * MOST_GROWTH["normalizer"] * MOST_GROWTH["pre_tokenizer"] <= available:
        return
    need *= _part_growth(tokenizer, "normalizer") * _part_growth(tokenizer, "pre_tokenizer")
    if need > available:
        raise RequestError(
            f"reading a prompt of {size:,} bytes can take {need / 1e9:.2f} GB, and {available / 1e9:.2f} GB of memory "
            "are available; give a shorter one"
        )


def guarded(call: Callable[[], T], refuse: Callable[[str], Exception]) -> T:
    """What `call` into the tokenizer's library returns; what it raises is turned into the exception of `refuse`.

    The library's panics are no `Exception`, and it raises nothing narrower than that itself.
    """
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refuse(" ".join(str(error).split())[:200]) from None


def _part_growth(tokenizer: Tokenizer, part: str) -> float:
    """How many times as many bytes a part of the tokenizer can make of a text."""
    found = getattr(tokenizer, part)
    if found is None:
        return 1
    seen: set[str] = set()
    return prod(_growth(step, part, seen) for step in _steps(json.loads(found.__getstate__())))


def _steps(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of a part, in order: itself, or those of the sequence that it is."""
    children = [child for name in CHILDREN for child in state.get(name, ())]
    if not children:
        yield state
    for child in children:
        yield from _steps(child)


def _growth(step: dict[str, Any], part: str, seen: set[str]) -> float:
    """How many times as many bytes a step's output can have, at most; 1 for one of `seen` that grows a text once."""
    kind = step["type"]
    if kind in ONCE:
        first = not seen & {kind}
        seen.add(kind)
        return ONCE[kind] if first else 1
    if kind == "Replace":
        return _replacement(step)
    if kind == "Prepend":
        return 1 if len(step["prepend"]) <= LONGEST_ADDED else float("inf")
    if kind == "Precompiled":
        return _longest_replacement(step["precompiled_charsmap"])
    if kind == "TemplateProcessing":
        texts = sum("Sequence" in piece for piece in step["single"])
        added = sum(len(token["ids"]) for token in step["special_tokens"].values())
        return max(1, texts) if max(added, len(step["single"])) <= LONGEST_ADDED else float("inf")
    if kind == "ByteLevel" and part in ("post_processor", "decoder"):
        return 1
    return ALWAYS.get(kind, 1)


def _replacement(step: dict[str, Any]) -> float:
    """Of a step that replaces a string or what a pattern finds, which may be nothing at all."""
    content, pattern = len(step["content"].encode()), step["pattern"]
    if pattern.get("String"):
        return max(1.0, content / len(pattern["String"].encode()))
    return 1 + content


def _longest_replacement(charsmap: str) -> float:
    """Of a step with a table of replacements: the bytes of the longest, for one byte. Behind a trie they end in 0."""
    try:
        data = base64.b64decode(charsmap)
        (trie,) = struct.unpack("<I", data[:4])
    except (struct.error, binascii.Error):
        return float("inf")
    return max(1, *(len(text) for text in data[4 + trie :].split(b"\0")))
