"""Errors as clients see them: `{"error": "..."}` with the status that fits."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from prime_jax.errors import OverloadedError, PredictorError, WrongAnswerError
from prime_jax.frozen import Frozen
from prime_jax.serve.limits import GONE
from prime_jax.serve.sessions import NoSuchSessionError
from prime_jax.serve.waiting import ClientGoneError


class Fault(Frozen):
    """An error, in plain words."""

    error: str


_NO_JSON = "the body is not valid JSON"
FAULTS: dict[int | str, dict[str, Any]] = {
    400: {"model": Fault, "description": "not JSON"},
    408: {"model": Fault, "description": "the body did not come in time"},
    413: {"model": Fault, "description": "body too large"},
    415: {"model": Fault, "description": "the body is not called JSON, or is compressed"},
    422: {
        "model": Fault,
        "description": "wrong shape or dimension, NaN, no embedding's norm, no text, unknown field",
    },
    503: {"model": Fault, "description": "too many requests are waiting"},
    504: {"model": Fault, "description": "no answer in time"},
}


def answer_errors(app: FastAPI) -> None:
    """Every error as `{"error": "..."}` with the status that fits; nothing of the inside gets out."""

    def fault(status: int, message: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": message}, status, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = error.errors()
        if "json" not in request.headers.get("content-type", "") and "/state" not in request.url.path:
            return fault(415, "send the body with the header 'Content-Type: application/json'")
        if any(one["type"] == "json_invalid" for one in faults):
            return fault(400, _NO_JSON)
        return fault(422, "; ".join(_describe(one) for one in faults[:5]))

    async def refused(_: Request, error: Exception) -> Response:
        if isinstance(error, WrongAnswerError):
            raise error  # logged, and answered with 500
        if isinstance(error, OverloadedError):
            return fault(503, str(error), **{"Retry-After": "1"})
        return fault(404 if isinstance(error, NoSuchSessionError) else 422, str(error))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        unread = error.status_code == 400  # by the framework: too deep, too many digits, no UTF-8
        return fault(error.status_code, _NO_JSON if unread else str(error.detail))

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=GONE)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(PredictorError, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGoneError, gone)


def _describe(fault: Any) -> str:
    """One fault of a body in plain words, without repeating what was sent but the start of a field's name."""
    where = ".".join(str(part) for part in fault["loc"] if part != "body")[:60]
    return f"{where or 'body'}: {fault['msg'].removeprefix('Value error, ')}"
