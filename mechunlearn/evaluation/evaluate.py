"""Is the knowledge gone, and what else went with it? One call, every row beside a random mask of the same weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import check_edit
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.evaluation.cells import cells as cells_of
from mechunlearn.evaluation.cells import held_out
from mechunlearn.evaluation.controls import random_control
from mechunlearn.evaluation.drift import next_token_kl
from mechunlearn.evaluation.report import Report
from mechunlearn.evaluation.robustness import attack_all, check_attacks
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import HookedModel


def evaluate(
    model: HookedModel,
    edit: Edit,
    *,
    forget: Prompts,
    retain: Prompts,
    control: Edit | None = None,
    others: Mapping[str, Edit] | None = None,
    attacks: Sequence[str] | str = (),
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
    watch: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Measure an edit on everything known of its facts, before and after, beside a control.

    Splits: `forget` and `retain` in every format; `neighbours`, facts of subjects that share a name with a forgotten
    one and that no edit saw; `same subject`, other relations of the forgotten subjects; `skills`; `text` (loss on the
    half of the passages that editors do not train on, and how far its next-token distributions moved: KL(before ||
    after)). Accuracy is greedy over the full vocabulary; every number has a 95 % bootstrap interval over facts; at
    most 200 facts, tasks or passages a cell. One edit of one model is n = 1, however many facts: intervals do not
    cover other models or seeds.

    With `attacks` the report also says whether the knowledge is gone, hidden, or the model has collapsed. Each attack
    runs its ceiling (the unedited model) and its floor (never-taught subjects).

    Args:
        model: The unedited model; it is left as it was.
        edit: The edit.
        forget: The facts that it removed.
        retain: The facts that were to stay.
        control: The edit to set beside it; None makes one by the same editor with the same settings on a random mask
            of the same kinds and weight (of a feature edit, on other units that are active as often).
        others: Further edits to set beside it, by name.
        attacks: Names of attacks that try to get the knowledge back (see `robustness.ATTACKS`), or "all".
        cache: A folder in which finished attacks are kept, so that a killed run goes on and the next edit costs less.
        seed: Draws control, attacks and bootstrap.
        progress: Whether to show a bar; None shows one where somebody can see it.
        watch: Called with the report before the first attack and after each.

    Raises:
        MechunlearnError: If `edit` is no edit, an attack is unknown, or no control can be made.
    """
    for each in (edit, *([control] if control is not None else []), *(others or {}).values()):
        check_edit(each)
    names = check_attacks(attacks) if attacks else []
    clock = Stopwatch()
    if control is None:
        control = random_control(model, edit, forget, retain, seed)
    edits: dict[str, Edit | None] = {"before": None, "after": edit, "control": control, **(others or {})}
    frame, cells = pd.DataFrame(), cells_of(model, forget, retain)
    for name, changed in edits.items():
        with changed.applied(model) if changed is not None else nullcontext():
            rows = list(_rows(model, cells, forget))
        values = pd.DataFrame([*rows, *_moved(model, changed, forget)]).set_index(["split", "format", "metric", "n"])[
            "values"
        ]
        frame[name] = values.map(lambda numbers: float(sum(numbers) / len(numbers)))
        ends = values.map(lambda numbers: bootstrap_interval(numbers, seed))
        frame[f"{name}_low"], frame[f"{name}_high"] = ends.str[0], ends.str[1]
    about: dict[str, Any] = {"model": repr(model), "facts": forget.facts.name if forget.facts is not None else "tokens"}
    about |= {"forget": len(forget), "retain": len(retain), "seconds": clock.seconds()}
    if forget.queries:
        about["example"] = {name: getattr(forget.queries[0], name) for name in ("prompt", "answer", "target")}
    report = Report(frame.reset_index(), list(edits), edit.card, about=about)
    watch(report)
    if not names:
        return report
    settings: dict[str, Any] = {"attacks": names, "cache": cache, "seed": seed, "progress": progress}
    settings["watch"] = lambda found: watch(replace(report, attacked=found))
    found = attack_all(model, edit, forget, retain, **settings)
    return replace(report, attacked=found, about=about | {"seconds": clock.seconds()})


def _rows(model: HookedModel, cells: Sequence[tuple[str, Prompts]], forget: Prompts) -> Iterator[dict[str, Any]]:
    """What the model knows now, by fact or text."""
    for split, prompts in cells:
        for metric, values in measure(model, prompts).items():
            if metric == "accuracy" or (split != "skills" and not torch.isnan(values).any()):
                yield _row(split, prompts.format, metric, values)
    if texts := held_out(forget):
        yield _row("text", "passages", "loss", text_loss(model, texts))


def _row(split: str, format: str, metric: str, values: torch.Tensor) -> dict[str, Any]:
    return {"split": split, "format": format, "metric": metric, "n": len(values), "values": values.tolist()}


def _moved(model: HookedModel, edit: Edit | None, forget: Prompts) -> list[dict[str, Any]]:
    """How far the edit moves the next-token distributions on ordinary text."""
    texts = held_out(forget)
    if not texts:
        return []
    values = next_token_kl(model, edit, texts) if edit is not None else torch.zeros(len(texts))
    return [_row("text", "passages", "kl_to_before", values)]
