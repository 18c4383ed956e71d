"""What all attacks share: the states they are tried on, a call from its checks to its rows, and how much came back."""

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit, WeightEdit
from mechunlearn.core.progress import track
from mechunlearn.core.runcard import RunCard, Stopwatch, digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.chat import CHAT
from mechunlearn.facts.formats import Fact
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.metrics.answers import answered
from mechunlearn.metrics.stats import mean_interval
from mechunlearn.model.component import Component
from mechunlearn.model.hook_points import layer_of
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.unwrap import evaluating
from mechunlearn.training.loop import interruptible

EDITED, UNEDITED, NEVER_TAUGHT = "edited", "unedited", "never taught"
SEARCHED = "search"  # rows that show which budgets were tried: neither a floor nor a ceiling
GATE, WATCHED = 0.9, 100
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

    def run(
        self, work: Work, settings: Mapping[str, object], total: int = 1, tried: Sequence[Row] = ()
    ) -> pd.DataFrame:
        """Try the attack on each state, and return its rows.

        Args:
            work: The attack's own computation: a generator function of a state that applies the edit itself
                (`state.applied()`) and yields the rows of one setting after another, each made by `cell`.
            settings: What else the rows depend on, for the run card.
            total: How many settings there are.
            tried: Rows of a search for budgets (see `find_budgets`), to stand behind the others.

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
        frame = pd.DataFrame([*rows, *tried])
        before = frame.get("retain_before", 1.0)
        frame["valid"] = frame["retain"] >= self.min_retention * before
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
        return self.baseline_rows[self.baseline_rows["state"].isin([UNEDITED, NEVER_TAUGHT, SEARCHED])]


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
    if taken := set(extra_edits or {}) & {EDITED, UNEDITED, NEVER_TAUGHT, SEARCHED}:
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
    """Draw as many facts that the model was never taught as there are forget facts, if there are two or more.

    They are of the relations that are forgotten, and in the same format.

    Args:
        model: The model whose tokenizer makes prompts of them.
        forget: The facts that they stand beside, in their format.
        seed: Draws the facts.
    """
    if forget.facts is None or forget.facts.untaught is None:
        return None
    untaught, relations = forget.facts.untaught, {fact.relation for fact in forget.facts}
    fits = [
        i
        for i, fact in enumerate(untaught)
        if fact.relation in relations and (forget.format in fact.queries or forget.format == CHAT)
    ]
    if len(fits) < 2:
        return None
    drawn = torch.randperm(len(fits), generator=torch.Generator().manual_seed(seed))[: len(forget)]
    return untaught.select([fits[i] for i in drawn.tolist()]).prompts(model, forget.format)


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
            attack trains, `edit_target` (else NaN): the share of these facts that give the edit target.
    """
    low, high = mean_interval(right.float().numpy(), seed)
    first = {"state": state, "setting": setting, "step": 0, "held_out": mean(right), "low": low, "high": high}
    return {**first, "n": len(right), "trained": math.nan, "edit_target": math.nan, **columns}


def mean(right: Bool[Tensor, " fact"] | Float[Tensor, " fact"]) -> float:
    """Return a mean over facts.

    Args:
        right: One value a fact.
    """
    return float(right.float().mean())


def chance(prompts: Prompts, guesses: int = 1) -> float:
    """Return what naming the most frequent answers of each fact's relation would give.

    It is counted over the whole data set that the facts were selected from, if they have one: the most frequent
    answer of a few facts is the more frequent the fewer they are.

    Args:
        prompts: The facts.
        guesses: How many different answers may be named, of which one has to be the truth.

    >>> from mechunlearn import load_facts, load_model
    >>> prompts = load_facts("factworld/sport").prompts(load_model("factworld"))
    >>> round(chance(prompts), 3) == round(chance(prompts.select([0, 1])), 3) < 0.3
    True
    >>> round(chance(prompts, guesses=100), 3)
    1.0
    """
    if prompts.facts is None:
        counted = prompts.answers.unique(dim=0, return_counts=True)[1].sort(descending=True)[0]
        return float(counted[:guesses].sum()) / len(prompts.answers)
    shares: dict[str, float] = {}
    for facts in (prompts.facts, prompts.facts.source or ()):
        for relation, found in answer_counts(facts, prompts.format).items():
            shares[relation] = sum(count for _, count in found.most_common(guesses)) / found.total()
    return sum(shares[fact.relation] for fact in prompts.facts) / len(prompts)


def answer_counts(facts: Iterable[Fact], format: str = "statement") -> dict[str, Counter[str]]:
    """Count how often each answer is the truth, relation by relation.

    Args:
        facts: The facts.
        format: The format whose answers are counted; facts without it are left out.
    """
    counts: dict[str, Counter[str]] = {}
    for fact in facts:
        if query := fact.queries.get(format):
            counts.setdefault(fact.relation, Counter())[query.answer] += 1
    return counts


def untouched(edit: Edit | None) -> int:
    """Return after how many blocks at most the residual stream is the unedited model's own; -1 if it never is.

    Args:
        edit: The edit; of no edit all is the unedited model's own, but there is nothing to leave out for it: -1.
    """
    if isinstance(edit, WeightEdit):
        return min(Component.parse(site).layer for site in edit.units)
    if isinstance(edit, FeatureEdit):
        names = [part.dictionary.hook_name for part in edit.parts]
        return min(layer_of(name) - (name.endswith("resid_pre") or "L" not in name) for name in names)
    return -1


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
