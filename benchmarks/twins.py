"""Do localizers find where facts were put? AUROC against the known storage site of ground-truth twins.

A twin is the shipped model after further people were taught with only some MLPs trainable, so that the place of storage
is known by construction. Twins are built from the shipped world with different seeds, with the storage either where this
world looks facts up anyway (MLP 1 and 2) or elsewhere (MLP 3 and 4): a localizer that always names the look-up layers gets
the first right and the second wrong. Every localizer sees the same sport facts of new people and says how much each
neuron matters.

Layer level: area under the ROC of the layers' mean |score| against the trained layers. Neuron level, within the trained
layers: area under the ROC of |score| against the tenth of their neurons whose weights changed most, relative to their size.
Intervals are 95 % over twins (Student's t; three twins share one base model, so they say nothing of other worlds).

Also the overlap of all localizers' masks at equal weight on the shipped world, as a table and a heat map.

Run: python benchmarks/twins.py FOLDER   (builds the twins that are missing there; writes docs/ground-truth.md and
FOLDER/overlap.html; then `python docs/pictures.py overlap`)
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.overlap import auroc, layer_auroc, overlap
from mechunlearn.facts.load import load_facts, world_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import (
    activation_patching,
    attribution_patching,
    causal_tracing,
    direct_logit_attribution,
    edge_attribution,
    fact_lookup,
    path_patching,
    random_units,
)
from mechunlearn.metrics.stats import over_worlds
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.plots import overlap_map
from mechunlearn.world.build import build_twin

SITES = {"MLP 1-2, where this world looks facts up": (1, 2), "MLP 3-4": (3, 4)}
SEEDS = (1, 2, 3)
FACTS = 64
MLP = ["mlp.out"]
LOCALIZERS: dict[str, Callable[[HookedModel, Prompts], Localization]] = {
    "fact_lookup, probe": fact_lookup,
    "fact_lookup, paths": lambda model, facts: fact_lookup(model, facts, rule="paths"),
    "activation_patching": lambda model, facts: activation_patching(model, facts, kinds=MLP, neurons=4),
    "attribution_patching": lambda model, facts: attribution_patching(model, facts, kinds=MLP),
    "attribution_patching, IG": lambda model, facts: attribution_patching(model, facts, kinds=MLP, ig_steps=5),
    "attribution_patching, RelP": lambda model, facts: attribution_patching(model, facts, kinds=MLP, rule="relp"),
    "causal_tracing": lambda model, facts: causal_tracing(model, facts, kinds=["mlp_out"]),
    "edge_attribution, IG": lambda model, facts: edge_attribution(model, facts, ig_steps=5).nodes(),
    "path_patching to the logits": path_patching,
    "direct_logit_attribution": lambda model, facts: direct_logit_attribution(model, facts, kinds=MLP),
}
DRAWS = 200
RANDOM, OTHER = f"random_units, mean of {DRAWS} draws", "change in another twin (no localizer)"


HEADER = """# Do localizers find where facts were put?

Written by `python benchmarks/twins.py FOLDER`; do not edit.

All models here are twins of the shipped fact world, which was *trained* to look facts up at the subject
([what that means](world.md)). To each twin 400 further people were taught with only two MLP layers trainable, so the place
of storage is known by construction; 64 of their sport facts are localized. *Layers*: area under the ROC of the layers' mean
|score| against the trained layers. *Neurons*: within the trained layers, area under the ROC of |score| against the tenth of
the neurons whose weights changed most relative to their size. .5 is chance. Three twins each, taught with different seeds;
± is half of the 95 % interval over twins (Student's t). They share one base model: for other worlds, n = 1. The last row
scores neurons by how far they moved in another twin: whether the neuron truth is a property of the site or of the seed.

"""


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("folder", type=Path, help="where twins are, or are built")
    asked.add_argument("--output", type=Path, default=Path("docs/ground-truth.md"), help="the page to write")
    options = asked.parse_args()
    base = load_model("factworld")
    rows = []
    for site, layers in SITES.items():
        for seed in SEEDS:
            folder = options.folder / f"s{seed}-l{layers[0]}{layers[1]}"
            if not folder.exists():
                build_twin(folder, None, layers, seed)
        for seed in SEEDS:
            folder = options.folder / f"s{seed}-l{layers[0]}{layers[1]}"
            rows += scored(base, folder, layers, site, seed)
            print(f"{site}, seed {seed}: done", flush=True)
    found, note = on_the_shipped_world(base)
    page = HEADER + table(pd.DataFrame(rows)) + overlap_text(found, note)
    options.output.write_text(page, encoding="utf-8")
    overlap_map(overlap(found, 0.05)).write_html(options.folder / "overlap.html")
    print(page)


def scored(base: HookedModel, folder: Path, layers: tuple[int, ...], site: str, seed: int) -> list[dict]:
    twin = load_model(folder)
    forget = new_people(base, folder, twin)
    change = changes(base, twin, layers)
    trained = {
        f"L{layer}.mlp.out": torch.full((base.signature.d_mlp,), layer in layers)
        for layer in range(base.signature.layers)
    }
    here = {"storage": site, "seed": seed}
    rows = []
    for name, localize in LOCALIZERS.items():
        found = localize(twin, forget)
        scores = {"layer": layer_auroc(found, trained), "neuron": auroc(found, change)}
        rows.append({**here, "localizer": name, **scores, "note": found.note})
    draws = [random_units(twin, kinds=MLP, seed=draw) for draw in range(DRAWS)]
    scores = {
        "layer": float(np.mean([layer_auroc(draw, trained) for draw in draws])),
        "neuron": float(np.mean([auroc(draw, change) for draw in draws])),
    }
    rows.append({**here, "localizer": RANDOM, **scores, "note": ""})
    other = load_model(folder.parent / folder.name.replace(f"s{seed}", f"s{SEEDS[seed % len(SEEDS)]}"))
    theirs = replace(draws[0], scores=moved(base, other, layers))
    rows.append({**here, "localizer": OTHER, "layer": float("nan"), "neuron": auroc(theirs, change), "note": ""})
    return rows


def new_people(base: HookedModel, folder: Path, twin: HookedModel) -> Prompts:
    """Sport facts of people that only the twin was taught, and that it knows."""
    known = {fact.subject for fact in load_facts("factworld/sport").facts}
    facts = world_facts(folder, "sport")
    new = facts.select([i for i, fact in enumerate(facts.facts) if fact.subject not in known])
    return new.prompts(twin).split(forget=FACTS, seed=0)[0]


def changes(base: HookedModel, twin: HookedModel, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """In each trained layer, the tenth of the neurons whose weights changed most relative to their size."""
    return {site: one >= one.quantile(0.9) for site, one in moved(base, twin, layers).items()}


def moved(base: HookedModel, twin: HookedModel, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """How far each neuron's weights moved, relative to their size."""
    found = {}
    for layer in layers:
        rows = [
            (base.rows(f"L{layer}.{kind}"), twin.rows(f"L{layer}.{kind}")) for kind in ("mlp.in", "mlp.gate", "mlp.out")
        ]
        before, after = torch.cat([a for a, _ in rows], 1), torch.cat([b for _, b in rows], 1)
        found[f"L{layer}.mlp.out"] = (after - before).norm(dim=1) / before.norm(dim=1)
    return found


def table(frame: pd.DataFrame) -> str:
    """Mean AUROC over twins, with a 95 % interval."""
    lines = []
    for site in SITES:
        part = frame[frame.storage == site]
        lines += [f"## Storage in {site}", "", "| localizer | layers | neurons | what it said |", "|---|---|---|---|"]
        for name in (*LOCALIZERS, RANDOM, OTHER):
            rows = part[part.localizer == name]
            notes = "; ".join(dict.fromkeys(note for note in rows.note if note))
            lines.append(f"| {name} | {interval(rows.layer)} | {interval(rows.neuron)} | {notes} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def interval(values: pd.Series) -> str:
    data = values.to_numpy()
    if np.isnan(data).any():
        return ""
    mean, low, high, _ = over_worlds([data])
    return f"{mean:.2f} ± {(high - low) / 2:.2f}"


def on_the_shipped_world(base: HookedModel) -> tuple[dict[str, Localization], str]:
    forget, _ = load_facts("factworld/sport").prompts(base).split(forget=FACTS, seed=0)
    found = {name: localize(base, forget) for name, localize in LOCALIZERS.items()}
    found["random_units"] = random_units(base, forget, kinds=MLP, seed=0)
    notes = [f"{name}: {one.note}." for name, one in found.items() if name.startswith("fact_lookup")]
    return found, " ".join(notes)


def overlap_text(found: dict[str, Localization], note: str) -> str:
    """Overlap of all localizers' masks, one row and one column each."""
    shared = overlap(found, 0.05)
    lines = [
        "## Overlap at equal weight",
        "",
        f"Jaccard overlap of masks of MLP neurons with 5 % of the editable weights on `factworld/sport`, seed 0. {note}",
    ]
    lines += ["", "![The same table as a heat map](images/overlap.png)", ""]
    numbers = range(1, len(shared) + 1)
    lines += [f"| | {' | '.join(map(str, numbers))} |", f"|---|{'---|' * len(shared)}"]
    for number, (name, row) in zip(numbers, shared.iterrows(), strict=True):
        lines.append(f"| {number} {name} | {' | '.join(f'{value:.2f}' for value in row)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
