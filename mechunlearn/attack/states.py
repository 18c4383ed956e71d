"""What all attacks share: the states that are attacked, the rows they return, and how much came back."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.runcard import RunCard, Stopwatch, digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.hooked import HookedModel

EDITED, UNEDITED, NEVER_TAUGHT = "edited", "unedited", "never taught"
GATE = 0.9
COLUMNS = ("state", "setting", "step", "held out", "low", "high", "n", "trained", "retain", "chance", "valid")
BEST = ("held out", "low", "high", "n", "setting", "step", "retain")
SUMMARY = ("state", "outcome", "recovery", *BEST, "trained", "floor", "ceiling", "chance", "collapsed")
ROOM = 0.2


@dataclass(frozen=True)
class State:
    """One thing that is attacked: a model, the edit that is applied to it, and the facts that are to come back."""

    name: str
    model: HookedModel
    edit: Edit | None
    facts: Prompts

    @contextmanager
    def applied(self) -> Iterator[HookedModel]:
        """Within the block the model is edited."""
        with self.edit.applied(self.model) if self.edit is not None else nullcontext():
            yield self.model


def states_to_attack(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    seed: int = 0,
) -> list[State]:
    """What an attack is tried on: the edited model, the unedited one (ceiling), never-taught facts (floor), what is beside.

    Without an edit there are ceiling and floor alone. Never-taught facts are as many of `forget.facts.untaught` as there are forget facts, drawn by `seed`, in the same format, on the
    unedited model; without such facts there is no such state. Raises `MechunlearnError` if a name in `extra_edits` is taken.
    """
    if taken := set(extra_edits or {}) & {EDITED, UNEDITED, NEVER_TAUGHT}:
        raise MechunlearnError(
            f"What is given `extra_edits` cannot be named '{min(taken)}': the attack itself has that state."
        )
    states = [State(EDITED, model, edit, forget)] if edit is not None else []
    states.append(State(UNEDITED, model, None, forget))
    strangers = never_taught(model, forget, seed)
    if strangers is not None:
        states.append(State(NEVER_TAUGHT, model, None, strangers))
    for name, other in (extra_edits or {}).items():
        if other is None or isinstance(other, Edit):
            states.append(State(name, model, other, forget))
        else:
            states.append(State(name, other, None, forget))
    return states


def never_taught(model: HookedModel, forget: Prompts, seed: int = 0) -> Prompts | None:
    """As many facts that the model was never taught as there are forget facts, if the data set has two or more."""
    untaught = forget.facts.untaught if forget.facts is not None else None
    if untaught is None or len(untaught) < 2:
        return None
    drawn = torch.randperm(len(untaught), generator=torch.Generator().manual_seed(seed))[: len(forget)]
    return untaught.select(drawn.tolist()).prompts(model, forget.format)


def states_to_run(states: Sequence[State], baseline_rows: pd.DataFrame | None, card: RunCard) -> list[State]:
    """The states without those whose rows are known from an earlier call.

    `baseline_rows` are rows of that call; its `unedited` and `never taught` states stand for this call's if both cards agree on
    method, model, data, seed and settings. Raises `MechunlearnError` if they do not.
    """
    if baseline_rows is None:
        return list(states)
    there, here = baseline_rows.attrs.get("card", {}), asdict(card)
    if differ := [k for k in ("method", "model", "data", "seed", "settings") if there.get(k) != here[k]]:
        raise MechunlearnError(
            f"The known rows are of another attack: {', '.join(f'{k} {there.get(k)}, here {here[k]}' for k in differ)}. "
            "Give rows of the same attack on the same model, facts, seed and settings, or none."
        )
    have = set(baseline_rows["state"])
    return [state for state in states if state.name not in have & {UNEDITED, NEVER_TAUGHT}]


def attack_card(
    method: str, model: HookedModel, edit: Edit | None, forget: Prompts, retain: Prompts, seed: int, settings: Mapping
) -> RunCard:
    """The run card of an attack."""
    return RunCard(
        method,
        model=model.fingerprint,
        data=digest(forget.fingerprint, retain.fingerprint),
        seed=seed,
        settings=dict(settings),
        mask=edit.card.mask if edit is not None else "",
        device=str(model.device),
    )


def to_frame(
    rows: Sequence[Mapping],
    baseline_rows: pd.DataFrame | None,
    min_retention: float | int,
    card: RunCard,
    watch: Stopwatch,
) -> pd.DataFrame:
    """Rows of an attack as a table, with those known before, `valid` by the gate and the card in `attrs`."""
    frame = pd.DataFrame(list(rows))
    frame["valid"] = frame["retain"] >= min_retention
    if baseline_rows is not None:
        bounds = baseline_rows[baseline_rows["state"].isin([UNEDITED, NEVER_TAUGHT])]
        frame = pd.concat([frame, bounds[[name for name in bounds if name in frame]]], ignore_index=True)
    frame.attrs["card"] = asdict(watch.stamp(card))
    return frame


def cell(state: str, setting: str, right: Bool[Tensor, " fact"] | Float[Tensor, " fact"], seed: int = 0) -> dict:
    """The first columns of a row: accuracy on facts that the attack saw nothing of, its interval over facts, and n."""
    values = right.float()
    low, high = bootstrap_interval(values.numpy(), seed)
    return {
        "state": state,
        "setting": setting,
        "step": 0,
        "held out": float(values.mean()),
        "low": low,
        "high": high,
        "n": len(values),
        "trained": math.nan,
    }


def chance(prompts: Prompts) -> float:
    """What naming the most frequent answer of these facts would give."""
    answers = prompts.answers
    return float(answers.unique(dim=0, return_counts=True)[1].max()) / len(answers)


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out, drawn by the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2], order[count // 2 :]


def check_sizes(forget: Prompts, retain: Prompts, least: int = 2) -> None:
    """Raises `MechunlearnError` if either set is too small to be halved."""
    for name, prompts in (("forget", forget), ("retain", retain)):
        if len(prompts) < least:
            raise MechunlearnError(
                f"The {name} set has {len(prompts)} facts: the attack trains on one half of it and measures the other. "
                f"Expected at least {least}; see Prompts.split."
            )


def check_gate(model: HookedModel, retain: Prompts, min_retention: float | int) -> None:
    """Raises `MechunlearnError` if the unedited model itself knows less of the retain facts than the gate asks for."""
    known = float(measure(model, retain)["accuracy"].mean())
    if known < min_retention:
        raise MechunlearnError(
            f"Before any edit the model knows {known:.0%} of the retain facts that are measured, and the gate asks for "
            f"{min_retention:.0%}: every setting would count as collapsed. Give retain facts that the model knows, or a lower gate."
        )


def recovery(rows: pd.DataFrame) -> pd.DataFrame:
    """How much an attack got back, by state: the best of its cells that count.

    A cell (setting, step) counts if `valid`. A setting that is valid at no step after 0 (or not at all, if it takes no steps)
    has `collapsed`: it broke the model, and is listed, never counted, not even its step 0. `held out`, with `low`, `high`, `n`,
    `setting`, `step` and `retain`, is the cell with the largest accuracy on facts that the attack saw nothing of (the first of
    equals); `trained` is the largest on those that it trained on in any cell that counts: if that is far below 1 the attack was
    too weak to tell.

    recovery = (held out - floor) / (ceiling - floor)

    The `ceiling` is the unedited model's best cell, the `floor` the never-taught facts' best cell, or chance where that is
    more (or they were not attacked). It is below 0 where less comes back than that, and NaN where ceiling - floor < .2.
    Where rows have a column `group` (ways of asking with floors of their own), all this is done in each group, and the group
    with the largest recovery counts. Where they have a `weight` (layers that hold more or less of the knowledge) the
    weighted mean over settings stands for the best.
    `outcome` is "measured", or "collapsed" if every setting has: recovery is then NaN. A collapsed model is not
    robust; nothing is known of it. The interval is the best cell's own, over facts: it does not know that it was the
    best of several. Raises `MechunlearnError` for a frame without the columns of an attack.

    >>> cell = {"setting": "full 0.001", "low": 0, "high": 1, "n": 9, "trained": 1, "retain": 1, "chance": 0.25, "valid": True}
    >>> curves = {"edited": (0.0, 0.5), "unedited": (1.0, 1.0), "never taught": (0.0, 0.2)}
    >>> rows = [{"state": s, "step": i, "held out": y, **cell} for s, curve in curves.items() for i, y in enumerate(curve)]
    >>> found = recovery(pd.DataFrame(rows)).loc["edited"]
    >>> float(found["held out"]), float(found["floor"]), round(float(found["recovery"]), 3)
    (0.5, 0.25, 0.333)
    """
    missing = [name for name in COLUMNS if name not in rows]
    if missing or rows.empty:
        raise MechunlearnError(
            f"The frame has {len(rows)} rows and lacks {', '.join(missing) or 'no column'}. Expected the rows that an "
            "attack returns."
        )
    groups = [part for _, part in rows.groupby("group", sort=False)] if "group" in rows else [rows]
    found = pd.concat([_in_group(part) for part in groups])
    best = []
    for _, candidates in found.groupby(level=0, sort=False):
        ranked = candidates["recovery"].fillna(-math.inf)
        counted = ranked if (ranked > -math.inf).any() else candidates["held out"].fillna(-1.0)
        best.append(candidates.iloc[int(counted.to_numpy().argmax())])
    return pd.DataFrame(best).rename_axis("state")


def _in_group(rows: pd.DataFrame) -> pd.DataFrame:
    best_cells = [_best(str(state), cells) for state, cells in rows.groupby("state", sort=False)]
    found = pd.DataFrame(best_cells, columns=list(SUMMARY)).set_index("state")
    best = found["held out"].astype(float)
    found["floor"] = found["chance"].clip(lower=best.get(NEVER_TAUGHT, math.nan))
    found["ceiling"] = float(best.get(UNEDITED, math.nan))
    room = found["ceiling"] - found["floor"]
    found["recovery"] = ((best - found["floor"]) / room).where(room >= ROOM)
    return found


def _best(state: str, cells: pd.DataFrame) -> dict:
    """The cell with the largest accuracy on the facts held out, of those that count; or the weighted mean of all."""
    counted, collapsed = [], []
    for setting, curve in cells.groupby("setting", sort=False):
        after = curve["step"] > 0 if (curve["step"] > 0).any() else curve["step"] == 0
        if curve["valid"][after].any():
            counted.append(curve[curve["valid"]])
        else:
            collapsed.append(str(setting))
    about = {"state": state, "collapsed": tuple(collapsed), "chance": float(cells["chance"].iloc[0])}
    if not counted:
        return {**about, "outcome": "collapsed"}
    left = pd.concat(counted, ignore_index=True)
    best = {name: left.iloc[int(left["held out"].argmax())][name] for name in BEST}
    if "weight" in left:
        weight = left["weight"] / left["weight"].sum()
        best |= {name: float((left[name] * weight).sum()) for name in ("held out", "low", "high", "retain")}
        best["setting"] = "all, weighted"
    return {**about, "outcome": "measured", "trained": left["trained"].max(), **best}
