"""Artifact directories that somebody else wrote into: no planted link is followed, and no pipe is waited for."""

import fcntl
import json
import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import baseline, ours
from test_trust.samples import rewrite
from test_trust.test_signature import write_keys

from export import Comparison, ExportError, sign, verify
from export.package.directory import replacing
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MANIFEST
from test_export.conftest import lowered

PASSED = Comparison("", 1, 0.0, 1.0, 0.0, None, 1.0, 0, True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = ours(baseline(num_hidden_layers=1), expert_routing="token")
    return lowered(tmp_path_factory.mktemp("made") / "artifact", model).path


@pytest.fixture
def copy(made, tmp_path):
    directory = tmp_path / "artifact"
    directory.mkdir()
    for path in made.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def test_signing_follows_no_link_and_waits_for_no_pipe(copy, victim, tmp_path):
    key, _ = write_keys(tmp_path, "key")
    for name in (".manifest.sig", "manifest.sig", "link"):
        (copy / name).symlink_to(victim)
    os.mkfifo(copy / "pipe")
    path = sign(copy, key)
    assert len(path.read_bytes()) == 64
    assert not path.is_symlink()
    assert victim.read_text() == "precious"
    assert (copy / "link").readlink() == victim
    (copy / "manifest.sig").unlink()
    os.mkfifo(copy / "manifest.sig")
    assert len(sign(copy, key).read_bytes()) == 64


def test_verifying_leaves_what_the_manifest_does_not_list_alone(copy, victim, monkeypatch):
    monkeypatch.setattr("export.api.check_artifact", lambda *_: [PASSED])
    os.mkfifo(copy / "pipe")
    (copy / "notes.txt").write_text("mine")
    (copy / "folder").mkdir()
    for name in (".verification.json", ".manifest.json", "verification.json", "folder/link"):
        (copy / name).symlink_to(victim)
    listed = set(json.loads((copy / MANIFEST).read_text())["files"])
    assert verify(copy, "doge-20m") == [PASSED]
    assert victim.read_text() == "precious"
    assert read_artifact(copy).files.keys() == listed | {"verification.json"}
    assert (copy / "notes.txt").read_text() == "mine"
    assert (copy / "folder" / "link").readlink() == victim
    assert (copy / "pipe").is_fifo()


def test_files_written_again_leave_their_other_names_alone(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("export.api.check_artifact", lambda *_: [PASSED])
    before = (copy / MANIFEST).read_bytes()
    os.link(copy / MANIFEST, tmp_path / "kept")
    verify(copy, "doge-20m")
    assert (tmp_path / "kept").read_bytes() == before
    assert (copy / MANIFEST).read_bytes() != before


@pytest.mark.parametrize("source", ["somebody/their-model", "/nowhere/at/all", "../checkpoint", "doge-21m"])
def test_a_source_that_an_artifact_names_is_loaded_from_this_machine_only(copy, monkeypatch, source):
    def refuse(*_):
        raise AssertionError("the source was loaded")

    monkeypatch.setattr("export.api.Source", refuse)
    (copy / "verification.json").write_text(json.dumps({"source": {"source": source, "seed": 0}}))
    rewrite(copy, lambda manifest: manifest["files"].update({"verification.json": _entry(copy / "verification.json")}))
    with pytest.raises(ExportError, match=rf"names the source '{source}'.*--source"):
        verify(copy)


def _entry(path):
    return {"size": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}


RECORDS = [{}, {"source": 3}, {"source": {"source": 3}}, {"source": {"source": "doge-20m", "seed": "1"}}]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_without_a_source_says_so(copy, record):
    (copy / "verification.json").write_text(json.dumps(record))
    rewrite(copy, lambda manifest: manifest["files"].update({"verification.json": _entry(copy / "verification.json")}))
    with pytest.raises(ExportError, match="names no source to compare with"):
        verify(copy)


def test_a_pipe_with_the_name_of_unfinished_work_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / ".out.1.partial")
    (tmp_path / ".out.2.partial").symlink_to(tmp_path)
    with replacing(tmp_path / "out", force=False) as new:
        (new / "file").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.1.partial", ".out.2.partial", "out"]


def test_folders_made_for_an_artifact_go_with_it(tmp_path):
    with suppress(KeyError), replacing(tmp_path / "a" / "b" / "out", force=False):
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with replacing(tmp_path / "a" / "b" / "out", force=False):
        pass
    assert (tmp_path / "a" / "b" / "out").is_dir()


@pytest.mark.parametrize("call", [(fcntl, "flock"), (Path, "chmod")])
def test_ctrl_c_before_the_lock_leaves_nothing(tmp_path, monkeypatch, call):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*call, interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a" / "out", force=False):
        pass
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_swept_before_its_lock_is_made_again(tmp_path, monkeypatch):
    taken, take = [], os.open

    def swept(path, *flags):
        if not taken:
            taken.append(path)
            path.rmdir()
        return take(path, *flags)

    monkeypatch.setattr(os, "open", swept)
    with replacing(tmp_path / "out", force=False) as new:
        assert [new] == taken
        (new / "file").write_text("")
    assert (tmp_path / "out" / "file").exists()
