"""Gradients turned away from held text: the formula, where its inputs come from, and the optimiser that keeps them."""

import pytest
import torch

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.edit import masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.hooked import load_model
from mechunlearn.training.inputs import Sequences, text_sequences
from mechunlearn.training.parameterizations import SelectedRows
from mechunlearn.training.preconditioning import Inputs, MatrixAdam, turned_away
from mechunlearn.world.toy import planted_facts
from tests.models import random_hf

WIDE = 30


def expected(x, gradient, weight):
    """G (weight C / c + 1)^-1 for a gradient [out in], in float64, as the formula is written."""
    c = (x.double().T @ x.double()) / len(x)
    size = c.diagonal().mean() if c.any() else 1.0
    return gradient.double() @ torch.linalg.inv(weight * c / size + torch.eye(len(c)))


class TestFormula:
    @pytest.mark.parametrize("tokens", [1, 12, 30, 200], ids=["one", "fewer", "as many", "more tokens than inputs"])
    @pytest.mark.parametrize("index", [None, torch.tensor([2, 3, 11])], ids=["all inputs", "some inputs"])
    def test_it_is_the_formula_however_many_tokens_there_are(self, tokens, index):
        torch.manual_seed(0)
        x = torch.randn(tokens, WIDE) * torch.linspace(0.1, 3, WIDE)
        inputs = Inputs(index)
        for part in x.split(7):
            inputs.add(part)
        chosen = x if index is None else x[:, index]
        gradient = torch.randn(5, chosen.shape[1])
        found = inputs.turn(100.0)(gradient)
        torch.testing.assert_close(found.double(), expected(chosen, gradient, 100.0), atol=1e-4, rtol=1e-3)

    def test_what_the_text_uses_is_held_and_what_it_does_not_use_is_free(self):
        inputs = Inputs(None)
        inputs.add(torch.eye(WIDE)[:1].repeat(50, 1))
        turned = inputs.turn(100.0)(torch.ones(1, WIDE))
        assert float(turned[0, 0]) == pytest.approx(1 / (1 + 100 * WIDE)) and torch.allclose(
            turned[0, 1:], torch.ones(1)
        )

    def test_inputs_that_are_all_zero_hold_nothing(self):
        inputs = Inputs(None)
        inputs.add(torch.zeros(40, WIDE))
        gradient = torch.randn(3, WIDE)
        assert torch.equal(inputs.turn(100.0)(gradient), gradient)


SITES = [
    "L0.attn.q[1]",
    "L0.attn.v[0]",
    "L1.attn.o[2]",
    "L1.mlp.in[4]",
    "L1.mlp.in[9]",
    "L2.mlp.out[3]",
    "L2.mlp.out[8]",
]


def check_against_single_runs(model, held):
    """Against a run of each text alone on plain transformers, with a hook on every linear map."""
    rows = SelectedRows(model, ComponentMask.of(SITES, model.signature))
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0][0]))
        for name, module in model.hf.named_modules()
        if name in {part.module for part in rows.slices}
    ]
    with torch.no_grad():
        for row, length in zip(held.tokens, held.lengths, strict=True):
            model.hf(row[None, :length])
    for handle in handles:
        handle.remove()
    before = model.fingerprint
    turns = turned_away(rows, [held.select(torch.tensor([0, 1])), held.select(torch.arange(2, len(held)))], 100.0)
    assert model.fingerprint == before and not any(module._forward_pre_hooks for module in model.hf.modules())
    for part, turn in zip(rows.slices, turns, strict=True):
        gradient = torch.randn(part.shape)
        if part.parameter.ndim < 2:
            assert turn is None
            continue
        each, transposed = seen[part.module], part.transposed(model)
        later, first = torch.cat([x[1:] for x in each]), torch.stack([x[0] for x in each])
        size = later.double().square().sum(1).mean().sqrt()
        x = torch.cat([later.double(), size * first.double() / first.double().norm(dim=1, keepdim=True)])
        if part.index is not None and (part.dim == 0) == transposed:
            x = x[:, part.index]
        want = expected(x, gradient.T if transposed else gradient, 100.0)
        torch.testing.assert_close(turn(gradient).double(), want.T if transposed else want, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "gemma3"])
def test_the_inputs_are_those_of_each_matrix_on_real_tokens(family):
    torch.manual_seed(0)
    tokens, lengths = torch.randint(2, 97, (5, 9)), torch.tensor([9, 4, 6, 9, 3])
    held = Sequences(tokens, torch.full_like(tokens, -1), lengths)
    check_against_single_runs(load_model((random_hf(family), None)), held)


def test_matrices_that_read_the_same_tensor_share_its_statistics(monkeypatch):
    """Queries, keys and values read one tensor, gate and up another: two are collected in each layer, and two more."""
    model = load_model((random_hf("llama"), None))
    rows = SelectedRows(model, ComponentMask.everything(model))
    added: list[int] = []
    add = Inputs.add
    monkeypatch.setattr(Inputs, "add", lambda self, *given: added.append(id(self)) or add(self, *given))
    tokens = torch.randint(2, 97, (3, 5))
    held = Sequences(tokens, torch.full_like(tokens, -1), torch.tensor([5, 4, 3]))
    turns = turned_away(rows, [held], 100.0)
    assert len(added) == len(set(added)) == 4 * model.signature.layers
    assert all((turn is None) == (part.parameter.ndim < 2) for turn, part in zip(turns, rows.slices, strict=True))


@pytest.mark.real
def test_so_they_are_on_a_real_model_with_other_languages_numbers_and_a_long_text(smollm2):
    torch.manual_seed(0)
    texts = [
        "The bus was late.",
        "挪威的首都是奥斯陆。",
        "1234567 and 0.5",
        "Столица Норвегии - Осло",
        "On and on it went. " * 60,
    ]
    check_against_single_runs(smollm2, text_sequences(smollm2, texts))


class TestOptimiser:
    def test_a_step_is_along_its_gradient_and_as_large_as_the_rate(self):
        leaf = torch.zeros(4, 3, requires_grad=True)
        leaf.grad = torch.arange(12.0).reshape(4, 3)
        MatrixAdam([leaf], lr=0.1).step()
        want = -0.1 * leaf.grad / leaf.grad.square().mean().sqrt()
        torch.testing.assert_close(leaf.detach(), want)

    def test_of_one_number_it_is_adamw(self):
        ours, theirs = (torch.tensor([2.0], requires_grad=True) for _ in range(2))
        steps = MatrixAdam([ours], lr=0.1, weight_decay=0.2), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2)
        for gradient in (1.0, -3.0, 0.5, 2.0):
            ours.grad, theirs.grad = torch.tensor([gradient]), torch.tensor([gradient])
            for each in steps:
                each.step()
        torch.testing.assert_close(ours, theirs)


class TestEditor:
    @pytest.fixture(scope="class")
    def toy(self):
        return planted_facts()

    def test_given_settings_train_with_plain_adamw(self, toy):
        mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
        sets = toy.prompts([0]), toy.prompts([1, 2])
        plain, zero, held = (
            masked_gradient(toy.model, mask, *sets, lr=0.1, steps=3, **given)
            for given in ({}, {"held_weight": 0}, {"held_weight": 100})
        )
        assert torch.equal(plain.rows["L0.mlp.out"], zero.rows["L0.mlp.out"])
        assert not torch.equal(plain.rows["L0.mlp.out"], held.rows["L0.mlp.out"])

    @pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
    def test_a_weight_out_of_range_is_refused(self, toy, weight):
        mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
        with pytest.raises(MechunlearnError, match=r"masked_gradient got held_weight=.*\. Expected "):
            masked_gradient(toy.model, mask, toy.prompts([0]), toy.prompts([1]), held_weight=weight)

    def test_it_moves_held_inputs_less_for_the_same_step(self, world, sport):
        """The change of one neuron row's output on the retain facts, relative to that on the forget facts."""
        forget, retain = sport[0].select(range(4)), sport[1].select(range(16))
        mask = ComponentMask.of(["L1.mlp.in"], world.signature)

        def moved(edit):
            shares = []
            for prompts in (forget, retain):
                _, plain = world.run_with_cache(prompts.tokens, "L1.mlp.out")
                with edit.applied(world):
                    _, now = world.run_with_cache(prompts.tokens, "L1.mlp.out")
                at = torch.arange(len(prompts)), prompts.spans[:, 1]
                shares.append(float((now["L1.mlp.out"] - plain["L1.mlp.out"])[at].square().mean().sqrt()))
            return shares[1] / shares[0]

        edits = [masked_gradient(world, mask, forget, retain, lr=1e-3, steps=3, held_weight=w) for w in (0, 100)]
        assert moved(edits[1]) < 0.8 * moved(edits[0])
