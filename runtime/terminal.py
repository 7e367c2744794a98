"""A conversation in the terminal."""

from dataclasses import dataclass
from typing import Any

from runtime.console import option
from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.scheduler import Request, Scheduler
from runtime.text.sampling import Sampling

LEAVE = "/exit"


@dataclass(frozen=True)
class ChatOptions:
    """What `wm-run chat` can be told."""

    system: str | None = option(None, "A system message to begin with.")
    max_new_tokens: int = option(512, "Most tokens of an answer.")


def talk(engine: Engine, options: ChatOptions, sampling: Sampling) -> None:
    """Read messages from standard input and print the answers as they come, until /exit or the end of the input.

    Ctrl-C ends an answer, or the conversation while it waits for a message. A turn is computed from where the
    conversation was. Raises `RequestError` where the artifact cannot chat.
    """
    scheduler = Scheduler(engine, 1)
    messages: list[dict[str, Any]] = []
    if options.system is not None:
        messages.append({"role": "system", "content": options.system})
    engine.encode_chat([*messages, {"role": "user", "content": ""}])  # or it raises before anybody has typed
    print(f"{LEAVE} leaves, Ctrl-C ends an answer", flush=True)
    while True:
        try:
            said = input("> ")
        except EOFError:
            return
        if said.strip() == LEAVE:
            return
        messages.append({"role": "user", "content": said})
        request = Request(engine.encode_chat(messages), options.max_new_tokens, sampling)
        messages.append({"role": "assistant", "content": _answer(scheduler, request)})


def _answer(scheduler: Scheduler, request: Request) -> str:
    """Print what the request brings; the text as far as it has come."""
    text, number = "", scheduler.begin(request)
    try:
        for event in scheduler.run():
            if event.error is not None:
                raise RequestError(event.error)
            print(event.text, end="", flush=True)
            text += event.text
    except KeyboardInterrupt:
        scheduler.cancel(number)
        list(scheduler.run())
    print(flush=True)
    return text
