"""The child process's program: run one job on each line of standard input, in little memory and CPU time.

`child.py JOB` writes a line when it is ready. Then it reads JSON objects: `arguments` of the function `answer` of the
module JOB beside this file, and `seconds` of CPU time, past which a signal ends the process. It writes JSON objects:
the answer as `text`, or what was raised as `error`. It imports nothing of this package.
"""

import importlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

MEMORY = 768 << 20  # bytes of address space


def _run(job: Callable[..., str], line: str) -> dict[str, str]:
    given = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, given["seconds"])  # its signal ends the process, whatever the job does
    try:
        return {"text": job(**given["arguments"])}
    except MemoryError:
        return {"error": f"needs more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # a template can raise anything
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return {"error": f"{kind}{error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    job = importlib.import_module(sys.argv[1]).answer
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(job, line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
