"""What the explorer of circuits does, without a screen: a localization on show, one component in detail, a mask by hand."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import mechunlearn.localize as localizers
from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import ROLES, Prompts
from mechunlearn.features.dashboard import pieces, words_moved
from mechunlearn.localize import activation_patching, direct_logit_attribution
from mechunlearn.metrics import answers as metrics
from mechunlearn.metrics.answers import Metric
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.faithfulness import mask_faithfulness
from mechunlearn.patching.sweep import effects

METHODS = (
    *("attribution_patching", "activation_patching", "fact_lookup", "causal_tracing", "direct_logit_attribution"),
    *("edge_attribution", "path_patching", "random_units"),
)
METRICS: Mapping[str, Metric] = {
    "logit_diff": metrics.logit_diff,
    "answer_logprob": metrics.answer_logprob,
    "answer_probability": metrics.answer_probability,
}
MAPS = {
    "site": "layers and sites",
    "head": "layers and heads",
    "mlp_out": "MLPs by token role",
    "attn_out": "attention by token role",
}
FACTS, UNITS, WORDS = 64, 12, 8
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


class Workbench:
    """A model, facts, a localization of them, and a mask that is put together by hand.

    `mask` is the selection, `found` the localization on show. `act` does what a click in the explorer does and gives what is
    to be seen then, as JSON; every method can be called by hand too. Raises `MechunlearnError` without facts, and for a mask or
    localization of another architecture.

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
        if len(prompts) == 0:
            raise MechunlearnError("There are no facts to explore: the prompts are empty.")
        self.model, self.prompts = model, prompts
        self.mask = ComponentMask({}, model.signature)
        if mask is not None:
            mask.check(model.signature)
            for site in mask.sites:
                self._place(Component.parse(site))
            self.mask = mask
        self.method, self.metric, self.map = METHODS[0], "logit_diff", "site"
        self.fact: int | None = None
        self.shown: str | None = None
        self.faithful: tuple[float, float, float] | None = None
        self._kept: dict[tuple, Any] = {}
        if found is not None:
            ComponentMask({}, found.signature).check(model.signature)
            self.method, self._given = GIVEN, found

    @property
    def methods(self) -> tuple[str, ...]:
        """What can be chosen: every localizer of facts, and the localization that was given."""
        return (GIVEN, *METHODS) if hasattr(self, "_given") else METHODS

    @property
    def found(self) -> Localization:
        """The localization on show: by the chosen method and metric, of all facts or the chosen one."""
        if self.method == GIVEN:
            return self._given
        return self._once(("found", self.method, self._metric_used, self.fact), self._localized)

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
        """Choose localizer, metric, one fact by its number (or `all_facts`), and which map to look at.

        Nothing is computed before it is looked at. Raises `MechunlearnError` for a name or number that there is not.
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
        """Look at a component in detail. Raises `MechunlearnError` if the model has none such."""
        self.detail(component)
        self.shown = component

    def toggle(self, component: str) -> None:
        """Add a unit or a whole site to the mask; if all of it is there, take it out."""
        self._place(Component.parse(component))
        asked = ComponentMask.of([component], self.model.signature)
        self._select(self.mask - asked if len(self.mask & asked) == len(asked) else self.mask | asked)

    def take(self, share: float | int | None = None, above: float | int | None = None) -> None:
        """Let the mask be the localization's largest units within a share of the weights, or those above a score."""
        if (share is None) == (above is None):
            raise MechunlearnError("Give one of both: a share of the weights, or a score to be above.")
        self._select(self.found.top(weights=share) if above is None else self.found.above(above))

    def clear(self) -> None:
        """Empty the mask."""
        self._select(ComponentMask({}, self.model.signature))

    def faithfulness(self) -> tuple[float, float, float]:
        """How much of the logit difference the mask's heads and neurons carry alone: see `mask_faithfulness`."""
        self.faithful = mask_faithfulness(self.model, self.mask, self.facts.select(range(min(FACTS, len(self.facts)))))
        return self.faithful

    def save(self, path: str | Path) -> None:
        """Write the mask; refuses an empty one."""
        if not len(self.mask):
            raise MechunlearnError("The mask is empty: add components before you save it.")
        self.mask.save(path)

    def heat(self) -> dict:
        """The chosen map: names of rows and columns, values, the component behind each cell, and how much of it is selected."""
        if self.map in ("mlp_out", "attn_out"):
            return self._by_role()
        scores = {
            site: values
            for site, values in self.found.scores.items()
            if self.map == "site" or Component.parse(site).kind == "attn.o"
        }
        layers = list(range(self.model.signature.layers))
        if self.map == "site":
            kinds = sorted({Component.parse(site).kind for site in scores}, key=lambda kind: Component(0, kind))
            names = kinds
            cells = [[f"L{layer}.{kind}" for layer in layers] for kind in kinds]
            values = [[_whole(scores[site]) if site in scores else None for site in row] for row in cells]
            what = "score of a site: the sum over its units, or its own where it was scored as a whole"
        else:
            heads = range(self.model.signature.heads)
            names = [f"head {head}" for head in heads]
            cells = [[f"L{layer}.attn.o[{head}]" for layer in layers] for head in heads]
            values = [
                [float(scores[f"L{n}.attn.o"][head]) if f"L{n}.attn.o" in scores else None for n in layers]
                for head in heads
            ]
            what = "score of a head"
        return self._map(names, layers, values, cells, what)

    def detail(self, component: str) -> dict:
        """One component: score, direct effect, exact effect by token role and by fact, attention or read-out, its units."""
        address = Component.parse(component)
        chosen = ComponentMask.of([component], self.model.signature)
        place, units = self._place(address), chosen.sites[address.site]
        part = self.facts.select(range(min(FACTS, len(self.facts))))
        found = self._once(("effects", str(address), self.metric, self.fact), lambda: self._effects(part, place, units))
        by_fact, by_role = found
        order = by_fact.abs().argsort(descending=True, stable=True)[:UNITS].tolist()
        told: dict[str, Any] = {
            "component": str(address),
            "what": _named(address),
            "selected": len(self.mask & chosen),
            "of": len(chosen),
            "score": self._score(address),
            "direct": self._direct(place, units),
            "effect": float(by_fact.mean()),
            "roles": by_role,
            "facts": [self._told(part, i) | {"effect": float(by_fact[i])} for i in order],
            "measured": len(part),
        }
        if address.unit is None:
            told["units"] = self._units(address)
        elif address.kind in ("mlp.in", "mlp.gate", "mlp.out"):
            told["words"] = words_moved(
                self.model, self.model.rows(place)[units][0][: self.model.signature.d_model], WORDS
            )
            told["activations"] = self._activations(part, place, address.unit, order[0])
        elif address.kind in ("attn.o", "attn.q"):
            told["attention"] = self._attention(part, address, order[0])
        return told

    def view(self) -> dict:
        """Everything the explorer shows, as JSON."""
        share = self._share(self.mask)
        return {
            "methods": list(self.methods),
            "method": self.method,
            "metrics": list(METRICS),
            "metric": self.metric,
            "uses metric": self._metric_used is not None,
            "maps": MAPS,
            "map": self.map,
            "facts": [self._told(self.prompts, i) for i in range(len(self.prompts))],
            "fact": self.fact,
            "heat": self.heat(),
            "note": self.found.note,
            "detail": None if self.shown is None else self.detail(self.shown),
            "mask": {
                "units": len(self.mask),
                "share": share,
                "sites": {site: int(chosen.sum()) for site, chosen in self.mask.sites.items() if chosen.any()},
                "faithfulness": self.faithful,
                "measured": min(FACTS, len(self.facts)),
            },
            "error": "",
            "said": "",
        }

    def act(self, message: Mapping[str, Any]) -> dict:
        """Do what a click asks for (`do` and its arguments) and give the view; a mistake is told in `error` and changes nothing."""
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
    def _metric_used(self) -> str | None:
        if self.method == GIVEN:
            return None
        return self.metric if "metric" in inspect.signature(getattr(localizers, self.method)).parameters else None

    def _once(self, key: tuple, made: Any) -> Any:
        key = (self.model.fingerprint, *key)
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = made()
        return self._kept[key]

    def _select(self, mask: ComponentMask) -> None:
        self.mask, self.faithful = mask, None

    def _localized(self) -> Localization:
        settings: dict[str, Any] = {"metric": METRICS[self.metric]} if self._metric_used else {}
        if self.method == "activation_patching":
            settings["kinds"] = ["attn.o", "mlp_out"]  # neuron by neuron takes minutes even on a small model
        made = getattr(localizers, self.method)(self.model, self.facts, **settings)
        return made.nodes() if isinstance(made, Circuit) else made

    def _map(self, rows: list, columns: list, values: list, cells: list, what: str) -> dict:
        selected = [[self._selected(cell) for cell in row] for row in cells]
        return {"rows": rows, "columns": columns, "values": values, "cells": cells, "selected": selected, "what": what}

    def _selected(self, component: str) -> float:
        address = Component.parse(component)
        chosen = self.mask.sites.get(address.site)
        if chosen is None:
            return 0.0
        return float(chosen.float().mean() if address.unit is None else chosen[address.unit])

    def _by_role(self) -> dict:
        """Whole MLPs or attention layers, patched at each token role."""
        key = ("roles", self.map, self.metric, self.fact)
        found: Localization = self._once(
            key,
            lambda: activation_patching(
                self.model, self.facts, metric=METRICS[self.metric], kinds=[self.map], by="role"
            ),
        )
        here = {ROLES[i] for i in self.facts.roles.unique().tolist()}
        roles = [i for i, role in enumerate(found.roles) if role in here]
        layers, kind = list(range(self.model.signature.layers)), "mlp.out" if self.map == "mlp_out" else "attn.o"
        by_role = found.by_role
        values = [[float(by_role[f"L{layer}.{self.map}"][role, 0]) for layer in layers] for role in roles]
        cells = [[f"L{layer}.{kind}" for layer in layers] for _ in roles]
        what = f"change of the {self.metric.replace('_', ' ')} with the corrupt activation at these tokens"
        return self._map([found.roles[role] for role in roles], layers, values, cells, what)

    def _place(self, address: Component) -> str:
        """Where a component's activation is: a neuron's is what enters `mlp.out`."""
        if address.kind not in self.model.layout.kinds:
            raise MechunlearnError(
                f"'{address}' is no head or neuron of this model. Expected one such as L3.attn.o[1] or L2.mlp.out, of the kinds "
                f"{', '.join(self.model.layout.kinds)}."
            )
        return f"L{address.layer}.{'mlp.out' if address.kind in ('mlp.in', 'mlp.gate') else address.kind}"

    def _effects(self, part: Prompts, place: str, units: Tensor) -> tuple[Tensor, dict[str, float]]:
        found = effects(
            self.model,
            part,
            METRICS[self.metric],
            [],
            by="role",
            denoise=False,
            corrupt="prompts",
            only={place: units[None]},
        )
        changes = found.by_site[place][:, 0]
        here = {role for role, name in enumerate(ROLES) if (part.roles == role).any() and name != "padding"}
        named = {found.rows[i + 1]: float(changes[i + 1].mean()) for i in sorted(here)}
        return changes[0], named

    def _score(self, address: Component) -> dict | None:
        scores = self.found.scores.get(address.site)
        if scores is None:
            return None
        if address.unit is None:
            return {"value": _whole(scores), "rank": None, "of": None}
        every = torch.cat([values.abs() for values in self.found.scores.values()])
        value = float(scores[address.unit])
        return {"value": value, "rank": int((every > abs(value)).sum()) + 1, "of": len(every)}

    def _direct(self, place: str, units: Tensor) -> float | None:
        if place.split(".", 1)[1] not in ("attn.o", "mlp.out"):
            return None
        found = self._once(("direct", self.fact), lambda: direct_logit_attribution(self.model, self.facts))
        return float(found.scores[place][units].sum())

    def _units(self, address: Component) -> list[dict]:
        scores = self.found.scores.get(address.site)
        if scores is None:
            scores = torch.zeros(int(self.model.signature.units(address.kind) or 0))
        chosen = self.mask.sites.get(address.site)
        order = scores.abs().argsort(descending=True, stable=True)[:UNITS].tolist()
        return [
            {
                "component": f"{address.site}[{unit}]",
                "score": float(scores[unit]),
                "selected": bool(chosen is not None and chosen[unit]),
            }
            for unit in order
        ]

    def _activations(self, part: Prompts, place: str, unit: int, row: int) -> dict:
        one = part.select([row])
        length = int(one.lengths[0])
        _, kept = self.model.cache(one.tokens[:, :length], [place])
        tokens = pieces(self.model, one.tokens[0, :length].tolist())
        return {"tokens": tokens, "values": kept[place][0, :, unit].float().tolist()}

    def _attention(self, part: Prompts, address: Component, row: int) -> dict:
        one = part.select([row])
        length = int(one.lengths[0])
        pattern = self.model.attention(one.tokens[:, :length], address.layer)[0, address.unit].float()
        tokens = pieces(self.model, one.tokens[0, :length].tolist())
        return {"tokens": tokens, "pattern": [[round(value, 3) for value in line] for line in pattern.tolist()]}

    def _share(self, mask: ComponentMask) -> float:
        return mask.weights(self.model) / self.found.total_weights

    def _told(self, prompts: Prompts, i: int) -> dict:
        """A fact as text in three parts, its answer, or its tokens where there is no text."""
        if not prompts.queries:
            tokens = prompts.tokens[i, : int(prompts.lengths[i])].tolist()
            return {"before": "".join(pieces(self.model, tokens)), "subject": "", "after": "", "answer": ""}
        asked = prompts.queries[i]
        at = asked.prompt.rfind(asked.subject) if asked.subject else -1
        before, after = (asked.prompt[:at], asked.prompt[at + len(asked.subject) :]) if at >= 0 else (asked.prompt, "")
        return {"before": before, "subject": asked.subject, "after": after, "answer": asked.answer}


def _whole(scores: Float[Tensor, " unit"]) -> float:
    """A site's score: its units share one where it was scored as a whole."""
    return float(scores[0] if len(scores) > 1 and (scores == scores[0]).all() else scores.sum())


def _named(address: Component) -> str:
    whole = {"attn.o": "attention", "attn.q": "queries", "attn.k": "keys", "attn.v": "values"}
    if address.kind.startswith("attn"):
        kind = whole[address.kind]
        return (
            f"{kind} of layer {address.layer}"
            if address.unit is None
            else f"{'kv head' if address.kind in ('attn.k', 'attn.v') else 'head'} {address.unit}, {kind}, layer {address.layer}"
        )
    part = {"mlp.in": " (in)", "mlp.gate": " (gate)", "mlp.out": ""}[address.kind]
    return (
        f"MLP of layer {address.layer}{part}"
        if address.unit is None
        else f"neuron {address.unit}{part}, layer {address.layer}"
    )


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
