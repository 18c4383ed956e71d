"""What all attacks share: the states they are tried on, a call from its checks to its rows, and how much came back."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.progress import track
from mechunlearn.core.runcard import RunCard, Stopwatch, digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.unwrap import evaluating
from mechunlearn.training.loop import interruptible

EDITED, UNEDITED, NEVER_TAUGHT = "edited", "unedited", "never taught"
GATE, WATCHED = 0.9, 100
COLUMNS = ("state", "setting", "step", "held_out", "low", "high", "n", "trained", "retain", "chance", "valid")
BEST = ("held_out", "low", "high", "n", "setting", "step", "retain")
SUMMARY = ("state", "outcome", "recovery", *BEST, "trained", "floor", "ceiling", "chance", "collapsed")
ROOM = 0.2
Row = dict[str, Any]
Rows = Generator[Sequence[Row], None, None]
Work = Callable[["State"], Rows]


@dataclass(frozen=True)
class State:
    """One thing that is attacked: a model, the edit that is applied to it, and the facts that may come back."""

    name: str
    model: HookedModel
    edit: Edit | None
    facts: Prompts

    @contextmanager
    def applied(self) -> Iterator[HookedModel]:
        """Edit the model within the block, and leave it as it was, its training mode included."""
        with evaluating(self.model.hf), self.edit.applied(self.model) if self.edit is not None else nullcontext():
            yield self.model


@dataclass
class Attack:
    """One call of an attack: everything around the attack's own computation.

    Making one finds the `states` and checks the gate. `run` then tries the attack's own computation on each state,
    shows progress, ends after Ctrl-C, and returns the rows.

    Args:
        method: The attack's name, for the run card.
        model: The unedited model.
        edit: The edit that is attacked, or None to run ceiling and floor alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        watched: The retain facts that the gate is measured on. The attack must not train on them.
        extra_edits: Further edits, models, or None for the model as it is, by name.
        baseline_rows: Rows of an earlier call with the same model, facts, seed and settings: their ceiling and floor
            are taken as they are.
        min_retention: The share of the watched facts that must be right for a row to be `valid`.
        seed: Draws the halves and the never-taught facts.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Raises:
        MechunlearnError: If `edit` is no edit, a name in `extra_edits` is taken, or the unedited model knows less of
            the watched facts than the gate asks for.
    """

    method: str
    model: HookedModel
    edit: Edit | None
    forget: Prompts
    retain: Prompts
    watched: Prompts
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None
    baseline_rows: pd.DataFrame | None = None
    min_retention: float = GATE
    seed: int = 0
    progress: bool | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self.states = states_to_attack(self.model, self.edit, self.forget, self.extra_edits, self.seed)
        known = mean(answered(self.model, self.watched))
        if known < self.min_retention:
            raise MechunlearnError(
                f"Before any edit the model knows {known:.0%} of the retain facts that are measured, and the gate asks "
                "for "
                f"{self.min_retention:.0%}: every setting would count as collapsed. Give retain facts that the model "
                "knows, or "
                "a lower gate."
            )

    def run(self, work: Work, settings: Mapping[str, object], total: int = 1) -> pd.DataFrame:
        """Try the attack on each state, and return its rows.

        Args:
            work: The attack's own computation: a generator function of a state that applies the edit itself
                (`state.applied()`) and yields the rows of one setting after another, each made by `cell`.
            settings: What else the rows depend on, for the run card.
            total: How many settings there are.

        Returns:
            The rows with `valid`, those of `baseline_rows` behind them, and the run card in `attrs["card"]`.

        Raises:
            MechunlearnError: If `baseline_rows` are of another call.
            KeyboardInterrupt: After Ctrl-C. There are no rows then: half an attack would pass for robustness.
        """
        card = RunCard(
            self.method,
            model=self.model.fingerprint,
            data=digest(self.forget.fingerprint, self.retain.fingerprint),
            seed=self.seed,
            settings={**settings, "min_retention": self.min_retention},
            mask=self.edit.card.mask if self.edit is not None else "",
            device=str(self.model.device),
        )
        bounds = self._bounds(card)
        known, rows = set(bounds["state"]), list[Row]()
        with interruptible() as asked:
            for state in (state for state in self.states if state.name not in known):
                with closing(work(state)) as found:
                    for made in track(found, f"{self.method.replace('_', ' ')}, {state.name}", total, self.progress):
                        rows += made
                        if asked:
                            raise KeyboardInterrupt
            if asked:
                raise KeyboardInterrupt
        frame = pd.DataFrame(rows)
        frame["valid"] = frame["retain"] >= self.min_retention
        if len(bounds):
            frame = pd.concat([frame, bounds[[name for name in bounds if name in frame]]], ignore_index=True)
        frame.attrs["card"] = asdict(self.watch.stamp(card))
        return frame

    def _bounds(self, card: RunCard) -> pd.DataFrame:
        """The ceiling and floor of `baseline_rows`."""
        if self.baseline_rows is None:
            return pd.DataFrame(columns=["state"])
        there, here = self.baseline_rows.attrs.get("card", {}), asdict(card)
        if differ := [k for k in ("method", "model", "data", "seed", "settings") if there.get(k) != here[k]]:
            raise MechunlearnError(
                "`baseline_rows` are of another attack: "
                f"{', '.join(f'{k} {there.get(k)}, here {here[k]}' for k in differ)}. Give rows of the same attack on "
                "the same "
                "model, facts, seed and settings, or none."
            )
        return self.baseline_rows[self.baseline_rows["state"].isin([UNEDITED, NEVER_TAUGHT])]


def states_to_attack(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    seed: int = 0,
) -> list[State]:
    """List what an attack is tried on.

    The edited model, the unedited one (ceiling), never-taught facts (floor), extras.

    Without an edit there are ceiling and floor alone. Never-taught facts are as many of `forget.facts.untaught` as
    there are forget facts, in the same format, on the unedited model; without such facts there is no such state.

    Args:
        model: The unedited model.
        edit: The edit that is attacked, or None.
        forget: The facts that the edit removed.
        extra_edits: Further edits, models, or None for the model as it is, by name.
        seed: Draws the never-taught facts.

    Raises:
        MechunlearnError: If `edit` is no edit, or a name in `extra_edits` is taken.
    """
    if taken := set(extra_edits or {}) & {EDITED, UNEDITED, NEVER_TAUGHT}:
        raise MechunlearnError(
            f"What is given `extra_edits` cannot be named '{min(taken)}': the attack itself has that state."
        )
    states = [State(EDITED, model, check_edit(edit), forget)] if edit is not None else []
    states.append(State(UNEDITED, model, None, forget))
    strangers = never_taught(model, forget, seed)
    if strangers is not None:
        states.append(State(NEVER_TAUGHT, model, None, strangers))
    for name, other in (extra_edits or {}).items():
        if other is None or isinstance(other, HookedModel):
            states.append(State(name, other or model, None, forget))
        else:
            states.append(State(name, model, check_edit(other), forget))
    return states


def never_taught(model: HookedModel, forget: Prompts, seed: int = 0) -> Prompts | None:
    """Draw as many facts that the model was never taught as there are forget facts, if the data set has two or more.

    Args:
        model: The model whose tokenizer makes prompts of them.
        forget: The facts that they stand beside, in their format.
        seed: Draws the facts.
    """
    untaught = forget.facts.untaught if forget.facts is not None else None
    if untaught is None or len(untaught) < 2:
        return None
    drawn = torch.randperm(len(untaught), generator=torch.Generator().manual_seed(seed))[: len(forget)]
    return untaught.select(drawn.tolist()).prompts(model, forget.format)


def cell(
    state: str, setting: str, right: Bool[Tensor, " fact"] | Float[Tensor, " fact"], seed: int = 0, **columns: object
) -> Row:
    """Return a row of an attack: accuracy on facts that the attack saw nothing of, its interval over facts, and n.

    Args:
        state: The name of the state.
        setting: The name of the setting, such as "int4".
        right: For each fact held out whether the truth is given.
        seed: Draws the bootstrap.
        **columns: Further columns: `retain` and `chance` always, `step` (else 0) and `trained` (else NaN) if the
            attack trains.
    """
    low, high = bootstrap_interval(right.float().numpy(), seed)
    first = {"state": state, "setting": setting, "step": 0, "held_out": mean(right), "low": low, "high": high}
    return {**first, "n": len(right), "trained": math.nan, **columns}


def mean(right: Bool[Tensor, " fact"] | Float[Tensor, " fact"]) -> float:
    """Return a mean over facts.

    Args:
        right: One value a fact.
    """
    return float(right.float().mean())


def chance(prompts: Prompts) -> float:
    """Return what naming the most frequent answer of these facts would give.

    Args:
        prompts: The facts.
    """
    answers = prompts.answers
    return float(answers.unique(dim=0, return_counts=True)[1].max()) / len(answers)


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the rows to train on and the rows to hold out.

    Args:
        count: How many rows there are.
        seed: Draws the halves.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2], order[count // 2 :]


def halved(prompts: Prompts, seed: int, most: int | None = None) -> tuple[Prompts, Prompts]:
    """Draw the prompts to train on and those to hold out.

    Args:
        prompts: The prompts.
        seed: Draws the halves.
        most: The largest number to hold out; None holds out the whole half.
    """
    taught, held_out = halves(len(prompts), seed)
    return prompts.select(taught), prompts.select(held_out[:most])


def check_edit(given: object) -> Edit:
    """Return an edit as it is given.

    Args:
        given: The edit.

    Raises:
        MechunlearnError: For what is no edit, such as a mask or scores.
    """
    if isinstance(given, Edit):
        return given
    how = {
        "Localization": "It scores units: choose some with found.above(0) or found.top(weights=0.05), then edit them",
        "ComponentMask": "It selects units: edit them first",
    }.get(type(given).__name__, "Make one first")
    raise MechunlearnError(
        f"Expected an edit, got a {type(given).__name__}. {how}, for example by masked_gradient(model, mask, forget, "
        "retain)."
    )


def check_sizes(forget: Prompts, retain: Prompts, least: int = 2) -> None:
    """Raise `MechunlearnError` if either set is too small to be halved.

    Args:
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        least: The smallest number of facts that will do.
    """
    for name, prompts in (("forget", forget), ("retain", retain)):
        if len(prompts) < least:
            raise MechunlearnError(
                f"The {name} set has {len(prompts)} facts"
                f"{': the attack trains on one half of it and measures the other' * (least > 1)}. "
                f"Expected at least {least}; see Prompts.split."
            )


def recovery(rows: pd.DataFrame) -> pd.DataFrame:
    """Return how much an attack got back, by state: the best of its cells that count.

    A cell (setting, step) counts if `valid`. A setting that is valid at no step after 0 (or not at all, if it takes
    no steps) has `collapsed`: it broke the model, and is listed, never counted, not even its step 0.

    recovery = (held_out - floor) / (ceiling - floor)

    The `ceiling` is the unedited model's best cell, the `floor` the never-taught facts' best cell, or chance where
    that is more (or they were not attacked). It is below 0 where less comes back than that, and NaN where ceiling -
    floor < .2. Where rows have a column `group` (ways of asking with floors of their own), all this is done in each
    group, and the group with the largest recovery counts. Where they have a `weight` (layers that hold more or less
    of the knowledge) the weighted mean over settings stands for the best.

    Args:
        rows: What an attack returns.

    Returns:
        One row a state. `outcome` is "measured", or "collapsed" if every setting has: recovery is then NaN, because a
        collapsed model is not robust; nothing is known of it. `held_out`, with `low`, `high`, `n`, `setting`, `step`
        and `retain`, is the cell with the largest accuracy on facts that the attack saw nothing of (the first of
        equals); its interval is its own, over facts, and does not know that it was the best of several. `trained` is
        the largest accuracy on facts that it trained on, in any cell that counts: if that is far below 1 the attack
        was too weak to tell.

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
    groups = [part for _, part in rows.groupby("group", sort=False)] if "group" in rows else [rows]
    best = []
    for _, found in pd.concat(map(_in_group, groups)).groupby(level=0, sort=False):
        rank = found["recovery"] if found["recovery"].notna().any() else found["held_out"].astype(float)
        best.append(found.iloc[int(rank.fillna(-math.inf).to_numpy().argmax())])
    return pd.DataFrame(best).rename_axis("state")


def _in_group(rows: pd.DataFrame) -> pd.DataFrame:
    best_cells = [_best(str(state), cells) for state, cells in rows.groupby("state", sort=False)]
    found = pd.DataFrame(best_cells, columns=list(SUMMARY)).set_index("state")
    best = found["held_out"].astype(float)
    found["floor"] = found["chance"].clip(lower=best.get(NEVER_TAUGHT, math.nan))
    found["ceiling"] = float(best.get(UNEDITED, math.nan))
    room = found["ceiling"] - found["floor"]
    found["recovery"] = ((best - found["floor"]) / room).where(room >= ROOM)
    return found


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
    best = dict(left[list(BEST)].iloc[int(left["held_out"].argmax())])
    if "weight" in left:
        weight = left["weight"] / left["weight"].sum()
        best |= {name: float((left[name] * weight).sum()) for name in ("held_out", "low", "high", "retain")}
        best["setting"] = "all, weighted"
    return {**about, "outcome": "measured", "trained": left["trained"].max(), **best}
