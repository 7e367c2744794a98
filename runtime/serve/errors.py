"""What a client is told when its request is not met: a status, and an error body as the OpenAI API has them."""

from typing import Any


class ApiError(Exception):
    """An answer with an error. `param`: the argument at fault. `retry_after`: seconds."""

    def __init__(self, status: int, message: str, param: str | None = None, *, code: str | None = None,
                 retry_after: int | None = None):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def busy(waiting: int) -> ApiError:
    return ApiError(
        429, f"{waiting} sequences are under way or wait already; try again", code="queue_full", retry_after=1
    )


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping; send the request to another one", code="stopping", retry_after=5)


def too_late(seconds: float) -> ApiError:
    return ApiError(504, f"the request took longer than its deadline of {seconds:g} s", code="deadline")
