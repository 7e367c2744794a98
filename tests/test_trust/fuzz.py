"""Feed damaged files to the loaders: each is loaded or refused with the loader's own error, and nothing else happens.

    PYTHONPATH=tests python -m test_trust.fuzz TARGET [--runs N] [--seed S] [--coverage]

TARGET is a name in `TARGETS`. Hypothesis changes a sound file's structure; with `--coverage`, atheris changes its
bytes, led by which lines of the loader they reach. Stops at the first crash, at an error of another kind, a hang over
5 s, memory above 1 GB, or a file that was written.
"""

import argparse
import copy
import faulthandler
import importlib
import json
import os
import resource
import struct
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import onnx
import tomli_w
from google.protobuf.message import Message
from hypothesis import strategies as st
from test_serve.chats import CHATML

LONGEST, MOST_MEMORY = 5.0, 1 << 30  # seconds of work, bytes
DEADLINE = 120.0  # seconds on the clock, of which a busy machine may take most
BATCH = 1000
LARGEST_REPEAT = 5 << 20  # characters: more than a manifest may have

# Values that loaders trip over: wrong types, edges of integers, names that lead elsewhere.
ODD_TEXTS = ["", "..", "/etc/passwd", "../x", "a\0b", "\ud800", "float32", "batch", "model.onnx", "x" * 5000]
ODD_NUMBERS = [0, -1, 1, 2, 255, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 10**400]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=20),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        found.extend(places(value[key]))
    return found


@st.composite
def changed_json(draw: Any, sound: bytes) -> bytes:
    """A JSON text with a few of its values replaced, dropped, moved or repeated; now and then cut or overwritten."""
    value = json.loads(sound)
    for _ in range(draw(st.integers(1, 3))):
        if not (all_places := places(value)):
            break
        container, key = draw(st.sampled_from(all_places))
        action = draw(st.sampled_from(["replace", "replace", "drop", "swap", "rename", "repeat"]))
        if action == "drop":
            del container[key]
        elif action == "swap":
            other, name = draw(st.sampled_from(all_places))
            container[key] = copy.deepcopy(other[name])
        elif action == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=8))] = container.pop(key)
        elif action == "repeat" and isinstance(container, list):
            most = max(1, LARGEST_REPEAT // len(json.dumps(container[key])))
            times = min(most, draw(st.sampled_from([1, 100, 20_000])))
            container.extend(copy.deepcopy(container[key]) for _ in range(times))
        else:
            container[key] = draw(values)
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    return draw(changed_bytes(text)) if draw(st.integers(0, 9)) == 0 else text


@st.composite
def changed_bytes(draw: Any, sound: bytes) -> bytes:
    """Bytes with a piece overwritten, taken out, put in or doubled."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 1, 2, 4, 8, 64, 1 << 20])))
        piece = bytes(data[start:end])
        data[start:end] = draw(st.one_of(st.binary(max_size=12), st.just(piece * 2), st.just(b"")))
    return bytes(data)


@st.composite
def changed_graph(draw: Any, sound: bytes) -> bytes:
    """An ONNX model with a few fields changed anywhere in its tree of messages, or its bytes damaged."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(sound))
    model = onnx.load_from_string(sound)
    for _ in range(draw(st.integers(1, 3))):
        message: Message = model
        while True:
            fields = message.ListFields()
            inner = [value for field, value in fields if field.message_type and not _many(field)]
            inner += [value for field, many in fields if field.message_type and _many(field) for value in many]
            if not inner or (message is not model and draw(st.integers(0, 3)) == 0):
                break
            message = draw(st.sampled_from(inner))
        field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
        change = draw(st.sampled_from(["clear", "set", "set", "double"]))
        try:
            if change == "clear":
                message.ClearField(field.name)
            elif change == "double" and _many(field):
                getattr(message, field.name).extend(list(getattr(message, field.name)))
            elif _many(field):
                if field.message_type:
                    getattr(message, field.name).add()
                else:
                    getattr(message, field.name).append(draw(_scalar(field)))
            elif not field.message_type:
                setattr(message, field.name, draw(_scalar(field)))
            else:
                getattr(message, field.name).SetInParent()
        except (TypeError, ValueError):
            pass  # protobuf's own limits
    return model.SerializeToString()


def _many(field: Any) -> bool:
    return field.is_repeated


def _scalar(field: Any) -> st.SearchStrategy:
    kinds = {
        field.CPPTYPE_STRING: st.sampled_from([*ODD_TEXTS[:4], "layers.0.key", "Loop", "val_1"]) | st.text(max_size=8),
        field.CPPTYPE_FLOAT: st.floats(width=32),
        field.CPPTYPE_DOUBLE: st.floats(),
    }
    if field.type == field.TYPE_BYTES:
        return st.binary(max_size=16)
    return kinds.get(field.cpp_type, st.sampled_from([-(1 << 31), *ODD_NUMBERS[:6], 1 << 40, (1 << 63) - 1]))


@st.composite
def changed_weights(draw: Any, sound: bytes) -> bytes:
    """A safetensors file with its header changed, its length field wrong, or its bytes damaged."""
    (length,) = struct.unpack("<Q", sound[:8])
    header, body = sound[8 : 8 + length], sound[8 + length :]
    header = draw(changed_json(header) | changed_bytes(header))
    length = draw(st.one_of(st.just(len(header)), st.sampled_from([n for n in ODD_NUMBERS if 0 <= n < 1 << 64])))
    return struct.pack("<Q", length) + header + (body if draw(st.booleans()) else body[: len(body) // 2])


class Target:
    """One loader under attack: a directory that it loads, and the file in it that is damaged."""

    def __init__(self, root: Path):
        self.outcomes: Counter[str] = Counter()
        self.directory = self.make(root)
        self.path = self.directory / self.file
        self.sound = self.path.read_bytes()
        self.load()  # warms up whatever is imported or cached late
        self.before = _memory()

    file: str
    expected: tuple[type[Exception], ...]
    changed: Callable[[bytes], st.SearchStrategy]

    def make(self, root: Path) -> Path:
        raise NotImplementedError

    def place(self, data: bytes) -> None:
        self.path.write_bytes(data)

    def load(self) -> None:
        raise NotImplementedError

    def check(self, data: bytes) -> None:
        """Load the directory with `data` in place of the sound file. Raises where anything but the expected happens."""
        self.place(data)
        present = _listing(self.directory.parent)
        faulthandler.dump_traceback_later(DEADLINE, exit=True)
        started = time.process_time()
        try:
            self.load()
            self.outcomes["loaded"] += 1
        except self.expected as error:
            message = str(error)
            assert message, "an error without a message"
            assert "\n" not in message, f"a message of several lines: {message!r}"
            assert len(message) < 2000, f"a message of {len(message)} characters: {message[:200]!r}"
            self.outcomes[type(error).__name__] += 1
        finally:
            faulthandler.cancel_dump_traceback_later()
        assert time.process_time() - started < LONGEST, "it took more than 5 s"
        assert _listing(self.directory.parent) == present, "files were written"
        assert _memory() - self.before < MOST_MEMORY, "it took more than 1 GB"


class Manifests(Target):
    """Mutations of an artifact's manifest."""

    file = "manifest.json"
    changed = staticmethod(changed_json)

    def make(self, root: Path) -> Path:
        from runtime import ArtifactError
        from test_trust.samples import make_artifact

        self.expected = (ArtifactError,)
        return make_artifact(root)

    def load(self) -> None:
        from runtime.artifact.integrity import read_artifact

        read_artifact(self.directory)


class Graphs(Manifests):
    """Mutations of an artifact's graph, under a manifest that agrees with them; ONNX Runtime gets what passes."""

    file = "model.onnx"
    changed = staticmethod(changed_graph)

    def place(self, data: bytes) -> None:
        from test_trust.samples import rewrite

        super().place(data)
        rewrite(self.directory)

    def load(self) -> None:
        from runtime import load

        load(self.directory, threads=1)


ENGINE = {
    "file": "model.tensorrt-rtx.engine",
    "builder": "tensorrt-rtx",
    "version": "1.7.1.116",
    "compute_capabilities": ["8.9", "12.0"],
    "capacity": 300,
    "max_batch": 4,
    "profiles": [
        {"name": "decode", "batch": [1, 1, 4], "sequence": [1, 1, 1]},
        {"name": "prefill", "batch": [1, 1, 4], "sequence": [2, 128, 300]},
    ],
    "aliased": ["layers.0.key.out", "layers.0.value.out", "layers.0.bias.out"],
}


@st.composite
def changed_engine(draw: Any, sound: bytes) -> bytes:
    """A manifest with its entry of an engine changed."""
    manifest = json.loads(sound)
    text = draw(changed_json(json.dumps(manifest["engines"]).encode()))
    try:
        manifest["engines"] = json.loads(text)
    except ValueError:
        return text
    return json.dumps(manifest).encode("utf-8", "surrogatepass")


class Engines(Manifests):
    """Mutations of what the manifest says of an engine; up to where a GPU would be needed."""

    changed = staticmethod(changed_engine)

    def make(self, root: Path) -> Path:
        from test_trust.samples import rewrite

        directory = super().make(root)
        (directory / ENGINE["file"]).write_bytes(b"no engine")
        rewrite(directory, lambda manifest: manifest["files"].update({ENGINE["file"]: {}}))
        rewrite(directory, lambda manifest: manifest.update(engines=[ENGINE]))
        return directory

    def load(self) -> None:
        from runtime.artifact.integrity import read_artifact
        from runtime.backends.tensorrt import choose_engine, runs_on
        from runtime.backends.tensorrt_entry import engine_entries

        artifact = read_artifact(self.directory)
        engines = engine_entries(artifact)
        for engine in engines:
            runs_on(engine, "8.9")
        if engines:
            choose_engine(artifact)


class Checkpoints(Target):
    """Mutations of a checkpoint's weights file."""

    file = "model.safetensors"
    changed = staticmethod(changed_weights)

    def make(self, root: Path) -> Path:
        from test_trust.samples import make_checkpoint
        from wm_models import CheckpointError

        self.expected = (CheckpointError,)
        return make_checkpoint(root / "checkpoint", num_hidden_layers=1)

    def load(self) -> None:
        from wm_models import DogeForCausalLM

        DogeForCausalLM.from_pretrained(self.directory)


class Adapters(Target):
    """Mutations of adapter_config.json, which says over which checkpoint an adapter is."""

    file = "adapter_config.json"
    changed = staticmethod(changed_json)

    def make(self, root: Path) -> Path:
        import peft

        from export import ExportError
        from test_trust.samples import make_checkpoint
        from wm_models import CheckpointError, DogeForCausalLM

        self.expected = (ExportError, CheckpointError)
        base = make_checkpoint(root / "base", num_hidden_layers=1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model: Any = DogeForCausalLM.from_pretrained(base)
        peft.get_peft_model(model, config).save_pretrained(root / "adapter")
        return root / "adapter"

    def load(self) -> None:
        from export.source import Source, is_local

        if is_local(str(self.directory)):
            Source(str(self.directory)).load_model()


PROMPTS = b"""{"prompt": "def f(x):"}
{"ids": [5, 6, 7], "name": "ids"}

{"prompt": "caf\\u00e9 \\ud83d\\ude00", "fields": {"a": [1, 2.5, null, true]}}
"""
CALL = {
    "model": "doge",
    "prompt": ["def ", "class "],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 2,
    "stop": ["\\n"],
    "seed": 1,
    "logit_bias": {"5": 1.5},
    "stream": True,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
}


def lone_file(root: Path, name: str, data: bytes) -> Path:
    """A new directory with one file."""
    directory = root / "lone"
    directory.mkdir()
    (directory / name).write_bytes(data)
    return directory


class Texts(Manifests):
    """Mutations of a text of an artifact with the shipped tokenizer, under a manifest that agrees with them."""

    def make(self, root: Path) -> Path:
        from runtime import ArtifactError, RequestError
        from test_trust.samples import make_artifact, rewrite
        from wm_models import shipped_checkpoint

        directory = make_artifact(root, vocab_size=3072)
        self.expected = (ArtifactError, RequestError)
        (directory / "tokenizer.json").write_bytes((shipped_checkpoint() / "tokenizer.json").read_bytes())
        (directory / "chat_template.jinja").write_text(CHATML)
        names = ("tokenizer.json", "chat_template.jinja")
        rewrite(directory, lambda manifest: manifest["files"].update({name: {} for name in names}))
        rewrite(directory)
        return directory

    def place(self, data: bytes) -> None:
        from test_trust.samples import rewrite

        super().place(data)
        rewrite(self.directory)

    def load(self) -> None:
        from runtime import load

        with load(self.directory, threads=1) as engine:
            engine.encode("def f(x):\n    return x")
            engine.encode_chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])


class Tokenizers(Texts):
    """Mutations of tokenizer.json."""

    file = "tokenizer.json"
    changed = staticmethod(changed_json)


class Templates(Texts):
    """Mutations of a chat template."""

    file = "chat_template.jinja"
    changed = staticmethod(changed_bytes)


class Prompts(Texts):
    """Mutations of a file of prompts: each line is a prompt, or says why it cannot be answered."""

    file = "prompts.jsonl"
    changed = staticmethod(changed_bytes)

    def make(self, root: Path) -> Path:
        from runtime import load

        self.engine = load(super().make(root), threads=1)
        return lone_file(root, self.file, PROMPTS)

    def place(self, data: bytes) -> None:
        self.path.write_bytes(data)

    def load(self) -> None:
        from runtime.prompts import read_prompts

        for prompt in read_prompts(self.engine, self.path):
            assert bool(prompt.ids) == (prompt.error is None)
            assert prompt.error is None or "\n" not in prompt.error
        read_prompts(self.engine, self.path, strict=True)


@st.composite
def changed_toml(draw: Any, sound: bytes) -> bytes:
    """A TOML text with its values changed, where TOML can hold them, or with its bytes changed."""
    try:
        value = json.loads(draw(changed_json(json.dumps(tomllib.loads(sound.decode())).encode())))
        return tomli_w.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, AttributeError):  # it is no table, or holds a null
        return draw(changed_bytes(sound))


class Recipes(Target):
    """Mutations of a training recipe."""

    file = "recipe.toml"
    changed = staticmethod(changed_toml)

    def make(self, root: Path) -> Path:
        from wm_models.training.errors import TrainingError
        from wm_models.training.recipe import Recipe

        self.expected = (TrainingError,)
        return lone_file(root, self.file, tomli_w.dumps(Recipe.load("doge-3m", {}).values()).encode())

    def load(self) -> None:
        from wm_models import shipped_tokenizer
        from wm_models.training.recipe import Recipe
        from wm_models.training.run import model_config

        model_config(Recipe.load(str(self.path), {}), shipped_tokenizer())


class Calls(Target):
    """Mutations of the body of a request for a completion, or for a chat."""

    file = "call.json"
    changed = staticmethod(changed_json)

    def make(self, root: Path) -> Path:
        from runtime.serve.errors import ApiError

        self.expected = (ApiError,)
        return lone_file(root, self.file, json.dumps(CALL).encode())

    def load(self) -> None:
        from runtime.serve.calls import parse_chat, parse_completion
        from runtime.serve.fields import parse_body

        body = parse_body(self.path.read_bytes())
        name, parse = ("messages", parse_completion) if "prompt" in body else ("prompt", parse_chat)
        body.pop(name, None)
        parse(body, 128)


TARGETS = {
    "manifests": Manifests,
    "engines": Engines,
    "graphs": Graphs,
    "checkpoints": Checkpoints,
    "adapters": Adapters,
    "tokenizers": Tokenizers,
    "templates": Templates,
    "prompts": Prompts,
    "recipes": Recipes,
    "calls": Calls,
}


def run(target: Target, runs: int, seed: int) -> None:
    """Hypothesis's mutations, in batches: it remembers all examples of one."""
    for start in range(0, runs, BATCH):

        @hypothesis.seed(seed + start)
        @hypothesis.settings(
            max_examples=min(BATCH, runs - start), database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(target.changed(target.sound))
        def attack(data: bytes) -> None:
            target.check(data)

        attack()


def run_with_coverage(target: Target, runs: int, seed: int) -> None:
    """atheris's mutations; leaves the process when it is done."""
    import atheris

    with tempfile.TemporaryDirectory() as corpus:
        Path(corpus, "sound").write_bytes(target.sound)
        options = [f"-runs={runs}", f"-seed={seed}", "-max_len=100000", "-rss_limit_mb=0", "-verbosity=0", corpus]

        def attack(data: bytes) -> None:
            target.check(data)
            if target.outcomes.total() == runs:
                report(target)

        atheris.Setup([sys.argv[0], *options], attack)
        atheris.Fuzz()


def report(target: Target) -> None:
    outcomes = ", ".join(f"{count} {name}" for name, count in target.outcomes.most_common())
    grown = (_memory() - target.before) / 1e6
    print(f"{type(target).__name__}: {target.outcomes.total()} files: {outcomes}; peak memory grew by {grown:.0f} MB")


def _listing(directory: Path) -> list[tuple[str, int, int]]:
    """What is in a directory, with sizes and times of change."""
    found = []
    for root, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(root, name))
            found.append((os.path.join(root, name), status.st_size, status.st_mtime_ns))
    return sorted(found)


def _memory() -> int:
    """The most bytes that were resident at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Feed damaged files to the loaders.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true", help="lead the mutations by coverage, with atheris")
    options = parser.parse_args()
    if options.coverage:
        import atheris

        with atheris.instrument_imports(include=["runtime", "wm_models.checkpoint"]):
            importlib.import_module("runtime")
            importlib.import_module("wm_models")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        target = TARGETS[options.target](Path(root))
        if options.coverage:
            run_with_coverage(target, options.runs, options.seed)
        run(target, options.runs, options.seed)
        report(target)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
