"""LoKU (arXiv 2408.06621) on small worlds: the inverted hinge beside other losses, FILA beside other initialisations.

Three worlds are trained from nothing, each with a retain-only model as gold. Every method gets the same grid of learning
rates and the same rule, on a forget set of its own; then five forget sets a world.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from scipy.stats import ks_2samp

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.grid import Grid
from mechunlearn.edit import fisher_lora, losses, masked_gradient
from mechunlearn.edit.fisher_lora import INITS, fisher_information
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.load import world_facts
from mechunlearn.facts.prompts import Asked, Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.memorization import extraction_likelihood, memorization_accuracy, repetition
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.reproduce.shared import workers
from mechunlearn.training.fisher import DiagonalFisher
from mechunlearn.world.generate import World
from mechunlearn.world.small import build_small, forget_sets, small_world

Task = Literal["passages", "facts"]
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
RANK, PASSAGES, PEOPLE = 8, 8, 8
BATCH: dict[str, int] = {"passages": 8, "facts": 24}
STEPS: dict[str, int] = {"passages": 40, "facts": 80}
VALIDATION = 5
KEPT = 0.9
LOSSES: dict[str, dict[str, Any]] = {
    "GA": {"loss": losses.gradient_ascent, "retain_weight": 0.0},
    "GD": {"loss": losses.gradient_ascent},
    "KL": {"loss": losses.gradient_ascent, "retain_loss": losses.kl_retain},
    "NPO": {"loss": losses.npo},
    "IHL alone": {"loss": losses.inverted_hinge, "retain_weight": 0.0},
    "IHL": {"loss": losses.inverted_hinge},
}
BOUNDS = "unedited and gold"
METHODS: dict[Task, tuple[str, ...]] = {
    "passages": (*LOSSES, *(f"LoRA {init}" for init in INITS)),
    "facts": ("GA", "GD", "KL", "NPO", "IHL", "LoRA fila", "LoRA pissa", "LoRA random"),
}


@dataclass(frozen=True)
class Plan:
    """What is run: worlds, forget sets a world, rates, and tasks."""

    folder: Path
    worlds: tuple[int, ...] = (0, 1, 2)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: tuple[float, ...] = RATES
    tasks: tuple[Task, ...] = ("passages", "facts")

    def about(self) -> dict:
        return {
            "reproduction": "loku",
            "worlds": list(self.worlds),
            "seeds": list(self.seeds),
            "rates": list(self.rates),
            "rank": RANK,
            "batch": BATCH,
            "steps": STEPS,
        }


def quick_plan(folder: Path) -> Plan:
    """One world, two forget sets, passages only: what fits into a quarter of an hour."""
    return Plan(folder, worlds=(0,), seeds=(0, 1), tasks=("passages",))


@dataclass(frozen=True)
class Cell:
    """One run: a method at a rate on one forget set of a world."""

    task: Task
    method: str
    world: int
    forget: int
    rate: float = 0.0


def run(plan: Plan, jobs: int = 2, progress: bool = True) -> dict[Task, dict[str, float]]:
    """Build what is missing, run what is missing, and return the chosen rate by task and method.

    Everything is kept in the plan's folder: a killed run continues where it stopped.
    """
    about = plan.about()
    grid, chosen = Grid.open(plan.folder, about), {}
    with workers(jobs, progress) as each:
        every = [(seed, gold) for seed in plan.worlds for gold in (False, True)]
        each(partial(_build, plan.folder), [w for w in every if not _folder(plan.folder, *w).exists()], "worlds")
        for task in plan.tasks:
            validation = [
                Cell(task, method, world, VALIDATION, rate)
                for world in plan.worlds
                for method in METHODS[task]
                for rate in plan.rates
            ]
            each(partial(_cell, plan.folder, about), validation, f"{task}: choosing rates")
            chosen[task] = {method: choose(grid, plan, task, method) for method in METHODS[task]}
            test = [
                Cell(task, method, world, seed, chosen[task].get(method, 0.0))
                for seed in plan.seeds
                for world in plan.worlds
                for method in (BOUNDS, *METHODS[task])
            ]
            each(partial(_cell, plan.folder, about), test, f"{task}: forget sets")
    return chosen


def choose(grid: Grid, plan: Plan, task: Task, method: str) -> float:
    """The rate of a method, from the validation forget set of every world: one rule for all.

    Of the rates that reach the target in most worlds: the fewest steps to it among those whose retain accuracy there is
    at least .9 on average; if none has that, the best retain accuracy. Ties go to the smaller rate.
    """
    scored = []
    for rate in plan.rates:
        cells = [stored(grid, Cell(task, method, world, VALIDATION, rate)) for world in plan.worlds]
        hits = [cell["at hit"] for cell in cells if cell["hit"] is not None]
        kept = sum(hit["retain"] for hit in hits) / len(hits) if hits else 0.0
        steps = sum(cell["hit"] or STEPS[task] for cell in cells) / len(cells)
        scored.append((len(hits), kept >= KEPT, -steps if kept >= KEPT else kept, -rate))
    return -max(scored)[-1]


def stored(grid: Grid, cell: Cell) -> dict:
    """A finished cell's result. Raises `MechunlearnError` if there is none."""

    def absent() -> dict:
        raise MechunlearnError(f"The run {cell} is not finished. Run `mechunlearn reproduce loku` again to continue.")

    return grid.cell(vars(cell), absent)


class Bench:
    """One forget set of one world: prompts to train on, and what is measured."""

    def __init__(self, folder: Path, world: int, forget: int, task: Task) -> None:
        self.task, self.model = task, _model(folder, world, False)
        contents = World.load(_folder(folder, world, False) / "world.json")
        sets = forget_sets(contents)
        texts, people = sets[forget][0][:PASSAGES], sets[forget][1]
        gone = {entry for pair in sets for part in pair for entry in part}
        kept = [text for text in contents.passages if text not in gone]
        names = [name for name in next(iter(contents.facts.values())) if name not in gone]
        self.unseen = contents.control_passages[: len(texts)]
        self.forget_texts, self.retain_texts, self.other_texts = texts, kept[::2], kept[1::2]
        self.text = [text for stories in contents.stories.values() for text in stories[:4]]
        self.relations = [world_facts(_folder(folder, world, False), relation) for relation in contents.facts]
        self._asked: dict[tuple[frozenset[str], str], Prompts] = {}
        self.people, self.retained, self.others = set(people[:PEOPLE]), set(names[::2]), set(names[1::2])

    def prompts(self, model: HookedModel) -> tuple[Prompts, Prompts]:
        """What is trained: forget and retain set."""
        if self.task == "passages":
            spare = self.unseen[0]
            return _passages(model, self.forget_texts, spare), _passages(model, self.retain_texts, spare)
        return self.asked(model, self.people), self.asked(model, self.retained)

    def asked(self, model: HookedModel, people: set[str], format: str = "statement") -> Prompts:
        """Every relation of these people, as one set; the worlds and their golds share a tokenizer."""
        key = (frozenset(people), format)
        if key not in self._asked:
            assert model.tokenizer is not None
            queries = [(f.subject, f.queries[format]) for facts in self.relations for f in facts if f.subject in people]
            rows = [Asked(q.prompt, q.answer, q.target, q.target, subject) for subject, q in queries]
            self._asked[key] = Prompts.from_text(rows, model.tokenizer)
        return self._asked[key]

    def brief(self, model: HookedModel) -> dict[str, float]:
        """What is measured on the way."""
        if self.task == "passages":
            shown = {
                "forget": memorization_accuracy(model, self.forget_texts),
                "retain": memorization_accuracy(model, self.retain_texts[:12]),
            }
        else:
            shown = {
                "forget": measure(model, self.asked(model, self.people))["accuracy"],
                "retain": measure(model, self.asked(model, set(sorted(self.retained)[:16])))["accuracy"],
            }
        shown["text loss"] = text_loss(model, tuple(self.text))
        return {name: float(values.mean()) for name, values in shown.items()}

    def full(self, model: HookedModel, gold_losses: Sequence[float] | None = None) -> dict[str, float]:
        """What is measured where the target is reached, and at the end."""
        openings = [" ".join(text.split()[:3]) for text in self.text[::4]]
        shown = {
            "repetition": repetition(model, openings),
            "other facts": measure(model, self.asked(model, self.others))["accuracy"],
            "other passages": memorization_accuracy(model, self.other_texts),
        }
        if self.task == "passages":
            shown["EL10"] = extraction_likelihood(model, self.forget_texts)
        else:
            shown["other format"] = measure(model, self.asked(model, self.people, "question"))["accuracy"]
        found = self.brief(model) | {name: float(values.mean()) for name, values in shown.items()}
        if gold_losses is not None:
            found["forget quality"] = float(ks_2samp(self.forget_losses(model), gold_losses).pvalue)
        return found

    def forget_losses(self, model: HookedModel) -> list[float]:
        """Loss of each forgotten item: what the distance to the retain-only model is measured on."""
        if self.task == "passages":
            return text_loss(model, self.forget_texts).tolist()
        return (-measure(model, self.asked(model, self.people))["probability"].clamp_min(1e-30).log()).tolist()

    def target(self, gold: HookedModel) -> dict[str, float]:
        """Forgotten is what is no better known than what was never taught."""
        if self.task == "passages":
            return {
                "forget": float(memorization_accuracy(self.model, self.unseen).mean()),
                "EL10": float(extraction_likelihood(self.model, self.unseen).mean()),
            }
        return {"forget": float(measure(gold, self.asked(gold, self.people))["accuracy"].mean())}


def measured(folder: Path, cell: Cell) -> dict:
    """Run one cell: the curve, where the target was first reached, and the end (five times that step, or the last)."""
    bench = Bench(folder, cell.world, cell.forget, cell.task)
    model, gold = bench.model, _model(folder, cell.world, True)
    goal, gold_losses = bench.target(gold), bench.forget_losses(gold)
    final = cell.forget == VALIDATION
    curve: list[dict] = []
    found: dict[str, Any] = {"hit": None, "at hit": None, "at end": None}

    def watch(step: int) -> dict | None:
        last = step == STEPS[cell.task] or (found["hit"] is not None and step >= 5 * found["hit"])
        if step > 4 and step % (2 if step <= 20 else 5) and not last:
            return None
        entry: dict[str, Any] = {"step": step, **bench.brief(model)}
        if found["hit"] is None and entry["forget"] <= goal["forget"]:
            known = extraction_likelihood(model, bench.forget_texts).mean() if "EL10" in goal else 0.0
            if float(known) <= goal.get("EL10", 0.0):
                found["hit"], found["at hit"] = step, bench.full(model, gold_losses)
                last = last or final
        if last:
            found["at end"] = bench.full(model, gold_losses)
        curve.append(entry)
        return {"stop": last}

    (forget, retain), mask = bench.prompts(model), ComponentMask.everything(model)
    shared: dict[str, Any] = {
        "steps": STEPS[cell.task],
        "lr": cell.rate,
        "batch_size": BATCH[cell.task],
        "text_weight": 0.0,
    }
    shared |= {"warmup": 2, "measure": watch, "seed": cell.forget}
    try:
        if cell.method in LOSSES:
            masked_gradient(model, mask, forget, retain, **LOSSES[cell.method], **shared)
        else:
            init: Any = cell.method.removeprefix("LoRA ")
            fisher = None if init in ("pissa", "random") else _fisher(folder, cell.world, cell.forget, cell.task)
            fisher_lora(model, mask, forget, retain, init=init, rank=RANK, fisher=fisher, **shared)
    except MechunlearnError as error:
        found["note"] = str(error)
    if found["at end"] is None:  # it diverged
        found["at end"] = {name: math.nan for name in ("forget", "retain", "text loss", "repetition")}
    return {**found, "curve": curve}


def _passages(model: HookedModel, texts: Sequence[str], other: str) -> Prompts:
    """Passages as prompts of one word, the rest of the passage the answer."""
    assert model.tokenizer is not None
    rest = other.split(maxsplit=1)[1]
    rows = [Asked(text.split(maxsplit=1)[0], text.split(maxsplit=1)[1], rest, rest) for text in texts]
    return Prompts.from_text(rows, model.tokenizer)


def _folder(folder: Path, world: int, gold: bool) -> Path:
    return folder / "worlds" / f"{world}{'-gold' if gold else ''}"


@cache
def _model(folder: Path, world: int, gold: bool) -> HookedModel:
    return load_model(_folder(folder, world, gold))


@cache
def _fisher(folder: Path, world: int, forget: int, task: Task) -> tuple[DiagonalFisher, DiagonalFisher]:
    """Of the forget and the retain set: the same for every initialisation and rate."""
    model = _model(folder, world, False)
    sets = Bench(folder, world, forget, task).prompts(model)
    of_forget, of_retain = (fisher_information(model, ComponentMask.everything(model), prompts) for prompts in sets)
    return of_forget, of_retain


def _build(folder: Path, item: tuple[int, bool]) -> None:
    seed, gold = item
    gone = [entry for pair in forget_sets(small_world(seed)) for part in pair for entry in part]
    build_small(_folder(folder, seed, gold), seed, without=gone if gold else ())


def _cell(folder: Path, about: dict, cell: Cell) -> None:
    work = _bounds if cell.method == BOUNDS else measured
    Grid.open(folder, about).cell(vars(cell), lambda: work(folder, cell))


def _bounds(folder: Path, cell: Cell) -> dict:
    """What the unedited and the retain-only model of a forget set show, and where the target lies."""
    bench, gold = Bench(folder, cell.world, cell.forget, cell.task), _model(folder, cell.world, True)
    compared = bench.forget_losses(gold)
    return {
        "unedited": bench.full(bench.model, compared),
        "gold": bench.full(gold, compared),
        "target": bench.target(gold),
        "family": gold.signature.family,
    }
