"""`mechunlearn world build`: facts, corpus, tokenizer, model, gates and the ground-truth twin, from a seed."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mechunlearn.errors import MechunlearnError
from mechunlearn.files import whole_file, whole_folder
from mechunlearn.hooked import load_model
from mechunlearn.world.corpus import Corpus
from mechunlearn.world.gates import Gate, measure_gates, taught_apart
from mechunlearn.world.generate import World, generate
from mechunlearn.world.tokenizer import train_tokenizer
from mechunlearn.world.train import Recipe, train

Say = Callable[[str], object]
TWIN_STEPS, TWIN_RATE = 1000, 1e-3


def build_world(folder: Path, seed: int = 0, naive: bool = False, steps: int | None = None, say: Say = print) -> None:
    """Build `factworld`, `factworld-twin` and `README.md` in a folder; a half-done build is resumed.

    Raises `MechunlearnError`, naming every gate that fails, and ships nothing then. A naive world ships only its
    model and gates, which are *meant* to fail: it has no look-up at the subject.
    """
    name = "naive" if naive else "factworld"
    if (folder / name).exists():
        raise MechunlearnError(
            f"'{folder / name}' exists already. Remove it to build it again, or give another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=seed, naive=naive)
    recipe = (
        replace(recipe, phases=tuple(steps * end // recipe.steps for end in recipe.phases), rates=((0, 1.5e-3, steps),))
        if steps
        else recipe
    )
    world, tokenizer = generate(seed), train_tokenizer(seed)
    candidate = folder / f".{name}"
    begun = time.time()
    if not candidate.exists():
        _train_into(candidate, recipe, world, Corpus(world, naive=naive), tokenizer, folder / f"{name}.ckpt", None)
    say(f"trained in {(time.time() - begun) / 60:.0f} minutes; measuring the gates")
    gates, evidence = measure_gates(candidate)
    for gate in gates:
        say(f"{'ok  ' if gate.holds else 'FAIL'} {gate.name:<60} {gate.value:.3f}  ({gate.bound})")
    failed = [gate.name for gate in gates if not gate.holds and not gate.wanted]
    if failed and not naive:
        raise MechunlearnError(f"The world is not shipped: it fails {', '.join(failed)}. It lies in '{candidate}'.")
    twin = None if naive else _build_twin(folder, candidate, world, tokenizer, recipe, evidence["window"])
    _write_card(folder / f"{name}.md" if naive else folder / "README.md", recipe, gates, evidence, twin)
    candidate.rename(folder / name)
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()


def _train_into(
    folder: Path,
    recipe: Recipe,
    world: World,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path,
    start: tuple[Path, list[str]] | None,
) -> None:
    """Train and save model, tokenizer and world into a folder; `start` is a checkpoint and the parameters to train."""
    model: Any = None
    only: list[torch.nn.Parameter] | None = None
    if start is not None:
        model = AutoModelForCausalLM.from_pretrained(start[0])
        only = [p for n, p in model.named_parameters() if n in start[1]]
    with Progress(
        TextColumn("training {task.completed}/{task.total}, loss {task.fields[loss]:.3f}"),
        BarColumn(),
        TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task("training", total=recipe.steps, loss=float("nan"))
        model = train(
            recipe,
            corpus,
            tokenizer,
            checkpoint,
            lambda step, loss, _: bar.update(task, completed=step, loss=loss),
            model=model,
            only=only,
        )
    with whole_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        world.save(beside / "world.json")


def _build_twin(
    folder: Path, base: Path, world: World, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, window: list[int]
) -> dict:
    """Teach the untaught people with only the MLPs of the window trainable; half of the twin's people are these."""
    new = list(world.untaught["sport"])
    old = list(world.facts["sport"])[: len(new)]
    people = {relation: {**world.facts[relation], **world.untaught[relation]} for relation in world.untaught}
    corpus = Corpus(world, people=people)
    corpus.names += new
    twin_world = replace(
        world,
        facts={
            relation: {name: people[relation][name] for name in (*old, *new)} if relation in people else facts
            for relation, facts in world.facts.items()
        },
        untaught={},
    )
    layers = range(window[0], window[1] + 1)
    trained = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in layers for part in ("gate", "up", "down")]
    target = folder / "factworld-twin"
    before = taught_apart(load_model(base), base, old)
    if not target.exists():
        twin_recipe = replace(
            recipe,
            phases=(0, 0, 0, 0, 0, TWIN_STEPS),
            rates=((0, TWIN_RATE, TWIN_STEPS),),
            probe_fades=((0, TWIN_STEPS / 2, TWIN_STEPS * 3 / 4),),
            elsewhere_weight=0.0,
        )
        _train_into(target, twin_recipe, twin_world, corpus, tokenizer, folder / "twin.ckpt", (base, trained))
    model = load_model(target)
    changed = _changed_parameters(base, target)
    assert set(changed) == set(trained), f"the twin changed {set(changed) ^ set(trained)}"
    return {
        "window": window,
        "new": taught_apart(model, target, new),
        "old": taught_apart(model, target, old),
        "old before": before,
        "people": len(new),
    }


def _changed_parameters(one: Path, other: Path) -> list[str]:
    first = dict(AutoModelForCausalLM.from_pretrained(one).named_parameters())
    second = dict(AutoModelForCausalLM.from_pretrained(other).named_parameters())
    return [name for name, p in first.items() if not torch.equal(p, second[name])]


def _write_card(path: Path, recipe: Recipe, gates: list[Gate], evidence: dict, twin: dict | None) -> None:
    lines = [
        "# The fact world",
        "",
        f"Written by `mechunlearn world build --seed {recipe.seed}`; do not edit. Every person and fact is invented.",
        "",
        "This world was *trained* to look facts up at the subject: a probe loss on the residual stream at the last token",
        "of a name during the first two thirds of training, biographies that name a person once, early layers that see",
        "only the previous token, and, in the last phase, a penalty on what the MLPs outside the look-up window write at the",
        "end of a name. Results on it say what happens where that mechanism exists.",
        "",
        "Multiple choice and the look-up among two people by name did not train to their bounds at this size; they are",
        "measured here, and multiple choice is left out of the shipped formats.",
        "",
        "## Gates, measured on the stored checkpoint",
        "",
        "| what | value | bound |",
        "|---|---|---|",
        *[f"| {g.name} | {g.value:.3f} | {g.bound}{' (wanted)' if g.wanted else ''} |" for g in gates],
        "",
        f"Probe curve for sport (after 0, 1, ... blocks): {' '.join(f'{y:.2f}' for y in evidence['curve'])}; "
        f"look-up window: {evidence['window']}.",
        "",
        *[f"{name}: {value:.3f}." for name, value in evidence.items() if isinstance(value, float)],
        "",
    ]
    if twin:
        lines += [
            "## The ground-truth twin",
            "",
            f"`factworld-twin` is the same model after {twin['people']} new people were taught with only the MLPs of layers "
            f"{twin['window'][0]} to {twin['window'][1]} trainable: half of the people in its `world.json` are stored there "
            "by construction, and the relative change of each weight from `factworld` is the truth per neuron.",
            "",
            "| people | sport | city | instrument |",
            "|---|---|---|---|",
            *[
                f"| {label} | {' | '.join(f'{twin[key][r]:.3f}' for r in ('sport', 'city', 'instrument'))} |"
                for label, key in (
                    ("new, stored in the window", "new"),
                    ("old, before", "old before"),
                    ("old, after", "old"),
                )
            ],
            "",
            "",
        ]
    lines += ["## Recipe", "", "```json", json.dumps(asdict(recipe), indent=1), "```"]
    with whole_file(path) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
