"""Every error a user can cause, under one root, so that `except PredictorError` catches them all.

Messages say what was wrong, where (file, line, row, key) and what to do about it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class PredictorError(Exception):
    """Root of all errors this library raises on purpose; also raised for bad arrays given to a model."""


class CheckpointError(PredictorError):
    """A checkpoint, run folder or bundle is missing, incomplete, damaged or of another version."""


class ConfigError(PredictorError):
    """A setting is unknown, out of bounds, or contradicts another one."""


class DataError(PredictorError):
    """A data file, embedding store or encoder folder is missing, malformed or inconsistent."""


class ExportError(PredictorError):
    """An export could not be written, or its numbers do not agree with the model it came from."""


class OverloadedError(PredictorError):
    """More requests are waiting than a service may keep; the same request may succeed later."""


class WrongAnswerError(PredictorError):
    """The model answered with what is no prediction; a fault of the model, not of the request."""


def first_fault(invalid: "ValidationError", *, within: str | None = None) -> str:
    """The first thing that pydantic found wrong, in one line: where (`within` a section), and what."""
    fault = invalid.errors()[0]
    where = ".".join([*([within] if within else []), *map(str, fault["loc"])])
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
