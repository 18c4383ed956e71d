"""The edit between two models: what somebody else's trainer changed, applied, evaluated and kept like an edit of ours."""

import copy
import importlib

import pandas as pd
import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mechunlearn import ComponentMask, MechunlearnError, evaluate, load_model
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack import quantization
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import masked_gradient
from mechunlearn.evaluation.controls import random_control
from mechunlearn.model.component import Component
from mechunlearn.model.families import FAMILIES
from mechunlearn.world.toy import planted_facts
from tests.models import CONFIGS, random_hf, token_prompts

TOKENS = torch.randint(2, 97, (3, 10), generator=torch.Generator().manual_seed(2))
PARTLY = ["L0.attn.q[1]", "L1.attn.k[0]", "L1.attn.v[1]", "L1.attn.o[2]", "L2.mlp.in[3]", "L2.mlp.out[5]", "L0.mlp.out"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().view(torch.uint8)


def twins(family: str = "llama"):
    """Two models of equal weights that share none."""
    hf = random_hf(family)
    return load_model((hf, None)), load_model((copy.deepcopy(hf), None))


@torch.no_grad()
def moved(model, addresses) -> ComponentMask:
    """Change every weight of some units, as a stranger's trainer might."""
    mask = ComponentMask.of(addresses, model.signature)
    for site, chosen in mask.sites.items():
        rows = model.rows(site)
        model.write_(site, rows[chosen] * 1.5 + 0.01, chosen.nonzero().flatten())
    return mask


def same_table(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(pd.DataFrame(one), pd.DataFrame(other))


@pytest.mark.parametrize("family", list(CONFIGS))
def test_it_holds_the_changed_units_and_gives_the_other_model_s_logits(family):
    before, after = twins(family)
    kinds = set(before.layout.kinds)
    mask = moved(after, [each for each in PARTLY if Component.parse(each).kind in kinds and fits(each, before)])
    old = {name: bits(weight) for name, weight in before.hf.named_parameters()}
    edit = WeightEdit.between(before, after)
    assert edit.mask == mask
    assert all(torch.equal(bits(weight), old[name]) for name, weight in before.hf.named_parameters())
    with edit.applied(before):
        assert torch.equal(bits(before.forward(TOKENS)), bits(after.forward(TOKENS)))
        assert before.fingerprint == after.fingerprint
    assert not torch.equal(before.forward(TOKENS), after.forward(TOKENS))


def fits(address: str, model) -> bool:
    site = Component.parse(address)
    return site.unit is None or site.unit < (model.signature.units(site.kind) or 0)


@torch.no_grad()
def test_one_bit_of_one_weight_is_one_unit():
    before, after = twins()
    weight = after.hf.model.layers[1].mlp.down_proj.weight
    before.hf.model.layers[1].mlp.down_proj.weight[4, 7] = 0.0
    weight[4, 7] = -0.0
    edit = WeightEdit.between(before, after)
    assert edit.mask == ComponentMask.of(["L1.mlp.out[7]"], before.signature)
    edit.apply_(before)
    assert torch.equal(bits(before.hf.model.layers[1].mlp.down_proj.weight), bits(weight))


def test_half_precision_and_merged_adapters(tmp_path):
    """What PEFT trained, merged, comes back from disk; the rows are as exact as the models."""
    before, _ = twins()
    before.hf.to(torch.bfloat16)
    mask = ComponentMask.of(["L1.mlp.out", "L2.attn.q"], before.signature)
    adapted = peft.get_peft_model(copy.deepcopy(before.hf), mask.to_lora_config(r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    after = load_model((adapted.merge_and_unload(), None))
    edit = WeightEdit.between(before, after)
    assert edit.mask == mask and {rows.dtype for rows in edit.rows.values()} == {torch.bfloat16}
    for name in ("edit.json", "edit.safetensors"):
        edit.save(tmp_path / name)
        with WeightEdit.load(tmp_path / name).applied(before):
            assert torch.equal(bits(before.forward(TOKENS)), bits(after.forward(TOKENS)))


class TestOfOurEditor:
    """An edit of ours, written into a model and found again."""

    @pytest.fixture(scope="class")
    def found(self):
        toy, trained = planted_facts(), planted_facts().model
        sets = toy.prompts(list(range(8))), toy.prompts(list(range(8, 16)))
        mask = ComponentMask.of([toy.neuron(i) for i in range(8)], toy.model.signature)
        edit = masked_gradient(toy.model, mask, *sets, steps=30, lr=0.1)
        edit.apply_(trained)
        return toy, sets, edit, WeightEdit.between(toy.model, trained)

    def test_it_is_recovered_exactly(self, found):
        _, _, edit, between = found
        assert between.units.keys() == edit.units.keys()
        for site, units in edit.units.items():
            assert torch.equal(between.units[site], units)
            assert torch.equal(bits(between.rows[site]), bits(edit.rows[site]))

    def test_its_card_says_where_it_is_from(self, found):
        toy, _, edit, between = found
        card = between.card
        assert (card.method, card.model, card.weights) == ("between", toy.model.fingerprint, edit.card.weights)
        assert card.mask == between.mask.fingerprint and card.seconds > 0
        with edit.applied(toy.model):
            assert card.settings["after_fingerprint"] == toy.model.fingerprint
        assert {"before", "after"} <= card.settings.keys()

    def test_it_is_evaluated_and_attacked_as_the_edit_is(self, found, tmp_path):
        toy, (forget, retain), edit, between = found
        between.save(tmp_path / "it.safetensors")
        control = random_control(toy.model, edit, forget, retain)
        settings = {"forget": forget, "retain": retain, "unseen": toy.prompts(list(range(16, 24))), "control": control}
        report = evaluate(toy.model, edit, **settings, attacks=["quantization"])
        for each in (between, WeightEdit.load(tmp_path / "it.safetensors")):
            other = evaluate(toy.model, each, **settings, attacks=["quantization"])
            same_table(report.frame, other.frame)
            same_table(report.outcomes(), other.outcomes())
            assert other.status() == report.status()
            rows = quantization(toy.model, each, forget, retain)
            same_table(rows, quantization(toy.model, edit, forget, retain))

    def test_its_own_control_moves_random_units_by_the_same_differences(self, found):
        toy, (forget, retain), _, between = found
        control = random_control(toy.model, between, forget, retain, seed=1)
        assert isinstance(control, WeightEdit) and control.mask != between.mask
        for made in (between, control):
            assert {site.split(".", 1)[1] for site in made.units} == {"mlp.out"}

        def moves(edit):
            each = [rows - toy.model.rows(site)[edit.units[site]] for site, rows in edit.rows.items()]
            return torch.cat(each).double()

        assert torch.allclose(moves(control).sum(0), moves(between).sum(0), atol=1e-5)
        assert torch.allclose(moves(control).norm(dim=1).sort()[0], moves(between).norm(dim=1).sort()[0], atol=1e-5)
        again = random_control(toy.model, between, forget, retain, seed=1)
        assert all(torch.equal(control.rows[site], again.rows[site]) for site in control.rows)
        report = evaluate(toy.model, between, forget=forget, retain=retain)
        assert list(report.columns) == ["before", "after", "control"]

    def test_it_cannot_be_made_again(self, found):
        toy, _, _, between = found
        with pytest.raises(MechunlearnError, match="^No editor made this edit: .*Train the model again[^\n]*$"):
            between.remake(seed=1)
        elsewhere = ComponentMask.of([toy.neuron(9)], toy.model.signature)
        with pytest.raises(MechunlearnError, match="No editor made this edit"):
            between.remake(mask=elsewhere)


def test_the_rows_of_a_neuron_stay_together_in_the_control():
    """Where whole neurons moved, the control moves whole neurons too, each by the differences of one of them."""
    before, after = twins()
    kinds = ("mlp.in", "mlp.gate", "mlp.out")
    moved(after, [f"L{layer}.{kind}[{unit}]" for layer in (0, 2) for unit in (3, 9, 11, 20) for kind in kinds])
    edit = WeightEdit.between(before, after)
    control = random_control(before, edit, token_prompts(), token_prompts(), seed=3)

    def moves(made, kind):
        sites = sorted(site for site in made.units if site.endswith(kind))
        where = [(site.split(".")[0], unit) for site in sites for unit in made.units[site].tolist()]
        return where, torch.cat([made.rows[site] - before.rows(site)[made.units[site]] for site in sites])

    here = {kind: moves(control, kind) for kind in kinds}
    assert here["mlp.in"][0] == here["mlp.gate"][0] == here["mlp.out"][0] != moves(edit, "mlp.in")[0]
    whose = [torch.cdist(here[kind][1], moves(edit, kind)[1]).argmin(1).tolist() for kind in kinds]
    assert whose[0] == whose[1] == whose[2] and sorted(whose[0]) == list(range(8)) != whose[0]


def test_where_all_units_moved_the_control_deals_their_differences_out_anew():
    whole, trained = twins()
    moved(trained, ["L0.mlp.out", "L1.mlp.out", "L2.mlp.out"])
    edit = WeightEdit.between(whole, trained)
    control = random_control(whole, edit, token_prompts(), token_prompts())
    assert control.mask == edit.mask and not torch.allclose(control.rows["L0.mlp.out"], edit.rows["L0.mlp.out"])


class TestRefusals:
    def test_another_architecture(self):
        with pytest.raises(
            MechunlearnError, match=r"different architectures: \(llama: .*\) before, \(qwen3: .*Expected"
        ):
            WeightEdit.between(twins("llama")[0], twins("qwen3")[0])

    def test_parameters_that_one_model_has_not(self):
        before, after = twins()
        after.hf.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(48))
        with pytest.raises(
            MechunlearnError, match=r"1 of their parameters are in one only, such as 'model.*up_proj.bias' after"
        ):
            WeightEdit.between(before, after)

    def test_another_vocabulary(self):
        before, after = twins()
        after.hf.resize_token_embeddings(99, mean_resizing=False)
        with pytest.raises(
            MechunlearnError, match=r"different vocabularies: .* is \[97, 32\] before, \[99, 32\] after"
        ):
            WeightEdit.between(before, after)

    def test_another_tokenizer(self):
        def known(*words):
            return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({w: i for i, w in enumerate(words)})))

        before, after = twins()
        moved(after, ["L0.mlp.out[1]"])
        before.tokenizer, after.tokenizer = known("a", "b"), known("a", "b", "<pad>")
        with pytest.raises(
            MechunlearnError, match="The tokenizers differ: 2 tokens before, 3 after, 1 of them not the"
        ):
            WeightEdit.between(before, after)
        after.tokenizer = before.tokenizer  # as the message says
        assert len(WeightEdit.between(before, after).mask) == 1

    def test_another_dtype(self):
        before, after = twins()
        after.hf.to(torch.bfloat16)
        with pytest.raises(MechunlearnError, match=r"is torch.float32 before, torch.bfloat16 after.*dtype='bfloat16'"):
            WeightEdit.between(before, after)

    @pytest.mark.parametrize(
        "family, name, told",
        [
            ("llama", "model.embed_tokens.weight", r"\(2 of 3104 weights, by up to 0\.5\)"),
            ("llama", "model.norm.weight", r"\(2 of 32 weights, by up to 0\.5\)"),
            ("llama", "model.layers.1.input_layernorm.weight", r"\(2 of 32 weights"),
            ("llama", "lm_head.weight", r"\(2 of 3104 weights"),
            ("gpt2", "transformer.h.2.mlp.c_proj.bias", r"\(2 of 32 weights"),
            ("qwen3", "model.layers.0.self_attn.q_norm.weight", r"\(2 of 16 weights"),
        ],
    )
    def test_what_is_in_no_unit(self, family, name, told):
        before, after = twins(family)
        moved(after, ["L0.mlp.out[1]"])
        with torch.no_grad():
            after.hf.get_parameter(name).view(-1)[:2] += torch.tensor([0.5, -0.25])
        with pytest.raises(
            MechunlearnError, match=rf"Parameters differ that belong to no head or neuron: {name} {told}"
        ):
            WeightEdit.between(before, after)

    def test_a_part_of_a_parameter_that_is_in_no_unit(self, monkeypatch):
        """As in a registered family whose table leaves one of several fused matrices out."""
        monkeypatch.setitem(FAMILIES, "gpt2", {kind: at for kind, at in FAMILIES["gpt2"].items() if kind != "attn.k"})
        before, after = twins("gpt2")
        with torch.no_grad():
            after.hf.transformer.h[1].attn.c_attn.weight[0, 30:34] += 1  # two weights of a query, two of a key
        with pytest.raises(MechunlearnError, match=r"head or neuron: transformer.h.1.attn.c_attn.weight \(2 of 3072 "):
            WeightEdit.between(before, after)

    def test_many_such_are_counted(self):
        before, after = twins()
        with torch.no_grad():
            for weight in after.hf.parameters():
                weight.add_(1)
        with pytest.raises(
            MechunlearnError, match=r"Parameters differ .*, and 6 more\. An edit holds units of attn\.q"
        ):
            WeightEdit.between(before, after)

    def test_no_difference(self):
        before, after = twins()
        with pytest.raises(MechunlearnError, match="have the same weights, bit for bit, so there is no edit.*trained"):
            WeightEdit.between(before, after)
        with pytest.raises(
            MechunlearnError, match="are one and the same module.*loaded again if it was trained in place"
        ):
            WeightEdit.between(before, before)

    def test_a_configuration_that_computes_something_else(self):
        before = twins()[0]
        config = copy.deepcopy(before.hf.config)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 4.0}
        other = type(before.hf)(config)
        other.load_state_dict(before.hf.state_dict())
        after = load_model((other, None))
        moved(after, ["L0.mlp.out[1]"])
        weights = before.fingerprint
        with pytest.raises(
            MechunlearnError, match=r"differ in rope_parameters .*'rope_theta': 4\.0.* after\)\. Expected"
        ):
            WeightEdit.between(before, after)
        assert before.fingerprint == weights

    def test_weights_that_are_no_numbers(self):
        before, after = twins()
        with torch.no_grad():
            after.hf.model.layers[0].mlp.down_proj.weight[0, 3] = float("nan")
        with pytest.raises(MechunlearnError, match="L0.mlp.out.*not finite"):
            WeightEdit.between(before, after)


def test_an_untied_unembedding_with_the_same_weights_is_no_change():
    """Some trainers write the tied table twice."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    hf = type(random_hf("llama"))(config)
    other = copy.deepcopy(hf)
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    before, after = load_model((hf, None)), load_model((other, None))
    mask = moved(after, ["L1.mlp.in[2]"])
    assert WeightEdit.between(before, after).mask == mask


@pytest.mark.real
@torch.no_grad()
def test_smollm2_with_one_row_changed(smollm2, tmp_path):
    after = load_model((copy.deepcopy(smollm2.hf), smollm2.tokenizer))
    after.hf.model.layers[12].mlp.down_proj.weight[:, 700] *= -3
    weights = smollm2.fingerprint
    edit = WeightEdit.between(smollm2, after)
    assert edit.mask == ComponentMask.of(["L12.mlp.out[700]"], smollm2.signature)
    edit.save(tmp_path / "edit.safetensors")
    text = "The capital of France is Paris, and the capital of Italy is"
    expected, unedited = after.forward(text), smollm2.forward(text)
    assert not torch.equal(unedited, expected)
    with WeightEdit.load(tmp_path / "edit.safetensors").applied(smollm2):
        assert torch.equal(bits(smollm2.forward(text)), bits(expected))
    assert smollm2.fingerprint == weights


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; runs with `pytest -m gpu` where there is one")
def test_the_trained_model_may_be_on_another_device():
    before, after = twins()
    mask = moved(after, PARTLY)
    expected = {site: after.rows(site) for site in mask.sites}
    after.hf.to("cuda")
    for first, second in ((before, after), (load_model((copy.deepcopy(before.hf), None), device="cuda"), after)):
        edit = WeightEdit.between(first, second)
        assert edit.mask == mask
        assert all(torch.equal(rows, expected[site][edit.units[site]]) for site, rows in edit.rows.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model of which another tool changed some neurons."""
    model = load_model("factworld")
    moved(model, [f"L1.mlp.out[{unit}]" for unit in range(40)])
    folder = tmp_path_factory.mktemp("trained")
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_the_command_evaluates_a_folder(call, trained, monkeypatch, world):
    """It measures the edit that turns the model into that of the folder, beside a control."""
    seen = {}

    def measured(model, edit, **settings):
        seen.update(edit=edit, model=model, **settings)
        raise MechunlearnError("enough")

    monkeypatch.setattr(importlib.import_module("mechunlearn.evaluation.evaluate"), "evaluate", measured)
    code, out, complaint = call("evaluate", "factworld", "factworld/sport", trained, "--forget", 8, "-o", "it.html")
    assert (code, complaint) == (2, "mechunlearn: enough\n")
    assert "WeightEdit(between, 40 units" in out and len(seen["forget"]) == 8
    assert seen["edit"].card.model == world.fingerprint and len(seen["control"].mask) == 40
    with seen["edit"].applied(world):
        assert world.fingerprint == load_model(trained).fingerprint
    code, _, complaint = call("evaluate", "factworld-naive", "factworld/sport", trained, "--forget", 8)
    assert code == 2 and complaint.count("\n") == 1 and "belong to no head or neuron" in complaint


def test_a_card_by_hand_is_still_loaded_by_hand():
    """The message about two models is for edits of `between` alone."""
    before, after = twins()
    moved(after, ["L0.mlp.out[1]"])
    edit = WeightEdit.between(before, after)
    plain = WeightEdit(edit.units, edit.rows, edit.signature, RunCard("by_hand"))
    with pytest.raises(MechunlearnError, match="loaded or put together by hand"):
        plain.remake()
