"""Agreement of localizers, by hand; the control that chooses whole sites; and what the figures show of them."""

import math

import pandas as pd
import pytest
import torch

from mechunlearn import ComponentMask, Localization, MechunlearnError
from mechunlearn.artifacts.overlap import auroc, jaccard_at, layer_auroc, overlap, rank_correlation
from mechunlearn.core.runcard import RunCard
from mechunlearn.localize import random_units
from mechunlearn.model.layout import Signature
from mechunlearn.plots import faithfulness_curve, overlap_map, role_map

TINY = Signature("llama", layers=3, heads=2, kv_heads=2, d_mlp=4, d_model=8)
OTHER = Signature("gpt2", layers=3, heads=2, kv_heads=2, d_mlp=4, d_model=8)


def scored(signature: Signature = TINY, /, **sites: list[float]) -> Localization:
    """`L0_mlp_out=[...]`; a neuron weighs 1, a head 2, and there are 20 weights."""
    scores = {name.replace("_", ".", 2): torch.tensor(values) for name, values in sites.items()}
    return Localization(scores, signature, {"mlp.out": 1, "attn.o": 2}, 20, RunCard("by hand"))


ONE = scored(L0_mlp_out=[1.0, 2.0, 3.0, 4.0])


class TestRankCorrelation:
    def test_by_hand(self):
        other = scored(L0_mlp_out=[-2.0, 1.0, 4.0, 3.0])
        assert rank_correlation(ONE, other) == pytest.approx(1 - 6 * 4 / (4 * 15)), "ranks 1 2 3 4 and 2 1 4 3"
        assert rank_correlation(ONE, scored(L0_mlp_out=[-4.0, 3.0, -2.0, 1.0])) == pytest.approx(-1)

    def test_ties_get_their_mean_rank(self):
        tied = scored(L0_mlp_out=[1.0, -1.0, 2.0, 2.0])
        assert rank_correlation(ONE, tied) == pytest.approx(4 / math.sqrt(20)), "ranks 1.5 1.5 3.5 3.5"

    def test_only_units_that_both_score_count(self):
        more = scored(L0_attn_o=[5.0, 6.0], L0_mlp_out=[-2.0, 1.0, 4.0, 3.0])
        assert rank_correlation(more, ONE) == rank_correlation(ONE, more) == pytest.approx(0.6)

    @pytest.mark.filterwarnings("error")
    def test_it_is_not_a_number_where_there_is_no_order(self):
        flat = scored(L0_mlp_out=[1.0, -1.0, 1.0, 1.0])
        assert math.isnan(rank_correlation(ONE, flat)) and math.isnan(rank_correlation(flat, ONE))


class TestJaccard:
    def test_by_hand(self):
        other = scored(L0_mlp_out=[9.0, 0.0, -3.0, 4.0])
        assert jaccard_at(ONE, other, weights=0.1) == pytest.approx(1 / 3), "3, 4 and 1, 4 of four"
        assert jaccard_at(ONE, other, weights=0.15) == pytest.approx(2 / 4)
        assert jaccard_at(ONE, other, weights=1) == jaccard_at(ONE, other, weights=0) == 1

    def test_five_percent_is_the_default(self):
        assert jaccard_at(ONE, scored(L0_mlp_out=[0.0, 0.0, 0.0, 1.0])) == 1, "one neuron each, the same"
        assert jaccard_at(ONE, scored(L0_mlp_out=[1.0, 0.0, 0.0, 0.0])) == 0

    def test_units_that_only_one_scores_count_as_chosen_by_one(self):
        heads = scored(L0_attn_o=[9.0, 0.0], L0_mlp_out=[0.0, 0.0, 1.0, 2.0])
        assert jaccard_at(ONE, heads, weights=0.15) == pytest.approx(1 / 4), "neurons 2 3 4; head 0 and neuron 3"

    def test_ties_go_in_component_order(self):
        flat = scored(L0_mlp_out=[0.0] * 4, L1_mlp_out=[0.0] * 4)
        assert jaccard_at(flat, scored(L0_mlp_out=[2.0, 1.0, 0.0, 0.0]), weights=0.1) == 1

    def test_the_table_is_square_symmetric_and_one_on_the_diagonal(self):
        found = {"a": ONE, "b": scored(L0_mlp_out=[9.0, 0.0, -3.0, 4.0]), "c": scored(L0_mlp_out=[9.0, 8.0, 0.0, 0.0])}
        table = overlap(found, weights=0.1)
        assert list(table.index) == list(table.columns) == ["a", "b", "c"]
        third = pytest.approx(1 / 3)
        assert table.to_numpy().tolist() == [[1, third, 0], [third, 1, third], [0, third, 1]]


class TestArea:
    FOUND = scored(L0_mlp_out=[0.1, -0.9, 0.5, 0.5])

    def test_by_hand_with_ties_counting_half(self):
        truth = {"L0.mlp.out": torch.tensor([False, True, True, False])}
        assert auroc(self.FOUND, truth) == pytest.approx(3.5 / 4)
        assert auroc(self.FOUND, ComponentMask(truth, TINY)) == pytest.approx(3.5 / 4)
        assert auroc(self.FOUND, ComponentMask.of(["L0.mlp.out[0]"], TINY)) == 0

    def test_only_units_that_both_cover_count(self):
        more = scored(L0_mlp_out=[0.1, -0.9, 0.5, 0.5], L1_mlp_out=[9.0, 9.0, 9.0, 9.0])
        mask = ComponentMask.of(["L0.mlp.out[1]", "L0.mlp.out[2]", "L2.attn.o[0]"], TINY)
        assert auroc(more, mask) == pytest.approx(3.5 / 4)
        named = ComponentMask({**mask.sites, "L1.mlp.out": torch.zeros(4, dtype=torch.bool)}, TINY)
        assert auroc(more, named) == pytest.approx((3.5 + 0) / 12), "eight wrong pairs more"

    def test_by_layer(self):
        found = scored(
            L0_mlp_out=[0.1, 0.1, 0.1, 0.1],
            L1_mlp_out=[2.0, -2.0, 0.0, 0.0],
            L2_mlp_out=[1.0, 1.0, 1.0, 1.0],
            L0_attn_o=[7.0, 7.0],
        )
        truth = {f"L{layer}.mlp.out": torch.zeros(4, dtype=torch.bool) for layer in range(3)}
        truth["L1.mlp.out"][3] = True
        assert layer_auroc(found, truth) == pytest.approx(0.75), "means of |score| 0.1, 1 and 1"
        truth["L0.mlp.out"][0] = True
        assert layer_auroc(found, truth) == pytest.approx(0.25), "two true layers: 0 and a half"

    def test_by_layer_of_another_kind(self):
        found = scored(L0_attn_o=[1.0, -1.0], L1_attn_o=[0.5, 0.0], L0_mlp_out=[0.0] * 4, L1_mlp_out=[1.0] * 4)
        truth = {
            f"L{k}.{kind}": torch.full((n,), k == 0) for k in (0, 1) for kind, n in (("attn.o", 2), ("mlp.out", 4))
        }
        assert layer_auroc(found, truth, kind="attn.o") == 1
        assert layer_auroc(found, truth) == 0

    @pytest.mark.parametrize("value", [True, False])
    def test_a_truth_of_one_class_is_refused(self, value):
        truth = {f"L{layer}.mlp.out": torch.full((4,), value) for layer in range(2)}
        found = scored(L0_mlp_out=[0.1, 0.2, 0.3, 0.4], L1_mlp_out=[0.1, 0.2, 0.3, 0.4])
        with pytest.raises(MechunlearnError, match=rf"selects {8 * value} of the 8 units that both cover"):
            auroc(found, truth)
        with pytest.raises(MechunlearnError, match=rf"selects {2 * value} of the 2 layers of 'mlp\.out'"):
            layer_auroc(found, truth)

    def test_a_truth_that_shares_no_site_is_refused(self):
        with pytest.raises(MechunlearnError, match=r"no site: the first covers L0\.mlp\.out; the second L1\.mlp\.out"):
            auroc(ONE, ComponentMask.of(["L1.mlp.out[0]"], TINY))
        with pytest.raises(MechunlearnError, match=r"no site of kind attn\.o"):
            layer_auroc(ONE, ComponentMask.of(["L0.mlp.out[0]"], TINY), kind="attn.o")

    def test_a_truth_that_does_not_fit_the_model_is_refused(self):
        with pytest.raises(MechunlearnError, match=r"Site 'L0\.mlp\.out' with 5 units does not fit llama"):
            auroc(ONE, {"L0.mlp.out": torch.tensor([True, False, False, False, False])})


def test_different_architectures_are_refused_with_both_names():
    other = scored(OTHER, L0_mlp_out=[1.0, 2.0, 3.0, 4.0])
    both = r"first is for \(llama: .*second for \(gpt2: "
    mask = ComponentMask.of(["L0.mlp.out[0]"], OTHER)
    for refused in (
        lambda: rank_correlation(ONE, other),
        lambda: jaccard_at(ONE, other),
        lambda: overlap({"one": ONE, "other": other}, weights=0.1),
        lambda: auroc(ONE, mask),
        lambda: layer_auroc(ONE, mask),
    ):
        with pytest.raises(MechunlearnError, match=both):
            refused()


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(MechunlearnError, match=r"no site: the first covers L0\.mlp\.out; the second L1\.mlp\.out"):
        rank_correlation(ONE, scored(L1_mlp_out=[1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(MechunlearnError, match="budget of 2 is out of range"):
        jaccard_at(ONE, ONE, weights=2)
    features = [Localization({"L0.sae:a": torch.rand(n)}, TINY, {}, 20, RunCard("by hand")) for n in (5, 6)]
    with pytest.raises(MechunlearnError, match=r"'L0\.sae:a' has 5 units in the first and 6 in the second"):
        rank_correlation(*features)


class TestWholeSites:
    def test_all_units_of_a_site_share_one_score(self, toy):
        found = random_units(toy.model, whole=True, seed=3)
        assert {site: len(s) for site, s in found.scores.items()} == {
            site: len(s) for site, s in random_units(toy.model).scores.items()
        }
        values = [scores.unique().tolist() for scores in found.scores.values()]
        assert all(len(v) == 1 for v in values) and len({v[0] for v in values}) == len(values)
        assert found.card.settings["whole"] is True

    def test_the_top_is_random_mlps(self, world):
        size = world.signature.d_mlp
        chosen = {
            tuple(site for site, units in mask.sites.items() if units.all())
            for seed in range(8)
            for mask in [random_units(world, kinds=("mlp.out",), whole=True, seed=seed).top(units=2 * size)]
        }
        assert all(len(sites) == 2 for sites in chosen), "two whole MLPs"
        assert len(chosen) > 4, "another seed, other MLPs"

    def test_a_budget_in_between_cuts_the_last_site_in_component_order(self, toy):
        mask = random_units(toy.model, kinds=("mlp.out",), whole=True, seed=1).top(units=40)
        whole, cut = sorted(mask.sites.values(), key=int_sum, reverse=True)
        assert whole.all() and cut.nonzero().flatten().tolist() == list(range(8))

    def test_without_it_scores_are_drawn_by_unit_as_before(self, toy):
        found = random_units(toy.model, kinds=("attn.o", "mlp.out"), seed=4)
        generator = torch.Generator().manual_seed(4)
        for site in ("L0.attn.o", "L0.mlp.out", "L1.attn.o", "L1.mlp.out"):
            assert torch.equal(found.scores[site], torch.rand(len(found.scores[site]), generator=generator))


def int_sum(mask: torch.Tensor) -> int:
    return int(mask.sum())


class TestFigures:
    def test_the_overlap_map_shows_the_table_with_its_values(self):
        table = pd.DataFrame([[1.0, 0.25], [0.25, 1.0]], index=["one", "two"], columns=["one", "two"])
        figure = overlap_map(table)
        (cells,) = figure.data
        assert [list(row) for row in cells.z] == table.to_numpy().tolist()
        assert cells.x == cells.y == ("one", "two")
        assert (cells.zmin, cells.zmax, cells.texttemplate) == (0, 1, "%{z:.2f}")
        assert figure.layout.yaxis.autorange == "reversed", "the diagonal falls from the top left"

    def test_the_role_map_shows_layers_by_roles_centred_at_zero(self):
        by_role = {
            "L10.resid_post": torch.tensor([[0.5], [-1.0], [0.0]]),
            "L2.resid_post": torch.tensor([[0.25], [-4.0], [0.0]]),
        }
        (cells,) = role_map(by_role, ("subject last", "last", "prefix"), "Effects").data
        assert cells.x == (2, 10), "layers in order"
        assert cells.y == ("subject last", "last", "prefix")
        assert [list(row) for row in cells.z] == [[0.25, 0.5], [-4, -1], [0, 0]]
        assert (cells.zmin, cells.zmax) == (-4, 4)

    def test_the_role_map_sums_units(self):
        heads = {"L0.attn.o": torch.tensor([[1.0, 2.0, -0.5], [0.0, 0.0, -4.0]])}
        assert [list(row) for row in role_map(heads, ["all", "last"], "Heads").data[0].z] == [[2.5], [-4]]
        nothing = role_map({"L0.attn.o": torch.zeros(1, 2)}, ["all"], "Heads").data[0]
        assert nothing.zmin < nothing.zmax, "no scale of width zero"

    def test_the_role_map_refuses_several_kinds_and_wrong_roles(self):
        two = {"L0.attn.o": torch.zeros(1, 2), "L0.mlp.out": torch.zeros(1, 4)}
        with pytest.raises(MechunlearnError, match=r"kinds attn\.o, mlp\.out"):
            role_map(two, ["all"], "Effects")
        with pytest.raises(MechunlearnError, match=r"2 rows, one a role.*L0\.attn\.o with 1 rows"):
            role_map({"L0.attn.o": torch.zeros(1, 2)}, ["all", "last"], "Effects")
        with pytest.raises(MechunlearnError, match="kinds none"):
            role_map({}, ["all"], "Effects")

    def test_the_faithfulness_curve_has_its_band_and_a_log_axis(self):
        frame = pd.DataFrame(
            {
                "fraction": [1.0, 0.0, 0.01, 0.1],
                "faithfulness": [1.0, 0.0, 0.4, 0.8],
                "low": [1.0, 0.0, 0.3, 0.7],
                "high": [1.0, 0.0, 0.5, 0.9],
            }
        )
        figure = faithfulness_curve(frame)
        low, high, mean = figure.data
        assert mean.x.tolist() == low.x.tolist() == high.x.tolist() == [0.01, 0.1, 1], "in order, without 0"
        assert mean.y.tolist() == [0.4, 0.8, 1]
        assert (low.y.tolist(), high.y.tolist(), high.fill) == ([0.3, 0.7, 1], [0.5, 0.9, 1], "tonexty")
        assert figure.layout.xaxis.type == "log"
        (line,) = figure.layout.shapes
        assert line.y0 == line.y1 == 1
