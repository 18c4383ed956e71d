"""What the defaults do to a real model: `python benchmarks/real_defaults.py smollm2 gemma3 -o FOLDER`.

Each draw edits eight facts that the model knows. Every editor runs with its defaults, on masks of three kinds: look-up
MLPs (`fact_lookup`, by paths), attribution patching's units of 5 % of the weights, and random units of the same kinds
and weight as attribution's. Measured on the edited model: `efficacy` (the target is given, or the truth is gone where an
editor erases), `retention` (facts it was shown), `specificity` (the same relation, never shown), `same subject` (other
relations of the forgotten subjects), `other relations` (of all other subjects), and the KL of the next token on held-out
text: samples of the model that no editor sees, and a text file if one is given.

Finished cells are kept in the folder: a killed run goes on. Prints a markdown table of medians over draws; `seconds` are
CPU-seconds of the edit alone, `warned` counts edits that warned of a missed goal, `refused` those that raised an error.
"""

import argparse
import json
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

import mechunlearn as mu
from mechunlearn.core.grid import Grid
from mechunlearn.core.runcard import RunCard
from mechunlearn.evaluation.controls import random_mask
from mechunlearn.evaluation.drift import next_token_kl
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.metrics.answers import answered, measure
from mechunlearn.model.samples import own_texts

if TYPE_CHECKING:
    from collections.abc import Callable

EDITORS = ("masked_gradient", "fisher_lora", "memit", "mlp_washing", "null_space")
AIMED = ("masked_gradient",)  # these train towards targets; the others erase
MASKS = ("fact_lookup", "attribution", "random")
SOURCES = ("countries/capital", "countries/language")
FORGET, MOST = 8, 60
COLUMNS = {
    "efficacy": 2, "retention": 2, "specificity": 2, "other relations": 2, "same subject": 2, "kl": 3, "kl passages": 3, "seconds": 0
}  # fmt: skip
"""What the table shows, with digits."""


@dataclass
class Draw:
    """Facts of one draw, all of which the model knows."""

    forget: mu.Prompts
    retain: mu.Prompts
    cells: dict[str, FactDataset]


def draw(known: FactDataset, seed: int, model: mu.HookedModel) -> Draw:
    """Split a relation, and name what is measured beside it."""
    forget, retain = known.prompts(model).split(forget=FORGET, seed=seed)
    assert forget.facts is not None and retain.facts is not None
    shown = forget.facts.subjects | retain.facts.subjects
    relations = {fact.relation for fact in forget.facts}
    cells = {"specificity": [i for i, f in enumerate(known) if f.subject not in shown and f.relation in relations]}
    found = {name: known.select(rows[:MOST]) for name, rows in cells.items()}
    same, others = [], []
    for facts in known.related.values():
        same += [fact for fact in facts if fact.subject in forget.facts.subjects]
        others += [fact for fact in facts if fact.subject not in forget.facts.subjects]
    others += [fact for fact in known if fact.subject not in shown and fact.relation not in relations]
    for name, facts in (("same subject", same), ("other relations", others)):
        found[name] = (
            FactDataset(name, tuple(facts[:: max(1, len(facts) // MOST)])).known(model) if facts else known[:0]
        )
    return Draw(forget, retain, {name: facts for name, facts in found.items() if len(facts)})


def masks(model: mu.HookedModel, kind: str, forget: mu.Prompts) -> mu.ComponentMask:
    """The units to edit."""
    if kind == "fact_lookup":
        return mu.localize.fact_lookup(model, forget, rule="paths").above(0)
    found = mu.localize.attribution_patching(model, forget).top(weights=0.05)
    return found if kind == "attribution" else random_mask(model, found)


def cell(
    model: mu.HookedModel, drawn: "Callable[[], Draw]", kind: str, editor: str, passages: list[str]
) -> dict[str, Any]:
    """One edit with an editor's defaults, measured."""
    made = drawn()
    try:
        mask = masks(model, kind, made.forget)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            began = time.process_time()
            edit = getattr(mu.edit, editor)(model, mask, made.forget, made.retain)
            seconds = time.process_time() - began
    except mu.MechunlearnError as error:
        return {"note": str(error)[:300]}
    found: dict[str, Any] = {"seconds": round(seconds, 1), "search": edit.card.search}
    found["warned"] = any("met the goal" in str(each.message) for each in told)
    with edit.applied(model):
        truth = float(answered(model, made.forget).float().mean())
        target = float(measure(model, made.forget)["target_accuracy"].mean())
        found["efficacy"] = target if editor in AIMED else 1 - truth
        found["retention"] = float(answered(model, made.retain).float().mean())
        for name, facts in made.cells.items():
            found[name] = float(answered(model, facts.prompts(model)).float().mean())
    found["kl"] = float(next_token_kl(model, edit, own_texts(model, 24, 40, seed=7)).mean())
    if passages:
        found["kl passages"] = float(next_token_kl(model, edit, passages).mean())
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--editors", nargs="+", default=list(EDITORS), choices=EDITORS)
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--facts", nargs="+", default=list(SOURCES), help="what load_facts reads; draws take turns")
    parser.add_argument("--passages", type=Path, help="a text file: its first 20 lines of 200 characters or more")
    parser.add_argument("--json", type=Path, help="write all cells of these models here")
    asked = parser.parse_args()
    lines = asked.passages.read_text().splitlines() if asked.passages else []
    passages = [line.strip().replace(" <unk>", "")[:240] for line in lines if len(line) >= 200][:20]
    done: dict[str, list[dict[str, Any]]] = {}
    for name in asked.models:
        grid = Grid.open(asked.output / Path(name).name, {"model": name, "versions": RunCard("defaults").versions})
        run(name, grid, asked, passages)
        done[name] = grid.frame().astype(object).where(lambda frame: frame.notna(), None).to_dict("records")
        done[name] = [{k: v for k, v in cell.items() if v is not None} for cell in done[name]]
        print(f"\n{name}\n\n{table(done[name])}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(done, indent=1) + "\n")


def run(name: str, grid: Grid, asked: argparse.Namespace, passages: list[str]) -> None:
    """Make what is missing of one model's cells."""
    model = mu.load_model(name)
    sources: dict[str, FactDataset] = {}
    for number in range(asked.draws):
        source = asked.facts[number % len(asked.facts)]
        if source not in sources:
            sources[source] = mu.load_facts(source).known(model)
        made: list[Draw] = []

        def once(source: str = source, number: int = number, made: list[Draw] = made) -> Draw:
            if not made:
                made.append(draw(sources[source], number, model))
            return made[0]

        for editor in asked.editors:
            for kind in asked.masks:
                what = {"draw": number, "facts": source, "mask": kind, "editor": editor}
                print(what, grid.cell(what, partial(cell, model, once, kind, editor, passages)), flush=True)


def table(cells: list[dict[str, Any]]) -> str:
    """The cells of one model as markdown: the median over draws, and the smallest and the largest value.

    With five draws of any distribution these two hold its median in 15 of 16 cases (1 - 2 / 2**5).
    """
    frame, rows = pd.DataFrame(cells), []
    for (editor, kind), found in frame.groupby(["editor", "mask"], sort=False):
        row: dict[str, str] = {"editor": editor, "mask": kind, "draws": str(len(found))}
        for column, digits in COLUMNS.items():
            values = found[column].dropna() if column in found else pd.Series(dtype=float)
            low, middle, high = (round(value, digits) + 0.0 for value in (values.min(), values.median(), values.max()))
            row[column] = f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" if len(values) else "–"
        row["warned"] = str(int(found["warned"].fillna(False).astype(bool).sum())) if "warned" in found else "0"
        row["refused"] = str(int(found["note"].notna().sum())) if "note" in found else "0"
        rows.append(row)
    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
