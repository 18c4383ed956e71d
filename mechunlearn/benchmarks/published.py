"""What others have published of TOFU, to show beside a table of one's own: figures as printed, with their source."""

import pandas as pd

from mechunlearn.errors import MechunlearnError

SOURCE = (
    "open-unlearning (github.com/locuslab/open-unlearning), docs/repro.md at commit "
    "7fa0b552e59bd50aef00529b43546865c6f30c7d, read on 1 December 2026"
)
READING = (
    "Other models and other settings: not comparable with the rows above figure by figure. There training took 10 epochs in "
    "batches of 32 at a learning rate of 1e-5, and no method was tuned. Figures are as printed, and came without intervals; "
    "forget truth ratio is the mean of min(R, 1/R)."
)
SPLITS = ("forget01", "forget05", "forget10")
METRICS = ("forget quality", "model utility", "forget truth ratio")
TABLES = {
    "Llama-2-7b-hf-chat": """
        Finetuned   1.27e-03  0.63  0.53  5.87e-14   0.63      0.51      4.35e-25   0.63      0.52
        Retain      1.0       0.63  0.68  1.0        0.63      0.67      1.0        0.61      0.68
        GradAscent  1.88e-04  0.55  0.36  1.94e-119  0.00e+00  8.82e-96  1.06e-239  0.00e+00  2.21e-32
        GradDiff    3.02e-03  0.57  0.41  1.94e-119  0.56      4.14e-95  1.80e-229  0.58      1.46e-07
        IdkDPO      0.1       0.56  0.67  4.02e-06   0.04      0.67      5.42e-13   0.04      0.64
        NPO         0.4       0.58  0.65  0.09       0.53      0.71      0.42       0.54      0.73
        SimNPO      1.27e-03  0.58  0.41  1.06e-106  0.6       3.94e-05  1.47e-198  0.6       3.17e-04
        RMU         0.4       0.62  0.64  9.59e-10   0.02      0.81      6.92e-21   0.03      0.81
    """,
    "Llama-3.2-1B-Instruct": """
        Finetuned   0.01      0.6   0.47  1.33e-13   0.6       0.47      1.66e-21   0.6       0.48
        Retain      1.0       0.60  0.65  1.0        0.6       0.64      1.0        0.59      0.63
        GradAscent  0.27      0.33  0.59  1.94e-119  0         2.52e-23  1.06e-239  0         2.25e-18
        GradDiff    0.77      0.43  0.57  1.94e-119  0.53      3.87e-34  1.06e-239  0.49      3.53e-27
        IdkDPO      0.01      0.51  0.60  1.12e-05   0.07      0.62      4.64e-12   0.23      0.6
        NPO         0.92      0.56  0.66  0.14       0.45      0.7       0.02       0.46      0.7
        SimNPO      0.58      0.46  0.55  5.01e-100  0.58      4.19e-03  2.47e-203  0.54      1.07e-05
        RMU         0.16      0.55  0.70  4.87e-10   0.58      0.77      3.15e-15   0.59      0.76
    """,
}
"""By model: a method a line, and its three metrics for each split in turn."""


def published(forget: str) -> pd.DataFrame:
    """Return what open-unlearning has published of a forget set, as text, as it was printed.

    Args:
        forget: The forget set.

    Returns:
        `model`, `method` and the three `METRICS`; `SOURCE` says where they are from, `READING` how they were made.

    Raises:
        MechunlearnError: There is no such forget set.

    >>> published("forget10").query("method == 'NPO'")["forget quality"].tolist()
    ['0.42', '0.02']
    """
    if forget not in SPLITS:
        raise MechunlearnError(f"There is no forget set '{forget}'. Expected one of {', '.join(SPLITS)}.")
    at = 1 + len(METRICS) * SPLITS.index(forget)
    lines = [(model, line.split()) for model, table in TABLES.items() for line in table.strip().splitlines()]
    rows = [(model, cells[0], *cells[at : at + len(METRICS)]) for model, cells in lines]
    return pd.DataFrame(rows, columns=["model", "method", *METRICS])
