"""Steering: directions are those of a plain loop, a mark that hides facts is removed, a common push is undone, and what is gone stays gone."""

import sys
from dataclasses import replace

import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.states import halved
from mechunlearn.attack.steering import _last, _settings, _truth_minus_target, _without, steering
from mechunlearn.facts.load import load_facts
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import load_model
from mechunlearn.world.toy import STRANGER
from tests.test_quantization import SAYS, hiding, refusing, wrecking

__all__ = ["refusing"]  # a fixture: the planted model with a dimension that makes it name a stranger


@pytest.fixture(scope="module")
def sets(refusing):
    return refusing.prompts(list(range(8))), refusing.prompts(list(range(8, 24)))


def aimed_at_the_stranger(prompts):
    return replace(prompts, targets=torch.full_like(prompts.targets, STRANGER))


def marked(prompts, alike: bool):
    """The shipped world, in which block 4 adds a large vector to facts, so that they are not said: one for all, or each its own."""
    model, seen = load_model("factworld"), {}
    vectors = torch.randn(
        1 if alike else len(prompts), model.signature.d_model, generator=torch.Generator().manual_seed(0)
    )
    subjects = [fact.subject for fact in prompts.facts]

    def note(module, args, kwargs):
        seen["tokens"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def mark(module, args, out):
        resid = out[0] if isinstance(out, tuple) else out
        texts = [model.tokenizer.decode(row) for row in seen["tokens"]]
        for i, text in enumerate(texts):
            for k, subject in enumerate(subjects):
                if f"{subject} " in text:
                    resid[i] += 4 * resid[i].norm(dim=-1).median() * vectors[0 if alike else k] / vectors[0].norm()
        return out

    model.hf.register_forward_pre_hook(note, with_kwargs=True)
    model.decoder.blocks[4].register_forward_hook(mark)
    return model


class TestDirections:
    def test_what_leaves_each_block_is_what_transformers_gives(self, world):
        prompts = load_facts("factworld/sport")[:6].prompts(world)
        found = _last(world, prompts)
        for i in range(6):
            ids = prompts.tokens[i : i + 1, : int(prompts.start[i]) + 1]
            with torch.no_grad():
                states = world.hf(ids, output_hidden_states=True).hidden_states
            for layer in range(world.signature.layers - 1):  # transformers gives the last one behind the norm
                torch.testing.assert_close(found[layer][i], states[layer + 1][0, -1], atol=1e-4, rtol=1e-4)

    def test_ablation_takes_out_the_difference_of_means_and_nothing_else(self, world):
        prompts = load_facts("factworld/sport")[:12].prompts(world)
        inside, outside = prompts.select(range(6)), prompts.select(range(6, 12))
        d = _last(world, inside)[3].mean(0) - _last(world, outside)[3].mean(0)
        name, hooks = next(
            found for found in _settings(world, inside, outside, [1.0]) if found[0] == "ablation from L0"
        )
        assert name and list(hooks) == [f"L{layer}.resid_post" for layer in range(world.signature.layers)]
        h = torch.randn(2, 3, len(d), generator=torch.Generator().manual_seed(0))
        expected = torch.stack([x - (x @ d) / (d @ d) * d for x in h.flatten(0, 1)]).view_as(h)
        torch.testing.assert_close(hooks["L3.resid_post"](h), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(_without(torch.zeros(len(d)), h), h), "no difference, nothing to take out"

    def test_what_is_added_by_hand(self, world):
        prompts = load_facts("factworld/sport")[:5].prompts(world)
        rows = world.hf.get_output_embeddings().weight.detach()
        v = sum(rows[t] - rows[o] for t, o in zip(prompts.answers[:, 0], prompts.targets[:, 0])) / 5
        sizes = sorted(float(h.norm()) for h in _last(world, prompts)[4])
        hooks = dict(_settings(world, prompts, prompts, [0.5]))["truth - target at L4, 0.5"]
        assert list(hooks) == ["L4.resid_post"]
        added = hooks["L4.resid_post"](torch.zeros(1, 1, len(v)))[0, 0]
        torch.testing.assert_close(added, 0.5 * sizes[2] * v / v.norm(), atol=1e-5, rtol=1e-3)

    def test_without_targets_nothing_is_added(self, toy):
        prompts = toy.prompts([0, 1, 2, 3])
        none = replace(prompts, targets=torch.full_like(prompts.targets, -1))
        assert _truth_minus_target(toy.model, none) is None
        rows = steering(toy.model, None, none, toy.prompts([4, 5, 6, 7]))
        assert rows["setting"].tolist() == ["ablation from L0", "ablation from L1"]


class TestOnThePlantedModel:
    def test_a_push_to_one_target_is_undone(self, refusing, sets):
        forget, retain = aimed_at_the_stranger(sets[0]), sets[1]
        rows = steering(refusing.model, hiding(refusing, 0.003), forget, retain, alphas=[0.02, 0.1])
        pushed = rows[(rows.state == "edited") & rows.setting.str.startswith("truth")]
        assert pushed[pushed.valid]["held_out"].max() == 1
        v = _truth_minus_target(refusing.model, forget)
        assert int(v.abs().argmax()) == SAYS and v[SAYS] < 0

    def test_nothing_is_made_of_the_facts_that_are_measured(self, refusing, sets, monkeypatch):
        module, given = sys.modules["mechunlearn.attack.steering"], []
        made = module._settings
        monkeypatch.setattr(module, "_settings", lambda *args: given.append(args[1:3]) or made(*args))
        rows = steering(refusing.model, hiding(refusing, 0.05), *sets, seed=3)
        assert len(given) == 2 and (rows["n"] == 4).all()
        for taught, kept in given:
            assert len(taught) == 4 and not taught.pairs & halved(sets[0], 3)[1].pairs
            assert len(kept) == 8 and not kept.pairs & halved(sets[1], 3)[1].pairs

    def test_a_wrecked_model_is_not_robust(self, refusing, sets):
        found = recovery(steering(refusing.model, wrecking(refusing), *sets)).loc["edited"]
        assert found["outcome"] == "collapsed"

    def test_alphas_and_sizes_out_of_range(self, refusing, sets):
        with pytest.raises(MechunlearnError, match="The alphas are .*Expected numbers above 0"):
            steering(refusing.model, None, *sets, alphas=[0.1, 0.0])
        with pytest.raises(MechunlearnError, match="The forget set has 1 facts"):
            steering(refusing.model, None, sets[0].select([0]), sets[1])


def test_a_mark_that_hides_facts_is_taken_out_and_what_is_gone_stays_gone(world):
    forget, retain = load_facts("factworld/sport").prompts(world).split(forget=16, retain=48, seed=1)
    others = {"marked": marked(forget, alike=True), "each its own": marked(forget, alike=False)}
    rows = steering(world, None, forget, retain, extra_edits=others, alphas=[0.1])
    before = {name: float(answered(model, forget).float().mean()) for name, model in others.items()}
    found = recovery(rows)
    assert max(before.values()) < 0.3
    assert found.loc["marked", "recovery"] > 0.8 and found.loc["marked", "setting"].startswith("ablation")
    assert found.loc["each its own", "recovery"] < 0.4 < found.loc["unedited", "recovery"] == 1


def test_never_taught_facts_are_at_their_floor(world):
    forget, retain = load_facts("factworld/sport").prompts(world).split(forget=16, retain=32, seed=1)
    rows = steering(world, None, forget, retain, alphas=[0.1])
    floor = rows[rows.state == "never taught"]
    assert (floor["low"] <= floor["chance"]).all() and recovery(rows).loc["unedited", "held_out"] == 1


@pytest.mark.real
def test_on_a_real_model_directions_are_those_of_transformers(smollm2):
    prompts = load_facts("countries/capital")[:4].prompts(smollm2)
    found = _last(smollm2, prompts)
    for i in range(2):
        ids = prompts.tokens[i : i + 1, : int(prompts.start[i]) + 1]
        with torch.no_grad():
            states = smollm2.hf(ids, output_hidden_states=True).hidden_states
        for layer in (0, 15, 28):
            torch.testing.assert_close(found[layer][i], states[layer + 1][0, -1], atol=2e-2, rtol=1e-3)
    hooks = dict(_settings(smollm2, prompts.select([0, 1]), prompts.select([2, 3]), []))["ablation from L15"]
    d = found[20][:2].mean(0) - found[20][2:].mean(0)
    with smollm2.decoder.hooks(hooks):
        ablated = smollm2.cache(prompts.tokens, ["L20.resid_post"])[1]["L20.resid_post"]
    assert float((ablated @ d / d.norm()).abs().max()) < 1e-3 * float(ablated.norm(dim=-1).max())
