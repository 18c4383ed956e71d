"""Localizers side by side: every objective, budget and seed under one selection rule, in a folder that a killed run resumes."""

import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from rich.progress import track
from torch import Tensor

import mechunlearn.localize
from mechunlearn import plots
from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.files import whole_file
from mechunlearn.core.grid import Grid
from mechunlearn.core.runcard import RunCard, digest
from mechunlearn.edit import losses, masked_gradient
from mechunlearn.edit.objective import OBJECTIVES, objective_named
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.cells import LIMIT
from mechunlearn.facts.prompts import FactDataset, Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.stats import bootstrap_interval, paired_interval
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import HookedModel

OF_FEATURES = "feature_discovery"  # its units have no weights to compare at one budget
LOCALIZERS = tuple(m.name for m in pkgutil.iter_modules(mechunlearn.localize.__path__) if m.name != OF_FEATURES)
WINDOW = "window"
FIRST_VALIDATION, MOST_VALIDATION = 101, 6
EFFICACY, TRUTH = 0.99, 0.05
CONTROL = "random_units"
MEASURES = {
    "efficacy": "edit",
    "truth": "truth",
    "truth_elsewhere": "other formats",
    "retain": "retain",
    "same_subject": "same subject",
    "text_loss": "text loss",
    "recovery": "recovery",
}
ARM = ("objective", "budget", "localizer")
NAMES = ("stage", *ARM, "lr", "forget_weight", "seed")
COLUMNS = (*NAMES, "selected", "share", *MEASURES, "seconds", "note")
RULE = (
    "of those that reach an edit of .99 with at most .05 of the truth left, on the training prompt and on average over "
    "these sets, the one with the best retain accuracy. *None qualifies*: the strongest edit was taken instead."
)
READING = (
    "*edit*: forget facts that answer the edit target, for objectives that have one, else that no longer give the truth; "
    "*truth*: forget facts that still give it, on the training prompt, and on average over the *other formats*; *retain*: "
    "accuracy on the retain facts; *same subject*: on other relations of the forgotten subjects; *text loss*: nats a token. "
    "Accuracy is greedy over the full vocabulary. In brackets: 95 % bootstrap interval over seeds, which is too narrow for "
    "few of them (five cover the truth in 83 % of cases)."
)


def compare(
    model: HookedModel,
    facts: FactDataset,
    *,
    folder: str | Path,
    localizers: Sequence[str] = ("fact_lookup", "attribution_patching", CONTROL),
    objectives: Sequence[str] = ("injection",),
    budgets: Sequence[float | int | str] = (WINDOW,),
    seeds: int = 5,
    lrs: Sequence[float | int] = (1e-3, 2e-3, 3e-3),
    forget_weights: Sequence[float | int] = (0.2, 1.0),
    forget: int = 64,
    steps: int = 50,
    validation: int = 2,
    attack: bool = False,
    progress: bool = False,
) -> "Comparison":
    """Edit what each localizer finds with each objective, budget and seed, and measure what is gone and what stays.

    A seed s (0 to `seeds` - 1) draws `forget` facts to forget, and is that of localizer and edit as well. A budget is a
    share of the editable weights, of which a unit that scores zero is never taken; or `"window"`: the units that
    `fact_lookup` finds, and for every other localizer as many weights. `lrs` x `forget_weights` is the grid of
    settings, tried on `validation` forget sets of their own (seeds 101, 102, ...); `select` chooses one for each localizer,
    objective and budget, which the test seeds then use. With `attack` each edit is attacked by relearning too.

    Everything is kept in `folder`: a run that was stopped or killed goes on where it was when it is called again with
    the same arguments, and no finished cell is made twice. There are `results.parquet`, `table.md` and `figure.html`
    at the end. A localizer that finds nothing, and an edit that diverges, are rows with a note.

    Cost: validation x rates x forget_weights + seeds edits for each localizer, objective and budget. One model is n = 1,
    however many seeds: run it on several before you call a localizer better. Only `masked_gradient` edits here.

    Raises `MechunlearnError` for a localizer, objective, budget or number out of range, and for a folder that holds
    other files or another grid.

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
    about = {
        "model": repr(model),
        "weights": model.fingerprint,
        "facts": facts.name,
        "data": digest(*(each.to_frame().to_json() for each in (facts, *facts.related.values())), *facts.texts),
        **names,
        "seeds": seeds,
        "forget": forget,
        "steps": steps,
        "validation": validation,
        "attack": attack,
        "versions": RunCard("compare").versions,
    }
    grid = _opened(Path(folder), about)
    work = partial(_cell, sets, grid, steps, attack)
    arms = [dict(zip(ARM, arm, strict=True)) for arm in product(*(names[f"{name}s"] for name in ARM))]
    settings = [{"lr": rate, "forget_weight": w} for rate in names["lrs"] for w in names["forget_weights"]]

    trials = [
        {"stage": "validation", **arm, **setting, "seed": FIRST_VALIDATION + i}
        for i in range(validation)
        for arm in arms
        for setting in settings
    ]
    rows = [work(trial) for trial in track(trials, "choosing settings", disable=not progress)]
    chosen = [select([row for row in rows if arm.items() <= row.items()]) for arm in arms]
    tests = [
        *({"stage": "unedited", "seed": seed} for seed in range(seeds)),
        *(
            {"stage": "test", **arm, **choice, "seed": seed}
            for seed in range(seeds)
            for arm, choice in zip(arms, chosen, strict=True)
        ),
    ]
    rows += [work(test) for test in track(tests, "measuring", disable=not progress)]
    made = Comparison(_frame(rows), about)
    made.save(folder)
    return made


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison found. `frame` has one row a cell, `about` what they have in common.

    Columns: `stage` (`validation`, `unedited` or `test`), the cell's `localizer`, `objective`, `budget`, `lr`,
    `forget_weight` and `seed`; `selected` ("qualifies", or "none qualifies", see `select`); `share` of the editable
    weights; `efficacy` of the edit on the training prompt: the share of forget facts that answer the edit target, for
    objectives that have one, else that no longer give the truth; accuracy of the `truth` there and `truth_elsewhere`, the
    mean over all other formats; accuracy on the `retain` facts, and on `same_subject`, the mean over other relations of
    the forgotten subjects; `text_loss` on passages that no edit trains on, nats a token; `recovery` by relearning;
    `seconds` of the edit; `note`, where something was not found or not finite.
    """

    frame: pd.DataFrame
    about: dict

    def summary(self, short: bool = False) -> pd.DataFrame:
        """Means over seeds as text, `0.98 [0.95, 1.00]` or short `0.98±0.03`, with 95 % bootstrap intervals over seeds."""
        rows = []
        for arm, cells in self._arms():
            measured = cells[cells.truth.notna()]
            rate, weight = cells.lr.iloc[0], cells.forget_weight.iloc[0]
            rows.append(
                {
                    **arm,
                    "lr, weight": "–" if pd.isna(rate) else f"{rate:g}, {weight:g}",
                    "n": str(len(measured)),
                    "share": "–" if measured.share.isna().all() else f"{measured.share.mean():.1%}",
                    **{MEASURES[name]: _mean(cells[name].dropna(), short) for name in self._measures()},
                    "note": _notes(cells),
                }
            )
        return pd.DataFrame(rows)

    def differences(self, short: bool = False) -> pd.DataFrame:
        """How much larger each measure is than with `random_units`, objective, budget and seed the same, as text."""
        arms = [(arm, cells.set_index("seed")) for arm, cells in self._arms()]
        controls = {(arm["objective"], arm["budget"]): cells for arm, cells in arms if arm["localizer"] == CONTROL}
        rows = []
        for arm, cells in arms:
            control = controls.get((arm["objective"], arm["budget"]))
            if control is None or arm["localizer"] == CONTROL:
                continue
            pairs = {name: (cells[name] - control[name]).dropna().index for name in self._measures()}
            row = {
                MEASURES[name]: _difference(cells[name][both], control[name][both], short)
                for name, both in pairs.items()
            }
            rows.append({**arm, "n": str(len(pairs["truth"])), **row})
        return pd.DataFrame(rows)

    def to_markdown(self) -> str:
        """Both tables, how to read them, and how the settings were chosen."""
        about, seeds = self.about, self.about["seeds"]
        compared = self.differences()
        parts = [
            f"# {about['facts']}: {', '.join(about['localizers'])}",
            f"{about['forget']} facts to forget, {about['steps']} steps, on {about['model']}. n counts the seeds (forget "
            f"sets) out of {seeds}; they share one model, so for models n = 1.",
            _markdown(self.summary()),
            READING,
            *((f"## Difference to {CONTROL}, seed by seed", _markdown(compared)) if len(compared) else ()),
            f"Rate and forget weight were chosen on {about['validation']} forget set{'s' * (about['validation'] > 1)} of "
            f"their own for each localizer, objective and budget, among rates {_listed(about['lrs'])} and weights "
            f"{_listed(about['forget_weights'])}: {RULE}",
        ]
        return "\n\n".join(parts) + "\n"

    def figure(self) -> plots.go.Figure:
        """Every measure by objective and budget, a mark for each localizer."""
        marks = [
            {
                "localizer": arm["localizer"],
                "row": f"{arm['objective']}, {arm['budget']}" if arm["objective"] else arm["localizer"],
                "measure": MEASURES[name],
                "mean": values.mean(),
                **dict(zip(("low", "high"), bootstrap_interval(values), strict=True)),
                "n": len(values),
            }
            for arm, cells in self._arms()
            for name in self._measures()
            if len(values := cells[name].dropna())
        ]
        return plots.comparison(pd.DataFrame(marks))

    def save(self, folder: str | Path) -> None:
        """Write `results.parquet`, `table.md` and `figure.html`, which needs no network."""
        with whole_file(Path(folder) / "results.parquet") as beside:
            self.frame.to_parquet(beside, index=False)
        with whole_file(Path(folder) / "table.md") as beside:
            beside.write_text(self.to_markdown(), encoding="utf-8")
        page = self.figure().to_html(include_plotlyjs=True, div_id="comparison", config={"displaylogo": False})
        with whole_file(Path(folder) / "figure.html") as beside:
            beside.write_text(page, encoding="utf-8")

    def _measures(self) -> list[str]:
        return [name for name in MEASURES if self.frame[name].notna().any()]

    def _arms(self) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
        """The cells of the unedited model, then those of each objective, budget and localizer."""
        shown = self.frame[self.frame.stage != "validation"]
        for arm, cells in shown.groupby(list(ARM), sort=False):
            named = dict(zip(ARM, map(str, arm), strict=True))
            named["localizer"] = named["localizer"] or "unedited"
            yield {name: named[name] for name in ("localizer", "objective", "budget")}, cells


def check_grid(
    localizers: Sequence[str],
    objectives: Sequence[str],
    budgets: Sequence[float | int | str],
    seeds: int,
    lrs: Sequence[float | int],
    forget_weights: Sequence[float | int],
    validation: int,
) -> dict[str, list]:
    """What `compare` is asked for, in order and without repetition; `MechunlearnError` for what it cannot do.

    >>> check_grid(["random_units"], ["npo"], [0.05, "window"], 5, [2e-3, 1e-3], [1], 2)["budgets"]
    ['0.05', 'window']
    """
    for what, given, known in (("localizer", localizers, LOCALIZERS), ("objective", objectives, OBJECTIVES)):
        if unknown := [name for name in given if name not in known] or ([""] if not given else []):
            raise MechunlearnError(f"Unknown {what} '{unknown[0]}'. Expected one or more of {', '.join(known)}.")
    shares = [_share(budget) for budget in budgets]
    for what, numbers in (("learning rate", lrs), ("forget weight", forget_weights)):
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            raise MechunlearnError(f"Expected one or more {what}s above 0, not {_listed(numbers) or 'none'}.")
    if not shares:
        raise MechunlearnError(f"No budget is given. Expected shares of the weights, or '{WINDOW}'.")
    if not 1 <= seeds < FIRST_VALIDATION:
        raise MechunlearnError(f"{seeds} seeds are out of range. Expected 1 to {FIRST_VALIDATION - 1}.")
    if not 1 <= validation <= MOST_VALIDATION:
        raise MechunlearnError(f"{validation} validation sets are out of range. Expected 1 to {MOST_VALIDATION}.")
    return {
        "objectives": list(dict.fromkeys(objectives)),
        "budgets": list(dict.fromkeys(shares)),
        "localizers": list(dict.fromkeys(localizers)),
        "lrs": sorted({float(rate) for rate in lrs}),
        "forget_weights": sorted({float(weight) for weight in forget_weights}),
    }


def select(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The setting with the best retain accuracy among those that edit well enough; no robustness metric is looked at.

    `trials` are rows with lr, forget_weight, efficacy, truth and retain, one a validation set and setting. On the mean
    over validation sets a setting qualifies with efficacy >= .99 and truth <= .05. Ties go to the smallest lr, then the
    smallest weight. If none qualifies, the strongest edit is taken, and `selected` says so. A setting that diverged on a
    set is out; sets on which the localizer found nothing do not count.

    >>> trial = {"lr": 0.001, "forget_weight": 1.0, "share": 0.05, "efficacy": 1.0, "truth": 0.0, "retain": 0.9}
    >>> select([trial, trial | {"lr": 0.002, "retain": 0.95}, trial | {"lr": 0.003, "retain": 1.0, "truth": 0.1}])
    {'lr': 0.002, 'forget_weight': 1.0, 'selected': 'qualifies'}
    """
    tried: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for trial in trials:
        if trial.get("share") is not None:
            tried.setdefault((trial["lr"], trial["forget_weight"]), []).append(trial)
    means = {
        setting: {name: round(fmean(row[name] for row in rows), 9) for name in ("efficacy", "truth", "retain")}
        for setting, rows in sorted(tried.items())
        if all(row.get("efficacy") is not None for row in rows)
    }
    if not means:
        return {"lr": None, "forget_weight": None, "selected": "none qualifies"}
    good = {setting: m for setting, m in means.items() if m["efficacy"] >= EFFICACY and m["truth"] <= TRUTH}
    best = max(good, key=lambda s: good[s]["retain"]) if good else max(means, key=lambda s: means[s]["efficacy"])
    selected = "qualifies" if good else "none qualifies"
    return {"lr": best[0], "forget_weight": best[1], "selected": selected}


class _Sets:
    """The forget and retain set of a seed, and what localizers find on it: made when first needed, then kept."""

    def __init__(self, model: HookedModel, facts: FactDataset, forget: int) -> None:
        self.model, self.forget, self.prompts = model, forget, facts.prompts(model)
        self.split, self.found = cache(self._split), cache(self._found)

    def _split(self, seed: int) -> tuple[Prompts, Prompts]:
        return self.prompts.split(self.forget, seed=seed)

    def _found(self, localizer: str, seed: int) -> Localization:
        function = getattr(mechunlearn.localize, localizer)
        settings = {"seed": seed} if "seed" in inspect.signature(function).parameters else {}
        found = function(self.model, self.split(seed)[0], **settings)
        return found.nodes() if isinstance(found, Circuit) else found

    def mask(self, localizer: str, budget: str, seed: int) -> tuple[ComponentMask, float]:
        """What a localizer finds within a budget, and its share of the weights; `MechunlearnError` if that is nothing."""
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
    named = {name: row[name] for name in NAMES if name in row}
    if row["stage"] == "unedited":
        return row | grid.cell(named, partial(_unedited, sets, row["seed"]))
    if row["lr"] is None:
        return row | {"note": "no setting: nothing was found on the validation sets, or every setting diverged"}
    return row | grid.cell(named, partial(_edited, sets, steps, attack, named))


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
    settings = objective_named(cell["objective"], mask)
    chosen = {name: cell[name] for name in ("lr", "forget_weight", "seed")}
    try:
        edit = masked_gradient(model, mask, forget, retain, steps=steps, **chosen, **settings)
    except MechunlearnError as error:
        return {"share": share, "note": str(error)}
    if edit.card.stopped == "interrupted":
        raise KeyboardInterrupt
    aimed = any(name.startswith("target_") for name in losses.needs(settings["loss"]))
    with edit.applied(model):
        found = _measured(model, forget, retain, aimed) | (_side_effects(model, forget) if test else {})
    if test and attack:
        found |= _recovered(model, edit, forget, retain, seed)
    return {"share": share, **found, "seconds": edit.card.seconds}


def _recovered(model: HookedModel, edit: Edit, forget: Prompts, retain: Prompts, seed: int) -> dict[str, Any]:
    """How much relearning gets back. It runs its ceiling and floor for every edit anew, so that a cell stands alone."""
    from mechunlearn.attack.relearning import recovery, relearning

    try:
        found = recovery(relearning(model, edit, forget, retain, seed=seed))
    except MechunlearnError as error:
        return {"note": str(error)}
    back = found.to_dict("index")["edited"]
    broken = {"note": "every attack setting broke the model"} if back["outcome"] == "collapsed" else {}
    return {"recovery": back["recovery"]} | broken


def _measured(model: HookedModel, forget: Prompts, retain: Prompts, aimed: bool | None = None) -> dict[str, float]:
    """On the training prompt: accuracy of the truth on both sets, and how strong the edit is."""
    changed = measure(model, forget)
    truth = _average(changed["accuracy"])
    kept = _average(measure(model, retain.select(range(min(LIMIT, len(retain)))))["accuracy"])
    strength = {} if aimed is None else {"efficacy": _average(changed["target accuracy"]) if aimed else 1 - truth}
    return strength | {"truth": truth, "retain": kept}


def _side_effects(model: HookedModel, forget: Prompts) -> dict[str, float]:
    """The truth in other formats, other facts of the same subjects, and text: what there is of them."""
    facts = forget.facts
    assert facts is not None
    related = [about for each in facts.related.values() if len(about := each.about(facts.subjects))]
    asked = {
        "truth_elsewhere": [facts.prompts(model, format) for format in facts.formats if format != forget.format],
        "same_subject": [about.prompts(model) for about in related],
    }
    found = {
        name: fmean(_average(measure(model, prompts)["accuracy"]) for prompts in each)
        for name, each in asked.items()
        if each
    }
    return found | ({"text_loss": _average(text_loss(model, facts.texts[1::2]))} if facts.texts[1::2] else {})


def _average(values: Tensor) -> float:
    return float(values.double().mean())


def _opened(folder: Path, about: Mapping[str, Any]) -> Grid:
    """The grid in a folder; one that holds other things, and no grid, is refused before anything is written to it."""
    others = sorted(path.name for path in folder.glob("[!.]*"))
    if others and "about.json" not in others:
        raise MechunlearnError(
            f"'{folder}' holds {others[0]} and no grid. Give a new or empty folder, or that of a stopped run."
        )
    return Grid.open(folder, about)


def _share(budget: float | int | str) -> str:
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


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
    words = [name for name in COLUMNS if name in ("stage", *ARM, "selected", "note")]
    numbers = [name for name in COLUMNS if name not in (*words, "seed")]
    return frame.assign(**frame[words].fillna(""), **frame[numbers].astype(float))


def _mean(values: pd.Series, short: bool) -> str:
    return _shown(values.mean(), *bootstrap_interval(values), len(values), short) if len(values) else "–"


def _difference(a: pd.Series, b: pd.Series, short: bool) -> str:
    return _shown(*paired_interval(a, b), len(a), short, sign="+") if len(a) else "–"


def _shown(mean: float, low: float, high: float, n: int, short: bool, sign: str = "") -> str:
    """One seed has no interval."""
    interval = f"±{(high - low) / 2:.2f}" if short else f" [{low:{sign}.2f}, {high:{sign}.2f}]"
    return f"{mean:{sign}.2f}{interval if n > 1 else ''}"


def _notes(cells: pd.DataFrame) -> str:
    """Whether a setting qualified, and what happened on how many of the seeds."""
    happened = cells.note[cells.note != ""].value_counts(sort=False)
    said = [f"{count} of {len(cells)}: {note}" for note, count in happened.items()]
    return "; ".join(([] if cells.selected.iloc[0] != "none qualifies" else ["none qualifies"]) + said)


def _listed(numbers: Iterable[float | int]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(entry).replace("|", "/") for entry in line) + " |" for line in lines)
