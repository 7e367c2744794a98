"""Run tasks of lm-evaluation-harness on an engine, and show what they measured."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.options import option


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure."""

    tasks: list[str] = option([], "A task of lm-evaluation-harness, by name; may be repeated.")
    include: Path | None = option(None, "A folder with task files (YAML) of your own; nothing else is looked up then.")
    limit: int | None = option(None, "Documents of each task. Default: all.")
    few_shot: int | None = option(None, "Examples before each question. Default: the task's own.")
    slots: int | None = option(None, "Sequences under way at once. Default: all the artifact has.")
    as_json: bool = option(False, "Print JSON instead of a table.", flag="--json")

    def __post_init__(self) -> None:
        if not self.tasks:
            raise RequestError("expected --tasks NAME, once or more")
        if self.include is not None and not self.include.is_dir():
            raise RequestError(f"--include is {self.include}; expected a folder of task files")
        for name, value, least in (("--limit", self.limit, 1), ("--few-shot", self.few_shot, 0)):
            if value is not None and value < least:
                raise RequestError(f"{name} is {value}; expected {least} or more")


def evaluate(engine: Engine, options: EvaluateOptions) -> dict[str, dict[str, Any]]:
    """Each task's metrics by name, as lm-eval reports them. Raises `RequestError` where a task is not to be had.

    Without `include` lm-eval loads its own tasks' data from a hub.
    """
    if find_spec("lm_eval") is None:
        raise RequestError("lm-eval is not installed; install it with pip install 'wm-models[eval]'")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from runtime.evaluation.harness import EngineLM

    manager = TaskManager(
        include_path=None if options.include is None else str(options.include),
        include_defaults=options.include is None,
    )
    if unknown := [name for name in options.tasks if name not in manager.all_tasks]:
        raise RequestError(f"--tasks: lm-eval knows no {', '.join(unknown)}; name its tasks, or --include your own")
    found = simple_evaluate(
        EngineLM(engine, options.slots),
        tasks=list(options.tasks),
        num_fewshot=options.few_shot,
        limit=options.limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        torch_random_seed=None,  # type: ignore[arg-type]
    )
    assert found is not None
    return {name: dict(values) for name, values in (found.get("results") or {}).items()}


def metric_rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Task, metric and value of every number that was measured."""
    return [
        (task, metric.removesuffix(",none"), f"{value:.4g}")
        for task, values in results.items()
        for metric, value in values.items()
        if isinstance(value, float) and not metric.partition(",")[0].endswith("_stderr")
    ]
