"""Paths that Orbax and TensorStore understand, whatever a user calls a folder.

Orbax lists files by patterns whose folder it does not escape ([, ], *, ?), takes `gs:/` anywhere for a
bucket and drops `..` without looking; TensorStore takes a backslash for a slash and no name that is not
Unicode. What is written to such a path is in part written elsewhere, and is never read again. A symbolic link
with a plain name leads to the same folder.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prime_jax.errors import CheckpointError

_SPECIAL = re.compile(r"[\[\]*?\\]|gs:/|[\ud800-\udfff]")


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """An absolute path to a folder without special characters: its own, or while the block runs a link to it.

    Raises:
        CheckpointError: If it needs a link and there can be none; the message names the characters.
    """
    absolute = folder.absolute()
    special = _special(absolute)
    if special is None:
        yield absolute
        return
    with tempfile.TemporaryDirectory(prefix="prime-jax-") as home:
        link = Path(home) / "folder"
        try:
            link.symlink_to(absolute, target_is_directory=True)
        except OSError as failed:
            raise _unusable(folder, special, f"a link to it cannot be made ({failed})") from None
        if _special(link) is not None:
            raise _unusable(folder, special, f"the temporary folder {home} has such a name, too; set TMPDIR")
        yield link


def relink(path: Path, folder: Path) -> None:
    """Make the link of `plain_path` again where it is gone: what cleans temporary folders goes by age.

    Orbax would make a folder in its place and write there.

    Args:
        path: What `plain_path` gave.
        folder: Where it leads.

    Raises:
        OSError: If the link cannot be made.
    """
    if path == folder.absolute() or (path.exists() and path.samefile(folder)):
        return
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
    if not path.parent.exists():
        path.parent.mkdir(mode=0o700)
    path.symlink_to(folder.absolute(), target_is_directory=True)


def _special(path: Path) -> str | None:
    if ".." in path.parts:
        return ".."
    found = _SPECIAL.search(str(path))
    return None if found is None else found[0]


def _unusable(folder: Path, special: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: checkpoints in a path with {special!r} could not be read again, and {why}; choose "
        "another name"
    )
