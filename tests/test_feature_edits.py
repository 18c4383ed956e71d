"""Edits of features and codes: against slow loops by hand, as values, and as folders that Hugging Face loads."""

import inspect
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.artifacts.weight_edit import Edit, WeightEdit
from mechunlearn.core import tensors
from mechunlearn.edit import codebook_delete, dictionary_rows, feature_clamp
from mechunlearn.edit.remake import editor
from mechunlearn.features.dictionaries import check, spliced
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.features.firing import FiringStatistics
from mechunlearn.features.places import installed, signature_of
from mechunlearn.model.hooked import load_model
from tests.handmade import axes, entering, mask_of, random_codebook, random_sae, rows_of_tokens, seldom
from tests.models import CONFIGS, random_hf

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2")
DELETIONS = ("reselect", "zero")


@pytest.fixture(scope="module", params=FAMILIES)
def each(request):
    return load_model((random_hf(request.param), None))


@pytest.fixture(scope="module")
def model():
    return load_model((random_hf("llama"), None))


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(2, 97, (3, 9), generator=torch.Generator().manual_seed(1))


def logits_of(model, tokens, edit=None):
    if edit is None:
        with torch.no_grad():
            return model.forward(tokens)
    with edit.applied(model), torch.no_grad():
        return model.forward(tokens)


def deletion(model, codebook, units, how="reselect") -> FeatureEdit:
    return codebook_delete(model, mask_of(model, codebook, units), dictionary=codebook, how=how)


def clamping(model, sae, units, **settings) -> FeatureEdit:
    return feature_clamp(model, mask_of(model, sae, units), rows_of_tokens(), dictionary=sae, **settings)


def unused(model, codebook, tokens) -> list[int]:
    used = codebook.encode(entering(model, tokens, codebook.hook_name)).sum((0, 1))
    assert (used > 0).any() and (used == 0).any()
    return (used == 0).nonzero().flatten().tolist()


def no_hooks(model) -> bool:
    bare = not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    return bare and not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


class TestWhileItIsApplied:
    @pytest.mark.parametrize("how", DELETIONS)
    @pytest.mark.parametrize("shape", [{}, {"groups": 2}, {"linear": 0}], ids=str)
    def test_deleting_unused_codes_is_bit_identical_to_the_codebook_alone(self, model, tokens, how, shape):
        codebook = random_codebook(model, "L1.resid_post", size=64, used=2, **shape)
        free = unused(model, codebook, tokens)
        with spliced(model, codebook):
            alone = logits_of(model, tokens)
        assert torch.equal(logits_of(model, tokens, deletion(model, codebook, free, how)), alone)
        assert not torch.equal(alone, logits_of(model, tokens)), "the codebook is there"
        one_more = codebook.encode(entering(model, tokens, "L1.resid_post")).sum((0, 1)).argmax().item()
        assert not torch.equal(logits_of(model, tokens, deletion(model, codebook, [one_more], how)), alone)

    def test_a_clamp_changes_nothing_where_no_feature_is_active(self, model, tokens):
        sae = random_sae(model, "L1.resid_post")
        edit = clamping(model, sae, [3], scale=4)
        h = entering(model, tokens, "L1.resid_post")
        active = sae.encode(h)[..., 3] > 0
        assert active.any() and not active.all()
        changed = edit.parts[0].intervention()(h)
        assert torch.equal(changed[~active], h[~active]) and ((changed - h)[active].norm(dim=-1) > 0.1).all()

    def test_delete_and_restore_is_bit_identical(self, each, tokens):
        before = logits_of(each, tokens)
        weights = {name: p.detach().clone() for name, p in each.hf.named_parameters()}
        codebook, sae = random_codebook(each, "L1.resid_post"), random_sae(each, "L0.attn.o")
        edit = deletion(each, codebook, [0, 5]) | clamping(each, sae, [1, 2])
        within = logits_of(each, tokens, edit)
        assert (within - before).abs().max() > 1e-2
        assert torch.equal(logits_of(each, tokens), before)
        edit.apply_(each)
        assert torch.equal(logits_of(each, tokens), within)
        with torch.no_grad():
            torch.testing.assert_close(each.bridge(tokens), within, atol=1e-4, rtol=1e-4, msg="the bridge has it too")
        edit.remove_(each)
        assert torch.equal(logits_of(each, tokens), before) and no_hooks(each)
        assert all(torch.equal(weights[name], p) for name, p in each.hf.named_parameters())

    def test_undo_happens_after_an_error_too(self, model, tokens):
        before = logits_of(model, tokens)
        edit = deletion(model, random_codebook(model, "L1.resid_post"), [0])
        with pytest.raises(RuntimeError, match="inside"), edit.applied(model):
            raise RuntimeError("inside")
        assert torch.equal(logits_of(model, tokens), before) and no_hooks(model)

    def test_an_error_in_the_middle_of_applying_leaves_no_hook(self, model, monkeypatch):
        edit = deletion(model, random_codebook(model, "L1.resid_post"), [0])
        edit |= clamping(model, random_sae(model, "L2.resid_post"), [0])
        monkeypatch.setattr("mechunlearn.features.feature_edit.FeatureClamp", None)
        for act in (edit.apply_, lambda model: edit.applied(model).__enter__()):
            with pytest.raises(TypeError):
                act(model)
            assert no_hooks(model)

    def test_two_edits_are_taken_off_in_any_order(self, model, tokens):
        one = deletion(model, random_codebook(model, "L0.resid_post"), [0, 1])
        two = deletion(model, random_codebook(model, "L1.resid_post", seed=1), [2, 3])
        before, alone, both = (logits_of(model, tokens, edit) for edit in (None, two, one | two))
        one.apply_(model)
        two.apply_(model)
        assert torch.equal(logits_of(model, tokens), both) and not torch.equal(both, alone)
        one.remove_(model)
        assert torch.equal(logits_of(model, tokens), alone)
        with torch.no_grad():
            torch.testing.assert_close(model.bridge(tokens), alone, atol=1e-4, rtol=1e-4)
        two.remove_(model)
        assert torch.equal(logits_of(model, tokens), before) and no_hooks(model)

    def test_applying_twice_and_removing_what_is_not_there_is_refused(self, model):
        edit = deletion(model, random_codebook(model, "L1.resid_post"), [0])
        with pytest.raises(MechunlearnError, match="not applied to this model, so it cannot be taken off"):
            edit.remove_(model)
        edit.apply_(model)
        with pytest.raises(MechunlearnError, match="applied to this model already"):
            edit.apply_(model)
        edit.remove_(model)
        edit.apply_(model)
        edit.remove_(model)
        assert no_hooks(model)

    def test_another_architecture_is_refused_even_if_the_dictionary_says_nothing_of_its_own(self, model, tmp_path):
        other = load_model((random_hf("gpt2"), None))
        edit = clamping(model, random_sae(model, "L1.resid_post"), [0])
        silent = replace(edit.parts[0], dictionary=without_signature(edit.parts[0].dictionary))
        edit = FeatureEdit((silent,), edit.signature, edit.card)
        for act in (edit.apply_, lambda model: edit.export(model, tmp_path / "x")):
            with pytest.raises(MechunlearnError, match=r"The edit is for \(llama.*the model is \(gpt2"):
                act(other)
        assert no_hooks(other) and not (tmp_path / "x").exists()

    def test_gradients_pass_and_reach_below_the_edit(self, model, tokens):
        edit = deletion(model, random_codebook(model, "L1.resid_post"), [0, 1])
        edit |= clamping(model, random_sae(model, "L2.resid_pre"), [1])
        below = model.hf.model.layers[0].mlp.down_proj.weight
        with edit.applied(model):
            (gradient,) = torch.autograd.grad(model.forward(tokens).logsumexp(-1).sum(), below)
        assert gradient.abs().max() > 0

    def test_half_precision(self, tokens):
        model = load_model((random_hf("llama"), None), dtype="bfloat16")
        edit = deletion(model, random_codebook(model, "L0.resid_post"), [0, 1])
        edit |= clamping(model, random_sae(model, "L1.resid_post"), [1])
        assert logits_of(model, tokens, edit).dtype == torch.bfloat16


def without_signature(sae):
    other = type(sae)(sae.sae, sae.hook_name)
    other.signature = None
    return other


class TestAsAValue:
    @pytest.fixture
    def both(self, model) -> FeatureEdit:
        """A deletion, and clamps of two kinds, at three hook points."""
        clamp = clamping(model, random_sae(model, "L1.mlp.out", "topk"), [1, 2], error=False, scale=2)
        last = random_sae(model, "L2.resid_pre", "jumprelu")
        some = seldom(model, last, 2)
        gated = clamping(model, last, some, retain=rows_of_tokens(seed=4), gate="sequence", quantile=0.6, scale=5)
        return deletion(model, random_codebook(model, "L0.resid_post", groups=2), [0, 5, 20], "zero") | clamp | gated

    def test_saving_and_loading_is_bit_identical(self, model, tokens, both, tmp_path):
        both.save(tmp_path / "made.safetensors")
        again = FeatureEdit.load(tmp_path / "made.safetensors")
        assert isinstance(again, Edit) and again.card == both.card and again.mask == both.mask
        assert [part.settings for part in again.parts] == [part.settings for part in both.parts]
        assert again.parts[2].gate == "sequence" and 0 < again.parts[2].share < 1 and not again.parts[1].error
        made = logits_of(model, tokens, both)
        assert torch.equal(logits_of(model, tokens, again), made)
        for i in range(3):  # every part does something
            less = FeatureEdit(both.parts[:i] + both.parts[i + 1 :], both.signature, both.card)
            assert not torch.equal(logits_of(model, tokens, less), made)
        again.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").stat().st_size == (tmp_path / "made.safetensors").stat().st_size

    def test_the_mask_names_what_it_acts_on(self, model, both):
        units = [(component.layer, component.unit) for component in both.mask]
        assert units[:5] == [(0, 0), (0, 5), (0, 20), (1, 1), (1, 2)]
        assert units[5:] == [(2, unit) for unit in both.parts[2].units.tolist()]
        with pytest.raises(MechunlearnError, match="holds features, which live in activations and have no weights"):
            both.mask.parameter_masks(model)

    @pytest.mark.parametrize("hole", ["../../escaped.json", "{outside}", "config.json/../../escaped.json"])
    @pytest.mark.parametrize("where", ["files", "dictionary", "tensor", "weights", "architecture"])
    def test_no_name_in_a_file_becomes_a_path(self, model, both, tmp_path, hole, where):
        """A shared edit file must not be able to write anywhere, whatever its metadata say."""
        outside = tmp_path / "outside.json"
        hole = hole.format(outside=outside)
        both.save(tmp_path / "edit.safetensors")
        held, about = tensors.load(tmp_path / "edit.safetensors", {"feature edit": lambda held, about: (held, about)})
        for part in about["parts"]:
            if where == "dictionary":
                part["dictionary"] = hole
            part["files"] = {hole: "overwritten"}
        if where in ("tensor", "weights"):
            named = f"0/{hole}/" if where == "tensor" else f"0/weights/{hole}"
            held = {name.replace("0/weights/", named, 1): t for name, t in held.items()}
        if where == "architecture":
            about["parts"][1]["described"]["architecture"] = hole
        (tmp_path / "inside").mkdir()
        crafted = tmp_path / "inside" / "crafted.safetensors"
        tensors.save(crafted, "feature edit", held, about)
        before = sorted(tmp_path.rglob("*"))
        if where == "files":
            assert FeatureEdit.load(crafted).mask == both.mask  # the older key is not read at all
        else:
            with pytest.raises(MechunlearnError, match="not a whole"):
                FeatureEdit.load(crafted)
        assert sorted(tmp_path.rglob("*")) == before
        assert not Path(tempfile.gettempdir(), "escaped.json").exists()

    def test_wrong_files_are_refused_in_one_line(self, model, both, tmp_path):
        both.save(tmp_path / "features.safetensors")
        both.mask.save(tmp_path / "mask.safetensors")
        rows = model.rows("L0.mlp.out")[:1]
        WeightEdit({"L0.mlp.out": torch.tensor([0])}, {"L0.mlp.out": rows}, model.signature, both.card).save(
            tmp_path / "weights.safetensors"
        )
        (tmp_path / "text.safetensors").write_text("no tensors")
        whole = (tmp_path / "features.safetensors").read_bytes()
        (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
        lines = {
            "mask": "holds a mask, not a feature edit",
            "weights": "holds a weight edit, not a feature edit",
            "text": "is not a whole feature edit file",
            "half": "is not a whole feature edit file",
            "missing": "Could not read the feature edit file",
        }
        for name, line in lines.items():
            with pytest.raises(MechunlearnError, match=line) as error:
                FeatureEdit.load(tmp_path / f"{name}.safetensors")
            assert "\n" not in str(error.value)
        with pytest.raises(MechunlearnError, match="holds a feature edit, not a weight edit"):
            WeightEdit.load(tmp_path / "features.safetensors")
        with pytest.raises(MechunlearnError, match="A feature edit is not written as 'edit.pt'. Expected .json or"):
            both.save(tmp_path / "edit.pt")

    @pytest.mark.parametrize("how", DELETIONS)
    def test_topics_deleted_one_by_one_are_topics_deleted_at_once(self, model, tokens, how):
        codebook = random_codebook(model, "L1.resid_post")
        one, two, three = (deletion(model, codebook, units, how) for units in ([0, 1], [1, 7], [9]))
        together = logits_of(model, tokens, deletion(model, codebook, [0, 1, 7, 9], how))
        assert torch.equal(logits_of(model, tokens, one | two | three), together)
        assert torch.equal(logits_of(model, tokens, three | (two | one)), together)
        assert not torch.equal(logits_of(model, tokens, one | two), together)
        assert (one | two).parts[0].units.tolist() == [0, 1, 7]

    def test_clamps_combine_unless_they_share_a_feature(self, model, tokens):
        sae = random_sae(model, "L1.resid_post")
        one, two = clamping(model, sae, [2, 3]), clamping(model, sae, [5])
        together = logits_of(model, tokens, clamping(model, sae, [2, 3, 5]))
        torch.testing.assert_close(logits_of(model, tokens, two | one), together, atol=1e-6, rtol=0)
        with pytest.raises(MechunlearnError, match=rf"overlap in 2 features, the first is {sae.site}\[2\]"):
            _ = one | clamping(model, sae, [2, 3, 11])

    def test_what_does_not_combine_is_refused(self, model):
        codebook, sae = random_codebook(model, "L1.resid_post"), random_sae(model, "L1.resid_post")
        with pytest.raises(MechunlearnError, match="in different ways.*Make both with the same settings"):
            _ = deletion(model, codebook, [0]) | deletion(model, codebook, [1], "zero")
        with pytest.raises(MechunlearnError, match="in different ways"):
            _ = clamping(model, sae, [0]) | clamping(model, sae, [1], error=False)
        with pytest.raises(MechunlearnError, match="Two edits at one hook point .L1.resid_post."):
            _ = deletion(model, codebook, [0]) | clamping(model, sae, [0])
        with pytest.raises(MechunlearnError, match="Two edits at one hook point .L1.resid_post."):
            _ = deletion(model, codebook, [0]) | deletion(model, random_codebook(model, "L1.resid_post", seed=1), [0])
        other = load_model((random_hf("gpt2"), None))
        with pytest.raises(MechunlearnError, match=r"Edits of different architectures: \(llama.*\(gpt2"):
            _ = clamping(model, sae, [0]) | clamping(other, random_sae(other, "L0.resid_post"), [0])

    def test_topics_that_leave_too_few_codes_together_are_refused(self, model):
        codebook = random_codebook(model, "L1.resid_post", size=8, used=3)
        one, two = deletion(model, codebook, [0, 1, 2]), deletion(model, codebook, [3, 4, 5])
        with pytest.raises(MechunlearnError, match="Only 2 codes of Codebook.*would be left"):
            _ = one | two
        _ = deletion(model, codebook, [0, 1, 2], "zero") | deletion(model, codebook, [3, 4, 5], "zero")

    def test_values_that_are_not_finite_and_units_that_are_not_there_are_refused(self, model):
        edit = clamping(model, random_sae(model, "L1.resid_post"), [0])
        for change, line in (
            ({"values": torch.tensor([torch.nan])}, "not finite"),
            ({"units": torch.tensor([24])}, "Unit 24 is out of range: SAE.24"),
        ):
            with pytest.raises(MechunlearnError, match=line):
                FeatureEdit((replace(edit.parts[0], **change),), edit.signature, edit.card)

    def test_it_says_what_it_does(self, both):
        assert "3 of Codebook(24 codes, 3 used, L0.resid_post, width 32) zero" in repr(both)
        assert both.card.method == "codebook_delete | feature_clamp | feature_clamp"


def exported(edit, model, folder, auto=AutoModelForCausalLM):
    edit.export(model, folder)
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


class TestExport:
    def test_deletion_and_a_gate_on_the_sequence(self, each, tokens, tmp_path):
        sae = random_sae(each, "L1.mlp_out")
        edit = deletion(each, random_codebook(each, "L0.resid_post", groups=2), [0, 3, 15])
        gate = {"gate": "sequence", "retain": rows_of_tokens(texts=20, seed=3), "quantile": 0.4}
        edit |= clamping(each, sae, seldom(each, sae, 3), scale=5, **gate)
        loaded = exported(edit, each, tmp_path / "edited")
        wanted = logits_of(each, tokens, edit)
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, wanted, atol=1e-5, rtol=0)
        assert (wanted - logits_of(each, tokens)).abs().max() > 1e-2
        for part in edit.parts:  # each is needed
            alone = FeatureEdit((part,), edit.signature, edit.card)
            assert (logits_of(each, tokens, alone) - wanted).abs().max() > 1e-3

    def test_empty_places_and_clamps_by_token(self, each, tokens, tmp_path):
        codebook = random_codebook(each, "L1.resid_pre", linear=0)
        edit = deletion(each, codebook, [0, 1, 2, 3, 4, 5, 6], "zero")
        edit |= clamping(each, random_sae(each, "L0.attn.o", "jumprelu"), range(12), error=False, scale=3)
        edit |= clamping(each, random_sae(each, "L2.mlp.out", "topk"), range(8), scale=3)
        loaded = exported(edit, each, tmp_path / "edited")
        wanted = logits_of(each, tokens, edit)
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, wanted, atol=1e-5, rtol=0)
        for i in range(3):
            less = FeatureEdit(edit.parts[:i] + edit.parts[i + 1 :], edit.signature, edit.card)
            assert (logits_of(each, tokens, less) - wanted).abs().max() > 1e-3

    @pytest.mark.parametrize("family", [family for family in CONFIGS if family not in FAMILIES])
    def test_every_other_architecture(self, family, tokens, tmp_path):
        other = load_model((random_hf(family), None))
        edit = deletion(other, random_codebook(other, "L1.resid_post"), [0, 1, 2, 3])
        loaded, wanted = exported(edit, other, tmp_path / "edited"), logits_of(other, tokens, edit)
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, wanted, atol=1e-5, rtol=0)

    def test_without_trust_it_does_not_load(self, model, tmp_path):
        deletion(model, random_codebook(model, "L1.resid_post"), [0]).export(model, tmp_path / "edited")
        for trust in ({"trust_remote_code": False}, {}):
            with pytest.raises(ValueError, match="custom code"):
                AutoModelForCausalLM.from_pretrained(tmp_path / "edited", **trust)
        with pytest.raises(MechunlearnError, match="Could not load a model"):
            load_model(str(tmp_path / "edited"))
        assert json.loads((tmp_path / "edited/mechunlearn.json").read_text())["method"] == "codebook_delete"
        with pytest.raises(MechunlearnError, match="exists and is not an empty folder"):
            deletion(model, random_codebook(model, "L1.resid_post"), [0]).export(model, tmp_path / "edited")

    def test_two_folders_of_one_name_do_not_get_mixed(self, model, tokens, tmp_path):
        other = load_model((random_hf("gpt2"), None))
        for part, of in (("a", model), ("b", other)):
            edit = deletion(of, random_codebook(of, "L1.resid_post"), [0])
            loaded = exported(edit, of, tmp_path / part / "edited")
            with torch.no_grad():
                torch.testing.assert_close(loaded(tokens).logits, logits_of(of, tokens, edit), atol=1e-5, rtol=0)

    def test_a_checkpoint_in_shards(self, model, tokens, tmp_path, monkeypatch):
        monkeypatch.setattr(model.hf, "save_pretrained", partial(model.hf.save_pretrained, max_shard_size="20KB"))
        edit = deletion(model, random_codebook(model, "L1.resid_post"), [0, 1])
        loaded = exported(edit, model, tmp_path / "edited")
        assert len(list((tmp_path / "edited").glob("model-*.safetensors"))) > 1
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, logits_of(model, tokens, edit), atol=1e-5, rtol=0)

    def test_the_exported_model_saves_itself_whole(self, model, tokens, tmp_path):
        loaded = exported(deletion(model, random_codebook(model, "L1.resid_post"), [0, 1]), model, tmp_path / "one")
        loaded.save_pretrained(tmp_path / "two")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True).eval()
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, loaded(tokens).logits)

    def test_generation_sees_what_a_gate_on_the_sequence_sees(self, model, tokens, tmp_path):
        sae = random_sae(model, "L1.resid_post")
        gate = {"gate": "sequence", "retain": rows_of_tokens(texts=20, seed=3), "quantile": 0.7}
        edit = clamping(model, sae, seldom(model, sae, 4), scale=20, **gate)
        loaded = exported(edit, model, tmp_path / "edited")
        grown = tokens
        with edit.applied(model), torch.no_grad():
            for _ in range(12):
                grown = torch.cat([grown, model.forward(grown)[:, -1:].argmax(-1)], 1)
        settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(tokens)
        assert torch.equal(loaded.generate(tokens, attention_mask=mask, **settings), grown)
        cached = loaded.generate(tokens, attention_mask=mask, use_cache=True, **settings)
        assert not torch.equal(cached, grown), "a cache would have been seen"

    @pytest.mark.parametrize("kind", ["resid_mid", "attn.q", "attn.v"])
    def test_a_point_between_modules_is_refused(self, model, tokens, kind, tmp_path):
        edit = deletion(model, random_codebook(model, f"L1.{kind}"), [0])
        assert not torch.equal(logits_of(model, tokens, edit), logits_of(model, tokens))
        with pytest.raises(MechunlearnError, match=f"An edit at 'L1.{kind}' cannot be exported: no module"):
            edit.export(model, tmp_path / "edited")
        assert not (tmp_path / "edited").exists()

    def test_the_dictionary_stays_where_it_is(self, model, tmp_path):
        codebook = random_codebook(model, "L1.resid_post")
        before = {name: t.clone() for name, t in codebook.state_dict().items()}
        deletion(model, codebook, [0]).export(model, tmp_path / "edited")
        assert all(torch.equal(before[name], t) for name, t in codebook.state_dict().items())


class TestEncoderDecoder:
    def test_a_deletion_in_the_encoder_and_its_folder(self, t5, tokens, tmp_path):
        def logits(model):
            with torch.no_grad():
                return model(input_ids=tokens, decoder_input_ids=tokens[:, :4]).logits

        codebook = random_codebook(t5, "encoder.block.1")
        before = logits(t5)
        with spliced(t5, codebook):
            alone = logits(t5)
        found = []
        with installed(t5, "encoder.block.1", lambda h: found.append(codebook.encode(h).sum((0, 1)))):
            logits(t5)
        often = found[0].topk(3).indices.tolist()
        edit = deletion(t5, codebook, often)
        with edit.applied(t5):
            within = logits(t5)
        assert (within - alone).abs().max() > 1e-4 and (alone - before).abs().max() > 1e-4
        assert torch.equal(logits(t5), before)
        edit.save(tmp_path / "edit.safetensors")
        with FeatureEdit.load(tmp_path / "edit.safetensors").applied(t5):
            assert torch.equal(logits(t5), within)
        loaded = exported(edit, t5, tmp_path / "edited", AutoModelForSeq2SeqLM)
        torch.testing.assert_close(logits(loaded), within, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="custom code"):
            AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "edited", trust_remote_code=False)

    def test_the_same_modules_by_path_without_a_layout(self, model, tokens, tmp_path):
        """A hook point of an ordinary module is a path, and the edit is the same."""
        hooked = random_codebook(model, "L1.resid_post")
        plain = random_codebook(model.hf, "model.layers.1")
        assert torch.equal(plain.codes, hooked.codes)
        wanted = logits_of(model, tokens, deletion(model, hooked, [0, 1]))
        edit = deletion(model.hf, plain, [0, 1])
        with edit.applied(model.hf), torch.no_grad():
            assert torch.equal(model.hf(tokens).logits, wanted)


def nearest_by_hand(codebook, h, deleted=(), used=None):
    """Ids by group, nearest first, from a full sort of every cosine."""
    x = h if codebook.encoder is None else torch.relu(codebook.encoder.weight @ h + codebook.encoder.bias)
    each = codebook.size // codebook.groups
    ids = []
    for group, part in enumerate(x.chunk(codebook.groups)):
        near = {
            unit: float(torch.cosine_similarity(part, codebook.codes[unit], dim=0))
            for unit in range(group * each, (group + 1) * each)
            if unit not in deleted
        }
        ids.append(sorted(near, key=lambda unit: -near[unit])[: used or codebook.used])
    return ids


def decoded_by_hand(codebook, ids, missing=()):
    parts = [
        sum((codebook.codes[unit] for unit in group if unit not in missing), torch.zeros(codebook.codes.shape[1]))
        for group in ids
    ]
    summed = torch.cat(parts)
    return summed if codebook.decoder is None else codebook.decoder.weight @ summed + codebook.decoder.bias


@pytest.mark.parametrize("shape", [{}, {"groups": 2}, {"linear": 0}], ids=str)
class TestCodebookDelete:
    @pytest.fixture
    def at(self, model, tokens, shape):
        codebook = random_codebook(model, "L1.resid_post", **shape)
        h = entering(model, tokens, "L1.resid_post")
        often = codebook.encode(h).sum((0, 1)).topk(3).indices.tolist()
        return codebook, h, often

    def test_reselect_fills_the_place_with_the_next_nearest_code(self, model, at, shape):
        codebook, h, often = at
        edit = deletion(model, codebook, often)
        seen = []
        handle = codebook.hook_ids.register_forward_hook(lambda module, args, out: seen.append(out))
        with torch.no_grad():
            out = edit.parts[0].intervention()(h)
        handle.remove()
        filled = 0
        with torch.no_grad():
            for row, pos in np.ndindex(*h.shape[:2]):
                ids = nearest_by_hand(codebook, h[row, pos], often)
                assert set(seen[0][row, pos].tolist()) == {unit for group in ids for unit in group}
                torch.testing.assert_close(out[row, pos], decoded_by_hand(codebook, ids), atol=1e-5, rtol=1e-4)
                for group, before in zip(ids, nearest_by_hand(codebook, h[row, pos], used=codebook.used + 3)):
                    kept = [unit for unit in before[: codebook.used] if unit not in often]
                    rest = [unit for unit in before[codebook.used :] if unit not in often]
                    assert group == kept + rest[: codebook.used - len(kept)]
                    filled += codebook.used - len(kept)
        assert filled > 10, "places were to be filled"

    def test_zero_leaves_the_place_empty(self, model, at, shape):
        codebook, h, often = at
        with torch.no_grad():
            out = deletion(model, codebook, often, "zero").parts[0].intervention()(h)
            for row, pos in np.ndindex(*h.shape[:2]):
                ids = nearest_by_hand(codebook, h[row, pos])
                by_hand = decoded_by_hand(codebook, ids, often)
                torch.testing.assert_close(out[row, pos], by_hand, atol=1e-5, rtol=1e-4)


class TestCodebookDeleteRefuses:
    def test_bad_input(self, model):
        codebook, other = random_codebook(model, "L1.resid_post"), random_codebook(model, "L1.resid_post", seed=1)
        none, wrong = mask_of(model, codebook, []), mask_of(model, other, [0])
        heads = ComponentMask.of(["L1.attn.o[0]"], model.signature)
        everything = mask_of(model, codebook, range(22))
        sae = random_sae(model, "L1.resid_post")
        cases = [
            ({}, none, codebook, "The mask selects nothing of Codebook.24 codes"),
            ({}, wrong, codebook, f"selects units of {other.site}; the dictionary is '{codebook.site}'"),
            ({}, heads, codebook, "selects units of L1.attn.o; the dictionary is"),
            ({}, everything, codebook, "Only 2 codes of Codebook.*fewer than are used.*or how='zero'"),
            ({}, mask_of(model, sae, [0]), sae, "is no codebook: clamp its features with feature_clamp"),
            (
                {"how": "drop"},
                mask_of(model, codebook, [0]),
                codebook,
                "codebook_delete got how='drop'. Expected one of reselect, zero",
            ),
        ]
        for settings, mask, dictionary, line in cases:
            with pytest.raises(MechunlearnError, match=line) as error:
                call_without_types(codebook_delete, model, mask, dictionary=dictionary, **settings)
            assert "\n" not in str(error.value)
        codebook_delete(model, everything, dictionary=codebook, how="zero")

    def test_a_group_with_too_few_codes(self, model):
        codebook = random_codebook(model, "L1.resid_post", size=8, used=2, groups=2)
        deletion(model, codebook, [0, 1, 4, 5])
        with pytest.raises(MechunlearnError, match="Only 1 codes of Codebook.*would be left in a group"):
            deletion(model, codebook, [0, 1, 2])

    def test_a_dictionary_of_another_model(self, model):
        other = load_model((random_hf("gpt2"), None))
        codebook = random_codebook(other, "L1.resid_post")
        with pytest.raises(MechunlearnError, match=r"was made for \(gpt2.*the model is \(llama"):
            codebook_delete(model, mask_of(model, codebook, [0]), dictionary=codebook)


def call_without_types(function, *args, **kwargs):
    """Past the type checks of the tests, as a user's interpreter has none."""
    return editor(inspect.unwrap(function))(*args, **kwargs)


class TestFeatureClamp:
    @pytest.fixture(params=["relu", "topk", "jumprelu"])
    def sae(self, request, model):
        return random_sae(model, "L1.resid_post", request.param)

    @pytest.mark.parametrize("strength", [0, 1, 2.5])
    def test_values_are_minus_the_strength_times_the_largest_on_the_forget_text(self, model, sae, strength):
        forget = rows_of_tokens(seed=2)
        largest = torch.zeros(sae.size)
        for row, length in zip(*forget):
            h = entering(model, row[None, :length], sae.hook_name)
            largest = torch.maximum(largest, sae.encode(h).amax((0, 1)))
        units = [0, 3, 7, 12]
        edit = feature_clamp(model, mask_of(model, sae, units), forget, dictionary=sae, scale=strength)
        assert edit.parts[0].units.tolist() == units
        torch.testing.assert_close(edit.parts[0].values, -strength * largest[units], atol=1e-5, rtol=1e-5)
        assert edit.card.settings["scale"] == strength
        seen = FiringStatistics.of(model, sae, forget)
        again = feature_clamp(model, mask_of(model, sae, units), seen, dictionary=sae, scale=strength)
        assert torch.equal(again.parts[0].values, edit.parts[0].values)

    @pytest.mark.parametrize("error", [True, False])
    @pytest.mark.parametrize("gate", ["token", "sequence"])
    def test_against_a_slow_loop(self, model, sae, tokens, error, gate):
        units, retain = seldom(model, sae, 3), rows_of_tokens(texts=20, seed=5)
        edit = clamping(model, sae, units, scale=2, error=error, gate=gate, retain=retain, quantile=0.6)
        part = replace(edit.parts[0], share=0.5)
        h = entering(model, tokens, sae.hook_name)
        with torch.no_grad():
            out = part.intervention()(h)
            changed = 0
            for row in range(len(h)):
                fired = []
                for pos in range(h.shape[1]):
                    z = sae.encode(h[row, pos][None])[0]
                    fired.append(any(z[unit] > 0 for unit in units))
                    now = z.clone()
                    if gate == "token" or sum(fired) / len(fired) > 0.5:
                        for value, unit in zip(part.values, units):
                            now[unit] = value if z[unit] > 0 else 0
                    changed += not torch.equal(now, z)
                    wanted = sae.decode(now[None])[0]
                    wanted = wanted + h[row, pos] - sae.decode(z[None])[0] if error else wanted
                    torch.testing.assert_close(out[row, pos], wanted, atol=1e-5, rtol=1e-4)
            assert changed, "the loop was to change something"

    def test_the_gate_on_the_sequence_is_the_quantile_over_retain_tokens(self, model, sae):
        tokens, lengths = rows_of_tokens(texts=9, length=12, seed=6)
        units, shares = seldom(model, sae, 1), []
        for row, length in zip(tokens, lengths):
            active = (sae.encode(entering(model, row[None, :length], sae.hook_name))[0][:, units] > 0).any(-1)
            shares += [float(active[: i + 1].float().mean()) for i in range(int(length))]
        assert len(set(shares)) > 5
        for quantile in (0.4, 0.7):
            edit = clamping(model, sae, units, gate="sequence", retain=(tokens, lengths), quantile=quantile)
            assert edit.parts[0].share == pytest.approx(np.quantile(shares, quantile), abs=1e-6)
        assert clamping(model, sae, units).parts[0].share == 0

    def test_the_gate_on_the_sequence_looks_at_the_past_alone(self, model, sae, tokens):
        gate = {"gate": "sequence", "retain": rows_of_tokens(texts=20, seed=5), "quantile": 0.6}
        edit = clamping(model, sae, seldom(model, sae, 3), **gate)
        do, h = edit.parts[0].intervention(), entering(model, tokens, sae.hook_name)
        with torch.no_grad():
            whole = do(h)
            for cut in range(1, h.shape[1]):
                torch.testing.assert_close(do(h[:, :cut]), whole[:, :cut], atol=1e-6, rtol=0)
            by_token = replace(edit.parts[0], gate="token").intervention()(h)
        assert not torch.equal(by_token, whole) and not torch.equal(whole, h), "a gate that is shut at times"

    def test_the_gate_on_the_sequence_opens_above_its_share(self, model):
        """Active at every other token from the second on: shares of 0, 1/2, 1/3, 1/2."""
        sae = axes(model, "L1.resid_post")
        part = clamping(model, sae, [4], scale=2).parts[0]
        h = torch.ones(1, 4, 32)
        h[0, [0, 2], 4] = 0
        for share, opened in ((0.5, []), (0.49, [1, 3]), (0.0, [1, 3])):
            out = replace(part, gate="sequence", share=share).intervention()(h)
            assert (out != h).any(-1)[0].nonzero().flatten().tolist() == opened
            assert (out[0, opened, 4] == part.values[0]).all()

    def test_strength_0_ablates(self, model, tokens):
        sae = axes(model, "L1.resid_post")
        h = entering(model, tokens, sae.hook_name)
        out = clamping(model, sae, [4, 5], scale=0).parts[0].intervention()(h)
        assert (out[..., 4:6] <= 0).all() and (h[..., 4:6] > 0).any()
        below = h[..., 4:6].clamp(max=0)  # what this dictionary misses, and the error term keeps
        torch.testing.assert_close(out[..., 4:6], below, atol=1e-6, rtol=0)
        assert torch.equal(out[..., 6:], h[..., 6:])

    def test_bad_input(self, model):
        sae, codebook = random_sae(model, "L1.resid_post"), random_codebook(model, "L1.resid_post")
        mask, forget = mask_of(model, sae, [0, 1]), rows_of_tokens()
        other = random_sae(model, "L1.resid_post", seed=1)
        smaller = FiringStatistics.of(model, random_sae(model, "L1.resid_post", size=8), forget)
        with torch.no_grad():
            other.sae.b_enc[2] = -100.0
        cases = [
            ((mask, forget), {"dictionary": codebook}, "has codes, which are used or not: delete them with codebook_delete"),
            ((mask, forget), {"scale": -1}, "feature_clamp got scale=-1. Expected a number, 0 or more"),
            ((mask_of(model, sae, []), forget), {}, "The mask selects nothing of SAE"),
            ((mask_of(model, other, [0]), forget), {}, "selects units of .*; the dictionary is"),
            ((mask_of(model, other, [2]), forget), {"dictionary": other}, "activates none of the mask's features"),
            ((mask, forget), {"gate": "sequence"}, "A sequence gate is set by retain text: give retain, or gate='token'"),
            ((mask, forget), {"gate": "text"}, "feature_clamp got gate='text'. Expected one of token, sequence"),
            ((mask, forget, forget), {"gate": "sequence", "quantile": 95}, "feature_clamp got quantile=95. Expected a share, from 0 to 1"),
            ((mask, forget, forget), {"gate": "sequence", "quantile": 1}, "at the quantile 1: the gate would never open"),
            ((mask, []), {}, "The text is empty"),
            ((mask, smaller), {}, "The activity is of 8 units, SAE"),
        ]  # fmt: skip
        for args, settings, line in cases:
            with pytest.raises(MechunlearnError, match=line) as error:
                call_without_types(feature_clamp, model, *args, **{"dictionary": sae, **settings})
            assert "\n" not in str(error.value)


class TestDictionaryRows:
    @pytest.mark.parametrize("strength", [0, 1, 2])
    def test_against_a_slow_loop(self, model, strength):
        sae, units, forget = random_sae(model, "L1.resid_post"), [0, 3, 7], rows_of_tokens()
        edit = dictionary_rows(model, mask_of(model, sae, units), forget, dictionary=sae, scale=strength)
        tokens, lengths = forget
        norms = [
            h.norm()
            for row, length in zip(tokens, lengths)
            for h in entering(model, row[None, :length], sae.hook_name)[0]
        ]
        norm, directions = torch.stack(norms).mean(), sae.directions
        touched = {(component.site, component.unit) for component in edit.mask}
        assert {site for site, _ in touched} == {"L0.mlp.out", "L1.mlp.out"}
        seen = 0
        for site in ("L0.mlp.out", "L1.mlp.out"):
            new = dict(zip(edit.units[site].tolist(), edit.rows[site]))
            for unit, row in enumerate(model.rows(site)):
                scale = norm / row.norm()
                both = {sign: sae.encode((sign * row * scale)[None])[0] for sign in (1, -1)}
                sign = max(both, key=lambda sign: float(both[sign][units].sum()))
                z = both[sign][units]
                if not (z > 0).any():
                    assert (site, unit) not in touched
                    continue
                seen += 1
                wanted = row - sign * (1 + strength) * (z @ directions[units]) / scale
                torch.testing.assert_close(new[unit], wanted, atol=1e-5, rtol=1e-4)
        assert seen == len(touched) and 0 < seen < 2 * model.signature.d_mlp

    def test_rows_without_the_feature_and_all_other_weights_are_untouched(self, each):
        sae = random_sae(each, "L1.resid_mid" if not each.layout.parallel else "L1.resid_post")
        edit = dictionary_rows(each, mask_of(each, sae, [2]), rows_of_tokens(), dictionary=sae)
        before = {name: p.detach().clone() for name, p in each.hf.named_parameters()}
        inside = edit.mask.parameter_masks(each)
        assert 0 < len(edit.mask) < each.signature.d_mlp * 2
        assert {component.layer for component in edit.mask} == ({0} if not each.layout.parallel else {0, 1})
        with edit.applied(each):
            for name, parameter in each.hf.named_parameters():
                outside = ~inside.get(name, torch.zeros_like(parameter, dtype=torch.bool))
                assert torch.equal(parameter[outside], before[name][outside])
                assert name not in inside or not torch.equal(parameter, before[name])
        assert all(torch.equal(before[name], p) for name, p in each.hf.named_parameters())

    def test_neurons_no_longer_write_the_feature(self, each, tokens):
        """What a changed row adds to the residual stream, behind the norm that may follow the MLP, lacks the direction."""
        site = "L1.resid_post"
        sae, unit = axes(each, site), 5
        edit = dictionary_rows(each, mask_of(each, sae, [unit]), rows_of_tokens(), dictionary=sae, scale=0)
        for layer in (0, 1):
            rows = each.rows(f"L{layer}.mlp.out")
            with edit.applied(each):
                after = each.rows(f"L{layer}.mlp.out")
            assert rows[:, unit].abs().min() > 1e-3 * rows[:, unit].abs().max()
            assert after[:, unit].abs().max() < 0.05 * rows[:, unit].abs().max()
            rest = torch.arange(rows.shape[1]) != unit
            torch.testing.assert_close(after[:, rest], rows[:, rest], atol=1e-6, rtol=0)

    def test_a_norm_behind_the_mlp_is_seen(self):
        """In Gemma 2 a row reaches the stream times the norm's weights: a feature is looked for there."""
        hf = random_hf("gemma2")
        sae_dim = 5
        with torch.no_grad():  # all that neurons write along this dimension is taken away by the norm
            hf.model.layers[0].post_feedforward_layernorm.weight.fill_(0.5)
            hf.model.layers[0].post_feedforward_layernorm.weight[sae_dim] = -1.0
        model = load_model((hf, None))
        sae = axes(model, "L0.resid_post")
        with pytest.raises(MechunlearnError, match="No MLP row has any of the mask's features"):
            dictionary_rows(model, mask_of(model, sae, [sae_dim]), rows_of_tokens(), dictionary=sae)
        edit = dictionary_rows(model, mask_of(model, sae, [4]), rows_of_tokens(), dictionary=sae, scale=0)
        assert edit.rows["L0.mlp.out"][:, 4].abs().max() < 0.01 * model.rows("L0.mlp.out")[:, 4].abs().max()

    def test_the_export_is_an_ordinary_checkpoint(self, model, tokens, tmp_path):
        sae = random_sae(model, "L1.resid_post")
        edit = dictionary_rows(model, mask_of(model, sae, [0, 1]), rows_of_tokens(), dictionary=sae, scale=5)
        assert isinstance(edit, WeightEdit)
        edit.export(model, tmp_path / "edited")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
        wanted = logits_of(model, tokens, edit)
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, wanted, atol=1e-5, rtol=0)
        assert (wanted - logits_of(model, tokens)).abs().max() > 1e-2

    def test_bad_input(self, model):
        sae, codebook = random_sae(model, "L1.resid_post"), random_codebook(model, "L1.resid_post")
        early, silent = random_sae(model, "L0.resid_pre"), random_sae(model, "L1.resid_post", seed=1)
        inner = random_sae(model, "L1.mlp_out")
        with torch.no_grad():
            silent.sae.b_enc[2] = -100.0
        cases = [
            (codebook, [0], {}, "is no SAE: its codes are not directions"),
            (sae, [], {}, "The mask selects nothing of SAE"),
            (sae, [0], {"scale": -0.5}, "dictionary_rows got scale=-0.5. Expected a number, 0 or more"),
            (inner, [0], {}, "'L1.mlp_out' is no residual stream"),
            (early, [0], {}, "No MLP row has any of the mask's features"),
            (silent, [2], {}, "No MLP row has any of the mask's features"),
        ]
        for dictionary, units, settings, line in cases:
            with pytest.raises(MechunlearnError, match=line):
                mask = mask_of(model, dictionary, units)
                call_without_types(dictionary_rows, model, mask, rows_of_tokens(), dictionary=dictionary, **settings)
        with pytest.raises(MechunlearnError, match="selects units of"):
            dictionary_rows(model, mask_of(model, silent, [0]), rows_of_tokens(), dictionary=sae)


def test_the_dictionaries_of_the_tests_fit_their_models(each):
    """That a refusal above is of what it says, and not of the dictionary."""
    for site in ("L1.resid_post", "L0.attn.o", "L2.mlp.out"):
        check(random_codebook(each, site), each)
        check(random_sae(each, site), each)
    seen = FiringStatistics.of(each, random_sae(each, "L1.resid_post"), rows_of_tokens())
    assert ((seen.rates() > 0) & (seen.rates() < 1)).sum() > 5
    assert signature_of(each) == each.signature
