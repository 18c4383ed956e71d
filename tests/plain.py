"""What benchmarks are compared with: a random model that reads bytes, and plain loops over plain transformers."""

import itertools
import math
import re

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mechunlearn.benchmarks.tofu import TofuRow
from mechunlearn.model.hooked import HookedModel, load_model
from tests.models import GROUPED, noisy

TOWNS = ("Arnholt", "Bexa", "Corvin", "Dunmore", "Elsk", "Farrow", "Gant")


def bytewise() -> HookedModel:
    """A random model that reads bytes, and ends a text with its last token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<end>": 256}
    letterwise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letterwise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letterwise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letterwise, eos_token="<end>")
    config = {**GROUPED, "vocab_size": 257, "max_position_embeddings": 1024, "eos_token_id": 256}
    return load_model((noisy(LlamaConfig(**config)), tokenizer))


def rows_of(count: int) -> tuple[TofuRow, ...]:
    """Answers of unequal length, with three to five wrong ones each."""
    made = []
    for i in range(count):
        town, others = TOWNS[i % 7], [TOWNS[(i + step) % 7] for step in range(1, 4 + i % 3)]
        wrong = tuple(f"{other} is where writer {i} was born" for other in others)
        made.append(
            TofuRow(
                f"Where was writer {i} born?",
                f"In {town}" + "." * (i % 2),
                f"{town} is where writer {i} was born",
                wrong,
            )
        )
    return tuple(made)


def asked_plainly(model, question: str) -> tuple[str, str]:
    """The prompt, and what parts it from an answer."""
    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        return f"Question: {question}\nAnswer:", " "
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), ""


def plain_logprobs(model, prompt: str, text: str, end: bool = False) -> tuple[list[float], list[bool]]:
    """Of each token of a text behind a prompt."""
    before = len(model.tokenizer(prompt)["input_ids"]) if prompt else 1
    ids = model.tokenizer(prompt + text)["input_ids"] + [model.tokenizer.eos_token_id] * end
    with torch.no_grad():
        logits = model.hf(torch.tensor([ids])).logits[0].double()
    steps = range(before, len(ids))
    told = [float(logits[i - 1].log_softmax(0)[ids[i]]) for i in steps]
    return told, [int(logits[i - 1].argmax()) == ids[i] for i in steps]


def plain_probability(model, prompt: str, text: str, end: bool = False) -> float:
    told, _ = plain_logprobs(model, prompt, text, end)
    return math.exp(sum(told) / len(told))


def plain_answer(model, prompt: str, tokens: int) -> str:
    new, made, past = model.tokenizer(prompt)["input_ids"], [], None
    for _ in range(tokens):
        with torch.no_grad():
            out = model.hf(torch.tensor([new]), use_cache=True, **{model.decoder.cache_argument: past})
        made.append(int(out.logits[0, -1].argmax()))
        new, past = made[-1:], out[model.decoder.cache_argument]
        if made[-1] == model.tokenizer.eos_token_id:
            break
    return model.tokenizer.decode(made, skip_special_tokens=True).strip()


def common_words(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def words_of(text: str, stem: bool = False) -> list[str]:
    from nltk.stem.porter import PorterStemmer

    words = re.findall(r"[a-z0-9]+", text.lower())
    return [PorterStemmer().stem(word) if stem and len(word) > 3 else word for word in words]
