"""Planted cases in SmolLM2: people whom it is taught are removed where they were put, hidden, or the model is wrecked.

32 invented people's homes are taught to MLP 8 to 11 alone, so that it is known where they are: to put these rows back removes
them without a trace. Every other edit leaves them where they are.
"""

import random
from dataclasses import dataclass

import pandas as pd
import pytest
import torch

from mechunlearn import load_facts, load_model
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack import probing, quantization, relearning
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import losses, masked_gradient
from mechunlearn.evaluation.robustness import Attacked
from mechunlearn.evaluation.status import status
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Fact, Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import HookedModel
from mechunlearn.world.generate import generate

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.training]

CITIES = (
    *(
        "Paris",
        "Rome",
        "Madrid",
        "Berlin",
        "Tokyo",
        "Moscow",
        "Cairo",
        "Athens",
        "Vienna",
        "Warsaw",
        "Budapest",
        "Lisbon",
    ),
    *("Dublin", "Stockholm", "Oslo", "Copenhagen", "Havana", "Lima", "Tehran", "Baghdad", "Nairobi", "Bangkok"),
)
MLP = ("mlp.in", "mlp.gate", "mlp.out")
SHORT = {"steps": 12, "batch_size": 32, "text_weight": 0}
BUDGET = {"lrs": {"full": (3e-5,)}, "steps": 12, "eval_every": 6, "batch_size": 16}


@dataclass(frozen=True)
class Taught:
    """A model that was taught some people, who they are, what it knew before, and edits of it by name."""

    model: HookedModel
    forget: Prompts
    retain: Prompts
    edits: dict[str, WeightEdit]


def edit_of(model: HookedModel, rows: dict[str, torch.Tensor]) -> WeightEdit:
    """An edit that writes these rows."""
    units = {site: torch.arange(len(new)) for site, new in rows.items()}
    return WeightEdit(units, rows, model.signature, RunCard("planted", model=model.fingerprint))


@pytest.fixture(scope="module")
def taught(seed) -> Taught:
    model, rng = load_model("smollm2", dtype="float32"), random.Random(seed)
    facts = []
    for name in list(generate(seed, people=64, untaught=10, passages=4).facts["sport"]):
        city, other = rng.sample(CITIES, 2)
        facts.append(Fact(name, "home", {"statement": Query(f"{name} lives in the city of", city, other, "", name)}))
    homes = FactDataset("homes", tuple(facts[:32]), untaught=FactDataset("strangers", tuple(facts[32:])))
    forget, retain = homes.prompts(model), load_facts("countries/capital").known(model).prompts(model)

    def at(*sites: str) -> ComponentMask:
        return ComponentMask.of(sites, model.signature)

    def made(*sites: str, **how) -> WeightEdit:
        return masked_gradient(model, at(*sites), forget, retain, **SHORT | how, seed=seed)

    storage = [f"L{layer}.{kind}" for layer in (8, 9, 10, 11) for kind in MLP]
    teaching = made(*storage, loss=losses.cross_entropy, lr=1e-3, steps=15)
    before = {site: model.rows(site).clone() for site in teaching.rows}
    teaching.apply_(model)
    retain = retain.select(answered(model, retain).nonzero().flatten().tolist())
    noisy = model.rows("L12.mlp.out")
    noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed))
    edits = {
        "removed": edit_of(model, before),
        "last layer": made("L29.attn.o", "L29.mlp.out", loss=losses.log_one_minus_p, lr=1e-3),
        "late": made(*(f"L{layer}.{kind}" for layer in (26, 27) for kind in MLP), loss=losses.log_one_minus_p, lr=5e-4),
        "target alone": made("L28.mlp.out", "L29.mlp.out", "L29.attn.o", lr=2e-3),
        "wrecked": edit_of(model, {"L12.mlp.out": noisy + 10 * noisy.std() * noise}),
    }
    return Taught(model, forget, retain, edits)


@pytest.fixture(scope="module")
def relearnt(taught, seed) -> Attacked:
    """Relearning of every edit but the wrecked one, which a rounding is enough for."""
    named = {name: edit for name, edit in taught.edits.items() if name != "wrecked"}
    first = named.pop("removed")
    rows = relearning(taught.model, first, taught.forget, taught.retain, extra_edits=named, seed=seed, **BUDGET)
    return Attacked({"relearning": rows})


def said(found: Attacked, state: str = "edited") -> tuple[str, pd.Series]:
    outcomes = found.outcomes(state)
    return status(outcomes)[0], outcomes.iloc[0]


def test_it_was_taught_and_every_edit_seems_to_work(taught):
    """By what the model says, no edit can be told from another."""
    assert answered(taught.model, taught.forget).float().mean() >= 0.9 and len(taught.retain) >= 60
    strangers = taught.forget.facts.untaught.prompts(taught.model)
    assert answered(taught.model, strangers).float().mean() <= 0.2
    for name, edit in taught.edits.items():
        with edit.applied(taught.model):
            assert answered(taught.model, taught.forget).float().mean() <= 0.2, name
            kept = answered(taught.model, taught.retain).float().mean()
            assert kept <= 0.5 if name == "wrecked" else kept >= 0.9, name


def test_what_is_removed_does_not_come_back(relearnt):
    """Whether the attack learns enough of its own half to say *gone* is another matter."""
    word, row = said(relearnt)
    assert word in ("gone", "inconclusive") and row["outcome"] != "back"
    assert row["held_out"] <= row["floor"] + 0.1 and row["up_to"] < 0.35 and row["ceiling"] >= 0.6


@pytest.mark.parametrize("name", ["last layer", "late", "target alone"])
def test_what_is_hidden_is_never_gone(relearnt, name):
    word, row = said(relearnt, name)
    assert word in ("hidden", "inconclusive") and row["trained"] >= 0.9
    assert row["held_out"] >= said(relearnt)[1]["held_out"] + 0.15, "more comes back than of what was removed"


def test_what_the_last_layer_hides_is_found_out(relearnt):
    assert said(relearnt, "last layer")[0] == "hidden"


def test_a_wrecked_model_is_collapsed(taught):
    rows = quantization(taught.model, taught.edits["wrecked"], taught.forget, taught.retain, bits=(8,))
    assert said(Attacked({"quantization": rows}))[1]["outcome"] == "collapsed"


def test_layers_below_a_late_edit_count_for_nothing(taught, seed):
    eight = taught.forget.select(range(8))
    rows = probing(taught.model, taught.edits["late"], eight, taught.retain.select(range(24)), seed=seed)
    lens = rows[(rows["state"] == "edited") & rows["setting"].str.contains("lens")]
    depth = lens["setting"].str.extract(r"after (\d+) block", expand=False).astype(int)
    assert lens["below"].tolist() == (depth <= 26).tolist() and lens["below"].any() and not lens["below"].all()


def test_eight_facts_tell_nothing(taught):
    eight = taught.forget.select(range(8))
    rows = quantization(taught.model, taught.edits["removed"], eight, taught.retain, bits=(8,))
    word, row = said(Attacked({"quantization": rows}))
    assert (word, row["outcome"], row["n"]) == ("inconclusive", "inconclusive", 8)
    assert "8 facts cannot exclude" in row["note"]
