"""A vector behind the edit: it sees what the edit leaves, stays where it may be, and brings back what is hidden alone."""

import json

import pandas as pd
import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack.activation_perturbation import (
    REMOVED,
    _encoders,
    _Here,
    _leaving,
    _sites,
    _spanned,
    _Vectors,
    activation_perturbation,
)
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.states import EDITED, State
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import codebook_delete, feature_clamp
from mechunlearn.facts.load import load_facts
from mechunlearn.features.dictionaries import load_dictionary
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import load_model
from mechunlearn.world.toy import D_HEAD, IS_BOS, IS_RELATION, IS_SUBJECT, LOOKED_UP, STRANGER, planted_facts
from tests.handmade import axes, entering, hand_made, mask_of, planted, random_codebook, random_sae, rows_of_tokens
from tests.models import random_hf, token_prompts

FLAG, SAYS, SITE = 40, 41, "L0.resid_post"
SMALL = {"lrs": [0.1], "steps": 3, "eval_every": 2}


@pytest.fixture(scope="module")
def refusing():
    """The planted model: the neurons of the first eight facts set a flag, and where it is below zero a stranger is named."""
    toy = planted_facts()
    hf, slow = toy.model.hf, D_HEAD - 1
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight[FLAG, :8] = 0.05
        head = hf.model.layers[1].self_attn
        head.q_proj.weight[D_HEAD + slow, IS_RELATION] = 30.0
        head.k_proj.weight[D_HEAD + slow, IS_SUBJECT] = 1.0
        head.v_proj.weight[D_HEAD, FLAG] = -1.0
        head.o_proj.weight[SAYS, D_HEAD] = 0.1
        hf.lm_head.weight[STRANGER, SAYS] = 100.0
    return toy


def sets(toy, forget):
    return toy.prompts(list(forget)), toy.prompts([i for i in range(24) if i not in forget])


def clamping(toy, units, forget, strength) -> FeatureEdit:
    sae = axes(toy.model, SITE)
    return feature_clamp(toy.model, mask_of(toy.model, sae, units), forget, dictionary=sae, scale=strength)


class TestTheVector:
    def test_it_is_added_to_what_the_intervention_returns(self, refusing):
        forget, _ = sets(refusing, range(8))
        model, edit = refusing.model, clamping(refusing, [FLAG], forget, 1)
        h = entering(model, forget.tokens, SITE)
        vectors = _Vectors(model, _sites(model, edit), [3.0], [None], 0.5)
        with torch.no_grad():
            vectors.leaves[0].copy_(torch.randn(48, generator=torch.Generator().manual_seed(0)))
            vectors.leaves[0][FLAG] = 1.5
            v = vectors.vector(0)
            with edit.applied(model), vectors.attached():
                found = entering(model, forget.tokens, "L1.resid_pre")
        wanted = h.clone()
        wanted[:, 1, FLAG] *= -1
        assert (h[:, 1, FLAG] > 0.5).all() and abs(float(v[FLAG])) > 0.1, "the two orders differ"
        torch.testing.assert_close(found, wanted + v, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("shape", [{"linear": 0}, {"linear": 2}, {"linear": 2, "groups": 2}], ids=str)
    def test_what_deleted_codes_read_is_a_product_with_the_map(self, shape):
        model = load_model((random_hf("llama"), None))
        codebook = random_codebook(model, "L1.resid_post", **shape)
        units = [0, 5, 23]
        edit = codebook_delete(model, mask_of(model, codebook, units), dictionary=codebook)
        found = _encoders(edit.parts[0])
        h, groups = torch.randn(32, generator=torch.Generator().manual_seed(1)), codebook.groups
        with torch.no_grad():
            inner = h if codebook.encoder is None else codebook.encoder.weight @ h
            for unit, direction in zip(units, found, strict=True):
                part = inner.chunk(groups)[unit // (codebook.size // groups)]
                torch.testing.assert_close(direction @ h, codebook.codes[unit] @ part, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
    def test_pre_activations_of_edited_features_do_not_move(self, kind):
        model = load_model((random_hf("llama"), None))
        sae, units = random_sae(model, "L1.resid_post", kind), [1, 2, 7]
        edit = feature_clamp(model, mask_of(model, sae, units), rows_of_tokens(), dictionary=sae)
        basis = _spanned(_encoders(edit.parts[0]))
        assert basis.shape == (32, 3)
        vectors = _Vectors(model, _sites(model, edit), [2.0], [basis], 0.5)
        with torch.no_grad():
            vectors.leaves[0].copy_(torch.randn(32, generator=torch.Generator().manual_seed(2)))
        vectors.write()
        moved = vectors.vector(0).detach() @ sae.sae.W_enc.detach()
        assert moved[units].abs().max() < 1e-5 < 0.05 < moved.abs().max()

    def test_it_stays_in_the_ball(self):
        toy = planted_facts()
        vectors = _Vectors(toy.model, [(SITE, None)], [3.0], [None], 0.25)
        for length in (100.0, 0.01):
            with torch.no_grad():
                vectors.leaves[0].copy_(torch.ones(48) * length)
            vectors.write()
            assert float(vectors.vector(0).detach().norm()) == pytest.approx(min(0.25, length) * 3.0, rel=1e-5)
            assert vectors.norms()[0] == pytest.approx(min(0.25, length), rel=1e-5)

    def test_its_scale_is_the_median_norm_behind_the_edit(self, refusing):
        forget, retain = sets(refusing, range(8))
        edit = clamping(refusing, [IS_RELATION, IS_BOS], forget, 20)
        state = State(EDITED, refusing.model, edit, forget)
        with edit.applied(refusing.model):
            here = _Here(state, _sites(refusing.model, edit), [1.0], retain, retain, 0.5, 0)
            norms = entering(refusing.model, forget.tokens, "L1.resid_pre").norm(dim=-1).flatten()
        assert here.scales[0] == pytest.approx(float(norms.sort().values[(len(norms) - 1) // 2]))
        assert here.scales[0] != pytest.approx(
            float(entering(refusing.model, forget.tokens, SITE).norm(dim=-1).median())
        )

    def test_drift_is_how_far_activity_moves(self, refusing):
        """By hand: the flag's feature is its dimension's positive part."""
        forget, retain = sets(refusing, range(8))
        model, edit = refusing.model, clamping(refusing, [FLAG], forget, 0)
        sites = _sites(model, edit)
        usual = float(entering(model, forget.tokens, SITE)[..., FLAG].relu().mean())
        with edit.applied(model):
            here = _Here(State(EDITED, model, edit, forget), sites, [usual], retain, retain, 0.5, 0)
            free = _Vectors(model, sites, here.scales, [None], 0.5)
            with torch.no_grad():
                free.leaves[0][FLAG] = 0.7
            assert here.drift(free) == pytest.approx(float(free.vector(0)[FLAG]) / usual, rel=1e-4)
            bound = _Vectors(model, sites, here.scales, here.bases, 0.5)
            with torch.no_grad():
                bound.leaves[0].fill_(0.7)
            bound.write()
            assert here.drift(bound) < 1e-6 < 0.1 < bound.norms()[0]

    def test_padding_is_not_looked_at(self, world):
        prompts = load_facts("factworld/sport").prompts(world).select(range(6))
        (found,) = _leaving(world, prompts, ["L2.resid_post"])
        assert len(found) == int(prompts.lengths.sum()) < prompts.tokens.numel()


@pytest.mark.training
class TestOnThePlantedModel:
    def test_vectors_are_measured_behind_each_part_and_each_extra_edit(self):
        model, prompts = load_model((random_hf("llama"), None)), token_prompts(facts=8)
        codebook, sae = random_codebook(model, "L0.resid_post"), random_sae(model, "L1.resid_post")
        clamp = feature_clamp(model, mask_of(model, sae, [1, 2]), rows_of_tokens(), dictionary=sae)
        edit = codebook_delete(model, mask_of(model, codebook, [0, 5]), dictionary=codebook) | clamp
        sets = prompts.select(range(4)), prompts.select(range(4, 8))
        extra = {"rows": hand_made(model)}
        rows = activation_perturbation(model, edit, *sets, extra_edits=extra, min_retention=0, **SMALL)
        assert rows["state"].tolist() == [*["edited"] * 3, REMOVED, *["unedited"] * 3, *["rows"] * 3]
        assert (rows[rows.step == 3]["norm"] > 0).all() and rows[rows.state == "edited"]["drift"].notna().all()

    def test_what_a_clamp_hides_comes_back_with_the_hook_on(self, refusing):
        forget, retain = sets(refusing, range(8))
        edit = clamping(refusing, [FLAG], forget, 1)
        with edit.applied(refusing.model):
            assert not answered(refusing.model, forget).any() and answered(refusing.model, retain).all()
        rows = activation_perturbation(refusing.model, edit, forget, retain, lrs=[0.03, 0.3], steps=20, eval_every=10)
        found = recovery(rows)
        assert found.loc["edited", "held_out"] == 1 and found.loc["edited", "recovery"] == 1
        edited = rows[rows.state == "edited"]
        assert (edited[edited.step == 0]["held_out"] == 0).all()
        assert (edited["norm"] <= 0.5 + 1e-6).all() and (edited["drift"] < 1e-5).all()

    def test_what_a_clamp_removes_does_not(self, refusing):
        """Two answers gone from where they are written: one vector for all can name one of them at most."""
        forget, retain = sets(refusing, [i for i in range(24) if i % 4 < 2])
        edit = clamping(refusing, [LOOKED_UP, LOOKED_UP + 1], forget, 0)
        rows = activation_perturbation(refusing.model, edit, forget, retain, lrs=[0.03, 0.3], steps=20, eval_every=10)
        found = recovery(rows)
        assert found.loc["edited", "held_out"] <= found.loc["edited", "chance"] < 0.8
        assert not found.loc["edited", "recovery"] > 0
        assert found.loc[REMOVED, "held_out"] == 1, "and whoever takes the hook off has it all"
        removed = rows[rows.state == REMOVED]
        assert removed["setting"].tolist() == ["none"] and removed["retain"].tolist() == [1]

    def test_weights_that_hide_and_weights_that_are_gone(self, refusing, seed):
        model, (forget, retain) = refusing.model, sets(refusing, range(8))
        rows = model.rows("L0.mlp.out")[:8].clone()
        rows[:, FLAG] *= -1
        about = {"signature": model.signature, "card": RunCard("hand")}
        hidden = WeightEdit({"L0.mlp.out": torch.arange(8)}, {"L0.mlp.out": rows}, **about)
        gone = WeightEdit({"L0.mlp.out": torch.arange(8)}, {"L0.mlp.out": torch.zeros_like(rows)}, **about)
        everything = torch.zeros(24, rows.shape[1])
        wrecked = WeightEdit({"L0.mlp.out": torch.arange(24)}, {"L0.mlp.out": everything}, **about)
        beside = {"gone": gone, "wrecked": wrecked}
        settings = {"lrs": [0.3], "steps": 20, "eval_every": 10, "seed": seed}
        made = activation_perturbation(model, hidden, forget, retain, extra_edits=beside, **settings)
        found = recovery(made)
        assert found.loc["edited", "recovery"] == found.loc["unedited", "recovery"] == 1
        assert not found.loc["gone", "recovery"] > 0
        assert found.loc["wrecked", "outcome"] == "collapsed"
        assert made["drift"].isna().all() and REMOVED not in set(made["state"])
        assert made.attrs["card"]["settings"]["sites"] == [SITE]

    def test_codes(self, refusing, seed):
        toy = planted_facts()
        codebook, mask = planted(codebook_delete, toy, 0)
        edit = codebook_delete(toy.model, mask, dictionary=codebook)
        forget, retain = sets(toy, [i for i in range(24) if i % 4 == 0])
        rows = activation_perturbation(toy.model, edit, forget, retain, seed=seed, **SMALL)
        edited = rows[rows.state == "edited"]
        assert (edited["drift"] < 0.05).all() and edited["norm"].max() > 0.05
        assert rows[rows.state == REMOVED]["held_out"].item() == 1

    def test_the_same_seed_gives_the_same_rows_and_known_ones_are_kept(self, refusing):
        forget, retain = sets(refusing, range(8))
        given = refusing.model, clamping(refusing, [FLAG], forget, 1), forget, retain
        one, again = (activation_perturbation(*given, **SMALL) for _ in range(2))
        pd.testing.assert_frame_equal(one, again)
        kept = activation_perturbation(*given, baseline_rows=one, **SMALL)
        assert kept["state"].tolist() == ["edited"] * 3 + [REMOVED] + ["unedited"] * 3
        with pytest.raises(MechunlearnError, match="settings"):
            activation_perturbation(*given, baseline_rows=one, size=0.4, **SMALL)

    def test_a_loss_that_is_not_finite_is_a_collapse_and_no_error(self, refusing):
        forget, retain = sets(refusing, range(8))
        edit = clamping(refusing, [FLAG], forget, 1)

        def breaks(resid):
            """Not a number once a vector has been added."""
            return None if float(resid[:, 0, SAYS].abs().max()) < 1e-9 else resid * torch.nan

        with refusing.model.hooks({"L1.resid_pre": breaks}):
            rows = activation_perturbation(refusing.model, edit, forget, retain, **{**SMALL, "steps": 6})
        ended = rows[rows.state == "edited"]
        assert ended["step"].tolist() == [0, 1] and ended["retain"].tolist() == [1, 0]

    def test_the_rows_carry_a_run_card(self, refusing):
        forget, retain = sets(refusing, range(8))
        edit = clamping(refusing, [FLAG], forget, 1)
        card = json.loads(
            json.dumps(activation_perturbation(refusing.model, edit, forget, retain, **SMALL).attrs["card"])
        )
        assert (card["method"], card["mask"]) == ("activation_perturbation", edit.card.mask)
        assert card["settings"]["size"] == 0.5 and card["settings"]["sites"] == [SITE]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"lrs": []}, r"lrs is \[\]"),
            ({"lrs": [0.1, -1]}, "Expected learning rates above 0"),
            ({"size": 0}, "A vector of size 0 is out of range"),
            ({"steps": 0}, "steps=0. Expected a whole number, 1 or more"),
            ({"extra_edits": {REMOVED: None}}, "cannot be named 'edited, hook removed'"),
            ({"extra_edits": {"unedited": None}}, "cannot be named 'unedited'"),
        ],
    )
    def test_mistakes_are_named(self, refusing, changed, message):
        forget, retain = sets(refusing, range(8))
        edit = clamping(refusing, [FLAG], forget, 1)
        with pytest.raises(MechunlearnError, match=message):
            activation_perturbation(refusing.model, edit, forget, retain, **changed)

    @pytest.mark.parametrize("site", ["L1.attn.o", "L1.mlp_out", "L1.resid_pre"])
    def test_dictionaries_elsewhere_and_features_that_read_everything_are_refused(self, site):
        model, prompts = load_model((random_hf("llama"), None)), token_prompts(facts=8)
        given = prompts.select(range(4)), prompts.select(range(4, 8))
        sae = random_sae(model, site)
        edit = feature_clamp(model, mask_of(model, sae, [0, 1]), rows_of_tokens(), dictionary=sae)
        with pytest.raises(MechunlearnError, match=f"is at '{site}'.*Expected a dictionary at a block's resid_post"):
            activation_perturbation(model, edit, *given, min_retention=0)
        sae = axes(model, "L1.resid_post")
        edit = feature_clamp(model, mask_of(model, sae, range(32)), rows_of_tokens(), dictionary=sae)
        with pytest.raises(MechunlearnError, match="The 32 edited units at 'L1.resid_post' read all 32 directions"):
            activation_perturbation(model, edit, *given, min_retention=0)


@pytest.mark.training
class TestOnTheWorld:
    def test_never_taught_facts_are_at_their_floor(self, world, sixteen, gone):
        forget, retain = sixteen
        small = {"lrs": [0.1], "steps": 10, "eval_every": 10, "batch_size": 8}
        rows = activation_perturbation(world, gone, forget, retain.select(range(48)), **small)
        found = recovery(rows)
        never = found.loc["never taught"]
        assert found.loc["unedited", "held_out"] == 1 and never["low"] <= never["chance"]
        assert rows.attrs["card"]["settings"]["sites"] == ["L2.resid_post"]

    def test_the_shipped_dictionary(self, world):
        sae = load_dictionary("factworld-sae")
        forget, retain = load_facts("factworld/sport").prompts(world).split(forget=8, retain=16, seed=1)
        z = sae.encode(entering(world, forget.tokens, sae.hook_name)).mean((0, 1))
        edit = feature_clamp(world, mask_of(world, sae, z.topk(4).indices), forget, dictionary=sae)
        rows = activation_perturbation(world, edit, forget, retain, lrs=[0.1], steps=2, batch_size=8)
        assert (rows[rows.state == "edited"]["drift"] < 0.2).all(), "top-k features compete, so a little moves"
        assert rows[rows.state == REMOVED]["held_out"].item() == 1
