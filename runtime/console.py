"""How the commands end: one line on stderr and an exit code, never a traceback unless asked for."""

import os
import sys

import click
import typer


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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
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


def _leave(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
