"""What a command says of long work."""

import pytest

from runtime import console


@pytest.mark.parametrize(
    ("done", "total", "line"),
    [
        (3, 12, "reading: 6 s, 25%, 19 s left"),
        (12, 12, "reading: 6 s, 100%, 0 s left"),
        (0, 12, "reading: 6 s, 0%"),
        (3, None, "reading: 6 s"),
    ],
)
def test_a_line(done, total, line):
    assert console.progress_line("reading", 6.2, done, total) == line


def test_lines_where_stderr_is_no_terminal(monkeypatch, capsys):
    """One at most in each interval; nothing for what is done sooner."""
    now = iter([0, 3, 6, 7, 12, 13])  # of the beginning, and of each unit
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.Progress("counting") as progress:
        progress.expect(3)
        progress.expect(2)
        for _ in range(5):
            progress.advance()
    said = capsys.readouterr()
    assert said.err == "counting: 6 s, 40%, 9 s left\ncounting: 12 s, 80%, 3 s left\n"
    assert not said.out
