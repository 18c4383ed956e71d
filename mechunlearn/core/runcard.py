"""What every artefact carries, so that its numbers can be made again."""

import hashlib
import json
import platform
import resource
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

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

    `seconds` is wall time, `peak_mib` the process's peak resident memory in MiB. `trajectory` has one entry a training
    step or edited layer (its terms, and what was measured on the way); `stopped` says why it ended before its last step;
    `skipped` lists the facts that were left out because the model did not know them.

    >>> RunCard("random_units", seed=1).seed
    1
    """

    method: str
    model: str = ""
    data: str = ""
    seed: int = 0
    settings: dict = field(default_factory=dict)
    mask: str = ""
    weights: int = 0
    budget: float = 0.0
    device: str = "cpu"
    seconds: float = 0.0
    peak_mib: float = 0.0
    trajectory: list[dict] = field(default_factory=list)
    stopped: str = ""
    skipped: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=_versions)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "RunCard":
        return cls(**json.loads(text))


class Stopwatch:
    """Wall time since it was made, and the peak memory so far, to write on a card."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)

    def stamp(self, card: RunCard) -> RunCard:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return replace(card, seconds=self.seconds(), peak_mib=round(peak, 1))


def digest(*parts: bytes | str | memoryview) -> str:
    """A short hash of the parts, in order."""
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
        made.update(b"\0")
    return made.hexdigest()[:16]
