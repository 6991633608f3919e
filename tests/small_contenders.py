"""Contenders of a few lines, in a module that a process of their own imports quickly."""

import os
import time

from benchmarks.side_by_side import Start


def multiplying(factor: int, start: Start) -> None:
    start.wait()
    start.ready({"factor": factor})
    while (order := start.pipe.recv()) is not None:
        if order == "end":
            os._exit(4)
        start.pipe.send(order * factor)


def failing(start: Start) -> None:
    start.wait()
    start.failed(ValueError("no such kernel\nmore about it"))


def dying(start: Start) -> None:
    os._exit(3)


def hanging(start: Start) -> None:
    time.sleep(600)
