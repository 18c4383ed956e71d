"""Is the knowledge gone, and what else went with it? One call, every row beside a random mask of the same weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import mechunlearn.edit
from mechunlearn.activity import Activity, matched_units
from mechunlearn.components import Component, ComponentMask
from mechunlearn.edit import losses
from mechunlearn.edits import Edit, WeightEdit
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts import FactDataset
from mechunlearn.feature_edits import FeatureEdit
from mechunlearn.hooked import HookedModel
from mechunlearn.localize import random_units
from mechunlearn.metrics import measure, next_token_kl, text_loss
from mechunlearn.prompts import Asked, Prompts
from mechunlearn.report import Report
from mechunlearn.robustness import Attacked, attack_all, check_attacks
from mechunlearn.runcard import Stopwatch
from mechunlearn.stats import bootstrap_interval

LIMIT = 200


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
    frame, cells = pd.DataFrame(), _cells(model, forget, retain)
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
            {"example": {name: getattr(forget.asked[0], name) for name in ("prompt", "answer", "target")}}
            if forget.asked
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


def random_control(model: HookedModel, edit: Edit, forget: Prompts, retain: Prompts, seed: int = 0) -> Edit:
    """The same editor with the same settings on a random mask of the same kinds and weight.

    A closed-form editor collects its covariance there from the forget data set's own passages. Of a feature edit: other
    features or codes that are active about as often on both sets.
    """
    if isinstance(edit, FeatureEdit):
        return _random_features(model, edit, forget, retain, seed)
    assert isinstance(edit, WeightEdit)
    if edit.card.method == "dictionary_rows":
        raise MechunlearnError(
            "An edit of dictionary rows does not hold its dictionary: give evaluate a control= of yours."
        )
    settings = dict(edit.card.settings)
    settings |= {name: losses.named(settings[name]) for name in ("loss", "retain_loss") if name in settings}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    editor = getattr(mechunlearn.edit, edit.card.method)
    return editor(model, random_mask(model, edit.mask, seed), forget, retain, seed=edit.card.seed, **settings)


def _random_features(model: HookedModel, edit: FeatureEdit, forget: Prompts, retain: Prompts, seed: int) -> FeatureEdit:
    parts = []
    for part in edit.parts:
        seen = [Activity.of(model, part.dictionary, prompts) for prompts in (forget, retain)]
        both = Activity(*(torch.cat([getattr(one, name) for one in seen]) for name in vars(seen[0])))
        units, largest = matched_units(both, part.units, seed), both.largest.amax(0)
        values = part.values
        if len(values):
            strength = (-values / largest[part.units].clamp(min=1e-9)).median()
            values = -strength * largest[units]
        parts.append(replace(part, units=units, values=values))
    return FeatureEdit(tuple(parts), edit.signature, replace(edit.card, method=f"random {edit.card.method}", seed=seed))


def random_mask(model: HookedModel, like: ComponentMask, seed: int = 0) -> ComponentMask:
    """A random mask with as many units of every kind as another, over all layers."""
    counts: dict[str, int] = {}
    for component in like:
        counts[component.kind] = counts.get(component.kind, 0) + 1
    tied = {kind for kind in ("mlp.in", "mlp.gate") if counts.get(kind) == counts.get("mlp.out")} & set(counts)
    chosen = ComponentMask({}, model.signature)
    for kind, count in counts.items():
        if kind in tied:
            continue
        noise = random_units(model, kinds=[kind], seed=seed)
        drawn = noise.top(units=count)
        if kind == "mlp.out" and tied:
            extra = [Component(c.layer, k, c.unit) for c in drawn for k in tied]
            drawn = drawn | ComponentMask.of(extra, model.signature)
        chosen = chosen | drawn
    return chosen


def _cells(model: HookedModel, forget: Prompts, retain: Prompts) -> list[tuple[str, Prompts]]:
    """Every split in every format, and the skills, tokenized once for all edits that are measured."""
    if forget.facts is None:
        return [("forget", forget), ("retain", retain)]
    cells = [
        (split, facts.prompts(model, format))
        for split, facts in _splits(forget, retain).items()
        for format in facts.formats
    ]
    for name, tasks in forget.facts.skills.items():
        assert model.tokenizer is not None
        asked = [Asked(q.prompt, q.answer, q.target, q.target) for q in tasks[:LIMIT]]
        cells.append(("skills", Prompts.from_text(asked, model.tokenizer, format=name)))
    return cells


def _rows(model: HookedModel, cells: Sequence[tuple[str, Prompts]], forget: Prompts) -> Iterator[dict]:
    for split, prompts in cells:
        for metric, values in measure(model, prompts).items():
            if metric == "accuracy" or (split != "skills" and not torch.isnan(values).any()):
                yield _row(split, prompts.format, metric, values)
    if held_out := _held_out(forget):
        yield _row("text", "passages", "loss", text_loss(model, held_out))


def _held_out(forget: Prompts) -> tuple[str, ...]:
    """The half of the passages that editors do not train on."""
    return forget.facts.text[1::2][:LIMIT] if forget.facts is not None else ()


def _row(split: str, format: str, metric: str, values: torch.Tensor) -> dict:
    return {"split": split, "format": format, "metric": metric, "n": len(values), "values": values.tolist()}


def _moved(model: HookedModel, edit: Edit | None, forget: Prompts) -> list[dict]:
    """How far the edit moves the next-token distributions on ordinary text."""
    held_out = _held_out(forget)
    if not held_out:
        return []
    values = next_token_kl(model, edit, held_out).tolist() if edit is not None else [0.0] * len(held_out)
    return [{"split": "text", "format": "passages", "metric": "KL to before", "n": len(values), "values": values}]


def _splits(forget: Prompts, retain: Prompts) -> dict[str, FactDataset]:
    if forget.facts is None or retain.facts is None:
        return {}
    splits = {"forget": forget.facts, "retain": retain.facts}
    source = forget.facts.source
    if source is not None:
        names = {word for subject in forget.facts.subjects for word in subject.split()}
        seen = forget.facts.subjects | retain.facts.subjects
        near = {s for s in source.subjects - seen if names & set(s.split())}
        if near:
            splits["neighbours"] = source.about(near)
    for relation, facts in forget.facts.related.items():
        about = facts.about(forget.facts.subjects)
        if len(about):
            splits[f"same subject: {relation}"] = about
    return {split: facts.select(range(min(LIMIT, len(facts)))) for split, facts in splits.items()}
