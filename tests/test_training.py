"""Training only what a mask selects: exact, at the mask's cost, and stopped cleanly."""

import math
import os
import signal
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.edit import losses, masked_gradient
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.model.hooked import load_model
from mechunlearn.training.adapters import LowRank, lora_start
from mechunlearn.training.inputs import CachedInputs, Sequences, TopLayers
from mechunlearn.training.loop import Schedule, train
from mechunlearn.training.parameterizations import Everything, SelectedRows
from tests.models import CONFIGS, random_hf, token_prompts

pytestmark = pytest.mark.training

OBJECTIVES = {
    "injection": {},
    "log_one_minus_p": {"loss": losses.log_one_minus_p},
    "gradient ascent": {"loss": losses.gradient_ascent, "retain_weight": 0, "text_weight": 0},
    "gradient difference": {"loss": losses.gradient_difference},
    "KL": {"loss": losses.gradient_ascent, "retain_loss": losses.kl_retain},
    "NPO": {"loss": losses.npo},
    "SimNPO": {"loss": losses.simnpo},
    "DPO": {"loss": losses.preference},
    "inverted hinge": {"loss": losses.inverted_hinge},
    "inverted hinge with a margin": {"loss": partial(losses.inverted_hinge, margin=0.5)},
    "RMU": {"loss": partial(losses.rmu, layer=2), "retain_loss": partial(losses.rmu_retain, layer=2)},
    "entropy": {"loss": losses.entropy},
}
MASKS = {
    "head": ("L1.attn.q[1]", "L1.attn.k[0]", "L2.attn.v[1]", "L1.attn.o[2]"),
    "neuron": ("L1.mlp.in[3]", "L1.mlp.in[7]", "L2.mlp.out[0]", "L2.mlp.out[11]"),
    "matrix": ("L1.attn.o", "L1.mlp.out"),
}


def halves(facts: int = 8) -> tuple[Prompts, Prompts]:
    prompts = token_prompts(facts=facts)
    return prompts.select(range(facts // 2)), prompts.select(range(facts // 2, facts))


def parameters_of(model) -> dict:
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


def random_model(family: str = "llama", dtype: torch.dtype = torch.float32):
    return load_model((random_hf(family).to(dtype), None))


@pytest.mark.parametrize("granularity", MASKS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_objective_moves_what_the_mask_selects_and_no_other_bit(family, objective, granularity):
    model = random_model(family)
    mask, before = ComponentMask.of(MASKS[granularity], model.signature), parameters_of(model)
    settings = {"steps": 3, "lr": 0.05, "weight_decay": 0.1, **OBJECTIVES[objective]}
    edit = masked_gradient(model, mask, *halves(), **settings)
    assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items()), "the model was changed"
    inside = mask.parameter_masks(model)
    with edit.applied(model):
        for name, after in parameters_of(model).items():
            chosen = inside.get(name, torch.zeros_like(after, dtype=torch.bool))
            assert torch.equal(after[~chosen], before[name][~chosen]), f"{name} moved outside the mask"
            assert name not in inside or (after[chosen] != before[name][chosen]).float().mean() > 0.9
    assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items())


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_gradient_of_the_selected_rows_is_that_of_the_whole_matrices(family):
    model = random_model(family)
    kinds = model.layout.kinds
    mask = ComponentMask.of([f"L1.{kind}[{unit}]" for kind in kinds for unit in (0,)] + ["L2.mlp.out"], model.signature)
    forget, _ = halves()
    sequences = Sequences.of(forget)
    trained = SelectedRows(model, mask)
    with trained.attached():
        read = CachedInputs(TopLayers(model, trained.lowest), sequences).read(torch.arange(4), {"logits", "labels"})
        trained.gradient(losses.cross_entropy(read["logits"], read["labels"]))
    logits = model.hf(forget.tokens).logits[:, -1]
    torch.testing.assert_close(read["logits"], logits, atol=1e-5, rtol=1e-4)
    parameters = [part.parameter for part in trained.slices]
    whole = torch.autograd.grad(F.cross_entropy(logits, forget.answers[:, 0]), parameters)
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    for part, leaf, expected in zip(trained.slices, trained.leaves, whole, strict=True):
        wanted = expected if part.index is None else expected.index_select(part.dim, part.index)
        torch.testing.assert_close(leaf.grad, wanted, atol=1e-6, rtol=1e-3)
        assert leaf.grad.abs().max() > 1e-6
    assert sum(leaf.numel() for leaf in trained.leaves) == mask.weights(model), "no copy of what is frozen"


def test_adapters_begin_where_peft_begins_and_know_the_lowest_layer():
    """A uniform within 1 / sqrt(in) on both sides, B zero; backward passes end at the lowest masked layer."""
    down, up = lora_start(0)("any", torch.zeros(8, 64), 4)
    assert down.shape == (4, 64) and up.shape == (8, 4) and not up.any()
    assert 0.11 < down.max() <= 1 / 8 and -1 / 8 <= down.min() < -0.11 and abs(float(down.mean())) < 0.02
    model = random_model()
    for site, lowest in (("L1.mlp.out", 1), ("L2.attn.o", 2)):
        mask = ComponentMask.of([site, "L2.mlp.out"], model.signature)
        assert LowRank(model, mask, 2, 1.0, lora_start(0)).lowest == lowest


def test_kept_constants_give_the_same_edit_and_are_computed_once(monkeypatch):
    model, calls = random_model(), []
    mask = ComponentMask.of(["L2.mlp.out"], model.signature)
    forget, retain = halves()
    entering = type(model.decoder).entering

    def counted(self, tokens, layer):
        calls.append((len(tokens), layer))
        return entering(self, tokens, layer)

    monkeypatch.setattr(type(model.decoder), "entering", counted)
    kept = masked_gradient(model, mask, forget, retain, steps=6, batch_size=2, lr=0.05)
    assert sum(rows for rows, _ in calls) == len(forget) + len(retain), "each example once, whatever the epochs"
    assert {layer for _, layer in calls} == {2}
    calls.clear()
    again = masked_gradient(model, mask, forget, retain, steps=6, batch_size=2, lr=0.05, cache=False)
    assert sum(rows for rows, _ in calls) == 6 * 2 * 2
    torch.testing.assert_close(kept.rows["L2.mlp.out"], again.rows["L2.mlp.out"], atol=1e-6, rtol=1e-5)


def test_padding_does_not_leak_between_examples_of_different_length(world, sport):
    forget, _ = sport
    part = forget.select(range(12))
    assert len(set(part.lengths.tolist())) > 1
    stream = CachedInputs(TopLayers(world, 4), Sequences.of(part))
    with torch.no_grad():
        wanted = world.forward(part.tokens)[torch.arange(12), part.start]
        for rows in (torch.arange(5), torch.arange(12), torch.tensor([11, 0, 3])):
            read = stream.read(rows, {"logits", "labels", "fact"})
            torch.testing.assert_close(read["logits"], wanted[rows], atol=1e-4, rtol=1e-4)
            assert torch.equal(read["labels"], part.answers[rows, 0])
    assert torch.equal(stream.right(), measure(world, part)["accuracy"] == 1)


def test_nothing_below_the_lowest_masked_layer_has_a_backward_pass():
    model = random_model()
    trained = SelectedRows(model, ComponentMask.of(["L2.mlp.out[0]"], model.signature))
    forget, _ = halves()
    with trained.attached():
        read = CachedInputs(TopLayers(model, trained.lowest, keep=False), Sequences.of(forget)).read(
            torch.arange(4), {"logits"}
        )
        seen, nodes = [], [read["logits"].grad_fn]
        while nodes:
            node = nodes.pop()
            seen.append(node.name())
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert sum("_Selected" in name for name in seen) >= 1
    assert not any("Embedding" in name for name in seen) and sum("AccumulateGrad" in name for name in set(seen)) == 1


def test_accumulated_parts_give_the_step_of_the_whole_batch():
    model = random_model()
    mask = ComponentMask.of(MASKS["matrix"], model.signature)
    forget, retain = halves(12)
    whole = masked_gradient(model, mask, forget, retain, steps=3, lr=0.01, batch_size=6)
    for parts in (2, 4, 9):
        split = masked_gradient(model, mask, forget, retain, steps=3, lr=0.01, batch_size=6, accumulate=parts)
        for site in whole.rows:
            torch.testing.assert_close(split.rows[site], whole.rows[site], atol=2e-5, rtol=1e-3)
        assert split.card.trajectory[0]["forget"] == pytest.approx(whole.card.trajectory[0]["forget"], abs=1e-5)


def test_bfloat16_weights_are_trained_through_float32_copies():
    """Steps too small for bfloat16 still add up."""
    model = random_model(dtype=torch.bfloat16)
    mask = ComponentMask.of(["L2.mlp.out"], model.signature)
    weight = model.hf.model.layers[2].mlp.down_proj.weight
    tiny = float(weight.detach().abs().median()) / 2**10
    one = masked_gradient(model, mask, *halves(), steps=1, lr=tiny, clip=1e9)
    many = masked_gradient(model, mask, *halves(), steps=40, lr=tiny, clip=1e9)
    before = model.rows("L2.mlp.out")
    moved = [(edit.rows["L2.mlp.out"] != before).float().mean() for edit in (one, many)]
    assert moved[0] < 0.5 < moved[1]
    assert many.rows["L2.mlp.out"].dtype == torch.bfloat16 and weight.dtype == torch.bfloat16
    assert all(leaf.dtype == torch.float32 for leaf in SelectedRows(model, mask).leaves)


def test_the_rate_warms_up_and_falls():
    rates = Schedule(10, 2.0, warmup=4).rates(torch.optim.SGD([torch.zeros(1)]))
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0 and rates[-1] < 0.2
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (7, 0), (50, 2), (9, 8)])
def test_the_rates_are_those_of_the_formula_and_of_transformers(steps, warmup):
    """Behind the warm-up step by step those of transformers' scheduler; the warm-up is one step ahead of it."""
    rates = Schedule(steps, 0.3, warmup=warmup).rates(torch.optim.SGD([torch.zeros(1)]))
    cosine = [0.15 * (1 + math.cos(math.pi * step / (steps - warmup))) for step in range(steps - warmup)]
    assert rates == pytest.approx([*(0.3 * (step + 1) / warmup for step in range(warmup)), *cosine], rel=1e-12)
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    theirs, scheduler = [], get_cosine_schedule_with_warmup(optimiser, warmup, steps)
    for _ in range(steps):
        theirs += scheduler.get_last_lr()
        optimiser.step()
        scheduler.step()
    assert rates[warmup:] == theirs[warmup:] and rates[: max(0, warmup - 1)] == theirs[1:warmup]


def test_each_step_is_taken_at_its_rate(monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (seen.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    model = random_model()
    mask = ComponentMask.of(["L2.mlp.out"], model.signature)
    masked_gradient(model, mask, *halves(), steps=6, lr=0.3, warmup=2)
    assert seen == Schedule(6, 0.3, warmup=2).rates(torch.optim.SGD([torch.zeros(1)]))


class TestStopping:
    def test_training_ends_at_the_stated_strength(self, toy):
        mask = ComponentMask.of([toy.neuron(5)], toy.model.signature)
        forget, retain = toy.prompts([5]), toy.prompts([0, 1, 2])
        edit = masked_gradient(toy.model, mask, forget, retain, steps=400, lr=0.004, stop_at=0.99)
        steps = len(edit.card.trajectory)
        assert edit.card.stopped == "reached" and steps < 400 and steps % 5 == 0
        assert [e["step"] for e in edit.card.trajectory if "efficacy" in e] == list(range(5, steps + 1, 5))
        assert edit.card.trajectory[-1]["efficacy"] == 1.0 > edit.card.trajectory[4]["efficacy"]
        with edit.applied(toy.model):
            assert measure(toy.model, forget)["target_accuracy"].item() == 1

    def test_strength_is_the_share_that_lost_the_truth_where_no_target_is_asked_for(self, toy):
        mask = ComponentMask.of([toy.neuron(5)], toy.model.signature)
        edit = masked_gradient(
            toy.model, mask, toy.prompts([5]), toy.prompts([0]), loss=losses.log_one_minus_p, lr=0.1, stop_at=1.0
        )
        with edit.applied(toy.model):
            assert edit.card.stopped == "reached" and measure(toy.model, toy.prompts([5]))["accuracy"].item() == 0

    def test_the_trajectory_has_every_term_of_every_step(self, toy):
        mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
        edit = masked_gradient(
            toy.model, mask, toy.prompts([5]), toy.prompts([0]), steps=4, measure=lambda step: {"square": step * step}
        )
        assert [sorted(entry) for entry in edit.card.trajectory] == [["forget", "retain", "square", "step"]] * 4
        assert [entry["square"] for entry in edit.card.trajectory] == [1, 4, 9, 16]
        assert edit.card.trajectory[-1]["forget"] < edit.card.trajectory[0]["forget"] and edit.card.stopped == ""

    def test_what_is_measured_can_end_it(self, toy):
        mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
        edit = masked_gradient(
            toy.model, mask, toy.prompts([5]), toy.prompts([0]), steps=9, measure=lambda step: {"stop": step == 3}
        )
        assert len(edit.card.trajectory) == 3 and edit.card.stopped == "reached"

    @pytest.mark.parametrize("presses", [1, 2])
    def test_ctrl_c_returns_the_edit_so_far(self, presses):
        model = random_model()
        mask, before = ComponentMask.of(MASKS["matrix"], model.signature), parameters_of(model)
        handler = signal.getsignal(signal.SIGINT)

        def press(step: int) -> None:
            for _ in range(presses if step == 3 else 0):
                os.kill(os.getpid(), signal.SIGINT)

        def edit():
            return masked_gradient(model, mask, *halves(), steps=50, lr=0.01, measure=press)

        if presses == 2:
            with pytest.raises(KeyboardInterrupt):
                edit()
        else:
            made = edit()
            assert made.card.stopped == "interrupted" and len(made.card.trajectory) == 3
            assert not torch.equal(made.rows["L1.mlp.out"], model.rows("L1.mlp.out"))
        assert signal.getsignal(signal.SIGINT) is handler
        assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items())
        assert "forward" not in vars(model.hf.model.layers[1].mlp.down_proj)


class TestBadInput:
    def test_a_loss_that_is_not_finite_names_step_and_objective_and_restores_the_model(self):
        model = random_model()
        mask, before, calls = ComponentMask.of(MASKS["matrix"], model.signature), parameters_of(model), []

        def explosive(logits, labels):
            calls.append(1)
            return losses.cross_entropy(logits, labels) * (float("nan") if len(calls) == 3 else 1)

        with pytest.raises(
            MechunlearnError, match=r"forget term of explosive is nan at step 3 of 50.*Lower the learning rate"
        ):
            masked_gradient(model, mask, *halves(), loss=explosive, steps=50)
        assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items())

    @pytest.mark.parametrize("addresses", [(), ("sae:topic",), ("sae:topic", "mlp.out")])
    def test_a_mask_without_weights_says_which_editor_takes_it(self, addresses):
        model = random_model()
        sites = {f"L1.{name}": torch.ones(48, dtype=torch.bool) for name in addresses}
        mask = ComponentMask(sites, model.signature)
        wanted = r"L1\.sae:topic.*A FeatureEdit takes them.*feature_clamp" if sites else "selects no unit"
        with pytest.raises(MechunlearnError, match=wanted):
            masked_gradient(model, mask, *halves())

    @pytest.mark.parametrize("which", ["forget", "retain"])
    def test_empty_sets(self, which):
        model = random_model()
        forget, retain = halves()
        given = {"forget": forget, "retain": retain, which: forget.select([])}
        with pytest.raises(MechunlearnError, match=f"The {which} set is empty"):
            masked_gradient(model, ComponentMask.of(["L1.mlp.out"], model.signature), **given)

    def test_rmu_below_the_mask(self):
        model = random_model()
        mask = ComponentMask.of(["L2.mlp.out"], model.signature)
        with pytest.raises(MechunlearnError, match=r"rmu reads layer 1, but the lowest masked layer is 2"):
            masked_gradient(model, mask, *halves(), loss=partial(losses.rmu, layer=1))

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"lr": float("nan")}, "masked_gradient got lr=nan. Expected a learning rate from 0 to 1000"),
            ({"lr": -1e-3}, "masked_gradient got lr=-0.001"),
            ({"steps": 0}, "masked_gradient got steps=0. Expected a whole number, 1 or more"),
            ({"steps": 5, "warmup": 5}, "5 steps with 5 of warm-up"),
        ],
    )
    def test_schedules_that_cannot_be(self, settings, message):
        model = random_model()
        with pytest.raises(MechunlearnError, match=message):
            masked_gradient(model, ComponentMask.of(["L1.mlp.out"], model.signature), *halves(), **settings)

    @pytest.mark.parametrize("rank", [0, 33, -1])
    def test_a_rank_that_does_not_fit(self, rank):
        model = random_model()
        with pytest.raises(MechunlearnError, match=rf"rank of {rank} does not fit .*32 x 48.*from 1 to 32"):
            LowRank(model, ComponentMask.of(["L1.mlp.out"], model.signature), rank, 2.0, lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_fine_tuning_moves_everything_and_restores_every_bit(dtype):
    model = random_model("gpt2", dtype)
    before, flags = parameters_of(model), [p.requires_grad for p in model.hf.parameters()]
    trained = Everything(model)
    sequences = Sequences.of(token_prompts())
    stream = CachedInputs(TopLayers(model, None), sequences)
    rows = torch.arange(4)

    def parts():
        read = stream.read(rows, {"logits", "labels"})
        yield {"forget": (1.0, 1.0, losses.cross_entropy(read["logits"], read["labels"]))}

    with trained.attached():
        done = train(trained, parts, Schedule(20, 0.01), objective="relearning")
    assert done.trajectory[-1]["forget"] < done.trajectory[0]["forget"] / 2
    moved = [name for name, p in model.hf.named_parameters() if not torch.equal(p, before[name])]
    assert set(moved) == set(before), "embeddings and norms too"
    trained.restore()
    assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items())
    assert [p.requires_grad for p in model.hf.parameters()] == flags
