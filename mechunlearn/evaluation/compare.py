"""Localizers side by side: every objective, budget and seed under one selection rule, in a folder that a killed run resumes."""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.grid import Grid
from mechunlearn.core.methods import method_named, ready_methods
from mechunlearn.core.progress import track
from mechunlearn.core.runcard import RunCard, digest
from mechunlearn.core.spread import Ray, spreading
from mechunlearn.core.steady import steady
from mechunlearn.edit import losses, masked_gradient
from mechunlearn.edit.objective import OBJECTIVES, objective_named
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.cells import LIMIT
from mechunlearn.evaluation.comparison import ARM, CONTROL, NAMES, Comparison, listed
from mechunlearn.evaluation.selection import select
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered, with_answers
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import HookedModel

WINDOW = "window"
FIRST_VALIDATION, MOST_VALIDATION = 101, 6


@steady()
def compare(
    model: HookedModel,
    facts: FactDataset,
    *,
    folder: str | Path,
    localizers: Sequence[str] = ("fact_lookup", "attribution_patching", CONTROL),
    objectives: Sequence[str] = ("injection",),
    budgets: Sequence[float | str] = (WINDOW,),
    seeds: int = 5,
    lrs: Sequence[float] = (1e-3, 2e-3, 3e-3),
    forget_weights: Sequence[float] = (0.2, 1.0),
    forget: int = 64,
    steps: int = 50,
    validation: int = 2,
    attack: bool = False,
    ray: Ray | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Edit what each localizer finds with each objective, budget and seed, and measure what is gone and what stays.

    `lrs` x `forget_weights` is the grid of settings, tried on forget sets of their own; `select` chooses one for each
    localizer, objective and budget, which the test seeds then use. Only `masked_gradient` edits here.

    A run that was stopped or killed goes on where it was when it is called again with the same arguments, and no
    finished cell is made twice. A localizer that finds nothing, an edit that diverges, and a test cell that fails are
    rows with a note; the next call tries what failed again.
    Cost: validation x lrs x forget_weights + seeds edits for each localizer, objective and budget. One model is n =
    1, however many seeds: run it on several before you call a localizer better.

    Args:
        model: The model.
        facts: The facts that forget sets are drawn from.
        folder: Keeps every finished cell, and in the end `results.parquet`, `table.md` and `figure.html`.
        localizers: Names out of `LOCALIZERS`.
        objectives: Names out of `OBJECTIVES`.
        budgets: Shares of the editable weights, of which a unit that scores zero is never taken; or "window": the
            units that `fact_lookup` finds, and for every other localizer as many weights.
        seeds: The number of test seeds: 0 to `seeds` - 1 each draw a forget set, and are those of localizer and edit
            as well.
        lrs: Learning rates to choose from.
        forget_weights: Weights of the objective to choose from.
        forget: The number of facts to forget.
        steps: The number of optimiser steps.
        validation: The number of forget sets to choose on (seeds 101, 102, ...).
        attack: Whether to attack each edit by relearning too.
        ray: The Ray cluster that runs the cells; the folder must be one that all its nodes see. None runs them here.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Raises:
        MechunlearnError: For a localizer, objective, budget or number out of range, for a folder that holds other files
            or another grid, if a setting could not be tried, and for a cluster that cannot be used.

    >>> from tempfile import TemporaryDirectory
    >>> from mechunlearn import load_facts, load_model
    >>> grid = {"localizers": ["random_units"], "budgets": [0.01], "lrs": [1e-3], "forget_weights": [1]}
    >>> with TemporaryDirectory() as folder:
    ...     made = compare(load_model("factworld"), load_facts("factworld/sport"), folder=folder, **grid,
    ...                    seeds=1, validation=1, forget=2, steps=1)
    >>> made.summary()[["localizer", "objective", "budget", "n", "note"]].to_dict("records")[1]
    {'localizer': 'random_units', 'objective': 'injection', 'budget': '0.01', 'n': '1', 'note': 'none qualifies'}
    """
    names = check_grid(localizers, objectives, budgets, seeds, lrs, forget_weights, validation)
    sets = _Sets(model, facts, forget)
    sets.split(0)  # too many facts to forget: complain before a folder is made
    data = digest(*(each.to_frame().to_json() for each in (facts, *facts.related.values())), *facts.texts)
    about: dict[str, Any] = {
        "model": repr(model),
        "weights": model.fingerprint,
        "facts": facts.name,
        "data": data,
        **names,
    }
    about |= {"seeds": seeds, "forget": forget, "steps": steps, "validation": validation, "attack": attack}
    about["versions"] = RunCard("compare").versions
    arms = [dict(zip(ARM, arm, strict=True)) for arm in product(*(names[f"{name}s"] for name in ARM))]
    settings = [{"lr": lr, "forget_weight": weight} for lr, weight in product(names["lrs"], names["forget_weights"])]
    seen = range(FIRST_VALIDATION, FIRST_VALIDATION + validation)
    trials = [
        {"stage": "validation", **arm, **setting, "seed": seed} for seed, arm, setting in product(seen, arms, settings)
    ]
    with spreading(ray, folder) as spread:
        grid = Grid.open_alone(Path(folder), about)
        work, reasons = partial(_cell, sets, grid, steps, attack), list[str]()

        def failed(row: dict[str, Any], reason: str) -> dict[str, Any]:
            grid.fail(_named(row), reason)
            reasons.append(reason)
            return row | {"note": reason}

        def each(cells: Sequence[dict[str, Any]], title: str) -> list[dict[str, Any]]:
            return list(track(spread(work, cells, failed), title, total=len(cells), progress=progress))

        rows = each(trials, "choosing settings")
        if reasons:
            raise MechunlearnError(
                f"{len(reasons)} of {len(trials)} settings could not be tried, so none is chosen: {reasons[0]} All "
                f"reasons are in '{Path(folder) / 'failed'}'. The same call tries them again."
            )
        chosen = [arm | select([row for row in rows if arm.items() <= row.items()]) for arm in arms]
        tests: list[dict[str, Any]] = [{"stage": "unedited", "seed": seed} for seed in range(seeds)]
        tests += [{"stage": "test", **arm, "seed": seed} for seed, arm in product(range(seeds), chosen)]
        rows += each(tests, "measuring")
    made = Comparison.of(rows, about)
    made.save(folder)
    return made


def check_grid(
    localizers: Sequence[str],
    objectives: Sequence[str],
    budgets: Sequence[float | str],
    seeds: int,
    lrs: Sequence[float],
    forget_weights: Sequence[float],
    validation: int,
) -> dict[str, list[Any]]:
    """Return what `compare` is asked for, in order and without repetition.

    Args:
        localizers: Names of localizers.
        objectives: Names of objectives.
        budgets: Shares of the editable weights, or "window".
        seeds: The number of test seeds.
        lrs: Learning rates.
        forget_weights: Weights of the objective.
        validation: The number of validation sets.

    Raises:
        MechunlearnError: For what `compare` cannot do.

    >>> check_grid(["random_units"], ["npo"], [0.05, "window"], 5, [2e-3, 1e-3], [1], 2)["budgets"]
    ['0.05', 'window']
    """
    named = ready_methods("localize")
    for what, given, known in (("localizer", localizers, named), ("objective", objectives, OBJECTIVES)):
        if any(isinstance(name, Localization) for name in given):
            raise MechunlearnError(
                "Expected names of localizers, got a Localization: compare runs localizers itself, on forget sets of "
                "its own. To "
                "edit what this one found, make a mask of it with found.above(0) or found.top(weights=0.05)."
            )
        if unknown := [name for name in given if name not in known] or ([""] if not given else []):
            raise MechunlearnError(f"Unknown {what} '{unknown[0]}'. Expected one or more of {', '.join(known)}.")
    shares = [_share(budget) for budget in budgets]
    for what, numbers in (("learning rate", lrs), ("forget weight", forget_weights)):
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            raise MechunlearnError(f"Expected one or more {what}s above 0, not {listed(numbers) or 'none'}.")
    if not shares:
        raise MechunlearnError(f"No budget is given. Expected shares of the weights, or '{WINDOW}'.")
    limits = {"seeds": (seeds, FIRST_VALIDATION - 1), "validation sets": (validation, MOST_VALIDATION)}
    for what, (number, most) in limits.items():
        if not 1 <= number <= most:
            raise MechunlearnError(f"{number} {what} are out of range. Expected 1 to {most}.")
    names = {"objectives": objectives, "budgets": shares, "localizers": localizers}
    found: dict[str, list[Any]] = {name: list(dict.fromkeys(given)) for name, given in names.items()}
    return found | {"lrs": sorted({*map(float, lrs)}), "forget_weights": sorted({*map(float, forget_weights)})}


class _Sets:
    """The forget and retain set of a seed, and what localizers find on it: made when first needed, then kept."""

    def __init__(self, model: HookedModel, facts: FactDataset, forget: int) -> None:
        self.model, self.facts, self.forget, self.prompts = model, facts, forget, facts.prompts(model)
        self.split, self.found = cache(self._split), cache(self._found)

    def __reduce__(self) -> tuple[type["_Sets"], tuple[HookedModel, FactDataset, int]]:
        """In a worker they are made again."""
        return _Sets, (self.model, self.facts, self.forget)

    def _split(self, seed: int) -> tuple[Prompts, Prompts]:
        return self.prompts.split(self.forget, seed=seed)

    def _found(self, localizer: str, seed: int) -> Localization:
        found = method_named("localize", localizer)(self.model, self.split(seed)[0], seed=seed, progress=False)
        return found.nodes() if isinstance(found, Circuit) else found

    def mask(self, localizer: str, budget: str, seed: int) -> tuple[ComponentMask, float]:
        """What a localizer finds within a budget, and its share of the weights.

        `MechunlearnError` if that is nothing.
        """
        found = self.found(localizer, seed)
        scored = found.above(0)
        if not len(scored):
            raise MechunlearnError(found.note or "nothing found")
        share = self.window(seed) if budget == WINDOW else float(budget)
        mask = found.top(weights=share) & scored
        if not len(mask):
            raise MechunlearnError(f"{share:.2%} of the weights hold no unit")
        return mask, found.share(mask)

    def window(self, seed: int) -> float:
        """The share of the weights that `fact_lookup` finds."""
        found = self.found("fact_lookup", seed)
        if share := found.share(found.above(0)):
            return share
        raise MechunlearnError(f"no budget: {found.note}")


def _cell(sets: _Sets, grid: Grid, steps: int, attack: bool, row: dict[str, Any]) -> dict[str, Any]:
    """A row with its result: out of the grid, or made now."""
    named = _named(row)
    if row["stage"] == "unedited":
        return row | grid.cell(named, partial(_unedited, sets, row["seed"]))
    if row["lr"] is None:
        return row | {"note": "no setting: nothing was found on the validation sets, or every setting diverged"}
    return row | grid.cell(named, partial(_edited, sets, steps, attack, named))


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a row's cell from the others."""
    return {name: row[name] for name in NAMES if name in row}


def _unedited(sets: _Sets, seed: int) -> dict[str, Any]:
    forget, retain = sets.split(seed)
    return _measured(sets.model, forget, retain) | _side_effects(sets.model, forget)


def _edited(sets: _Sets, steps: int, attack: bool, cell: Mapping[str, Any]) -> dict[str, Any]:
    model, seed, test = sets.model, cell["seed"], cell["stage"] == "test"
    forget, retain = sets.split(seed)
    try:
        mask, share = sets.mask(cell["localizer"], cell["budget"], seed)
    except MechunlearnError as error:
        return {"note": str(error)}
    settings = objective_named(cell["objective"], mask) | {"text_loss": losses.cross_entropy}
    chosen = {name: cell[name] for name in ("lr", "forget_weight", "seed")}
    try:
        edit = masked_gradient(model, mask, forget, retain, steps=steps, **chosen, **settings)
    except MechunlearnError as error:
        return {"share": share, "note": str(error)}
    if edit.card.stopped == "interrupted":
        raise KeyboardInterrupt
    aimed = any(name.startswith("target_") for name in losses.needs(settings["loss"]))
    with edit.applied(model):
        found = _measured(model, forget, retain, aimed) | (_side_effects(model, forget, aimed) if test else {})
    if test and attack:
        found |= _recovered(model, edit, forget, retain, seed)
    return {"share": share, **found, "seconds": edit.card.seconds}


def _recovered(model: HookedModel, edit: Edit, forget: Prompts, retain: Prompts, seed: int) -> dict[str, Any]:
    """How much relearning gets back. It runs its ceiling and floor for every edit anew, so that a cell stands alone."""
    from mechunlearn.attack.bounds import recovery
    from mechunlearn.attack.relearning import relearning

    try:
        back = recovery(relearning(model, edit, forget, retain, seed=seed)).to_dict("index")["edited"]
    except MechunlearnError as error:
        return {"note": str(error)}
    broken = {"note": "every attack setting broke the model"} if back["outcome"] == "collapsed" else {}
    return {"recovery": back["recovery"]} | broken


def _measured(model: HookedModel, forget: Prompts, retain: Prompts, aimed: bool | None = None) -> dict[str, float]:
    """On the training prompt: accuracy of the truth on both sets, and of an edited model the efficacy."""
    truth, kept = _right(model, forget), _right(model, retain.select(range(min(LIMIT, len(retain)))))
    strength = {} if aimed is None else {"efficacy": _efficacy(model, forget, aimed)}
    return strength | {"truth": truth, "retention": kept}


def _efficacy(model: HookedModel, prompts: Prompts, aimed: bool) -> float:
    """The share of facts that answer the edit target if the objective has one, else that no longer give the truth."""
    return _right(model, with_answers(prompts, "targets")) if aimed else 1 - _right(model, prompts)


def _right(model: HookedModel, prompts: Prompts) -> float:
    """The share of facts whose answer is given."""
    return _average(answered(model, prompts))


def _side_effects(model: HookedModel, forget: Prompts, aimed: bool | None = None) -> dict[str, float]:
    """Efficacy in other formats, other facts of the same subjects, and text: what there is of them."""
    facts, found = forget.facts, {}
    assert facts is not None
    if aimed is not None and (formats := [format for format in facts.formats if format != forget.format]):
        found["generalization"] = fmean(_efficacy(model, facts.prompts(model, f), aimed) for f in formats)
    if related := [about.prompts(model) for each in facts.related.values() if len(about := each.about(facts.subjects))]:
        found["same_subject"] = fmean(_right(model, prompts) for prompts in related)
    if texts := facts.texts[1::2]:
        found["text_loss"] = _average(text_loss(model, texts))
    return found


def _average(values: Tensor) -> float:
    return float(values.double().mean())


def _share(budget: float | str) -> str:
    """A budget's name, by which it is compared and shown."""
    if budget == WINDOW:
        return WINDOW
    try:
        share = float(budget)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise MechunlearnError(
            f"A budget of {budget} is out of range. Expected a share of the weights above 0 and up to 1, or '{WINDOW}'."
        )
    return f"{share:g}"
