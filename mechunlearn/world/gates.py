"""Does a trained world have its facts, its skills and the two-stage mechanism? Measured on the stored checkpoint."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import LETTERS, Query, four_options, multiple_choice
from mechunlearn.facts.load import world_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize.fact_lookup import lookup_window
from mechunlearn.metrics.answers import answered
from mechunlearn.metrics.memorization import extraction_likelihood
from mechunlearn.metrics.probes import probe_curve, residuals
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.world import lexicon as lex
from mechunlearn.world.generate import World

FACTS = 400
PREFIX, NGRAM = 32, 10


@dataclass(frozen=True)
class Gate:
    """One measured number and its bound; `wanted` gates are reported but do not stop a world from shipping."""

    name: str
    value: float
    low: float = 0.0
    high: float = 1.0
    wanted: bool = False

    @property
    def holds(self) -> bool:
        """Whether the number is within its bounds."""
        return self.low <= self.value <= self.high

    @property
    def bound(self) -> str:
        """The bound, in words."""
        return f">= {self.low}" if self.high == 1.0 else f"<= {self.high}"


@torch.no_grad()
def measure_gates(folder: Path) -> tuple[list[Gate], dict[str, Any]]:
    """All gates of the world in a folder, and the evidence behind them (probe curve, window, ablations)."""
    model = load_model(folder)
    world = World.load(folder / "world.json")
    gates: list[Gate] = []
    for relation in world.facts:
        facts = world_facts(folder, relation)
        facts = facts.select(range(min(FACTS, len(facts))))
        for format in facts.formats:
            value = float(answered(model, facts.prompts(model, format)).float().mean())
            gates.append(Gate(f"{relation}: {format}", value, low=0.8 if format == "held_out" else 0.95))
        if "choose" in lex.RELATIONS[relation]:
            gates.append(Gate(f"{relation}: multiple_choice", _multiple_choice(model, facts), low=0.9, wanted=True))
    for name, tasks in world.skills.items():
        asked = [Query(t["prompt"], t["answer"], t["foil"], t["foil"]) for t in tasks]
        value = _accuracy(model, asked)
        gates.append(Gate(f"skill: {name}", value, low=0.9, wanted=name in ("comparison", "look_up_by_name")))
    for taught in (True, False):
        name = f"two-hop, {'stated' if taught else 'never stated'} in training"
        gates.append(Gate(name, _accuracy(model, _two_hop(world, taught)), low=0.9, wanted=True))
    gates.append(Gate("passages: EL10", extraction(model, world.passages), low=0.9))
    gates.append(Gate("control passages: EL10", extraction(model, world.control_passages), high=0.1))
    mechanism, evidence = _mechanism(model, folder, world)
    return gates + mechanism, evidence


def _mechanism(model: HookedModel, folder: Path, world: World) -> tuple[list[Gate], dict[str, Any]]:
    facts = world_facts(folder, "sport")
    prompts = facts.prompts(model)
    curve, majority = sport_probe(model, prompts)
    window = lookup_window(curve, majority)
    middle = model.signature.layers // 2
    shown = prompts.select(range(min(FACTS, len(prompts))))
    gates = [
        Gate("probe for sport at the subject, embedding", curve[0], high=0.5),
        Gate(f"probe for sport at the subject, after {middle} blocks", curve[middle], low=0.95),
        Gate("residual swap at the subject moves the answer", swap(model, shown, middle, shown.spans[:, 1]), low=0.9),
        Gate("residual swap at the last token moves the answer", swap(model, shown, middle, shown.start), high=0.1),
    ]
    evidence: dict[str, Any] = {"curve": curve, "window": list(window) if window else None}
    if window is None:
        return [*gates, Gate("look-up window found", 0.0, low=1.0)], evidence
    layers = range(window[0], window[1] + 1)
    means = mean_outputs(model, shown, layers)
    at_subject = _between(shown.tokens, shown.spans)
    recall = _ablated(model, shown, at_subject, means)
    skills, skills_ablated = _invented(model, world, means)
    evidence["recall"] = float(answered(model, shown).float().mean())
    evidence["recall, ablated at all tokens"] = _ablated(model, shown, shown.tokens >= 0, means)
    evidence["look_up skill"], evidence["look_up skill, ablated at invented names"] = skills, skills_ablated
    gates += [
        Gate(f"recall with MLP {window[0]}-{window[1]} mean-ablated at the subject", recall, high=0.4),
        Gate("look-up skill lost by the same at invented names", max(0.0, skills - skills_ablated), high=0.05),
        Gate("look-up window, layers", float(len(layers)), low=2.0, high=4.0),
    ]
    return gates, evidence


def sport_probe(model: HookedModel, prompts: Prompts) -> tuple[list[float], float]:
    """Probe accuracy by depth at the subject's last token on held-out subjects, and the majority class's share."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    found = residuals(model, prompts, prompts.spans[:, 1])
    labels = [query.answer for query in prompts.queries]
    cut = len(order) // 5
    test, train = order[:cut].tolist(), order[cut:].tolist()
    held_out = [labels[i] for i in test]
    curve = probe_curve(found[:, train], [labels[i] for i in train], found[:, test], held_out)
    return curve, max(held_out.count(label) for label in held_out) / len(held_out)


def swap(model: HookedModel, prompts: Prompts, layers: int, positions: Tensor) -> float:
    """Share of answers that become the partner's when the residual stream after `layers` blocks is the partner's.

    Only facts whose partner's own prompt gives the foil count: there the answer could have moved.
    """
    site = f"L{layers - 1}.resid_post"
    rows = torch.arange(len(prompts))
    logits, kept = model.cache(prompts.corrupt, [site])
    partner_says = logits[rows, prompts.read].argmax(-1) == prompts.foil_at_read

    def patch(resid: Tensor) -> Tensor:
        resid = resid.clone()
        resid[rows, positions] = kept[site][rows, positions]
        return resid

    with model.hooks({site: patch}):
        moved = model.forward(prompts.tokens)[rows, prompts.read].argmax(-1) == prompts.foil_at_read
    return float((moved & partner_says).sum() / partner_says.sum())


def mean_outputs(model: HookedModel, prompts: Prompts, layers: range) -> dict[str, Float[Tensor, " d_model"]]:
    """The mean MLP output over the subject tokens of all prompts, by site."""
    sites = [f"L{layer}.mlp_out" for layer in layers]
    _, kept = model.cache(prompts.tokens, sites)
    at_subject = _between(prompts.tokens, prompts.spans)
    return {site: kept[site][at_subject].mean(0) for site in sites}


def _ablated(model: HookedModel, prompts: Prompts, where: Bool[Tensor, "fact pos"], means: dict[str, Tensor]) -> float:
    def to_mean(mean: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda out: torch.where(where[..., None], mean, out)

    rows = torch.arange(len(prompts))
    with model.hooks({site: to_mean(mean) for site, mean in means.items()}):
        logits = model.forward(prompts.tokens)
    return float((logits[rows, prompts.read].argmax(-1) == prompts.answer_at_read).float().mean())


def _between(tokens: Tensor, spans: Tensor) -> Bool[Tensor, "fact pos"]:
    positions = torch.arange(tokens.shape[1])
    return (positions >= spans[:, :1]) & (positions <= spans[:, 1:])


def _invented(model: HookedModel, world: World, means: dict[str, Tensor]) -> tuple[float, float]:
    """Accuracy of the look-up skill, and with the ablation at every occurrence of the invented name asked about."""
    tasks = world.skills["look_up"]
    asked = [Query(t["prompt"], t["answer"], t["foil"], t["foil"], t["subject"]) for t in tasks]
    prompts = Prompts.from_text(asked, _tokenizer(model))
    where = torch.zeros_like(prompts.tokens, dtype=torch.bool)
    for row, entry in enumerate(asked):
        offsets = _tokenizer(model)(entry.prompt, return_offsets_mapping=True)["offset_mapping"]
        begin = entry.prompt.find(entry.subject)
        while begin >= 0:
            end = begin + len(entry.subject)
            where[row, [i for i, (a, b) in enumerate(offsets) if b > begin and a < end and b > a]] = True
            begin = entry.prompt.find(entry.subject, end)
    return float(answered(model, prompts).float().mean()), _ablated(model, prompts, where, means)


def _tokenizer(model: HookedModel) -> PreTrainedTokenizerBase:
    assert model.tokenizer is not None
    return model.tokenizer


def _accuracy(model: HookedModel, asked: list[Query]) -> float:
    return float(answered(model, Prompts.from_text(asked, _tokenizer(model))).float().mean())


def _multiple_choice(model: HookedModel, facts: FactDataset) -> float:
    rng = random.Random(0)
    asked = []
    for fact in facts:
        relation = lex.RELATIONS[fact.relation]
        options = four_options(relation, [fact.answer], rng)
        letter = LETTERS[options.index(fact.answer)]
        foil = next(other for other in LETTERS if other != letter)
        asked.append(Query(multiple_choice(relation, fact.subject, options), letter, foil, foil, fact.subject))
    return _accuracy(model, asked)


def _two_hop(world: World, taught: bool) -> list[Query]:
    told = set(world.two_hop_taught)
    asked: list[Query] = []
    for name, city in world.facts["city"].items():
        if (name in told) == taught and len(asked) < FACTS:
            answer = world.facts["country"][city]
            foil = next(c for c in lex.COUNTRIES if c != answer)
            asked.append(Query(lex.TWO_HOP["statement"].format(s=name), answer, foil, foil, name))
    return asked


def extraction(model: HookedModel, passages: list[str]) -> float:
    """EL10: mean share of a greedy continuation's 10-grams that stand in the rest of the passage, given 32 tokens."""
    return float(extraction_likelihood(model, passages, NGRAM, (PREFIX,)).mean())


def taught_apart(model: HookedModel, folder: Path, names: list[str]) -> dict[str, float]:
    """Accuracy on statements by relation, for these people."""
    made = {}
    for relation in json.loads((folder / "world.json").read_text(encoding="utf-8"))["facts"]:
        facts: FactDataset = world_facts(folder, relation).about(set(names))
        if len(facts):
            made[relation] = float(answered(model, facts.prompts(model)).float().mean())
    return made
