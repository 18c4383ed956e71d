"""Addresses, masks, budgets: what they mean and what they refuse."""

import json
from itertools import pairwise

import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors import SafetensorError

from mechunlearn import Component, ComponentMask, Localization, MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core import tensors
from mechunlearn.core.runcard import RunCard
from mechunlearn.localize import random_units
from mechunlearn.metrics.answers import logit_diff
from mechunlearn.model.layout import KINDS, Layout, Signature

TINY = Signature("llama", layers=2, heads=4, kv_heads=2, d_mlp=6, d_model=8)
UNIT_WEIGHTS = {"attn.q": 16, "attn.k": 16, "attn.v": 16, "attn.o": 16, "mlp.in": 8, "mlp.gate": 8, "mlp.out": 8}
TOTAL = 2 * (4 * 16 * 2 + 2 * 16 * 2 + 6 * 8 * 3)


def localization(scores: dict) -> Localization:
    return Localization({s: torch.tensor(v) for s, v in scores.items()}, TINY, UNIT_WEIGHTS, TOTAL, RunCard("by hand"))


def test_shape_checks_are_on(prompts):
    """The canary: a wrong shape must be refused, or no other test checks shapes."""
    with pytest.raises(TypeCheckError):
        logit_diff(torch.zeros(3), prompts)


@pytest.mark.parametrize("address", ["L9.attn.o[7]", "L0.mlp.out", "L12.sae:blocks.3/x-1[17]", "L1.codebook:a[0]"])
def test_addresses_survive_parse_and_str(address):
    assert str(Component.parse(address)) == address


@pytest.mark.parametrize(
    "address",
    [
        *("layer9.attn", "L9", "L9.attn.z", "L9.attn.o[", "L9.attn.o[x]", "L-1.mlp.out", "", "L1.mlp.out[1] "),
        *("L01.mlp.out", "L1.mlp.out[01]", "L١.mlp.out", "L1.mlp.out[²]"),  # another spelling of an address is none
    ],
)
def test_malformed_addresses_are_refused(address):
    with pytest.raises(MechunlearnError, match=r"malformed. Expected 'L<layer>.<kind>'.*for example 'L9.attn.o\[7\]'"):
        Component.parse(address)


def test_set_algebra_agrees_with_sets():
    a = ComponentMask.of(["L0.mlp.out[0]", "L0.mlp.out[1]", "L1.attn.o[3]"], TINY)
    b = ComponentMask.of(["L0.mlp.out[1]", "L1.mlp.out"], TINY)
    for mask, expected in ((a & b, set(a) & set(b)), (a | b, set(a) | set(b)), (a - b, set(a) - set(b))):
        assert set(mask) == expected and len(mask) == len(expected)
    assert a.jaccard(b) == len(set(a) & set(b)) / len(set(a) | set(b))
    assert set(~a) & set(a) == set() and len(~a) + len(a) == 6 + 4
    assert Component.parse("L1.mlp.out") in b and Component.parse("L0.mlp.out") not in b
    assert ~~a == a and hash(~~a) == hash(a) and a != b


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_masks_survive_save_and_load(tmp_path, suffix):
    mask = ComponentMask.of(["L0.mlp.out[0]", "L1.attn.k"], TINY)
    mask.save(tmp_path / f"mask{suffix}")
    again = ComponentMask.load(tmp_path / f"mask{suffix}")
    assert again == mask and again.signature == mask.signature and list(again.sites) == list(mask.sites)


def test_a_mask_of_another_architecture_names_both():
    other = Signature("gpt2", 2, 4, 4, 6, 8)
    with pytest.raises(MechunlearnError, match=r"llama: 2 layers.*gpt2: 2 layers"):
        ComponentMask.of(["L0.mlp.out"], TINY) | ComponentMask.of(["L0.mlp.out"], other)


@pytest.mark.parametrize("address", ["L2.mlp.out", "L0.mlp.out[6]", "L0.attn.k[2]"])
def test_units_that_the_architecture_lacks_are_refused(address):
    with pytest.raises(MechunlearnError, match="does not fit|out of range"):
        ComponentMask.of([address], TINY)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"units": {}}',
        '{"kind": "mask", "signature": {"family": "llama"}, "units": {}}',
        "\x00\x01",
        json.dumps({"signature": TINY.__dict__, "units": {"L0.mlp.out": {"of": 6, "selected": [9]}}}),
    ],
)
def test_files_that_are_no_mask_are_refused(tmp_path, content):
    path = tmp_path / "mask.json"
    path.write_text(content)
    with pytest.raises(MechunlearnError, match="not a whole mask file|foreign file, not a mask") as refused:
        ComponentMask.load(path)
    assert "\n" not in str(refused.value)


def test_truncated_and_foreign_tensor_files_are_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    ComponentMask.of(["L0.mlp.out[0]"], TINY).save(path)
    whole = path.read_bytes()
    with pytest.raises(MechunlearnError, match="holds a mask, not a weight edit"):
        WeightEdit.load(path)
    path.write_bytes(whole[:-3])
    with pytest.raises(MechunlearnError, match="not a whole mask file"):
        ComponentMask.load(path)
    with pytest.raises(MechunlearnError, match="Could not read the mask"):
        ComponentMask.load(tmp_path / "missing.json")


def test_a_budget_stops_before_the_first_unit_that_exceeds_it():
    found = localization({"L0.mlp.out": [0.5, -0.9, 0.1, 0.0, 0.0, 0.0], "L0.attn.o": [0.8, 0.0, 0.0, 0.0]})
    assert [str(c) for c in found.ranked()[:3]] == ["L0.mlp.out[1]", "L0.attn.o[0]", "L0.mlp.out[0]"]
    assert set(found.top(units=2)) == set(found.ranked()[:2])
    exactly = (8 + 16) / TOTAL
    assert len(found.top(weights=exactly)) == 2
    assert len(found.top(weights=exactly - 1e-4)) == 1, "the head would exceed the budget: stop, do not skip"
    assert found.share(found.top(weights=exactly)) == pytest.approx(exactly)
    assert found.top(exactly) == found.top(weights=exactly), "a float below 1 is a share"
    assert found.top(2) == found.top(units=2) and not len(found.top(0.0))
    for budget in ({"units": 2.0}, {"units": 0.5, "weights": 0.5}, {"units": float("nan")}):
        with pytest.raises(MechunlearnError, match="is no number of units. Give one budget"):
            found.top(**budget)


def test_masks_of_growing_budgets_nest():
    generator = torch.Generator().manual_seed(0)
    found = localization(
        {
            f"L{n}.{k}": torch.randn(u, generator=generator).tolist()
            for n in (0, 1)
            for k, u in (("mlp.out", 6), ("attn.o", 4))
        }
    )
    for tied in (False, True):
        masks = [set(found.top(weights=share / 20, tied=tied)) for share in range(21)]
        assert all(small <= large for small, large in pairwise(masks))
        assert all(found.share(found.top(weights=s / 20, tied=tied)) <= s / 20 + 1e-9 for s in range(21))


def test_ties_are_taken_in_component_order():
    found = localization({"L1.mlp.out": [1.0] * 6, "L0.mlp.out": [1.0] * 6})
    assert [str(c) for c in found.ranked()[:7]] == [f"L0.mlp.out[{i}]" for i in range(6)] + ["L1.mlp.out[0]"]


def test_a_tied_head_brings_its_group_once():
    found = localization({"L0.attn.o": [1.0, 0.9, 0.0, 0.0]})
    mask = found.top(units=2, tied=True)
    assert {str(c) for c in mask} == {
        "L0.attn.o[0]",
        "L0.attn.o[1]",
        "L0.attn.q[0]",
        "L0.attn.q[1]",
        "L0.attn.k[0]",
        "L0.attn.v[0]",
    }
    assert len(found.top(weights=(4 * 16 + 2 * 16) / TOTAL, tied=True) & ComponentMask.of(["L0.attn.o"], TINY)) == 2


@pytest.mark.parametrize(
    "budget", [{"weights": 1.5}, {"weights": -0.1}, {"units": 99}, {"units": -1}, {}, {"units": 1, "weights": 0.1}]
)
def test_budgets_out_of_range_are_refused(budget):
    with pytest.raises(MechunlearnError, match="out of range|one budget"):
        localization({"L0.mlp.out": [1.0] * 6}).top(**budget)


def test_scores_must_be_finite_and_fit():
    with pytest.raises(MechunlearnError, match="not finite"):
        localization({"L0.mlp.out": [float("nan")] * 6})
    with pytest.raises(MechunlearnError, match="5 units does not fit"):
        localization({"L0.mlp.out": [1.0] * 5})


def test_random_masks_match_a_weight_within_one_unit(world):
    noise = random_units(world, seed=3)
    for share in (0.01, 0.05, 0.3):
        missing = share - noise.share(noise.top(weights=share))
        assert 0 <= missing * noise.total_weights <= max(noise.unit_weights.values())


def test_to_frame_lists_every_unit_once():
    frame = localization({"L0.mlp.out": [0.5, -0.9, 0.1, 0.0, 0.0, 0.0]}).to_frame()
    assert list(frame.columns) == ["component", "layer", "kind", "unit", "score"]
    assert list(frame.component[:2]) == ["L0.mlp.out[1]", "L0.mlp.out[0]"] and len(frame) == 6


@pytest.mark.parametrize(
    "wrong",
    [[0.5] * 32, torch.zeros(1, 32), torch.zeros(32, dtype=torch.long)],
    ids=["a list", "two dimensions", "whole numbers"],
)
def test_scores_and_masks_of_another_kind_are_refused(toy, wrong):
    """The tests' type checker would see it first, so the classes' own checks are asked."""
    model = toy.model
    found = random_units(model, toy.prompts([0, 1]))
    with pytest.raises(MechunlearnError, match="one-dimensional float tensor"):
        _asked_again(found, scores={"L0.mlp.out": wrong})
    mask = ComponentMask.of(["L0.mlp.out"], model.signature)
    with pytest.raises(MechunlearnError, match="one-dimensional bool tensor"):
        _asked_again(mask, sites={"L0.mlp.out": wrong})


def _asked_again(made, **other):
    """Check an object once more with other contents."""
    for name, value in other.items():
        object.__setattr__(made, name, value)
    made.__post_init__()


def test_an_edit_is_itself_alone(toy):
    """Equal numbers do not make two edits one; an edit can be a key."""
    rows = {"L0.mlp.out": toy.model.rows("L0.mlp.out")[:1]}
    one, other = (WeightEdit({"L0.mlp.out": torch.tensor([0])}, rows, toy.model.signature, RunCard("x")) for _ in "ab")
    assert one != other and len({one, other, one}) == 2


def test_edits_that_overlap_are_refused_by_name_and_disjoint_ones_combine(toy):
    def edit(unit: int) -> WeightEdit:
        rows = {"L0.mlp.out": toy.model.rows("L0.mlp.out")[[unit]] * 2}
        return WeightEdit({"L0.mlp.out": torch.tensor([unit])}, rows, toy.model.signature, RunCard("by hand"))

    with pytest.raises(MechunlearnError, match=r"overlap in 1 units, the first is L0.mlp.out\[3\]"):
        edit(3) | edit(3)
    both = edit(3) | edit(4)
    before = toy.model.rows("L0.mlp.out")
    with both.applied(toy.model):
        assert torch.equal(toy.model.rows("L0.mlp.out")[[3, 4]], before[[3, 4]] * 2)
        assert torch.equal(toy.model.rows("L0.mlp.out")[:3], before[:3])


def bits(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.hf.named_parameters()}


def unchanged(model, before) -> bool:
    return all(torch.equal(parameter, before[name]) for name, parameter in model.hf.named_parameters())


def test_an_edit_that_does_not_fit_leaves_every_bit(toy):
    """Its first site does fit: nothing of it may be written."""
    sites = ("L0.mlp.out", "L1.mlp.out")
    rows = {site: toy.model.rows(site)[[0]] + 1 for site in sites}
    rows[sites[1]] = rows[sites[1]][:, 1:]
    edit = WeightEdit({site: torch.tensor([0]) for site in sites}, rows, toy.model.signature, RunCard("by hand"))
    before, width = bits(toy.model), toy.model.unit_weights("mlp.out")
    message = rf"holds weights of size {width - 1} for 'L1.mlp.out', where the model has {width}"
    with pytest.raises(MechunlearnError, match=message), edit.applied(toy.model):
        pytest.fail("it was applied")
    with pytest.raises(MechunlearnError, match=message):
        edit.apply_(toy.model)
    assert unchanged(toy.model, before)


def test_a_write_that_fails_on_the_way_is_undone(toy, monkeypatch):
    sites = ("L0.mlp.out", "L1.mlp.out")
    rows = {site: toy.model.rows(site)[[0]] + 1 for site in sites}
    edit = WeightEdit({site: torch.tensor([0]) for site in sites}, rows, toy.model.signature, RunCard("by hand"))
    before, write, calls = bits(toy.model), toy.model.write_, []

    def failing(site, *rest):
        calls.append(site)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        write(site, *rest)

    monkeypatch.setattr(type(toy.model), "write_", lambda self, *given: failing(*given))
    with pytest.raises(RuntimeError, match="out of memory"), edit.applied(toy.model):
        pytest.fail("it was applied")
    assert calls == [*sites, *sites] and unchanged(toy.model, before)


@pytest.mark.parametrize(
    "units, rows",
    [
        (torch.tensor([-1]), torch.ones(1, 8)),
        (torch.tensor([6]), torch.ones(1, 8)),
        (torch.tensor([1.7]), torch.ones(1, 8)),
        (torch.tensor([True]), torch.ones(1, 8)),
        (torch.tensor([2, 2]), torch.ones(2, 8)),
        (torch.tensor([[2]]), torch.ones(1, 8)),
        (torch.tensor([2]), torch.ones(2, 8)),
        (torch.tensor([2]), torch.ones(1)),
        (torch.tensor([2]), torch.ones(1, 8, dtype=torch.long)),
        (torch.tensor([2]), torch.full((1, 8), float("nan"))),
    ],
)
def test_units_and_rows_that_do_not_fit_are_refused(units, rows):
    """Without jaxtyping's checks, which no user has and which would come first."""
    given = object.__new__(WeightEdit)
    vars(given).update(units={"L0.mlp.out": units}, rows={"L0.mlp.out": rows}, signature=TINY, low_rank={})
    with pytest.raises(MechunlearnError, match="Edit of 'L0.mlp.out'") as refused:
        given.__post_init__()
    assert "\n" not in str(refused.value)


def test_a_layout_needs_no_weights_to_tie():
    layout = Layout(TINY, 2)
    assert set(layout.kinds) == set(KINDS)
    assert len(ComponentMask.of(["L0.mlp.out[0]"], TINY).tied(layout)) == 3


def test_parameter_masks_restrict_an_ordinary_training_loop(toy):
    """The example of the docs: zero the gradient outside the mask of an ordinary Hugging Face model."""
    mask = ComponentMask.of(["L0.mlp.out[3]", "L1.attn.q[0]"], toy.model.signature)
    masks = mask.parameter_masks(toy.model.hf)
    assert set(masks) == {"model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"}
    assert masks["model.layers.0.mlp.down_proj.weight"][:, 3].all()
    assert sum(int(m.sum()) for m in masks.values()) == mask.weights(toy.model)


def test_the_strongest_role_sums_over_sites_and_needs_scores_by_role():
    signature = Signature("llama", 2, 4, 2, 64, 32)
    rows = {"L0.mlp_out": torch.tensor([[9.0], [0.1], [-0.9]]), "L1.mlp_out": torch.tensor([[9.0], [0.5], [0.1]])}
    found = Localization(
        {}, signature, {}, 0, RunCard("example"), by_role=rows, roles=("relation", "subject last", "last")
    )
    assert found.strongest_role() == "last" and found.strongest_role(["subject last"]) == "subject last"
    assert found.strongest_role(["relation", "last"]) == "relation"
    with pytest.raises(MechunlearnError, match="it has: none"):
        Localization({}, signature, {}, 0, RunCard("example")).strongest_role()
    with pytest.raises(MechunlearnError, match="no scores by the token roles"):
        found.strongest_role(["prefix"])


def test_a_disk_that_refuses_is_named_for_tensors_too(tmp_path, monkeypatch):
    def refuse(*given, **settings):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(tensors, "save_file", refuse)
    mask = ComponentMask.of(["L0.mlp.out"], Signature("llama", 2, 4, 2, 64, 32))
    with pytest.raises(MechunlearnError, match="No space left"):
        mask.save(tmp_path / "mask.safetensors")
    assert not list(tmp_path.iterdir())
