"""What a person sees: progress while it runs, and at the end a picture, numbers and a sample."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from wm_models.training.data import Document

SAMPLE_PROMPT, SAMPLE_TOKENS = 80, 128  # characters, tokens


class Progressing(TrainerCallback):
    """A bar with loss, tokens/s and time left, or on something that is no terminal a line at every log."""

    def __init__(self, console: Console, tokens_a_step: int):
        self.console, self.tokens_a_step = console, tokens_a_step
        self.ends: list[tuple[int, float]] = []  # steps taken, and when
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends = [(state.global_step, time.monotonic())]
        if self.console.is_terminal:
            self.task = self.bar.add_task("compiling", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append((state.global_step, time.monotonic()))
        if self.console.is_terminal:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            text = f"loss {logs['loss']:.4f}, {self.tokens_per_second():,.0f} tokens/s"
            if self.console.is_terminal:
                self.bar.update(self.task, description=text)
            else:
                left = (state.max_steps - state.global_step) * self.seconds_a_step()
                self.console.print(f"step {state.global_step} of {state.max_steps}: {text}, {left:,.0f} s left")
        elif "eval_loss" in logs:
            self.console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.stop()

    def seconds_a_step(self) -> float:
        """Median of the last 50 steps, so that compiling and evaluating do not count."""
        times = [after[1] - before[1] for before, after in zip(self.ends, self.ends[1:], strict=False)]
        recent = sorted(times[1:][-50:] or times)
        return recent[len(recent) // 2] if recent else math.nan

    def tokens_per_second(self) -> float:
        return self.tokens_a_step / self.seconds_a_step()


def bits_per_byte(loss: float, targets: int, documents: Sequence[Document]) -> float:
    """A mean loss in nats over `targets` predictions, as bits for each byte of the UTF-8 text they spell."""
    size = sum(len(document.text.encode()) for document in documents)
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


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, document: Document, seed: int) -> str:
    """The beginning of a document, and what the model makes of it."""
    ids = tokenizer(document.text[:SAMPLE_PROMPT], return_tensors="pt", add_special_tokens=False).input_ids
    begin = tokenizer.bos_token_id
    if begin is not None:
        ids = torch.cat([torch.tensor([[begin]]), ids], dim=1)
    length = model.config.max_position_embeddings
    new_tokens = min(SAMPLE_TOKENS, length // 2)
    ids = ids[:, : length - new_tokens]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out: Any = model.generate(ids, max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_p=0.9)  # type: ignore[attr-defined]
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def save_report(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
