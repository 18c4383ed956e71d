"""What one cell of the LoKU reproduction does: unlearn passages or facts of a small world, and measure on the way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from scipy.stats import ks_2samp

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.edit import fisher_lora, losses, masked_gradient
from mechunlearn.edit.fisher_lora import fisher_information
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query
from mechunlearn.facts.load import world_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.memorization import extraction_likelihood, memorization_accuracy, repetition
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import HookedModel
from mechunlearn.reproduce.engine import Found, model_in, world_folder
from mechunlearn.training.fisher import DiagonalFisher
from mechunlearn.world.generate import World
from mechunlearn.world.small import forget_sets

Task = Literal["passages", "facts"]
RANK, PASSAGES, PEOPLE = 8, 8, 8
BATCH: dict[str, int] = {"passages": 8, "facts": 24}
STEPS: dict[str, int] = {"passages": 40, "facts": 80}
VALIDATION = 5
LOSSES: dict[str, dict[str, Any]] = {
    "GA": {"loss": losses.gradient_ascent, "retain_weight": 0.0},
    "GD": {"loss": losses.gradient_ascent},
    "KL": {"loss": losses.gradient_ascent, "retain_loss": losses.kl_retain},
    "NPO": {"loss": losses.npo},
    "IHL alone": {"loss": losses.inverted_hinge, "retain_weight": 0.0},
    "IHL": {"loss": losses.inverted_hinge},
}
BOUNDS = "unedited and gold"


@dataclass(frozen=True)
class Cell:
    """One run on one forget set of a world.

    Attributes:
        task: What is unlearned.
        method: The loss or the initialisation, or `unedited and gold`.
        world: The world's seed.
        forget: Which forget set.
        rate: The learning rate.
    """

    task: Task
    method: str
    world: int
    forget: int
    rate: float = 0.0

    def description(self) -> Found:
        """Return what names the cell."""
        return dict(vars(self))


class Bench:
    """One forget set of one world: prompts to train on, and what is measured.

    Args:
        folder: The plan's folder.
        world: The world's seed.
        forget: Which forget set.
        task: What is unlearned.
    """

    def __init__(self, folder: Path, world: int, forget: int, task: Task) -> None:
        place = world_folder(folder, world)
        self.folder, self.task = folder, task
        self.model, self.gold = model_in(place), model_in(world_folder(folder, world, "-gold"))
        contents = World.load(place / "world.json")
        sets = forget_sets(contents)
        texts, people = sets[forget][0][:PASSAGES], sets[forget][1]
        gone = {entry for pair in sets for part in pair for entry in part}
        kept = [text for text in contents.passages if text not in gone]
        names = [name for name in next(iter(contents.facts.values())) if name not in gone]
        self.unseen = contents.control_passages[: len(texts)]
        self.forget_texts, self.retain_texts, self.other_texts = texts, kept[::2], kept[1::2]
        self.text = [text for stories in contents.stories.values() for text in stories[:4]]
        self.relations = [world_facts(place, relation) for relation in contents.facts]
        self._asked: dict[tuple[frozenset[str], str], Prompts] = {}
        self.people, self.retained, self.others = set(people[:PEOPLE]), set(names[::2]), set(names[1::2])

    def prompts(self) -> tuple[Prompts, Prompts]:
        """Return what is trained: forget and retain set."""
        if self.task == "passages":
            return self._passages(self.forget_texts), self._passages(self.retain_texts)
        return self._facts(self.people), self._facts(self.retained)

    def _passages(self, texts: Sequence[str]) -> Prompts:
        """Return passages as prompts of one word, with the rest of the passage as the answer."""
        assert self.model.tokenizer is not None
        rest = self.unseen[0].split(maxsplit=1)[1]
        rows = [Query(text.split(maxsplit=1)[0], text.split(maxsplit=1)[1], rest, rest) for text in texts]
        return Prompts.from_text(rows, self.model.tokenizer)

    def _facts(self, people: set[str], format: str = "statement") -> Prompts:
        """Return every relation of these people as one set; a world and its gold share a tokenizer."""
        key = (frozenset(people), format)
        if key not in self._asked:
            assert self.model.tokenizer is not None
            rows = [f.queries[format] for facts in self.relations for f in facts if f.subject in people]
            self._asked[key] = Prompts.from_text([replace(q, options=()) for q in rows], self.model.tokenizer)
        return self._asked[key]

    def _brief(self, model: HookedModel) -> dict[str, float]:
        """Return what is measured on the way."""
        if self.task == "passages":
            shown = {
                "forget": memorization_accuracy(model, self.forget_texts),
                "retain": memorization_accuracy(model, self.retain_texts[:12]),
            }
        else:
            shown = {
                "forget": measure(model, self._facts(self.people))["accuracy"],
                "retain": measure(model, self._facts(set(sorted(self.retained)[:16])))["accuracy"],
            }
        shown["text loss"] = text_loss(model, tuple(self.text))
        return {name: float(values.mean()) for name, values in shown.items()}

    def _full(self, model: HookedModel, gold_losses: Sequence[float]) -> dict[str, float]:
        """Return what is measured where the target is reached, and at the end."""
        openings = [" ".join(text.split()[:3]) for text in self.text[::4]]
        shown = {
            "repetition": repetition(model, openings),
            "other facts": measure(model, self._facts(self.others))["accuracy"],
            "other passages": memorization_accuracy(model, self.other_texts),
        }
        if self.task == "passages":
            shown["EL10"] = extraction_likelihood(model, self.forget_texts)
        else:
            shown["other format"] = measure(model, self._facts(self.people, "question"))["accuracy"]
        found = self._brief(model) | {name: float(values.mean()) for name, values in shown.items()}
        return found | {"forget quality": float(ks_2samp(self._forget_losses(model), gold_losses).pvalue)}

    def _forget_losses(self, model: HookedModel) -> list[float]:
        """Return the loss of each forgotten item, on which the distance from the gold model is measured."""
        if self.task == "passages":
            return list(text_loss(model, self.forget_texts).tolist())
        probability = measure(model, self._facts(self.people))["probability"]
        return list((-probability.clamp_min(1e-30).log()).tolist())

    def target(self) -> dict[str, float]:
        """Return where items count as forgotten: known no better than what was never taught."""
        if self.task == "passages":
            return {
                "forget": float(memorization_accuracy(self.model, self.unseen).mean()),
                "EL10": float(extraction_likelihood(self.model, self.unseen).mean()),
            }
        return {"forget": float(measure(self.gold, self._facts(self.people))["accuracy"].mean())}

    def measured(self, cell: Cell) -> Found:
        """Return the result of a cell: the curve, where the target was first reached, and the end.

        The end is five times the step of the target, or the last step; a validation run ends at the target.

        Args:
            cell: What is run.
        """
        model, gold = self.model, self.gold
        goal, gold_losses = self.target(), self._forget_losses(gold)
        if cell.method == BOUNDS:
            shown = {name: self._full(of, gold_losses) for name, of in (("unedited", model), ("gold", gold))}
            return {**shown, "target": goal, "family": gold.signature.family}
        curve: list[Found] = []
        found: Found = {"hit": None, "at hit": None, "at end": None}

        def watch(step: int) -> Found | None:
            last = step == STEPS[cell.task] or (found["hit"] is not None and step >= 5 * found["hit"])
            if step > 4 and step % (2 if step <= 20 else 5) and not last:
                return None
            entry: Found = {"step": step, **self._brief(model)}
            if found["hit"] is None and entry["forget"] <= goal["forget"]:
                known = extraction_likelihood(model, self.forget_texts).mean() if "EL10" in goal else 0.0
                if float(known) <= goal.get("EL10", 0.0):
                    found["hit"], found["at hit"] = step, self._full(model, gold_losses)
                    last = last or cell.forget == VALIDATION
            if last:
                found["at end"] = self._full(model, gold_losses)
            curve.append(entry)
            return {"stop": last}

        given = (model, ComponentMask.everything(model), *self.prompts())
        shared: dict[str, Any] = {"steps": STEPS[cell.task], "text_weight": 0.0, "warmup": 2, "measure": watch}
        size, seed, init = BATCH[cell.task], cell.forget, cell.method.removeprefix("LoRA ")
        try:
            if cell.method in LOSSES:
                how = LOSSES[cell.method] | shared
                masked_gradient(*given, lr=cell.rate, batch_size=size, seed=seed, **how)
            else:
                fisher = None if init in ("pissa", "random") else _fisher(self.folder, cell.world, seed, cell.task)
                shared |= {"init": init, "rank": RANK, "fisher": fisher}
                fisher_lora(*given, lr=cell.rate, batch_size=size, seed=seed, **shared)
        except MechunlearnError as error:
            found["note"] = str(error)
        if found["at end"] is None:  # it diverged
            found["at end"] = dict.fromkeys(("forget", "retain", "text loss", "repetition"), math.nan)
        return {**found, "curve": curve}


@cache
def _fisher(folder: Path, world: int, forget: int, task: Task) -> tuple[DiagonalFisher, DiagonalFisher]:
    """Return those of the forget and the retain set: the same for every initialisation and rate."""
    bench = Bench(folder, world, forget, task)
    everything = ComponentMask.everything(bench.model)
    of_forget, of_retain = (fisher_information(bench.model, everything, prompts) for prompts in bench.prompts())
    return of_forget, of_retain
