"""Direct logit attribution adds up to the logit difference on every architecture; the lens ends at the model itself."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers

from mechunlearn import Component, MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import direct_logit_attribution, logit_lens
from mechunlearn.metrics.answers import logit_diff, measure
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.hooked import load_model
from tests.models import CONFIGS, random_hf, token_prompts


def ragged_prompts() -> Prompts:
    """Two-token answers, read at their second token, at another position in each fact; padding behind."""
    made = token_prompts(length=9)
    first = torch.tensor([3, 6, 4, 5])
    tokens = made.tokens.clone()
    answers = torch.stack([made.tokens[torch.arange(4), first + 1], made.answers[:, 0]], 1)
    foils = torch.stack([answers[:, 0], made.foils[:, 0]], 1)
    tokens[torch.arange(9) > first[:, None] + 1] = 0
    return replace(
        made, tokens=tokens, start=first, read=first + 1, lengths=first + 2, answers=answers, foils=foils, targets=foils
    )


def true_difference(model, prompts: Prompts) -> torch.Tensor:
    """The logit difference before a final softcap, by the Hugging Face model alone."""
    if hasattr(model.hf.config, "final_logit_softcapping"):
        model.hf.config.final_logit_softcapping = None
    with torch.no_grad():
        return logit_diff(model.hf(prompts.tokens).logits, prompts)


def written(model, prompts: Prompts, unit: Component) -> torch.Tensor:
    """Forward, one unit at a time: what it alone adds to the read position's stream, through norms with their scale held."""
    modules, rows = model.layout.modules, torch.arange(len(prompts))
    last = f"L{model.signature.layers - 1}.resid_post"
    _, kept = model.cache(prompts.tokens, [unit.site, last])
    z, resid = kept[unit.site][rows, prompts.read], kept[last][rows, prompts.read]
    alone = torch.zeros_like(z)
    alone[:, unit.unit] = z[:, unit.unit]
    projection = model.decoder.projection(unit.layer, unit.kind)
    with torch.no_grad():
        bias = projection(torch.zeros_like(z).flatten(1))
        added, everything = projection(alone.flatten(1)) - bias, projection(z.flatten(1))
        post = modules.attention_post if unit.kind == "attn.o" else modules.mlp_post
        if post:
            norm = model.decoder.blocks[unit.layer].get_submodule(post)
            added = added * norm(everything) / everything
        config, norm = model.hf.config, model.decoder.final_norm
        added = added * getattr(config, "residual_multiplier", 1)
        behind = norm(resid) - (0 if getattr(norm, "bias", None) is None else norm.bias)
        if modules.centred:
            added = added - added.mean(-1, keepdim=True)
            resid = resid - resid.mean(-1, keepdim=True)
        behind = added * behind / resid
        unembedding = model.hf.get_output_embeddings().weight
        difference = unembedding[prompts.answer_at_read] - unembedding[prompts.foil_at_read]
        difference = difference * getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)
        return (behind * difference).sum(-1)


@pytest.mark.parametrize("made", [token_prompts, ragged_prompts])
def test_the_contributions_add_up_to_the_logit_difference_of_every_fact(model, made):
    prompts = made()
    truth = true_difference(model, prompts)
    assert truth.abs().min() > 1e-3, "there is something to add up"
    for i in range(len(prompts)):
        found = direct_logit_attribution(model, prompts.select([i]))
        total = sum(float(scores.sum()) for scores in found.scores.values())
        total += found.evidence["embedding"] + found.evidence["biases"]
        assert total == pytest.approx(float(truth[i]), abs=1e-4)
        assert found.evidence["logit_diff"] == pytest.approx(float(truth[i]), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_output_biases_are_counted_behind_the_norms_they_pass(family):
    """An option of these families: biases on what attention writes, normalised with it in Gemma 2."""
    config = copy.deepcopy(CONFIGS[family])
    config.attention_bias = True
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model, prompts = load_model((hf, None)), token_prompts()
    found = direct_logit_attribution(model, prompts)
    assert abs(found.evidence["biases"]) > 1e-3
    total = sum(float(scores.sum()) for scores in found.scores.values())
    total += found.evidence["embedding"] + found.evidence["biases"]
    assert total == pytest.approx(float(true_difference(model, prompts).mean()), abs=1e-4)


def test_a_unit_scores_what_it_alone_writes(model):
    prompts = ragged_prompts()
    found = direct_logit_attribution(model, prompts)
    for address in ("L0.attn.o[1]", "L2.attn.o[3]", "L0.mlp.out[0]", "L1.mlp.out[7]", "L2.mlp.out[47]"):
        unit = Component.parse(address)
        expected = written(model, prompts, unit)
        assert expected.abs().min() > 1e-6, "a contribution that cannot be seen proves nothing"
        score = float(found.scores[unit.site][unit.unit])
        assert score == pytest.approx(float(expected.mean()), abs=1e-5, rel=1e-4), address


def test_scores_of_a_batch_are_the_mean_over_facts(world, sport):
    chosen = sport[0].select(range(6))
    assert len(set(chosen.lengths.tolist())) > 1, "the batch must be ragged"
    together = direct_logit_attribution(world, chosen, batch_size=4)
    single = [direct_logit_attribution(world, _unpadded(chosen, i)) for i in range(6)]
    for site, scores in together.scores.items():
        mean = torch.stack([found.scores[site] for found in single]).mean(0)
        torch.testing.assert_close(scores, mean, atol=1e-5, rtol=1e-4)
    for name, value in together.evidence.items():
        assert value == pytest.approx(sum(found.evidence[name] for found in single) / 6, abs=1e-4)


def _unpadded(prompts: Prompts, row: int) -> Prompts:
    one = prompts.select([row])
    length = int(one.lengths[0])
    return replace(one, tokens=one.tokens[:, :length], corrupt=one.corrupt[:, :length], roles=one.roles[:, :length])


def test_the_head_that_carries_a_fact_is_seen_and_the_neuron_that_knows_it_is_not(toy):
    found = direct_logit_attribution(toy.model, toy.prompts([1, 6]))
    assert list(found.above(1e-4)) == [Component(1, "attn.o", 0)]
    assert float(found.scores["L1.attn.o"][0]) == pytest.approx(found.evidence["logit_diff"], rel=1e-5)
    assert float(found.scores["L0.mlp.out"].abs().max()) == 0, "its effect is indirect"


def test_only_the_kinds_asked_for_are_scored_and_with_the_same_scores(model, prompts):
    both, heads = (
        direct_logit_attribution(model, prompts, kinds=kinds) for kinds in (("attn.o", "mlp.out"), ["attn.o"])
    )
    assert set(heads.scores) == {"L0.attn.o", "L1.attn.o", "L2.attn.o"}
    assert all(torch.equal(heads.scores[site], both.scores[site]) for site in heads.scores)
    assert heads.evidence == both.evidence


def test_an_edit_is_seen(toy):
    prompts = toy.prompts([1])
    before = direct_logit_attribution(toy.model, prompts).evidence["logit_diff"]
    rows = toy.model.rows("L1.attn.o")
    toy.model.write_("L1.attn.o", rows / 2)
    after = direct_logit_attribution(toy.model, prompts)
    assert float(after.scores["L1.attn.o"][0]) == pytest.approx(float(true_difference(toy.model, prompts)), rel=1e-5)
    assert after.evidence["logit_diff"] < before


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_half_precision_models_are_read_in_single_precision(family):
    prompts = token_prompts()
    exact = direct_logit_attribution(load_model((random_hf(family), None)), prompts)
    rough = direct_logit_attribution(load_model((random_hf(family), None), dtype=torch.bfloat16), prompts)
    total = sum(float(scores.sum()) for scores in rough.scores.values())
    total += rough.evidence["embedding"] + rough.evidence["biases"]
    size = sum(float(scores.abs().sum()) for scores in exact.scores.values())
    assert abs(total - rough.evidence["logit_diff"]) < 0.01 * size
    for site, scores in exact.scores.items():
        assert rough.scores[site].dtype == torch.float32
        assert (rough.scores[site] - scores).abs().max() < 0.02 * size


def test_what_cannot_be_attributed_is_refused(toy):
    prompts = toy.prompts([1])
    with pytest.raises(MechunlearnError, match=r"No direct effect of kind 'attn\.q'.*attn\.o, mlp\.out"):
        direct_logit_attribution(toy.model, prompts, kinds=["attn.o", "attn.q"])
    long = Prompts.from_tokens(*[torch.ones(1, 17, dtype=torch.long)] * 2, torch.tensor([28]), torch.tensor([29]))
    for function in (direct_logit_attribution, logit_lens):
        with pytest.raises(MechunlearnError, match="no facts"):
            function(toy.model, prompts.select([]))
        with pytest.raises(MechunlearnError, match=r"17 tokens, the model's context is 16"):
            function(toy.model, long)


def test_the_lens_ends_at_the_model_itself(model):
    prompts = ragged_prompts()
    prompts = replace(prompts, answers=prompts.answers[:, 1:], foils=prompts.foils[:, 1:], start=prompts.read)
    prompts = replace(prompts, targets=prompts.foils)
    with torch.no_grad():
        logits = model.hf(prompts.tokens).logits
    best = prompts.answers.clone()
    best[:2, 0] = logits[[0, 1], prompts.read[:2]].argmax(-1)
    prompts = replace(prompts, answers=best)
    lens, truth = logit_lens(model, prompts), measure(model, prompts)
    assert lens.depth.tolist() == [0, 1, 2, 3] and set(lens.n) == {4}
    last = lens.iloc[-1]
    assert last.logit_diff == pytest.approx(float(logit_diff(logits, prompts).mean()), abs=1e-5)
    assert (last.low, last.high) == pytest.approx(bootstrap_interval(logit_diff(logits, prompts)), abs=1e-5)
    assert last.probability == pytest.approx(float(truth["probability"].mean()), abs=1e-6)
    assert last.rank_1 == float(truth["accuracy"].mean()) >= 0.5


def test_the_lens_reads_each_depth_as_if_it_were_the_last(model):
    """Blocks that write nothing leave the stream as it is, so a model cut short is the lens at that depth."""
    prompts = ragged_prompts()
    lens = logit_lens(model, prompts, batch_size=3)
    assert len(set(lens.logit_diff.round(5))) == 4, "every block writes something"
    for depth in (0, 1, 2):
        skipped = {f"L{k}.{out}": torch.zeros_like for k in range(depth, 3) for out in ("attn_out", "mlp_out")}
        with torch.no_grad(), model.hooks(skipped):
            logits = model.forward(prompts.tokens)
        assert lens.logit_diff[depth] == pytest.approx(float(logit_diff(logits, prompts).mean()), abs=1e-5)
        at = logits[torch.arange(4), prompts.read].softmax(-1)
        probability = at.gather(1, prompts.answer_at_read[:, None]).mean()
        assert lens.probability[depth] == pytest.approx(float(probability), abs=1e-6)


def test_the_lens_sees_the_planted_fact_when_it_is_carried(toy):
    lens = logit_lens(toy.model, toy.prompts())
    assert lens.logit_diff[:2].tolist() == [0, 0] and lens.logit_diff[2] > 1
    assert lens.rank_1.tolist() == [0, 0, 1]
    assert lens.probability[0] == pytest.approx(1 / 31), "all logits are equal"
