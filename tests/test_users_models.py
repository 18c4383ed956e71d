"""Models as users have them: wrapped, in training mode, compiled, with adapters. They work as plain transformers do, or are refused by name."""

from contextlib import contextmanager
from dataclasses import replace

import peft
import pytest
import torch
import transformers

from mechunlearn import ComponentMask, MechunlearnError, load_facts
from mechunlearn.attack import quantization
from mechunlearn.edit import masked_gradient
from mechunlearn.localize import activation_patching, attribution_patching, edge_attribution, logit_lens
from mechunlearn.metrics.answers import answered, measure
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import export, load_model
from mechunlearn.model.unwrap import evaluating
from tests.models import GPT2_SIZES, GROUPED, random_hf, token_prompts

TOKENS = torch.randint(2, 97, (3, 9), generator=torch.Generator().manual_seed(4))


def dropping() -> torch.nn.Module:
    """A model with a dropout of one half everywhere, in training mode."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT2_SIZES, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    return transformers.GPT2LMHeadModel(config).train()


@torch.no_grad()
def plain(hf) -> torch.Tensor:
    """The logits of transformers alone, of a copy in evaluation mode."""
    twin = type(hf)(hf.config).eval()
    twin.load_state_dict(hf.state_dict())
    return twin.to(hf.dtype)(TOKENS).logits


class TestWrappers:
    @pytest.mark.parametrize(
        "wrap", [torch.compile, torch.nn.DataParallel, lambda hf: torch.nn.DataParallel(torch.compile(hf))]
    )
    def test_a_wrapper_is_taken_off_and_sees_what_is_done_to_the_model_within(self, wrap):
        hf = random_hf("llama")
        expected, wrapper = plain(hf), wrap(hf)
        model = load_model(wrapper)
        assert model.hf is hf and torch.equal(model(TOKENS), expected)
        with model.hooks({"L1.mlp.out": torch.zeros_like}):
            assert not torch.equal(model(TOKENS), expected)
        rows = model.rows("L1.mlp.out")
        model.write_("L1.mlp.out", rows + 1)
        assert torch.equal(
            next(p for n, p in wrapper.named_parameters() if n.endswith("layers.1.mlp.down_proj.weight")),
            hf.model.layers[1].mlp.down_proj.weight,
        )
        assert not torch.equal(model(TOKENS), expected)

    def test_a_tokenizer_beside_the_model_is_the_model_with_its_tokenizer(self, world):
        one, two = load_model(world.hf, tokenizer=world.tokenizer), load_model((world.hf, world.tokenizer))
        assert one.tokenizer is two.tokenizer is world.tokenizer and one.hf is two.hf
        assert torch.equal(one("The capital of"), world("The capital of"))
        assert load_model(world.hf).tokenizer is None
        assert load_model((world.hf, None), tokenizer=world.tokenizer).tokenizer is world.tokenizer
        assert load_model("factworld", tokenizer=world.tokenizer).tokenizer is world.tokenizer


class TestTrainingMode:
    @pytest.fixture
    def trained(self):
        model = load_model(dropping())
        model.hf.train()
        model.hf.transformer.h[1].eval()  # a mode of its own
        modes = [part.training for part in model.hf.modules()]
        yield model
        assert [part.training for part in model.hf.modules()] == modes, "modes are as they were"

    def test_a_model_that_is_loaded_is_in_evaluation_mode(self):
        hf = dropping()
        assert not torch.equal(hf(TOKENS).logits, hf(TOKENS).logits), "dropout is on"
        assert torch.equal(load_model(hf)(TOKENS), plain(hf)) and not hf.training

    @torch.no_grad()
    def test_what_a_model_says_has_no_dropout_whatever_its_mode(self, trained):
        expected, prompts = plain(trained.hf), token_prompts()
        assert torch.equal(trained(TOKENS), expected) and torch.equal(trained.run_with_cache(TOKENS)[0], expected)
        assert torch.equal(trained.generate(TOKENS, max_new_tokens=3), trained.generate(TOKENS, max_new_tokens=3))
        found = measure(trained, prompts), answered(trained, prompts)
        with evaluating(trained.hf):
            again = measure(trained, prompts), answered(trained, prompts)
        assert torch.equal(found[0]["probability"], again[0]["probability"]) and torch.equal(found[1], again[1])

    @pytest.mark.parametrize("localizer", [attribution_patching, activation_patching])
    def test_localizers_find_what_they_find_in_evaluation_mode(self, trained, localizer):
        found = localizer(trained, token_prompts())
        with evaluating(trained.hf):
            again = localizer(trained, token_prompts())
        assert all(torch.equal(found.scores[site], again.scores[site]) for site in again.scores)

    def test_editors_make_what_they_make_in_evaluation_mode(self, trained):
        mask, prompts = ComponentMask.of(["L1.mlp.out"], trained.signature), token_prompts()
        made = masked_gradient(trained, mask, prompts, prompts, steps=2, lr=0.01)
        with evaluating(trained.hf):
            again = masked_gradient(trained, mask, prompts, prompts, steps=2, lr=0.01)
        one, two = made.new_rows(trained), again.new_rows(trained)
        assert one and all(torch.equal(one[name], two[name]) for name in one)

    def test_modes_come_back_after_an_error(self, trained):
        with pytest.raises(MechunlearnError, match="No activation site"):
            trained.cache(TOKENS, ["L9.mlp.out"])
        with pytest.raises(RuntimeError, match="inside"), evaluating(trained.hf):
            raise RuntimeError("inside")


class TestStates:
    def test_gradient_checkpointing_changes_nothing(self):
        hf, prompts = random_hf("llama"), token_prompts()
        expected = attribution_patching(load_model(random_hf("llama")), prompts)
        hf.gradient_checkpointing_enable()
        hf.enable_input_require_grads()
        hf.train()
        model = load_model(hf)
        hf.train()
        found = attribution_patching(model, prompts)
        assert all(torch.equal(found.scores[site], expected.scores[site]) for site in expected.scores)
        mask = ComponentMask.of(["L1.mlp.out"], model.signature)
        edit = masked_gradient(model, mask, prompts, prompts, steps=2, lr=0.01)
        assert hf.is_gradient_checkpointing and hf.training and edit.units

    @pytest.mark.parametrize("off", ["weights", "everywhere"])
    def test_gradients_that_are_off_stay_off_and_keep_nobody_from_working(self, off):
        hf, prompts = random_hf("llama"), token_prompts()
        expected = attribution_patching(load_model(random_hf("llama")), prompts)
        mask = ComponentMask.of(["L1.mlp.out"], expected.signature)
        wanted = masked_gradient(load_model(random_hf("llama")), mask, prompts, prompts, steps=2, lr=0.01)
        model = load_model(hf.requires_grad_(off != "weights"))
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(off != "everywhere")
        try:
            found = attribution_patching(model, prompts)
            edit = masked_gradient(model, mask, prompts, prompts, steps=2, lr=0.01)
            assert torch.is_grad_enabled() == (off != "everywhere")
        finally:
            torch.set_grad_enabled(before)
        assert all(torch.equal(found.scores[site], expected.scores[site]) for site in expected.scores)
        assert {p.requires_grad for p in hf.parameters()} == {off != "weights"}
        rows = edit.new_rows(model)
        assert all(torch.equal(rows[name], row) for name, row in wanted.new_rows(model).items())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_stays_and_gives_the_logits_of_transformers(self, dtype, tmp_path):
        hf, prompts = random_hf("llama"), token_prompts()
        hf.save_pretrained(tmp_path / "stored")
        stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stored", dtype=dtype)
        expected = stored(TOKENS).logits
        model = load_model(stored)
        assert model.dtype == dtype and torch.equal(model(TOKENS), expected)
        assert torch.equal(load_model(hf, dtype=dtype)(TOKENS), expected), "converted as from_pretrained converts"
        mask = ComponentMask.of(["L1.mlp.out"], model.signature)
        edit = masked_gradient(model, mask, prompts, prompts, steps=2, lr=0.05)
        with edit.applied(model):
            assert model.dtype == dtype and not torch.equal(model(TOKENS), expected)
            logits = model(TOKENS)
        assert torch.equal(model(TOKENS), expected)
        edit.export(model, tmp_path / "edited")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
        assert again.dtype == dtype and torch.equal(again(TOKENS).logits, logits)

    def test_the_users_gradients_are_left_alone(self):
        model, prompts = load_model(random_hf("llama")), token_prompts()
        model.hf(TOKENS).logits.sum().backward()
        before = [p.grad.clone() for p in model.hf.parameters()]
        mask = ComponentMask.of(["L1.mlp.out"], model.signature)
        masked_gradient(model, mask, prompts, prompts, steps=2, lr=0.05)
        attribution_patching(model, prompts)
        assert all(torch.equal(p.grad, kept) for p, kept in zip(model.hf.parameters(), before, strict=True))


def adapted():
    return peft.get_peft_model(
        random_hf("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )


def compiled():
    hf = random_hf("llama")
    hf.compile()
    return hf


def compiled_part():
    hf = random_hf("llama")
    hf.model.layers[1] = torch.compile(hf.model.layers[1])
    return hf


def offloaded():
    from accelerate import cpu_offload

    return cpu_offload(random_hf("llama"), torch.device("cpu"))


def quantized():
    hf = random_hf("llama")
    hf.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    return hf


def packed():
    return torch.ao.quantization.quantize_dynamic(random_hf("llama"), {torch.nn.Linear})


class Packed(torch.nn.Module):
    """As GPTQ and AWQ have it: integers, and no weight."""

    def __init__(self, old):
        super().__init__()
        self.in_features, self.out_features = old.in_features, old.out_features
        self.register_buffer("qweight", torch.zeros(old.out_features, old.in_features // 8, dtype=torch.int32))

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


def without_weights():
    hf = random_hf("llama")
    hf.model.layers[1].mlp.down_proj = Packed(hf.model.layers[1].mlp.down_proj)
    return hf


def parametrized():
    hf = random_hf("llama")
    torch.nn.utils.parametrizations.weight_norm(hf.model.layers[1].mlp.down_proj)
    return hf


def shared():
    hf = random_hf("llama")
    hf.model.layers[1].mlp.down_proj.weight = hf.model.layers[0].mlp.down_proj.weight
    return hf


def made_in_inference_mode():
    with torch.inference_mode():
        return random_hf("llama")


def empty():
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "deterministic": deterministic,
}


class TestGlobalState:
    """What a notebook has switched on changes no number, and is as it was afterwards."""

    @pytest.fixture(scope="class")
    def plain(self, world):
        return self.numbers(world)

    def numbers(self, model):
        facts = load_facts("factworld/sport")[:64]
        forget, retain = facts.prompts(model).split(forget=8, retain=24)
        mask = ComponentMask.of(["L1.mlp.out"], model.signature)
        edit = masked_gradient(model, mask, forget, retain, lr=1e-3, steps=3)
        rows = quantization(model, edit, forget, retain, bits=[4])
        found = {
            "scores": torch.cat(list(attribution_patching(model, forget).scores.values())),
            "circuit": edge_attribution(model, forget).scores,
            "lens": torch.tensor(logit_lens(model, forget).select_dtypes("number").to_numpy(dtype=float)),
            "rows": edit.rows["L1.mlp.out"],
            "probability": measure(model, forget)["probability"],
            "text": text_loss(model, ["Anna plays golf."]),
            "attack": torch.tensor(rows.select_dtypes("number").to_numpy(dtype=float)),
        }
        return found, type(facts.known(model)), load_model("factworld").fingerprint

    @pytest.mark.parametrize("state", STATES)
    def test_numbers_are_the_same(self, state, world, plain):
        def now():
            return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

        with STATES[state]():
            before = (*now(), torch.get_default_dtype())
            found = self.numbers(world)
            assert (*now(), torch.get_default_dtype()) == before
        for name, value in plain[0].items():
            assert found[0][name].dtype == value.dtype, name
            assert torch.equal(found[0][name].nan_to_num(-1), value.nan_to_num(-1)), name
        assert found[1:] == plain[1:]

    def test_another_default_device_is_not_used(self, world):
        """As with `torch.set_default_device("cuda")`."""
        with torch.device("meta"):
            forget, retain = load_facts("factworld/sport").prompts(world).split(forget=8, retain=24)
            assert not forget.tokens.is_meta and not measure(world, retain)["probability"].is_meta
            assert not attribution_patching(world, forget).scores["L1.mlp.out"].is_meta

    @pytest.mark.parametrize("localizer", [attribution_patching, activation_patching, edge_attribution])
    def test_identical_runs_give_zeros(self, world, localizer):
        """Clean and corrupt prompts are the same: every score is exactly zero."""
        prompts = load_facts("factworld/sport").prompts(world).select(range(4))
        same = replace(prompts, corrupt=prompts.tokens)
        found = localizer(world, same)
        scores = [found.scores] if isinstance(found.scores, torch.Tensor) else found.scores.values()
        assert all(not each.any() for each in scores)


class TestPlainlyPatched:
    """A module that its user has wrapped or patched is used as it is."""

    def test_a_patched_forward_is_run_and_stays(self):
        hf, prompts = random_hf("llama"), token_prompts()
        plain = load_model(random_hf("llama")).forward(prompts.tokens)
        mlp = hf.model.layers[1].mlp
        old, calls = mlp.forward, []

        def doubled(x):
            calls.append(1)
            return 2 * old(x)

        mlp.forward = doubled
        model = load_model(hf)
        with torch.no_grad():
            wanted = hf(prompts.tokens).logits
        assert torch.equal(model.forward(prompts.tokens), wanted) and not torch.allclose(wanted, plain)
        attribution_patching(model, prompts)
        assert mlp.forward is doubled and calls

    def test_the_users_hooks_still_act_and_stay(self):
        hf, prompts = random_hf("llama"), token_prompts()
        kept = []
        hf.model.layers[0].register_forward_hook(lambda module, given, made: kept.append(made))
        hf.model.layers[1].register_forward_pre_hook(lambda module, given: (1.5 * given[0], *given[1:]))
        model = load_model(hf)
        with torch.no_grad():
            wanted = hf(prompts.tokens).logits
        assert torch.equal(model.forward(prompts.tokens), wanted)
        attribution_patching(model, prompts)
        assert len(hf.model.layers[0]._forward_hooks) == len(hf.model.layers[1]._forward_pre_hooks) == 1
        assert len(kept) >= 2

    def test_a_linear_map_of_a_class_of_ones_own(self):
        class Mine(torch.nn.Linear):
            pass

        hf, prompts = random_hf("llama"), token_prompts()
        old = hf.model.layers[1].mlp.down_proj
        new = hf.model.layers[1].mlp.down_proj = Mine(old.in_features, old.out_features, bias=False)
        new.weight = old.weight
        found, plain = (attribution_patching(load_model(each), prompts) for each in (hf, random_hf("llama")))
        assert all(torch.equal(found.scores[site], plain.scores[site]) for site in plain.scores)
        assert len(found.top(weights=0.05)) == len(plain.top(weights=0.05))


class TestRefusals:
    @pytest.mark.parametrize(
        "made, said",
        [
            (adapted, r"PeftModel\w*\) has adapters.*merge_and_unload"),
            (lambda: adapted().base_model.model, r"LlamaForCausalLM\) has adapters"),
            (compiled, "The model is compiled in place.*before .compile"),
            (compiled_part, "'model.layers.1' is compiled in place"),
            (offloaded, "placed by accelerate"),
            (quantized, "'model.layers.0.mlp.up_proj.weight' is quantized.*int8"),
            (packed, r"'model.layers.0.self_attn.q_proj' is quantized \(torch.ao"),
            (without_weights, r"'model.layers.1.mlp.down_proj' is quantized or packed: a .*Packed without a weight"),
            (parametrized, "'model.layers.1.mlp.down_proj' has a parametrized weight.*remove_parametrizations"),
            (shared, "'model.layers.0.mlp.down_proj.weight' and 'model.layers.1.mlp.down_proj.weight' are one weight"),
            (made_in_inference_mode, "was made in inference mode"),
            (empty, "has no data"),
            (lambda: random_hf("llama").model, r"LlamaModel\) has no unembedding.*AutoModelForCausalLM"),
            (lambda: torch.nn.Linear(2, 2), "Got a Linear. Expected a causal language model of transformers"),
        ],
    )
    def test_what_hooks_or_edits_would_miss_is_refused(self, made, said):
        with pytest.raises(MechunlearnError, match=said):
            load_model(made())

    def test_merged_adapters_are_the_models_own_weights(self, tmp_path):
        hf = adapted()
        expected = hf(TOKENS).logits
        model = load_model(hf.merge_and_unload())
        torch.testing.assert_close(model(TOKENS), expected, atol=1e-5, rtol=1e-5)
        export(model, tmp_path / "merged")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(TOKENS).logits, model(TOKENS))
