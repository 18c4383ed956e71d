"""What the explorer of circuits does, without a screen.

A localization on show, one component in detail, a mask by hand.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.methods import methods, ready_methods
from mechunlearn.errors import MechunlearnError
from mechunlearn.explore import details, maps
from mechunlearn.explore.maps import MAPS
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dashboard import words_moved
from mechunlearn.localize import activation_patching, direct_logit_attribution
from mechunlearn.metrics import answers as metrics
from mechunlearn.metrics.answers import Metric
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.faithfulness import mask_faithfulness

FIRST = "attribution_patching"  # the method on show at the beginning: it scores everything and takes a moment
METRICS: Mapping[str, Metric] = {
    "logit_diff": metrics.logit_diff,
    "answer_logprob": metrics.answer_logprob,
    "answer_probability": metrics.answer_probability,
}
FACTS, WORDS = 64, 8
GIVEN = "as given"
CHANGED = ("mask", "method", "metric", "map", "fact", "shown", "faithful")
KEPT = 256  # results
NUMBER = (int, float)
ACTIONS: Mapping[str, Mapping[str, Any]] = {
    "choose": {"method": str, "metric": str, "fact": int, "map": str, "all_facts": bool},
    "show": {"component": str},
    "toggle": {"component": str},
    "take": {"share": NUMBER, "above": NUMBER},
    "clear": {},
    "faithfulness": {},
    "save": {"path": str},
}


def localizers() -> tuple[str, ...]:
    """Name what the menu offers: every localizer of facts, the one on show at the beginning first."""
    return (FIRST, *(name for name in ready_methods("localize") if name != FIRST))


class Workbench:
    """A model, facts, a localization of them, and a mask that is put together by hand.

    `mask` is the selection, `found` the localization on show. `act` does what a click in the explorer does and gives
    what the explorer then shows, as JSON; every method can be called by hand too.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> bench = Workbench(toy.model, toy.prompts())
    >>> bench.toggle("L0.mlp.out[1]")
    >>> list(bench.mask)
    [L0.mlp.out[1]]
    >>> bench.detail("L0.mlp.out[1]")["facts"][0]["effect"] < -1
    True
    """

    def __init__(
        self,
        model: HookedModel,
        prompts: Prompts,
        found: Localization | None = None,
        mask: ComponentMask | None = None,
    ) -> None:
        """Begin with an empty mask and the first method.

        Args:
            model: The model.
            prompts: The facts.
            found: A localization of yours, which is then offered and shown first.
            mask: A mask to begin with.

        Raises:
            MechunlearnError: There are no facts, or mask or localization are of another architecture.
        """
        if len(prompts) == 0:
            raise MechunlearnError("There are no facts to explore: the prompts are empty.")
        self.model, self.prompts = model, prompts
        self.mask = ComponentMask({}, model.signature)
        if mask is not None:
            mask.check(model.signature)
            for site in mask.sites:
                details.place_of(model, Component.parse(site))
            self.mask = mask
        self.method, self.metric, self.map = FIRST, "logit_diff", "site"
        self.fact: int | None = None
        self.shown: str | None = None
        self.faithful: tuple[float, float, float] | None = None
        self._given = found
        self._kept: dict[tuple[Any, ...], Any] = {}
        if found is not None:
            ComponentMask({}, found.signature).check(model.signature)
            self.method = GIVEN

    @property
    def methods(self) -> tuple[str, ...]:
        """What can be chosen: every localizer of facts, and the localization that was given."""
        return localizers() if self._given is None else (GIVEN, *localizers())

    @property
    def found(self) -> Localization:
        """The localization on show: by the chosen method and metric, of all facts or the chosen one."""
        if self.method == GIVEN and self._given is not None:
            return self._given
        found: Localization = self._once(("found", self.method, self._metric_used, self.fact), self._localized)
        return found

    @property
    def facts(self) -> Prompts:
        """The facts that are looked at: all, or the chosen one."""
        return self.prompts if self.fact is None else self.prompts.select([self.fact])

    def choose(
        self,
        method: str | None = None,
        metric: str | None = None,
        fact: int | None = None,
        map: str | None = None,
        all_facts: bool = False,
    ) -> None:
        """Choose what to look at. Nothing is computed before it is looked at.

        Args:
            method: A localizer, one of `methods`.
            metric: One of `METRICS`.
            fact: The number of one fact.
            map: One of `MAPS`.
            all_facts: Look at all facts again.

        Raises:
            MechunlearnError: There is no such name or number.
        """
        for asked, known, what in ((method, self.methods, "method"), (metric, METRICS, "metric"), (map, MAPS, "map")):
            if asked is not None and asked not in known:
                raise MechunlearnError(f"Unknown {what} '{asked}'. Expected one of {', '.join(known)}.")
        if fact is not None and not 0 <= fact < len(self.prompts):
            raise MechunlearnError(
                f"There is no fact {fact}. Expected 0 to {len(self.prompts) - 1}, or all_facts=True."
            )
        self.method, self.metric, self.map = method or self.method, metric or self.metric, map or self.map
        chosen = None if all_facts else self.fact if fact is None else fact
        if chosen != self.fact:
            self.fact, self.faithful = chosen, None

    def show(self, component: str) -> None:
        """Look at a component in detail.

        Args:
            component: Its address, such as `L2.mlp.out[7]`.

        Raises:
            MechunlearnError: The model has none such.
        """
        self.detail(component)
        self.shown = component

    def toggle(self, component: str) -> None:
        """Add a unit or a whole site to the mask; if all of it is there, take it out.

        Args:
            component: Its address.

        Raises:
            MechunlearnError: The model has none such.
        """
        details.place_of(self.model, Component.parse(component))
        asked = ComponentMask.of([component], self.model.signature)
        self._select(self.mask - asked if len(self.mask & asked) == len(asked) else self.mask | asked)

    def take(self, share: float | None = None, above: float | None = None) -> None:
        """Let the mask be the localization's largest units.

        Args:
            share: Those within this share of the weights.
            above: Those with a larger |score|.

        Raises:
            MechunlearnError: None or both are given, or the share is out of range.
        """
        if (share is None) == (above is None):
            raise MechunlearnError("Give one of both: a share of the weights, or a score to be above.")
        self._select(self.found.top(weights=share) if above is None else self.found.above(above))

    def clear(self) -> None:
        """Empty the mask."""
        self._select(ComponentMask({}, self.model.signature))

    def faithfulness(self) -> tuple[float, float, float]:
        """Measure how much of the logit difference the mask's heads and neurons carry alone.

        See `mask_faithfulness`.
        """
        self.faithful = mask_faithfulness(self.model, self.mask, self._part)
        return self.faithful

    def save(self, path: str | Path) -> None:
        """Write the mask.

        Args:
            path: A `.json` or `.safetensors` file.

        Raises:
            MechunlearnError: The mask is empty.
        """
        if not len(self.mask):
            raise MechunlearnError("The mask is empty: add components before you save it.")
        self.mask.save(path)

    def heat(self) -> dict[str, Any]:
        """Draw the chosen map; see `maps`."""
        if self.map in ("site", "head"):
            return (maps.by_site if self.map == "site" else maps.by_head)(self.found, self.mask)
        settings: dict[str, Any] = {"kinds": [self.map], "by": "role", "progress": False}
        key, metric = ("roles", self.map, self.metric, self.fact), METRICS[self.metric]
        found = self._once(key, lambda: activation_patching(self.model, self.facts, metric=metric, **settings))
        return maps.by_role(found, self.map, self.facts, self.metric, self.mask)

    def detail(self, component: str) -> dict[str, Any]:
        """Describe one component: score, direct effect, exact effect by token role and fact, attention or read-out, units.

        Args:
            component: Its address.

        Raises:
            MechunlearnError: The model has none such.
        """
        model, address = self.model, Component.parse(component)
        chosen = ComponentMask.of([component], model.signature)
        place, units, part = details.place_of(model, address), chosen.sites[address.site], self._part
        by_fact, by_role = self._once(
            ("effects", str(address), self.metric, self.fact),
            lambda: details.exact_effects(model, part, METRICS[self.metric], place, units),
        )
        order = by_fact.abs().argsort(descending=True, stable=True)[: details.UNITS].tolist()
        told: dict[str, Any] = {
            "component": str(address),
            "what": details.named(address),
            "selected": len(self.mask & chosen),
            "of": len(chosen),
            "score": details.score_of(self.found, address),
            "direct": self._direct(place, units),
            "effect": float(by_fact.mean()),
            "roles": by_role,
            "facts": [details.fact_told(model, part, i) | {"effect": float(by_fact[i])} for i in order],
            "measured": len(part),
        }
        if address.unit is None:
            told["units"] = details.units_of(self.found, self.mask, address)
        elif address.kind in ("mlp.in", "mlp.gate", "mlp.out"):
            told["words"] = words_moved(model, model.rows(place)[units][0][: model.signature.d_model], WORDS)
            told["activations"] = details.activations(model, part, order[0], place, address.unit)
        elif address.kind in ("attn.o", "attn.q"):
            told["attention"] = details.attention(model, part, order[0], address)
        return told

    def view(self) -> dict[str, Any]:
        """Give everything the explorer shows, as JSON."""
        return {
            "methods": list(self.methods),
            "method": self.method,
            "metrics": list(METRICS),
            "metric": self.metric,
            "uses metric": self._metric_used is not None,
            "maps": MAPS,
            "map": self.map,
            "facts": [details.fact_told(self.model, self.prompts, i) for i in range(len(self.prompts))],
            "fact": self.fact,
            "heat": self.heat(),
            "note": self.found.note,
            "detail": None if self.shown is None else self.detail(self.shown),
            "mask": {
                "units": len(self.mask),
                "share": self.mask.weights(self.model) / self.found.total_weights,
                "sites": {site: int(chosen.sum()) for site, chosen in self.mask.sites.items() if chosen.any()},
                "faithfulness": self.faithful,
                "measured": len(self._part),
            },
            "error": "",
            "said": "",
        }

    def act(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a click asks for and give the view; a mistake changes nothing and is described in `error`.

        Args:
            message: `do`, one of `ACTIONS`, and its arguments.
        """
        before = {name: getattr(self, name) for name in CHANGED}
        said = ""
        try:
            asked = dict(message)
            do = str(asked.pop("do", ""))
            if do not in ACTIONS or not _fits(asked, ACTIONS[do]):
                raise MechunlearnError(f"The explorer does not know what to do with {dict(message)}.")
            if do == "save":
                self.save(_file_here(asked["path"]))
                said = f"{len(self.mask)} units -> {asked['path']}"
            else:
                getattr(self, do)(**asked)
            return self.view() | {"said": said}
        except Exception as problem:  # out of memory too: the view must live on
            vars(self).update(before)
            told = str(problem) if isinstance(problem, MechunlearnError) else f"{type(problem).__name__}: {problem}"
            return self.view() | {"error": told}

    @property
    def _part(self) -> Prompts:
        """The facts that exact effects are measured on."""
        return self.facts.select(range(min(FACTS, len(self.facts))))

    @property
    def _metric_used(self) -> str | None:
        return self.metric if self.method != GIVEN and "metric" in methods("localize")[self.method].takes else None

    def _once(self, key: tuple[Any, ...], made: Callable[[], Any]) -> Any:
        key = (self.model.fingerprint, *key)
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = made()
        return self._kept[key]

    def _select(self, mask: ComponentMask) -> None:
        self.mask, self.faithful = mask, None

    def _localized(self) -> Localization:
        settings: dict[str, Any] = {"metric": METRICS[self.metric], "progress": False}
        if self.method == "activation_patching":
            settings["kinds"] = ["attn.o", "mlp_out"]  # neuron by neuron takes minutes even on a small model
        made: Localization | Circuit = methods("localize")[self.method](self.model, self.facts, **settings)
        return made.nodes() if isinstance(made, Circuit) else made

    def _direct(self, place: str, units: Tensor) -> float | None:
        if place.split(".", 1)[1] not in ("attn.o", "mlp.out"):
            return None
        key = ("direct", self.fact)
        found = self._once(key, lambda: direct_logit_attribution(self.model, self.facts, progress=False))
        return float(found.scores[place][units].sum())


def _fits(given: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether a message has arguments of these names and types; one that can be given alone must be given."""
    right = (name in expected and isinstance(value, expected[name]) for name, value in given.items())
    no_flag = (expected.get(name) is bool or not isinstance(value, bool) for name, value in given.items())
    return all(right) and all(no_flag) and (len(given) == 1 or len(expected) != 1) and len(given) <= len(expected)


def _file_here(path: str) -> Path:
    """A plain file name for a mask, in the folder where Python runs; another mask may be replaced, nothing else."""
    name = path.strip()
    if Path(name).name != name or not name.endswith((".json", ".safetensors")) or name.startswith(".") or "\0" in name:
        raise MechunlearnError(
            f"'{name}' is no file name for a mask here. Give a name without folders, such as sport.mask.json."
        )
    if Path(name).exists():
        try:
            ComponentMask.load(name)
        except MechunlearnError:
            raise MechunlearnError(f"'{name}' exists and is no mask. Give another name.") from None
    return Path(name)
