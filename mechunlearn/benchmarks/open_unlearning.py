"""TOFU results in open-unlearning's files: ours out, theirs in."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mechunlearn.benchmarks.scores import Scores
from mechunlearn.errors import MechunlearnError


class Theirs(NamedTuple):
    """A metric of theirs.

    Attributes:
        split: Our split; empty for the forget set.
        metric: Our metric.
        rows: Our metric that their values by row are, where it is another.
        key: What a row's value is called; empty for a metric that has no rows.
    """

    split: str
    metric: str
    rows: str
    key: str = ""


PROBABILITY, ROUGE, RATIO = "probability", "rouge_l_recall", "truth_ratio"
METRICS = {
    "forget_quality": Theirs("", "forget_quality", ""),
    "model_utility": Theirs("all", "model_utility", ""),
    "forget_Q_A_Prob": Theirs("", PROBABILITY, PROBABILITY, "prob"),
    "forget_Q_A_ROUGE": Theirs("", ROUGE, ROUGE, "rougeL_recall"),
    "forget_truth_ratio": Theirs("", "truth_ratio_closeness", RATIO, "score"),
    "exact_memorization": Theirs("", "exact_memorization", "exact_memorization", "score"),
    "extraction_strength": Theirs("", "extraction_strength", "extraction_strength", "score"),
}
for _short, _split, _end in (
    ("retain", "retain", ""),
    ("ra", "real_authors", "_normalised"),
    ("wf", "world_facts", "_normalised"),
):
    METRICS |= {
        f"{_short}_Q_A_Prob{_end}": Theirs(_split, PROBABILITY, PROBABILITY, "prob"),
        f"{_short}_Q_A_ROUGE": Theirs(_split, ROUGE, ROUGE, "rougeL_recall"),
        f"{_short}_Truth_Ratio": Theirs(_split, "truth_preference", RATIO, "score"),
    }


def to_open_unlearning(scores: Scores, forget: str) -> dict[str, Any]:
    """Return scores as their `TOFU_EVAL.json`: by metric `agg_value`, and `value_by_index` where there are rows.

    Their `forget_truth_ratio` has min(1/R, R) for `agg_value`, as their `closer_to_1_better` has it, and R itself by
    row: a file of a retrained model can be their `retain_logs_path`.

    Args:
        scores: What `tofu.evaluate` returned.
        forget: The forget set.

    >>> scores = Scores("tofu", {("forget01", "probability"): torch.tensor([0.25, 0.75])})
    >>> to_open_unlearning(scores, "forget01")["forget_Q_A_Prob"]
    {'agg_value': 0.5, 'value_by_index': {'0': {'prob': 0.25}, '1': {'prob': 0.75}}}
    """
    found: dict[str, Any] = {}
    for name, theirs in sorted(METRICS.items()):
        at, by_row = (theirs.split or forget, theirs.metric), (theirs.split or forget, theirs.rows)
        if at in scores.figures or at in scores.values:
            found[name] = {"agg_value": scores[at]}
        if at in scores.values and by_row in scores.values:
            values = scores.values[by_row].tolist()
            found[name]["value_by_index"] = {
                str(i): {theirs.key: value if value == value else None} for i, value in enumerate(values)
            }
    return found


def summary(evaluated: dict[str, Any]) -> dict[str, float]:
    """Return their `TOFU_SUMMARY.json` of a `TOFU_EVAL.json`: each metric's `agg_value`.

    Args:
        evaluated: What `to_open_unlearning` returned.

    >>> summary({"forget_quality": {"agg_value": 0.5}})
    {'forget_quality': 0.5}
    """
    return {name: each["agg_value"] for name, each in evaluated.items()}


def from_open_unlearning(path: str | Path, forget: str) -> Scores:
    """Read one of their files, `TOFU_EVAL.json` or `TOFU_SUMMARY.json`, as scores.

    Metrics that are not in TOFU's table here are left out. Where the file has truth ratios by row, both of our figures
    are made of them; a summary's `forget_truth_ratio` is taken as it stands, and newer versions of theirs average
    another function of R there (`aggregator: prob_mean`).

    Args:
        path: The file.
        forget: The forget set that it is about; the files do not say.

    Raises:
        MechunlearnError: It cannot be read, or has none of the metrics.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / "TOFU_SUMMARY.json"
    ...     _ = file.write_text('{"forget_Q_A_Prob": 0.25, "mia_loss": 0.5}')
    ...     from_open_unlearning(file, "forget01")["forget01", "probability"]
    0.25
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        values, figures = {}, {}
        for name, theirs in METRICS.items():
            each = given.get(name)
            if each is None:
                continue
            split = theirs.split or forget
            rows = each.get("value_by_index") if isinstance(each, dict) and theirs.key else None
            if rows:
                read = torch.tensor([_number(row[theirs.key]) for row in rows.values()], dtype=torch.float64)
                values[split, theirs.rows] = read
                if theirs.rows == RATIO:
                    values[split, theirs.metric] = (
                        torch.minimum(read, 1 / read) if split == forget else (1 - read).clamp(min=0)
                    )
            else:
                figures[split, theirs.metric] = float(each["agg_value"] if isinstance(each, dict) else each), 0
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MechunlearnError(
            f"Cannot read '{path}' ({type(error).__name__}: {error}). Expected a TOFU_EVAL.json or TOFU_SUMMARY.json of "
            "open-unlearning."
        ) from None
    if not values and not figures:
        raise MechunlearnError(f"'{path}' has no metric of TOFU. Expected one or more of {', '.join(METRICS)}.")
    return Scores("tofu", values, figures, "Measured by open-unlearning.")


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
