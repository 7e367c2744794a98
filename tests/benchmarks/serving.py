"""The scheduler under several callers: throughput, a lone caller, and time to the first token; ratios from one run.

python tests/benchmarks/serving.py ARTIFACT [--new 128] [--long 1500] [--rounds 3] [--threads 2]

Each row is the best of its rounds, in which the ways that a ratio compares take turns. CPU is the time that all
threads of the process worked: on a machine with other work it says more than the wall clock.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from runtime import load
from runtime.batch import Prompt, generate_many
from runtime.engine import Engine
from runtime.scheduler import Request, Scheduler

Run = Callable[[], object]


def best(runs: dict[str, Run], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of wall and of CPU of each run, the least of `rounds` after a first one that does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (min(wall for wall, _ in times[1:]), min(cpu for _, cpu in times[1:])) for name, times in found.items()
    }


def prompts(engine: Engine, count: int, length: int) -> list[list[int]]:
    return np.random.default_rng(count).integers(3, engine.graph.vocabulary, (count, length)).tolist()


def serve(scheduler: Scheduler, ids: list[list[int]], new: int) -> None:
    for each in ids:
        scheduler.begin(Request(each, new, reuse=False, text=False))
    for _ in scheduler.run():
        pass


def throughput(engine: Engine, new: int, rounds: int, table: Table) -> None:
    """8 callers, a lone one in 8 slots, and one in an engine of one slot."""
    eight, fast, single = Scheduler(engine, 8), Scheduler(engine, 8, exact=False), Scheduler(engine, 1)
    many = prompts(engine, 8, 128)
    lines = [Prompt(line, {}, ids) for line, ids in enumerate(many)]
    found = best(
        {
            "8 callers": lambda: serve(eight, many, new),
            "a file of 8 prompts": lambda: list(generate_many(engine, lines, new, 8)),
            "1 caller in 8 slots": lambda: serve(eight, many[:1], new),
            "the same, not exact": lambda: serve(fast, many[:1], new),
            "1 caller in 1 slot": lambda: serve(single, many[:1], new),
        },
        rounds,
    )
    tokens = {"8 callers": 8, "a file of 8 prompts": 8}
    base = found["1 caller in 1 slot"]
    for name, (wall, cpu) in found.items():
        count = tokens.get(name, 1) * new
        rates = (count / wall) / (new / base[0]), (count / cpu) / (new / base[1])
        table.add_row(name, f"{count / wall:.1f} tokens/s", *(f"{rate:.2f}" for rate in rates))


def first_token(engine: Engine, long: int, rounds: int, table: Table) -> None:
    """The first token of a conversation's second turn: its prompt is `long` tokens, an answer of 32 and 20 new ones."""
    scheduler, ids = Scheduler(engine, 8), prompts(engine, 1, long + 52)[0]
    for _ in collect(scheduler, Request(ids[:long], 32, text=False)):
        pass
    found = best(
        {
            "second turn, computed anew": lambda: collect(scheduler, Request(ids, 1, reuse=False, text=False)),
            "second turn, reused": lambda: collect(scheduler, Request(ids, 1, text=False)),
        },
        rounds,
    )
    base = found["second turn, computed anew"]
    for name, (wall, cpu) in found.items():
        table.add_row(name, f"{wall * 1e3:.0f} ms to a token", f"{wall / base[0]:.2f}", f"{cpu / base[1]:.2f}")


def collect(scheduler: Scheduler, request: Request) -> list[object]:
    scheduler.begin(request)
    return list(scheduler.run())


def waits(engine: Engine, long: int, table: Table) -> None:
    """Beside a running sequence, `long` tokens of a prompt and behind them a short one: who waits how long."""
    base = None
    for name, chunk in (("whole prompts", engine.session.chunk), ("pieces of 128", 128)):
        scheduler, ids = Scheduler(engine, 3, chunk), prompts(engine, 1, long)[0]
        scheduler.begin(Request(ids[:9], long, reuse=False, text=False))
        for _ in range(8):
            scheduler.step()
        scheduler.begin(Request(ids, 1, reuse=False, text=False))
        started = last = time.perf_counter()
        scheduler.step()
        short, gap, answered = scheduler.begin(Request(ids[:9], 1, reuse=False, text=False)), 0.0, 0.0
        while not answered:
            events = scheduler.step()
            now = time.perf_counter()
            gap, last = max(gap, now - last), now
            if any(event.sequence == short for event in events):
                answered = now - started
        base = base or (answered, gap)
        table.add_row(f"{name}: a short prompt", f"{answered * 1e3:.0f} ms to a token", f"{answered / base[0]:.2f}", "")
        table.add_row(f"{name}: one that runs", f"{gap * 1e3:.0f} ms at most", f"{gap / base[1]:.2f}", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    for name, default in (("new", 128), ("long", 1500), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    engine = load(given.artifact, threads=given.threads)
    engine.end_ids = frozenset()  # every sequence has its full length
    table = Table("what", "", "ratio", "ratio of CPU", title=f"{given.artifact}, prompts of 128", title_justify="left")
    throughput(engine, given.new, given.rounds, table)
    table.add_section()
    first_token(engine, given.long, given.rounds, table)
    table.add_section()
    waits(engine, given.long, table)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
