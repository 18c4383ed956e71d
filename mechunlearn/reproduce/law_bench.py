"""What one cell of the LAW reproduction does: a method follows its path until the forget facts are gone.

A path goes from weak to strong: the norm of the change, the strength of the ridge, or steps of training.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack.relearning import relearning
from mechunlearn.core.grid import Grid
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.edit import losses, masked_gradient, memit, mlp_washing, null_space
from mechunlearn.edit.closed_form.target_values import end_of_text
from mechunlearn.edit.closed_form.washing import How, washing
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.load import world_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import causal_tracing
from mechunlearn.metrics.answers import answered
from mechunlearn.metrics.text import encode, padded, text_loss
from mechunlearn.model.component import Component
from mechunlearn.reproduce.engine import Found, model_in, stored, world_folder
from mechunlearn.training.covariance import Covariance
from mechunlearn.world.generate import World
from mechunlearn.world.text import world_text

if TYPE_CHECKING:
    from mechunlearn.facts.dataset import FactDataset

SHIPPED = "factworld"
WASHED = {SHIPPED: 160}
DOCUMENTS, STORIES = 2500, 8
VALIDATION = 5
GONE = 0.05
STEPS, EVERY = 60, 3
COARSE = (40000, 25000, 16000, 10000, 6400, 4000, 2500, 1600, 1000, 630, 400, 250, 160, 100)
STRENGTHS = (*COARSE, 63, 40, 25, 16, 10, 6, 4)
NORMS = (0.1, 0.15, 0.22, 0.33, 0.5, 0.75, 1.1, 1.7, 2.5, 3.8)
RIDGES = (3000, 1000, 300, 100, 30, 10, 3, 1, 0.3, 0.1, 0.01)
BAND = (1 / 3, 3 / 4)
RELEARNING: dict[str, Any] = {"lrs": {"full": [1e-3, 4e-3]}, "steps": 20, "eval_every": 10, "min_retention": 0.5}
GRADIENT: dict[str, dict[str, Any]] = {
    "GA": {"loss": losses.gradient_ascent, "retain_weight": 0.0, "text_weight": 0.0},
    "FT to end-of-text": {"loss": losses.injection, "retain_weight": 0.0, "text_weight": 0.0},
    "GD": {"loss": losses.gradient_ascent},
    "FT to end-of-text + retain": {"loss": losses.injection},
}
ATTACKED = ("LAW", "MEMIT", "MEMIT, retain keys", "GA", "GD", "FT to end-of-text + retain")
WHERE, BOUNDS, RELEARN, SCALING = "where", "unedited", "relearning", "scaling"


@dataclass(frozen=True)
class Setting:
    """What is chosen for a method on the validation set.

    Attributes:
        towards: The kind of target values.
        reach: How far beyond them the edit aims.
        retain_weight: The weight of the retain keys.
        own: The method's own number: learning rate, growth or share of energy.
    """

    towards: str = "end-of-text"
    reach: float = 1.0
    retain_weight: float = 0.0
    own: float = 0.0


@dataclass(frozen=True)
class Cell:
    """One run of a method on one forget set of a world.

    Attributes:
        method: The method, or `where`, `unedited`, `relearning`, `scaling`.
        world: The world's name or number.
        seed: Which forget set.
        setting: What was chosen for the method.
        size: How many subjects are washed, if not the world's number.
    """

    method: str
    world: str
    seed: int = VALIDATION
    setting: Setting = Setting()
    size: int = 0

    def description(self) -> Found:
        """Return what names the cell."""
        return {"method": self.method, "world": self.world, "seed": self.seed, "size": self.size} | asdict(self.setting)


class Bench:
    """One forget set of one world: what is washed and kept, and what is measured.

    Two of three relations of the washed subjects (all three, if a size is given) are washed as statements and measured
    in other words too; the third is theirs to keep. Of the other subjects two thirds are retained, and one third are
    neighbours: neither the editors nor the text that they are given say anything about them.

    Args:
        folder: The plan's folder.
        world: The world's name or number.
        seed: Which forget set.
        size: How many subjects are washed, if not the world's number.
    """

    def __init__(self, folder: Path, world: str, seed: int, size: int = 0) -> None:
        place = world_folder(folder, world)
        self.model, self.world, self.seed = model_in(place), world, seed
        assert self.model.tokenizer is not None
        self.tokenizer = self.model.tokenizer
        contents = World.load(place / "world.json")
        relations = [name for name, entry in contents.relations.items() if entry["subject"] == "person"]
        self.sets = {name: world_facts(place, name) for name in relations}
        names = list(contents.facts[relations[0]])
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        washed = size or WASHED.get(world, len(names) // 2)
        kept = washed + (len(names) - washed) * 2 // 3
        self.washed, self.kept, self.near = order[:washed], order[washed:kept], order[kept:]
        self.relations = relations if size else [relations[(seed + i) % 3] for i in range(2)]
        self.other = relations[(seed + 2) % 3]
        gone = {names[i] for i in (*self.washed, *self.near)}
        stories = self.sets[relations[0]].texts
        self.text = [*world_text(place, gone, DOCUMENTS, seed), *stories[::2] * STORIES]
        self.held_out_text = stories[1::2]
        self.skills = {
            name: Prompts.from_text(tasks, self.tokenizer) for name, tasks in self.sets[relations[0]].skills.items()
        }

    def _asked(self, rows: Sequence[int], relations: Sequence[str], format: str = "statement") -> Prompts:
        """Return the prompts of some subjects."""
        found = []
        for name in relations:
            for fact in self.sets[name].select(rows):
                found.append(replace(fact.queries[format], options=()))  # noqa: PERF401
        return Prompts.from_text(found, self.tokenizer)

    @cached_property
    def forget(self) -> Prompts:
        """What is washed."""
        return self.shown["forget"]

    @cached_property
    def retain(self) -> Prompts:
        """What editors are given to keep."""
        return self._asked(self.kept, list(self.sets))

    @cached_property
    def shown(self) -> dict[str, Prompts]:
        """Everything of which the accuracy is measured."""
        every = list(self.sets)
        return {
            "forget": self._asked(self.washed, self.relations),
            "question": self._asked(self.washed, self.relations, "question"),
            "paraphrase": self._asked(self.washed, self.relations, "held_out"),
            "same subject": self._asked(self.washed, [self.other]),
            "retain": self._asked(self.kept[:200], every),
            "neighbours": self._asked(self.near, every),
            **self.skills,
        }

    @cached_property
    def reference(self) -> torch.Tensor:
        """The unedited model's log-probabilities of every next token of the neutral text."""
        return self._next()

    @torch.no_grad()
    def _next(self) -> torch.Tensor:
        tokens, weight = padded(encode(self.model, self.held_out_text[::3]))
        return self.model.forward(tokens)[:, :-1].float().log_softmax(-1)[weight > 0].cpu()

    def measured(self) -> dict[str, float]:
        """Measure the model as it is now: accuracies, text loss, and KL from the unedited model."""
        found = {name: float(answered(self.model, prompts).float().mean()) for name, prompts in self.shown.items()}
        found["skills"] = sum(found[name] for name in self.skills) / len(self.skills)
        found["text loss"] = float(text_loss(self.model, self.held_out_text).mean())
        now = self._next()
        found["KL"] = float((self.reference.exp() * (self.reference - now)).sum(-1).mean())
        return found

    def known(self) -> float:
        """Return the accuracy on everything that is washed, which ends a path."""
        return float(answered(self.model, self.forget).float().mean())


@lru_cache(maxsize=8)
def _covariance(bench: Bench, layers: tuple[int, ...], every: int = 1) -> Covariance:
    """Return the covariance of keys on every how many-th document that editors are given."""
    return Covariance.of_text(bench.model, _sites(layers), bench.text[::every])


@lru_cache(maxsize=8)
def _values(bench: Bench, layers: tuple[int, ...], role: str, towards: str) -> tuple[torch.Tensor, float]:
    """Return target values of all forget facts, and the seconds they took."""
    watch = Stopwatch()
    model, covariance = bench.model, _covariance(bench, layers)
    how, mask = How(towards, role, 0, 25, 0.2, 1.0, 64), ComponentMask.of(_sites(layers), model.signature)
    given, quiet = (model, mask, bench.forget, bench.retain, how), dict[str, Any](keep=False, progress=False)
    work = washing(*given, covariance=covariance, texts=(), target_values=None, seed=bench.seed, **quiet)
    every = torch.zeros(len(bench.forget), work.target_values.shape[1])
    every[answered(model, bench.forget)] = work.target_values
    return every, watch.seconds()


def _sites(layers: Sequence[int]) -> list[str]:
    return [str(Component(layer, "mlp.out")) for layer in layers]


bench_of = lru_cache(maxsize=1)(Bench)
"""The last bench, or a new one: the cells of one forget set follow one another."""


def _located(bench: Bench) -> Found:
    """Choose token role and layers by causal tracing, and measure the unedited model.

    The layers are the strongest MLP, those right below it with a quarter of its effect or more, and one above, which
    corrects what they left.
    """
    facts = bench._asked(bench.washed[:48], bench.relations[:1])
    found = causal_tracing(bench.model, facts, kinds=["mlp_out"], by="role")
    role = found.strongest_role()
    place, count = found.roles.index(role), bench.model.signature.layers
    effects = [float(found.by_role[f"L{layer}.mlp_out"][place, 0]) for layer in range(count)]
    top = max(range(count), key=effects.__getitem__)
    low = top
    while low > 0 and effects[low - 1] >= effects[top] / 4:
        low -= 1
    layers = list(range(low, min(top + 1, count - 1) + 1))
    return {"role": role, "layers": layers, "effects": effects, "unedited": bench.measured()}


class _Site(NamedTuple):
    role: str
    layers: tuple[int, ...]
    mask: ComponentMask


def _site(bench: Bench, where: Found, cell: Cell) -> _Site:
    """Return the localized token and layers, or what an ablation puts in their place."""
    layers, role = tuple(where["layers"]), where["role"]
    if cell.method == "LAW, Adam off, random layers":
        others = [layer for layer in range(bench.model.signature.layers) if layer not in layers]
        drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(cell.seed))[: len(layers)]
        layers = tuple(sorted(others[i] for i in drawn.tolist()))
    if cell.method == "LAW, Adam off, other token":
        role = "last" if role == "subject last" else "subject last"
    return _Site(role, layers, ComponentMask.of(_sites(layers), bench.model.signature))


def _path(bench: Bench, at: _Site, cell: Cell, begin: float = 0.0) -> Iterator[tuple[float, WeightEdit]]:
    """Yield the edits of a closed-form method from weak to strong, of LAW from a norm on."""
    setting, model = cell.setting, bench.model
    values, _ = _values(bench, at.layers, at.role, setting.towards)
    covariance = _covariance(bench, at.layers)
    shared: dict[str, Any] = {
        "position": at.role,
        "target": setting.towards,
        "target_values": values,
        "covariance": covariance,
    }
    shared |= {"prefixes": 0, "texts": (), "seed": cell.seed, "overshoot": setting.reach}
    given = (model, at.mask, bench.forget, bench.retain)
    if cell.method.startswith("MEMIT"):
        for strength in STRENGTHS:
            yield (
                float(strength),
                memit(*given, covariance_weight=strength, retain_weight=setting.retain_weight, **shared),
            )
    elif cell.method == "AlphaEdit":
        scale = float(covariance.matrix(_sites(at.layers)[0]).diagonal().mean())
        for ridge in RIDGES:
            yield float(ridge), null_space(*given, energy=setting.own, ridge=ridge * scale, **shared)
    elif cell.method == "LAW as released":
        yield 0.0, mlp_washing(*given, band=BAND, ascent="adam", **shared)
    else:
        if cell.method == "LAW, Adam off, covariance of a tenth":
            shared["covariance"] = _covariance(bench, at.layers, 10)
        ascent = {"LAW": "adam", "LAW, closed-form path": "path", "LAW path, elimination off": "path"}
        shared |= {"ascent": ascent.get(cell.method, "off"), "eliminate": "elimination off" not in cell.method}
        for norm in [norm for norm in NORMS if norm >= begin]:
            yield float(norm), mlp_washing(*given, band=(norm, norm), growth=setting.own or 1.0, **shared)


def _by_gradient(bench: Bench, at: _Site, cell: Cell) -> tuple[float, WeightEdit]:
    """Train the same weights, and end at the first step where the forget facts are gone."""
    model, how = bench.model, GRADIENT[cell.method]
    forget = replace(bench.forget, targets=torch.full((len(bench.forget), 1), end_of_text(model)))

    def watch(step: int) -> Found | None:
        if step % EVERY and step != STEPS:
            return None
        known = bench.known()
        return {"known": known, "stop": known <= GONE}

    shared: dict[str, Any] = {"steps": STEPS, "measure": watch, "seed": cell.seed, **how}
    shared["text_loss"] = losses.cross_entropy
    edit = masked_gradient(model, at.mask, forget, bench.retain, lr=cell.setting.own, texts=bench.text, **shared)
    return float(len(edit.card.trajectory)), edit


def _ended(bench: Bench, at: _Site, cell: Cell) -> tuple[WeightEdit, float, float]:
    """Return the edit that ends a method's path, where on the path it is, and the forget accuracy there.

    It is the first edit at which the forget facts are gone, or else the one that comes closest.
    """
    if cell.method in GRADIENT:
        strength, edit = _by_gradient(bench, at, cell)
        with edit.applied(bench.model):
            return edit, strength, bench.known()
    found: tuple[WeightEdit, float, float] | None = None
    begin = 0.0
    if cell.method == "LAW":  # the schedule moves little: look where it can end without it
        _, norm, _ = _ended(bench, at, replace(cell, method="LAW, Adam off"))
        begin = NORMS[max(0, NORMS.index(norm) - 1)]
    for strength, edit in _path(bench, at, cell, begin):
        with edit.applied(bench.model):
            known = bench.known()
        if found is None or known < found[2]:
            found = edit, strength, known
        if known <= GONE:
            break
    assert found is not None
    return found


def measured(folder: Path, grid: Grid, cell: Cell) -> Found:
    """Return the result of a cell.

    Args:
        folder: The plan's folder.
        grid: The finished cells, of which the localization is read.
        cell: What is run.
    """
    bench = bench_of(folder, cell.world, cell.seed, cell.size)
    if cell.method == WHERE:
        return _located(bench)
    if cell.method == BOUNDS:
        return {"measured": bench.measured()}
    if cell.method == RELEARN:
        return _attacked(folder, bench)
    at = _site(bench, stored(grid, Cell(WHERE, cell.world)), cell)
    _ = bench.reference
    return _scaled(bench, at, cell) if cell.method == SCALING else _washed(folder, bench, at, cell)


def _washed(folder: Path, bench: Bench, at: _Site, cell: Cell) -> Found:
    """Run one method to the end of its path and measure it there."""
    watch = Stopwatch()
    try:
        edit, strength, known = _ended(bench, at, cell)
    except MechunlearnError as error:
        nothing = dict.fromkeys((*bench.shown, "skills", "text loss", "KL"), math.nan)
        return {"reached": False, "note": str(error), "measured": nothing}
    seconds = watch.seconds()
    with edit.applied(bench.model):
        shown = bench.measured()
    if cell.method in ATTACKED and cell.seed != VALIDATION:
        edit.save(_edit_file(folder, cell))
    return {
        "reached": known <= GONE,
        "known": known,
        "strength": strength,
        "seconds": seconds,
        "measured": shown,
        "trajectory": edit.card.trajectory if cell.method not in GRADIENT else [],
        "layers": list(at.layers),
        "role": at.role,
    }


def _scaled(bench: Bench, at: _Site, cell: Cell) -> Found:
    """Wash more and more facts of the large world with MEMIT towards end-of-text: what it costs, and what is left."""
    _covariance(bench, at.layers)
    _, seconds = _values(bench, at.layers, at.role, cell.setting.towards)
    edit, strength, known = _ended(bench, at, replace(cell, method="MEMIT"))
    with edit.applied(bench.model):
        shown = bench.measured()
    del shown["same subject"]
    cost = {"targets seconds": seconds, "edit seconds": edit.card.seconds, "peak MiB": edit.card.peak_mib}
    facts = len(bench.washed) * len(bench.relations)
    return {"facts": facts, "reached": known <= GONE, "strength": strength, **cost, "measured": shown}


def _attacked(folder: Path, bench: Bench) -> Found:
    """Relearn one relation by full training of every attacked method's edit: accuracy on the half held out."""
    facts: FactDataset = bench.sets[bench.relations[0]]
    forget = facts.select(bench.washed).prompts(bench.model)
    retain = facts.select(bench.kept).prompts(bench.model)
    edits = {method: WeightEdit.load(_edit_file(folder, Cell(method, bench.world, bench.seed))) for method in ATTACKED}
    first = ATTACKED[0]
    edit = edits.pop(first)
    rows = relearning(bench.model, edit, forget, retain, extra_edits=edits, seed=bench.seed, **RELEARNING)
    curves: dict[str, Found] = {}
    for (state, rate), curve in rows.groupby(["state", "lr"], sort=False):
        name = first if state == "edited" else str(state)
        points = curve[["step", "held_out", "trained", "retain", "valid"]].values.tolist()
        curves.setdefault(name, {})[f"{rate:g}"] = points
    return {"curves": curves, "n": int(rows["n"].iloc[0]), "chance": float(rows["chance"].max())}


def _edit_file(folder: Path, cell: Cell) -> Path:
    slug = cell.method.replace(" ", "-").replace(",", "")
    return folder / "edits" / f"{slug}-{cell.world}-{cell.seed}.safetensors"
