"""What a person sees: progress while it runs, and at the end a picture, numbers and a sample."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from wm_models.training.data import Document

SAMPLE_PROMPT, SAMPLE_TOKENS = 80, 128  # characters, tokens
DAY = 24 * 3600  # seconds


class Progressing(TrainerCallback):
    """A bar with loss, tokens/s and time left, or on something that is no terminal a line at every log.

    It advances with each part of a step: the rows that every device takes at once. After a second part, of which none
    is compiled any more, it warns of a run that would take more than a day.
    """

    def __init__(self, console: Console, tokens_in_part: int, parts_of_step: int):
        self.console, self.tokens_in_part, self.parts_of_step = console, tokens_in_part, parts_of_step
        self.times: list[float] = []  # seconds of each part so far
        self.done = self.total = 0  # parts, with those before a resume
        self.began, self.loss = 0.0, ""
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), console=console)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done, self.total = (steps * self.parts_of_step for steps in (state.global_step, state.max_steps))
        if self.console.is_terminal:
            self.task = self.bar.add_task("the first part", total=self.total, completed=self.done)
            self.bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.monotonic()  # what was measured or saved before it counts for no step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self.times.append(now - self.began)
        self.began, self.done = now, self.done + 1
        if self.console.is_terminal:
            self.bar.update(self.task, description=self._status(), completed=self.done)
        elif len(self.times) <= 2:
            self.console.print(self._status())
        if len(self.times) == 2 and self.seconds_left() > DAY:
            self.console.print(
                f"warning: at this speed the run takes {duration(self.seconds_left())}; take fewer steps or tokens "
                "(--steps, --sequence-length, --batch-size), a smaller preset, or a GPU"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_substep_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}, "
            if not self.console.is_terminal:
                self.console.print(self._status())
        elif "eval_loss" in logs:
            self.console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.stop()

    def _status(self) -> str:
        step, part = divmod(self.done, self.parts_of_step)
        steps = self.total // self.parts_of_step
        where = f"step {step} of {steps}"
        if part:
            where = f"step {step + 1} of {steps}, part {part} of {self.parts_of_step}"
        return f"{where}: {self.loss}{self.tokens_per_second():,.0f} tokens/s, {duration(self.seconds_left())} left"

    def seconds_of_part(self) -> float:
        """Median of the last 50 parts; the first, which may be compiled, counts only while there is no other."""
        return median(self.times[1:][-50:] or self.times or [math.nan])

    def seconds_left(self) -> float:
        return (self.total - self.done) * self.seconds_of_part()

    def tokens_per_second(self) -> float:
        return self.tokens_in_part / self.seconds_of_part()


def duration(seconds: float) -> str:
    """A time in the unit that suits it, as "45 s", "12 min", "3.4 h" or "5.2 days"."""
    for unit, size, most, digits in (("s", 1, 120, 0), ("min", 60, 7200, 0), ("h", 3600, DAY, 1)):
        if seconds < most:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / DAY:.1f} days"


def bits_per_byte(loss: float, targets: int, size: int) -> float:
    """A mean loss in nats over `targets` predictions, as bits for each of the `size` bytes of UTF-8 that they spell."""
    return loss * targets / math.log(2) / size


def curves(history: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """The losses by step, `loss` of training and `eval_loss` held out."""
    return {key: {entry["step"]: entry[key] for entry in history if key in entry} for key in ("loss", "eval_loss")}


def draw(losses: dict[str, dict[int, float]], path: Path) -> None:
    """The two curves as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        axes.plot(list(losses[key]), list(losses[key].values()), style, label=label, markersize=3, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def text_prompt(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[int]:
    """The tokens of a document's beginning."""
    ids = tokenizer(document.text[:SAMPLE_PROMPT], add_special_tokens=False).input_ids
    begin: Any = tokenizer.bos_token_id
    return ids if begin is None else [begin, *ids]


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], seed: int) -> str:
    """A prompt, and what the model makes of it."""
    length = model.config.max_position_embeddings
    new_tokens = min(SAMPLE_TOKENS, length // 2)
    ids = torch.tensor([list(prompt[: length - new_tokens])])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out: Any = model.generate(ids, max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_p=0.9)  # type: ignore[attr-defined]
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def save_report(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
