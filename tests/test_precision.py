"""Training multiplies in bfloat16 where the processor does; what is measured stays as exact as the model."""

import pytest
import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mechunlearn import ComponentMask, load_facts
from mechunlearn.edit import masked_gradient, memit
from mechunlearn.edit.goal import Judge, Reached
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training import precision
from mechunlearn.training.inputs import CachedInputs, Sequences, TopLayers
from mechunlearn.training.parameterizations import SelectedRows
from mechunlearn.world.toy import planted_facts


@pytest.fixture
def halved(monkeypatch):
    """Every float32 model trains in bfloat16 products, whatever its width and the processor."""
    monkeypatch.setattr(precision, "WIDE", 0)
    monkeypatch.setattr(precision, "_in_hardware", lambda: True)


def rounded(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.bfloat16().double()


class TestProducts:
    def test_only_float32_models_that_are_wide_enough_on_a_processor_that_can(self, monkeypatch):
        model = planted_facts().model
        monkeypatch.setattr(precision, "_in_hardware", lambda: True)
        assert precision.products(model) == torch.float32, "it is narrow"
        monkeypatch.setattr(precision, "WIDE", model.signature.d_model)
        assert precision.products(model) == torch.bfloat16 and precision.products_named(model) == "bfloat16"
        monkeypatch.setattr(precision, "_in_hardware", lambda: False)
        assert precision.products(model) == torch.float32

    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
    def test_a_model_of_another_type_computes_in_its_own(self, halved, kind):
        model = planted_facts().model
        model.hf.to(kind)
        assert precision.products(model) == kind

    def test_narrower_instructions_have_none(self, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert not precision._in_hardware(), "torch was told to do without"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        assert precision._in_hardware()
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        assert not precision._in_hardware(), "an older torch does not say"


class TestLinear:
    """Beside products of rounded numbers in float64."""

    def test_values_and_gradients(self, halved, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 5, 16, generator=generator, requires_grad=True)
        weight = torch.randn(7, 16, generator=generator, requires_grad=True)
        bias = torch.randn(7, generator=generator, requires_grad=True)
        above = torch.randn(2, 5, 7, generator=generator)
        with precision.arithmetic(planted_facts().model)():
            out = F.linear(x, weight, bias)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), rounded(x) @ rounded(weight).T + bias, rtol=2**-8, atol=2**-6)
        assert not torch.equal(out, F.linear(x, weight, bias))
        of_x, of_weight, of_bias = torch.autograd.grad(out, (x, weight, bias), above)
        torch.testing.assert_close(of_x.double(), rounded(above) @ rounded(weight), rtol=2**-8, atol=2**-6)
        wanted = rounded(above).flatten(0, 1).T @ rounded(x).flatten(0, 1)
        torch.testing.assert_close(of_weight.double(), wanted, rtol=2**-8, atol=2**-6)
        assert torch.equal(of_bias, above.sum((0, 1)))

    def test_nothing_outside_the_block_and_nothing_but_linear_maps(self, halved, seed):
        generator = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(4, 16, generator=generator), torch.randn(7, 16, generator=generator)
        exact = F.linear(x, weight)
        with precision.arithmetic(planted_facts().model)():
            assert torch.equal(x @ weight.T, exact) and torch.equal(F.softmax(x, -1), x.softmax(-1))
        assert torch.equal(F.linear(x, weight), exact) and precision.Half.current is None

    def test_transposed_layers_too(self, halved, seed):
        """GPT-2's weights are [in out], in a layer of transformers' own."""
        torch.manual_seed(seed)
        layer, x = Conv1D(7, 16), torch.randn(2, 5, 16, requires_grad=True)
        with precision.arithmetic(planted_facts().model)() as half:
            out = layer(x)
        torch.testing.assert_close(
            out.double(), rounded(x) @ rounded(layer.weight) + layer.bias, rtol=2**-8, atol=2**-6
        )
        assert not torch.equal(out, layer(x)) and half.of(layer.weight.T).data_ptr() == half.of(layer.weight).data_ptr()
        above = torch.randn_like(out)
        of_x, of_weight = torch.autograd.grad(out, (x, layer.weight), above)
        torch.testing.assert_close(of_x.double(), rounded(above) @ rounded(layer.weight).T, rtol=2**-8, atol=2**-6)
        wanted = rounded(x).flatten(0, 1).T @ rounded(above).flatten(0, 1)
        torch.testing.assert_close(of_weight.double(), wanted, rtol=2**-8, atol=2**-6)

    def test_backward_casts_no_weight_again(self, halved, monkeypatch):
        layers, cast = [torch.nn.Linear(16, 16), Conv1D(16, 16)], []
        for layer in layers:
            layer.requires_grad_(False)
        x, to_half = torch.randn(3, 16, requires_grad=True), torch.Tensor.bfloat16
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda number: cast.append(len(number)) or to_half(number))
        with precision.arithmetic(planted_facts().model)():
            out = layers[1](layers[0](x))
        out.sum().backward()
        assert sorted(cast) == [3, 3, 3, 3, 16, 16], "two inputs, two gradients, and each weight once"

    def test_blocks_within_blocks(self, halved):
        model = planted_facts().model
        with precision.arithmetic(model)() as outer:
            with precision.arithmetic(model)() as inner:
                assert precision.Half.current is inner
            assert precision.Half.current is outer
        assert precision.Half.current is None

    def test_a_weight_is_cast_once_until_it_is_written(self, halved):
        layer = torch.nn.Linear(16, 7, bias=False)
        half = precision.Half()
        assert half.of(layer.weight) is half.of(layer.weight)
        with torch.no_grad():
            layer.weight[0, 0] = 3
        assert half.of(layer.weight)[0, 0] == 3


class TestTraining:
    def test_rows_get_the_gradient_that_autograd_gives_the_rounded_model(self, halved):
        """The gradient of selected rows has code of its own; that of whole weights is torch's."""
        toy = planted_facts()
        model, prompts = toy.model, toy.prompts([0, 1, 2])
        mask = ComponentMask.of(["L0.mlp.out[0]", "L0.mlp.out[1]"], model.signature)
        trained = SelectedRows(model, mask)
        with trained.attached():
            stream = CachedInputs(TopLayers(model, trained.lowest), Sequences.of(prompts))
            read = stream.read(torch.arange(3), {"logits", "labels"})
            trained.gradient(F.cross_entropy(read["logits"], read["labels"]))
        weights = dict(model.hf.named_parameters())
        chosen = [weights[part.name].requires_grad_() for part in trained.slices]
        with precision.arithmetic(model)():
            part = stream.sequences.select(torch.arange(3))
            logits = model.hf(input_ids=part.tokens).logits[part.labels >= 0]
        whole = torch.autograd.grad(F.cross_entropy(logits, part.labels[part.labels >= 0]), chosen)
        for gradient, leaf, piece in zip(whole, trained.leaves, trained.slices, strict=True):
            wanted = gradient if piece.index is None else gradient.index_select(piece.dim, piece.index)
            assert leaf.grad is not None and wanted.abs().max() > 0
            torch.testing.assert_close(leaf.grad, wanted, rtol=2**-6, atol=1e-6)

    def test_what_is_measured_is_exact(self, world, sport, monkeypatch):
        forget, retain = (prompts.select(range(8)) for prompts in sport)
        trained, found = SelectedRows(world, ComponentMask.of(["L1.mlp.out"], world.signature)), []
        monkeypatch.setattr(precision, "WIDE", 0)
        for can in (False, True):
            monkeypatch.setattr(precision, "_in_hardware", lambda can=can: can)
            judge = Judge(TopLayers(world, 1), forget, retain, aimed=False)
            assert judge.reached() == Reached(0.0, 1.0, 0.0), "the unedited model"
            with trained.attached():
                for leaf in trained.leaves:
                    leaf.data *= 0.9
                trained.write()
            found.append(judge.reached())
            trained.restore()
            for leaf, before in zip(trained.leaves, trained.before, strict=True):
                leaf.data.copy_(before)
        assert found[0] == found[1] and found[0].kl > 0

    def test_what_is_compared_is_rounded_alike(self, halved, world, sport):
        stream = CachedInputs(
            TopLayers(world, 1), Sequences.of(sport[0].select(range(8))), frozenset({"reference_logits"})
        )
        read = stream.read(torch.arange(8), {"logits", "reference_logits"})
        assert torch.equal(read["logits"], read["reference_logits"])
        exact = CachedInputs(stream.upper, stream.sequences, exact=True).read(torch.arange(8), {"logits"})["logits"]
        assert 0 < (read["logits"] - exact).abs().max() < 0.1 * exact.abs().max()

    @pytest.mark.parametrize("editor", [masked_gradient, memit])
    def test_an_edit_is_about_the_same_and_its_card_says_in_what_it_was_made(self, world, sport, monkeypatch, editor):
        forget, retain = (prompts.select(range(8)) for prompts in sport)
        mask = ComponentMask.of(["L1.mlp.out"], world.signature)
        settings = {"steps": 5, "lr": 1e-3} if editor is masked_gradient else {}
        exact = editor(world, mask, forget, retain, **settings)
        monkeypatch.setattr(precision, "WIDE", 0)
        monkeypatch.setattr(precision, "_in_hardware", lambda: True)
        half = editor(world, mask, forget, retain, **settings)
        assert (exact.card.products, half.card.products) == ("float32", "bfloat16")
        for site, rows in exact.rows.items():
            before = world.rows(site)[exact.units[site]].cpu()
            off = (half.rows[site] - rows).norm() / (rows - before).norm()
            assert 0 < off < 0.2, "of the change of the exact edit"


LONG = "It had rained all week, and the harbour was grey. " * 12
READ = {
    "another language": ("La capitale de la France est la ville de", "Paris"),
    "a long prompt": (LONG + "The capital of North Macedonia is the city of", "Skopje"),
    "a number": ("The number that comes after 1999 is", "2000"),
}


@pytest.mark.real
@pytest.mark.parametrize("read", READ)
def test_on_a_real_model_the_loss_is_nearly_that_of_plain_transformers(smollm2: HookedModel, monkeypatch, read):
    monkeypatch.setattr(precision, "_in_hardware", lambda: True)
    prompts = Prompts.from_text([Query(READ[read][0], READ[read][1], "", "", "")], smollm2.tokenizer)
    stream = CachedInputs(TopLayers(smollm2, 5), Sequences.of(prompts))
    given = stream.read(torch.arange(1), {"logits", "labels"})
    part = stream.sequences
    with torch.no_grad():
        plain = smollm2.hf(input_ids=part.tokens).logits[part.labels >= 0]
    loss, wanted = (F.cross_entropy(logits, given["labels"]).item() for logits in (given["logits"], plain))
    assert 0 < abs(loss - wanted) < 0.02 * wanted + 0.02


@pytest.mark.real
def test_on_a_real_model_a_step_is_nearly_the_exact_one(smollm2: HookedModel, monkeypatch):
    facts = load_facts("countries/capital")[:24].known(smollm2)
    forget, retain = facts.prompts(smollm2).split(forget=2, retain=4, seed=0)
    assert isinstance(forget, Prompts)
    mask = ComponentMask.of(["L27.mlp.out"], smollm2.signature)
    made = []
    for can in (False, True):
        monkeypatch.setattr(precision, "_in_hardware", lambda can=can: can)
        made.append(masked_gradient(smollm2, mask, forget, retain, steps=3, lr=1e-4))
    exact, half = made
    assert [edit.card.products for edit in made] == ["float32", "bfloat16"]
    for step, other in zip(exact.card.trajectory, half.card.trajectory, strict=True):
        assert other["forget"] == pytest.approx(step["forget"], rel=0.01)
    (site,) = exact.rows
    changes = [edit.rows[site] - smollm2.rows(site)[edit.units[site]].cpu() for edit in made]
    assert F.cosine_similarity(*(change.flatten() for change in changes), dim=0) > 0.95
