"""What a kind of model brings to the server."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastapi import APIRouter


class Door(NamedTuple):
    """Routes of one kind of model.

    Attributes:
        routes: What clients call.
        health: What /health says of them.
        close: What a stop has to end, if anything.
    """

    routes: APIRouter
    health: Mapping[str, Any]
    close: Callable[[], None] | None = None
