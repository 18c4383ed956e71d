"""What users of TransformerLens expect of a model: text, generation, caches, hook names. And a fingerprint that sees all."""

import inspect
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.core.files import data_folder
from mechunlearn.model import fingerprint, hooked
from mechunlearn.model.hook_points import ActivationCache, hook_points_of
from mechunlearn.model.hooked import load_model
from mechunlearn.model.text import ids_of
from tests.models import random_hf

TEXTS = ["The capital of France is", "The knight", "A company that makes"]


@pytest.fixture
def tokens():
    return torch.randint(2, 97, (2, 8), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def counting(model):
    """Each architecture, with words `<0>` to `<96>`."""
    made = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(97)}, unk_token="<0>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<0>", eos_token="<1>")
    return model


def llama():
    return load_model((random_hf("llama"), None))


class TestText:
    @torch.no_grad()
    def test_a_text_is_read_as_the_tokenizer_reads_it(self, world):
        for text in TEXTS:
            expected = world.hf(**world.tokenizer(text, return_tensors="pt")).logits
            assert torch.equal(world(text), expected) and torch.equal(world.forward(text), expected)

    @torch.no_grad()
    def test_texts_are_padded_on_the_right_and_give_the_numbers_of_each_alone(self, world):
        tokens, logits = world.to_tokens(TEXTS), world(TEXTS)
        assert logits.shape[:2] == tokens.shape
        for i, text in enumerate(TEXTS):
            ids = world.tokenizer(text)["input_ids"]
            assert (
                tokens[i, : len(ids)].tolist() == ids and (tokens[i, len(ids) :] == world.tokenizer.pad_token_id).all()
            )
            torch.testing.assert_close(logits[i, : len(ids)], world(text)[0], atol=1e-5, rtol=1e-5)

    def test_tokens_and_strings_are_those_of_the_bridge(self, world):
        for text in TEXTS:
            ids = world.to_tokens(text)
            assert torch.equal(ids[:, 1:], world.bridge.to_tokens(text, prepend_bos=False)[:, -ids.shape[1] + 1 :])
            assert world.to_str_tokens(text) == world.to_str_tokens(ids) == world.to_str_tokens(ids[0])
            assert world.to_str_tokens(ids) == world.bridge.to_str_tokens(ids)
            assert "".join(world.to_str_tokens(text)[1:]) == world.to_string(ids[0, 1:]) == text
            assert world.to_string(ids) == world.bridge.to_string(ids)
        assert world.to_str_tokens(TEXTS) == [world.to_str_tokens(text) for text in TEXTS]
        assert len(world.to_str_tokens(world.to_tokens(TEXTS))) == 3

    def test_without_a_padding_token_the_end_of_text_pads(self, counting):
        ids = counting.to_tokens(["<5>", "<6> <7>"])
        assert ids.tolist() == [[5, 0], [6, 7]]
        counting.tokenizer.pad_token = None
        assert counting.to_tokens(["<5>", "<6> <7>"]).tolist() == [[5, 1], [6, 7]]

    def test_mistakes_are_named(self, world):
        for function in (world, world.to_tokens, world.to_str_tokens, world.generate, world.run_with_cache):
            with pytest.raises(MechunlearnError, match=r"Expected a text, a list of texts, or a tensor of tokens"):
                function([])
        for given in (12, None, ["a text", 12]):
            with pytest.raises(MechunlearnError, match=r"Expected a text, a list of texts, or a tensor of tokens"):
                inspect.unwrap(ids_of)(given, world.tokenizer)  # as users call it: without the tests' type checks
        with pytest.raises(MechunlearnError, match="The text '' has no tokens"):
            plain = load_model((random_hf("gpt2"), world.tokenizer))
            plain.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
            plain("")
        for function in (llama(), llama().to_tokens, llama().generate):
            with pytest.raises(MechunlearnError, match="The model has no tokenizer. Give tokens"):
                function("a text")
        with pytest.raises(MechunlearnError, match="has no tokenizer, so its tokens have no text"):
            llama().to_string(torch.tensor([3]))


class TestGenerate:
    def test_it_continues_the_text_as_hugging_face_does(self, world):
        for text in TEXTS:
            given = world.tokenizer(text, return_tensors="pt")
            made = world.hf.generate(**given, max_new_tokens=5, do_sample=False)
            found = world.generate(text, max_new_tokens=5)
            assert found == world.tokenizer.decode(made[0], skip_special_tokens=True) and found.startswith(text)

    def test_each_token_is_the_most_likely_one(self, world):
        ids = world.to_tokens(TEXTS[0])
        for _ in range(6):
            ids = torch.cat([ids, world(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(world.generate(world.to_tokens(TEXTS[0]), max_new_tokens=6), ids)
        assert world.generate(TEXTS[0], max_new_tokens=6) == world.to_string(ids[0, 1:])

    def test_several_texts_are_continued_as_each_alone(self, world):
        assert world.generate(TEXTS, max_new_tokens=8) == [world.generate(text, max_new_tokens=8) for text in TEXTS]

    def test_of_every_architecture(self, counting):
        rows = [[5, 17, 33], [8, 9, 10, 11, 12, 13], [40]]
        texts = [counting.to_string(torch.tensor(row)) for row in rows]
        alone = [counting.generate(text, max_new_tokens=4) for text in texts]
        for pad in ("<0>", None):  # without one the end of text pads, and Hugging Face cannot guess what is padding
            counting.tokenizer.pad_token = pad
            assert counting.generate(texts, max_new_tokens=4) == alone
        for row, found in zip(rows, alone, strict=True):
            made = counting.hf.generate(torch.tensor([row]), max_new_tokens=4, do_sample=False)[0].tolist()
            assert found.split() == [f"<{token}>" for token in made if token > 1]

    def test_keywords_reach_hugging_face(self, world):
        assert world.generate(TEXTS[0]) == world.generate(TEXTS[0], max_new_tokens=10)
        drawn = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 12}
        torch.manual_seed(1)
        first = world.generate(TEXTS[0], **drawn)
        torch.manual_seed(1)
        assert world.generate(TEXTS[0], **drawn) == first != world.generate(TEXTS[0], max_new_tokens=12)
        three = world.generate(TEXTS[:2], **drawn, num_return_sequences=3)
        assert len(three) == 6 and all(text.startswith(TEXTS[i // 3]) for i, text in enumerate(three))
        assert len(world.generate(TEXTS[0], **drawn, num_return_sequences=3)) == 3
        with_scores = world.generate(TEXTS[0], max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
        torch.testing.assert_close(with_scores.logits[0], world(TEXTS[0])[:, -1], atol=1e-5, rtol=1e-5)

    def test_hooks_are_on(self, world):
        plain = world.generate(TEXTS[0], max_new_tokens=4)
        with world.hooks({"blocks.5.hook_mlp_out": torch.zeros_like}):
            hooked = world.generate(TEXTS[0], max_new_tokens=4)
            assert hooked == world.generate(TEXTS[0], max_new_tokens=4, use_cache=False) != plain
        assert world.generate(TEXTS[0], max_new_tokens=4) == plain


class TestCache:
    @torch.no_grad()
    def test_every_activation_is_that_of_the_bridge_under_each_of_its_names(self, model, tokens):
        """Of two names of the bridge, `attn.hook_out` and `hook_attn_out` say, Gemma 2 and 3 mean two things."""
        logits, cache = model.run_with_cache(tokens)
        expected, bridge = model.bridge.run_with_cache(tokens)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        assert set(cache) == set(model.decoder.sites)
        for layer in range(model.signature.layers):
            for kind, names in hook_points_of(model.layout).items():
                if f"L{layer}.{kind}" not in cache:
                    assert kind == "resid_mid" and model.layout.parallel
                    continue
                for name in (f"blocks.{layer}.{each}" for each in names):
                    assert cache[name] is cache[f"L{layer}.{kind}"] and name in cache and name not in list(cache)
                    there = bridge[name].view_as(cache[name])
                    torch.testing.assert_close(cache[name], there, atol=5e-5, rtol=1e-4, msg=name)

    @torch.no_grad()
    def test_text_of_the_shipped_world(self, world):
        logits, cache = world.run_with_cache(TEXTS[0])
        expected, bridge = world.bridge.run_with_cache(world.to_tokens(TEXTS[0]))
        assert torch.equal(logits, world.hf(world.to_tokens(TEXTS[0])).logits)
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)
        for name in ("blocks.3.hook_resid_post", "blocks.7.attn.hook_z", "blocks.0.mlp.hook_post", "blocks.5.hook_out"):
            torch.testing.assert_close(cache[name], bridge[name], atol=5e-5, rtol=1e-4)
        hidden = world.hf(world.to_tokens(TEXTS[0]), output_hidden_states=True).hidden_states
        assert all(torch.equal(cache[f"blocks.{i}.hook_resid_pre"], hidden[i]) for i in range(8))

    def test_only_what_is_named(self, world):
        _, one = world.run_with_cache(TEXTS[0], "blocks.3.hook_resid_post")
        _, two = world.run_with_cache(TEXTS[0], ["L3.resid_post", "blocks.1.attn.hook_q"])
        assert set(one) == {"L3.resid_post"} and set(two) == {"L3.resid_post", "L1.attn.q"}
        assert torch.equal(one["blocks.3.hook_out"], two["blocks.3.hook_resid_post"])
        assert not two["L1.attn.q"].requires_grad

    def test_what_is_not_there_is_named(self, world):
        _, cache = world.run_with_cache(TEXTS[0], "L3.resid_post")
        for name in (
            "L2.resid_post",
            "blocks.2.hook_resid_post",
            "blocks.3.hook_resid_pots",
            "blocks.3.attn.hook_pattern",
        ):
            assert name not in cache and cache.get(name) is None
        assert cache.get("blocks.3.hook_out") is cache["L3.resid_post"]
        with pytest.raises(KeyError, match=r"'blocks.2.hook_out' is not in this cache, which holds L3.resid_post"):
            cache["blocks.2.hook_out"]
        with pytest.raises(KeyError, match="holds nothing"):
            ActivationCache()["L1.resid_post"]
        with pytest.raises(KeyError, match=r"model.attention\(tokens, layer\)"):
            cache["blocks.3.attn.hook_pattern"]

    def test_gradients_by_hook_name(self, model, tokens):
        names = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "blocks.2.mlp.hook_post"]
        sites = ["L1.resid_post", "L0.attn.o", "L2.mlp.out"]
        found = []
        for asked in (names, sites):
            logits, cache = model.cache(tokens, asked, grad=True)
            assert set(cache) == set(sites)
            found.append(torch.autograd.grad(logits[:, -1].logsumexp(-1).sum(), [cache[each] for each in asked]))
        assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*found, strict=True))


class TestHookNames:
    @torch.no_grad()
    def test_a_hook_by_name_does_what_it_does_by_site_and_on_the_bridge(self, model, tokens):
        for name in ("hook_resid_post", "hook_out", "attn.hook_z", "mlp.hook_post", "hook_attn_out", "attn.hook_k"):
            site = model.decoder.site(f"blocks.1.{name}")
            with model.hooks({site: lambda z: z.flip(-1)}):
                by_site = model(tokens)
            with model.hooks({f"blocks.1.{name}": lambda z: z.flip(-1)}):
                assert torch.equal(model(tokens), by_site)
                on_bridge = model.bridge(tokens)
            by_bridge = [(f"blocks.1.{name}", lambda z, hook: z.flip(-1))]
            torch.testing.assert_close(on_bridge, by_site, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                model.bridge.run_with_hooks(tokens, fwd_hooks=by_bridge), by_site, atol=1e-4, rtol=1e-4
            )
            assert (by_site - model(tokens)).abs().max() > 1e-3

    def test_a_site_under_two_names_is_hooked_twice(self, tokens):
        model, seen = llama(), []
        with model.hooks({"L1.resid_post": seen.append, "blocks.1.hook_resid_post": seen.append}):
            model(tokens)
        assert len(seen) == 2 and torch.equal(*seen)

    def test_weights_by_hook_name(self, model):
        for name, kind in (("attn.hook_z", "attn.o"), ("mlp.hook_post", "mlp.out"), ("attn.hook_q", "attn.q")):
            before = model.rows(f"L1.{kind}")
            assert torch.equal(model.rows(f"blocks.1.{name}"), before)
            model.write_(f"blocks.1.{name}", before + 1)
            assert torch.equal(model.rows(f"L1.{kind}"), before + 1)
        mask = ComponentMask.of(["blocks.1.attn.hook_z[2]", "blocks.0.mlp.hook_post"], model.signature)
        assert mask == ComponentMask.of(["L1.attn.o[2]", "L0.mlp.out"], model.signature)

    @pytest.mark.parametrize(
        "name, said",
        [
            ("blocks.1.hook_resid_pots", "'blocks.1.hook_resid_pots' has no site here. Nearest: hook_resid_post"),
            ("blocks.1.attn.hook_pattern", "For attention patterns call model.attention"),
            ("blocks.7.hook_resid_post", "No activation site 'blocks.7.hook_resid_post' in llama: 3 layers"),
            ("hook_embed", "No activation site 'hook_embed'.* or a hook name of TransformerLens"),
            ("L1.nothing", "No activation site 'L1.nothing'"),
        ],
    )
    def test_a_name_without_a_site_is_refused_everywhere(self, tokens, name, said):
        model = llama()
        for use in (lambda: model.cache(tokens, [name]), lambda: model.run_with_cache(tokens, name)):
            with pytest.raises(MechunlearnError, match=said):
                use()
        with pytest.raises(MechunlearnError, match=said), model.hooks({name: lambda z: z}):
            pass
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())

    def test_an_activation_without_weights_has_no_rows(self):
        model = llama()
        with pytest.raises(MechunlearnError, match="'blocks.1.hook_resid_post' is malformed.*a kind of attn.q, "):
            model.rows("blocks.1.hook_resid_post")
        with pytest.raises(MechunlearnError, match="'blocks.1.hook_resid_pots' has no site here"):
            model.rows("blocks.1.hook_resid_pots")
        with pytest.raises(MechunlearnError, match="No site 'L7.attn.o': the model has 3 layers"):
            model.rows("blocks.7.attn.hook_z")

    def test_names_that_mean_something_else_behind_a_norm(self, tokens):
        gemma, plain = load_model((random_hf("gemma2"), None)), llama()
        assert plain.decoder.site("blocks.1.attn.hook_out") == "L1.attn_out"
        assert gemma.decoder.site("blocks.1.attn.hook_out") == "L1.attn_projected"
        with pytest.raises(MechunlearnError, match="'blocks.1.mlp.hook_out' has no site here"):
            gemma.cache(tokens, ["blocks.1.mlp.hook_out"])


def swap_rows(weight):
    weight.data[[0, 1]] = weight.data[[1, 0]]


def swap_entries(weight):
    weight.data[0, [0, 1]] = weight.data[0, [1, 0]]


WRITES = {
    "all": lambda weight: weight.data.add_(1),
    "one entry": lambda weight: weight.data[-1, -1].add_(1),
    "the last bit": lambda weight: weight.data.view(-1)[3].copy_(torch.nextafter(weight[0, 3], torch.tensor(9.0))),
    "the sign of a zero": lambda weight: weight.data[2, 2].neg_(),
    "two rows": swap_rows,
    "two entries": swap_entries,
    "another storage": lambda weight: setattr(weight, "data", weight.data + 1),
    "numpy": lambda weight: weight.detach().numpy().__imul__(2),
}


class TestFingerprint:
    @pytest.mark.parametrize("name", WRITES)
    def test_it_sees_writes_that_torch_does_not_count(self, name):
        model = llama()
        weight = model.hf.model.layers[1].mlp.down_proj.weight
        weight.data[2, 2] = 0
        before, kept, version = model.fingerprint, weight.data.clone(), weight._version
        summed = fingerprint.sums(weight)
        assert before == model.fingerprint
        WRITES[name](weight)
        after = model.fingerprint
        assert after != before and weight._version == version
        assert after == load_model((model.hf, None)).fingerprint, "it is that of the weights as they are"
        assert not torch.equal(fingerprint.sums(weight), summed), "what is compared of weights on an accelerator"
        weight.data = kept
        assert model.fingerprint == before

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_in_every_type(self, dtype):
        model = load_model((random_hf("gpt2"), None), dtype=dtype)
        before, bias = model.fingerprint, model.hf.transformer.h[0].mlp.c_fc.bias
        bias.data[5] += 1
        weight = model.hf.transformer.h[0].mlp.c_fc.weight
        summed, changed = fingerprint.sums(weight), model.fingerprint
        weight.data[3, 4] += 1
        assert len({before, changed, model.fingerprint}) == 3
        assert not torch.equal(fingerprint.sums(weight), summed) and fingerprint.sums(bias) is bias

    def test_weights_are_hashed_once_for_each_state(self, world, monkeypatch):
        hashed, plain = [], world.fingerprint
        monkeypatch.setattr(hooked, "fingerprint", lambda *given: hashed.append(1) or fingerprint.fingerprint(*given))
        model = load_model("factworld")
        rows = model.rows("L1.mlp.out")
        for _ in range(3):
            assert model.fingerprint == plain
            model.write_("L1.mlp.out", rows + 1)
            assert model.fingerprint != plain
            model.write_("L1.mlp.out", rows)
        assert len(hashed) == 2

    def test_it_is_the_one_that_is_stored(self, world):
        about = json.loads((data_folder() / "factworld-codebook" / "config.json").read_text())
        assert world.fingerprint == about["about"]["fitted_on"] != load_model("factworld-twin").fingerprint

    @pytest.mark.parametrize("assign", [False, True])
    def test_after_loading_a_state_everything_is_that_of_the_new_weights(self, model, tokens, assign):
        other = {name: weight + 0.1 for name, weight in model.hf.state_dict().items()}
        before = model.fingerprint, model.rows("L1.mlp.out")
        model.hf.load_state_dict(other, assign=assign)
        new = load_model((model.hf, None))
        assert model.fingerprint == new.fingerprint != before[0]
        for kind in model.layout.kinds:
            assert torch.equal(model.rows(f"L1.{kind}"), new.rows(f"L1.{kind}"))
        assert not torch.equal(model.rows("L1.mlp.out"), before[1])
        model.write_("L1.mlp.out", before[1])
        assert torch.equal(new.rows("L1.mlp.out"), before[1]) and model.fingerprint == new.fingerprint
        with torch.no_grad():
            assert torch.equal(model(tokens), new.hf(tokens).logits)
            if assign:
                with pytest.raises(MechunlearnError, match=r"were replaced .* Call load_model\(\(model.hf"):
                    model.bridge  # noqa: B018
            torch.testing.assert_close(new.bridge(tokens), model(tokens), atol=1e-4, rtol=1e-4)

    def test_a_bridge_whose_parameters_were_replaced_is_refused(self, tokens):
        model = llama()
        model.bridge  # noqa: B018
        model.hf.load_state_dict({n: w.clone() for n, w in model.hf.state_dict().items()}, assign=True)
        with pytest.raises(MechunlearnError, match="the bridge cannot follow"):
            model.bridge  # noqa: B018
        with torch.no_grad(), model.hooks({"L1.mlp.out": torch.zeros_like}):
            model(tokens)
