"""Errors of requests, in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
"""Status -> type of the error; any other status is a server_error."""


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is answered with an error."""

    status: int
    message: str
    code: str
    param: str | None = None
    """The field that is wrong."""
    retry_after: int | None = None
    """Seconds after which another attempt makes sense; None: the same request will fail again."""

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Tells clients whether to try again; OpenAI's reads `x-should-retry`."""
        if self.retry_after is None:
            return {"x-should-retry": "false"}
        return {"retry-after": str(self.retry_after)}


def wrong(message: str, param: str | None = None, *, code: str = "invalid_value") -> ApiError:
    """A field that is wrong: 400."""
    return ApiError(400, message, code, param)


def to_json(value: Any) -> bytes:
    """JSON in ASCII, so that whatever a client sent can be quoted in an answer."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


OUR_WORDS = {"steps": "num_inference_steps", "negative": "negative_prompt", "label": "classes"}
"""Fields of jobs whose fields of bodies have other names."""


def in_our_words(message: str) -> str:
    """The message of a job's error with the names of the API, without advice for commands and for
    Python in brackets."""

    def kept(found: re.Match[str]) -> str:
        return "" if re.search(r"--|fastdiff |\w\.\w+\(", found[0]) else found[0]

    text = re.sub(r" \((?:[^()]|\([^()]*\))*\)", kept, message)
    return re.sub(r"^(\w+)\b", lambda found: OUR_WORDS.get(found[1], found[1]), text)
