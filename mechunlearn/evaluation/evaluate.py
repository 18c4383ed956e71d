"""Is the knowledge gone, and what else went with it? One call, every row beside a random mask of the same weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import check_edit
from mechunlearn.core.batches import counter
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.core.steady import steady
from mechunlearn.evaluation.cells import GENERALIZATION, UNSEEN, ordinary_texts
from mechunlearn.evaluation.cells import cells as cells_of
from mechunlearn.evaluation.controls import random_control
from mechunlearn.evaluation.drift import text_drift
from mechunlearn.evaluation.fluency import fluency
from mechunlearn.evaluation.portability import portability
from mechunlearn.evaluation.report import Report
from mechunlearn.evaluation.robustness import attack_all, check_attacks
from mechunlearn.evaluation.same import check_names, check_same
from mechunlearn.evaluation.side_effects import (
    CHANGE,
    ENTROPY,
    FLUENCY,
    KEPT,
    TARGET,
    TRUTH,
    Cell,
    derived,
)
from mechunlearn.evaluation.written import written
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.stats import bootstrap_interval, mean_interval, over_worlds, share_interval
from mechunlearn.model.hooked import HookedModel

SHARES = (TRUTH, TARGET, KEPT)
"""Metrics that are shares of facts, so that their intervals are exact."""


@steady()
def evaluate(
    model: HookedModel,
    edit: Edit,
    *,
    forget: Prompts,
    retain: Prompts,
    control: Edit | None = None,
    others: Mapping[str, Edit] | None = None,
    unseen: Prompts | None = None,
    attacks: Sequence[str] | str = (),
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    watch: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Measure an edit on everything known of its facts, before and after, beside a control.

    Splits: `forget` and `retain` in every format; by their statement alone `unseen`, facts of the data set in neither
    set: what the edit does to facts that nobody showed it; `neighbours`, those whose subject shares a name with a
    forgotten one; `same subject`, other relations of the forgotten subjects; `skills`; `text`: the loss of ordinary
    text, and how far its next-token distributions moved, KL(before || after). Ordinary text is a page of plain English,
    samples of the model itself, and the half of the facts' own passages that editors do not train on. What cannot be
    measured is named in `report.about["left out"]`.

    Of all but the forget facts the metric `kept` is the share still right of those that were right before.
    `Report.side_effects` has the terms of model editing, with `generalization` (forget facts, the mean over all formats
    but the training prompt), `portability` (the other way round, another name, one hop) and `fluency` (n-gram entropy of what
    the model writes). Accuracy is greedy over
    the full vocabulary; every number has a 95 % interval over facts (exact for shares, else by bootstrap); at most 200
    facts, tasks or passages a cell. One edit of one model is n = 1, however many facts: intervals do not cover other
    models or seeds.

    A damaged model is called collapsed (see `damage`), with or without attacks. With `attacks` the report also says
    whether the knowledge is gone or hidden; without unseen facts and ordinary text it never says gone. Each
    attack runs its ceiling (the unedited model) and its floor (never-taught subjects).

    Args:
        model: The unedited model; it is left as it was.
        edit: The edit.
        forget: The facts that it removed.
        retain: The facts that were to stay.
        control: The edit to set beside it; None makes one by the same editor with the same settings on a random mask
            of the same kinds and weight (of a feature edit, on other units that are active as often; of
            `WeightEdit.between`, random units moved by the same differences).
        others: Further edits to set beside it, by name.
        unseen: Facts that no edit saw; None takes those of the data set in neither set. Prompts made of tokens have no
            data set.
        attacks: Names of attacks that try to get the knowledge back (see `robustness.ATTACKS`), or "all".
        cache: A folder in which finished attacks are kept, so that a killed run goes on and the next edit costs less.
        seed: Draws control, attacks and bootstrap.
        progress: Whether to show a bar; None shows one where somebody can see it.
        watch: Called with the report before the first attack and after each.

    Raises:
        MechunlearnError: If `edit` is no edit or in the model already, a fact is in both sets, an attack is unknown, or no
            control can be made. A model or facts that the edit was not made for are warned of.
    """
    for each in (edit, *([control] if control is not None else []), *(others or {}).values()):
        check_edit(each)
    check_names(others or ())
    check_same(model, edit, forget, retain)
    names = check_attacks(attacks) if attacks else []
    clock = Stopwatch()
    if control is None:
        control = random_control(model, edit, forget, retain, seed)
    edits: dict[str, Edit | None] = {"before": None, "after": edit, "control": control, **(others or {})}
    asked, notes = portability(model, forget)
    cells = [*cells_of(model, forget, retain, unseen), *asked]
    texts, left_out = ordinary_texts(model, forget)
    values = _values(model, edits, cells, texts, progress)
    values |= derived(values, forget.facts)
    for what, found in fluency(model, edits, forget, texts).items():
        values[FLUENCY, what, ENTROPY] = found
        values[FLUENCY, what, CHANGE] = {name: entropy - found["before"] for name, entropy in found.items()}
    about: dict[str, Any] = {"model": repr(model), "facts": forget.facts.name if forget.facts is not None else "tokens"}
    about |= {"forget": len(forget), "retain": len(retain), "seconds": clock.seconds()}
    if forget.queries:
        about["example"] = {name: getattr(forget.queries[0], name) for name in ("prompt", "answer", "target")}
    stranger = next((prompts for split, prompts in cells if split == UNSEEN), None)
    if stranger is None:
        left_out.append("No fact is left that no edit saw: give the data set more facts, or evaluate unseen= facts.")
    about["left out"], about["side effects"] = left_out, notes
    sample = written(model, edit, forget, retain, stranger, texts)
    report = Report(_frame(values, seed), list(edits), edit.card, about=about, samples=sample)
    watch(report)
    if not names:
        return report
    settings: dict[str, Any] = {"attacks": names, "cache": cache, "seed": seed, "progress": progress}
    settings["watch"] = lambda found: watch(replace(report, attacked=found))
    attacked = attack_all(model, edit, forget, retain, **settings)
    return replace(report, attacked=attacked, about=about | {"seconds": clock.seconds()})


def _values(
    model: HookedModel,
    edits: Mapping[str, Edit | None],
    cells: Sequence[tuple[str, Prompts]],
    texts: Mapping[str, Sequence[str]],
    progress: bool | None,
) -> dict[Cell, dict[str, Tensor]]:
    """What each model knows, by fact or text: cell by cell, then model by model."""
    values: dict[Cell, dict[str, Tensor]] = {}
    with counter(len(edits) * len(cells) + sum(map(len, texts.values())), "measuring", progress) as done:
        for name, changed in edits.items():
            with changed.applied(model) if changed is not None else nullcontext():
                for cell, found in _rows(model, cells):
                    values.setdefault(cell, {})[name] = found
                    done(cell[2] == "accuracy")
        for format, passages in texts.items():
            for name, measures in text_drift(model, edits, passages, done=done).items():
                for metric, found in measures.items():
                    values.setdefault(("text", format, metric), {})[name] = found
    return values


def _rows(model: HookedModel, cells: Sequence[tuple[str, Prompts]]) -> Iterator[tuple[Cell, Tensor]]:
    """What the model knows now, by fact."""
    for split, prompts in cells:
        edited = split == "forget"
        for metric, values in measure(model, prompts, targets=edited, options=edited, share=True).items():
            if metric == "accuracy" or (split != "skills" and not values.isnan().any()):
                yield (split, prompts.format, metric), values


def _frame(values: Mapping[Cell, Mapping[str, Tensor]], seed: int) -> pd.DataFrame:
    """A mean and an interval for each model, of each cell."""
    rows = []
    for (split, format, metric), found in values.items():
        n = len(next(iter(found.values())))
        row: dict[str, Any] = {"split": split, "format": format, "metric": metric, "n": n}
        for name, numbers in found.items():
            low, high = _interval(split, metric, numbers, seed)
            row |= {name: float(numbers.mean()), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _interval(split: str, metric: str, numbers: Tensor, seed: int) -> tuple[float, float]:
    """Exact for shares, also where a fact is a mean over formats; Student's t for paired changes; else by bootstrap."""
    if split == GENERALIZATION:
        return share_interval(float(numbers.double().sum()), len(numbers))
    if metric == CHANGE:
        estimate = over_worlds([numbers.tolist()])
        return estimate.low, estimate.high
    return (mean_interval if metric in SHARES else bootstrap_interval)(numbers.numpy(), seed)
