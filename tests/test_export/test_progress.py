"""What an export says of its progress, to a program and to a person."""

import time

import pytest
from test_trust.samples import make_checkpoint

from export import OnnxOptions, Progress, export_onnx, terminal
from runtime import console


class Recorder(Progress):
    def __init__(self):
        self.stages, self.reported = [], []

    def stage(self, name, total=None):
        self.stages.append([name, 0, total])

    def advance(self, count=1):
        self.stages[-1][1] += count

    def report(self, comparison):
        self.reported.append(comparison)


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_stages_count_up_to_their_totals(tmp_path, scheme):
    recorder = Recorder()
    options = OnnxOptions(quantize=scheme, max_length=24, max_batch=2)
    found = export_onnx(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", options, progress=recorder)
    assert recorder.reported == found
    names = [name for name, _, _ in recorder.stages]
    for name in ("loading the model", "lowering to ONNX", "computing the eager model's answers", "comparing"):
        assert name in names
    assert ("quantising" in names) == (scheme is not None)
    known = [(name, done, total) for name, done, total in recorder.stages if total is not None]
    assert len(known) >= 2
    for name, done, total in known:
        assert done == total, name


def test_lines_where_stderr_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "INTERVAL", 0.05)
    with terminal.shown_progress() as progress:
        progress.stage("counting", total=4)
        progress.advance(3)
        time.sleep(0.5)
    said = capsys.readouterr()
    assert "counting: 0 s, 75%, 0 s left\n" in said.err
    assert not said.out
