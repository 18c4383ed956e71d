"""Files that are whole or not there: write beside, then rename."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mechunlearn.errors import MechunlearnError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a path beside a file for the block to write; the file takes its real name when the block ends well.

    Args:
        path: The file, which is replaced if it exists. Missing folders are made.

    Yields:
        The path to write.

    Raises:
        MechunlearnError: If the disk refuses. Nothing is left behind then, nor after any other exception.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise _refused(path, error) from None
    beside = Path(name)
    try:
        yield beside
        beside.chmod(0o644)
        beside.replace(path)
    except OSError as error:
        raise _refused(path, error) from None
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder beside another for the block to fill; it takes its real name when the block ends well.

    Args:
        path: The folder, which must not exist yet or be empty.

    Yields:
        The folder to fill.

    Raises:
        MechunlearnError: If there is something at `path`, or the disk refuses. Nothing is left behind then, nor after
            any other exception.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MechunlearnError(f"'{path}' exists and is not an empty folder. Give another name, or remove it first.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise _refused(path, error) from None
    try:
        yield beside
        beside.chmod(0o755)
        if path.exists():
            path.rmdir()
        beside.replace(path)
    except OSError as error:
        raise _refused(path, error) from None
    finally:
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


def _refused(path: Path, error: OSError) -> MechunlearnError:
    return MechunlearnError(f"Could not write '{path}': {error.strerror or error}. Nothing was left half-written.")
