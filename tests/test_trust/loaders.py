"""The loaders that are fed damaged files: what each loads, which file of it is damaged, which errors it may raise."""

import faulthandler
import json
import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import strategies as st
from test_serve.chats import CHATML

from test_trust.mutations import (
    changed_bytes,
    changed_engine,
    changed_graph,
    changed_json,
    changed_toml,
    changed_weights,
)

LONGEST, MOST_MEMORY = 5.0, 1 << 30  # seconds of work, bytes
DEADLINE = 120.0  # seconds on the clock, of which a busy machine may take most


class Target:
    """One loader under attack: a directory that it loads, and the file in it that is damaged."""

    def __init__(self, root: Path):
        self.outcomes: Counter[str] = Counter()
        self.directory = self.make(root)
        self.path = self.directory / self.file
        self.sound = self.path.read_bytes()
        self.load()  # warms up whatever is imported or cached late
        self.before = peak_memory()

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
        assert peak_memory() - self.before < MOST_MEMORY, "it took more than 1 GB"


@cache
def _made(**changes: int) -> tempfile.TemporaryDirectory[str]:
    from test_trust.samples import make_artifact

    root = tempfile.TemporaryDirectory()
    make_artifact(Path(root.name), **changes)
    return root


def copied_artifact(root: Path, **changes: int) -> Path:
    """`root`/artifact, as `make_artifact` makes it, but once in a process."""
    return shutil.copytree(Path(_made(**changes).name) / "artifact", root / "artifact")


class Manifests(Target):
    """Mutations of an artifact's manifest."""

    file = "manifest.json"
    changed = staticmethod(changed_json)

    def make(self, root: Path) -> Path:
        from runtime import ArtifactError

        self.expected = (ArtifactError,)
        return copied_artifact(root)

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
        from test_trust.samples import rewrite
        from wm_models import shipped_checkpoint

        directory = copied_artifact(root, vocab_size=3072)
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


class Recipes(Target):
    """Mutations of a training recipe."""

    file = "recipe.toml"
    changed = staticmethod(changed_toml)

    def make(self, root: Path) -> Path:
        from wm_models import shipped_tokenizer
        from wm_models.training.errors import TrainingError
        from wm_models.training.recipe import Recipe

        self.expected, self.tokenizer = (TrainingError,), shipped_tokenizer()
        return lone_file(root, self.file, tomli_w.dumps(Recipe.load("doge-3m", {}).values()).encode())

    def load(self) -> None:
        from wm_models.training.recipe import Recipe
        from wm_models.training.run import model_config

        model_config(Recipe.load(str(self.path), {}), self.tokenizer)


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


def _listing(directory: Path) -> list[tuple[str, int, int]]:
    """What is in a directory, with sizes and times of change."""
    found = []
    for root, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(root, name))
            found.append((os.path.join(root, name), status.st_size, status.st_mtime_ns))
    return sorted(found)


def peak_memory() -> int:
    """The most bytes that were resident at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
