"""Is the knowledge gone, and what else went with it? One call, every row beside a random mask of the same weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.evaluation.cells import cells as cells_of
from mechunlearn.evaluation.cells import held_out
from mechunlearn.evaluation.controls import random_control
from mechunlearn.evaluation.drift import next_token_kl
from mechunlearn.evaluation.report import Report
from mechunlearn.evaluation.robustness import Attacked, attack_all, check_attacks
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
    progress: bool = False,
    watch: Callable[[Report], object] | None = None,
) -> Report:
    """Measure an edit on everything known of its facts, before and after, beside a control.

    Splits: `forget` and `retain` in every format; `neighbours`, facts of subjects that share a name with a forgotten
    one and that no edit saw; `same subject`, other relations of the forgotten subjects; `skills`; `text` (loss on the
    half of the passages that editors do not train on, and how far its next-token distributions moved: KL(before || after)). The control is the same editor with the same settings on a
    random mask of the same kinds and weight (of a feature edit, on other units that are active as often), made here unless given;
    `others` are further edits to set beside it.
    Accuracy is greedy over the full vocabulary; every number has a 95 % bootstrap interval over facts; at most 200
    facts, tasks or passages a cell. One edit of one model is n = 1, however many facts: intervals do not cover other models or seeds.

    `attacks` names attacks that try to get the knowledge back ("all", or some of `robustness.ATTACKS`); the report then says
    whether it is gone, hidden, or the model has collapsed. Each runs its ceiling (the unedited model) and its floor (never-taught
    subjects); with a `cache` folder these and every finished attack are kept, so that a killed run goes on and the next edit
    costs less. `watch` is given the report before the first attack and after each.
    """
    names = check_attacks(attacks) if attacks else []
    clock = Stopwatch()
    if control is None:
        control = random_control(model, edit, forget, retain, seed)
    edits: dict[str, Edit | None] = {"before": None, "after": edit, "control": control, **(others or {})}
    frame, cells = pd.DataFrame(), cells_of(model, forget, retain)
    for name, each in edits.items():
        with each.applied(model) if each is not None else nullcontext():
            rows = list(_rows(model, cells, forget))
        rows += _moved(model, each, forget)
        columns = pd.DataFrame(rows).set_index(["split", "format", "metric", "n"])
        intervals = columns["values"].map(lambda values: bootstrap_interval(values, seed))
        frame[name] = columns["values"].map(lambda values: float(sum(values) / len(values)))
        frame[f"{name} low"] = intervals.map(lambda interval: interval[0])
        frame[f"{name} high"] = intervals.map(lambda interval: interval[1])
    report = Report(
        frame.reset_index(),
        list(edits),
        edit.card,
        about={
            "model": repr(model),
            "facts": forget.facts.name if forget.facts is not None else "tokens",
            "forget": len(forget),
            "retain": len(retain),
            "seconds": clock.seconds(),
        }
        | (
            {"example": {name: getattr(forget.queries[0], name) for name in ("prompt", "answer", "target")}}
            if forget.queries
            else {}
        ),
    )
    if watch is not None:
        watch(report)
    if not names:
        return report

    def partial(found: Attacked) -> None:
        if watch is not None:
            watch(replace(report, attacked=found))

    found = attack_all(
        model, edit, forget, retain, attacks=names, cache=cache, seed=seed, progress=progress, watch=partial
    )
    return replace(report, attacked=found, about=report.about | {"seconds": clock.seconds()})


def _rows(model: HookedModel, cells: Sequence[tuple[str, Prompts]], forget: Prompts) -> Iterator[dict]:
    for split, prompts in cells:
        for metric, values in measure(model, prompts).items():
            if metric == "accuracy" or (split != "skills" and not torch.isnan(values).any()):
                yield _row(split, prompts.format, metric, values)
    if texts := held_out(forget):
        yield _row("text", "passages", "loss", text_loss(model, texts))


def _row(split: str, format: str, metric: str, values: torch.Tensor) -> dict:
    return {"split": split, "format": format, "metric": metric, "n": len(values), "values": values.tolist()}


def _moved(model: HookedModel, edit: Edit | None, forget: Prompts) -> list[dict]:
    """How far the edit moves the next-token distributions on ordinary text."""
    texts = held_out(forget)
    if not texts:
        return []
    values = next_token_kl(model, edit, texts).tolist() if edit is not None else [0.0] * len(texts)
    return [{"split": "text", "format": "passages", "metric": "KL to before", "n": len(values), "values": values}]
