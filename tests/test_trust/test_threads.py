"""Threads, forks and other processes: right tokens or an error, at once."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from export import OnnxOptions, export_onnx
from runtime import ArtifactError, RequestError, load
from runtime.batch import generate_many
from runtime.prompts import Prompt

PROMPTS = [[1, 2, 3], [50, 4, 9, 10], [7], [90, 91, 3, 3, 5]]


@pytest.fixture(scope="module")
def alone(artifact):
    """What each prompt is continued with, when nobody else is there."""
    return [load(artifact, threads=1).generate_ids(prompt, 40) for prompt in PROMPTS]


def test_threads_get_their_tokens_or_an_error(artifact, alone):
    engine, outcomes = load(artifact, threads=1), []
    start = threading.Barrier(4)

    def work(index):
        start.wait()
        for _ in range(25):
            try:
                outcomes.append(engine.generate_ids(PROMPTS[index], 40) == alone[index])
            except RequestError:
                outcomes.append(None)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 100
    assert False not in outcomes
    assert None in outcomes
    assert engine.generate_ids(PROMPTS[0], 40) == alone[0]


def test_an_engine_for_each_thread(artifact, alone):
    engines, found = [load(artifact, threads=1) for _ in PROMPTS], {}

    def work(index):
        found[index] = [engines[index].generate_ids(PROMPTS[index], 40) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [alone[index]] * 3 for index in range(4)}


def test_a_call_from_another_thread_is_turned_away_at_once(artifact):
    engine, inside, done = load(artifact), threading.Event(), threading.Event()
    step = engine.session.step

    def slow(*arguments):
        inside.set()
        assert done.wait(20)
        return step(*arguments)

    engine.session.step = slow
    thread = threading.Thread(target=engine.generate_ids, args=([1, 2], 2))
    thread.start()
    assert inside.wait(20)
    for call in (engine.reset, lambda: engine.prefill([[1]]), lambda: engine.reserve(1, 1)):
        with pytest.raises(RequestError, match="another thread"):
            call()
    done.set()
    thread.join()


def test_two_streams_of_one_engine(artifact, alone):
    """Taken in turns the second would continue in the first one's slot."""
    engine = load(artifact)
    first, second = (engine.stream_ids(prompt, 40) for prompt in PROMPTS[:2])
    assert next(first) == alone[0][0]
    assert next(second) == alone[1][0]
    with pytest.raises(RequestError, match="another call used these slots"):
        next(first)
    assert [next(second) for _ in range(3)] == alone[1][1:4]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_told_to_load_again(artifact, alone):
    engine = load(artifact)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            engine.generate_ids([1, 2], 3)
        except RequestError as error:
            said = str(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as stream:
        assert "is a fork of it" in stream.read()
    assert engine.generate_ids(PROMPTS[0], 40) == alone[0]


def test_processes_share_a_directory_while_siblings_are_written(artifact, alone, tmp_path):
    """Two processes load and generate from one directory, over and over, while exports go on beside and over it."""
    shared = shutil.copytree(artifact, tmp_path / "shared")
    code = (
        "import sys, json\nfrom runtime import load\n"
        "for _ in range(12): tokens = load(sys.argv[1], threads=1).generate_ids([1, 2, 3], 40)\nprint(tokens)"
    )
    command = [sys.executable, "-P", "-c", code, shared]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    source = artifact.parent / "checkpoint"
    export_onnx(source, tmp_path / "sibling", OnnxOptions(max_length=64, max_batch=1))
    export_onnx(source, tmp_path / "sibling", OnnxOptions(max_length=32, max_batch=1), force=True)
    for reader in readers:
        said, errors = reader.communicate(timeout=120)
        assert reader.returncode == 0, errors
        assert said.strip() == str(alone[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared", "sibling"]


def test_whoever_looks_finds_an_artifact(artifact, tmp_path):
    """While an artifact is replaced over and over, its directory is never missing, and what is read is never mixed."""
    from export.package.directory import replacing

    out, stop, seen = shutil.copytree(artifact, tmp_path / "out"), threading.Event(), []

    def look():
        while not stop.is_set():
            try:
                load(out, threads=1)
                seen.append("loaded")
            except (ArtifactError, FileNotFoundError) as error:
                # caught between two files of two artifacts, never without one
                seen.append("caught between" if (out / "manifest.json").exists() else str(error))

    reader = threading.Thread(target=look)
    reader.start()
    for turn in range(100):
        with replacing(out, force=True) as new:
            shutil.copytree(artifact, new, dirs_exist_ok=True)
        if turn >= 30 and "loaded" in seen:
            break
        time.sleep(0.01 * turn)  # an artifact stays longer and longer, until it is loaded before it is replaced
    stop.set()
    reader.join()
    assert set(seen) <= {"loaded", "caught between"}
    assert "loaded" in seen
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_of_two_exports_to_one_place_neither_is_lost_unasked(artifact, tmp_path, force):
    """The first to finish has the place; only with `force` the second takes it over."""
    from export import ExportError
    from export.package.directory import replacing

    out, ended = tmp_path / "out", nullcontext() if force else pytest.raises(ExportError, match=r"not empty.*--force")
    with ended, replacing(out, force) as second:
        (second / "name").write_text("second")
        with replacing(out, force) as first:
            assert second.exists()  # another's unfinished work is not swept away
            (first / "name").write_text("first")
        assert (out / "name").read_text() == "first"
    assert (out / "name").read_text() == ("second" if force else "first")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_engine_s_directory_is_held_until_it_is_whole(artifact, tmp_path, monkeypatch):
    """The ONNX export inside it ends first; another command to the same place then leaves it alone."""
    from export import TensorRTOptions, build_tensorrt
    from export.package import directory as exports
    from export.targets import tensorrt

    out = tmp_path / "out"

    def build(found, *_):
        exports._sweep(out)
        assert (found.path / "manifest.json").exists()
        (found.path / "engine").write_bytes(b"engine")
        return {"file": "engine"}

    monkeypatch.setattr(tensorrt, "choose_builder", lambda name, here: name)
    monkeypatch.setattr(tensorrt, "add_engine", build)
    build_tensorrt(artifact.parent / "checkpoint", out, TensorRTOptions(max_length=64, max_batch=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["engines"] == [{"file": "engine"}]
    assert sorted([*manifest["files"], "manifest.json"]) == sorted(path.name for path in out.iterdir())


def test_verify_does_not_bring_back_what_was_replaced(artifact, tmp_path, monkeypatch):
    from export import ExportError, verify
    from export.package.directory import replacing

    out = shutil.copytree(artifact, tmp_path / "out")

    def check(*_):
        with replacing(out, force=True) as new:
            (new / "manifest.json").write_text("{}")
        return []

    monkeypatch.setattr("export.api.check_artifact", check)
    with pytest.raises(ExportError, match="replaced it meanwhile"):
        verify(out)
    assert (out / "manifest.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_batch_whose_slots_were_used_meanwhile(artifact):
    engine = load(artifact)
    longest = engine.graph.max_length
    prompts = [Prompt(0, {}, [1, 2, 3]), Prompt(1, {}, [5] * (longest - 2))]
    answers = generate_many(engine, prompts, 5, 2)
    assert next(answers)[0] is prompts[1]  # the other one is under way
    engine.generate_ids([1, 2], 3)
    with pytest.raises(RequestError, match="another call used these slots"):
        list(answers)
