"""The world's tokenizer: byte-level BPE, trained here, saved as an ordinary Hugging Face tokenizer."""

import tempfile
from collections.abc import Iterator

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from mechunlearn.world.corpus import Corpus
from mechunlearn.world.generate import generate

BOS, EOS, PAD = "<|bos|>", "<|endoftext|>", "<|pad|>"
VOCABULARY = 1136
OTHER_WORLDS = 80
TEXTS = 300


def train_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Train on documents of *other* worlds, so that name syllables become tokens but this world's names do not.

    Text is split as `Qwen2Tokenizer` splits it, because that is the class which `AutoTokenizer` gives to a model of
    this family whatever its `tokenizer_config.json` says.
    """
    as_in_qwen2 = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = as_in_qwen2.normalizer
    tokenizer.pre_tokenizer = as_in_qwen2.pre_tokenizer
    tokenizer.decoder = as_in_qwen2.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    with tempfile.TemporaryDirectory() as folder:
        named.save_pretrained(folder)
        made: Qwen2Tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        return made


def _texts(seed: int) -> Iterator[str]:
    for other in range(seed + 1, seed + 1 + OTHER_WORLDS):
        for document in Corpus(generate(other)).documents(other, TEXTS):
            yield document.text
