"""What one cell of the CodeUnlearn reproduction does: dictionaries are trained, topics deleted, and both measured."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.edit import codebook_delete, dictionary_rows, feature_clamp, losses, masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dictionaries import SAE, Codebook, load_dictionary, spliced
from mechunlearn.features.firing import FiringStatistics, matched_mask, quality
from mechunlearn.features.training import train_codebook, train_sae
from mechunlearn.localize import feature_discovery
from mechunlearn.model.hooked import export, load_model
from mechunlearn.reproduce.engine import Found, model_in, world_folder
from mechunlearn.reproduce.topics import TOPICS, Topics, kept, others
from mechunlearn.world.dictionaries import HELD_OUT, dictionary_texts
from mechunlearn.world.generate import World
from mechunlearn.world.small import SmallCorpus
from mechunlearn.world.text import world_text

if TYPE_CHECKING:
    from mechunlearn.features.feature_edit import FeatureEdit

SHIPPED = "factworld"
VALIDATION, DRAWS = 100, 2
SITES, SMALL_SITE = {SHIPPED: "L3.resid_post"}, "L1.resid_post"
TEXTS = 1200
CODEBOOK: dict[str, Any] = {"steps": 1000, "spliced_steps": 100}
JOINT: dict[str, Any] = {"steps": 1000, "spliced_steps": 200, "objective": "ce", "joint": True, "l1": 1e-3}
SAE_STEPS, SAE_USED = 2500, 8
THRESHOLDS, SWEPT_THRESHOLDS = (0.5, 1.0, 1.5, 2.0), (1.0, 2.0)
GRADIENT_STEPS = 20
CONTROLS = {"random codes": "reselect", "random features": "SAE clamp"}
BY_CODES = ("reselect", "zero", "random codes")
SPLICED, AMORTIZED, SWEEP = "bottleneck alone", "cumulative", "sweep"


@dataclass(frozen=True)
class Setting:
    """What is chosen for a topic.

    Attributes:
        threshold: Of log2 enrichment.
        nearest: How many nearest codes are counted (S').
        strength: Of a clamp.
        rate: The learning rate.
    """

    threshold: float = 0.0
    nearest: int = 0
    strength: float = 0.0
    rate: float = 0.0


@dataclass(frozen=True)
class Book:
    """A dictionary.

    Attributes:
        world: The world of its model.
        arm: Whether the model was frozen or trained jointly with it.
        seed: Its seed.
        size: How many codes it has (K).
        used: How many of them are used at a token (S).
        site: Where it is, if not at the usual place of its world.
    """

    world: str = SHIPPED
    arm: Literal["frozen", "joint"] = "frozen"
    seed: int = 0
    size: int = 512
    used: int = 2
    site: str = ""

    @property
    def place(self) -> str:
        """Where it is."""
        return self.site or SITES.get(self.world, SMALL_SITE)

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return f"{self.world}-{self.arm}-{self.place}-{self.size}-{self.used}-{self.seed}"


@dataclass(frozen=True)
class Cell:
    """One run on one dictionary.

    Attributes:
        method: The method or control, or what else is measured.
        book: The dictionary.
        settings: A setting for each topic.
    """

    method: str
    book: Book
    settings: dict[str, Setting] = field(default_factory=dict, repr=False)

    def description(self) -> Found:
        """Return what names the cell."""
        told = {topic: list(asdict(setting).values()) for topic, setting in self.settings.items()}
        return {"method": self.method, **asdict(self.book), "settings": told}


class Bench:
    """One model with its codebook and SAE, and the topics it is measured on.

    Args:
        folder: The plan's folder.
        book: The dictionary.
    """

    def __init__(self, folder: Path, book: Book) -> None:
        self.folder, self.book = folder, book
        self._seen_by: dict[tuple[bool, int | None], dict[str, tuple[FiringStatistics, FiringStatistics]]] = {}
        self._references: dict[str, torch.Tensor] = {}
        joint = folder / "joint" / book.slug
        trained = book.arm == "frozen" or joint.exists()
        # loaded anew, as joint training changes it
        self.model = load_model(joint if book.arm == "joint" and trained else world_folder(folder, book.world))
        if not trained:
            self._train(joint)
        self.topics = Topics(self.model, tuple(self._documents(60, HELD_OUT)))

    def _documents(self, count: int, seed: int) -> list[str]:
        """Return text of the world that is no story."""
        if self.book.world == SHIPPED:
            return world_text(documents=count, seed=seed)
        place = world_folder(self.folder, self.book.world)
        corpus = SmallCorpus(World.load(place / "world.json"), stories=0)
        return [document.text for document in corpus.documents(seed, count)]

    def _texts(self, seed: int) -> list[str]:
        """Return what dictionaries are trained on: half stories, half other documents."""
        return self._documents(TEXTS // 2, seed) + dictionary_texts(TEXTS, seed)[TEXTS // 2 :]

    def _train(self, joint: Path | None = None) -> Codebook:
        """Train the codebook, and export the model that was trained with it."""
        book = self.book
        how = (JOINT if book.arm == "joint" else CODEBOOK) | {"size": book.size, "used": book.used, "seed": book.seed}
        made = train_codebook(self.model, book.place, self._texts(book.seed), **how)
        made.quality = quality(self.model, made, self._texts(HELD_OUT)[:: TEXTS // 120])
        made.save(self.folder / "codebooks" / book.slug)
        if joint is not None:
            export(self.model, joint)
        return made

    @cached_property
    def codebook(self) -> Codebook:
        """The codebook, trained if need be."""
        folder = self.folder / "codebooks" / self.book.slug
        made = load_dictionary(folder) if folder.exists() else self._train()
        assert isinstance(made, Codebook)
        return made

    @cached_property
    def sae(self) -> SAE:
        """An SAE at the same place, trained if need be."""
        folder, book = self.folder / "saes" / self.book.slug, self.book
        if not folder.exists():
            shape: dict[str, Any] = {"size": book.size, "used": SAE_USED, "seed": book.seed}
            made = train_sae(self.model, book.place, self._texts(book.seed), steps=SAE_STEPS, **shape)
            made.quality = quality(self.model, made, self._texts(HELD_OUT)[:: TEXTS // 120])
            made.save(folder)
        return SAE.load(folder)

    @cached_property
    def before(self) -> Found:
        """What is measured of the model with the codebook in it, and of the model alone."""
        with spliced(self.model, self.codebook):
            inserted = self.topics.measured()
        return {"inserted": inserted, "alone": self.topics.measured()}

    def _seen(self, codes: bool, nearest: int = 0) -> dict[str, tuple[FiringStatistics, FiringStatistics]]:
        """Return what the codebook or the SAE does on topics and counterfactuals, with S' nearest codes counted."""
        counted = nearest if codes and nearest not in (0, self.book.used) else None
        if (codes, counted) not in self._seen_by:
            self._seen_by[codes, counted] = self.topics.seen(self.codebook if codes else self.sae, counted)
        return self._seen_by[codes, counted]

    def _mask(self, topic: str, setting: Setting, codes: bool) -> ComponentMask:
        """Return the codes or features of a topic."""
        here, there = self._seen(codes, setting.nearest)[topic]
        dictionary = self.codebook if codes else self.sae
        return feature_discovery(self.model, here, dictionary=dictionary, against=there).above(setting.threshold)

    def _reference(self, topic: str) -> torch.Tensor | None:
        """Return the log-probabilities of a model that was retrained without a topic, where there is one."""
        if self.book.world != SHIPPED and topic not in self._references:
            gold = model_in(world_folder(self.folder, self.book.world, f"-without-{topic}"))
            self._references[topic] = self.topics.shown.said(gold)[2]
        return self._references.get(topic)

    def _edit(self, method: str, topic: str, setting: Setting, draw: int = 0) -> Edit:
        """Return the edit of a method for a topic; of a control, on as many units that are active as often."""
        if method == "gradient difference":
            return self._by_gradient(topic, setting)
        codes = method in BY_CODES
        mask = self._mask(topic, setting, codes)
        every = [pair[0] for pair in self._seen(codes).values()]
        usage = replace(every[0], **{k: torch.cat([getattr(a, k) for a in every]) for k in vars(every[0])})
        if method in CONTROLS:
            mask = matched_mask(usage, mask, self.codebook if codes else self.sae, 10 * self.book.seed + draw)
        if codes:
            how: Literal["reselect", "zero"] = "zero" if method == "zero" else "reselect"
            return codebook_delete(self.model, mask, dictionary=self.codebook, how=how)
        if method == "SAE rows":
            stories = self.topics.stories[topic]
            return dictionary_rows(self.model, mask, stories, dictionary=self.sae, scale=setting.strength)
        forget = usage if method in CONTROLS else self._seen(False)[topic][0]
        return feature_clamp(self.model, mask, forget, dictionary=self.sae, scale=setting.strength)

    def _by_gradient(self, topic: str, setting: Setting) -> Edit:
        """Return the edit of gradient difference, on all weights."""
        stories, tokenizer = self.topics.stories, self.model.tokenizer
        assert tokenizer is not None

        def prompts(texts: Sequence[str]) -> Prompts:
            parts = [text.split(" ", 1) for text in texts]
            return Prompts.from_text([Query(first, rest, "river", "river") for first, rest in parts], tokenizer)

        forget, retain = (
            prompts(texts) for texts in (stories[topic], [text for o in others(topic) for text in stories[o][:12]])
        )
        given = (self.model, ComponentMask.everything(self.model), forget, retain)
        text, seed = self._documents(96, self.book.seed), self.book.seed
        how: dict[str, Any] = {"loss": losses.gradient_ascent, "steps": GRADIENT_STEPS, "seed": seed}
        return masked_gradient(
            *given, lr=setting.rate, batch_size=16, texts=text, text_loss=losses.cross_entropy, **how
        )

    def _by_topic(self, cell: Cell) -> Found:
        """Return what a method does to each topic, one after another."""
        found: Found = {}
        codes, draws = cell.method in BY_CODES, DRAWS if cell.method in CONTROLS else 1
        before = self.before["inserted" if codes else "alone"]
        for topic, setting in cell.settings.items():
            runs: list[Found] = []
            if cell.method != "gradient difference":
                for nearest in (0, setting.nearest):
                    self._seen(codes, nearest)  # seconds are those of an edit on text seen before
            for draw in range(draws):
                watch = Stopwatch()
                try:
                    edit = self._edit(cell.method, topic, setting, draw)
                except MechunlearnError as error:
                    runs.append({"note": str(error), "brief": before, "units": 0})
                    continue
                seconds = watch.seconds()
                with edit.applied(self.model):
                    validating = cell.book.seed == VALIDATION
                    brief = self.topics.brief() if validating else self.topics.measured(self._reference(topic), [topic])
                mask: Any = getattr(edit, "mask", ())
                usage = self._usage(cell.method, mask)
                runs.append({"brief": brief, "seconds": seconds, "units": len(mask), "usage": usage})
            for one in runs:
                one["kept"] = kept(one["brief"]["accuracy"], before["accuracy"], others(topic))
            found[topic] = runs[0] | ({"draws": runs} if len(runs) > 1 else {})
        return {"topics": found}

    def _usage(self, method: str, mask: ComponentMask) -> float:
        """Return which share of what is active over all stories is the mask's; NaN for an edit of weights."""
        if method not in (*BY_CODES, "SAE clamp", "random features", "SAE zero-ablation"):
            return float("nan")
        fired = torch.stack([here.fire_count.sum(0) for here, _ in self._seen(method in BY_CODES).values()]).sum(0)
        (chosen,) = mask.sites.values()
        return float(fired[chosen].sum() / fired.sum())

    def _inserted(self, cell: Cell) -> Found:
        """Return what the bottleneck costs before anything is deleted, and what comes back without it."""
        world, shown = cell.book.world, self.topics.shown
        sae = self.sae.quality if (world, cell.book.arm) == (SHIPPED, "frozen") else {}
        found: Found = {"codebook": self.codebook.quality, "SAE": sae, **self.before}
        if world == SHIPPED:
            return found
        with spliced(self.model, self.codebook):
            told = shown.said(self.model)[2]
        golds = {}
        for topic in TOPICS:
            gold, reference = model_in(world_folder(self.folder, world, f"-without-{topic}")), self._reference(topic)
            assert reference is not None
            from_gold = self.topics.divergence(reference, told)
            golds[topic] = {**Topics(gold, self.topics.texts).brief(), "KL of inserted": from_gold}
        original = Topics(model_in(world_folder(self.folder, world)), self.topics.texts).brief()
        return found | {"gold": golds, "original": original}

    def _cumulative(self, cell: Cell) -> Found:
        """Return what is left as topics are deleted one after another: discovery on cached codes, and the deletion."""
        steps: list[Found] = []
        whole: FeatureEdit | None = None
        for topic, setting in cell.settings.items():
            self._seen(True, setting.nearest)
            watch = Stopwatch()
            one = codebook_delete(self.model, self._mask(topic, setting, True), dictionary=self.codebook)
            whole = one if whole is None else whole | one
            seconds = watch.seconds()
            with whole.applied(self.model):
                now = self.topics.measured()
            steps.append({"topic": topic, "seconds": seconds, "units": len(whole.mask), **now})
        return {"steps": steps}

    def _swept(self, cell: Cell) -> Found:
        """Return what deletion does at some thresholds; with the page's codebook at every one, and at every S' too."""
        rows, used = [], cell.book.used
        before = self.before["inserted"]["accuracy"]
        main = cell.book == replace(Book(), seed=cell.book.seed)
        pairs = [(used, threshold) for threshold in (THRESHOLDS if main else SWEPT_THRESHOLDS)]
        pairs += [(n, SWEPT_THRESHOLDS[0]) for n in (4, 8, 16) if main and used < n <= cell.book.size // 4]
        for (nearest, threshold), topic in product(pairs, TOPICS):
            left, stays, units = before[topic], 1.0, 0
            try:
                edit: Any = self._edit("reselect", topic, Setting(threshold, nearest))
            except MechunlearnError:
                pass
            else:
                with edit.applied(self.model):
                    now = self.topics.brief()["accuracy"]
                left, stays, units = now[topic], kept(now, before, others(topic)), len(edit.mask)
            rows.append([nearest, threshold, topic, left, stays, units])
        return {"rows": rows, "quality": self.codebook.quality, "before": before}

    def measured(self, cell: Cell) -> Found:
        """Return the result of a cell.

        Args:
            cell: What is run.
        """
        works = {SPLICED: self._inserted, AMORTIZED: self._cumulative, SWEEP: self._swept}
        return works.get(cell.method, self._by_topic)(cell)


bench_of = lru_cache(maxsize=1)(Bench)
"""The last bench, or a new one: the cells of one dictionary follow one another."""
