"""Contenders in processes of their own: started side by side, then asked one at a time.

A contender is a function `serve(*arguments, start)` that runs in its own process. `start` is its `Start`: it
says when the contender may compile, and carries what it tells its parent. Importing frameworks, opening the
device and loading weights overlap; on a GPU those that measure while they compile (XLA picks kernels by
timing them) take turns at that, so that they find the device quiet and each finds what the one before it
compiled in the shared folder of programs.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from prime_jax.progress import progress

_LOADED = "loaded"


class ContenderError(Exception):
    """A contender ended, or did not answer in time; the message says which of the two."""


class Start(NamedTuple):
    """What a contender's process gets.

    Attributes:
        pipe: To the parent.
        alone: Whether it must wait for its turn before it compiles.
    """

    pipe: connection.Connection
    alone: bool

    def wait(self) -> None:
        """Call this once, with everything imported and loaded, before anything is compiled or measured."""
        if self.alone:
            self.pipe.send(("waits", None))
            self.pipe.recv()

    def ready(self, told: Any) -> None:
        """Say that the contender answers orders from now on."""
        self.pipe.send(("ready", told))

    def failed(self, error: Exception) -> None:
        """Say that it never will; the parent reports it and goes on with the others."""
        lines = str(error).strip().splitlines() or [""]
        self.pipe.send(("failed", f"{type(error).__name__}: {lines[-1][:200]}"))


class Entry(NamedTuple):
    """One contender to start: `serve(*arguments, start)`, and whether it compiles while no other does."""

    serve: Callable[..., None]
    arguments: tuple[Any, ...]
    alone: bool = False


class Contender:
    """A contender that is ready, seen from the parent."""

    def __init__(self, process: Any, pipe: connection.Connection, told: Any):
        self._process = process
        self._pipe = pipe
        self.told = told

    def ask(self, order: Any, seconds: float | None = None) -> Any:
        """Send an order and wait for the answer.

        Raises:
            ContenderError: If the process has ended, or needs longer than `seconds`.
        """
        try:
            self._pipe.send(order)
            if not self._pipe.poll(seconds):
                raise ContenderError(f"no answer within {seconds:.0f} s")
            return self._pipe.recv()
        except (EOFError, OSError):
            raise ContenderError(_ended(self._process)) from None

    def end(self) -> None:
        """End its process and those that it started, and free what they hold."""
        if self._process.is_alive():
            kill_tree(self._process.pid)
        self._process.join()


def start(
    entries: Mapping[str, Entry], seconds: float | None = None
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Start all contenders at once and wait until each is ready, has failed, or the time is over.

    Args:
        entries: What to start, by name; those that compile alone do so in this order.
        seconds: After so long those that are not ready are ended; None means never.

    Returns:
        The ready ones in the order of `entries`, and why the others are not.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[connection.Connection, str] = {}
    processes: dict[str, Any] = {}
    for name, entry in entries.items():
        ours, theirs = spawn.Pipe()
        own = Start(theirs, entry.alone)
        processes[name] = spawn.Process(target=entry.serve, args=(*entry.arguments, own), daemon=True)
        with _without_main():
            processes[name].start()
        theirs.close()
        pipes[ours] = name
    ready: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    to_come = [name for name, entry in entries.items() if entry.alone]
    waiting: dict[str, connection.Connection] = {}
    try:
        with progress("Starting", len(entries), "contenders") as step:
            open_pipes = dict(pipes)
            while open_pipes:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                answered: Any = connection.wait(list(open_pipes), left)
                if not answered:
                    break
                for pipe in answered:
                    name = open_pipes[pipe]
                    try:
                        kind, told = pipe.recv()
                    except (EOFError, OSError):
                        kind, told = "failed", _ended(processes[name])
                    if kind == "waits":
                        waiting[name] = pipe
                    else:
                        del open_pipes[pipe]
                        step(1, name)
                        if kind == "ready":
                            ready[name] = Contender(processes[name], pipe, told)
                        else:
                            failed[name] = told
                        if name in to_come:
                            to_come.remove(name)
                    if to_come and to_come[0] in waiting:
                        waiting.pop(to_come[0]).send("go")
    finally:
        for name, process in processes.items():
            if name not in ready:
                if process.is_alive() and name not in failed:
                    kill_tree(process.pid)
                process.join()
    for name in entries:
        if name not in ready:
            failed.setdefault(name, f"not ready within {seconds or 0:.0f} s")
    return {name: ready[name] for name in entries if name in ready}, failed


def peak_memory() -> dict[str, float]:
    """Peak memory of this process so far, in MB; on a GPU that of the device too, as its framework counts it.

    PyTorch is asked where this process runs it on the device: asking JAX would make it take the device too.
    """
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's peak too
    peak = {"host_mb": next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["device_mb"] = torch.cuda.max_memory_reserved() / 2**20
    elif torch is None and "jax" in sys.modules:
        used = sys.modules["jax"].devices()[0].memory_stats()
        if used and "peak_bytes_in_use" in used:
            peak["device_mb"] = used["peak_bytes_in_use"] / 2**20
    return peak


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep new processes from importing this one's main module, which costs seconds and is not needed."""
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {
        name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)
    }
    main.__spec__ = None
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


def _ended(process: Any) -> str:
    process.join(5)
    if process.exitcode == -signal.SIGKILL:
        return "the process was killed; most likely there was too little memory"
    return f"the process ended with exit code {process.exitcode}"


def kill_tree(pid: int) -> None:
    """Kill a process and all its descendants; those that are gone already do not matter."""
    kill_all([pid, *descendants(pid)])


def descendants(pid: int) -> list[int]:
    """The processes that a process started, those that they started, and so on."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after_name = status.read_text().rpartition(")")[2].split()
            children.setdefault(int(after_name[1]), []).append(int(status.parent.name))
    found = list(children.get(pid, []))
    for each in found:  # grows while it is walked
        found += children.get(each, [])
    return found


def kill_all(pids: Sequence[int]) -> None:
    """Kill processes; those that are gone already do not matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
