"""What the GPU suite is run on: models, artifacts, engines and the eager model's answers, each made once.

B batch (slots), V vocabulary.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export import OnnxOptions, TensorRTOptions, build_tensorrt, export_onnx
from export.source import Source
from export.verification.cases import Case, draw_sequences
from export.verification.reference import eager_logits
from runtime.backends.tensorrt_editions import MODULES, installed

WINDOWED = "windowed"


@dataclass(frozen=True)
class Plan:
    """The models and sizes of a run. Models are what `export_onnx` takes.

    `keep` and `spare`: the keep window that is given to `dense` where eviction is tried, and the rows beyond it.
    """

    dense: str = "doge-3m"
    hybrid: str = "cheems-20m"
    speed: str = "doge-160m"
    baselines: tuple[str, ...] = ("torch-compile",)
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    schemes: tuple[str, ...] = ("int8", "int4")
    length: int = 1024
    steps: int = 64
    long_steps: int = 512
    prompts: tuple[int, ...] = (1, 17, 128)
    ragged: tuple[int, ...] = (5, 33, 20, 1)
    keep: int = 64
    spare: int = 128
    prompt_length: int = 128
    new_tokens: int = 128

    @property
    def slots(self) -> int:
        return max(4, len(self.ragged))


CARD = Plan()  # on a GPU


class Unavailable(Exception):
    """What this machine lacks for a stage, which is then not run."""


@dataclass(eq=False)
class Material:
    """What a plan needs. Its files lie in `directory`; what lies there already is not made again."""

    directory: Path
    plan: Plan

    @cache  # noqa: B019 it lives as long as the process
    def model(self, source: str) -> Any:
        """The eager model, in float32 on the CPU."""
        return Source(source).load_model()

    @cache  # noqa: B019
    def answers(self, source: str, case: Case) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What each slot of a case reads, and the eager model's logits for it."""
        model = self.model(source)
        rows = draw_sequences(case, np.random.default_rng(0), model.config.vocab_size, None)
        spans = [np.arange(at - 1, len(row)) for row, at in zip(rows, case.prompts, strict=True)]
        batches = [(torch.from_numpy(row)[None], span) for row, span in zip(rows, spans, strict=True)]
        logits = [eager_logits(model, *batch)[0] for batch in batches]
        return rows, logits

    @cache  # noqa: B019
    def windowed(self) -> str:
        """A checkpoint of the dense model that keeps a window."""
        model, place = Source(self.plan.dense).load_model(), self.directory / WINDOWED
        model.config.keep_window_size = self.plan.keep
        model.save_pretrained(place)
        return str(place)

    @cache  # noqa: B019
    def graph(self, source: str, dtype: str = "fp32", quantize: str | None = None) -> Path:
        """The ONNX artifact of a model, compared with the eager model on the CPU."""
        place = self.directory / f"{Path(source).name}-{quantize or dtype}"
        if not place.exists():
            plan = self.plan
            options = OnnxOptions(
                dtype, quantize, max_batch=plan.slots, max_length=plan.length, spare=plan.spare
            )  # fmt: skip
            export_onnx(source, place, options)
        return place

    def engine(self, source: str, dtype: str = "fp32", quantize: str | None = None) -> tuple[Path, dict[str, Any]]:
        """The same with an engine, and the engine's entry. Raises `Unavailable` where nothing can build it."""
        if not any(installed(builder) for builder in MODULES):
            raise Unavailable("neither tensorrt nor tensorrt-rtx is installed")
        return self._engine(source, dtype, quantize)

    @cache  # noqa: B019
    def _engine(self, source: str, dtype: str, quantize: str | None) -> tuple[Path, dict[str, Any]]:
        graph = self.graph(source, dtype, quantize)
        place = graph.with_name(f"{graph.name}-engine")
        return place, build_tensorrt(graph, place, TensorRTOptions(), force=True)
