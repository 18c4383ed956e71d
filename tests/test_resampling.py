"""How sure scores are: scores by fact are those of facts alone, and what is computed of them is what loops compute."""

import json
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from mechunlearn import Circuit, Localization, MechunlearnError, load_facts
from mechunlearn.artifacts import resampling
from mechunlearn.core.runcard import RunCard
from mechunlearn.core.tensors import text_hash
from mechunlearn.localize import (
    activation_patching,
    attribution_patching,
    causal_tracing,
    direct_logit_attribution,
    edge_attribution,
    edge_patching,
    path_patching,
    random_units,
)
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.layout import Signature

TINY = Signature("llama", layers=2, heads=2, kv_heads=2, d_mlp=5, d_model=4)
EDGES = ["m0->m1", "a0.h1->logits", "input->m0"]
WAYS = {
    "heads and MLPs": (activation_patching, {}),
    "by role": (activation_patching, {"by": "role"}),
    "denoised": (activation_patching, {"denoise": True, "kinds": ["attn_out", "resid_post"]}),
    "attribution": (attribution_patching, {}),
    "attribution by position": (attribution_patching, {"by": "position", "kinds": ["mlp_out"]}),
    "integrated": (attribution_patching, {"ig_steps": 2}),
    "verified": (attribution_patching, {"verify": 3, "batch_size": 4}),
    "tracing": (causal_tracing, {"kinds": ["attn.o"]}),
    "direct": (direct_logit_attribution, {"batch_size": 5}),
    "paths": (path_patching, {}),
    "edges": (edge_attribution, {"batch_size": 3}),
    "edges, integrated": (edge_attribution, {"ig_steps": 2}),
    "single edges": (edge_patching, {"names": EDGES}),
}
ALONE = [way for way in WAYS if way != "verified"]  # which units are verified depends on all facts


def values(facts: int, units: int, seed: int = 0) -> torch.Tensor:
    """Some effects that are surely there, others not, units that share theirs, and one of nothing."""
    made = torch.randn(facts, units, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-1, 2, units)
    made[:, 1], made[:, -1] = made[:, 0], 0
    return made


def by_hand(table: torch.Tensor, **sites: int) -> Localization:
    parts = dict(zip((f"L{s[1]}.{s[2:]}".replace("_", ".") for s in sites), table.split(list(sites.values()), 1)))
    weights = {"attn.o": 8, "mlp.out": 4}
    means = {site: part.mean(0) for site, part in parts.items()}
    return Localization(means, TINY, weights, 72, RunCard("by hand"), by_fact=parts)


def flipped(x: np.ndarray) -> float:
    """Every flip of signs, one after another."""
    as_large = [abs(np.dot(signs, x)) >= abs(x.sum()) - 1e-9 for signs in product((1.0, -1.0), repeat=len(x))]
    return float(np.mean(as_large))


@pytest.fixture(scope="module")
def ten(world):
    return load_facts("factworld/sport").prompts(world).select(range(10))


class TestUncertainty:
    @pytest.mark.parametrize("facts", [2, 5, 11, 12])
    def test_it_is_what_loops_give(self, facts):
        table = values(facts, 7)
        found = resampling.uncertainty(table, seed=3)
        for unit, x in enumerate(table.double().numpy().T):
            mean = sum(x) / facts
            assert found["se"][unit] == pytest.approx((sum((x - mean) ** 2) / (facts - 1) / facts) ** 0.5)
            assert (found["low"][unit], found["high"][unit]) == pytest.approx(bootstrap_interval(x, seed=3), abs=1e-9)
            assert found["p"][unit] == pytest.approx(flipped(x))
        assert found["p"][-1] == 1 and found["se"][-1] == 0

    def test_many_facts_draw_their_flips_and_come_near_to_all_of_them(self):
        table = values(14, 9, seed=2)
        found = resampling.uncertainty(table)["p"]
        exact = np.array([flipped(x) for x in table.double().numpy().T])
        assert (np.abs(found - exact) <= 4 * np.sqrt(exact * (1 - exact) / 2000) + 1e-3).all() and exact.min() < 0.05
        assert not np.array_equal(found, resampling.uncertainty(table, seed=1)["p"])
        assert resampling.uncertainty(torch.ones(40, 1))["p"] == 1 / 2001, "never 0"

    def test_no_effect_gives_small_p_as_rarely_as_it_should(self):
        for facts in (10, 20):
            p = resampling.uncertainty(torch.randn(facts, 4000, generator=torch.Generator().manual_seed(facts)))["p"]
            assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.014), "four standard errors"

    def test_chunks_change_nothing(self, monkeypatch):
        table = values(16, 50)
        whole = resampling.uncertainty(table), resampling.steadiness(table, 9)
        monkeypatch.setattr(resampling, "CHUNK", 6000)
        for name, one in resampling.uncertainty(table).items():
            np.testing.assert_allclose(one, whole[0][name], atol=1e-9)
        assert torch.equal(resampling.steadiness(table, 9), whole[1])


class TestStability:
    @pytest.mark.parametrize("first", [1, 2, 4, 8])
    def test_it_is_what_a_loop_gives(self, first):
        table = values(9, 8, seed=4)
        x, drawn = table.double().numpy(), np.random.default_rng(0).integers(0, 9, (2000, 9))
        held = np.zeros(8)
        for rows in drawn:
            means = np.array([sum(x[i, unit] for i in rows) / 9 for unit in range(8)])
            least = sorted(abs(means))[-first]
            held += [abs(m) >= least - 1e-6 and np.sign(m) == np.sign(w) != 0 for m, w in zip(means, x.mean(0))]
        found = resampling.steadiness(table, first)
        np.testing.assert_allclose(found, held / 2000, atol=1e-3)
        assert found[-1] == 0 and found[0] == found[1], (
            "nothing has no sign; units that share their values stay together"
        )

    def test_top_keeps_the_stable_of_its_units(self):
        table = values(16, 14, seed=1)
        found = by_hand(table, L0attn_o=2, L0mlp_out=5, L1attn_o=2, L1mlp_out=5)
        flat = torch.cat(list(found.by_fact.values()), 1)
        assert torch.equal(flat, table)
        for budget in ({"units": 6}, {"weights": 0.5}, {"weights": 0.5, "tied": True}, {"units": 14}):
            plain, sure = found.top(**budget), found.top(**budget, stable=0.9)
            first = sum(1 for _ in found.top(**{**budget, "tied": False})) if "units" in budget else None
            if first is not None:
                share = resampling.steadiness(flat, first)
                chosen = torch.cat(list(found.top(units=first).sites.values())) & (share >= 0.9)
                assert torch.equal(torch.cat(list(sure.sites.values())), chosen) and 0 < int(chosen.sum()) < first
            assert set(sure) < set(plain)
        masks = [set(found.top(units=k, stable=0.9)) for k in range(15)]
        assert all(one <= two for one, two in pairwise(masks)), "masks of growing budgets nest"
        assert not masks[0] and set(found.top(units=6, stable=1.0)) <= masks[6]

    def test_it_is_refused_where_nothing_can_be_said(self):
        few = by_hand(values(7, 5), L0mlp_out=5)
        with pytest.raises(MechunlearnError, match=r"Resamples of 7 facts .* Expected 8 facts or more"):
            few.top(units=2, stable=0.95)
        assert len(few.top(units=2)) == 2 and len(few.intervals()) == 5
        with pytest.raises(MechunlearnError, match="One fact says nothing"):
            by_hand(values(1, 5), L0mlp_out=5).intervals()
        for share in (0, 1.5, -1):
            with pytest.raises(MechunlearnError, match=rf"stable={share} is out of range"):
                few.top(units=2, stable=share)

    def test_halves_agree_on_what_is_there_and_as_chance_has_it_on_noise(self):
        assert resampling.halves(torch.arange(40.0).expand(8, -1)) == (
            "halves of the 8 facts share 10.0 of the 10 largest scores"
        )
        noise = resampling.halves(torch.randn(20, 400, generator=torch.Generator().manual_seed(0)), "edges")
        assert 0 < float(noise.split("share ")[1].split(" of")[0]) < 1.5 and noise.endswith("of the 10 largest edges")
        shared = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).repeat_interleave(30, 1)
        assert "of the 1 largest" in resampling.halves(shared), "the neurons of an MLP count once"
        for table in (torch.ones(7, 9).cumsum(1), torch.zeros(9, 9), torch.ones(9, 9), torch.ones(9, 0)):
            assert not resampling.halves(table)

    def test_halves_are_what_a_loop_gives(self):
        table = values(11, 12, seed=5)
        kept = torch.cat([table[:, :1], table[:, 2:]], 1).double().numpy()  # the second unit repeats the first
        rng, shared = np.random.default_rng(0), []
        for rows in rng.permuted(np.tile(np.arange(11), (50, 1)), axis=1):
            tops = [set(np.argsort(-abs(kept[half].mean(0)))[:5]) for half in (rows[:5], rows[5:])]
            shared.append(len(tops[0] & tops[1]))
        assert resampling.halves(table) == f"halves of the 11 facts share {np.mean(shared):.1f} of the 5 largest scores"


class TestByFact:
    @pytest.mark.parametrize("way", WAYS)
    def test_scores_are_the_mean_over_facts(self, way, world, ten):
        localizer, settings = WAYS[way]
        found = localizer(world, ten, **settings)
        for each in (found, found.nodes()) if isinstance(found, Circuit) else (found,):
            scores = {"edges": each.scores} if isinstance(each, Circuit) else each.scores
            by_fact = {"edges": each.by_fact} if isinstance(each, Circuit) else each.by_fact
            assert by_fact.keys() == scores.keys()
            for site, facts in by_fact.items():
                assert facts.shape == (10, *scores[site].shape) and facts.dtype == torch.float32
                torch.testing.assert_close(facts.mean(0), scores[site], atol=1e-5, rtol=1e-5)
            assert max(float(facts.std(0).max()) for facts in by_fact.values()) > 1e-3
            assert each.note.startswith("halves of the 10 facts share ")

    @pytest.mark.parametrize("way", ALONE)
    def test_they_are_those_of_each_fact_alone(self, way, world, ten):
        localizer, settings = WAYS[way]
        found = localizer(world, ten, **settings)
        for i in (0, 4, 9):
            alone = localizer(world, ten.select([i]), **settings)
            if isinstance(found, Circuit):
                torch.testing.assert_close(found.by_fact[i], alone.scores, atol=1e-4, rtol=1e-4)
                continue
            for site, scores in alone.scores.items():
                torch.testing.assert_close(found.by_fact[site][i], scores, atol=1e-4, rtol=1e-4)

    def test_exact_effects_are_exact_for_every_fact(self, world, ten):
        found = attribution_patching(world, ten, verify=2)
        exact = activation_patching(world, ten, kinds=["attn.o"])
        heads = [name for name in found.evidence["verified"] if "attn.o" in name]
        assert heads
        for name in heads:
            site, unit = name.rstrip("]").split("[")
            want = exact.by_fact[site][:, int(unit)]
            torch.testing.assert_close(found.by_fact[site][:, int(unit)], want, atol=1e-4, rtol=1e-4)

    def test_a_block_of_neurons_shares_them(self, toy):
        found = activation_patching(toy.model, toy.prompts(), kinds=["mlp.out"], neurons=2)
        for site, facts in found.by_fact.items():
            assert facts.shape[1] == len(found.scores[site]) and torch.equal(facts[:, 0], facts[:, 1])
            torch.testing.assert_close(facts.mean(0), found.scores[site])
        frame = found.intervals()
        assert frame.n.unique().tolist() == [len(toy.prompts())] and frame.equals(found.intervals())

    def test_the_planted_neuron_is_sure_for_its_own_fact_alone(self, toy):
        found = activation_patching(toy.model, toy.prompts(), kinds=["mlp.out"])
        unit = toy.neuron(1)
        facts = found.by_fact[unit.site][:, unit.unit]
        assert facts.abs().argmax() == 1 and (facts.abs() > 1e-4).sum() == 1

    def test_the_frame_is_in_the_order_of_the_scores(self):
        table = values(16, 7)
        found = by_hand(table, L0attn_o=2, L1mlp_out=5)
        frame, want = found.intervals(seed=2), resampling.uncertainty(table, seed=2)
        assert list(frame) == ["site", "unit", "score", "se", "low", "high", "p", "n"]
        assert (frame.site + "[" + frame.unit.astype(str) + "]").tolist() == found.to_frame().component.tolist()
        for row in frame.itertuples():
            place = row.unit + 2 * (row.site == "L1.mlp.out")
            assert row.score == pytest.approx(float(table[:, place].mean()), abs=1e-6) and row.n == 16
            assert (row.se, row.low, row.high, row.p) == tuple(want[k][place] for k in ("se", "low", "high", "p"))

    def test_the_frame_of_a_circuit_has_its_edges(self, world, ten):
        found = edge_attribution(world, ten)
        frame = found.top(edges=20).intervals()
        assert frame.iloc[:, :4].equals(found.top(edges=20).to_frame()) and len(frame) == 20
        single = edge_patching(world, ten, EDGES).intervals().set_index(["source", "target"])
        assert len(single) == 3 and (single.n == 10).all()
        alone = [edge_patching(world, ten.select([i]), ["m0->m1"]).to_frame().score[0] for i in range(10)]
        row = single.loc["m0", "m1"]
        assert (row.low, row.high) == pytest.approx(bootstrap_interval(alone), abs=1e-4)
        assert row.p == pytest.approx(flipped(np.array(alone))) and row.se == pytest.approx(
            np.std(alone, ddof=1) / 10**0.5, rel=1e-3
        )


class TestKept:
    @pytest.mark.parametrize("suffix", [".json", ".safetensors"])
    @pytest.mark.parametrize("way", ["heads and MLPs", "edges", "single edges"])
    def test_they_are_saved_and_loaded(self, way, suffix, world, ten, tmp_path):
        localizer, settings = WAYS[way]
        found = localizer(world, ten, **settings)
        found.save(tmp_path / f"found{suffix}")
        again = type(found).load(tmp_path / f"found{suffix}")
        if isinstance(found, Circuit):
            assert torch.equal(again.by_fact, found.by_fact)
        else:
            assert all(torch.equal(again.by_fact[site], facts) for site, facts in found.by_fact.items())
        assert again.intervals().equals(found.intervals()) and again.note == found.note

    def test_what_an_mlp_shares_is_written_once(self, world, ten, tmp_path):
        found = activation_patching(world, ten)
        found.save(tmp_path / "found.safetensors")
        assert (tmp_path / "found.safetensors").stat().st_size < 10 * 4 * found.scores["L0.mlp.out"].numel() * len(
            found.scores
        )

    @pytest.mark.parametrize("noun", [Localization, Circuit])
    def test_a_file_without_them_loads(self, noun, world, ten, tmp_path):
        found = edge_attribution(world, ten)
        found, path = found if noun is Circuit else found.nodes(), tmp_path / "found.json"
        found.save(path)
        entry = json.loads(path.read_text())
        entry["tensors"] = {k: v for k, v in entry["tensors"].items() if "by_fact" not in k and k != "scored"}
        entry["hash"] = ""
        entry["hash"] = text_hash(json.dumps(entry))
        path.write_text(json.dumps(entry))
        again = noun.load(path)
        assert not again.by_fact
        with pytest.raises(MechunlearnError, match="edge_attribution gave no scores by fact"):
            again.intervals()

    def test_methods_without_them_say_so(self, world, ten):
        found = random_units(world)
        assert not found.by_fact and not found.note
        for ask in (found.intervals, lambda: found.top(units=3, stable=0.95)):
            with pytest.raises(MechunlearnError, match=r"random_units gave no scores by fact.*Use activation_patching"):
                ask()

    @pytest.mark.parametrize("way", ["heads and MLPs", "edges", "single edges"])
    def test_too_many_are_left_out_and_nothing_else_changes(self, way, world, ten, monkeypatch):
        localizer, settings = WAYS[way]
        found = localizer(world, ten, **settings)
        monkeypatch.setattr(resampling, "MOST", 1000)
        less = localizer(world, ten, **settings)
        assert not less.by_fact
        one, two = (each.nodes() if isinstance(each, Circuit) else each for each in (found, less))
        for site, scores in one.scores.items():
            torch.testing.assert_close(two.scores[site], scores, atol=1e-4, rtol=1e-4)

    def test_they_follow_the_scores_or_go(self, world, ten):
        found = edge_attribution(world, ten)
        some, other = found.top(edges=9), edge_attribution(world, ten.select(range(5))).top(edges=30)
        assert torch.equal((some | found.top(edges=20)).by_fact, found.by_fact)
        assert (some | other).by_fact is None and torch.equal((some & other).by_fact, found.by_fact)
        assert torch.equal((~some).by_fact, found.by_fact)
        nodes = some.nodes()
        for site, facts in nodes.by_fact.items():
            torch.testing.assert_close(facts.mean(0), nodes.scores[site], atol=1e-5, rtol=1e-5)

    def test_scores_of_which_they_are_not_the_facts_are_refused(self):
        found = by_hand(values(8, 7), L0attn_o=2, L1mlp_out=5)
        one = {"L1.mlp.out": found.scores["L1.mlp.out"]}
        assert replace(found, scores=one).by_fact.keys() == one.keys()
        doubled = {site: 2 * scores for site, scores in found.scores.items()}
        wrong = {
            "doubled": {"scores": doubled},
            "missing": {"by_fact": {"L0.attn.o": found.by_fact["L0.attn.o"]}},
            "narrow": {"by_fact": {**found.by_fact, "L1.mlp.out": found.by_fact["L1.mlp.out"][:, :2]}},
            "empty": {"by_fact": {**found.by_fact, "L1.mlp.out": torch.zeros(0, 5)}},
            "longer": {"by_fact": {**found.by_fact, "L1.mlp.out": found.by_fact["L1.mlp.out"].repeat(2, 1)}},
        }
        for changed in wrong.values():
            with pytest.raises(MechunlearnError, match="Scores by fact"):
                replace(found, **changed)
        assert replace(found, scores=doubled, by_fact={}).by_fact == {}


@pytest.mark.real
def test_it_is_what_loops_give_on_a_real_model(smollm2):
    prompts = load_facts("countries/capital").prompts(smollm2).select(range(8))
    found = attribution_patching(smollm2, prompts, kinds=["attn.o"])
    alone = [attribution_patching(smollm2, prompts.select([i]), kinds=["attn.o"]).scores for i in range(8)]
    frame = found.intervals()
    assert len(frame) == 270 and found.note.startswith("halves of the 8 facts share ")
    for row in frame.iloc[[0, 1, 30, 269]].itertuples():
        x = np.array([float(scores[row.site][row.unit]) for scores in alone])
        assert (row.score, row.se) == pytest.approx((x.mean(), x.std(ddof=1) / 8**0.5), abs=2e-4, rel=1e-3)
        assert (row.low, row.high) == pytest.approx(bootstrap_interval(x), abs=2e-4, rel=1e-3)
        assert row.p == pytest.approx(flipped(x), abs=2 / 256)
    sure = found.top(units=20, stable=0.95)
    assert 0 < len(sure) < 20 and set(sure) < set(found.top(units=20)) and found.ranked(1)[0] in sure
