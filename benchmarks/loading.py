"""What it costs to have a model and its facts at hand: `python benchmarks/loading.py`.

The shipped model without and with the bridge of transformer_lens, and a world's facts the first time and again; side by side, in turn.
"""

import statistics
import time
from collections.abc import Callable

from mechunlearn import load_facts, load_model
from mechunlearn.facts.load import _asked, _world

ROUNDS = 15


def first_facts() -> None:
    _asked.cache_clear()
    _world.cache_clear()
    load_facts("factworld/sport")


CASES: dict[str, Callable[[], object]] = {
    "model": lambda: load_model("factworld"),
    "model and bridge": lambda: load_model("factworld").bridge,
    "facts, the first time": first_facts,
    "facts, again": lambda: load_facts("factworld/sport"),
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for round in range(ROUNDS + 1):
        for name, case in CASES.items():
            began = time.perf_counter()
            case()
            if round:  # the first one imports
                seconds[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"{name:22s} {1000 * middle[name]:7.1f} ms ({1000 * min(times):.1f} to {1000 * max(times):.1f})")
    print(f"the bridge: {middle['model and bridge'] / middle['model']:.1f} times as long")


if __name__ == "__main__":
    main()
