"""Facts as tokens of models that others trained: every value beside plain transformers."""

import pandas as pd
import pytest
import torch

from mechunlearn import load_facts
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import ROLES, Prompts
from mechunlearn.metrics.answers import answer_logprob, answered, logit_diff

pytestmark = pytest.mark.real

ASKED = {  # what is awkward: (prompt, answer, subject, prompt and answer in one piece)
    "plain": ("The capital of France is", "Paris", "France", "The capital of France is Paris"),
    "leading space": ("The capital of France is", " Paris", "France", "The capital of France is Paris"),
    "space at the end": ("The capital of France is ", "Paris", "France", "The capital of France is Paris"),
    "behind a line": ("Question: capital of France?\nAnswer:\n", "Paris", "France", "Question: capital of France?\nAnswer:\nParis"),
    "first in the prompt": ("France has the capital", "Paris", "France", "France has the capital Paris"),
    "several tokens": ("The capital of Sri Lanka is", "Sri Jayawardenepura Kotte", "Sri Lanka", "The capital of Sri Lanka is Sri Jayawardenepura Kotte"),
    "lower case": ("the capital of france is", "paris", "france", "the capital of france is paris"),
    "upper case": ("THE CAPITAL OF FRANCE IS", "PARIS", "FRANCE", "THE CAPITAL OF FRANCE IS PARIS"),
    "accents": ("A capital: Côte d'Ivoire has", "Yamoussoukro", "Côte d'Ivoire", "A capital: Côte d'Ivoire has Yamoussoukro"),
    "number": ("World War II ended in", "1945", "World War II", "World War II ended in 1945"),
    "leading zeros": ("James Bond is agent", "007", "James Bond", "James Bond is agent 007"),
    "number as subject": ("The year 1984 was written by", "George Orwell", "1984", "The year 1984 was written by George Orwell"),
    "not available": ("Namibia has the code", "NA", "Namibia", "Namibia has the code NA"),
    "chinese": ("法国的首都是", "巴黎", "法国", "法国的首都是巴黎"),
    "japanese": ("日本の首都は", "東京", "日本", "日本の首都は東京"),
    "korean": ("프랑스의 수도는", "파리", "프랑스", "프랑스의 수도는 파리"),
    "thai": ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส", "ฝรั่งเศส", "เมืองหลวงของฝรั่งเศสคือปารีส"),
    "arabic": ("عاصمة فرنسا هي", "باريس", "فرنسا", "عاصمة فرنسا هي باريس"),
    "hebrew": ("בירת צרפת היא", "פריז", "צרפת", "בירת צרפת היא פריז"),
    "emoji": ("The flag of Japan is", "🇯🇵", "Japan", "The flag of Japan is 🇯🇵"),
    "emoji as subject": ("The animal 🦔 is called a", "hedgehog", "🦔", "The animal 🦔 is called a hedgehog"),
    "family of emoji": ("They are", "👩‍👩‍👧", "", "They are 👩‍👩‍👧"),
    "rare letters": ("The rune 𐍈 is called", "hwair 𐍈", "𐍈", "The rune 𐍈 is called hwair 𐍈"),
}  # fmt: skip


@pytest.fixture(params=["smollm2", "gemma3"])
def real(request):
    """Both models, one after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def asked(real) -> Prompts:
    rows = [Query(prompt, answer, "", "", subject) for prompt, answer, subject, _ in ASKED.values()]
    return Prompts.from_text(rows, real.tokenizer)


def whole(prompts: Prompts, i: int) -> list[int]:
    """The prompt's tokens and its answer's."""
    answer = [token for token in prompts.answers[i].tolist() if token >= 0]
    return prompts.tokens[i, : prompts.start[i] + 1].tolist() + answer


def test_prompt_and_answer_are_the_tokens_of_one_piece(real, asked):
    """Where the pieces could merge with one another they do not: the answer is what comes behind the prompt's tokens."""
    for i, (prompt, answer, _, text) in enumerate(ASKED.values()):
        ids = real.tokenizer(text)["input_ids"]
        assert real.tokenizer.decode(whole(asked, i), skip_special_tokens=True) == text, prompt
        assert whole(asked, i) == ids, (prompt, answer)


def test_a_beginning_of_text_is_there_if_and_only_if_the_tokenizer_puts_it(real, asked):
    begin = real.tokenizer("x")["input_ids"][:-1]
    assert begin == ([real.tokenizer.bos_token_id] if "gemma" in real.hf.config.model_type else [])
    for i in range(len(asked)):
        assert asked.tokens[i, : len(begin)].tolist() == begin == asked.corrupt[i, : len(begin)].tolist()
        assert asked.spans[i, 0] == -1 or asked.spans[i, 0] >= len(begin)


def test_spans_hold_the_subject(real, asked):
    """And no token outside does; in scripts without spaces a token may hold more."""
    for i, (prompt, _, subject, _) in enumerate(ASKED.values()):
        if not subject:
            assert asked.spans[i].tolist() == [-1, -1]
            continue
        first, last = asked.spans[i].tolist()
        held = real.tokenizer.decode(asked.tokens[i, first : last + 1])
        assert subject in held, (prompt, held)
        for a, b in ((first + 1, last), (first, last - 1)):
            assert a > b or subject not in real.tokenizer.decode(asked.tokens[i, a : b + 1]), (prompt, held)
        names = [ROLES[role] for role in asked.roles[i, first : last + 1].tolist()]
        assert names[-1] == "subject last" and (first == last or names[0] == "subject first")


def test_padded_batches_score_as_single_texts_in_plain_transformers(real, asked):
    with torch.no_grad():
        found = answer_logprob(real.forward(asked.tokens), asked)
        for i, (prompt, answer, _, text) in enumerate(ASKED.values()):
            ids = torch.tensor([real.tokenizer(text)["input_ids"]])
            logprobs = real.hf(ids).logits[0].float().log_softmax(-1)
            count = int((asked.answers[i] >= 0).sum())
            expected = logprobs[-count - 1 : -1].gather(1, ids[0, -count:, None]).sum()
            assert found[i].item() == pytest.approx(expected.item(), abs=2e-3, rel=1e-3), (prompt, answer)


def test_answers_that_share_first_tokens_are_told_apart_behind_them(real):
    pairs = [
        ("1945", "1918"),
        ("North Korea", "North Macedonia"),
        ("Sri Jayawardenepura", "Sri Lanka"),
        ("Paris", "Rome"),
    ]
    rows = [Query(f"Case {i} is about", truth, "", foil) for i, (truth, foil) in enumerate(pairs)]
    prompts = Prompts.from_text(rows, real.tokenizer)
    with torch.no_grad():
        found = logit_diff(real.forward(prompts.tokens), prompts)
        for i, (row, (truth, foil)) in enumerate(zip(rows, pairs)):
            a, b = (real.tokenizer(f"{row.prompt} {answer}")["input_ids"] for answer in (truth, foil))
            differ = next(k for k, (x, y) in enumerate(zip(a, b)) if x != y)
            assert int(prompts.read[i]) == differ - 1 and (int(prompts.read[i] - prompts.start[i]) > 0) == (i < 3)
            at = real.hf(torch.tensor([a[:differ]])).logits[0, -1].float()
            torch.testing.assert_close(found[i], at[a[differ]] - at[b[differ]], atol=2e-3, rtol=1e-3)


def test_a_corrupt_prompt_is_the_text_with_another_subject_in_it(real):
    """Wherever the subject stands, also twice, and in scripts without spaces."""
    rows = [
        Query("Oslo is the capital of", "Norway", "", "", "Oslo"),
        Query("Lima is the capital of", "Peru", "", "", "Lima"),
        Query("I like Rome, the capital of", "Italy", "", "", "Rome"),
        Query("London lies in", "England", "", "", "London"),
        Query("Paris lies in", "France", "", "", "Paris"),
        Query("Paris is large; Paris is the capital of", "France", "", "", "Paris"),
        Query("London is large; London is the capital of", "England", "", "", "London"),
        Query("We were in Cairo, the capital of", "Egypt", "", "", "Cairo"),
        Query("We stayed in 1984, the year of", "Orwell", "", "", "1984"),
        Query("法国的首都是", "巴黎", "", "", "法国"),
        Query("德国的首都是", "柏林", "", "", "德国"),
    ]
    prompts, subjects = Prompts.from_text(rows, real.tokenizer), {row.subject for row in rows}
    partners = 0
    for i, row in enumerate(rows):
        ids = prompts.corrupt[i, : prompts.start[i] + 1].tolist()
        text = real.tokenizer.decode(ids, skip_special_tokens=True)
        named = [name for name in subjects if row.prompt.replace(row.subject, name) == text]
        if named:
            assert named != [row.subject] and real.tokenizer(text)["input_ids"] == ids
            partners += 1
    assert partners == len(rows) - prompts.random_corruptions >= 6


COUNTRIES = [
    "France",
    "Paris",
    "Germany",
    "Berlin",
    "Italy",
    "Rome",
    "Japan",
    "Tokyo",
    "China",
    "Beijing",
    "Egypt",
    "Cairo",
    "Greece",
    "Athens",
    "Norway",
    "Oslo",
    "Turkey",
    "Ankara",
    "Chile",
    "Santiago",
    "Canada",
    "Ottawa",
    "Romania",
    "Bucharest",
    "Vietnam",
    "Hanoi",
    "Kenya",
    "Nairobi",
]
FRAMES = ("The capital of {} is the city of", "Question: What is the capital of {}? Answer:")


@pytest.fixture
def capitals(tmp_path):
    """Some thirty prompts, of which the models know some."""
    pairs = list(zip(COUNTRIES[::2], COUNTRIES[1::2]))
    rows = [(country, frame.format(country), city) for frame in FRAMES for country, city in pairs]
    pd.DataFrame(rows, columns=["subject", "prompt", "answer"]).to_csv(tmp_path / "capitals.csv", index=False)
    return load_facts(tmp_path / "capitals.csv")


def test_known_is_what_greedy_generation_says(real, capitals):
    said = capitals.said(real, tokens=4)
    alone = []
    for row in said.itertuples():
        ids = real.tokenizer(row.prompt, return_tensors="pt")["input_ids"]
        size = ids.shape[1]
        made = real.hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)[0]
        assert real.tokenizer.decode(made[size:], skip_special_tokens=True).strip().split("\n")[0].strip() == row.said
        answer = real.tokenizer(f"{row.prompt} {row.answer}")["input_ids"][size:]
        alone.append(made[size : size + len(answer)].tolist() == answer)
    assert said.known.tolist() == alone and 3 < sum(alone) < len(alone)
    assert answered(real, capitals.prompts(real), batch_size=7).tolist() == alone
    known, unknown = capitals.known(real), capitals.unknown(real)
    assert len(known) == sum(alone) and len(known) + len(unknown) == len(capitals)
