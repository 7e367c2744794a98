"""Files of prompts of any size, answered by several engines through Ray Data.

A source is cut into parts: 512 lines of a JSONL file, a row group of a Parquet file. An actor with one engine answers a
part and writes it to a file of its own, so neither prompts nor answers travel. The files keep the types of what they
came from, which Ray's own readers of JSON guess.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from runtime.backends.registry import AUTO
from runtime.batch import generate_each, generate_file
from runtime.engine import load
from runtime.errors import RequestError
from runtime.prompts import ANSWERS, MARK, Prompt, check_prompt, parse_prompt
from runtime.serve.ray import send_no_usage
from runtime.text.sampling import GREEDY, Sampling
from runtime.text.tokenizer import decode

LINES = 512  # of a JSONL file in a part, and rows of a Parquet file under way at once
SCHEMA = pa.schema(
    [("line", pa.int64()), ("new_ids", pa.list_(pa.int64())), ("text", pa.string()), ("error", pa.string())]
)


@dataclass(frozen=True)
class DatasetOptions:
    """How a dataset is generated.

    `max_new_tokens`: a prompt's most. `replicas`: engines at once, each in a process with `cpus` threads and `gpus`
    devices, which Ray reserves. `slots`: prompts under way at once in each, None for all that the artifact has.
    """

    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    replicas: int = 1
    slots: int | None = None
    cpus: int = 1
    gpus: float = 0
    backend: str = AUTO


def generate_dataset(artifact: Path, source: Path, out: Path, options: DatasetOptions | None = None) -> int:
    """Continue the prompts of `source`, a `.jsonl` or `.parquet` file, into files in the directory `out`.

    Returns the number of files, `part-00000.jsonl` and so on. Their lines are those that `wm-run generate --prompts`
    writes: a prompt's draws depend on its line and the seed alone. A row of Parquet gets the columns `line` (from 0),
    `new_ids`, `text` and `error`. What `out` has of an earlier run is not done again. Every machine of the Ray cluster
    must see the paths; without a cluster Ray starts one on this machine. Raises `RequestError` for a source that is
    empty or of another kind.
    """
    options = options or DatasetOptions()
    send_no_usage()
    parts = list(_parts(source))
    if not parts:
        raise RequestError(f"{source}: is empty; expected prompts")
    out.mkdir(parents=True, exist_ok=True)
    done = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        PartGenerator,
        fn_constructor_args=(artifact.resolve(), source.resolve(), out.resolve(), options),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=options.replicas),
        num_cpus=options.cpus,
        num_gpus=options.gpus,
    )
    return sum(1 for _ in done.iter_rows())


class PartGenerator:
    """An actor with one engine. A call answers the parts of a batch and returns it."""

    def __init__(self, artifact: Path, source: Path, out: Path, options: DatasetOptions):
        self._engine = load(artifact, options.backend, threads=options.cpus)
        self._engine.check_task(classifies=False)
        self._slots = options.slots or self._engine.graph.max_batch
        self._source, self._out, self._options = source, out, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number, line, start, size in zip(*(batch[name].tolist() for name in PART), strict=True):
            if self._source.suffix == ".parquet":
                self._generate_rows(number, line)
            else:
                self._generate_lines(number, line, start, size)
        return batch

    def _generate_lines(self, number: int, line: int, start: int, size: int) -> None:
        with self._source.open("rb") as stream:
            stream.seek(start)
            data = stream.read(size)
        lines = enumerate(data.split(b"\n"), line)
        prompts = [parse_prompt(self._engine, index, text) for index, text in lines if text.strip()]
        path = self._out / f"part-{number:05d}.jsonl"
        path.touch()  # a part of blank lines has a file too
        for _ in generate_file(
            self._engine, prompts, path, self._options.max_new_tokens, self._slots, self._options.sampling
        ):
            pass

    def _generate_rows(self, number: int, line: int) -> None:
        path = self._out / f"part-{number:05d}.parquet"
        if path.exists():
            return
        unfinished = path.with_suffix(".unfinished")
        with pq.ParquetFile(self._source) as file:
            schema = pa.schema([*file.schema_arrow, *SCHEMA])
            with pq.ParquetWriter(unfinished, schema) as writer:
                for rows in file.iter_batches(LINES, row_groups=[number]):
                    answers = pa.Table.from_pylist(self._answers(rows.to_pylist(), line), SCHEMA)
                    table = pa.Table.from_batches([rows])
                    writer.write_table(pa.table([*table.columns, *answers.columns], schema=schema))
                    line += rows.num_rows
        unfinished.replace(path)

    def _answers(self, rows: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
        """A row of `SCHEMA` for each row, of which the first is number `first`."""
        prompts = []
        for line, row in enumerate(rows, first):
            given = {name: value for name, value in row.items() if value is not None}
            prompts.append(check_prompt(self._engine, Prompt(line, given, [])))
        answers: list[dict[str, Any]] = [{"line": prompt.line, "error": prompt.error} for prompt in prompts]
        sound = [prompt for prompt in prompts if prompt.error is None]
        options, tokenizer = self._options, self._engine.tokenizer
        for prompt, new, error in generate_each(
            self._engine, sound, options.max_new_tokens, self._slots, options.sampling
        ):
            if error is not None:
                answers[prompt.line - first]["error"] = error
                continue
            answers[prompt.line - first]["new_ids"] = new
            answers[prompt.line - first]["text"] = None if tokenizer is None else decode(tokenizer, new)
        return answers


PART = ("number", "line", "start", "size")


def _parts(source: Path) -> Iterator[dict[str, int]]:
    """Each part's number, its first line, and where it is in a JSONL file: its first byte and how many it has."""
    if source.suffix == ".parquet":
        yield from _row_groups(source)
    elif source.suffix == ".jsonl":
        yield from _line_ranges(source)
    else:
        raise RequestError(f"{source}: expected a file with the suffix .jsonl or .parquet")


def _row_groups(source: Path) -> Iterator[dict[str, int]]:
    with pq.ParquetFile(source) as file:
        if taken := sorted({*ANSWERS["prompt"], "error"} & set(file.schema_arrow.names)):
            raise RequestError(f"{source}: has the column {taken[0]}, which is what an answer adds; rename it")
        line = 0
        for number in range(file.num_row_groups):
            yield dict(zip(PART, (number, line, 0, 0), strict=True))
            line += file.metadata.row_group(number).num_rows


def _line_ranges(source: Path) -> Iterator[dict[str, int]]:
    with source.open("rb") as stream:
        start = len(MARK) if stream.read(len(MARK)) == MARK else 0
        stream.seek(start)
        size = line = number = 0
        for count, data in enumerate(stream, 1):
            size += len(data)
            if count % LINES == 0:
                yield dict(zip(PART, (number, line, start, size), strict=True))
                start, size, line, number = start + size, 0, count, number + 1
        if size:
            yield dict(zip(PART, (number, line, start, size), strict=True))
