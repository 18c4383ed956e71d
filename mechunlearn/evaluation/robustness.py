"""Every attack on one edit, one after another: floors kept between edits, results as they are made, and one status."""

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.bounds import NEVER, recovery
from mechunlearn.attack.states import EDITED, SEARCHED, UNEDITED
from mechunlearn.core.grid import Grid
from mechunlearn.core.lazy import method_names
from mechunlearn.core.runcard import RunCard, digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.status import ASKED, BACK, chance_of_guessing, judged, recovered_at_most
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "relearning_on_other_facts": {"on": "other facts"},
    "relearning_on_same_template": {"on": "same template"},
    "relearning_on_text": {"on": "text"},
}
ATTACKS = (*method_names("mechunlearn.attack"), *VARIANTS)
PLACED = ("activation_perturbation",)  # its ceiling and floor depend on where the edit is
ROWS = 3
"""What the rows of attacks hold; kept ones of another number are not read."""
OUTCOME = (
    *("attack", "outcome", "recovery", "up_to", "held_out", "low", "high", "n", "floor", "ceiling", "p"),
    *(*NEVER, "chance", "trained", "edit_target", "setting", "settings", "cells", "note"),
)


@dataclass(frozen=True, eq=False)
class Attacked:
    """What attacks found.

    Args:
        rows: The rows of each attack, by name.
        failed: Why other attacks failed, by name.
    """

    rows: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def outcomes(self, state: str = EDITED, asked: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Return one row an attack: how much of the knowledge it brought back, and what its floor and ceiling were.

        Args:
            state: The edit asked about: the one attacked, or one by its name in `extra_edits`.
            asked: What the edited model says on the training prompt: `held_out`, `n`, `chance` and `edit_target` make
                the first row.

        Returns:
            `outcome` is "back" if more came back than guessing gives (`p`, corrected for the number of attacks, is
            .05 or less), "not back" if `up_to`, the upper bound of what came back, is below .2, "inconclusive" if
            neither or the attack learnt less than .9 of what it trained on, "collapsed" if every setting broke the
            model, "unknown" if the unedited model's own facts come out too near the floor, "failed" with the
            reason in `note` (see `status`), "measured" for attacks that only recognise the truth, which are not judged.
            `never_taught`, with `never_low`, `never_high` and `never_n`, is the same best over settings on facts that
            the model never knew. The other columns are those of `recovery`, for the best of so many `settings`.

        Raises:
            MechunlearnError: For a state that was not attacked.
        """
        first = {
            "attack": ASKED,
            "outcome": "measured",
            "ceiling": 1.0,
            "settings": 1,
            "note": "",
            "setting": "statement",
        }
        given = [first | {"floor": asked["chance"]} | dict(asked)] if asked is not None else []
        known = {} if asked is None else {"asked": asked["held_out"], "asked_n": asked["n"]}
        found = [_outcome(name, rows, state, known) for name, rows in self.rows.items()]
        failed = [{"attack": name, "outcome": "failed", "note": reason} for name, reason in self.failed.items()]
        return judged(pd.DataFrame([*given, *found, *failed], columns=list(OUTCOME)))


def attack_all(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    attacks: Sequence[str] | str = "all",
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    watch: Callable[[Attacked], object] = lambda found: None,
) -> Attacked:
    """Run attacks by name, each with its floor and its ceiling; one that fails is noted, and the rest go on.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None to run ceilings and floors alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        attacks: Names out of `ATTACKS`, or "all".
        cache: A folder in which every finished attack is kept, and ceilings and floors apart from it: the same model,
            facts and seed find them there, so that a run that was killed goes on, and a second edit costs only its
            own part.
        seed: The seed of every attack.
        progress: Whether to show a bar; None shows one where somebody can see it.
        watch: Called with what is known after each attack.

    Raises:
        MechunlearnError: For an unknown name.

    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> forget, retain = toy.prompts(list(range(8))), toy.prompts(list(range(8, 24)))
    >>> edit = masked_gradient(toy.model, ComponentMask.of(["L0.mlp.out"], toy.model.signature), forget, retain, steps=2)
    >>> attack_all(toy.model, edit, forget, retain, attacks=["quantization"]).outcomes()["attack"].tolist()
    ['quantization']
    """
    names = check_attacks(attacks)
    grid = _kept(model, forget, retain, seed, cache)
    mark = edit_digest(model, edit) if edit is not None else ""
    rows: dict[str, pd.DataFrame] = {}
    failed: dict[str, str] = {}

    def made(name: str) -> pd.DataFrame | None:
        module = name.split("_on_")[0]
        attack = getattr(importlib.import_module(f"mechunlearn.attack.{module}"), module)
        shared = {"seed": seed, "progress": progress, **VARIANTS.get(name, {})}
        if name in VARIANTS:
            shared["search_rows"] = rows.get(module)  # budgets are searched once
        mine = {"attack": name, "edit": mark}
        if name not in PLACED:
            bounds = _cell(grid, mine | {"edit": ""}, lambda: attack(model, None, forget, retain, **shared))
            if edit is None:
                return bounds
            shared["baseline_rows"] = bounds
        return None if edit is None else _cell(grid, mine, lambda: attack(model, edit, forget, retain, **shared))

    for name in names:
        try:
            found = made(name)
        except Exception as error:
            failed[name] = str(error) if isinstance(error, MechunlearnError) else f"{type(error).__name__}: {error}"
        else:
            if found is None:
                continue
            rows[name] = found
        watch(Attacked(dict(rows), dict(failed)))
    return Attacked(rows, failed)


def check_attacks(attacks: Sequence[str] | str) -> list[str]:
    """Return the names of the attacks that are asked for.

    Args:
        attacks: Names out of `ATTACKS`, or "all".

    Raises:
        MechunlearnError: For an unknown name, and for none.

    >>> check_attacks("quantization")
    ['quantization']
    """
    asked = [attacks] if isinstance(attacks, str) else list(attacks)
    names = list(ATTACKS) if asked == ["all"] else asked
    if unknown := [name for name in names if name not in ATTACKS] or ([""] if not names else []):
        raise MechunlearnError(
            f"Unknown attack '{unknown[0]}'. Expected 'all', or one or more of {', '.join(ATTACKS)}."
        )
    return list(dict.fromkeys(names))


def _outcome(name: str, rows: pd.DataFrame, state: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The best that an attack found in a state, and what there is to know of it.

    Ways of asking (the column `group`) are judged one by one: the p-value is the smallest, times their number; the
    upper bound the largest of those that guessing alone answers less often than `BACK`, if there are such.
    """
    rows = rows[rows["state"] != SEARCHED]
    parts = [part for _, part in rows.groupby("group", sort=False)] if "group" in rows else [rows]
    ways = [{**_way(name, part, state), **asked} for part in parts]
    best: dict[str, Any] = max(ways, key=lambda way: way["recovery"] if pd.notna(way.get("recovery")) else -math.inf)
    able = [way for way in ways if way["outcome"] in ("measured", "unknown")]
    if len(able) > 1:
        telling = [way for way in able if max(way["chance"], way.get("never_taught") or 0) < BACK] or able
        best["p"] = min(1.0, len(able) * min(map(chance_of_guessing, able)))
        bounds = [bound for bound in map(recovered_at_most, telling) if not math.isnan(bound)]
        known = [best["recovery"]] * bool(bounds and pd.notna(best["recovery"]))
        best["up_to"] = max([*bounds, *known], default=math.nan)
    return {**best, "settings": int(rows["setting"].nunique())}


def _way(name: str, rows: pd.DataFrame, state: str) -> dict[str, Any]:
    """What an attack found in a state by one way of asking."""
    found = recovery(rows)
    if state not in found.index and state != EDITED:
        raise MechunlearnError(f"'{name}' did not attack '{state}'. Expected one of {', '.join(found.index)}.")
    best = found.loc[state if state in found.index else UNEDITED].to_dict()
    row = {"attack": name, **{column: best[column] for column in OUTCOME if column in best}}
    notes = [f"collapsed: {', '.join(best['collapsed'])}"] * bool(best["collapsed"])
    notes += [f"below the edit, so not counted: {best['below']} readings"] * (best["below"] > 0)
    if best["outcome"] == "measured" and pd.isna(best["recovery"]):
        row["outcome"] = "unknown"
        notes += [
            "the unedited model was not attacked, so there is no ceiling"
            if pd.isna(best["ceiling"])
            else f"the unedited model's facts come out at {best['ceiling']:.2f}, too near the floor of {best['floor']:.2f}"
        ]
    return row | {"note": "; ".join(notes)}


def edit_digest(model: HookedModel, edit: Edit) -> str:
    """Return a hash of what an edit does to the weights, and of how it was made.

    Args:
        model: The unedited model.
        edit: The edit.
    """
    with edit.applied(model):
        weights = model.fingerprint
    settings = json.dumps(edit.card.settings, sort_keys=True, default=str)
    return digest(weights, edit.card.method, edit.card.mask, settings)


def _kept(model: HookedModel, forget: Prompts, retain: Prompts, seed: int, cache: str | Path | None) -> Grid | None:
    """The finished attacks on this model, these facts and this seed."""
    if cache is None:
        return None
    about: dict[str, Any] = {"model": model.fingerprint, "forget": forget.fingerprint, "retain": retain.fingerprint}
    about |= {"seed": seed, "versions": RunCard("attacks").versions, "rows": ROWS}
    return Grid.open(Path(cache) / digest(json.dumps(about, sort_keys=True)), about)


def _cell(grid: Grid | None, description: Mapping[str, Any], work: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Rows of an attack: out of the cache, or made now."""
    if grid is None:
        return work()

    def made() -> dict[str, Any]:
        rows = work()
        return {"rows": rows.to_dict("records"), "card": rows.attrs["card"]}

    kept = grid.cell(description, made)
    rows = pd.DataFrame(kept["rows"])
    rows.attrs["card"] = kept["card"]
    return rows
