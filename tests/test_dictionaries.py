"""Codebooks and SAEs compute what they say, stand at the points they name, leave no trace, and survive disk and sae-lens."""

import functools
import json
import shutil

import pytest
import sae_lens
import torch
import transformers
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mechunlearn import MechunlearnError, load_model
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.features.dictionaries import SAE, Codebook, check, load_dictionary, spliced
from mechunlearn.features.firing import FiringStatistics, matched_mask, matched_units, quality, swapped, tokenized
from mechunlearn.features.interventions import CodeDeletion, FeatureClamp, PlainSAE, build
from mechunlearn.features.places import fingerprint_of, installed, place, signature_of, width
from mechunlearn.model.hook_points import HOOK_POINTS, hook_name_of, site_of
from tests.models import random_hf, token_prompts

SITES = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out", "attn.q", "attn.k", "attn.o", "mlp.out")


@functools.cache
def family(name: str):
    """A tiny random model, made once; nothing here changes its weights."""
    return load_model((random_hf(name), None))


def tokens(count: int = 3, length: int = 8, seed: int = 0):
    return torch.randint(2, 60, (count, length), generator=torch.Generator().manual_seed(seed))


def codebook(d_model: int = 32, size: int = 24, used: int = 3, hook_name: str = "L1.resid_post", **about) -> Codebook:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return Codebook(d_model, size, used, hook_name=hook_name, **about).eval()


def sae(kind: str = "topk", d_model: int = 32, size: int = 40, hook_name: str | None = "L1.resid_post", **about) -> SAE:
    """Random weights everywhere, decoder rows of different norms."""
    cfg_class, sae_class = {
        "standard": (sae_lens.StandardSAEConfig, sae_lens.StandardSAE),
        "jumprelu": (sae_lens.JumpReLUSAEConfig, sae_lens.JumpReLUSAE),
        "topk": (sae_lens.TopKSAEConfig, sae_lens.TopKSAE),
        "gated": (GatedSAEConfig, GatedSAE),
    }[kind]
    made = sae_class(cfg_class(d_in=d_model, d_sae=size, **({"k": 4} if kind == "topk" else {}), **about))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        made.W_dec.mul_(torch.linspace(0.3, 3, size)[:, None])
        if kind == "jumprelu":
            made.threshold.abs_()
    return SAE(made, hook_name)


@pytest.fixture
def t5():
    return random_t5()


def random_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A tiny model with a tokenizer: word `w05` is token 5, a text starts with w00."""
    made = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(97)}, unk_token="w01"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="w00 $A", special_tokens=[("w00", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="w00", pad_token="w00", eos_token="w01")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)  # a bridge takes only tokenizers that come from disk
    return load_model((random_hf("llama"), PreTrainedTokenizerFast.from_pretrained(folder)))


TEXTS = ("w05 w09 w12", "w07 w08 w30 w31 w40 w41", "w09", "w22 w05 w05 w13")


# what a codebook computes


def naive(made: Codebook, h, used: int | None = None, without=frozenset(), zero=frozenset()):
    """One token: ids by group nearest first, and what takes its place."""
    x = h if made.encoder is None else (made.encoder.weight @ h + made.encoder.bias).clamp(min=0)
    each, part = made.size // made.groups, len(x) // made.groups
    ids, out = [], []
    for group in range(made.groups):
        mine = x[group * part : (group + 1) * part]
        allowed = [i for i in range(group * each, (group + 1) * each) if i not in without]
        near = sorted(allowed, key=lambda i: -float(functional.cosine_similarity(mine, made.codes[i], dim=0)))
        ids += near[: used or made.used]
        out.append(sum((made.codes[i] for i in near[: made.used] if i not in zero), torch.zeros(part)))
    out = torch.cat(out)
    return ids, out if made.decoder is None else made.decoder.weight @ out + made.decoder.bias


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("linear", [0, 2])
@torch.no_grad()
def test_a_codebook_equals_a_loop_over_tokens(groups, linear):
    made = codebook(12, 20, 3, groups=groups, linear=linear)
    h = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))
    flat = h.view(-1, 12)
    ids, out = zip(*(naive(made, one) for one in flat))
    assert made.nearest(made.entering(h)).view(10, -1).tolist() == list(ids)
    torch.testing.assert_close(made(h).view(10, 12), torch.stack(out))
    counts = torch.stack([torch.bincount(torch.tensor(one), minlength=20).float() for one in ids]).view(2, 5, 20)
    assert torch.equal(made.encode(h), counts)
    torch.testing.assert_close(made.decode(made.encode(h)), made(h), atol=1e-5, rtol=0)
    more = made.nearest(made.entering(h), used=5).view(10, -1)
    assert more.tolist() == [naive(made, one, used=5)[0] for one in flat]
    gone = {ids[0][0], ids[1][0], ids[4][-1]}
    without = torch.zeros(20, dtype=torch.bool)
    without[list(gone)] = True
    assert made.nearest(made.entering(h), without=without).view(10, -1).tolist() == [
        naive(made, one, without=gone)[0] for one in flat
    ]
    for reselect in (True, False):
        expected = [naive(made, one, without=gone if reselect else (), zero=gone)[1] for one in flat]
        torch.testing.assert_close(CodeDeletion(made, without, reselect)(h).view(10, 12), torch.stack(expected))


@torch.no_grad()
def test_deleting_a_code_that_nothing_uses_changes_no_bit():
    made = codebook()
    h = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(3))
    unused = made.encode(h).sum((0, 1)) == 0
    assert unused.any()
    for reselect in (True, False):
        assert torch.equal(CodeDeletion(made, unused, reselect)(h), made(h))


@pytest.mark.parametrize("linear", [0, 2])
def test_gradients_reach_the_input_as_if_nothing_stood_between(linear):
    made = codebook(12, 20, 3, linear=linear)
    h = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    into = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    (got,) = torch.autograd.grad((made(h) * into).sum(), h)
    torch.testing.assert_close(got, into)
    (to_codes,) = torch.autograd.grad((made(h) * into).sum(), made.codes)
    used = made.encode(h).sum(0) > 0
    assert (to_codes.abs().sum(-1) > 0).equal(used)


@torch.no_grad()
def test_ids_go_through_a_hook_that_sees_and_replaces_them():
    made = codebook(12, 20, 3)
    h = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))
    seen = []
    handle = made.hook_ids.register_forward_hook(lambda module, args, out: seen.append(out))
    plain = made(h)
    handle.remove()
    assert torch.equal(seen[0], made.nearest(made.entering(h)))
    handle = made.hook_ids.register_forward_hook(lambda module, args, out: torch.full_like(out, 7))
    expected = made.leaving(3 * made.codes[7]).expand(2, 5, 12)
    torch.testing.assert_close(made(h), expected)
    handle.remove()
    assert torch.equal(made(h), plain)


@pytest.mark.parametrize(
    "size, used, groups, told",
    [
        (4, 5, 1, "4 codes cannot use 5"),
        (8, 3, 4, "2 codes a group cannot use 3"),
        (9, 1, 2, "divides both"),
        (9, 1, 9, "divides both"),
        (4, 0, 1, "at least one used"),
    ],
)
def test_a_codebook_that_cannot_be_is_refused(size, used, groups, told):
    with pytest.raises(MechunlearnError, match=told):
        Codebook(16, size, used, groups=groups, hook_name="L0.resid_post")


# what an SAE computes


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    "kind, about",
    [
        ("standard", {}),
        ("jumprelu", {}),
        ("topk", {"rescale_acts_by_decoder_norm": False}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
@torch.no_grad()
def test_the_plain_form_is_the_arithmetic_of_sae_lens(kind, about, centred):
    made = sae(kind, apply_b_dec_to_input=centred, **about)
    plain, described = made.plain()
    h = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(3))
    z = made.sae.encode(h)
    assert 0 < (z > 0).float().mean() < 0.9
    torch.testing.assert_close(plain.encode(h), z)
    torch.testing.assert_close(plain.decode(plain.encode(h)), made.sae(h))
    assert made.encode(h).equal(z) and made.decode(z).equal(made.sae.decode(z))
    assert (made.size, made.d_model) == (40, 32)
    one = made.decode(torch.eye(40)) - made.decode(torch.zeros(1, 40))
    torch.testing.assert_close(made.directions, one, atol=1e-5, rtol=1e-4)
    empty = PlainSAE(**described)
    empty.load_state_dict(plain.state_dict())
    assert torch.equal(empty.encode(h), plain.encode(h))


def test_kinds_without_a_plain_form_are_refused():
    with pytest.raises(MechunlearnError, match="'gated'.*Expected standard, topk or jumprelu"):
        sae("gated").plain()
    with pytest.raises(MechunlearnError, match="normalize_activations='layer_norm'"):
        sae("standard", normalize_activations="layer_norm").plain()


@pytest.mark.parametrize("gate", ["token", "sequence"])
@pytest.mark.parametrize("error", [True, False])
@torch.no_grad()
def test_a_clamp_equals_a_loop_over_tokens(gate, error):
    made = sae("standard")
    h = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(3))
    units, values = torch.tensor([4, 9, 11]), torch.tensor([-2.0, 0.0, -1.0])
    share = 0.7
    z = made.encode(h)
    expected, changed = h.clone() if error else made.decode(z), 0
    for row in range(3):
        fired = 0
        for pos in range(6):
            active = [i for i, unit in enumerate(units) if z[row, pos, unit] > 0]
            fired += bool(active)
            if gate == "sequence" and not fired / (pos + 1) > share:
                continue
            for i in active:
                expected[row, pos] += (values[i] - z[row, pos, units[i]]) * made.directions[units[i]]
                changed += 1
    assert 0 < changed < int((z[..., units] > 0).sum()) + (gate == "token")
    clamp = FeatureClamp(made.sae, units, values, error, gate, share)
    torch.testing.assert_close(clamp(h), expected, atol=1e-4, rtol=0)


def test_an_intervention_is_built_again_from_its_description():
    made = codebook(12, 20, 3, groups=2)
    deletion = CodeDeletion(made, torch.arange(20) < 4)
    again = build({"kind": "delete", "about": made.about, "reselect": True})
    again.load_state_dict(deletion.state_dict())
    h = torch.randn(5, 12)
    assert torch.equal(again(h), deletion(h))
    plain, about = sae("topk").plain()
    clamp = FeatureClamp(plain, torch.tensor([1, 5]), torch.tensor([-1.0, 0.0]), False, "sequence", 0.2)
    part = {"kind": "clamp", "about": about, "units": 2, "error": False, "gate": "sequence", "share": 0.2}
    again = build(part)
    again.load_state_dict(clamp.state_dict())
    h = torch.randn(2, 5, 32)
    assert torch.equal(again(h), clamp(h))


# at the points of a model


def hook_count(model) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for whole in (model.hf, model.bridge)
        for module in whole.modules()
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
@torch.no_grad()
def test_splicing_with_the_error_term_changes_nothing_and_leaves_nothing(name):
    model, ids = family(name), tokens()
    plain, hooks = model.forward(ids), hook_count(model)
    kinds = [kind for kind in SITES if kind != "resid_mid" or not model.layout.parallel]
    assert ("resid_mid" in kinds) == (name != "gpt_neox")
    for kind in kinds:
        site = f"L1.{kind}"
        made = sae(d_model=width(model, site), hook_name=site)
        with spliced(model, made):
            assert (model.forward(ids) - plain).abs().max() < 1e-5, kind
        with spliced(model, made, error=False):
            assert (model.forward(ids) - plain).abs().max() > 1e-3, kind
        book = codebook(width(model, site), hook_name=site)
        with spliced(model, book):
            assert (model.forward(ids) - plain).abs().max() > 1e-3, kind
        seen = []
        with installed(model, site, seen.append):
            model.forward(ids)
        assert seen[0].shape == (3, 8, width(model, site))
        assert torch.equal(model.forward(ids), plain) and hook_count(model) == hooks
    with pytest.raises(RuntimeError), spliced(model, made):
        raise RuntimeError
    assert hook_count(model) == hooks


@torch.no_grad()
def test_what_is_spliced_is_the_reconstruction():
    model, ids = family("llama"), tokens()
    for made in (codebook(), sae(), sae("jumprelu", hook_name="blocks.1.hook_resid_post")):
        _, kept = model.cache(ids, ["L1.resid_post"])
        h = kept["L1.resid_post"]
        expected = model.run_from(2, made.decode(made.encode(h)))
        with spliced(model, made, error=False):
            torch.testing.assert_close(model.forward(ids), expected, atol=1e-4, rtol=1e-4)


def test_a_codebook_never_adds_an_error_term():
    with pytest.raises(MechunlearnError, match="would bypass"), spliced(family("llama"), codebook(), error=True):
        pass


@torch.no_grad()
def test_a_model_of_lower_precision_takes_the_same_dictionaries():
    model = load_model((random_hf("llama"), None), dtype="bfloat16")
    plain = model.forward(tokens()).float()
    for made in (codebook(), sae()):
        with spliced(model, made):
            out = model.forward(tokens())
        assert out.dtype == torch.bfloat16
        seen = FiringStatistics.of(model, made, (tokens(), torch.tensor([8, 8, 8])))
        assert seen.fire_count.dtype == torch.float32 and seen.fire_count.sum() > 0
    assert (out.float() - plain).abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_sites_are_the_hook_points_of_transformer_lens(name):
    model, ids = family(name), tokens()
    _, cache = model.bridge.run_with_cache(ids)
    for kind, (canonical, *aliases) in HOOK_POINTS.items():
        if kind == "resid_mid" and model.layout.parallel:
            continue
        site = f"L2.{kind}"
        assert hook_name_of(site) == f"blocks.2.{canonical}"
        assert {site_of(f"blocks.2.{name}") for name in (canonical, *aliases)} == {site_of(site)} == {site}
        seen = []
        with installed(model, site, seen.append):
            model.forward(ids)
        torch.testing.assert_close(cache[f"blocks.2.{canonical}"].view_as(seen[0]), seen[0], atol=1e-4, rtol=1e-4)
    assert hook_name_of("encoder.block.2") == site_of("encoder.block.2") == "encoder.block.2"
    assert hook_name_of("L1.nothing") == site_of("L1.nothing") == "L1.nothing"


@pytest.mark.parametrize(
    "name, near",
    [
        ("L1.resid_pots", "Nearest: L1.resid_post"),
        ("L7.resid_post", "Nearest: L[012].resid_post"),
        ("blocks.7.hook_resid_post", "'blocks.7.hook_resid_post'.*Nearest: L[012].resid_post"),
        ("blocks.1.hook_resid_pots", "Nearest: hook_resid_post"),
        ("blocks.1.hook_nowhere.at_all_1234567890", "no site here.*hook_resid_mid"),
    ],
)
def test_a_hook_point_that_does_not_exist_is_refused_with_the_nearest(name, near):
    with pytest.raises(MechunlearnError, match=near) as told:
        place(family("llama"), name)
    assert "\n" not in str(told.value)
    with pytest.raises(MechunlearnError, match=near), spliced(family("llama"), codebook(hook_name=name)):
        pass


def test_resid_mid_does_not_exist_beside_parallel_attention():
    assert place(family("llama"), "blocks.1.hook_resid_mid") == "L1.resid_mid"
    with pytest.raises(MechunlearnError, match="No hook point 'L1.resid_mid'.*Nearest"):
        place(family("gpt_neox"), "L1.resid_mid")


def test_a_dictionary_of_another_model_or_width_is_refused():
    model = family("llama")
    own = codebook(signature=model.signature)
    check(own, model)
    for other in (codebook(signature=family("gpt2").signature), SAE(sae().sae, "L1.mlp_out", family("gpt2").signature)):
        with pytest.raises(MechunlearnError, match="was made for .gpt2.* fits one architecture only"):
            check(other, model)
    for made, wide in ((codebook(16), 16), (sae(d_model=48), 48)):
        with pytest.raises(MechunlearnError, match=f"width {wide}; 'L1.resid_post' of .* has 32"):
            check(made, model)
    with pytest.raises(MechunlearnError, match="width 32; 'L1.mlp.out' of .* has 48"):
        check(codebook(hook_name="L1.mlp.out"), model)
    for function in (
        lambda: FiringStatistics.of(model, codebook(16), TEXTS),
        lambda: quality(model, codebook(16), TEXTS),
    ):
        with pytest.raises(MechunlearnError, match="width 16"):
            function()
    assert [width(model, f"L0.{kind}") for kind in ("attn.q", "attn.k", "attn.o", "mlp.out", "mlp_out")] == [
        32, 16, 32, 48, 32,
    ]  # fmt: skip


# an encoder-decoder model, which has no layout


@torch.no_grad()
def test_the_bottleneck_of_a_t5_encoder(t5):
    given = {"input_ids": tokens(), "labels": tokens(3, 4, seed=1)}
    plain = t5(**given).logits
    for made in (codebook(16, hook_name="encoder.block.1"), sae(d_model=16, hook_name="encoder.block.1")):
        out = {}
        for error in (False, True):
            if not (error and isinstance(made, Codebook)):
                with spliced(t5, made, error):
                    out[error] = (t5(**given).logits - plain).abs().max()
        assert out[False] > 1e-3 and out.get(True, 0) < 1e-5
        assert torch.equal(t5(**given).logits, plain)
    assert signature_of(t5).d_model == 16 and signature_of(t5).family == "t5" and signature_of(t5).layers == 3
    assert fingerprint_of(t5) == fingerprint_of(t5)


def test_what_does_not_fit_a_t5_is_refused(t5):
    with pytest.raises(MechunlearnError, match="No hook point 'encoder.blocks.1'.*Nearest: encoder.block.1"):
        place(t5, "encoder.blocks.1")
    with pytest.raises(MechunlearnError, match="was made for .llama"):
        check(codebook(16, hook_name="encoder.block.1", signature=family("llama").signature), t5)
    with pytest.raises(MechunlearnError, match="'decoder.block.1' is not in the encoder"):
        FiringStatistics.of(t5, codebook(16, hook_name="decoder.block.1"), (tokens(), torch.tensor([8, 8, 8])))
    with pytest.raises(MechunlearnError, match="no tokenizer: give tokens"):
        FiringStatistics.of(t5, codebook(16, hook_name="encoder.block.1"), ["some text"])


# activity


def by_hand(model, made, ids, nearest=None):
    """One text without padding: how often each unit is active, squares, largest."""
    seen = []
    with torch.no_grad(), installed(model, made.hook_name, seen.append):
        if hasattr(model, "layout"):
            model.forward(ids[None])
        else:
            model.get_encoder()(input_ids=ids[None])
    fired, squared, largest = (torch.zeros(made.size) for _ in range(3))
    for h in seen[0][0]:
        z = torch.zeros(made.size)
        if nearest is None:
            z = made.encode(h).detach()
        else:
            z[naive(made, h, used=nearest)[0]] = 1.0
        fired, squared, largest = fired + (z > 0), squared + z**2, torch.maximum(largest, z)
    return fired, squared, largest


@pytest.mark.parametrize("made", [codebook(), codebook(groups=2), sae("standard"), sae(hook_name="L1.attn.o")], ids=str)
@torch.no_grad()
def test_activity_equals_a_loop_over_texts(made, monkeypatch):
    monkeypatch.setattr("mechunlearn.features.firing.BATCH", 3)
    model, lengths = family("llama"), torch.tensor([5, 8, 1, 8, 3, 2, 8])
    ids = tokens(7)
    seen = FiringStatistics.of(model, made, (ids, lengths))
    expected = [by_hand(model, made, one[:length]) for one, length in zip(ids, lengths)]
    assert torch.equal(seen.fire_count, torch.stack([fired for fired, *_ in expected]))
    torch.testing.assert_close(seen.squared, torch.stack([e[1] for e in expected]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen.max_activation, torch.stack([e[2] for e in expected]), rtol=1e-3, atol=1e-4)
    assert seen.tokens.tolist() == lengths.tolist() and len(seen) == 7
    other = ids.clone()
    other[torch.arange(8) >= lengths[:, None]] = 0
    assert torch.equal(FiringStatistics.of(model, made, (other, lengths)).fire_count, seen.fire_count)
    part = seen.select([4, 1])
    assert torch.equal(part.fire_count, seen.fire_count[[4, 1]]) and torch.equal(
        part.max_activation, seen.max_activation[[4, 1]]
    )
    torch.testing.assert_close(part.rates(), (seen.fire_count[4] + seen.fire_count[1]) / 11)


@pytest.mark.parametrize("groups", [1, 2])
def test_more_codes_than_are_used_can_be_counted(groups):
    model, made = family("llama"), codebook(groups=groups)
    ids, lengths = tokens(), torch.tensor([8, 2, 5])
    seen = FiringStatistics.of(model, made, (ids, lengths), nearest=6)
    expected = [by_hand(model, made, one[:length], nearest=6)[0] for one, length in zip(ids, lengths)]
    assert torch.equal(seen.fire_count, torch.stack(expected)) and float(seen.rates().sum()) == pytest.approx(
        6 * groups
    )
    everything = FiringStatistics.of(model, made, (ids, lengths), nearest=24 // groups)
    assert torch.equal(everything.fire_count, lengths[:, None].expand(3, 24).float())
    for nearest in (0, 24 // groups + 1):
        with pytest.raises(MechunlearnError, match=f"Cannot count the {nearest} nearest"):
            FiringStatistics.of(model, made, (ids, lengths), nearest=nearest)
    with pytest.raises(MechunlearnError, match="Expected a codebook"):
        FiringStatistics.of(model, sae(), (ids, lengths), nearest=2)


def test_activity_of_a_t5_does_not_see_padding(t5):
    made = codebook(16, 40, 2, hook_name="encoder.block.1")
    ids, lengths = tokens(), torch.tensor([8, 2, 5])
    seen = FiringStatistics.of(t5, made, (ids, lengths))
    expected = [by_hand(t5, made, one[:length])[0] for one, length in zip(ids, lengths)]
    assert torch.equal(seen.fire_count, torch.stack(expected))


def test_beginnings_and_ends_of_text_do_not_count(spoken):
    ids, counted = tokenized(spoken, TEXTS)
    assert ids[0].tolist() == [0, 5, 9, 12, 0, 0, 0]
    assert counted.sum(1).tolist() == [3, 6, 1, 4] and not counted[:, 0].any() and counted[1, 1:].all()
    assert tokenized(spoken, ["w05 w01 w09"])[1].tolist() == [[False, True, False, True]]
    assert torch.equal(tokenized(spoken, TEXTS[0])[0], ids[:1, :4])
    made = sae("standard")
    seen = FiringStatistics.of(spoken, made, TEXTS)
    for row, text in enumerate(TEXTS):
        whole = torch.tensor(spoken.tokenizer(text)["input_ids"])
        first = by_hand(spoken, made, whole[:1])[0]
        assert torch.equal(seen.fire_count[row], by_hand(spoken, made, whole)[0] - first)
    assert seen.tokens.tolist() == [3, 6, 1, 4]
    prompts = token_prompts()
    assert tokenized(spoken, prompts)[1].sum() == prompts.lengths.sum()


def test_text_that_says_nothing_is_refused(spoken):
    for nothing in ([], [""], ["  ", "\n"], ""):
        with pytest.raises(MechunlearnError, match="text is empty"):
            tokenized(spoken, nothing)
    for nothing in (["w00 w01"], (tokens(), torch.zeros(3, dtype=torch.long))):
        with pytest.raises(MechunlearnError, match="no tokens that count"):
            FiringStatistics.of(spoken, codebook(), nothing)
    with pytest.raises(MechunlearnError, match="no tokenizer"):
        tokenized(family("llama"), TEXTS)


@pytest.mark.parametrize("made", [codebook(), sae("standard")], ids=["codebook", "sae"])
@torch.no_grad()
def test_quality_by_hand(spoken, made):
    kept, missed, plain, changed, active = [], [], [], [], []
    for text in TEXTS:
        ids = torch.tensor([spoken.tokenizer(text)["input_ids"]])
        logits, cached = spoken.cache(ids, ["L1.resid_post"])
        h = cached["L1.resid_post"]
        new = made.decode(made.encode(h))
        kept.append(h[0, 1:])
        missed.append((h - new)[0, 1:])
        active.append(made.encode(h)[0, 1:] > 0)
        plain.append(functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
        changed.append(functional.cross_entropy(spoken.run_from(2, new)[0, :-1], ids[0, 1:]))
    h, gone, fired = torch.cat(kept), torch.cat(missed), torch.cat(active)
    expected = {
        "tokens": 14.0,
        "explained variance": float(1 - gone.square().sum() / (h - h.mean(0)).square().sum()),
        "loss": float(torch.stack(plain).mean()),
        "loss increase": float(torch.stack(changed).mean() - torch.stack(plain).mean()),
        "L0": float(fired.sum(1).float().mean()),
        "dead share": float((~fired.any(0)).float().mean()),
    }
    assert quality(spoken, made, TEXTS) == pytest.approx(expected, abs=1e-3, rel=1e-4)
    assert 0 < expected["dead share"] < 1


# controls


def usage(counts) -> FiringStatistics:
    fired = torch.tensor([counts]).float()
    return FiringStatistics(fired, fired, fired, torch.tensor([1000.0]))


def test_matched_units_are_as_many_others_that_are_used_as_often():
    counts = [900, 880, 500, 510, 490, 60, 50, 55, 8, 9, 10, 7, 0, 0, 0, 0]
    seen, chosen = usage(counts), torch.tensor([0, 3, 6, 10, 12])
    assert matched_units(seen, chosen, among=1).tolist() in ([1, 2, 7, 9, 13], [1, 4, 7, 9, 13])
    drawn = [matched_units(seen, chosen, seed, among=2) for seed in range(8)]
    for units in drawn:
        assert len(set(units.tolist()) - set(chosen.tolist())) == 5
    assert len({tuple(units.tolist()) for units in drawn}) > 2
    assert torch.equal(drawn[3], matched_units(seen, chosen, 3, among=2))
    many = usage(torch.randint(0, 2000, (400,), generator=torch.Generator().manual_seed(0)).tolist())
    chosen = torch.arange(0, 400, 10)
    units = matched_units(many, chosen, seed=1)
    mine, theirs = many.fire_count[0][chosen].sort().values, many.fire_count[0][units].sort().values
    assert ((mine + 1).log() - (theirs + 1).log()).abs().mean() < 0.1
    assert not set(units.tolist()) & set(chosen.tolist()) and len(units.unique()) == 40


def test_matching_refuses_where_there_is_nothing_to_match_with():
    with pytest.raises(MechunlearnError, match="3 of 5 units have no 3 others"):
        matched_units(usage([5, 4, 3, 2, 1]), torch.tensor([0, 1, 2]))
    made, other = codebook(), codebook(hook_name="L0.resid_post")
    mask = ComponentMask({made.site: torch.arange(24) < 4}, family("llama").signature)
    seen = FiringStatistics.of(family("llama"), made, (tokens(), torch.tensor([8, 8, 8])))
    drawn = matched_mask(seen, mask, made, seed=2)
    assert drawn.sites[made.site].nonzero().flatten().equal(matched_units(seen, torch.arange(4), 2))
    assert len(drawn) == 4 and not (drawn & mask)
    with pytest.raises(MechunlearnError, match="the dictionary is 'L0.codebook"):
        matched_mask(seen, mask, other)


def test_topic_words_are_swapped_by_rule():
    texts = ["The cook cooks; a COOK, the Cook.", "No overcook here.", "cook's soup-cook"]
    made = swapped(texts, ["cook"], ["knight"])
    assert made == ["The knight cooks; a Knight, the Knight.", "No overcook here.", "knight's soup-knight"]
    pairs = {"cook": ["knight", "king"], "Soup": ["army"]}
    made = swapped(["cook soup " * 20], ["cook", "soup"], pairs, seed=1)[0].split()
    assert set(made[::2]) == {"knight", "king"} and set(made[1::2]) == {"army"}
    assert swapped(["cook soup " * 20], ["cook", "soup"], pairs, seed=1)[0].split() == made
    assert swapped(["cook soup " * 20], ["cook", "soup"], pairs, seed=2)[0].split() != made
    assert swapped(["a sea horse, a sea"], ["sea", "sea horse"], {"sea": ["hill"], "sea horse": ["goat"]}) == [
        "a goat, a hill"
    ]


def test_swapping_refuses_what_it_cannot_swap():
    with pytest.raises(MechunlearnError, match="No topic words"):
        swapped(["cook"], [], ["knight"])
    with pytest.raises(MechunlearnError, match="None of the words sword, shield is in the text"):
        swapped(["The cook."], ["sword", "shield"], ["knight"])
    for others in ({"cook": ["knight"]}, {"cook": ["knight"], "soup": []}, {"cook": ["knight"], "soup": [""]}):
        with pytest.raises(MechunlearnError, match="take the place of soup"):
            swapped(["The cook, the soup."], ["cook", "soup"], others)


# files


def bits(module) -> dict:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("about", [{}, {"groups": 2, "linear": 0}])
def test_a_codebook_comes_back_bit_identical(tmp_path, about):
    made = codebook(signature=family("llama").signature, fitted_on="abc", **about)
    made.quality = {"L0": 3.0}
    made.save(tmp_path / "it")
    again = load_dictionary(tmp_path / "it")
    h = torch.randn(4, 32)
    assert isinstance(again, Codebook) and same(bits(again), bits(made)) and torch.equal(again(h), made(h))
    for name in ("about", "hook_name", "signature", "fitted_on", "quality", "site"):
        assert getattr(again, name) == getattr(made, name)
    assert not again.training and str(again) == "Codebook(24 codes, 3 used, L1.resid_post, width 32)"
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["codebook.safetensors", "config.json"]
    with pytest.raises(MechunlearnError, match="not an empty folder"):
        made.save(tmp_path / "it")
    with torch.no_grad():
        again.codes[0, 0] += 1e-3
    assert again.site != made.site and again.site.startswith("L1.codebook:")


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated"])
def test_an_sae_comes_back_bit_identical_here_and_in_sae_lens(tmp_path, kind):
    made = SAE(sae(kind).sae, "L2.mlp_out", family("llama").signature, "abc")
    made.quality = {"L0": 3.0}
    made.save(tmp_path / "it")
    h = torch.randn(4, 32)
    again = load_dictionary(tmp_path / "it")
    assert isinstance(again, SAE) and same(bits(again.sae), bits(made.sae))
    for name in ("hook_name", "signature", "fitted_on", "quality", "site", "size", "d_model"):
        assert getattr(again, name) == getattr(made, name)
    assert str(again) == f"SAE(40 features, {kind}, L2.mlp_out, width 32)"
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "it")
    assert theirs.cfg.metadata.hook_name == "blocks.2.mlp.hook_out"
    for one in (again, theirs):
        assert torch.equal(one.encode(h), made.sae.encode(h))
        assert torch.equal(one.decode(one.encode(h)), made.sae(h))


def test_an_sae_on_heads_stays_loadable_under_the_name_sae_lens_asks_for(tmp_path):
    cfg = sae_lens.StandardSAEConfig(d_in=32, d_sae=40, reshape_activations="hook_z")
    cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    made = SAE(sae_lens.StandardSAE(cfg))
    assert made.hook_name == "L1.attn.o"
    made.save(tmp_path / "it")
    again, theirs = load_dictionary(tmp_path / "it"), sae_lens.SAE.load_from_disk(tmp_path / "it")
    z = torch.randn(2, 3, 4, 8)
    assert again.hook_name == "L1.attn.o" and torch.equal(theirs.encode(z), again.encode(z.flatten(-2)))
    with torch.no_grad(), spliced(family("llama"), again):
        out = family("llama").forward(tokens())
    assert (out - family("llama").forward(tokens())).abs().max() < 1e-5


def test_saes_trained_by_sae_lens_load_here(tmp_path):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(4096, 16, generator=generator)

    def batches():
        while True:
            yield stored[torch.randint(4096, (64,), generator=generator)]

    cfg = sae_lens.TopKTrainingSAEConfig(d_in=16, d_sae=32, k=3)
    cfg.metadata.hook_name = "blocks.1.hook_out"
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=64 * 30,
            train_batch_size_samples=64,
            lr=1e-3,
            lr_end=1e-4,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae_lens.TopKTrainingSAE(cfg),
        data_provider=batches(),
    )
    trained = trainer.fit()
    trained.save_inference_model(tmp_path / "theirs")
    ours = load_dictionary(tmp_path / "theirs")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "theirs")
    h = torch.randn(50, 16, generator=generator)
    with torch.no_grad():
        assert torch.equal(ours.encode(h), theirs.encode(h))
        assert torch.equal(ours.decode(ours.encode(h)), theirs(h))
        torch.testing.assert_close(ours.decode(ours.encode(h)), trained(h), atol=1e-5, rtol=1e-5)
    assert (ours.hook_name, ours.size, ours.signature) == ("L1.resid_post", 32, None)
    assert torch.equal(ours.encode(h) > 0, SAE(trained).encode(h) > 0)
    ours.save(tmp_path / "ours")
    assert torch.equal(sae_lens.SAE.load_from_disk(tmp_path / "ours").encode(h), theirs.encode(h))


def broken(folder, file, content) -> None:
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, float):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: int(len(whole) * content)])
    else:
        about = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content(about)))


@pytest.mark.parametrize(
    "file, content",
    [
        ("weights", None),
        ("weights", 0.5),
        ("weights", 0.0),
        ("config", 0.5),
        ("config", 0.0),
        ("config", lambda about: [about]),
        ("config", lambda about: "text"),
        ("config", lambda about: {}),
        ("config", lambda about: {**about, "d_model": 31, "d_in": 31}),
        ("config", lambda about: {name: about[name] for name in about if name not in ("about", "d_sae")}),
    ],
)
@pytest.mark.parametrize("kind", ["codebook", "sae"])
def test_a_folder_that_is_not_whole_is_refused_in_one_line(tmp_path, kind, file, content):
    names = {"codebook": ("config.json", "codebook.safetensors"), "sae": ("cfg.json", "sae_weights.safetensors")}
    (codebook() if kind == "codebook" else sae()).save(tmp_path / "it")
    broken(tmp_path / "it", names[kind][file == "weights"], content)
    with pytest.raises(
        MechunlearnError, match=r"/it(/[\w.]+)?' (is not a whole|holds a)|Could not read the \w+( file)? '.*/it/"
    ) as told:
        load_dictionary(tmp_path / "it")
    assert "\n" not in str(told.value)


def test_what_is_no_dictionary_is_refused(tmp_path):
    with pytest.raises(MechunlearnError, match=r"no dictionary in '.*nowhere'. Expected factworld-codebook or"):
        load_dictionary(tmp_path / "nowhere")
    (tmp_path / "model").mkdir()
    with pytest.raises(MechunlearnError, match="no dictionary"):
        load_dictionary(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MechunlearnError, match=r"^'[^']*model/config.json' holds a foreign file, not a codebook"):
        load_dictionary(tmp_path / "model")
    sae().save(tmp_path / "sae")
    with pytest.raises(MechunlearnError, match="Could not read the codebook file"):
        Codebook.load(tmp_path / "sae")
    codebook().save(tmp_path / "codebook")
    with pytest.raises(MechunlearnError, match="Could not read the SAE"):
        SAE.load(tmp_path / "codebook")
    shutil.copy(tmp_path / "sae" / "cfg.json", tmp_path / "codebook" / "cfg.json")
    with pytest.raises(MechunlearnError, match="Could not read the SAE"):
        load_dictionary(tmp_path / "codebook")
    with pytest.raises(MechunlearnError, match="Could not load the SAE 'x' of release 'no-such-release'"):
        load_dictionary("no-such-release", "x")


def test_an_sae_that_does_not_say_where_it_belongs_is_refused(tmp_path):
    with pytest.raises(MechunlearnError, match="does not say where it belongs. Give hook_name"):
        sae(hook_name=None)
    sae().sae.save_model(tmp_path)
    with pytest.raises(MechunlearnError, match=r"^This SAE does not say where it belongs"):
        load_dictionary(tmp_path)
    with pytest.raises(MechunlearnError, match="'blocks.0.hook_elsewhere' has no site here"):
        SAE(sae().sae, "blocks.0.hook_elsewhere")
