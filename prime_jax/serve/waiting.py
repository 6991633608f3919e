"""Waiting for an answer no longer than its client does."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client hung up before its answer was ready."""


async def in_time(request: Request, work: Awaitable[T], seconds: float) -> T:
    """The result of `work`; where time is up (504) or the client hangs up, the work is cancelled."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hangs_up(request))
    try:
        done, _ = await asyncio.wait((doing, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing in done:
            return doing.result()
        if leaving in done:
            raise ClientGoneError
        raise HTTPException(504, f"no answer within {seconds:g} s")
    finally:
        doing.cancel()
        leaving.cancel()


async def _hangs_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
