"""Every supported architecture: weights, hooks and Hugging Face view say the same, and export gives it back."""

import pytest
import torch
import transformers

from mechunlearn import Component, ComponentMask, MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.model.families import FAMILIES, REGISTERED
from mechunlearn.model.hooked import HookedModel, export, load_model
from mechunlearn.model.layout import Layout
from tests.models import CONFIGS, loaded, random_hf


@pytest.fixture
def tokens():
    return torch.randint(2, 97, (2, 10), generator=torch.Generator().manual_seed(1))


def test_every_family_with_a_table_is_tested():
    assert set(FAMILIES) - REGISTERED == set(CONFIGS)


def test_the_bridged_model_is_a_hooked_model(model):
    assert isinstance(model, HookedModel)


def test_logits_of_the_bridge_equal_those_of_the_hugging_face_model(model, tokens):
    with torch.no_grad():
        torch.testing.assert_close(model.bridge(tokens), model.forward(tokens), atol=2e-5, rtol=1e-5)


def test_the_bridge_is_made_when_it_is_first_asked_for_under_the_hooks_that_are_on(model, tokens):
    """A hook that is on is on the new bridge too, goes with its block, and the parameters are left as they were."""
    halve = {"L1.mlp.out": lambda z: z / 2}
    flags, random_state = [p.requires_grad for p in model.hf.parameters()], torch.get_rng_state()
    with torch.no_grad(), model.hooks(halve), model.hooks({"L0.attn.o": lambda z: -z}):
        within = model.forward(tokens)
        assert model._bridge._bridge is None, "what is never asked for is not made"
        torch.testing.assert_close(model.bridge(tokens), within, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        without = model.forward(tokens)
        torch.testing.assert_close(model.bridge(tokens), without, atol=2e-5, rtol=1e-5)
    assert (within - without).abs().max() > 1e-3 and not model._bridge._on
    assert [p.requires_grad for p in model.hf.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)


def sites_of(model) -> list[str]:
    return [site for site in model.decoder.sites if site.startswith("L1.")]


def test_hooks_act_on_the_bridge_as_on_the_hugging_face_model(model, tokens):
    for site in sites_of(model):
        seen = []

        def shift(z, seen=seen):
            seen.append(z.detach())
            return z * torch.linspace(0.5, 2, z.shape[-1])  # GPT-2 attends the same when the same is added to all keys

        with torch.no_grad(), model.hooks({site: shift}):
            plain, bridged = model.forward(tokens), model.bridge(tokens)
        torch.testing.assert_close(*seen, atol=3e-5, rtol=1e-4, msg=site)
        torch.testing.assert_close(plain, bridged, atol=1e-4, rtol=1e-4, msg=site)
        assert (plain - model.forward(tokens)).abs().max() > 1e-3, f"the hook at {site} does nothing"


def test_what_is_written_adds_up_to_the_residual_stream(model, tokens):
    _, kept = model.cache(tokens, [f"L1.{k}" for k in ("resid_pre", "attn_out", "mlp_out", "resid_post")])
    written = kept["L1.resid_pre"] + kept["L1.attn_out"] + kept["L1.mlp_out"]
    torch.testing.assert_close(written, kept["L1.resid_post"], atol=1e-5, rtol=1e-5)


def test_attention_patterns_mix_values_into_what_heads_write(model, tokens):
    for layer in (0, 2):
        kernel, before = model.hf.config._attn_implementation, model.forward(tokens)
        pattern = model.attention(tokens, layer)
        _, kept = model.cache(tokens, [f"L{layer}.attn.v", f"L{layer}.attn.o"])
        clip = getattr(model.hf.config, "clip_qkv", None) or float("inf")
        values = (
            kept[f"L{layer}.attn.v"]
            .clamp(-clip, clip)
            .repeat_interleave(model.signature.heads // model.signature.kv_heads, 2)
        )
        mixed = torch.einsum("fhqk,fkhd->fqhd", pattern, values)
        torch.testing.assert_close(mixed, kept[f"L{layer}.attn.o"], atol=1e-5, rtol=1e-5)
        assert not pattern.triu(1).any(), "nothing comes from later positions"
        assert model.hf.config._attn_implementation == kernel and torch.equal(model.forward(tokens), before)


def test_a_hook_between_attention_and_mlp_changes_the_residual_stream_itself(model, tokens):
    if model.layout.parallel:
        return
    with torch.no_grad(), model.hooks({"L1.resid_mid": torch.zeros_like}):
        _, kept = model.cache(tokens, ["L1.resid_post", "L1.mlp_out"])
    torch.testing.assert_close(kept["L1.resid_post"], kept["L1.mlp_out"], atol=1e-6, rtol=0)


def test_heads_of_a_projection_are_a_view_of_it(model, tokens):
    """By-head weights times what the projection reads give what the hooks show, for fused and grouped ones alike."""
    _, kept = model.cache(tokens, ["L1.resid_pre", "L1.attn.q", "L1.attn.k", "L1.attn.v"])
    read = model.decoder.part(1, "attention_norm")(kept["L1.resid_pre"])
    for kind in ("attn.q", "attn.k", "attn.v"):
        weight, bias = model.layout.head_weights(dict(model.hf.named_parameters()), 1, kind)
        projected = torch.einsum("fpd,uhd->fpuh", read, weight) + (0 if bias is None else bias)
        torch.testing.assert_close(projected, kept[f"L1.{kind}"], atol=1e-5, rtol=1e-4)
        with torch.no_grad(), model.hooks({f"L1.{kind}": lambda z: z.flip(-1)}):
            flipped = model.forward(tokens)
        assert (flipped - model.forward(tokens)).abs().max() > 1e-4


def test_run_from_equals_a_full_forward(model, tokens):
    at = torch.arange(tokens.shape[1]).repeat(2, 1)
    run = model.decoder.record(tokens, at)
    with torch.no_grad():
        full = model.hf(tokens).logits
        torch.testing.assert_close(run.logits, full, atol=1e-6, rtol=0)
        for layer in range(model.signature.layers + 1):
            torch.testing.assert_close(model.run_from(layer, run.resid[layer]), full, atol=1e-6, rtol=0)
            some = model.run_from(layer, run.resid[layer], torch.tensor([3, 9]))
            torch.testing.assert_close(some, full[[0, 1], [3, 9]], atol=1e-6, rtol=0)


def test_restarting_in_the_middle_of_a_prompt_equals_a_full_forward(model, tokens):
    """Later positions alone, on the recorded keys and values of the earlier ones; two copies of each fact."""
    run = model.decoder.record(tokens, torch.zeros(2, 1, dtype=torch.long))
    full = model.forward(tokens)
    with torch.no_grad():
        for start, layer in ((0, 1), (1, 0), (5, 1), (9, 2)):
            restart = model.decoder.restart(start, 10, run)
            resid = run.resid[layer][:, start:].repeat(2, 1, 1)
            for later in range(layer, model.signature.layers):
                resid = restart.block(later, resid)
            again = model.decoder.unembed(resid).view(2, 2, 10 - start, -1)
            torch.testing.assert_close(again, full[None, :, start:].expand_as(again), atol=2e-6, rtol=1e-5)


def test_run_from_starts_at_the_hooked_residual_stream(model, tokens):
    logits, kept = model.cache(tokens, ["L1.resid_pre"])
    with torch.no_grad():
        torch.testing.assert_close(model.run_from(1, kept["L1.resid_pre"]), logits, atol=3e-5, rtol=1e-5)
        other = model.run_from(1, kept["L1.resid_pre"].flip(0))
    assert (other - logits).abs().max() > 1e-3, "run_from must read the residual stream it is given"


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_weight_written_on_the_hooked_model_is_written_in_the_hugging_face_model_and_the_bridge(model, tokens, made):
    with torch.no_grad():
        before = model.forward(tokens)
        if made == "before":
            model.bridge(tokens)
        for kind in model.layout.kinds:
            rows = model.rows(f"L1.{kind}")
            model.write_(f"L1.{kind}", rows[:1] + torch.randn_like(rows[:1]), torch.tensor([0]))
            assert torch.equal(model.rows(f"L1.{kind}")[1:], rows[1:])
            after = model.forward(tokens)
            assert (after - before).abs().max() > 1e-4, f"{kind} has no effect"
            torch.testing.assert_close(after, model.hf(tokens).logits, atol=3e-5, rtol=1e-5)
            torch.testing.assert_close(after, model.bridge(tokens), atol=2e-5, rtol=1e-5, msg=kind)
            model.write_(f"L1.{kind}", rows)
        assert torch.equal(model.forward(tokens), before)
        torch.testing.assert_close(before, model.bridge(tokens), atol=2e-5, rtol=1e-5)


def test_the_fingerprint_is_that_of_the_weights_as_they_are(model):
    before, rows = model.fingerprint, model.rows("L1.mlp.out")
    model.write_("L1.mlp.out", rows[:1] + 1, torch.tensor([0]))
    assert model.fingerprint != before
    model.write_("L1.mlp.out", rows)
    assert model.fingerprint == before
    with torch.no_grad():
        next(iter(model.hf.parameters())).add_(1)
    assert model.fingerprint != before


def test_units_of_a_head_are_its_own(model, tokens):
    """Zeroing a head's rows of W_O must do the same as zeroing the head's activation."""
    with torch.no_grad():
        for kind, zeroed in (
            ("attn.o", lambda z: z.index_fill(2, torch.tensor([1]), 0.0)),
            ("mlp.out", lambda z: z.index_fill(2, torch.tensor([1]), 0.0)),
        ):
            with model.hooks({f"L1.{kind}": zeroed}):
                ablated = model.forward(tokens)
            rows = model.rows(f"L1.{kind}")
            model.write_(f"L1.{kind}", torch.zeros_like(rows[:1]), torch.tensor([1]))
            torch.testing.assert_close(model.forward(tokens), ablated, atol=1e-5, rtol=1e-5)
            model.write_(f"L1.{kind}", rows)


def test_tied_units_feed_the_unit(model, tokens):
    """With a neuron's own rows of the input matrices zeroed, its activation is zero; no other neuron changes."""
    mask = ComponentMask.of(["L0.mlp.out[5]"], model.signature).tied(model)
    _, before = model.cache(tokens, ["L0.mlp.out"])
    for component in mask:
        if component.kind != "mlp.out":
            rows = model.rows(component.site)
            model.write_(component.site, torch.zeros_like(rows[:1]), torch.tensor([component.unit]))
    _, after = model.cache(tokens, ["L0.mlp.out"])
    changed = (before["L0.mlp.out"] != after["L0.mlp.out"]).any(0).any(0)
    assert changed.nonzero().flatten().tolist() == [5]
    assert after["L0.mlp.out"][..., 5].abs().max() == 0


def test_an_exported_edit_reloads_with_the_same_logits(model, tokens, tmp_path):
    units = torch.tensor([0])
    sites = [f"L{layer}.{kind}" for layer, kind in enumerate(("attn.k", "mlp.out", "mlp.in"))]
    rows = {site: model.rows(site)[units] + torch.randn(1, model.rows(site).shape[1]) for site in sites}
    edit = WeightEdit(dict.fromkeys(sites, units), rows, model.signature, RunCard("by hand"))
    edit.export(model, tmp_path / "edited")
    again = loaded(tmp_path / "edited")
    with torch.no_grad():
        unedited = model.forward(tokens)
        with edit.applied(model):
            edited = model.forward(tokens)
        torch.testing.assert_close(again(tokens).logits, edited, atol=1e-5, rtol=1e-5)
    assert (edited - unedited).abs().max() > 1e-4
    assert torch.equal(model.forward(tokens), unedited)


def test_weights_add_up_to_the_parameters_of_the_blocks(model):
    """Every block parameter with two dimensions is in exactly one unit of one kind."""
    everything = ComponentMask.of(
        [f"L{layer}.{kind}" for layer in range(model.signature.layers) for kind in model.layout.kinds], model.signature
    )
    masks = everything.parameter_masks(model)
    blocks = {
        n: p
        for n, p in model.hf.named_parameters()
        if (".1." in f".{n}" and p.ndim == 2 and "layers" in n) or (".h." in n and p.ndim == 2)
    }
    for name in blocks:
        if name in masks:
            assert masks[name].all(), name
    assert sum(int(m.sum()) for m in masks.values()) == everything.weights(model)
    assert {n for n in blocks if ".1." in n} <= set(masks)


def test_caching_with_gradients_gives_gradients(model, tokens):
    sites = ["L0.attn.o", "L1.mlp.out", "L2.attn.o", "L2.resid_post"]
    logits, kept = model.cache(tokens, sites, grad=True)
    gradients = torch.autograd.grad(logits[:, -1].logsumexp(-1).sum(), [kept[s] for s in sites])
    assert all(g.abs().max() > 0 for g in gradients)
    assert kept["L0.attn.o"].shape == (2, 10, 4, model.layout.d_head)


def test_the_users_module_stays_an_ordinary_module(stored, tmp_path):
    hf = loaded(stored)
    names = list(dict(hf.named_parameters()))
    model = load_model((hf, None))
    assert list(dict(hf.named_parameters())) == names
    export(model, tmp_path / "copy")
    again = loaded(tmp_path / "copy")
    assert all(torch.equal(a, b) for a, b in zip(hf.parameters(), again.parameters(), strict=True))


def test_an_unknown_architecture_is_refused_by_name():
    config = transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9)
    with pytest.raises(MechunlearnError, match="No parameter layout for model type 'bloom'"):
        Layout.of(config)
    moe = transformers.MixtralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(MechunlearnError, match=r"mixtral.*Mixtures of experts"):
        Layout.of(moe)


def test_sites_that_a_model_lacks_are_refused(model, tokens):
    with pytest.raises(MechunlearnError, match="No activation site 'L9.mlp.out'"):
        model.cache(tokens, ["L9.mlp.out"])
    with (
        pytest.raises(MechunlearnError, match="No activation site 'L0.nothing'"),
        model.hooks({"L0.nothing": lambda z: z}),
    ):
        pass
    with pytest.raises(MechunlearnError, match="no weights of kind 'sae:x'"):
        model.layout.views({}, 0, "sae:x")
    assert Component.parse("L0.sae:x[3]").unit == 3


def test_random_hf_models_differ_from_their_initialisation():
    assert any(p.abs().max() > 0.05 for n, p in random_hf("gpt2").named_parameters() if "bias" in n)
