"""How often is the status of an edit wrong? Simulates edits, attacks and the word: `python benchmarks/status.py [--edits N]`.

A simulated edit leaves a share r of its facts recoverable. An attack tries some settings on n facts held out: in each, a
recoverable fact is right; of the others some still give the edit target, and the rest guess. Facts that were never taught
guess in the same settings. Guesses are drawn anew in each setting (the hardest case for a best over settings) or once. The
status is that of the package, of attacks that learnt what they trained on.

Prints for each kind of edit and each n: how often "gone" is said though r is .2 (at most .05 is asked), how often "hidden"
though r is 0 (at most .05), how often "hidden" where r is .5, and how often "gone" where r is 0.
"""

import argparse
import sys
from typing import Any

import numpy as np
import pandas as pd

from mechunlearn.evaluation.status import ASKED, judged, status

SIZES = (8, 16, 32, 64, 128, 256)
KINDS = {
    "hard to guess, one attack": {"guess": 0.02},
    "hard to guess, nine attacks": {"guess": 0.02, "attacks": 9},
    "one in four, one attack": {"guess": 0.25},
    "one in four, nine attacks": {"guess": 0.25, "attacks": 9},
    "one in four, no never-taught facts": {"guess": 0.25, "never": False, "attacks": 3},
    "one in four, half give the target": {"guess": 0.25, "target": 0.5, "attacks": 3},
    "one in four, the same guess in all settings": {"guess": 0.25, "attacks": 3, "fresh": False},
    "the truth is avoided": {"guess": 0.25, "avoided": True, "attacks": 3},
    "the truth is avoided, but a part is still said": {"guess": 0.25, "avoided": True, "attacks": 3, "said": True},
    "20 settings": {"guess": 0.1, "settings": 20, "attacks": 3},
    "an attack with a ceiling of .8": {"guess": 0.1, "ceiling": 0.8},
}


def best(right: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """The best setting: the share of facts right, and the share that gives the edit target, there."""
    at = int(right.mean(1).argmax())
    return float(right[at].mean()), float(target[at].mean())


def guesses(rng: np.random.Generator, settings: int, n: int, p: float, fresh: bool) -> np.ndarray:
    drawn = rng.random((settings if fresh else 1, n)) < p
    return np.broadcast_to(drawn, (settings, n))


def row(
    rng: np.random.Generator,
    n: int,
    r: float,
    guess: float,
    settings: int = 5,
    target: float = 0.0,
    never: bool = True,
    fresh: bool = True,
    avoided: bool = False,
    ceiling: float = 1.0,
    **_: object,
) -> dict[str, object]:
    """What one attack finds on one edit."""
    recoverable = (rng.random(n) < r) & (rng.random(n) < ceiling)
    kept = ~recoverable & (rng.random(n) < target)
    lucky = ~recoverable & ~kept & guesses(rng, settings, n, 0.0 if avoided else guess, fresh)
    held_out, told = best(recoverable | lucky, np.broadcast_to(kept, (settings, n)))
    never_taught = best(guesses(rng, settings, n, guess, fresh), np.zeros((settings, n)))[0] if never else float("nan")
    return {
        **{"attack": "relearning", "outcome": "measured", "held_out": held_out, "n": n, "note": "", "trained": 1.0},
        **{"edit_target": told, "chance": guess, "settings": settings, "ceiling": ceiling, "setting": "best"},
        **{
            "never_taught": never_taught,
            "never_n": n if never else 0,
            "floor": max(guess, never_taught if never else 0),
        },
    }


def asked(
    rng: np.random.Generator, n: int, r: float, guess: float, avoided: bool, said: bool, target: float
) -> dict[str, object]:
    """What the edited model says on the training prompt: guesses, and what is still said if it is."""
    p = (0.0 if avoided else guess) * (1 - target)
    right = (rng.random(n) < p) | (said & (rng.random(n) < r))
    return {
        **{
            "attack": ASKED,
            "outcome": "measured",
            "held_out": float(right.mean()),
            "n": n,
            "note": "",
            "chance": guess,
        },
        **{"ceiling": 1.0, "settings": 1, "edit_target": target, "setting": "statement", "floor": guess},
    }


def words(rng: np.random.Generator, edits: int, n: int, r: float, attacks: int = 1, **kind: Any) -> dict[str, float]:
    """How often each word is said."""
    first = {"avoided": False, "said": False, "target": 0.0} | {
        k: kind[k] for k in ("avoided", "said", "target") if k in kind
    }
    said = []
    for _ in range(edits):
        rows = [asked(rng, 2 * n, r, kind["guess"], **first), *(row(rng, n, r, **kind) for _ in range(attacks))]
        said.append(status(judged(pd.DataFrame(rows)))[0])
    return {word: said.count(word) / edits for word in ("gone", "hidden", "inconclusive")}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The worst of all n, the power at n = 32, and the first n at which "gone" is said of four edits in five."""
    rows = []
    for name, cells in table.groupby("edit", sort=False):
        of = cells.set_index("n")
        enough = of.index[of["gone, r = 0"] >= 0.8]
        rows.append(
            {
                "edit": name,
                "said *gone* though r = .2, at most": f"{of['gone, r = .2'].max():.3f}",
                "said *hidden* though r = 0, at most": f"{of['hidden, r = 0'].max():.3f}",
                "*hidden* of r = .5, n = 32": f"{of['hidden, r = .5'][32]:.2f}",
                "*gone* of r = 0 in .8 from n": str(enough[0]) if len(enough) else f"over {of.index[-1]}",
            }
        )
    return pd.DataFrame(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=1000, help="simulated edits a cell")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    rows = []
    for name, kind in KINDS.items():
        for n in SIZES:
            none, some, half = (words(rng, asked.edits, n, r, **kind) for r in (0.0, 0.2, 0.5))
            rows.append((name, n, some["gone"], none["hidden"], half["hidden"], none["gone"]))
            print(*rows[-1], flush=True, file=sys.stderr)
    columns = ["edit", "n", "gone, r = .2", "hidden, r = 0", "hidden, r = .5", "gone, r = 0"]
    table = pd.DataFrame(rows, columns=columns)
    print(table.to_markdown(index=False, floatfmt=".3f"), end="\n\n")
    print(summary(table).to_markdown(index=False, disable_numparse=True))
    slack = 2.33 * (0.05 * 0.95 / asked.edits) ** 0.5  # one cell in a hundred is this far above .05 by chance
    judged_rows = [row for row in rows if "still said" not in row[0]]  # the limit that docs/attacks.md names
    return int(any(gone > 0.05 + slack or hidden > 0.05 + slack for _, _, gone, hidden, _, _ in judged_rows))


if __name__ == "__main__":
    sys.exit(main())
