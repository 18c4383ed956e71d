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
from mechunlearn.attack.states import EDITED, GATE, NEVER_TAUGHT, UNEDITED, recovery
from mechunlearn.core.grid import Grid
from mechunlearn.core.lazy import method_names
from mechunlearn.core.runcard import RunCard, digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "relearning_on_other_facts": {"on": "other facts", "lrs": {"lora": (5e-3,), "full": (1e-3,)}, "steps": 10},
    "relearning_on_text": {"on": "text", "lrs": {"lora": (5e-3,), "full": (1e-3,)}, "steps": 10},
}
ATTACKS = (*method_names("mechunlearn.attack"), *VARIANTS)
PLACED = ("activation_perturbation",)  # its ceiling and floor depend on where the edit is
BACK = 0.2
OUTCOME = (
    *("attack", "outcome", "recovery", "up_to", "held_out", "low", "high", "n", "floor", "ceiling"),
    *("never_taught", "never_low", "never_high", "chance", "setting", "settings", "note"),
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

    def outcomes(self, state: str = EDITED) -> pd.DataFrame:
        """Return one row an attack: how much of the knowledge it brought back, and what its floor and ceiling were.

        Args:
            state: The edit asked about: the one attacked, or one by its name in `extra_edits`.

        Returns:
            `outcome` is "back" if the recovery is .2 or more and the interval of what came back lies above the floor,
            "not back" if not, "collapsed" if every setting broke the model, "unknown" if there is no ceiling (the
            unedited model collapses, or its own facts do not come out above the floor), "failed" with the reason in
            `note`. `up_to` is the recovery at the upper end of that interval (where no fact came back, of the exact
            binomial one): what the number of facts cannot exclude.
            `never_taught`, with `never_low` and `never_high`, is the same maximum over settings on facts that the
            model never knew. The other columns are those of `recovery`, for the best of so many `settings`.

        Raises:
            MechunlearnError: For a state that was not attacked.
        """
        found = [_outcome(name, rows, state) for name, rows in self.rows.items()]
        failed = [{"attack": name, "outcome": "failed", "note": reason} for name, reason in self.failed.items()]
        return pd.DataFrame([*found, *failed], columns=list(OUTCOME))


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
    mark = _digest(model, edit) if edit is not None else ""
    rows: dict[str, pd.DataFrame] = {}
    failed: dict[str, str] = {}

    def made(name: str) -> pd.DataFrame | None:
        module = name.split("_on_")[0]
        attack = getattr(importlib.import_module(f"mechunlearn.attack.{module}"), module)
        shared = {"seed": seed, "progress": progress, **VARIANTS.get(name, {})}
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


def status(
    truth: float,
    retained: float,
    before: float,
    chance: float,
    outcomes: pd.DataFrame,
    harm: Sequence[str] = (),
    unmeasured: str = "",
) -> tuple[str, str]:
    """Return the status of an edit, and the numbers behind it.

    Args:
        truth: The share of forget facts that the training prompt still gives.
        retained: The share of other facts that are right after the edit.
        before: That before the edit.
        chance: What naming the most frequent answer would give.
        outcomes: What attacks found, as `Attacked.outcomes` returns it.
        harm: What the edit has damaged, in words (see `damage`).
        unmeasured: Why damage could not have been seen; empty if it could.

    Returns:
        "collapsed": the model is damaged (`harm`, or fewer than .9 of the other facts that were right are right), so
        nothing can be said of the forgotten facts. "still there": the training prompt gives more than .2 of the way
        from chance to 1. "hidden": some attack brings it back. "gone": none of them does, as far as this many facts
        can tell. "inconclusive": no attack could tell, an attack brings something back that has no ceiling to compare
        it with, or damage could not have been seen.
    """
    if harm:
        return "collapsed", "; ".join(harm)
    if retained < GATE * before:
        return "collapsed", f"{retained:.1%} of the other facts are right (before: {before:.1%})"
    if (truth - chance) / (1 - chance) > BACK:
        return "still there", f"{truth:.1%} of the forget facts are still right on the training prompt"
    back = outcomes[outcomes["outcome"] == "back"].sort_values("recovery", ascending=False)
    if len(back):
        return "hidden", "; ".join(
            f"{row['attack']} recovers {row['recovery']:.2f} (right {row['held_out']:.2f} [{row['low']:.2f}, "
            f"{row['high']:.2f}], floor {row['floor']:.2f}, n = {row['n']:.0f})"
            for row in back.to_dict("records")
        )
    tried = outcomes[outcomes["outcome"] == "not back"].sort_values("up_to", ascending=False)
    if tried.empty:
        return "inconclusive", "no attack could tell"
    if blind := [row for row in outcomes.to_dict("records") if row["outcome"] == "unknown" and _unbounded(row)]:
        return "inconclusive", "; ".join(
            f"{row['attack']} gets {row['held_out']:.2f} right (floor {row['floor']:.2f}, n = {row['n']:.0f}), and the "
            "unedited model under the same attack is no ceiling to compare that with"
            for row in blind
        )
    if unmeasured:
        return "inconclusive", unmeasured
    most = tried.to_dict("records")[0]
    return "gone", (
        f"{len(tried)} of {len(outcomes)} attacks measured it and none is seen to bring it back; the facts cannot "
        "exclude a recovery of "
        f"{max(0.0, most['up_to']):.2f} by {most['attack']} (n = {most['n']:.0f})"
    )


def _unbounded(row: Mapping[Any, Any]) -> bool:
    """Whether an attack without a recovery leaves open that facts came back: no ceiling, or more than the floor."""
    return bool(pd.isna(row["ceiling"]) or not row["held_out"] <= row["floor"])


def _outcome(name: str, rows: pd.DataFrame, state: str) -> dict[str, Any]:
    found = recovery(rows)
    if state not in found.index and state != EDITED:
        raise MechunlearnError(f"'{name}' did not attack '{state}'. Expected one of {', '.join(found.index)}.")
    best = found.loc[state if state in found.index else UNEDITED]
    shared = ("recovery", "held_out", "low", "high", "n", "floor", "ceiling", "chance", "setting")
    row = {"attack": name, "settings": int(rows["setting"].nunique()), "note": "", **best[list(shared)]}
    if NEVER_TAUGHT in found.index:
        never = found.loc[NEVER_TAUGHT]
        row |= {"never_taught": never["held_out"], "never_low": never["low"], "never_high": never["high"]}
    room = best["ceiling"] - best["floor"]
    high = best["high"] if best["held_out"] > 0 else max(best["high"], 1 - 0.025 ** (1 / best["n"]))
    row["up_to"] = (high - best["floor"]) / room if room > 0 else math.nan
    if best["collapsed"]:
        row["note"] = f"collapsed: {', '.join(best['collapsed'])}"
    if best["outcome"] == "collapsed":
        return row | {"outcome": "collapsed"}
    if pd.isna(best["recovery"]):
        no_ceiling = pd.isna(best["ceiling"])
        why = (
            "the unedited model collapses under every setting, so there is no ceiling"
            if no_ceiling
            else f"the unedited model's facts come out at {best['ceiling']:.2f}, too near the floor of {best['floor']:.2f}"
        )
        return row | {"outcome": "unknown", "note": why}
    return row | {"outcome": "back" if best["recovery"] >= BACK and best["low"] > best["floor"] else "not back"}


def _digest(model: HookedModel, edit: Edit) -> str:
    """An edit by what it does to the weights, and how it was made."""
    with edit.applied(model):
        weights = model.fingerprint
    settings = json.dumps(edit.card.settings, sort_keys=True, default=str)
    return digest(weights, edit.card.method, edit.card.mask, settings)


def _kept(model: HookedModel, forget: Prompts, retain: Prompts, seed: int, cache: str | Path | None) -> Grid | None:
    """The finished attacks on this model, these facts and this seed."""
    if cache is None:
        return None
    about: dict[str, Any] = {"model": model.fingerprint, "forget": forget.fingerprint, "retain": retain.fingerprint}
    about |= {"seed": seed, "versions": RunCard("attacks").versions}
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
