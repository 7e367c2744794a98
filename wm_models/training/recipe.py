"""Everything that decides what a training run computes, as a TOML file and in Python."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Recipe:
    """A run's model, data and hyper-parameters. Two runs of one recipe on one machine give one curve."""

    preset: str = "doge-20m"
    model: Mapping[str, Any] = field(default_factory=dict)  # fields of the preset's configuration to change
    data: tuple[str, ...] = ()  # files, folders, globs; none: the Python standard library's sources
    exclude: tuple[str, ...] = ()  # patterns of document names to leave out
    held_out: tuple[str, ...] = ()  # patterns of document names to measure on; none: one in 50
    skip_bad: bool = False  # leave out files that are not UTF-8
    tokenizer: str = ""  # a directory; none: the preset's
    vocabulary: int = 0  # train a tokenizer of so many ids on the data instead
    steps: int = 1000
    sequence_length: int = 2048
    batch_size: int = 8  # rows of one optimizer step, over all devices
    accumulation: int = 1  # parts a step is computed in
    learning_rate: float = 8e-3
    warmup: float = 0.1  # share of the steps
    decay: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = True
    sharded: bool = False  # parameters over the processes (FSDP2), not a copy in each (DDP)
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 500
    save_every: int = 500
    saved_dtype: str = "fp32"  # of the finished checkpoint

    def __post_init__(self) -> None: ...
