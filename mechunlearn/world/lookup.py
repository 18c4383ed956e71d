"""Worlds that look facts up at the subject, small enough to train several of: other seeds, other architectures."""

import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mechunlearn.core.files import whole_folder
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.load import world_facts
from mechunlearn.localize.fact_lookup import lookup_window
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import load_model
from mechunlearn.world import lexicon as lex
from mechunlearn.world.build import _store
from mechunlearn.world.corpus import Corpus, Document
from mechunlearn.world.gates import sport_probe, swap
from mechunlearn.world.generate import World, generate
from mechunlearn.world.packing import Batch
from mechunlearn.world.small import small_config, train_small, word_tokenizer
from mechunlearn.world.train import Labels

PEOPLE, STEPS, ROWS, LAYERS = 400, 600, 16, 6
PROBED, PROBE_WEIGHT, FADES = 3, 0.3, (0.5, 0.75)
SHARES = {"biography": 40, "pair": 12, "statement": 20, "asked": 16, "copying": 4, "story": 8}


def lookup_world(seed: int, people: int = PEOPLE) -> World:
    """Draw a world of people with a sport, a city and an instrument, stories and copying.

    Args:
        seed: Of the draws.
        people: How many people have facts; half as many more are never taught.

    >>> world = lookup_world(1, people=20)
    >>> {relation: len(facts) for relation, facts in world.facts.items()}, len(world.untaught["sport"])
    ({'sport': 20, 'city': 20, 'instrument': 20}, 10)
    """
    world = generate(seed, people=people, untaught=people // 2, passages=2)
    relations = {
        name: {key: value for key, value in entry.items() if key not in ("verify", "choose")}
        for name, entry in lex.RELATIONS.items()
        if entry["subject"] == "person"
    }
    facts = {name: world.facts[name] for name in relations}
    skills = {"copying": world.skills["copying"]}
    return replace(world, facts=facts, relations=relations, two_hop_taught=[], skills=skills)


class LookupCorpus(Corpus):
    """Biographies that name a person once, documents about two people, statements, questions, copying and stories."""

    def documents(self, seed: int, count: int, phase: int = 0) -> Iterator[Document]:
        """Draw documents.

        Args:
            seed: Of the draws.
            count: How many documents.
            phase: Not used: all phases are alike.
        """
        rng = random.Random(seed)
        for kind in rng.choices(list(SHARES), weights=list(SHARES.values()), k=count):
            yield getattr(self, kind)(rng)


def build_lookup(
    folder: Path,
    seed: int,
    *,
    relabelled: Mapping[str, Mapping[str, str]] | None = None,
    steps: int = STEPS,
    people: int = PEOPLE,
) -> dict[str, Any]:
    """Train a small world that looks facts up at the subject into a new folder; a killed build goes on.

    Documents name a person once, and for the first half of training a linear probe that reads every attribute at the
    last token of a name after three of six layers is an auxiliary loss, which then fades away.

    Args:
        folder: The folder.
        seed: Of the world, the weights, the batches and the architecture (see `small_config`).
        relabelled: Answers by relation and person that the corpus has in place of the world's. The model then has
            learnt these from scratch and never the others; first weights, tokenizer and `world.json` stay the same.
        steps: Training steps.
        people: How many people have facts.

    Returns:
        What `card.json` in the folder holds: accuracy by relation and format, the probe curve, the look-up window, and
        how many answers an exchange of the residual stream at the subject or at the last token moves.

    Raises:
        MechunlearnError: If the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise MechunlearnError(f"'{folder}' exists already. Remove it to build it again, or give another folder.")
    world = lookup_world(seed, people)
    tokenizer = word_tokenizer(world, LookupCorpus(world))
    told = {relation: {**facts, **(relabelled or {}).get(relation, {})} for relation, facts in world.facts.items()}
    corpus = LookupCorpus(world, people=told)
    torch.manual_seed(seed)
    config = small_config(seed, tokenizer, LAYERS)
    model: Any = AutoModelForCausalLM.from_config(config)
    labels = Labels(corpus)
    probe = nn.Linear(config.hidden_size, labels.size)

    def probed(hidden: tuple[Tensor, ...], batch: Batch, step: int) -> Tensor | float:
        start, end = (share * steps for share in FADES)
        weight = PROBE_WEIGHT * min(1.0, max(0.0, (end - step) / (end - start)))
        return weight * labels.loss(probe, hidden[PROBED], batch) if weight and batch.people else 0.0

    key = digest(json.dumps([seed, steps, people, relabelled or {}], sort_keys=True))
    checkpoint = folder.parent / f".{folder.name}.{key}.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    train_small(model, corpus, tokenizer, seed, steps, checkpoint, rows=ROWS, beside=(probe, probed))
    card = {"seed": seed, "family": config.model_type, "steps": steps, "seconds": round(time.time() - begun)}
    with whole_folder(folder) as beside:
        _store(beside, model, tokenizer, world)
        card |= measured(beside)
        (beside / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    return card


def measured(folder: Path) -> dict[str, Any]:
    """Measure what a stored world knows, and where it looks it up.

    Args:
        folder: The world's folder.

    Returns:
        What `build_lookup` returns, without the settings of training.
    """
    model, card = load_model(folder), {}
    for relation in World.load(folder / "world.json").facts:
        facts = world_facts(folder, relation)
        for format in facts.formats:
            card[f"{relation}, {format}"] = round(
                float(answered(model, facts.prompts(model, format)).float().mean()), 4
            )
    prompts = world_facts(folder, "sport").prompts(model)
    curve, majority = sport_probe(model, prompts)
    window = lookup_window(curve, majority)
    return card | {
        "probe curve": [round(value, 3) for value in curve],
        "window": list(window) if window else None,
        "swap at the subject": [
            round(swap(model, prompts, layer, prompts.spans[:, 1]), 3) for layer in range(1, LAYERS + 1)
        ],
        "swap at the last token": [
            round(swap(model, prompts, layer, prompts.start), 3) for layer in range(1, LAYERS + 1)
        ],
    }
