"""How often do 95 % intervals of `metrics.stats` miss the truth? Simulated: `python benchmarks/intervals.py [--draws N]`.

Worlds differ by a standard deviation of their own, and so do the seeds within each (nested); or rows and columns of a table
do, and each cell (crossed). The truth is 0. An honest interval misses in .05 of the draws.
"""

import argparse
import sys

import numpy as np
import pandas as pd

from mechunlearn.metrics.stats import over_crossed, over_worlds, paired_interval

WORLDS = (2, 3, 4, 5, 8, 12)
SPREADS = {"worlds alike": 0.0, "worlds as different as seeds": 1.0, "worlds three times as different": 3.0}
CROSSED = {
    "all the rest": (0.0, 0.0),
    "columns differ": (0.0, 1.0),
    "rows differ": (1.0, 0.0),
    "both differ": (1.0, 1.0),
    "both differ a little": (0.3, 0.3),
}
TABLES = ((2, 9), (3, 9), (5, 9), (5, 5), (8, 12), (12, 12))


def missed(low: float, high: float) -> bool:
    return not low <= 0 <= high


def nested(rng: np.random.Generator, draws: int, slow: int) -> list[dict[str, object]]:
    """Five seeds a world: Student's t over worlds, and a bootstrap of their means."""
    rows = []
    for name, spread in SPREADS.items():
        for worlds in WORLDS:
            made = [spread * rng.normal(size=(worlds, 1)) + rng.normal(size=(worlds, 5)) for _ in range(draws)]
            t = np.mean([missed(*over_worlds(list(each))[1:3]) for each in made])
            pairs = np.mean(
                [
                    missed(*paired_interval(each.mean(1), np.zeros(worlds), i, 400)[1:])
                    for i, each in enumerate(made[:slow])
                ]
            )
            rows.append(
                {
                    "worlds": worlds,
                    "kind": name,
                    "t": t,
                    "bootstrap of world means": pairs,
                }
            )
    return rows


def crossed(rng: np.random.Generator, draws: int) -> list[dict[str, object]]:
    """Rows and columns at random: the crossed estimate, and t over rows alone."""
    rows = []
    for name, (by_row, by_column) in CROSSED.items():
        for shape in TABLES:
            made = [
                by_row * rng.normal(size=(shape[0], 1))
                + by_column * rng.normal(size=(1, shape[1]))
                + rng.normal(size=shape)
                for _ in range(draws)
            ]
            both = np.mean([missed(*over_crossed(each)[1:3]) for each in made])
            alone = np.mean([missed(*over_worlds(list(each))[1:3]) for each in made])
            rows.append({"table": f"{shape[0]} x {shape[1]}", "kind": name, "crossed": both, "t over rows": alone})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--slow", type=int, default=400, help="draws of the bootstraps")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    for rows in (nested(rng, asked.draws, asked.slow), crossed(rng, asked.draws)):
        print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3f"), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
