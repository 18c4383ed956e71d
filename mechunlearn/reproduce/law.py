"""LAW (arXiv 2405.16720) on fact worlds: facts washed in closed form, beside other editors at the same forget accuracy.

Three worlds are trained from nothing, the shipped one is the fourth, and a larger one shows how the cost grows. Every
method goes along a path of its own, from weak to strong, and stops at the first point where the forget facts are gone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack.relearning import relearning
from mechunlearn.core.files import data_folder
from mechunlearn.core.grid import Grid
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.edit import losses, masked_gradient, memit, mlp_washing, null_space
from mechunlearn.edit.closed_form.target_values import end_of_text
from mechunlearn.edit.closed_form.washing import How, washing
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.load import world_facts
from mechunlearn.facts.prompts import FactDataset, Prompts
from mechunlearn.localize import causal_tracing
from mechunlearn.metrics.answers import answered
from mechunlearn.metrics.text import encode, padded, text_loss
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.reproduce.shared import workers
from mechunlearn.training.covariance import Covariance
from mechunlearn.world.generate import World
from mechunlearn.world.small import build_small
from mechunlearn.world.text import world_text

SHIPPED, LARGE = "factworld", "3"
TRAINED: dict[str, Any] = {"people": 240, "steps": 1600, "passages": 40, "skills": ("copying", "comparison")}
TRAINED_LARGE: dict[str, Any] = {"people": 1000, "steps": 3600, "passages": 40, "skills": ("copying", "comparison")}
WASHED = {SHIPPED: 160}
DOCUMENTS, STORIES = 2500, 8
VALIDATION = 5
GONE, HARM = 0.05, 0.02
STEPS, EVERY = 60, 3
STRENGTHS = (
    40000,
    25000,
    16000,
    10000,
    6400,
    4000,
    2500,
    1600,
    1000,
    630,
    400,
    250,
    160,
    100,
    63,
    40,
    25,
    16,
    10,
    6,
    4,
)
NORMS = (0.1, 0.15, 0.22, 0.33, 0.5, 0.75, 1.1, 1.7, 2.5, 3.8)
RIDGES = (3000, 1000, 300, 100, 30, 10, 3, 1, 0.3, 0.1, 0.01)
RATES = (1e-3, 3e-3, 6e-3, 1e-2, 2e-2)
RELEARNING: dict[str, Any] = {"lrs": {"full": [1e-3, 4e-3]}, "steps": 20, "eval_every": 10, "min_retention": 0.5}


@dataclass(frozen=True)
class Setting:
    """What is chosen on the validation set: target values and their reach, weight of the retain keys, and the method's
    own number (learning rate, growth, share of energy)."""

    towards: str = "end-of-text"
    reach: float = 1.0
    retain_weight: float = 0.0
    own: float = 0.0


def _grid(**given: Sequence) -> tuple[Setting, ...]:
    return tuple(Setting(**dict(zip(given, values))) for values in product(*given.values()))


REACHES, WEIGHTS = (1.0, 1.5, 2.0), (0.1, 0.3, 1.0)
METHODS: dict[str, tuple[Setting, ...]] = {
    "LAW": (Setting(),),
    "LAW, closed-form path": _grid(own=(2.0, 10.0)),
    "MEMIT": (Setting(),),
    "MEMIT, shared value": (Setting("shared"),),
    "MEMIT, reach": _grid(reach=REACHES[1:]),
    "MEMIT, retain keys": _grid(reach=REACHES, retain_weight=WEIGHTS),
    "AlphaEdit": _grid(own=(0.02, 0.2)),
    "GA": _grid(own=RATES),
    "FT to end-of-text": _grid(own=RATES),
    "GD": _grid(own=RATES),
    "FT to end-of-text + retain": _grid(own=RATES),
}
GRADIENT: dict[str, dict[str, Any]] = {
    "GA": {"loss": losses.gradient_ascent, "retain_weight": 0.0, "text_weight": 0.0},
    "FT to end-of-text": {"loss": losses.injection, "retain_weight": 0.0, "text_weight": 0.0},
    "GD": {"loss": losses.gradient_ascent},
    "FT to end-of-text + retain": {"loss": losses.injection},
}
ABLATIONS = (
    "LAW as released",
    "LAW, Adam off",
    "LAW path, elimination off",
    "LAW, Adam off, random layers",
    "LAW, Adam off, other token",
    "LAW, Adam off, covariance of a tenth",
    "MEMIT, mean value",
)
ATTACKED = ("LAW", "MEMIT", "MEMIT, retain keys", "GA", "GD", "FT to end-of-text + retain")
WHERE, BOUNDS, RELEARN, SCALING = "where", "unedited", "relearning", "scaling"


@dataclass(frozen=True)
class Plan:
    """What is run: worlds, forget sets a world, and how many subjects of the large world are washed."""

    folder: Path
    worlds: tuple[str, ...] = ("0", "1", "2", SHIPPED)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sizes: tuple[int, ...] = (100, 300, 900)
    quick: bool = False

    def about(self) -> dict:
        return {
            "reproduction": "law",
            "worlds": list(self.worlds),
            "seeds": list(self.seeds),
            "sizes": list(self.sizes),
            "trained": {k: list(v) if isinstance(v, tuple) else v for k, v in TRAINED.items()},
            "steps": STEPS,
            "gone": GONE,
            "washed": WASHED,
            "documents": [DOCUMENTS, STORIES],
            "paths": [list(STRENGTHS), list(NORMS), list(RIDGES)],
            "settings": {method: [asdict(setting) for setting in settings] for method, settings in METHODS.items()},
            "relearning": RELEARNING,
        }


def quick_plan(folder: Path) -> Plan:
    """The shipped world, two forget sets, no scaling: what fits into a quarter of an hour."""
    return Plan(folder, worlds=(SHIPPED,), seeds=(0, 1), sizes=(), quick=True)


@dataclass(frozen=True)
class Cell:
    """One run: a method with a setting on one forget set of a world."""

    method: str
    world: str
    seed: int = VALIDATION
    setting: Setting = Setting()
    size: int = 0

    def description(self) -> dict:
        return {"method": self.method, "world": self.world, "seed": self.seed, "size": self.size} | asdict(self.setting)


def run(plan: Plan, jobs: int = 2, progress: bool = True) -> dict[str, dict[str, Setting]]:
    """Build what is missing, run what is missing, and return the chosen setting by world and method.

    Everything is kept in the plan's folder: a killed run continues where it stopped.
    """
    about = plan.about()
    grid, chosen = Grid.open(plan.folder, about), {}
    with workers(jobs, progress) as each:
        every = [w for w in (*plan.worlds, *([LARGE] if plan.sizes else [])) if w != SHIPPED]
        each(partial(_build, plan.folder), [w for w in every if not _folder(plan.folder, w).exists()], "worlds")
        work = partial(_cells, plan.folder, about)
        each(work, [[Cell(WHERE, world)] for world in (*plan.worlds, *([LARGE] if plan.sizes else []))], "localizing")
        tried = [
            [Cell(method, world, setting=setting) for setting in settings]
            for world in plan.worlds
            for method, settings in METHODS.items()
        ]
        each(work, tried, "choosing settings")
        chosen = {world: {method: choose(grid, world, method) for method in METHODS} for world in plan.worlds}
        last = [
            [
                Cell(BOUNDS, world, seed),
                *(Cell(method, world, seed, setting) for method, setting in chosen[world].items()),
                *(Cell(method, world, seed, ablated(method, chosen[world])) for method in ABLATIONS),
            ]
            for seed in plan.seeds
            for world in plan.worlds
        ]
        each(work, last, "forget sets")
        attacks = [(Cell(RELEARN, world, seed), chosen[world]) for seed in plan.seeds[:3] for world in plan.worlds]
        each(partial(_attack, plan.folder, about), attacks, "relearning")
        scaled = [
            [Cell(SCALING, LARGE, seed, setting, size)]
            for size in reversed(plan.sizes)
            for seed in plan.seeds[:1]
            for setting in scaling_settings()
        ]
        each(work, scaled, "scaling")
    return chosen


def scaling_settings() -> tuple[Setting, Setting]:
    """Plain MEMIT, and with some reach and retain keys."""
    return Setting(), Setting(reach=REACHES[1], retain_weight=WEIGHTS[0])


def ablated(method: str, chosen: dict[str, Setting]) -> Setting:
    """The setting of an ablation: that of what it changes."""
    if method == "MEMIT, mean value":
        return Setting("mean")
    return chosen["LAW, closed-form path" if "path" in method else "LAW"]


def choose(grid: Grid, world: str, method: str) -> Setting:
    """The setting of a method in a world, from its validation forget set: one rule for all.

    Of the settings that reach forget accuracy .05, and .1 in other words: those that cost no more than .02 nats of text
    loss and .02 of skill accuracy first, and among these (or all, if there are none) the highest mean of neighbours' and
    same subjects' accuracy, less the text loss and skills lost. Ties go to the first of the grid.
    """
    before = stored(grid, Cell(WHERE, world))["unedited"]

    def score(setting: Setting) -> tuple:
        cell = stored(grid, Cell(method, world, setting=setting))
        now = cell["measured"]
        text, skill = now["text loss"] - before["text loss"], before["skills"] - now["skills"]
        kept = (now["neighbours"] + now["same subject"]) / 2 - max(text, 0) - max(skill, 0)
        return (
            cell["reached"],
            now["paraphrase"] <= 2 * GONE,
            text <= HARM and skill <= HARM,
            kept if kept == kept else -math.inf,
        )

    return max(METHODS[method], key=score)


def stored(grid: Grid, cell: Cell) -> dict:
    """A finished cell's result. Raises `MechunlearnError` if there is none."""

    def absent() -> dict:
        raise MechunlearnError(f"The run {cell} is not finished. Run `mechunlearn reproduce law` again to continue.")

    return grid.cell(cell.description(), absent)


class Bench:
    """One forget set of one world (or `size` subjects of it): what is washed and kept, and what is measured.

    Two of three relations of the washed subjects (all three, with a `size`) are washed as statements, and measured in
    other words too; the third is theirs to keep. Of the other subjects two thirds are retained, and one third are
    neighbours, of whom neither the editors nor the text that they are given tell anything.
    """

    def __init__(self, folder: Path, world: str, seed: int, size: int = 0) -> None:
        self.model, self.world, self.seed = _model(folder, world), world, seed
        assert self.model.tokenizer is not None
        self.tokenizer = self.model.tokenizer
        place = _folder(folder, world)
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

    def asked(self, rows: Sequence[int], relations: Sequence[str], format: str = "statement") -> Prompts:
        found = []
        for name in relations:
            for fact in self.sets[name].select(rows):
                found.append(replace(fact.queries[format], options=()))
        return Prompts.from_text(found, self.tokenizer)

    @cached_property
    def forget(self) -> Prompts:
        return self.shown["forget"]

    @cached_property
    def retain(self) -> Prompts:
        return self.asked(self.kept, list(self.sets))

    @cached_property
    def shown(self) -> dict[str, Prompts]:
        every = list(self.sets)
        return {
            "forget": self.asked(self.washed, self.relations),
            "question": self.asked(self.washed, self.relations, "question"),
            "paraphrase": self.asked(self.washed, self.relations, "held_out"),
            "same subject": self.asked(self.washed, [self.other]),
            "retain": self.asked(self.kept[:200], every),
            "neighbours": self.asked(self.near, every),
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
        """Everything that is told of the model as it is now."""
        found = {name: float(answered(self.model, prompts).float().mean()) for name, prompts in self.shown.items()}
        found["skills"] = sum(found[name] for name in self.skills) / len(self.skills)
        found["text loss"] = float(text_loss(self.model, self.held_out_text).mean())
        now = self._next()
        found["KL"] = float((self.reference.exp() * (self.reference - now)).sum(-1).mean())
        return found

    def known(self) -> float:
        """Accuracy on everything that is washed: where a path ends."""
        return float(answered(self.model, self.forget).float().mean())

    def sites(self, layers: Sequence[int]) -> list[str]:
        return [str(Component(layer, "mlp.out")) for layer in layers]

    @cache  # noqa: B019 (a bench lives as long as its cells)
    def covariance(self, layers: tuple[int, ...], every: int = 1) -> Covariance:
        return Covariance.of_text(self.model, self.sites(layers), self.text[::every])

    @cache  # noqa: B019
    def values(self, layers: tuple[int, ...], role: str, towards: str) -> tuple[torch.Tensor, float]:
        """Target values of all forget facts, and the seconds they took."""
        watch = Stopwatch()
        work = washing(
            self.model,
            ComponentMask.of(self.sites(layers), self.model.signature),
            self.forget,
            self.retain,
            How(towards, role, 0, 25, 0.2, 1.0, 64),
            covariance=self.covariance(layers),
            texts=(),
            target_values=None,
            keep=False,
            seed=self.seed,
            progress=False,
        )
        every = torch.zeros(len(self.forget), work.target_values.shape[1])
        every[answered(self.model, self.forget)] = work.target_values
        return every, watch.seconds()


def located(bench: Bench) -> dict:
    """Token role and layers by causal tracing: the strongest MLP, those below it with a quarter of its effect or more, and
    one above, which corrects what they left."""
    facts = bench.asked(bench.washed[:48], bench.relations[:1])
    found = causal_tracing(bench.model, facts, kinds=["mlp_out"], by="role")
    role = found.strongest_role()
    effects = [
        float(found.by_role[f"L{layer}.mlp_out"][found.roles.index(role), 0])
        for layer in range(bench.model.signature.layers)
    ]
    top = max(range(len(effects)), key=effects.__getitem__)
    low = top
    while low > 0 and effects[low - 1] >= effects[top] / 4:
        low -= 1
    layers = list(range(low, min(top + 1, len(effects) - 1) + 1))
    return {"role": role, "layers": layers, "effects": effects, "unedited": bench.measured()}


@dataclass(frozen=True)
class Site:
    """Where a run edits."""

    role: str
    layers: tuple[int, ...]
    mask: ComponentMask


def site(bench: Bench, where: dict, cell: Cell) -> Site:
    """The localized token and layers, and what an ablation puts in their place."""
    count = bench.model.signature.layers
    layers, role = tuple(where["layers"]), where["role"]
    if cell.method == "LAW, Adam off, random layers":
        others = [layer for layer in range(count) if layer not in layers]
        drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(cell.seed))[: len(layers)]
        layers = tuple(sorted(others[i] for i in drawn.tolist()))
    if cell.method == "LAW, Adam off, other token":
        role = "last" if role == "subject last" else "subject last"
    return Site(role, layers, ComponentMask.of(bench.sites(layers), bench.model.signature))


def path(bench: Bench, at: Site, cell: Cell, begin: float = 0.0) -> Iterator[tuple[float, WeightEdit]]:
    """The edits of a closed-form method from weak to strong, of LAW from a norm on."""
    setting, model = cell.setting, bench.model
    values, _ = bench.values(at.layers, at.role, setting.towards)
    covariance = bench.covariance(at.layers)
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
        scale = float(covariance.matrix(bench.sites(at.layers)[0]).diagonal().mean())
        for ridge in RIDGES:
            yield float(ridge), null_space(*given, energy=setting.own, ridge=ridge * scale, **shared)
    elif cell.method == "LAW as released":
        yield 0.0, mlp_washing(*given, ascent="adam", **shared)
    else:
        if cell.method == "LAW, Adam off, covariance of a tenth":
            shared["covariance"] = bench.covariance(at.layers, 10)
        ascent = {"LAW": "adam", "LAW, closed-form path": "path", "LAW path, elimination off": "path"}
        shared |= {"ascent": ascent.get(cell.method, "off"), "eliminate": "elimination off" not in cell.method}
        for norm in [norm for norm in NORMS if norm >= begin]:
            yield float(norm), mlp_washing(*given, band=(norm, norm), growth=setting.own or 1.0, **shared)


def by_gradient(bench: Bench, at: Site, cell: Cell) -> tuple[float, WeightEdit]:
    """A gradient editor on the same weights, ended at the first step where the forget facts are gone."""
    model = bench.model
    end = torch.full((len(bench.forget), 1), end_of_text(model))

    def watch(step: int) -> dict | None:
        if step % EVERY and step != STEPS:
            return None
        known = bench.known()
        return {"known": known, "stop": known <= GONE}

    edit = masked_gradient(
        model,
        at.mask,
        replace(bench.forget, targets=end),
        bench.retain,
        lr=cell.setting.own,
        steps=STEPS,
        texts=bench.text,
        measure=watch,
        seed=cell.seed,
        **GRADIENT[cell.method],
    )
    return float(len(edit.card.trajectory)), edit


def ended(bench: Bench, at: Site, cell: Cell) -> tuple[WeightEdit, float, float]:
    """The first edit of a method's path at which the forget facts are gone, or its last: edit, where on the path, known."""
    if cell.method in GRADIENT:
        strength, edit = by_gradient(bench, at, cell)
        with edit.applied(bench.model):
            return edit, strength, bench.known()
    found: tuple[WeightEdit, float, float] | None = None
    begin = 0.0
    if cell.method == "LAW":  # the schedule moves little: look where it can end without it
        _, norm, _ = ended(bench, at, replace(cell, method="LAW, Adam off"))
        begin = NORMS[max(0, NORMS.index(norm) - 1)]
    for strength, edit in path(bench, at, cell, begin):
        with edit.applied(bench.model):
            known = bench.known()
        if found is None or known < found[2]:
            found = edit, strength, known
        if known <= GONE:
            break
    assert found is not None
    return found


def washed(folder: Path, grid: Grid, cell: Cell) -> dict:
    """Run one method to the end of its path and measure it there."""
    bench = _bench(folder, cell.world, cell.seed)
    at = site(bench, stored(grid, Cell(WHERE, cell.world)), cell)
    _ = bench.reference
    watch = Stopwatch()
    try:
        edit, strength, known = ended(bench, at, cell)
    except MechunlearnError as error:
        names = (*bench.shown, "skills", "text loss", "KL")
        return {"reached": False, "note": str(error), "measured": dict.fromkeys(names, math.nan)}
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


def scaled(folder: Path, grid: Grid, cell: Cell) -> dict:
    """MEMIT towards end-of-text on more and more facts of the large world: what it costs, and what is left."""
    bench = _bench(folder, cell.world, cell.seed, cell.size)
    at = site(bench, stored(grid, Cell(WHERE, cell.world)), cell)
    bench.covariance(at.layers)
    _ = bench.reference
    _, seconds = bench.values(at.layers, at.role, cell.setting.towards)
    edit, strength, known = ended(bench, at, replace(cell, method="MEMIT"))
    with edit.applied(bench.model):
        shown = bench.measured()
    del shown["same subject"]
    return {
        "facts": len(bench.washed) * len(bench.relations),
        "reached": known <= GONE,
        "strength": strength,
        "targets seconds": seconds,
        "edit seconds": edit.card.seconds,
        "peak MiB": edit.card.peak_mib,
        "measured": shown,
    }


def attacked(folder: Path, cell: Cell, chosen: dict[str, Setting]) -> dict:
    """Relearning of one relation by full training, of every attacked method's edit at once: best valid accuracy held out."""
    bench = _bench(folder, cell.world, cell.seed)
    facts: FactDataset = bench.sets[bench.relations[0]]
    forget = facts.select(bench.washed).prompts(bench.model)
    retain = facts.select(bench.kept).prompts(bench.model)
    edits = {
        method: WeightEdit.load(_edit_file(folder, Cell(method, cell.world, cell.seed, chosen[method])))
        for method in ATTACKED
    }
    first = ATTACKED[0]
    beside = {name: edit for name, edit in edits.items() if name != first}
    rows = relearning(bench.model, edits[first], forget, retain, extra_edits=beside, seed=cell.seed, **RELEARNING)
    names = {"edited": first}
    curves: dict[str, dict] = {}
    for (state, rate), curve in rows.groupby(["state", "lr"], sort=False):
        name = names.get(str(state), str(state))
        curves.setdefault(name, {})[f"{rate:g}"] = curve[
            ["step", "held out", "trained", "retain", "valid"]
        ].values.tolist()
    return {"curves": curves, "n": int(rows["n"].iloc[0]), "chance": float(rows["chance"].max())}


def _folder(folder: Path, world: str) -> Path:
    return data_folder() / world if world == SHIPPED else folder / "worlds" / world


def _edit_file(folder: Path, cell: Cell) -> Path:
    slug = cell.method.replace(" ", "-").replace(",", "")
    return folder / "edits" / f"{slug}-{cell.world}-{cell.seed}.safetensors"


@cache
def _model(folder: Path, world: str) -> HookedModel:
    return load_model(_folder(folder, world))


_benches: dict[tuple, Bench] = {}


def _bench(folder: Path, world: str, seed: int, size: int = 0) -> Bench:
    """The last bench that was asked for, or a new one: cells of one forget set follow one another."""
    key = (folder, world, seed, size)
    if key not in _benches:
        _benches.clear()
        _benches[key] = Bench(folder, world, seed, size)
    return _benches[key]


def _build(folder: Path, world: str) -> None:
    settings: dict[str, Any] = TRAINED_LARGE if world == LARGE else TRAINED
    build_small(_folder(folder, world), int(world), **settings)


def _cells(folder: Path, about: dict, cells: Sequence[Cell]) -> None:
    grid = Grid.open(folder, about)
    works: dict[str, Callable[[Cell], dict]] = {
        WHERE: lambda cell: located(_bench(folder, cell.world, cell.seed)),
        BOUNDS: lambda cell: {"measured": _bench(folder, cell.world, cell.seed).measured()},
        SCALING: partial(scaled, folder, grid),
    }
    for cell in cells:
        work = works.get(cell.method, partial(washed, folder, grid))
        grid.cell(cell.description(), partial(work, cell))


def _attack(folder: Path, about: dict, item: tuple[Cell, dict[str, Setting]]) -> None:
    cell, chosen = item
    Grid.open(folder, about).cell(cell.description(), lambda: attacked(folder, cell, chosen))
