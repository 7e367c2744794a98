"""Compile a grammar that a request brought, to see whether it is sound and small. Runs in the child process alone.

The vocabulary is the single bytes: what a grammar costs lies in its rules and expressions.
"""

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

BYTES = LLTokenizer("byte")


def answer(grammar: str, limits: dict[str, int]) -> str:
    """Nothing. Raises ValueError for a grammar that llguidance refuses."""
    sizes = LLParserLimits(**limits, verbose_errors=False)  # type: ignore[arg-type]
    matcher = LLMatcher(BYTES, grammar, log_level=0, limits=sizes)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return ""
