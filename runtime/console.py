"""The command lines: options that dataclasses declare, and how a command ends.

A command ends with one line on stderr and an exit code. It shows a traceback only with `--debug`.
"""

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from importlib.metadata import version
from typing import Annotated, Any, TypeVar, get_type_hints

import click
import rich.progress
import typer
from rich.console import Console

from runtime.options import option as option

T = TypeVar("T")
DELAY = INTERVAL = 5.0  # seconds before progress shows, and between two lines of it where stderr is no terminal


def command(
    app: typer.Typer, name: str | None = None, *, no_args_is_help: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command. A parameter that is a dataclass becomes one option for each `option` field.

    `no_args_is_help`: whether the command shows its help where nothing is given.
    """

    def register(run: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(run, include_extras=True)
        groups: dict[str, tuple[type, list[str]]] = {}
        parameters = []
        for parameter in inspect.signature(run).parameters.values():
            kind = hints[parameter.name]
            if not is_dataclass(kind):
                parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            declared = [each for each in fields(kind) if "help" in each.metadata]
            groups[parameter.name] = kind, [each.name for each in declared]  # type: ignore[assignment]
            types = get_type_hints(kind)
            parameters += [_parameter(each, types[each.name]) for each in declared]

        @wraps(run)
        def flat(**values: Any) -> None:
            made = {key: kind(**{name: values.pop(name) for name in names}) for key, (kind, names) in groups.items()}
            run(**values, **made)

        signature = inspect.Signature(sorted(parameters, key=lambda each: each.default is not inspect.Parameter.empty))
        flat.__signature__ = signature  # type: ignore[attr-defined]
        flat.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(name, no_args_is_help=no_args_is_help)(flat)
        return run

    return register


def _parameter(declared: Field[Any], kind: Any) -> inspect.Parameter:
    flag = declared.metadata["flag"]
    annotation = Annotated[kind, typer.Option(*([flag] if flag else []), help=declared.metadata["help"])]
    default = declared.default if declared.default_factory is MISSING else declared.default_factory()
    return inspect.Parameter(declared.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


class Progress:
    """How far work is that takes over `DELAY` seconds: a bar with the time left where stderr is a terminal, else lines.

    Nothing where it is not to be `shown`.
    """

    def __init__(self, name: str, shown: bool = True) -> None:
        console = Console(stderr=True)
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self._bar = rich.progress.Progress(
            *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
        )
        self._task = self._bar.add_task(name, total=None, visible=False)
        self._lines = shown and not console.is_terminal
        self._name, self._done, self._total = name, 0, 0
        self._started = self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.stop()

    def expect(self, units: int) -> None:
        """So many units of work are ahead, besides those that were expected before."""
        self._total += units
        self._bar.update(self._task, total=self._total)

    def advance(self) -> None:
        """One unit of work is done."""
        self._done, now = self._done + 1, time.monotonic()
        self._bar.update(self._task, advance=1, visible=now - self._started > DELAY)
        if self._lines and now - self._said > INTERVAL:
            self._said = now
            print(progress_line(self._name, now - self._started, self._done, self._total), file=sys.stderr, flush=True)

    def track(self, units: Iterable[T]) -> Iterator[T]:
        """The same units of work; one is done when the next is asked for."""
        for unit in units:
            yield unit
            self.advance()


def progress_line(name: str, seconds: float, done: float, total: float | None) -> str:
    """What is at work for how long and, where its `total` is known, the share that is `done` and the time left."""
    line = f"{name}: {seconds:.0f} s"
    if total:
        line += f", {done / total:.0%}"
    if total and done:
        line += f", {seconds * (total - done) / done:.0f} s left"
    return line


def answered(flag: str, help: str, answer: Callable[[], str]) -> Any:
    """An option that prints its answer and ends the command, whatever else was given."""

    def show(given: bool) -> None:
        if given:
            print(answer())
            raise typer.Exit

    return typer.Option(flag, is_eager=True, help=help, callback=show)


# A parameter of every command line: Version = False
Version = Annotated[
    bool, answered("--version", "Show the version and exit.", lambda: f"wm-models {version('wm-models')}")
]


def run(app: typer.Typer, name: str, failures: tuple[type[Exception], ...] = ()) -> None:
    """Run a command line and leave the process.

    Exit code 2 for a request that cannot be met (usage, ValueError, OSError), 1 for one of `failures`, 130 after
    Ctrl-C. `--debug` anywhere shows the traceback.
    """
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = typer.main.get_command(app).main(arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_unread()
    except SystemExit:
        if type(sys.stdout).__name__ != "PacifyFlushWrapper":  # how click ends where nobody reads what it prints
            raise
        _leave_unread()
    except (KeyboardInterrupt, click.exceptions.Abort, EOFError):
        _leave(f"{name}: stopped", 130)
    except Exception as error:
        if debug:
            raise
        usage = type(error).__module__.startswith(("click", "typer"))  # typer may carry its own click
        if usage:
            message = getattr(error, "format_message", lambda: "")()
            if type(error).__name__ == "NoArgsIsHelpError":
                print(message, file=sys.stderr)
                sys.exit(2)
            _leave(f"{name}: error: {message} (see {name} --help)", 2)
        if isinstance(error, failures):
            _leave(f"{name}: failed: {error}", 1)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            _leave(f"{name}: error: {where}{error.strerror or error}", 2)
        if isinstance(error, ValueError):
            _leave(f"{name}: error: {error}", 2)
        _leave(f"{name}: unexpected {type(error).__name__}: {error} (--debug shows where)", 1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _leave_unread() -> None:
    """End well where the reader of the output has gone, which is how `| head` ends."""
    sys.stdout = sys.__stdout__
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(0)


def _leave(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
