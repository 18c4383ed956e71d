"""Faithfulness: numbers worked out by hand, identities on every architecture, and agreement with exact edge patching."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.edges import edges
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import edge_attribution, edge_patching
from mechunlearn.localize.edge_attribution import edge_scores
from mechunlearn.model.hooked import load_model
from mechunlearn.patching.faithfulness import faithfulness, faithfulness_curve, mask_faithfulness, stability
from mechunlearn.world.toy import planted_facts
from tests.models import random_hf, token_prompts

CLEAN, CORRUPT, ANSWER, FOIL = 1, 2, 3, 4


@pytest.fixture
def by_hand():
    """One layer, one head that does nothing. The clean token adds 2 to the logit difference by itself and 3 by the MLP.

    Norms are linear (a huge epsilon, a weight that undoes it), and so is the MLP: every number can be worked out.
    """
    config = transformers.GPT2Config(
        vocab_size=5,
        n_embd=4,
        n_layer=1,
        n_head=1,
        n_positions=4,
        n_inner=1,
        activation_function="linear",
        layer_norm_epsilon=1e8,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    hf = transformers.GPT2LMHeadModel(config)
    u, v = torch.tensor([1.0, -1, 0, 0]), torch.tensor([0.0, 0, 1, -1])
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1e4 if "ln_" in name and name.endswith("weight") else 0)
        hf.transformer.wte.weight[CLEAN] = u
        hf.transformer.h[0].mlp.c_fc.weight[:, 0] = u / 2
        hf.transformer.h[0].mlp.c_proj.weight[0] = 1.5 * v
        hf.lm_head.weight[ANSWER] = u + v
    model = load_model((hf.eval(), None))
    tokens = torch.tensor([[0, CLEAN]])
    prompts = Prompts.from_tokens(tokens, torch.tensor([[0, CORRUPT]]), torch.tensor([ANSWER]), torch.tensor([FOIL]))
    return model, prompts


def having(circuit: Circuit, *names: str) -> Circuit:
    frame = circuit.to_frame()
    chosen = torch.zeros_like(circuit.chosen)
    from mechunlearn.artifacts.edges import readers, writers

    for name in names:
        source, target = name.split("->")
        chosen[writers(circuit.signature).index(source), readers(circuit.signature).index(target)] = True
    assert len(frame) >= len(names)
    return replace(circuit, chosen=chosen)


def test_faithfulness_worked_out_by_hand(by_hand):
    model, prompts = by_hand
    circuit = edge_attribution(model, prompts)
    for names, value, complement in (
        (["input->logits"], 0.4, 0.6),
        (["input->m0", "m0->logits"], 0.6, 0.4),
        (["m0->logits"], 0.0, 0.4),
        (["input->logits", "input->m0", "m0->logits"], 1.0, 0.0),
    ):
        found = faithfulness(model, having(circuit, *names), prompts)
        assert found.value == pytest.approx(value, abs=1e-5), names
        assert found.complement == pytest.approx(complement, abs=1e-5), names
        assert found.completeness == pytest.approx(1 - complement, abs=1e-5)
    falls = faithfulness(model, having(circuit, "input->m0", "m0->logits"), prompts).minimality
    assert falls.component.tolist() == ["m0"] and falls.fall.tolist() == pytest.approx([0.6], abs=1e-5)


def test_cpr_and_cmd_worked_out_by_hand(by_hand):
    """By size: input->m0 (3), m0->logits (3), input->logits (2), then zeros: 0, .6, 1, 1 at 1, 2, 3 and 8 of 8 edges."""
    model, prompts = by_hand
    circuit = edge_attribution(model, prompts)
    assert circuit.top(edges=3).to_frame().score.tolist() == pytest.approx([-3, -3, -2], abs=1e-4)
    curve = faithfulness_curve(model, circuit, prompts, fractions=(0.125, 0.25, 0.375, 1.0))
    assert curve.frame.edges.tolist() == [1, 2, 3, 8]
    np.testing.assert_allclose(curve.frame.faithfulness, [0, 0.6, 1, 1], atol=1e-5)
    assert curve.cpr == pytest.approx(0.0375 + 0.1 + 0.625, abs=1e-5)
    assert curve.cmd == pytest.approx(0.0875 + 0.025, abs=1e-5)


def test_overshooting_counts_against_cmd_only(by_hand):
    """An MLP that works against the answer: without it the circuit overshoots to 2, which CPR rewards."""
    model, prompts = by_hand
    with torch.no_grad():
        model.hf.transformer.h[0].mlp.c_proj.weight.mul_(-1 / 3)  # now 2 - 1 = 1
    circuit = edge_attribution(model, prompts)
    assert faithfulness(model, having(circuit, "input->logits"), prompts).value == pytest.approx(2.0, abs=1e-4)
    curve = faithfulness_curve(model, circuit, prompts, fractions=(0.125, 0.25, 0.375, 1.0))
    np.testing.assert_allclose(curve.frame.faithfulness, [2, 2, 1, 1], atol=1e-4)
    assert curve.cpr == pytest.approx(0.25 + 0.1875 + 0.625, abs=1e-4)
    assert curve.cmd == pytest.approx(0.125 + 0.0625, abs=1e-4)


def test_all_edges_are_the_model_and_none_the_corrupt_model(model, prompts):
    circuit = edge_attribution(model, prompts)
    before = circuit.scores.clone(), circuit.chosen.clone()
    whole, nothing = faithfulness_ends(model, circuit, prompts)
    assert whole == pytest.approx(1, abs=2e-4) and nothing == pytest.approx(0, abs=2e-4)
    assert torch.equal(circuit.scores, before[0]) and torch.equal(circuit.chosen, before[1])


def faithfulness_ends(model, circuit, prompts) -> list[float]:
    frame = faithfulness_curve(model, circuit, prompts, fractions=(1.0, 0.0)).frame
    return frame.faithfulness.tolist()


def test_leaving_one_edge_out_is_patching_that_edge(model, prompts):
    if model.layout.modules.attention_post:
        return  # there a head's contribution has another scale in each run
    names = ["input->m0", "a0.h1->a1.h0<k>", "a0.h2->m2", "m0->a2.h0<v>", "a1.h0->logits", "m1->a2.h3<q>"]
    exact = edge_patching(model, prompts, names)
    circuit = edge_attribution(model, prompts)
    from mechunlearn.metrics.answers import logit_diff
    from mechunlearn.patching.faithfulness import _measured

    all_edges = edges(circuit.signature, circuit.parallel)
    rows = []
    for name in names:
        rows.append(all_edges & ~having(circuit, name).chosen)  # noqa: PERF401
    found = _measured(model, circuit, prompts, torch.stack(rows), logit_diff, 32)
    for name, value in zip(names, found.circuit, strict=True):
        effect = float(exact.scores[having(circuit, name).chosen])
        assert float((value - found.clean).mean()) == pytest.approx(effect, abs=1e-5), name


def test_ragged_prompts_give_the_numbers_of_single_facts(world, sport):
    chosen = sport[0].select(range(4))
    circuit = edge_attribution(world, chosen).top(edges=40)
    from mechunlearn.metrics.answers import logit_diff
    from mechunlearn.patching.faithfulness import _measured

    together = _measured(world, circuit, chosen, circuit.chosen[None], logit_diff, 32)
    single = [_measured(world, circuit, chosen.select([i]), circuit.chosen[None], logit_diff, 1) for i in range(4)]
    torch.testing.assert_close(together.circuit[0], torch.cat([one.circuit[0] for one in single]), atol=1e-4, rtol=1e-4)


def test_stability_sees_an_unstable_circuit():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 5, 8, generator=generator)
    assert stability(noise, 5)[0] < 0.6
    steady = noise * 0.01 + torch.arange(40.0).view(5, 8)
    mean, low, high = stability(steady, 5)
    assert low <= mean <= high and mean > 0.99
    with pytest.raises(MechunlearnError, match="Cannot take the 0 largest"):
        stability(noise, 0)


def test_stability_of_a_real_circuit(world, sport):
    scores = edge_scores(world, sport[0].select(range(16)))
    mean, low, high = stability(scores, 20, resamples=50)
    assert 0.3 < low <= mean <= high <= 1


def test_what_cannot_be_measured_is_refused(prompts):
    model = load_model((random_hf("llama"), None))
    circuit = edge_attribution(model, prompts)
    with pytest.raises(MechunlearnError, match="same metric, so faithfulness is not defined"):
        faithfulness(model, circuit.top(edges=2), replace(prompts, corrupt=prompts.tokens))
    other = load_model((random_hf("qwen3"), None))
    with pytest.raises(MechunlearnError, match=r"The circuit is for \(llama"):
        faithfulness(other, circuit, prompts)
    with pytest.raises(MechunlearnError, match="context is 64"):
        faithfulness(model, circuit, token_prompts(length=70))


def test_a_masks_interval_stands_facts_whose_corrupt_partner_is_the_same():
    toy = planted_facts()
    prompts = toy.prompts(list(range(8)))
    corrupt = prompts.corrupt.clone()
    corrupt[:6] = prompts.tokens[:6]
    mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    whole = ComponentMask.everything(toy.model)
    for chosen, expected in ((mask, 0), (whole, 1)):
        assert mask_faithfulness(toy.model, chosen, replace(prompts, corrupt=corrupt)) == pytest.approx((expected,) * 3)
    with pytest.raises(MechunlearnError, match="so faithfulness is not defined"):
        mask_faithfulness(toy.model, mask, replace(prompts, corrupt=prompts.tokens))
