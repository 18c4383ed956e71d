"""CodeUnlearn (arXiv 2410.10866) on the topics of the fact world, with the controls its paper lacks.

Codebooks and SAEs are trained in the frozen shipped world, and in a small world frozen and jointly with its model; there a
model is retrained from nothing without each topic. Settings of a topic are chosen on the other topics and on dictionaries
of a seed that no reported number uses.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.files import data_folder
from mechunlearn.core.grid import Grid
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.edit import codebook_delete, dictionary_rows, feature_clamp, losses, masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dictionaries import SAE, Codebook, load_dictionary, spliced
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.features.firing import FiringStatistics, matched_mask, quality
from mechunlearn.features.training import train_codebook, train_sae
from mechunlearn.localize import feature_discovery
from mechunlearn.model.hooked import HookedModel, export, load_model
from mechunlearn.reproduce.shared import workers
from mechunlearn.reproduce.topics import TOPICS, Topics, kept, others
from mechunlearn.world.dictionaries import HELD_OUT, dictionary_texts
from mechunlearn.world.generate import World
from mechunlearn.world.small import SmallCorpus, build_small
from mechunlearn.world.text import world_text

SHIPPED = "factworld"
VALIDATION, KEPT, DRAWS = 100, 0.9, 2
TRAINED: dict[str, Any] = {"steps": 500, "people": 40, "passages": 16, "stories": 100}
TEXTS = 1200
SITES = {SHIPPED: "L3.resid_post"}
SMALL_SITE = "L1.resid_post"
CODEBOOK: dict[str, Any] = {"steps": 1000, "spliced_steps": 100}
JOINT: dict[str, Any] = {"steps": 1000, "spliced_steps": 200, "objective": "ce", "joint": True, "l1": 1e-3}
SAE_STEPS, SAE_USED = 2500, 8
THRESHOLDS, NEAREST = (0.5, 1.0, 1.5, 2.0), (2, 8)
SWEPT_THRESHOLDS = (1.0, 2.0)
STRENGTHS, FEATURE_THRESHOLDS = (0.5, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0)
RATES, GRADIENT_STEPS = (1e-3, 2e-3, 4e-3, 8e-3), 20
GRADIENT_TOPICS = ("kitchen", "sea", "space", "war")

Arm = Literal["frozen", "joint"]


@dataclass(frozen=True)
class Setting:
    """What is chosen: the threshold of log2 enrichment, how many nearest codes are counted (S'), strength, and rate."""

    threshold: float = 0.0
    nearest: int = 0
    strength: float = 0.0
    rate: float = 0.0


def _grid(**given: Sequence) -> tuple[Setting, ...]:
    return tuple(Setting(**dict(zip(given, values))) for values in product(*given.values()))


METHODS: dict[str, tuple[Setting, ...]] = {
    "reselect": _grid(threshold=THRESHOLDS, nearest=NEAREST),
    "zero": _grid(threshold=THRESHOLDS, nearest=NEAREST[:1]),
    "SAE clamp": _grid(threshold=FEATURE_THRESHOLDS, strength=STRENGTHS),
    "SAE zero-ablation": _grid(threshold=FEATURE_THRESHOLDS),
    "SAE rows": _grid(threshold=FEATURE_THRESHOLDS, strength=STRENGTHS),
    "gradient difference": _grid(rate=RATES),
}
CODES = ("reselect", "zero")
CONTROLS = {"random codes": "reselect", "random features": "SAE clamp"}
SPLICED, AMORTIZED, SWEEP = "bottleneck alone", "cumulative", "sweep"


@dataclass(frozen=True)
class Book:
    """A dictionary: of which model, how large, and its seed."""

    world: str = SHIPPED
    arm: Arm = "frozen"
    seed: int = 0
    size: int = 512
    used: int = 2
    site: str = ""

    @property
    def place(self) -> str:
        return self.site or SITES.get(self.world, SMALL_SITE)

    @property
    def slug(self) -> str:
        return f"{self.world}-{self.arm}-{self.place}-{self.size}-{self.used}-{self.seed}"


SWEPT = (
    Book(size=128),
    Book(size=2048),
    Book(used=4),
    Book(used=8),
)


@dataclass(frozen=True)
class Plan:
    """What is run: seeds of the codebooks, the arms, and what is swept."""

    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    arms: tuple[tuple[str, Arm], ...] = ((SHIPPED, "frozen"), ("0", "frozen"), ("0", "joint"))
    swept: tuple[Book, ...] = SWEPT
    quick: bool = False

    def about(self) -> dict:
        return {
            "reproduction": "codeunlearn",
            "seeds": list(self.seeds),
            "arms": [list(arm) for arm in self.arms],
            "swept": [book.slug for book in self.swept],
            "sites": [SITES, SMALL_SITE],
            "trained": TRAINED,
            "texts": TEXTS,
            "codebook": [CODEBOOK, JOINT],
            "SAE": [SAE_STEPS, SAE_USED],
            "settings": {method: [asdict(setting) for setting in settings] for method, settings in METHODS.items()},
            "gradient": [GRADIENT_STEPS, list(GRADIENT_TOPICS)],
            "sweep": list(SWEPT_THRESHOLDS),
            "draws": DRAWS,
            "kept": KEPT,
        }


def quick_plan(folder: Path) -> Plan:
    """The shipped world, two seeds, no sweeps: what fits into a quarter of an hour."""
    return Plan(folder, seeds=(0, 1), arms=((SHIPPED, "frozen"),), swept=(), quick=True)


@dataclass(frozen=True)
class Cell:
    """One run: a method with a setting a topic, on one dictionary."""

    method: str
    book: Book
    settings: dict[str, Setting] = field(default_factory=dict)

    def description(self) -> dict:
        told = {topic: list(asdict(setting).values()) for topic, setting in self.settings.items()}
        return {"method": self.method, **asdict(self.book), "settings": told}


Chosen = dict[str, dict[str, dict[str, Setting]]]


def methods(plan: Plan, world: str, arm: str) -> list[str]:
    """The shipped world has all; a quick run leaves out what trains weights."""
    if (world, arm) != (SHIPPED, "frozen"):
        return list(CODES)
    return [method for method in METHODS if not (plan.quick and method == "gradient difference")]


def run(plan: Plan, jobs: int = 2, progress: bool = True) -> Chosen:
    """Build what is missing, run what is missing, and return the chosen settings by arm, method and topic.

    Everything is kept in the plan's folder: a killed run continues where it stopped.
    """
    about = plan.about()
    grid, chosen = Grid.open(plan.folder, about), {}
    with workers(jobs, progress) as each:
        small = sorted({world for world, _ in plan.arms if world != SHIPPED})
        worlds = [(world, topic) for world in small for topic in ("", *TOPICS)]
        each(partial(_build, plan.folder), [w for w in worlds if not _folder(plan.folder, *w).exists()], "worlds")
        work = partial(_cells, plan.folder, about)
        tried = [
            [
                Cell(method, Book(world, arm, VALIDATION), dict.fromkeys(_tried(method), setting))
                for setting in METHODS[method]
            ]
            for world, arm in plan.arms
            for method in methods(plan, world, arm)
        ]
        firsts = [[Cell(SPLICED, Book(world, arm, VALIDATION))] for world, arm in plan.arms]
        each(work, firsts, "dictionaries of the validation seed")
        each(work, tried, "choosing settings")
        for world, arm in plan.arms:
            book = Book(world, arm, VALIDATION)
            chosen[f"{world} {arm}"] = {
                method: {topic: choose(grid, method, book, topic) for topic in TOPICS}
                for method in methods(plan, world, arm)
            }
        last = []
        for seed, (world, arm) in product(plan.seeds, plan.arms):
            book, mine = Book(world, arm, seed), chosen[f"{world} {arm}"]
            cells = [Cell(SPLICED, book), *(Cell(method, book, settings) for method, settings in mine.items())]
            cells += [Cell(control, book, mine[of]) for control, of in CONTROLS.items() if of in mine]
            last.append([*cells, Cell(AMORTIZED, book, mine["reselect"])])
        each(work, last, "topics")
        sweep = [
            [Cell(SWEEP, replace(book, seed=seed))]
            for seed in plan.seeds
            for book in (*plan.swept, *([Book()] if plan.swept else []))
        ]
        each(work, sweep, "sweeps")
    return chosen


def _tried(method: str) -> Sequence[str]:
    return GRADIENT_TOPICS if method == "gradient difference" else TOPICS


def choose(grid: Grid, method: str, book: Book, topic: str) -> Setting:
    """The setting of a method for a topic, from the other topics on the validation seed: one rule for all.

    Of the settings that keep at least .9 of the topics that are to stay, on average: the lowest accuracy on the deleted
    ones; if none keeps so much, the one that keeps most. Neither the topic nor its near-synonym is looked at. Ties go to the
    first of the grid.
    """
    judged = [other for other in _tried(method) if other in others(topic)]

    def score(setting: Setting) -> tuple:
        cell = stored(grid, Cell(method, book, dict.fromkeys(_tried(method), setting)))
        left = sum(cell["topics"][t]["brief"]["accuracy"][t] for t in judged) / len(judged)
        stays = sum(cell["topics"][t]["kept"] for t in judged) / len(judged)
        return (1, -left) if stays >= KEPT else (0, stays)

    return max(METHODS[method], key=score)


def stored(grid: Grid, cell: Cell) -> dict:
    """The result of a finished cell."""

    def absent() -> dict:
        raise MechunlearnError(f"The run of {cell.method} on {cell.book.slug} is not finished. Run the command again.")

    return grid.cell(cell.description(), absent)


class Bench:
    """One model with its codebook and SAE, and the topics it is measured on."""

    def __init__(self, folder: Path, book: Book) -> None:
        self.folder, self.book = folder, book
        self._references: dict[str, torch.Tensor] = {}
        self._seen: dict[tuple[bool, int | None], dict[str, tuple[FiringStatistics, FiringStatistics]]] = {}
        base = _folder(folder, book.world)
        joint = folder / "joint" / book.slug
        self.model = load_model(joint if book.arm == "joint" and joint.exists() else base)
        if book.arm == "joint" and not joint.exists():
            self._train(joint)
        self.topics = Topics(self.model, tuple(self.documents(60, HELD_OUT)))

    def documents(self, count: int, seed: int) -> list[str]:
        """Text of the world that is no story."""
        if self.book.world == SHIPPED:
            return world_text(documents=count, seed=seed)
        corpus = SmallCorpus(World.load(_folder(self.folder, self.book.world) / "world.json"), stories=0)
        return [document.text for document in corpus.documents(seed, count)]

    def texts(self, seed: int) -> list[str]:
        """What dictionaries are trained on: half stories, half other documents."""
        stories = dictionary_texts(TEXTS, seed)[TEXTS // 2 :]
        return self.documents(TEXTS // 2, seed) + stories

    def _train(self, joint: Path | None = None) -> Codebook:
        book = self.book
        settings = JOINT if book.arm == "joint" else CODEBOOK
        shape: dict[str, Any] = {"size": book.size, "used": book.used, "seed": book.seed}
        made = train_codebook(self.model, book.place, self.texts(book.seed), **settings, **shape)
        made.quality = quality(self.model, made, self.texts(HELD_OUT)[:: TEXTS // 120])
        made.save(self.folder / "codebooks" / book.slug)
        if joint is not None:
            export(self.model, joint)
        return made

    @cached_property
    def codebook(self) -> Codebook:
        folder = self.folder / "codebooks" / self.book.slug
        made = load_dictionary(folder) if folder.exists() else self._train()
        assert isinstance(made, Codebook)
        return made

    @cached_property
    def sae(self) -> SAE:
        folder = self.folder / "saes" / self.book.slug
        if not folder.exists():
            shape: dict[str, Any] = {"size": self.book.size, "used": SAE_USED, "seed": self.book.seed}
            made = train_sae(self.model, self.book.place, self.texts(self.book.seed), steps=SAE_STEPS, **shape)
            made.quality = quality(self.model, made, self.texts(HELD_OUT)[:: TEXTS // 120])
            made.save(folder)
        return SAE.load(folder)

    def seen(self, codes: bool, nearest: int = 0) -> dict[str, tuple[FiringStatistics, FiringStatistics]]:
        """Topics and counterfactuals by the codebook or the SAE; a codebook may count more nearest codes than it uses."""
        counted = nearest if codes and nearest not in (0, self.book.used) else None
        if (codes, counted) not in self._seen:
            self._seen[codes, counted] = self.topics.seen(self.codebook if codes else self.sae, counted)
        return self._seen[codes, counted]

    @cached_property
    def before(self) -> dict[str, Any]:
        """Of the model with the codebook in it, and of the model alone."""
        with spliced(self.model, self.codebook):
            inserted = self.topics.measured()
        return {"inserted": inserted, "alone": self.topics.measured()}

    def mask(self, topic: str, setting: Setting, codes: bool) -> ComponentMask:
        here, there = self.seen(codes, setting.nearest)[topic]
        dictionary = self.codebook if codes else self.sae
        return feature_discovery(self.model, here, dictionary=dictionary, against=there).above(setting.threshold)

    def reference(self, topic: str) -> torch.Tensor | None:
        """Log-probabilities of the model that was retrained without a topic, at the places that are measured."""
        if self.book.world == SHIPPED:
            return None
        if topic not in self._references:
            gold = _model(self.folder, self.book.world, topic)
            self._references[topic] = self.topics.shown.said(gold)[2]
        return self._references[topic]

    def edit(self, method: str, topic: str, setting: Setting, draw: int = 0) -> Edit:
        """The edit of a method for a topic; of a control, on as many units that are active as often."""
        codes = method in CODES or method == "random codes"
        if method == "gradient difference":
            return self.by_gradient(topic, setting)
        mask = self.mask(topic, setting, codes)
        every = [pair[0] for pair in self.seen(codes).values()]
        usage = replace(every[0], **{k: torch.cat([getattr(a, k) for a in every]) for k in vars(every[0])})
        if method in CONTROLS:
            dictionary = self.codebook if codes else self.sae
            mask = matched_mask(usage, mask, dictionary, 10 * self.book.seed + draw)
        if codes:
            how: Literal["reselect", "zero"] = "zero" if method == "zero" else "reselect"
            return codebook_delete(self.model, mask, dictionary=self.codebook, how=how)
        if method == "SAE rows":
            return dictionary_rows(
                self.model, mask, self.topics.stories[topic], dictionary=self.sae, scale=setting.strength
            )
        forget = usage if method in CONTROLS else self.seen(False)[topic][0]
        return feature_clamp(self.model, mask, forget, dictionary=self.sae, scale=setting.strength)

    def by_gradient(self, topic: str, setting: Setting) -> Edit:
        stories = self.topics.stories
        staying = [text for other in others(topic) for text in stories[other][:12]]
        return masked_gradient(
            self.model,
            ComponentMask.everything(self.model),
            self._prompts(stories[topic]),
            self._prompts(staying),
            loss=losses.gradient_ascent,
            lr=setting.rate,
            steps=GRADIENT_STEPS,
            batch_size=16,
            texts=self.documents(96, self.book.seed),
            seed=self.book.seed,
        )

    def _prompts(self, texts: Sequence[str]) -> Prompts:
        assert self.model.tokenizer is not None
        parts = [text.split(" ", 1) for text in texts]
        asked = [Query(first, rest, "river", "river") for first, rest in parts]
        return Prompts.from_text(asked, self.model.tokenizer)


def measured(bench: Bench, cell: Cell) -> dict:
    """A method on each topic, one after another."""
    found: dict[str, Any] = {}
    validating = cell.book.seed == VALIDATION
    codes = cell.method in CODES or cell.method == "random codes"
    before = bench.before["inserted" if codes else "alone"]["accuracy"]
    for topic, setting in cell.settings.items():
        runs = []
        if cell.method != "gradient difference":
            for nearest in (0, setting.nearest):
                bench.seen(codes, nearest)  # text seen before
        for draw in range(DRAWS if cell.method in CONTROLS else 1):
            watch = Stopwatch()
            try:
                edit = bench.edit(cell.method, topic, setting, draw)
            except MechunlearnError as error:
                runs.append({"note": str(error), "brief": bench.before["inserted" if codes else "alone"], "units": 0})
                continue
            seconds = watch.seconds()
            with edit.applied(bench.model):
                brief = bench.topics.brief() if validating else bench.topics.measured(bench.reference(topic), [topic])
            mask: Any = getattr(edit, "mask", ())
            runs.append({"brief": brief, "seconds": seconds, "units": len(mask), "usage": usage(bench, cell, mask)})
        for one in runs:
            one["kept"] = kept(one["brief"]["accuracy"], before, others(topic))
        found[topic] = runs[0] | ({"draws": runs} if len(runs) > 1 else {})
    return {"topics": found}


def usage(bench: Bench, cell: Cell, mask: ComponentMask) -> float:
    """The share of what is active over all stories that the mask's units are."""
    codes = cell.method in CODES or cell.method == "random codes"
    if not (codes or cell.method in ("SAE clamp", "random features", "SAE zero-ablation")):
        return float("nan")
    fired = torch.stack([here.fired.sum(0) for here, _ in bench.seen(codes).values()]).sum(0)
    (chosen,) = mask.sites.values()
    return float(fired[chosen].sum() / fired.sum())


def inserted(bench: Bench, cell: Cell) -> dict:
    """The bottleneck alone: what it costs before anything is deleted, and what comes back without it."""
    sae = bench.sae.quality if (cell.book.world, cell.book.arm) == (SHIPPED, "frozen") else {}
    found = {"codebook": bench.codebook.quality, "SAE": sae, **bench.before}
    if cell.book.world != SHIPPED:
        golds = {}
        with spliced(bench.model, bench.codebook):
            told = bench.topics.shown.said(bench.model)[2]
        for topic in TOPICS:
            gold, reference = _model(bench.folder, cell.book.world, topic), bench.reference(topic)
            assert reference is not None
            from_gold = bench.topics.divergence(reference, told)
            golds[topic] = {**Topics(gold, bench.topics.texts).brief(), "KL of inserted": from_gold}
        found["gold"] = golds
        found["original"] = Topics(_model(bench.folder, cell.book.world, ""), bench.topics.texts).brief()
    return found


def cumulative(bench: Bench, cell: Cell) -> dict:
    """Topics deleted one after another, each added to those before: discovery on cached codes, and the deletion."""
    steps: list[dict] = []
    whole: FeatureEdit | None = None
    for topic, setting in cell.settings.items():
        bench.seen(True, setting.nearest)
        watch = Stopwatch()
        one = codebook_delete(bench.model, bench.mask(topic, setting, True), dictionary=bench.codebook)
        whole = one if whole is None else whole | one
        seconds = watch.seconds()
        with whole.applied(bench.model):
            now = bench.topics.measured()
        steps.append({"topic": topic, "seconds": seconds, "units": len(whole.mask), **now})
    return {"steps": steps}


def swept(bench: Bench, cell: Cell) -> dict:
    """Topic and others at some thresholds; of the codebook that the page is about at every one, and at every S' too."""
    rows = []
    sizes = sorted({cell.book.used, *(n for n in (4, 8, 16) if cell.book.used < n <= cell.book.size // 4)})
    before = bench.before["inserted"]["accuracy"]
    main = cell.book == replace(Book(), seed=cell.book.seed)
    pairs = [(sizes[0], threshold) for threshold in (THRESHOLDS if main else SWEPT_THRESHOLDS)]
    pairs += [(nearest, SWEPT_THRESHOLDS[0]) for nearest in sizes[1:] if main]
    for (nearest, threshold), topic in product(pairs, TOPICS):
        try:
            edit = bench.edit("reselect", topic, Setting(threshold, nearest))
        except MechunlearnError:
            left, stays, units = before[topic], 1.0, 0
        else:
            with edit.applied(bench.model):
                now = bench.topics.brief()["accuracy"]
            left, stays, units = now[topic], kept(now, before, others(topic)), len(edit.mask)  # type: ignore[attr-defined]
        rows.append([nearest, threshold, topic, left, stays, units])
    return {"rows": rows, "quality": bench.codebook.quality, "before": before}


def _folder(folder: Path, world: str, without: str = "") -> Path:
    return (
        data_folder() / world if world == SHIPPED else folder / "worlds" / f"{world}{without and '-without-'}{without}"
    )


@cache
def _model(folder: Path, world: str, without: str) -> HookedModel:
    return load_model(_folder(folder, world, without))


_benches: dict[tuple, Bench] = {}


def _bench(folder: Path, book: Book) -> Bench:
    """The last bench that was asked for, or a new one: cells of one dictionary follow one another."""
    if (folder, book) not in _benches:
        _benches.clear()
        _benches[folder, book] = Bench(folder, book)
    return _benches[folder, book]


def _build(folder: Path, world: tuple[str, str]) -> None:
    name, without = world
    build_small(_folder(folder, name, without), int(name), without=[without] if without else [], **TRAINED)


def _cells(folder: Path, about: dict, cells: Sequence[Cell]) -> None:
    grid = Grid.open(folder, about)
    works: dict[str, Callable[[Bench, Cell], dict]] = {SPLICED: inserted, AMORTIZED: cumulative, SWEEP: swept}
    for cell in cells:
        work = works.get(cell.method, measured)
        grid.cell(cell.description(), partial(_worked, folder, work, cell))


def _worked(folder: Path, work: Callable[[Bench, Cell], dict], cell: Cell) -> dict:
    return work(_bench(folder, cell.book), cell)
