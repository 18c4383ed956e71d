"""FILA: the published formula, an unchanged model at step 0, and adapters that PEFT loads."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit import fisher_lora, masked_gradient
from mechunlearn.edit.fisher_lora import INITS, fisher_information, row_weights, weighted_low_rank
from mechunlearn.metrics.answers import measure
from mechunlearn.model.hooked import load_model
from mechunlearn.training.adapters import LowRank
from tests.models import CONFIGS, random_hf, token_prompts

pytestmark = pytest.mark.training

PARTIAL = (
    "L0.attn.q[1]",
    "L0.attn.k[0]",
    "L1.attn.v[1]",
    "L1.attn.o[0]",
    "L1.mlp.in[3]",
    "L1.mlp.in[4]",
    "L2.mlp.out[5]",
)


def halves(facts: int = 8):
    prompts = token_prompts(facts=facts)
    return prompts.select(range(facts // 2)), prompts.select(range(facts // 2, facts))


class TestFormula:
    def test_a_matrix_worked_by_hand(self):
        """W = diag(3, 2), row weights 1 and 4: D W = diag(3, 8), so rank 1 keeps the second row.

        S = 8, scale 2, S / scale = 4: A = sqrt(4) (0, 1), B = (1/4) * 1 * sqrt(4) (0, 1)^T, and 2 B A = diag(0, 2).
        """
        down, up = weighted_low_rank(torch.diag(torch.tensor([3.0, 2.0])), torch.tensor([1.0, 4.0]), 1, 2.0)
        torch.testing.assert_close(down, torch.tensor([[0.0, 2.0]]))
        torch.testing.assert_close(up, torch.tensor([[0.0], [0.5]]))

    @pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
    def test_it_is_the_published_composition_of_svds(self, shape):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
        d = torch.rand(shape[0], generator=generator, dtype=torch.float64) + 0.1
        scale, rank = 2.0, 3
        down, up = weighted_low_rank(weight, d, rank, scale)
        u, s, vh = torch.linalg.svd(d[:, None] * weight)
        s = s[:rank] / scale
        a, b = s.sqrt()[:, None] * vh[:rank], (u[:, :rank] * s.sqrt()) / d[:, None]
        torch.testing.assert_close(up @ down, b @ a, atol=1e-9, rtol=1e-8)
        signs = (down * a).sum(1).sign()
        torch.testing.assert_close(down, signs[:, None] * a, atol=1e-9, rtol=1e-8)
        torch.testing.assert_close(up, signs * b, atol=1e-9, rtol=1e-8)

    def test_it_is_the_best_matrix_of_its_rank_in_the_weighted_norm(self):
        generator = torch.Generator().manual_seed(0)
        weight, d = torch.randn(6, 9, generator=generator), torch.rand(6, generator=generator) * 3
        down, up = weighted_low_rank(weight, d, 2, 2.0)
        best = (d[:, None] * (weight - 2 * up @ down)).norm()
        plain_down, plain_up = weighted_low_rank(weight, None, 2, 2.0)
        assert best < (d[:, None] * (weight - 2 * plain_up @ plain_down)).norm() - 1e-3
        for _ in range(20):
            other = 2 * (up + 0.05 * torch.randn(up.shape, generator=generator)) @ down
            assert best < (d[:, None] * (weight - other)).norm()

    def test_full_rank_gives_the_matrix_and_dead_rows_do_no_harm(self):
        weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        down, up = weighted_low_rank(weight, torch.tensor([1.0, 2.0, 0.5, 3.0]), 4, 1.0)
        torch.testing.assert_close(up @ down, weight, atol=1e-4, rtol=1e-4)
        down, up = weighted_low_rank(weight, torch.tensor([1.0, 0.0, 0.5, 0.0]), 2, 1.0)
        assert torch.isfinite(up).all() and torch.isfinite(down).all()

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_row_weights_are_those_of_gradients_taken_one_sequence_at_a_time(self, family):
        model = load_model((random_hf(family), None))
        forget, retain = halves()
        mask = ComponentMask.of(["L1.mlp.out", "L1.attn.q"], model.signature)
        name = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_proj.weight"}[family]
        weight = dict(model.hf.named_parameters())[name]

        def fisher(prompts):
            total = torch.zeros_like(weight)
            for row in range(len(prompts)):
                one = prompts.select([row])
                logits = model.hf(one.tokens).logits[:, -1]
                loss = torch.nn.functional.cross_entropy(logits, one.answers[:, 0])
                total += torch.autograd.grad(loss, weight)[0] ** 2
            total = total / len(prompts)
            return total.T if family == "gpt2" else total

        f, r = fisher(forget), fisher(retain)
        known = fisher_information(model, mask, forget), fisher_information(model, mask, retain)
        wanted = {
            "fila": (f / (r.mean() + r)).sum(1).sqrt(),
            "fila-code-eps": (f / (1e-5 + r)).sum(1).sqrt(),
            "fila-row-sums": (f.sum(1) / r.sum(1)).sqrt(),
            "forget-fisher": f.sum(1).sqrt(),
        }
        for init, expected in wanted.items():
            found = row_weights(model, mask, *known, init)[name]
            torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=1e-3)
        assert not torch.allclose(
            wanted["fila"] / wanted["fila"].max(), wanted["fila-code-eps"] / wanted["fila-code-eps"].max()
        )
        given = [fisher_lora(model, mask, forget, retain, rank=2, steps=2, lr=0.01, fisher=f) for f in (None, known)]
        assert all(torch.equal(a, b) for a, b in zip(*(edit.low_rank[name] for edit in given), strict=True))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_the_model_is_unchanged_before_the_first_step(family, init):
    model = load_model((random_hf(family), None))
    forget, retain = halves()
    before = model.forward(forget.tokens)
    first = []
    for mask in (ComponentMask.everything(model), ComponentMask.of(PARTIAL, model.signature)):
        rank = 1
        edit = fisher_lora(model, mask, forget, retain, rank=rank, init=init, steps=1, lr=0.0)
        with edit.applied(model):
            torch.testing.assert_close(model.forward(forget.tokens), before, atol=1e-5, rtol=1e-5)
        first.append(edit.card.trajectory[0]["forget"])
    assert first[0] == pytest.approx(first[1], abs=1e-6), "both read the unedited model"


def test_factors_that_begin_away_from_zero_leave_every_logit_bit_as_it_was():
    model = load_model((random_hf("llama"), None))
    tokens = token_prompts().tokens
    before = model.forward(tokens)
    adapters = LowRank(
        model,
        ComponentMask.everything(model),
        4,
        2.0,
        lambda name, weight, rank: weighted_low_rank(weight, None, rank, 2.0),
    )
    with adapters.attached(), torch.no_grad():
        assert torch.equal(model.forward(tokens), before)
        adapters.leaves[1].add_(0.1)
        assert not torch.allclose(model.forward(tokens), before, atol=1e-3)
    assert torch.equal(model.forward(tokens), before)


@pytest.mark.parametrize("addresses", [(), PARTIAL], ids=["whole matrices", "some units"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_adapter_does_in_peft_what_the_edit_does(family, addresses, tmp_path):
    hf = random_hf(family)
    model = load_model((hf, None))
    if model.signature.kv_heads < 2:
        addresses = [a.replace("attn.v[1]", "attn.v[0]") for a in addresses]
    mask = ComponentMask.of(addresses, model.signature) if addresses else ComponentMask.everything(model)
    forget, retain = halves()
    edit = fisher_lora(model, mask, forget, retain, rank=1 if addresses else 3, steps=3, lr=0.05)
    before = model.forward(forget.tokens)
    with edit.applied(model), torch.no_grad():
        edited = model.forward(forget.tokens)
    assert (edited - before).abs().max() > 1e-3
    edit.save_adapter(model, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(random_hf(family), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(adapted(forget.tokens).logits, edited, atol=1e-4, rtol=1e-4)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(forget.tokens).logits, edited, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.forward(forget.tokens), before)


class TestLowRankEdits:
    @pytest.fixture
    def made(self):
        model = load_model((random_hf("llama"), None))
        forget, retain = halves()
        return model, fisher_lora(model, ComponentMask.everything(model), forget, retain, rank=2, steps=2, lr=0.05)

    def test_it_is_small_and_survives_saving(self, made, tmp_path):
        model, edit = made
        assert isinstance(edit, WeightEdit) and not edit.rows
        # rank 4 because B A - B0 A0 is stored as one product
        assert all(left.shape[1] == right.shape[0] == 4 for left, right in edit.low_rank.values())
        edit.save(tmp_path / "made.safetensors")
        again = WeightEdit.load(tmp_path / "made.safetensors")
        assert again.mask == edit.mask == ComponentMask.everything(model)
        assert all(torch.equal(again.new_rows(model)[site], rows) for site, rows in edit.new_rows(model).items())

    def test_it_is_added_only_to_the_weights_it_was_made_on(self, made):
        model, edit = made
        edit.apply_(model)
        with pytest.raises(MechunlearnError, match="adds to the weights it was made on.*Load the model as it was"):
            edit.apply_(model)

    def test_what_it_does_not_do_is_refused(self, made, tmp_path):
        model, edit = made
        forget, retain = halves()
        dense = masked_gradient(model, ComponentMask.of(["L0.mlp.out"], model.signature), forget, retain, steps=1)
        with pytest.raises(MechunlearnError, match="not low-rank, so it is no adapter"):
            dense.save_adapter(model, tmp_path / "adapter")
        with pytest.raises(MechunlearnError, match="Low-rank edits do not combine"):
            _ = replace(edit, units={}, low_rank=edit.low_rank) | dense

    def test_unknown_starts_and_ranks_that_do_not_fit(self, made):
        model, _ = made
        forget, retain = halves()
        with pytest.raises(MechunlearnError, match="got init='svd'. Expected one of fila, fila-code-eps"):
            fisher_lora(model, ComponentMask.everything(model), forget, retain, init="svd")
        with pytest.raises(MechunlearnError, match=r"rank of 17 does not fit .*selected part of it is 16 x 32"):
            fisher_lora(model, ComponentMask.everything(model), forget, retain, rank=17)
        with pytest.raises(MechunlearnError, match="set is empty"):
            fisher_lora(model, ComponentMask.everything(model), forget.select([]), retain)


def test_it_forgets_on_the_shipped_world_and_keeps_what_is_to_be_kept(world, sport, seed):
    forget, retain = sport
    settings = {"steps": 120, "lr": 2e-3, "stop_at": 0.9, "seed": seed}
    edit = fisher_lora(world, ComponentMask.everything(world), forget, retain, **settings)
    assert edit.card.stopped == "reached"
    assert measure(world, forget)["accuracy"].mean() == 1
    with edit.applied(world):
        assert measure(world, forget)["accuracy"].mean() <= 0.1
        assert measure(world, retain)["accuracy"].mean() >= 0.9
