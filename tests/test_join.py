"""The join between a prompt and its answer, with tokenizers of every kind: what the model sees is the whole text in one piece."""

from dataclasses import replace

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import mechunlearn as mu
from mechunlearn.facts.formats import Query
from mechunlearn.facts.join import Joiner, separator
from mechunlearn.facts.prompts import Prompts

CORPUS = [
    "The capital of France is Paris, and that of Norway is Oslo. It is called 'Lima' or (Lima).",
    "Apollo 11 landed in 1969; Sputnik flew in 1957. Question: what?\nAnswer: Rome",
    "法国的首都是巴黎。日本の首都は東京です。ประเทศไทยมีเมืองหลวงคือกรุงเทพ",
    "عاصمة مصر هي القاهرة. The sign of joy is 🙂, of love ❤️.",
] * 3
SPECIAL = ["<s>", "</s>", "<unk>"]


def wrapped(tokenizer: Tokenizer, **names) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **names
    )


def ended(tokenizer: Tokenizer, form: str) -> Tokenizer:
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    bytes_first = [processors.ByteLevel(trim_offsets=True)] if isinstance(tokenizer.decoder, decoders.ByteLevel) else []
    tokenizer.post_processor = processors.Sequence(
        [*bytes_first, processors.TemplateProcessing(single=form, special_tokens=ids)]
    )
    return tokenizer


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=500, max_token_length=9, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    return made


def prepending() -> Tokenizer:
    """Llama 2's and Mistral 0.1's kind: a mark is put before the text, and one takes the place of every space."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, max_token_length=8))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


def metaspace() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return made


def word_pieces() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL))
    return made


class Characters(PreTrainedTokenizer):
    """Written in Python: a character is a token; nothing says which ones a token covers."""

    def __init__(self, **names):
        self.known = sorted({c for text in CORPUS for c in text} | set('❤️🙂"xyz\n'))
        super().__init__(**names)

    @property
    def vocab_size(self):
        return len(self.known)

    def get_vocab(self):
        return {c: i for i, c in enumerate(self.known)} | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.known.index(token) if token in self.known else self.unk_token_id

    def _convert_id_to_token(self, index):
        return self.known[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0, self.eos_token_id]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        return [1, *[0] * len(token_ids_0), 1]


KINDS = {
    "byte-level BPE": lambda: wrapped(byte_level()),
    "byte-level BPE with a beginning": lambda: wrapped(ended(byte_level(), "<s> $A")),
    "byte-level BPE with an end": lambda: wrapped(ended(byte_level(), "$A </s>")),
    "SentencePiece, legacy": lambda: wrapped(ended(prepending(), "<s> $A")),
    "SentencePiece": lambda: wrapped(ended(metaspace(), "<s> $A </s>")),
    "word pieces": lambda: wrapped(ended(word_pieces(), "<s> $A </s>")),
    "written in Python": lambda: Characters(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
}
JOINS = [
    ("The capital of France is", " ", "Paris"),
    ("The capital of France is ", "", "Paris"),
    ("Apollo 11 landed in", " ", "1969"),
    ("Apollo 11 landed in ", "", "1969"),
    ("Question: what?\nAnswer:\n", "", "Rome"),
    ("Question: what?\nAnswer:", " ", "Rome"),
    ("It is called '", "", "Lima"),
    ('It is called "', "", "Lima"),
    ("It is called (", "", "Lima"),
    ("It is called 'Lima'", " ", "or"),
    ("法国的首都是", "", "巴黎"),
    ("日本の首都は", "", "東京"),
    ("ประเทศไทยมีเมืองหลวงคือ", "", "กรุงเทพ"),
    ("عاصمة مصر هي", " ", "القاهرة"),
    ("The sign of joy is", " ", "🙂"),
    ("法国的首都是", "", "Paris"),
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def plain(tokenizer, text: str) -> list[int]:
    """The whole text in one piece, without an end that the tokenizer adds."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def is_word_pieces(tokenizer) -> bool:
    return tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.model, models.WordPiece)


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prompt, between, answer", JOINS, ids=lambda each: repr(each))
def test_a_row_is_the_whole_text_and_the_answer_its_last_characters(tokenizer, prompt, between, answer):
    assert separator(prompt, answer) == between
    row = Prompts.from_text([Query(prompt, answer, "x", options=(answer, "xyz"))], tokenizer)
    whole = plain(tokenizer, prompt + between + answer)
    assert [*row.tokens[0].tolist(), int(row.answers[0][row.answers[0] >= 0][-1])] == whole
    assert not set(whole[1:]) & {tokenizer.bos_token_id, tokenizer.eos_token_id}, "special tokens, once, at the start"
    count = int(row.start[0]) + 1
    assert row.answers[0].tolist() == whole[count:]
    if tokenizer.unk_token_id not in whole and not is_word_pieces(tokenizer):
        shown, further = (text_of(tokenizer, whole[:n]) for n in (count, count + 1))
        assert prompt.startswith(shown.rstrip("\ufffd")), "no character of the answer"
        assert not prompt.startswith(further) or "\ufffd" in further, "and no token of the prompt is left out"
        assert text_of(tokenizer, whole).endswith(answer)
    for name, text in (("targets", "x"), ("foils", "xyz")):
        other = plain(tokenizer, prompt + between + text)
        assert other[:count] == whole[:count] and getattr(row, name)[0].tolist() == other[count:]
    assert row.options[0] == (tuple(whole[count:]), tuple(plain(tokenizer, prompt + between + "xyz")[count:]))


def test_where_an_answer_swallows_the_end_of_the_prompt_the_prompt_ends_before_it_for_all():
    """One of the answers merges with the last word of the prompt; the other one does not."""
    made = Tokenizer(
        models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3, "bc": 4, "d": 5, "<s>": 6, "</s>": 7}, "<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex("bc|."), "isolated")
    row = Prompts.from_text([Query("ab", "d", "c", "c", separator="")], wrapped(made))
    assert (row.tokens[0].tolist(), row.start.tolist()) == ([1, 2], [0])
    assert (row.answers.tolist(), row.targets.tolist()) == ([[2, 5]], [[4]])
    made.pre_tokenizer = pre_tokenizers.Split(Regex("a|bc|."), "isolated")
    with pytest.raises(mu.MechunlearnError, match="one token of the prompt 'b' and the beginning of an answer"):
        Prompts.from_text([Query("b", "c", "d", "d", separator="")], wrapped(made))
    with pytest.raises(mu.MechunlearnError, match="The subject 'b' ends in one token with the beginning of an answer"):
        Prompts.from_text([Query("ab", "d", "c", "c", "b", separator="")], wrapped(made))


def test_the_separator_is_the_data_s_or_the_caller_s(tokenizer):
    query = Query("The capital of France is", "Paris", "Rome")
    for given, between in ((replace(query, answer="\nParis"), "\n"), (replace(query, separator=": "), ": ")):
        row = Prompts.from_text([given], tokenizer)
        whole = plain(tokenizer, f"{query.prompt}{between}Paris")
        assert [*row.tokens[0].tolist(), row.answers[0].tolist()[-1]] == whole


@pytest.mark.parametrize("prompt", ["The capital of France is ____", "It is 'Lima'", "Answer:", "in (the) end", "1969"])
def test_a_space_stands_behind_what_opens_nothing(prompt):
    assert separator(prompt, "Paris") == " "


def test_a_beginning_that_the_prompt_writes_itself_stands_once():
    tokenizer = KINDS["byte-level BPE with a beginning"]()
    row = Prompts.from_text([Query("<s>The capital of France is", "Paris", "Rome")], tokenizer)
    assert row.tokens[0].tolist() == plain(tokenizer, "The capital of France is Paris")[: row.tokens.shape[1]]


def test_texts_are_the_same_behind_a_prompt_as_alone_or_tokenized_with_it(tokenizer):
    """The shortcut for many options gives what each whole text gives."""
    prompts = [prompt for prompt, *_ in JOINS]
    texts = [between + answer for _, between, answer in JOINS]
    joiner = Joiner(tokenizer)
    others = [(i, text) for i in range(len(prompts)) for text in (" Paris", "Rome", " 1957", "東京", "'s", " ")]
    found = joiner.following(prompts, texts, joiner(prompts, texts), others)
    assert [list(ids) for ids in found] == [plain(tokenizer, prompts[i] + text) for i, text in others]


def test_a_tokenizer_that_changes_text_and_knows_no_characters_is_refused():
    class Upper(Characters):
        def _tokenize(self, text, **_):
            return list(text.replace("capital", "Paris"))

    with pytest.raises(
        mu.MechunlearnError, match="changes text: 'The capital is' comes back as 'The Paris is'. Expected"
    ):
        Prompts.from_text(
            [Query("The capital", "is", "of")], Upper(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        )


def test_a_file_s_prompts_are_kept_to_the_character_and_the_separator_is_shown(tmp_path, tokenizer):
    import json

    rows = [
        {"subject": s, "prompt": f"The capital of {s}:\n", "answer": a}
        for s, a in (("France", "Paris"), ("Norway", "Oslo"))
    ]
    rows += [{"subject": "Peru", "prompt": "The capital of {} is ", "answer": "Lima", "question": "what of peru?\n"}]
    (tmp_path / "f.json").write_text(json.dumps(rows))
    facts = mu.load_facts(tmp_path / "f.json")
    assert [fact.queries["statement"].prompt for fact in facts] == [
        "The capital of France:\n", "The capital of Norway:\n", "The capital of Peru is "
    ]  # fmt: skip
    assert facts[2].queries["question"].subject == "peru", "a question may write the subject in another case"
    queries = [fact.queries["statement"] for fact in facts]
    assert "'Paris', joined by ''" in repr(Prompts.from_text(queries, tokenizer))
    given = mu.load_facts(tmp_path / "f.json", separator=" = ")
    assert {fact.queries["statement"].joined_by for fact in given} == {" = "}
