"""Files that are whole or not there: write beside, then rename."""

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mechunlearn.errors import MechunlearnError

OWNER = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
PART = ".part"
LEFT = re.compile(rf"\..+\.{OWNER}-(\d+)\.\w+{re.escape(PART)}")
_cleared: set[Path] = set()


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a path in a hidden folder for the block to write; the file takes its real place when the block ends well.

    Args:
        path: The file, which is replaced if it exists. Missing folders are made.

    Yields:
        The path to write: a file of the same name, which does not exist yet.

    Raises:
        MechunlearnError: If the disk refuses. Nothing is left behind then, nor after any other exception; what a killed
            process leaves goes when the next one writes into the folder.
    """
    path = Path(path)
    with _hidden(path) as folder:
        beside = folder / path.name
        yield beside
        beside.chmod(0o666 & ~_umask())
        beside.replace(path)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder beside another for the block to fill; it takes its real name when the block ends well.

    Args:
        path: The folder, which must not exist yet or be empty.

    Yields:
        The folder to fill.

    Raises:
        MechunlearnError: If there is something at `path`, or the disk refuses. Nothing is left behind then, nor after
            any other exception; what a killed process leaves goes when the next one writes into the folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MechunlearnError(f"'{path}' exists and is not an empty folder. Give another name, or remove it first.")
    with _hidden(path) as beside:
        yield beside
        beside.chmod(0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        beside.replace(path)


@contextmanager
def _hidden(path: Path) -> Iterator[Path]:
    """A hidden folder beside a path, gone when the block ends; what the disk refuses is one line."""
    beside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear(path.parent)
        made = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.{OWNER}-{os.getpid()}.", suffix=PART)
        beside = Path(made)
        yield beside
    except Exception as error:  # libraries written in Rust raise errors of their own, with the system's number
        if isinstance(error, MechunlearnError) or not (isinstance(error, OSError) or "os error" in str(error)):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise MechunlearnError(f"Could not write '{path}': {reason}. Nothing was left half-written.") from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def writable(path: str | Path) -> None:
    """Raise an error if nothing can be written at a path, before any work is done for it. Nothing is made.

    Args:
        path: The file or folder to write. Missing folders above it are made when it is written.

    Raises:
        MechunlearnError: A folder above it is a file, or files cannot be made there.
    """
    above = Path(path).absolute().parent
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        if not above.is_dir():
            raise NotADirectoryError(20, f"'{above}' is not a folder")
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise MechunlearnError(f"Cannot write '{path}': {error.strerror or error}.") from None


def clear(folder: str | Path) -> None:
    """Remove what killed processes of this machine have left half-written in a folder; once a process and folder.

    Args:
        folder: The folder, which need not exist.
    """
    place = Path(folder).resolve()
    if place in _cleared or not place.is_dir():
        return
    _cleared.add(place)
    import psutil

    for left in place.iterdir():
        owner = LEFT.fullmatch(left.name)
        if owner and not psutil.pid_exists(int(owner[1])):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def data_folder() -> Path:
    """Return the folder of the shipped data: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next(folder for folder in (package / "data", package.parent / "data") if folder.is_dir())


def cache_folder() -> Path:
    """Return the folder of what is made once and kept: `$MECHUNLEARN_CACHE`, else `mechunlearn` in the user's cache."""
    if given := os.environ.get("MECHUNLEARN_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mechunlearn"


def _umask() -> int:
    """The user's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
