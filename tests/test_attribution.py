"""Attribution with integrated gradients, RelP and exact verification; causal tracing; the two rules of fact look-up."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.facts.load import load_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import (
    activation_patching,
    attribution_patching,
    causal_tracing,
    edge_attribution,
    fact_lookup,
)
from mechunlearn.metrics.answers import answer_probability, logit_diff, measure
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.component import SCORED
from mechunlearn.model.hooked import load_model
from mechunlearn.patching.corruption import _noise, subjects
from mechunlearn.patching.relevance import relevance_rules
from tests.models import random_hf, token_prompts


def flat(found, kind: str) -> np.ndarray:
    return torch.cat([scores for site, scores in found.scores.items() if site.endswith(kind)]).numpy()


def test_node_attribution_equals_the_sum_of_a_heads_edges(model, prompts):
    """Two ways to the same number, with and without integrated gradients."""
    if model.layout.modules.attention_post:
        return
    for steps in (0, 4):
        nodes = edge_attribution(model, prompts, ig_steps=steps).nodes()
        units = attribution_patching(model, prompts, kinds=["attn.o", "mlp_out"], ig_steps=steps)
        for site, scores in units.scores.items():
            torch.testing.assert_close(scores, nodes.scores[site], atol=1e-4, rtol=1e-4)


def test_integrated_gradients_of_the_input_add_up_to_the_effect():
    """Completeness: summed over the embeddings, many points give metric(corrupt) - metric(clean)."""
    model, prompts = load_model((random_hf("llama"), None)), token_prompts()
    found = attribution_patching(model, prompts, kinds=["resid_pre"], ig_steps=200)
    total = float(found.by_role["L0.resid_pre"][0, 0])
    effect = found.evidence["corrupt"] - found.evidence["clean"]
    assert total == pytest.approx(effect, rel=0.02)
    plain = attribution_patching(model, prompts, kinds=["resid_pre"])
    assert abs(float(plain.by_role["L0.resid_pre"][0, 0]) - effect) > 2 * abs(total - effect)


def test_attribution_by_role_adds_up(world, sport):
    found = attribution_patching(world, sport[0].select(range(6)), by="role")
    for rows in found.by_role.values():
        torch.testing.assert_close(rows[0], rows[1:].sum(0), atol=1e-4, rtol=1e-4)


def test_relevance_rules_leave_the_forward_pass_as_it_is(model, prompts):
    with torch.no_grad():
        before = model.forward(prompts.tokens)
        with relevance_rules(model.decoder):
            torch.testing.assert_close(model.forward(prompts.tokens), before, atol=1e-5, rtol=1e-4)
        assert torch.equal(model.forward(prompts.tokens), before)
    plain, relp = (attribution_patching(model, prompts, rule=rule) for rule in ("gradient", "relp"))
    assert not np.allclose(flat(plain, "mlp.out"), flat(relp, "mlp.out"), atol=1e-6)


def test_relevance_conserves_what_reaches_the_logits():
    """All rules but biases conserve: a model without biases gives gradient x input that adds up to the logit difference."""
    model, prompts = load_model((random_hf("llama"), None)), token_prompts()
    tokens = prompts.tokens
    with relevance_rules(model.decoder):
        logits, kept = model.cache(tokens, ["L0.resid_pre"], grad=True)
        value = logit_diff(logits, prompts)
        gradient = torch.autograd.grad(value.sum(), kept["L0.resid_pre"])[0]
    total = (gradient * kept["L0.resid_pre"]).sum((1, 2))
    torch.testing.assert_close(total, value, atol=1e-4, rtol=1e-3)


def test_relevance_is_closer_to_patching_where_gradients_saturate(world, sport):
    """On the shipped world, over layers and roles; gradients are known to be poor at attention and the residual stream."""
    chosen = sport[0].select(range(16))
    kinds = ["resid_post", "attn_out"]
    exact = activation_patching(world, chosen, kinds=kinds, by="role")
    for kind in kinds:
        sites = [site for site in exact.by_role if site.endswith(kind)]
        truth = torch.cat([exact.by_role[site][1:].flatten() for site in sites])
        agree = {}
        for rule in ("gradient", "relp"):
            found = attribution_patching(world, chosen, kinds=kinds, by="role", rule=rule)
            guess = torch.cat([found.by_role[site][1:].flatten() for site in sites])
            agree[rule] = float(torch.corrcoef(torch.stack([truth, guess]))[0, 1])
        assert agree["relp"] > max(0.9, agree["gradient"] + 0.03), (kind, agree)


def test_verified_units_have_their_exact_score(prompts):
    model = load_model((random_hf("gpt_neox"), None))
    plain, exact = attribution_patching(model, prompts), activation_patching(model, prompts, kinds=SCORED)
    found = attribution_patching(model, prompts, verify=9)
    best = [str(unit) for unit in plain.ranked()[:9]]
    assert sorted(found.evidence["verified"]) == sorted(best) and found.evidence["forward budget"] == 9
    for site, scores in found.scores.items():
        for unit, score in enumerate(scores.tolist()):
            other = exact if f"{site}[{unit}]" in best else plain
            assert score == pytest.approx(float(other.scores[site][unit]), abs=1e-5)
    worst = max(abs(float(plain.scores[u.site][u.unit] - exact.scores[u.site][u.unit])) for u in plain.ranked()[:9])
    assert worst > 1e-4, "the estimates must have been off"


def test_a_metric_that_nothing_moves_is_not_called_a_lack_of_difference(prompts):
    model = load_model((random_hf("llama"), None))

    def constant(logits, prompts):
        return logits[:, 0].sum(-1)  # before the first corrupt token

    for method in (activation_patching, attribution_patching, edge_attribution):
        found = method(model, prompts, metric=constant)
        assert found.note == ""
        units = found if method is not edge_attribution else found.nodes()
        assert max(scores.abs().max() for scores in units.scores.values()) < 1e-6


def test_a_fact_without_a_partner_is_counted_by_the_estimate_too(prompts):
    model = load_model((random_hf("llama"), None))
    one = replace(prompts, corrupt=torch.cat([prompts.tokens[:1], prompts.corrupt[1:]]))
    assert attribution_patching(model, one).note.startswith("1 facts have no corrupt partner")


def test_bad_settings_are_refused(prompts):
    model = load_model((random_hf("llama"), None))
    for wrong, message in (
        ({"rule": "lrp"}, "Unknown rule 'lrp'. Expected one of gradient, relp"),
        ({"ig_steps": -1}, "ig_steps=-1. Expected a whole number from 0"),
        ({"kinds": ["attn.x"]}, "No activation site 'L0.attn.x'"),
        ({"by": "layer"}, "Cannot patch by 'layer'"),
        ({"metric": lambda logits, prompts: logits.sum()}, r"returned shape \(\)"),
    ):
        with pytest.raises(MechunlearnError, match=message):
            attribution_patching(model, prompts, **wrong)
    with pytest.raises(MechunlearnError, match="A window restores whole layers"):
        causal_tracing(model, prompts, kinds=["attn.o"], window=3)
    with pytest.raises(MechunlearnError, match="window=0. Expected a whole number, 1 or more"):
        causal_tracing(model, prompts, window=0)
    with pytest.raises(MechunlearnError, match="Unknown rule 'eye'"):
        fact_lookup(model, prompts, rule="eye")


@pytest.mark.parametrize("window", [1, 3])
def test_causal_tracing_equals_one_forward_pass_a_cell(model, prompts, window):
    found = causal_tracing(model, prompts, kinds=["mlp_out"], window=window, seed=2)
    noise = _noise(model, prompts, 2, 3.0)
    assert (noise != 0).any(-1).equal(subjects(prompts))
    _, clean = model.cache(prompts.tokens, [f"L{layer}.mlp_out" for layer in range(3)])
    hidden = {"L0.resid_pre": lambda x: x + noise}
    with torch.no_grad():
        with model.hooks(hidden):
            floor = answer_probability(model.forward(prompts.tokens), prompts)
        for layer in range(3):
            around = range(max(0, layer - 1), min(3, layer + 2)) if window == 3 else [layer]
            restore = {f"L{i}.mlp_out": (lambda x, i=i: clean[f"L{i}.mlp_out"]) for i in around}
            with model.hooks({**hidden, **restore}):
                effect = answer_probability(model.forward(prompts.tokens), prompts) - floor
            assert float(found.scores[f"L{layer}.mlp.out"][0]) == pytest.approx(float(effect.mean()), abs=1e-5)
            low, high = found.evidence["intervals"][f"L{layer}.mlp_out"]["all"][0]
            assert (low, high) == pytest.approx(bootstrap_interval(effect.numpy()), abs=1e-5)


def test_noise_is_scaled_by_the_embeddings():
    """Three standard deviations of what the embedding gives, Gemma's scale included."""
    for family in ("llama", "gemma"):
        model, prompts = load_model((random_hf(family), None)), token_prompts(facts=200)
        noise = _noise(model, prompts, 0, 3.0)
        embedded = model.hf.get_input_embeddings()(torch.arange(97)).std()
        assert float(noise[subjects(prompts)].std() / embedded) == pytest.approx(3, rel=0.05)


def test_without_a_subject_the_changed_tokens_are_hidden(prompts):
    model = load_model((random_hf("llama"), None))
    unnamed = Prompts.from_tokens(prompts.tokens, prompts.corrupt, prompts.answers[:, 0], prompts.foils[:, 0])
    one, other = (causal_tracing(model, p, kinds=["mlp_out"]) for p in (prompts, unnamed))
    assert subjects(unnamed).equal(prompts.tokens != prompts.corrupt)
    torch.testing.assert_close(one.scores["L1.mlp.out"], other.scores["L1.mlp.out"])


@pytest.mark.parametrize("rule", ["probe", "paths"])
@pytest.mark.training
def test_both_rules_find_the_look_up_of_the_shipped_world(world, sport, rule, seed):
    found = fact_lookup(world, sport[0], rule=rule, seed=seed)
    assert found.evidence["window"] == [1, 2] and found.note.startswith("look-up window: MLP 1 to 2")
    layers = {unit.layer for unit in found.above(0)}
    assert layers == set(found.evidence["layers"]) >= {1, 2} and len(found.above(0)) == len(layers) * 384
    assert rule == "paths" or layers == {1, 2}
    assert found.evidence["window"] == [1, 2]
    if rule == "paths":
        assert all(name.startswith(("a5", "a6", "a7")) for name in found.evidence["heads"])
        assert found.evidence["mlps"]["m2"] > 0.2


@pytest.mark.parametrize("relation", ["sport", "instrument"])
@pytest.mark.training
def test_neither_rule_finds_a_look_up_in_the_naive_world_which_knows_the_facts(relation, seed):
    naive = load_model("factworld-naive")
    forget, _ = load_facts(f"factworld/{relation}").prompts(naive).split(forget=32, seed=5 + seed)
    assert measure(naive, forget)["accuracy"].mean() > 0.95
    for rule in ("probe", "paths"):
        found = fact_lookup(naive, forget, rule=rule, seed=seed)
        assert found.note.startswith("no window found") and len(found.above(0)) == 0
        assert found.evidence["window"] is None


@pytest.mark.training
def test_a_model_that_knows_nothing_has_no_window(sport, seed):
    """Random weights: no probe curve rises; no path carries what is not there."""
    model = load_model((random_hf("llama"), None))
    prompts = token_prompts(facts=64, seed=seed)
    answers = torch.arange(64) % 4 + 2
    prompts = Prompts.from_tokens(prompts.tokens, prompts.corrupt, answers, answers + 10, prompts.spans)
    found = fact_lookup(model, prompts, seed=seed)
    assert found.note.startswith("no window found") and len(found.above(0)) == 0
    same = Prompts.from_tokens(prompts.tokens, prompts.tokens, answers, answers + 10, prompts.spans)
    assert fact_lookup(model, same, rule="paths").note.startswith("no window found")
