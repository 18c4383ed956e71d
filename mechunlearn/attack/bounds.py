"""How much an attack brought back: the best of its cells, between the floor and the ceiling of the same settings."""

import math

import pandas as pd

from mechunlearn.attack.states import NEVER_TAUGHT, SEARCHED, UNEDITED, Row
from mechunlearn.errors import MechunlearnError

COLUMNS = ("state", "setting", "step", "held_out", "low", "high", "n", "trained", "retain", "chance", "valid")
BEST = ("held_out", "low", "high", "n", "setting", "step", "retain")
NEVER = ("never_taught", "never_low", "never_high", "never_n")
SUMMARY = (
    *("state", "outcome", "recovery", *BEST, "edit_target", "trained", "floor", "ceiling", "chance", *NEVER),
    *("settings", "cells", "collapsed", "below"),
)
ROOM = 0.2


def recovery(rows: pd.DataFrame) -> pd.DataFrame:
    """Return how much an attack got back, by state: the best of its cells that count.

    A cell (setting, step) counts if `valid`. A setting that is valid at no step after 0 (or not at all, if it takes
    no steps) has `collapsed`: it broke the model, and is listed, never counted, not even its step 0.

    recovery = (held_out - floor) / (ceiling - floor)

    The `ceiling` is the unedited model's best cell (if every setting breaks it: what it gives before the first step),
    the `floor` the never-taught facts' best cell, or chance where that is more (or they were not attacked). It is
    below 0 where less comes back than that, and NaN where ceiling - floor < .2. Where rows have a column `group` (ways
    of asking with floors of their own), all this is done in each group, and the group with the largest recovery
    counts. Where they have a `weight` (layers that hold more or less of the knowledge) the weighted mean over settings
    stands for the best. Readings of the residual stream `below` an edit are the unedited model's own: they say nothing
    of the edit, so they are left out of its cells, its floor and its ceiling.

    Args:
        rows: What an attack returns.

    Returns:
        One row a state. `outcome` is "measured", or "collapsed" if every setting has: recovery is then NaN, because a
        collapsed model is not robust; nothing is known of it. `held_out`, with `low`, `high`, `n`, `setting`, `step`
        and `retain`, is the cell with the largest accuracy on facts that the attack saw nothing of (the first of
        equals); its interval is its own, over facts, and does not know that it was the best of several. `trained` is
        the largest accuracy on facts that it trained on, in any cell that counts: if that is far below 1 the attack
        was too weak to tell. `never_taught`, with `never_low`, `never_high` and `never_n`, is the best cell of facts
        that the model was never taught; `settings` is how many there are, `cells` how many with their steps, `below`
        how many were left out because they read below the edit.

    Raises:
        MechunlearnError: For a frame without the columns of an attack.

    >>> cell = {"setting": "full 0.001", "low": 0, "high": 1, "n": 9, "trained": 1, "retain": 1, "chance": 0.25, "valid": True}
    >>> curves = {"edited": (0.0, 0.5), "unedited": (1.0, 1.0), "never taught": (0.0, 0.2)}
    >>> rows = [{"state": s, "step": i, "held_out": y, **cell} for s, curve in curves.items() for i, y in enumerate(curve)]
    >>> found = recovery(pd.DataFrame(rows)).loc["edited"]
    >>> float(found["held_out"]), float(found["floor"]), round(float(found["recovery"]), 3)
    (0.5, 0.25, 0.333)
    """
    missing = [name for name in COLUMNS if name not in rows]
    if missing or rows.empty:
        raise MechunlearnError(
            f"The frame has {len(rows)} rows and lacks {', '.join(missing) or 'no column'}. Expected the rows that an "
            "attack returns."
        )
    rows = rows[rows["state"] != SEARCHED]
    groups = [part for _, part in rows.groupby("group", sort=False)] if "group" in rows else [rows]
    best = []
    for _, found in pd.concat(map(_in_group, groups)).groupby(level=0, sort=False):
        rank = found["recovery"] if found["recovery"].notna().any() else found["held_out"].astype(float)
        best.append(found.iloc[int(rank.fillna(-math.inf).to_numpy().argmax())])
    return pd.DataFrame(best).rename_axis("state")


def _in_group(rows: pd.DataFrame) -> pd.DataFrame:
    found = [_of_state(str(state), rows) for state in rows["state"].unique()]
    return pd.DataFrame(found, columns=list(SUMMARY)).set_index("state")


def _of_state(state: str, rows: pd.DataFrame) -> Row:
    """What came back in one state, between the floor and the ceiling of the same settings."""
    mine = rows[rows["state"] == state]
    out = mine.loc[mine["below"].astype(bool), "setting"].unique() if "below" in mine else ()
    left = rows[~rows["setting"].isin(out)]
    best = _best(state, left[left["state"] == state])
    unedited, never = (left[left["state"] == other] for other in (UNEDITED, NEVER_TAUGHT))
    taught_nothing = _best(NEVER_TAUGHT, never) if len(never) else {}
    ceiling = _best(UNEDITED, unedited).get("held_out", math.nan) if len(unedited) else math.nan
    if len(unedited) and math.isnan(ceiling) and (unedited["step"] > 0).any():
        ceiling = float(unedited.loc[unedited["step"] == 0, "held_out"].max())
    guessed = taught_nothing.get("held_out", math.nan)
    floor = max(best["chance"], guessed) if guessed == guessed else best["chance"]
    about = {"floor": floor, "ceiling": ceiling, "settings": int(left["setting"].nunique()), "below": len(out)}
    about["cells"] = int((left["state"] == state).sum())
    about |= dict(zip(NEVER, (taught_nothing.get(name, math.nan) for name in ("held_out", "low", "high", "n"))))
    back = best.get("held_out", math.nan) - floor
    return best | about | {"recovery": back / (ceiling - floor) if ceiling - floor >= ROOM else math.nan}


def _best(state: str, cells: pd.DataFrame) -> Row:
    """The cell with the largest accuracy on the facts held out, of those that count; or the weighted mean of all."""
    settings = cells["setting"]
    after = (cells["step"] > 0) | (cells.groupby(settings)["step"].transform("max") == 0)
    whole = (cells["valid"] & after).groupby(settings, sort=False).any()
    collapsed = tuple(str(setting) for setting in whole.index[~whole])
    about = {"state": state, "collapsed": collapsed, "chance": float(cells["chance"].iloc[0])}
    if not whole.any():
        return {**about, "outcome": "collapsed"}
    left = cells[cells["valid"] & settings.map(whole)]
    best = dict(left[[name for name in (*BEST, "edit_target") if name in left]].iloc[int(left["held_out"].argmax())])
    if "weight" in left and left["weight"].sum() > 0:
        weight = left["weight"] / left["weight"].sum()
        best |= {name: float((left[name] * weight).sum()) for name in ("held_out", "low", "high", "retain")}
        best["setting"] = "all, weighted"
    return {**about, "outcome": "measured", "trained": left["trained"].max(), **best}
