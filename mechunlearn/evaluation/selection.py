"""The rule by which settings are chosen: on forget sets of their own, and without a look at robustness."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

EFFICACY, TRUTH = 0.99, 0.05
QUALIFIES, NONE_QUALIFIES = "qualifies", "none qualifies"
RULE = (
    "of those that reach an efficacy of .99 with at most .05 of the truth left, on the training prompt and on average over "
    f"these sets, the one with the best retention. *{NONE_QUALIFIES.capitalize()}*: the strongest edit was taken instead."
)


def select(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Choose the setting with the best retention among those that edit well enough; no robustness metric is looked at.

    On the mean over validation sets a setting qualifies with efficacy >= .99 and truth <= .05. Ties go to the
    smallest lr, then the smallest weight. If none qualifies, the strongest edit is taken, and `selected` says that
    none qualifies. A setting that diverged on a set is out; sets on which the localizer found nothing do not count.

    Args:
        trials: Rows with lr, forget_weight, share, efficacy, truth and retention, one a validation set and setting.
            Without `share` nothing was found, without `efficacy` the edit diverged.

    Returns:
        `lr`, `forget_weight`, and whether it was `selected` because it qualifies.

    >>> trial = {"lr": 0.001, "forget_weight": 1.0, "share": 0.05, "efficacy": 1.0, "truth": 0.0, "retention": 0.9}
    >>> better, leaky = {"lr": 0.002, "retention": 0.95}, {"lr": 0.003, "retention": 1.0, "truth": 0.1}
    >>> select([trial, trial | better, trial | leaky])
    {'lr': 0.002, 'forget_weight': 1.0, 'selected': 'qualifies'}
    """
    measured = ["efficacy", "truth", "retention"]
    frame = pd.DataFrame(list(trials)).reindex(columns=["lr", "forget_weight", "share", *measured]).astype(float)
    settings = frame[frame["share"].notna()].groupby(["lr", "forget_weight"])[measured]
    means = settings.mean()[settings.count().eq(settings.size(), axis=0).all(axis=1)].round(9)
    if means.empty:
        return {"lr": None, "forget_weight": None, "selected": NONE_QUALIFIES}
    good = means[(means["efficacy"] >= EFFICACY) & (means["truth"] <= TRUTH)]
    best: Any = means["efficacy"].idxmax() if good.empty else good["retention"].idxmax()
    selected = NONE_QUALIFIES if good.empty else QUALIFIES
    return {"lr": float(best[0]), "forget_weight": float(best[1]), "selected": selected}
