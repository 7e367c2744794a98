"""Everything that decides what a training run computes, as a TOML file and in Python."""

import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from wm_models.checkpoint.files import shown
from wm_models.presets import PRESETS
from wm_models.training.errors import TrainingError

SHIPPED = Path(__file__).parent / "recipes"
DTYPES = ("fp32", "bf16", "fp16")
AUTO = "auto"
PRECISIONS = (AUTO, "fp32", "bf16")
DEFAULT_PRESET = "doge-20m"
TEXT, SFT, DPO = "text", "sft", "dpo"
TASKS = (TEXT, SFT, DPO)


@dataclass(frozen=True)
class Recipe:
    """A run's model, data and hyper-parameters. Two runs of one recipe on one machine give one curve.

    Raises `TrainingError` for a value that no run can have.
    """

    # text: the next token of documents. sft: the answers of chats. dpo: of two answers to a chat, the better one.
    task: str = TEXT
    base: str = ""  # of sft and dpo: the checkpoint to tune, a directory or a shipped model's name
    chat_template: str = ""  # of sft and dpo: a Jinja file, or the name of a shipped one; none: the tokenizer's own
    new_tokens: tuple[str, ...] = ()  # special tokens to add to the base's tokenizer
    beta: float = 0.1  # of dpo: how strongly the base is held to
    preset: str = DEFAULT_PRESET  # of text
    model: Mapping[str, Any] = field(default_factory=dict)  # fields of the preset's configuration to change
    data: tuple[str, ...] = ()  # files, folders, globs; none: the standard library's sources, or its instructions
    exclude: tuple[str, ...] = ()  # patterns of names of documents or chats to leave out
    held_out: tuple[str, ...] = ()  # patterns of names to measure on; none: one in 50
    skip_bad: bool = False  # leave out files that are not UTF-8
    tokenizer: str = ""  # a directory; none: the preset's own
    vocabulary: int = 0  # train a tokenizer of so many ids on the data instead
    steps: int = 1000
    sequence_length: int = 2048
    batch_size: int = 8  # rows of one optimizer step, over all devices
    device_batch_size: int = 8  # the most rows that a device takes at once; a step is computed in as many parts
    learning_rate: float = 8e-3
    warmup: float = 0.1  # shares of the steps
    decay: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    # Of the matrix products; weights and optimizer are fp32. auto: bf16 where the device computes in it, else fp32.
    precision: str = AUTO
    saved_dtype: str = "fp32"  # of the finished checkpoint
    gradient_checkpointing: bool = False
    compile: bool = True
    sharded: bool = False  # parameters spread over the processes (FSDP2), not a copy in each (DDP)
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 500
    save_every: int = 500

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _typed(item.name, getattr(self, item.name), item.default))
        for name, lowest in _LOWEST.items():
            if getattr(self, name) < lowest:
                raise TrainingError(f"{name} is {reprlib.repr(getattr(self, name))}; expected at least {lowest}")
        if self.preset not in PRESETS:
            raise TrainingError(f"preset is {reprlib.repr(self.preset)}; expected one of {', '.join(PRESETS)}")
        if not self.learning_rate > 0:
            raise TrainingError(f"learning_rate is {self.learning_rate}; expected a positive number")
        if self.warmup + self.decay > 1:
            raise TrainingError(f"warmup and decay are {self.warmup} and {self.decay} of the steps; expected at most 1")
        for name, choices in (("task", TASKS), ("precision", PRECISIONS), ("saved_dtype", DTYPES)):
            if getattr(self, name) not in choices:
                value = reprlib.repr(getattr(self, name))
                raise TrainingError(f"{name} is {value}; expected one of {', '.join(choices)}")
        self._check_task()
        if self.tokenizer and self.vocabulary:
            raise TrainingError("tokenizer and vocabulary are both given; expected a directory, or a size to train")

    def _check_task(self) -> None:
        tunes = self.task != TEXT
        if tunes != bool(self.base):
            raise TrainingError(
                f"task is {self.task} and base {self.base!r}; expected a base, the checkpoint to tune, for "
                f"{SFT} and {DPO} and for them alone"
            )
        for name, empty in _OF_TEXT.items() if tunes else _OF_CHATS.items():
            if getattr(self, name) != empty:
                raise TrainingError(f"{name} is {getattr(self, name)!r}; task {self.task} has no such value")
        if self.task == DPO and self.sharded:
            raise TrainingError("sharded is true; dpo holds two models, of which each process needs the whole")

    @classmethod
    def load(cls, source: str, changes: Mapping[str, Any]) -> "Recipe":
        """The recipe in a TOML file, or the shipped one of that name, with some values changed."""
        path = Path(source)
        if path.suffix != ".toml" and not path.exists():
            path = SHIPPED / f"{source}.toml"
            if not path.exists():
                names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
                raise TrainingError(f"{source}: no recipe of that name; expected a .toml file or one of {names}")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TrainingError(f"{path}: is no TOML: {error}") from error
        if unknown := values.keys() - {item.name for item in fields(cls)}:
            known = ", ".join(item.name for item in fields(cls))
            raise TrainingError(f"{path}: unknown {', '.join(map(shown, sorted(unknown)))}; expected {known}")
        try:
            return cls(**{**values, **changes})
        except TrainingError as error:
            raise TrainingError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        path.write_text(tomli_w.dumps(self.values()), encoding="utf-8")

    def values(self) -> dict[str, Any]:
        """As plain values, the way TOML gives them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


_OF_TEXT = {"preset": DEFAULT_PRESET, "model": {}, "vocabulary": 0}  # what sft and dpo take from the base
_OF_CHATS = {"chat_template": "", "new_tokens": ()}
_LOWEST = {
    "vocabulary": 0, "steps": 1, "sequence_length": 2, "batch_size": 1, "device_batch_size": 1, "warmup": 0, "decay": 0,
    "weight_decay": 0, "max_grad_norm": 0, "beta": 0, "seed": 0, "log_every": 1, "evaluate_every": 1, "save_every": 1,
}  # fmt: skip


def _typed(name: str, value: Any, default: Any) -> Any:
    """`value` as the kind of its default: lists become tuples, whole numbers may stand for others."""
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        kind = float if default else str
        if all(isinstance(part, kind) for part in value) and len(value) in (len(default) or len(value),):
            return tuple(value)
    elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(default, bool | int | float | str):
        if type(value) is type(default):
            return value
    elif isinstance(value, Mapping):
        return dict(value)
    raise TrainingError(f"{name} is {reprlib.repr(value)}; expected the kind of {default!r}")
