"""Tokens/s with speculation over those without it, and how many guesses were right.

    wm-export onnx doge-3m --out A; the same with --quantize int8 and with --quantize int4
    python tests/benchmarks/speculation.py A B C [--guesses 4 8 16] [--rounds 5] [--threads 1] [--draft DIR]

Texts are held-out files of the standard library. `continued`: a file's beginning is the prompt, and the model writes
on. `sampled`: the same at temperature 0.8. `replayed`: as `continued`, but the answer is the file itself. `edited`: the
prompt is a file, and the answer is the file with a few lines changed. `random`: the answer is random ids.

An answer that is given is forced on the model by a constraint, with and without speculation, since models that are
small or have random weights do not write it. Guesses are made and checked as ever.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np

from runtime import load
from runtime.engine import Engine
from runtime.scheduler import Counters, Request, Scheduler
from runtime.text.sampling import GREEDY, Sampling
from wm_models.training.data import standard_library

PROMPT, NEW = 160, 200
FILES = ("argparse.py", "configparser.py", "shutil.py")  # which the recipe of doge-3m holds out
CHANGED = 12  # one line in so many of an edited file


class Replay:
    """A constraint that allows the given ids alone, one after the other."""

    def __init__(self, ids: list[int], vocabulary: int):
        self.ids, self.at, self.mask = ids, 0, np.zeros(vocabulary, bool)

    def allowed(self) -> np.ndarray:
        self.mask[:] = False
        self.mask[self.ids[self.at]] = True
        return self.mask

    def advance(self, token: int) -> None:
        self.at = min(self.at + 1, len(self.ids) - 1)


@dataclass(frozen=True)
class Task:
    """A prompt, and the answer that is given, if one is."""

    prompt: list[int]
    sampling: Sampling = GREEDY
    answer: list[int] | None = None

    def request(self, vocabulary: int) -> Request:
        constraint = None if self.answer is None else Replay(self.answer, vocabulary)
        most = NEW if self.answer is None else len(self.answer)
        return Request(self.prompt, most, self.sampling, constraint=constraint, text=False)


def edited(text: str) -> str:
    """The text with one line in `CHANGED` another."""
    lines = text.splitlines(keepends=True)
    return "".join(f"# {line.strip()}\n" if index % CHANGED == 5 else line for index, line in enumerate(lines))


def tasks(engine: Engine) -> dict[str, list[Task]]:
    """By name; an end id is no answer of a replay, and is left out."""
    texts = [(standard_library() / name).read_text(encoding="utf-8")[:6000] for name in FILES]
    known = [engine.encode(text) for text in texts]
    draw, vocabulary = np.random.default_rng(0), engine.graph.vocabulary
    room = min(len(ids) for ids in known)
    copied = [text[:800] for text in texts]
    random = [[int(t) for t in draw.integers(3, vocabulary, NEW)] for _ in known]
    ends = engine.end_ids
    assert room > PROMPT + NEW
    return {
        "continued": [Task(ids[:PROMPT]) for ids in known],
        "sampled": [Task(ids[:PROMPT], Sampling(0.8, seed=1)) for ids in known],
        "replayed": [Task(ids[:PROMPT], answer=ids[PROMPT : PROMPT + NEW]) for ids in known],
        "edited": [Task(engine.encode(text), answer=engine.encode(edited(text))[:NEW]) for text in copied],
        "random": [
            Task(ids[:PROMPT], answer=[t for t in answer if t not in ends])
            for ids, answer in zip(known, random, strict=True)
        ],
    }


@dataclass
class Run:
    """Ids, and the wall-clock and processor seconds from the first token to the last."""

    ids: list[int]
    seconds: float
    processor: float
    counters: Counters


def run(engine: Engine, task: Task) -> Run:
    scheduler = Scheduler(engine, 1, engine.session.chunk, prefix_memory=0)
    scheduler.begin(task.request(engine.graph.vocabulary))
    events = list(scheduler.step())  # the prompt, and the first token
    while not events:
        events = scheduler.step()
    began, processor = time.perf_counter(), time.process_time()
    events += scheduler.run()
    ids = [event.token for event in events if event.token is not None]
    return Run(ids, time.perf_counter() - began, time.process_time() - processor, scheduler.counters)


def near(engine: Engine, task: Task, one: list[int], other: list[int]) -> float | None:
    """How far apart the logits of the first two ids that differ are; None where all are equal."""
    for at, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            engine.reset()
            logits = engine.prefill([[*task.prompt, *one[:at]]])[0]
            return abs(float(logits[first] - logits[second]))
    return None


def compare(engine: Engine, by: "str | Engine", guesses: int, each: list[Task], rounds: int) -> str:
    """A row: ordinary tokens/s, their ratio by each clock, acceptance, and answers that differ.

    A round is a run without guesses and one with them. Of each task the shortest runs count: what else the machine
    does only adds time.
    """
    plain_time, ahead_time = np.zeros(2), np.zeros(2)  # seconds of the wall clock and of the processor
    engine.speculate(by, guesses)
    speculation = engine.speculation
    tokens = proposed = accepted = differ = 0
    widest = 0.0
    for task in each:
        plain_runs, ahead_runs = [], []
        for _ in range(rounds):
            engine.speculation = None
            plain_runs.append(run(engine, task))
            engine.speculation = speculation
            ahead_runs.append(run(engine, task))
        plain, ahead = plain_runs[0], ahead_runs[0]
        pace = len(plain.ids) / max(1, len(ahead.ids))
        plain_time += np.min([(one.seconds, one.processor) for one in plain_runs], axis=0)
        ahead_time += np.min([(one.seconds, one.processor) for one in ahead_runs], axis=0) * pace
        tokens += len(plain.ids)
        proposed, accepted = proposed + ahead.counters.proposed, accepted + ahead.counters.accepted
        gap = near(engine, task, plain.ids, ahead.ids)
        differ += gap is not None
        # of a drawn token, logits do not say how near the draw was to another's
        widest = max(widest, gap or 0.0) if task.sampling.greedy else 0.0
    share = f"{accepted / proposed:.0%} of {proposed}" if proposed else "none"
    ties = f"{differ}/{len(each)}" + (f" ({widest:.1e})" if widest else "")
    ratio, processor = plain_time / ahead_time
    return f"{tokens / plain_time[0]:.0f} | {ratio:.2f} | {processor:.2f} | {share} | {ties}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--guesses", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--draft")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    print("| artifact | text | k at most | tokens/s | ratio | of CPU time | right | other answers (logits) |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for path in options.artifacts:
        engine = load(path, threads=options.threads)
        by = "ngram" if options.draft is None else load(options.draft, threads=options.threads)
        for name, each in tasks(engine).items():
            if options.tasks and name not in options.tasks:
                continue
            for guesses in options.guesses:
                row = compare(engine, by, guesses, each, options.rounds)
                print(f"| {engine.artifact.path.name} | {name} | {guesses} | {row} |", flush=True)


if __name__ == "__main__":
    main()
