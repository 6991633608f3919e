"""One progress bar for everything that takes more than a few seconds; silent when nobody is watching."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


@contextmanager
def progress(title: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs.

    Args:
        title: What is being done, a few words.
        total: How many units there are; None where nobody knows before the end.
        unit: Name of one unit in the plural ("texts", "queries"), for the rate.

    Yields:
        `advance(count, note="")`: move on by `count` units; `note` is shown at the end of the line.
    """
    if not console.is_terminal:
        yield lambda count, note="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, rate="", note="")

        def advance(count: int, note: str = "") -> None:
            speed = bars.tasks[0].speed
            bars.update(task, advance=count, note=note, rate=f"{speed:,.0f} {unit}/s" if speed else "")

        yield advance
