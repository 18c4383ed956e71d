"""`mechunlearn doctor`: what it says of a model is what can be counted otherwise."""

import re

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mechunlearn import load_facts
from mechunlearn.metrics.answers import measure
from tests.models import random_hf


def test_the_shipped_world(call, world):
    code, out, err = call("doctor", "factworld")
    assert (code, err) == (0, "")
    said = dict(re.findall(r"^(\S.*?)\s{2,}(.*)$", out, re.MULTILINE))
    assert said["model"].startswith("factworld: Qwen2ForCausalLM, 1.7 million parameters (tied embeddings)")
    assert said["family"] == str(world.signature) and said["weights"] == "float32, on cpu"
    assert said["before a text"] == "<|bos|>" and said["after a text"] == "nothing"
    assert said["chat template"] == "none" and said["tokenizer"].endswith(", fast")
    forward, both = map(
        float, re.match(r"(\S+) forward, (\S+) forward and back \(measured", said["seconds a fact"]).groups()
    )
    assert 0 < forward < both * 2 < 2
    for relation in ("sport", "city", "country"):
        facts = load_facts(f"factworld/{relation}").prompts(world)
        known, asked = map(int, re.match(r"(\d+) of (\d+), such as '", said[f"factworld/{relation}"]).groups())
        assert asked == len(facts) and known == int(measure(world, facts)["accuracy"].sum())


def test_memory_grows_with_the_model_and_is_said_to_be_an_estimate(call):
    _, out, _ = call("doctor", "factworld")
    assert "estimates for a mask of 5%, beside the weights" in out
    assert re.search(r"masked_gradient\s+\d+\.\d\d GiB", out) and re.search(r"memit, washing\s+\d+\.\d\d GiB", out)


def test_a_tokenizer_without_padding_or_template(call, tmp_path, capsys):
    """A model that knows nothing, whose tokenizer has no padding and no template."""
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "Oslo", *map(str, range(94))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), eos_token="<eos>"
    )
    random_hf("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capsys.readouterr()  # the bar of save_pretrained
    code, out, err = call("doctor", tmp_path / "model")
    assert (code, err) == (0, "") and "gpt2: 3 layers" in out
    assert re.search(r"before a text\s+nothing\n", out) and re.search(r"pads with\s+<eos> \(end of text\)", out)


@pytest.mark.parametrize(
    "model, said",
    [
        ("no-such-model", "Could not load a model from 'no-such-model'"),
        ("./nothing", "There is no folder './nothing'"),
        ("nothing.gguf", "There is no file 'nothing.gguf'"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(call, model, said):
    code, _, err = call("doctor", model)
    assert code == 2 and said in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.real
def test_a_real_model(call, smollm2, monkeypatch):
    monkeypatch.setattr("mechunlearn.cli.doctor._relations", lambda model: [])
    code, out, err = call("doctor", "smollm2")
    assert (code, err) == (0, "")
    assert "smollm2: LlamaForCausalLM, 134.5 million parameters (tied embeddings)" in out
    assert "llama: 30 layers, 9 heads, 3 kv heads, d_mlp 1536, d_model 576" in out
    assert re.search(r"before a text\s+nothing\n", out) and re.search(r"chat template\s+yes", out)
    assert "49,152 tokens, texts of up to 8,192" in out and "0.50 GiB for the weights" in out
