"""Families: tables that fit, tables that do not, models that no table describes, and tables of a user's own."""

import copy
import subprocess
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.edit import masked_gradient
from mechunlearn.localize import attribution_patching, direct_logit_attribution
from mechunlearn.model import FAMILIES, Matrix, Modules, register_family
from mechunlearn.model.families import MODULES, REGISTERED
from mechunlearn.model.hooked import load_model
from mechunlearn.model.layout import Layout
from mechunlearn.model.table_check import check_table
from tests.models import CONFIGS, GROUPED, noisy, random_hf, token_prompts

ARCEE = {
    **{kind: FAMILIES["llama"][kind] for kind in ("attn.q", "attn.k", "attn.v", "attn.o")},
    "mlp.in": (Matrix("model.layers.{layer}.mlp.up_proj.weight", "unit d_model"),),
    "mlp.out": (Matrix("model.layers.{layer}.mlp.down_proj.weight", "d_model unit"),),
}


@pytest.fixture
def tokens():
    return torch.randint(2, 96, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def register():
    """`register_family`, with nothing registered before the test (pages do) and after it."""
    forget()
    yield register_family
    forget()


def forget() -> None:
    for name in list(REGISTERED):
        REGISTERED.remove(name)
        del FAMILIES[name], MODULES[name]


def arcee() -> torch.nn.Module:
    return noisy(transformers.ArceeConfig(**GROUPED))


class TestBuiltIn:
    def test_the_check_of_registered_tables_accepts_every_built_in_table(self, model):
        check_table(model.decoder)

    def test_the_stream_is_the_hidden_states_of_plain_transformers(self, model, tokens):
        at = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        run = model.decoder.record(tokens, at)
        with torch.no_grad():
            plain = model.hf(tokens, output_hidden_states=True, use_cache=False)
            _, kept = model.run_with_cache(tokens, [f"L{i}.resid_post" for i in range(model.signature.layers)])
            assert torch.equal(model(tokens), plain.logits)
            *hidden, last = plain.hidden_states
            assert len(hidden) == model.signature.layers
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(run.resid, hidden, strict=False))
            assert all(torch.equal(kept[f"L{i - 1}.resid_post"], hidden[i]) for i in range(1, len(hidden)))
            torch.testing.assert_close(model.decoder.final_norm(run.resid[-1]), last)
            torch.testing.assert_close(model.decoder.unembed(run.resid[-1]), plain.logits)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", ["olmo2", "granite", "cohere"])
    def test_half_precision(self, family, dtype, tokens):
        """Logits are those of plain transformers, a restart equals a run, and an edit is undone to the bit."""
        model = load_model((random_hf(family), None), dtype=dtype)
        check_table(model.decoder)
        before = model(tokens)
        assert before.dtype == dtype and torch.equal(before, model.hf(tokens, use_cache=False).logits)
        prompts = token_prompts(96)
        halves = prompts.select([0, 1]), prompts.select([2, 3])
        mask = ComponentMask.of(["L1.attn.o[1]", "L1.mlp.out[3]", "L0.mlp.in[2]"], model.signature)
        edit = masked_gradient(model, mask, *halves, steps=3, lr=0.05)
        with edit.applied(model):
            assert not torch.equal(model(tokens), before)
        assert torch.equal(model(tokens), before)
        found = direct_logit_attribution(model, prompts)
        said = (
            found.evidence["embedding"] + found.evidence["biases"] + sum(float(s.sum()) for s in found.scores.values())
        )
        assert abs(said - found.evidence["logit_diff"]) < 0.1 * max(1, abs(said))


VARIANTS = {
    "cohere, normalised queries": ("cohere", {"use_qk_norm": True}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "granite, biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "olmo, not clipped": ("olmo", {"clip_qkv": None}),
    "starcoder2, no biases": ("starcoder2", {"use_bias": False}),
    "llama4_text, no norm of queries": ("llama4_text", {"use_qk_norm": False}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_family(name, tokens):
    family, settings = VARIANTS[name]
    config = copy.deepcopy(CONFIGS[family])
    for field, value in settings.items():
        setattr(config, field, value)
    model = load_model((noisy(config), None))
    check_table(model.decoder)
    prompts = token_prompts()
    found = direct_logit_attribution(model, prompts)
    said = found.evidence["embedding"] + found.evidence["biases"] + sum(float(s.sum()) for s in found.scores.values())
    assert said == pytest.approx(found.evidence["logit_diff"], rel=1e-3, abs=1e-3)
    rows = torch.arange(len(prompts))
    logits = model(prompts.tokens)[rows, prompts.read]
    plain = (logits[rows, prompts.answer_at_read] - logits[rows, prompts.foil_at_read]).mean()
    assert found.evidence["logit_diff"] == pytest.approx(float(plain), rel=1e-3, abs=1e-3)


def test_a_bridge_that_computes_something_else_is_refused(tokens):
    """TransformerLens leaves out Cohere's norm of queries; nothing else needs the bridge."""
    config = copy.deepcopy(CONFIGS["cohere"])
    config.use_qk_norm = True
    model = load_model((noisy(config), None))
    with pytest.raises(MechunlearnError, match="TransformerLens has no bridge to cohere"):
        model.bridge  # noqa: B018
    with model.hooks({"L1.attn.o": lambda z: z / 2}):
        within = model(tokens)
    assert not torch.equal(within, model(tokens))


def small(config: type, **settings) -> object:
    return config(**{**GROUPED, **settings})


EXPERTS = {
    "mixtral": lambda: small(transformers.MixtralConfig),
    "qwen2_moe": lambda: small(transformers.Qwen2MoeConfig),
    "qwen3_moe": lambda: small(transformers.Qwen3MoeConfig),
    "qwen3_next": lambda: small(transformers.Qwen3NextConfig),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeConfig(),
    "gpt_oss": lambda: small(transformers.GptOssConfig),
    "olmoe": lambda: small(transformers.OlmoeConfig),
    "granitemoe": lambda: small(transformers.GraniteMoeConfig),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(),
    "glm4_moe": lambda: small(transformers.Glm4MoeConfig),
    "llama4": lambda: transformers.Llama4Config(),
    "llama4_text": lambda: small(transformers.Llama4TextConfig, moe_layers=[1]),
}


class TestRefused:
    @pytest.mark.parametrize("family", EXPERTS)
    def test_mixtures_of_experts_by_name(self, family):
        with pytest.raises(MechunlearnError) as refused:
            Layout.of(EXPERTS[family]())
        for said in (
            f"model type '{family}'",
            "mixture",
            "Mixtures of experts are not supported",
            "Supported:",
            "olmo2",
        ):
            assert said in str(refused.value)

    @pytest.mark.parametrize(
        ("family", "config", "reason"),
        [
            ("gemma4", transformers.Gemma4Config, "multiplies the whole residual stream"),
            ("gemma4_text", transformers.Gemma4TextConfig, "share keys and values"),
            ("qwen3_5", transformers.Qwen3_5Config, "linear attention"),
            ("qwen3_5_text", transformers.Qwen3_5TextConfig, "recurrent state"),
        ],
    )
    def test_what_is_no_sum_of_heads_and_neurons_by_name(self, family, config, reason):
        with pytest.raises(MechunlearnError, match=f"model type '{family}'.*{reason}.*Supported: cohere"):
            Layout.of(config())

    def test_an_unknown_family_says_what_to_do(self, register):
        with pytest.raises(MechunlearnError, match=r"'arcee'.*register_family.*Supported: cohere.*stablelm"):
            load_model((arcee(), None))


class TestRegistered:
    def test_a_model_of_the_users_own_family_can_be_searched_edited_and_exported(self, register, tokens, tmp_path):
        register("arcee", ARCEE)
        model = load_model((arcee(), None))
        assert model.signature.family == "arcee" and "mlp.gate" not in model.layout.kinds
        assert torch.equal(model(tokens), model.hf(tokens, use_cache=False).logits)
        prompts = token_prompts()
        mask = attribution_patching(model, prompts).top(units=6)
        edit = masked_gradient(model, mask, prompts.select([0, 1]), prompts.select([2, 3]), steps=3, lr=0.05)
        edit.export(model, tmp_path / "edited")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
        with edit.applied(model), torch.no_grad():
            torch.testing.assert_close(again(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)

    def test_a_family_is_registered_again_but_never_in_place_of_a_built_in_one(self, register):
        register("arcee", ARCEE)
        register("arcee", ARCEE, Modules())
        with pytest.raises(MechunlearnError, match="'llama' is built in"):
            register("llama", ARCEE)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"mlp.out": None}, "has no 'mlp.out'"),
            ({"mlp.up": ARCEE["mlp.in"]}, "has a kind 'mlp.up'"),
            ({"mlp.in": ()}, "says mlp.in is None"),
            ({"mlp.in": ("model.layers.{layer}.mlp.up_proj.weight",)}, "says mlp.in is 'model"),
            ({"mlp.in": (Matrix("model.layers.0.mlp.up_proj.weight", "unit d_model"),)}, "{layer}"),
            ({"mlp.in": (Matrix("model.layers.{layer}.mlp.up_proj", "unit d_model"),)}, ".weight"),
            ({"attn.v": ARCEE["attn.k"]}, "says that attn.k and attn.v are both Matrix"),
            ({"attn.q": (Matrix("a.{layer}.q.weight", "unit d_model"),)}, "with the axes unit, d_head and d_model"),
        ],
    )
    def test_a_malformed_table_is_refused(self, register, change, said):
        table = {kind: matrices for kind, matrices in {**ARCEE, **change}.items() if matrices is not None}
        with pytest.raises(MechunlearnError) as refused:
            register("arcee", table)
        assert said in str(refused.value) and "arcee" not in FAMILIES

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                {"mlp.in": (Matrix("model.layers.{layer}.mlp.fc1.weight", "unit d_model"),)},
                "expected a parameter 'model.layers.0.mlp.fc1.weight' (mlp.in), and the model has none. Nearest: model.l",
            ),
            (
                {"mlp.in": (Matrix("model.layers.{layer}.mlp.up_proj.weight", "d_model unit"),)},
                "(mlp.in) to have the axes 'd_model unit' with unit = 48, d_model = 32; its shape is (48, 32)",
            ),
            ({"attn.k": ARCEE["attn.q"], "attn.q": ARCEE["attn.k"]}, "(attn.q) to have the axes"),
            ({"attn.o": (Matrix("model.layers.{layer}.self_attn.o_proj.weight", "(unit d_head) d_model"),)}, "attn.o"),
            (
                {"attn.q": (Matrix("model.layers.{layer}.self_attn.q_proj.weight", "(d_head unit) d_model"),)},
                "first head of attn.q",
            ),
        ],
    )
    def test_a_table_that_does_not_fit_the_model_is_refused_with_the_entry(self, register, change, said):
        register("arcee", {**ARCEE, **change})
        with pytest.raises(MechunlearnError) as refused:
            load_model((arcee(), None))
        assert "The table of 'arcee' does not fit this model" in str(refused.value) and said in str(refused.value)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"blocks": "model.h"}, "expected a module 'model.h' (modules.blocks), and the model has none"),
            ({"blocks": "model"}, "blocks"),
            ({"final_norm": "model.ln_f"}, "(modules.final_norm)"),
            ({"final_norm": "model.layers.2.input_layernorm"}, "modules.final_norm, logit_scale"),
            ({"mlp_norm": "ln_2"}, "expected a module 'model.layers.0.ln_2' (modules.mlp_norm)"),
            ({"mlp_norm": "input_layernorm"}, "modules.mlp_norm, mlp and parallel"),
            ({"mlp_norm": ""}, "modules.mlp_norm, mlp and parallel"),
            ({"attention_norm": ""}, "modules.attention_norm"),
            ({"mlp_post": "post_attention_layernorm"}, "attention_post, mlp_post and residual_scale"),
            ({"parallel": True}, "modules.mlp_norm, mlp and parallel"),
            ({"centred": True}, "modules.centred and offset"),
            ({"offset": 1.0}, "modules.centred and offset"),
            ({"residual_scale": "initializer_range"}, "residual_scale"),
            ({"logit_scale": "initializer_range"}, "logit_scale"),
        ],
    )
    def test_modules_that_are_not_the_models_are_refused_with_the_entry(self, register, change, said):
        register("arcee", ARCEE, replace(Modules(), **change))
        with pytest.raises(MechunlearnError) as refused:
            load_model((arcee(), None))
        assert "The table of 'arcee' does not fit this model" in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_a_bridge_of_a_model_that_sees_images_installs_nothing(family, monkeypatch):
    called = []
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: called.append(command))
    model = load_model((random_hf(family), None))
    assert model.bridge is not None and called == []


class TestSizes:
    def test_an_mlp_whose_width_no_field_gives_is_four_times_as_wide_as_the_stream(self):
        config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=97)
        layout, hf = Layout.of(config), transformers.GPT2LMHeadModel(config)
        assert config.n_inner is None and layout.signature.d_mlp == 96 == hf.transformer.h[0].mlp.c_fc.weight.shape[1]

    @pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
    def test_a_configuration_that_lacks_a_size_is_refused(self, missing):
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
        with pytest.raises(MechunlearnError, match="does not say how wide and how deep"):
            Layout.of(SimpleNamespace(model_type="llama", **{k: v for k, v in sizes.items() if k != missing}))

    def test_a_layout_cannot_be_changed(self):
        layout = Layout.of(transformers.GPT2Config())
        with pytest.raises(FrozenInstanceError):
            layout.d_head = 3
        with pytest.raises(FrozenInstanceError):
            layout.signature.layers = 3
        assert layout == Layout.of(transformers.GPT2Config()) and (layout.residual_scale, layout.logit_scale) == (1, 1)
