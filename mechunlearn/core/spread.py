"""The cells of an experiment: one after another in this process, or each a task of a Ray cluster.

Ray does all scheduling. What work makes, it writes itself, whole and in a folder that all nodes see: nothing that is
finished is lost with a worker or with the process that started the run.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from mechunlearn.errors import MechunlearnError

Item = TypeVar("Item")
Made = TypeVar("Made")
RETRIES = 2
"""How often Ray starts a cell again whose worker died."""
SECONDS = 10
"""How long an address may take to answer."""


@dataclass(frozen=True)
class Ray:
    """Where Ray runs cells, and what each of them is given.

    Attributes:
        address: `local` starts Ray on this machine; `auto` takes the cluster that runs here, or that of `RAY_ADDRESS`;
            else the address of a cluster, `host:port`.
        cpus: Cores of one cell. It computes with as many threads.
        gpus: GPUs of one cell; two cells share one with 0.5.
        memory: GiB of one cell. Ray starts no more cells on a node than fit; it does not stop one that takes more.

    Raises:
        MechunlearnError: A number is out of range.

    >>> Ray("auto", cpus=4, gpus=1)
    Ray(address='auto', cpus=4, gpus=1, memory=0)
    """

    address: str = "local"
    cpus: int = 1
    gpus: float = 0
    memory: float = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.address:
            raise MechunlearnError("No address of Ray is given. Expected local, auto, or host:port.")
        most = {"cpus": (self.cpus, 1, 4096), "gpus": (self.gpus, 0, 64), "memory": (self.memory, 0, 2**20)}
        for name, (given, low, high) in most.items():
            if not low <= given <= high:
                raise MechunlearnError(f"{given} is out of range for {name} of a cell. Expected {low} to {high}.")

    def needs(self) -> dict[str, float]:
        """Return what one cell takes of a node, as Ray names it."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": int(self.memory * 2**30)}
        return {name: number for name, number in wanted.items() if number}


@runtime_checkable
class Spread(Protocol):
    """What `spreading` gives."""

    def __call__(
        self,
        work: Callable[[Item], Made],
        items: Sequence[Item],
        failed: Callable[[Item, str], Made],
    ) -> Iterator[Made]:
        """Yield what the work makes of every item, in their order.

        Args:
            work: Makes it, and may be called again for the same item. On Ray it is sent to the workers.
            items: What is worked on.
            failed: What stands in its place where the work raised an error or its worker died, from the item and the
                reason. It is called in this process.
        """


@contextmanager
def spreading(ray: Ray | None, folder: str | Path) -> Iterator[Spread]:
    """Within the block, spread the work of cells: a plain loop in this process, or tasks of a cluster.

    Results are the same, bit by bit, wherever as many threads compute them. If Ray is connected already, that connection
    is used and left open.

    Args:
        ray: The cluster; None is this process.
        folder: Where the work keeps what it makes, with an `about.json` that every node must see.

    Yields:
        The function that does it, see `Spread`.

    Raises:
        MechunlearnError: Ray is not installed, no cluster answers, no node has what a cell needs, or a node does not see
            the folder.

    >>> with spreading(None, ".") as spread:
    ...     list(spread(lambda cell: f"{1 / cell:g}", [4, 0, 2], lambda cell, reason: reason))
    ['0.25', 'ZeroDivisionError: division by zero', '0.5']
    """
    if ray is None:
        yield _here
        return
    with _connected(ray) as library:
        yield partial(_there, library, ray, Path(folder).resolve())


def _here(work: Callable[[Item], Made], items: Sequence[Item], failed: Callable[[Item, str], Made]) -> Iterator[Made]:
    for item in items:
        try:
            made = work(item)
        except Exception as error:
            made = failed(item, reason_of(error))
        yield made


def _there(
    library: Any,
    ray: Ray,
    folder: Path,
    work: Callable[[Item], Made],
    items: Sequence[Item],
    failed: Callable[[Item, str], Made],
) -> Iterator[Made]:
    needs = ray.needs()
    options = {"num_cpus": ray.cpus, "num_gpus": ray.gpus, "memory": needs.get("memory"), "max_retries": RETRIES}
    task = library.remote(_task).options(**options)
    held = [library.put(work)] if items else []  # in a list: each worker reads it once, not each task
    for item, made in [(item, task.remote(held, item, str(folder), ray.cpus)) for item in items]:
        try:
            how, found = library.get(made)
        except library.exceptions.RayError as error:
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            how, found = "failed", f"the worker died {RETRIES + 1} times: {type(error).__name__}: {first}"
        if how == "unseen":
            raise MechunlearnError(
                f"Node {found} does not see the folder '{folder}'. Give one that all nodes of the cluster share."
            )
        yield found if how == "made" else failed(item, found)


def reason_of(error: Exception) -> str:
    """Return why something failed, as one says it: a user's mistake in its words, others with their type.

    Args:
        error: What was raised.

    >>> reason_of(KeyError("a"))
    "KeyError: 'a'"
    """
    return str(error) if isinstance(error, MechunlearnError) else f"{type(error).__name__}: {error}"


_held: dict[str, Any] = {}
"""In a worker: the work at hand, so that its model is read once a worker and not once a cell."""


def _task(held: list[Any], item: Any, folder: str, threads: int) -> tuple[str, Any]:
    """Do the work of an item in a worker of Ray."""
    if not Path(folder, "about.json").exists():
        return "unseen", socket.gethostname()
    import torch

    torch.set_num_threads(threads)
    try:
        key = held[0].hex()
        if key not in _held:
            _held.clear()
            _held[key] = _ray().get(held[0])
        return "made", _held[key](item)
    except Exception as error:
        return "failed", reason_of(error)


def _ray() -> Any:
    """The package, which nothing else imports. It sends no statistics of use, unless the user has set that."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module("ray")
    except ImportError:
        raise MechunlearnError("Ray is not installed. Run: pip install 'mechunlearn[ray]'.") from None


@contextmanager
def _connected(ray: Ray) -> Iterator[Any]:
    """Ray, connected for the block."""
    library = _ray()
    if library.is_initialized():
        _check_room(library, ray)
        yield library
        return
    _check_address(ray.address)
    settings: dict[str, Any] = {"include_dashboard": False} if ray.address == "local" else {}
    try:
        library.init(address=ray.address, logging_level=logging.ERROR, log_to_driver=False, **settings)
    except Exception as error:  # ConnectionError; RuntimeError where its version or Python's is another
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MechunlearnError(f"No Ray cluster at '{ray.address}': {why} {START}") from None
    try:
        _check_room(library, ray)
        yield library
    finally:
        library.shutdown()


START = "Start one with `ray start --head`, or take local."


def _check_address(address: str) -> None:
    """Raise an error if nothing answers there: Ray itself waits for most of a minute."""
    address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        why = f"{error.strerror or error}" if isinstance(error, OSError) else "that is not host:port"
        raise MechunlearnError(f"No Ray cluster at '{address}': {why}. {START}") from None


def _check_room(library: Any, ray: Ray) -> None:
    """Raise an error if a cell fits on no node: Ray would wait for one for ever."""
    nodes, needs = [node["Resources"] for node in library.nodes() if node["Alive"]], ray.needs()
    if not any(all(node.get(name, 0) >= number for name, number in needs.items()) for node in nodes):
        wanted, there = _told(needs), "; ".join(_told({name: node.get(name, 0) for name in needs}) for node in nodes)
        raise MechunlearnError(f"A cell needs {wanted}, and no node of the cluster has that. The nodes have {there}.")


def _told(resources: dict[str, float]) -> str:
    shown = {
        name: f"{number / 2**30:.3g} GiB" if name == "memory" else f"{number:g} {name}s"
        for name, number in resources.items()
    }
    return ", ".join(shown.values())
