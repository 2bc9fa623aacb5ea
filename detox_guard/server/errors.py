"""What went wrong, as OpenAI's clients read it. Knows our errors and HTTP's numbers; tells no path, stack or secret."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from detox_guard.errors import (
    DetoxGuardError,
    EngineBusyError,
    EngineClosedError,
    GuardError,
    InvalidParamsError,
    PromptError,
    PromptTooLongError,
    ScorerError,
    StepError,
)
from detox_guard.settings import GuardPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ApiError", "Json", "api_error", "error_response", "json_text", "validation_error"]

_OURS = {
    "max_new_tokens": "max_tokens",
    **{name: f"detox.{name}" for name in ("alpha", "calm_share", "rule", "plausibility")},
    **{name: f"detox.guard.{name}" for name in GuardPolicy.model_fields},
}
"""Fields that a request calls otherwise."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_RETRY = {"Retry-After": "1"}


def json_text(content: Any) -> str:
    """JSON in which half a character, as clients and models may write one, does no harm."""
    told = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return told.encode("utf-8", "replace").decode()


class Json(JSONResponse):
    """An answer in the server's way of writing JSON."""

    def render(self, content: Any) -> bytes:
        """Bytes of UTF-8."""
        return json_text(content).encode()


class ApiError(HTTPException):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        kind = _TYPES.get(self.status_code) or ("server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """What a client is told of any error. What may hold more than the client's own words is told by its kind alone."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case PromptTooLongError():
            return ApiError(400, _told(error), "context_length_exceeded", param="messages")
        case InvalidParamsError(field="audit_log"):
            return ApiError(503, "The guard's log cannot be written, so nothing is decoded.", "audit_log_failed")
        case InvalidParamsError() | PromptError():
            return ApiError(400, _told(error), "invalid_value", param=_OURS.get(error.field, error.field))
        case EngineBusyError():
            return ApiError(429, "All seats are taken and the queue is full. Try again soon.", "busy", headers=_RETRY)
        case EngineClosedError():
            return ApiError(503, "The model is being taken down. Try again soon.", "unavailable", headers=_RETRY)
        case GuardError():
            return ApiError(400, "The guard let no reply through.", "content_filter")
        case ScorerError():
            return ApiError(503, "The guard's scorer failed, so nothing is released.", "scorer_failed")
        case StepError():
            return ApiError(500, "The model could not be decoded.", "engine_failed")
        case DetoxGuardError():
            return ApiError(500, f"The request failed ({type(error).__name__}).", "request_failed")
    return ApiError(500, "The server failed.", "internal_error")


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first complaint about a request's body. The value is not repeated: it may be long, and may be a secret."""
    first = errors[0] if errors else {"loc": (), "msg": "not a request", "type": ""}
    where = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: not a parameter here.", "unknown_parameter", param=param)
    if first["type"] == "json_invalid":
        return ApiError(400, "The request is no JSON.", "invalid_json")
    return ApiError(400, f"{param or 'request'}: {first['msg']}", "invalid_value", param=param)


def error_response(error: Exception) -> Json:
    """The whole answer."""
    told = api_error(error)
    return Json(told.body, told.status_code, told.headers)


def _told(error: DetoxGuardError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)
