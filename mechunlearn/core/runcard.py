"""What every artefact carries, so that its numbers can be made again."""

import hashlib
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

LIBRARIES = ("mechunlearn", "torch", "transformers", "transformer-lens")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class RunCard:
    """How an artefact was made: method, model and data hashes, seed, settings, versions, device, time and memory.

    Attributes:
        method: The name of the localizer, editor or attack.
        model: The fingerprint of the model's weights before the method ran.
        data: A hash of the prompts and texts.
        sets: The fingerprints of the forget and the retain set, by name; from the command line also how they were drawn
            (`facts`, `count`, `seed`).
        seed: The seed of everything that was drawn.
        settings: The method's keyword arguments, as JSON can hold them.
        mask: The fingerprint of the mask that an editor was given.
        weights: The number of weights that the mask selects.
        budget: The share of the model's editable weights that these are.
        device: Where the model ran.
        products: The type in which activations were multiplied by weights to train (`training.precision`); empty where
            nothing was trained.
        seconds: Wall time.
        peak_mib: The most memory that the process has held so far, in MiB (see `peak_mib`).
        trajectory: One entry a training step or edited layer: the terms of the loss and what was measured.
        stopped: Why the training ended before its last step.
        search: The settings that were tried for a goal, in order, with what each reached and which was chosen.
        skipped: The facts that were left out because the model did not know them.
        versions: The versions of Python and of the libraries that matter.

    >>> RunCard("random_units", seed=1).seed
    1
    """

    method: str
    model: str = ""
    data: str = ""
    sets: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    mask: str = ""
    weights: int = 0
    budget: float = 0.0
    device: str = "cpu"
    products: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    search: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=_versions)

    def to_json(self) -> str:
        """Return the card as one line of JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)


class Stopwatch:
    """Measure wall time from the moment it is made, and write it on a card.

    >>> Stopwatch().stamp(RunCard("random_units")).peak_mib > 1
    True
    """

    def __init__(self) -> None:
        """Start the watch."""
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds since the watch was made, to a thousandth."""
        return round(time.perf_counter() - self._start, 3)

    def stamp(self, card: RunCard) -> RunCard:
        """Return the card with the time since the watch was made and the peak memory so far.

        Args:
            card: The card of what was timed.
        """
        return replace(card, seconds=self.seconds(), peak_mib=round(peak_mib(), 1))


def peak_mib() -> float:
    """Return the most resident memory that this process has held so far, in MiB.

    On Windows psutil knows the peak (`peak_wset`); on Linux and macOS the system gives it (`ru_maxrss`). Where neither
    does, it is the memory held now.
    """
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return float(memory.peak_wset) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return float(memory.rss) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def digest(*parts: bytes | str | memoryview) -> str:
    """Return a short hash of the parts: 16 hexadecimal digits of SHA-256.

    Args:
        parts: What is hashed, in this order.

    >>> digest("a", "b") == digest("ab")
    False
    """
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
        made.update(b"\0")
    return made.hexdigest()[:16]
