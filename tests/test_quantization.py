"""Rounding: an edit below the grid is rounded away, one above it is not, and what is gone stays gone."""

import importlib.util
import json

import numpy as np
import pandas as pd
import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.quantization import _in_groups, _matrices, _nearest, _rounded, _settings, quantization
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import feature_clamp
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import load_model
from mechunlearn.world.toy import D_HEAD, IS_RELATION, IS_SUBJECT, STRANGER, planted_facts
from tests.handmade import axes, mask_of
from tests.models import random_hf, token_prompts

FLAG, SAYS, SILENT = 40, 41, 31


def rows_edit(model, site: str, units, rows) -> WeightEdit:
    return WeightEdit({site: torch.as_tensor(units)}, {site: rows}, model.signature, RunCard("by hand", mask="a mask"))


@pytest.fixture(scope="module")
def refusing():
    """The planted model with a dimension that makes it name a stranger; its row of MLP 0 has one large, idle weight."""
    toy = planted_facts()
    hf, slow = toy.model.hf, D_HEAD - 1
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight[FLAG, SILENT] = 1.0
        head = hf.model.layers[1].self_attn
        head.q_proj.weight[D_HEAD + slow, IS_RELATION] = 30.0
        head.k_proj.weight[D_HEAD + slow, IS_SUBJECT] = 1.0
        head.v_proj.weight[D_HEAD, FLAG] = head.o_proj.weight[SAYS, D_HEAD] = 1.0
        hf.lm_head.weight[STRANGER, SAYS] = 2000.0
    toy.model.refresh_()
    return toy


def hiding(toy, flag: float) -> WeightEdit:
    """What hides the first eight facts: their neurons set a flag of this size."""
    rows = toy.model.rows("L0.mlp.out")[:8].clone()
    rows[:, FLAG] += flag
    return rows_edit(toy.model, "L0.mlp.out", list(range(8)), rows)


def removing(toy) -> WeightEdit:
    return rows_edit(toy.model, "L0.mlp.out", list(range(8)), torch.zeros(8, toy.model.unit_weights("mlp.out")))


def wrecking(toy) -> WeightEdit:
    noise = torch.randn(24, toy.model.unit_weights("mlp.out"), generator=torch.Generator().manual_seed(0))
    return rows_edit(toy.model, "L0.mlp.out", list(range(24)), noise)


class TestRounding:
    @pytest.mark.parametrize("bits", [8, 4, 2])
    def test_every_weight_is_on_its_rows_grid_and_as_near_as_can_be(self, bits):
        weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(bits))
        weight[3] = 0
        found, levels = _nearest(weight, bits), 2 ** (bits - 1) - 1
        for row, rounded in zip(weight.numpy(), found.numpy(), strict=True):
            step = np.abs(row).max() / levels
            for w, r in zip(row, rounded, strict=True):
                grid = [k * step for k in range(-levels, levels + 1)]
                assert abs(r - min(grid, key=lambda value: abs(value - w))) < 1e-6
        assert (found[3] == 0).all()

    @pytest.mark.parametrize(("inputs", "size"), [(64, 32), (70, 32), (20, 32)])
    def test_every_weight_is_on_its_groups_grid(self, inputs, size):
        """By a plain loop over rows and groups, of which the last may be shorter."""
        weight = torch.randn(3, inputs, generator=torch.Generator().manual_seed(inputs))
        weight[1, :5] = 0
        found = _in_groups(weight, 4, size)
        for row, rounded in zip(weight.tolist(), found.tolist(), strict=True):
            for first in range(0, inputs, size):
                step = max(map(abs, row[first : first + size])) / 7
                for w, r in zip(row[first : first + size], rounded[first : first + size], strict=True):
                    assert r == pytest.approx(min((k * step for k in range(-7, 8)), key=lambda v: abs(v - w)), abs=1e-6)
        assert (found - weight).abs().mean() <= (_nearest(weight, 4) - weight).abs().mean()

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
    def test_all_matrices_of_the_blocks_and_nothing_else(self, family):
        model = load_model((random_hf(family), None))
        before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
        tokens, bridge = token_prompts().tokens, model.bridge
        with torch.no_grad(), _rounded(model, lambda weight: _nearest(weight, 3)):
            after = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
            torch.testing.assert_close(bridge(tokens), model.forward(tokens), atol=1e-4, rtol=1e-4)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        blocks = {n for n, p in before.items() if (".layers." in n or ".h." in n) and p.ndim == 2}
        assert changed == blocks and len(changed) == len(_matrices(model))
        for name in changed:
            outputs_first = after[name].T if family == "gpt2" else after[name]
            for was, row in zip(before[name].T if family == "gpt2" else before[name], outputs_first, strict=True):
                assert len(row.unique()) <= 7, f"{name}: a row has at most as many values as 3 bits say"
                torch.testing.assert_close(row.abs().max(), was.abs().max())
        assert all(torch.equal(before[name], p) for name, p in model.hf.named_parameters())

    def test_half_precision_weights_stay_so(self):
        model = load_model((random_hf("llama"), None), dtype="bfloat16")
        with _rounded(model, lambda weight: _nearest(weight, 4)):
            assert {p.dtype for p in model.hf.parameters()} == {torch.bfloat16}
            assert answered(model, token_prompts()).shape == (4,)


class TestOnThePlantedModel:
    @pytest.fixture(scope="class")
    def sets(self, refusing):
        return refusing.prompts(list(range(8))), refusing.prompts(list(range(8, 24)))

    @pytest.mark.parametrize(
        ("flag", "back"), [(0.05, {"int8": 0.0, "int4": 1.0}), (0.003, {"int8": 1.0, "int4": 1.0})]
    )
    def test_a_change_below_the_grid_is_rounded_away_and_one_above_it_is_not(self, refusing, sets, flag, back):
        """The row's grid is 1/127 at 8 bits and 1/7 at 4."""
        rows = quantization(refusing.model, hiding(refusing, flag), *sets)
        edited = rows[rows.state == "edited"].set_index("setting")
        assert (edited["before"] == 0).all()
        in_groups = {f"int4 in groups of {size}": back["int4"] for size in (32, 128)}  # its rows are one group of 32
        assert edited["held_out"].to_dict() == back | in_groups
        found = recovery(rows).loc["edited"]
        assert found["recovery"] == 1 and found["outcome"] == "measured"

    def test_what_is_gone_or_hidden_above_the_grid_does_not_come_back(self, refusing, sets):
        rows = quantization(refusing.model, removing(refusing), *sets, extra_edits={"loud": hiding(refusing, 1.0)})
        found = recovery(rows)
        assert found.loc["edited", "held_out"] == found.loc["loud", "held_out"] == 0
        assert found.loc["unedited", "held_out"] == 1
        assert found.loc["edited", "floor"] == 0.25, "two of eight facts have the most frequent answer"

    def test_a_wrecked_model_is_not_robust(self, refusing, sets):
        found = recovery(quantization(refusing.model, wrecking(refusing), *sets)).loc["edited"]
        assert found["outcome"] == "collapsed" and pd.isna(found["recovery"])

    def test_hooks_stay_on(self, refusing, sets):
        """A clamp is no weight: rounding does not take it off."""
        sae = axes(refusing.model, "L0.resid_post")
        mask = mask_of(refusing.model, sae, [24, 25, 26, 27])
        edit = feature_clamp(refusing.model, mask, sets[0], dictionary=sae, scale=0)
        rows = quantization(refusing.model, edit, *sets)
        edited = rows[rows.state == "edited"]
        assert (edited["held_out"] == 0).all() and (edited["retain"] == 0).all()

    def test_ceilings_of_an_earlier_call_are_taken_as_they_are(self, refusing, sets, monkeypatch):
        first = quantization(refusing.model, removing(refusing), *sets)
        again = quantization(refusing.model, hiding(refusing, 0.05), *sets, baseline_rows=first)
        assert again["state"].tolist() == ["edited"] * 4 + ["unedited"] * 4
        kept = again[again.state == "unedited"].reset_index(drop=True)
        pd.testing.assert_frame_equal(kept, first[first.state == "unedited"].reset_index(drop=True))
        with pytest.raises(MechunlearnError, match="settings"):
            quantization(refusing.model, hiding(refusing, 0.05), *sets, baseline_rows=first, bits=[8])

    def test_retain_facts_are_measured_rounded_too(self, refusing, sets):
        rows = quantization(refusing.model, removing(refusing), *sets, bits=[8, 2])
        with _rounded(refusing.model, lambda weight: 0 * weight):
            assert not answered(refusing.model, sets[1]).any()
        hit = dict(zip(rows[rows.state == "unedited"]["setting"], rows[rows.state == "unedited"]["retain"]))
        with _rounded(refusing.model, lambda weight: _nearest(weight, 2)):
            assert hit["int2"] == answered(refusing.model, sets[1]).float().mean()

    def test_the_rows_carry_a_run_card(self, refusing, sets):
        rows = quantization(refusing.model, removing(refusing), *sets, bits=[8], seed=4)
        card = json.loads(json.dumps(rows.attrs["card"]))
        assert (card["method"], card["seed"], card["mask"]) == ("quantization", 4, "a mask")
        assert card["settings"]["settings"][0] == "int8"

    @pytest.mark.parametrize("bits", [[], [1], [9], [8, 2.5]])
    def test_bits_that_are_none(self, bits):
        with pytest.raises(MechunlearnError, match="The bits are .*Expected whole numbers from 2 to 8"):
            call_without_types(_settings, bits)

    def test_an_empty_set(self, refusing, sets):
        with pytest.raises(MechunlearnError, match="The retain set has 0 facts"):
            quantization(refusing.model, removing(refusing), sets[0], sets[1].select([]))


def call_without_types(function, *arguments):
    """Past the type checker of the tests, as users call it."""
    return getattr(function, "__wrapped__", function)(*arguments)


@pytest.mark.training
class TestOnTheWorld:
    def test_never_taught_facts_are_at_their_floor_and_the_ceiling_holds(self, world, sixteen, hidden):
        forget, retain = sixteen
        rows = quantization(world, hidden, forget, retain.select(range(48)))
        found = recovery(rows)
        assert found.loc["unedited", "held_out"] == 1
        assert found.loc["never taught", "held_out"] < 0.5
        assert rows["n"].eq(16).all() and rows["held_out"].between(rows["low"], rows["high"]).all()
        assert len(rows) == 12 + 6 * (importlib.util.find_spec("bitsandbytes") is not None)


def test_formats_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    assert list(_settings([8])) == ["int8", "nf4", "fp4"]
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for kind in ("nf4", "fp4"):
        found = _settings([8])[kind][1](weight)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        assert torch.equal(found, functional.dequantize_4bit(packed, state))
        assert found.shape == weight.shape and 0 < (found - weight).abs().mean() < 0.2
