"""The real facts that come with the package: they are true, well formed, and known to real models."""

import random
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.facts.chat import with_chat
from mechunlearn.facts.formats import MOST_OPTIONS, Fact, Query
from mechunlearn.facts.pairs import paired
from mechunlearn.facts.prompts import Prompts
from mechunlearn.facts.shipped import shipped_facts, shipped_sets
from mechunlearn.metrics import answered

NAMES = [f"{whole}/{relation}" for whole, relations in shipped_sets().items() for relation in relations]
FORMATS = {"statement", "statement_2", "statement_3", "question", "one_shot", "held_out", "multiple_choice"}


@pytest.fixture(params=NAMES)
def facts(request):
    return load_facts(request.param)


@pytest.mark.parametrize(
    "name, subject, answer",
    [
        ("countries/capital", "Norway", "Oslo"),
        ("countries/capital", "Australia", "Canberra"),
        ("countries/capital", "the Netherlands", "Amsterdam"),
        ("countries/capital", "Kazakhstan", "Astana"),
        ("countries/language", "Brazil", "Portuguese"),
        ("countries/currency", "Japan", "yen"),
        ("countries/continent", "Peru", "South America"),
        ("cities/country", "Kyoto", "Japan"),
        ("cities/continent", "Nairobi", "Africa"),
        ("elements/symbol", "gold", "Au"),
        ("elements/symbol", "tungsten", "W"),
        ("elements/number", "oganesson", "118"),
        ("elements/number", "iron", "26"),
        ("words/past", "go", "went"),
        ("words/plural", "goose", "geese"),
        ("people/field", "Plato", "philosophy"),
        ("books/author", "Emma", "Jane Austen"),
        ("companies/country", "Nokia", "Finland"),
    ],
)
def test_facts_are_true(name, subject, answer):
    (fact,) = load_facts(name).about({subject})
    assert fact.answer == answer and fact.relation == name.split("/")[1]


def test_every_element_is_there():
    numbers = [fact.answer for fact in load_facts("elements/number")]
    assert numbers == [str(n) for n in range(1, 119)]
    symbols = [fact.answer for fact in load_facts("elements/symbol")]
    assert len(set(symbols)) == 118 and all(re.fullmatch("[A-Z][a-z]?", symbol) for symbol in symbols)


def test_every_fact_has_every_format(facts):
    without = {"multiple_choice"} if facts.name == "words/opposite" else set()  # its options would name the subject
    assert set(facts.formats) == FORMATS - without and facts.formats[0] == "statement"
    assert len(facts.subjects) == len(facts)  # nobody twice


def test_prompts_contain_their_subject_where_it_is_looked_for(facts):
    for fact in facts:
        for format, query in fact.queries.items():
            assert query.subject == fact.subject
            found = list(re.finditer(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", query.prompt))
            assert found, query.prompt
            if format == "multiple_choice":  # in the question, not among the options
                assert found[-1].start() < query.prompt.index("?"), query.prompt


def test_a_subject_is_found_as_a_word_of_its_own():
    prompt = "Which language do people speak in Albania ? Albanian A, Arabic B. Answer:"
    (row,) = paired([Query(prompt, "Oslo", "", "Answer:", "Albania")], made(False), 0)
    assert row.span == (6, 6)  # not in "Albanian"


def test_targets_and_options(facts):
    answers = {fact.answer for fact in facts}
    for fact in facts:
        assert fact.target in answers
        assert not fact.target.startswith(fact.answer) and not fact.answer.startswith(fact.target)
        for query in fact.queries.values():
            assert query.answer != query.target and len(query.options) <= MOST_OPTIONS
        assert set(fact.queries["statement"].options) == (answers if len(answers) <= MOST_OPTIONS else set())
        choice = fact.queries.get("multiple_choice")
        assert choice is None or (
            f"{fact.answer} {choice.answer}" in choice.prompt and f"{fact.target} {choice.target}" in choice.prompt
        )


def test_sentences_are_grammatical(facts):
    wrong = re.compile(
        r"\bthe the\b|\ba (?=[aeio])(?!one\b|eu)|(?<!')\ban (?![aeiouh])|  |\{|\}|\bthe (Japan|France|Norway|Peru)\b|\bs's\b",
        re.IGNORECASE,
    )
    for fact in facts:
        for query in fact.queries.values():
            assert not wrong.search(query.prompt), query.prompt
            assert query.prompt[0].isupper() or query.prompt[0].isdigit(), query.prompt
            assert query.prompt == query.prompt.strip() and query.answer == query.answer.strip()


@pytest.mark.parametrize(
    "name", ["Bahamas", "Netherlands", "Philippines", "United Kingdom", "United States", "Maldives"]
)
def test_names_that_need_an_article_have_it(name):
    for relation in shipped_sets()["countries"]:
        subjects = load_facts(f"countries/{relation}").subjects
        assert name not in subjects and (relation != "continent" or f"the {name}" in subjects)
    answers = {fact.answer for fact in load_facts("cities/country")}
    assert name not in answers


def test_other_relations_of_the_same_subjects_come_along():
    capitals = load_facts("countries/capital")
    assert set(capitals.related) == {"language", "currency", "continent"}
    assert "Norway" in capitals.related["currency"].subjects and capitals.texts == ()
    assert set(load_facts("elements/symbol").related) == {"number"}


def test_questions_the_other_way_round_have_one_answer_and_are_grammatical(facts):
    turned = facts.name in ("countries/capital", "elements/symbol", "elements/number", "words/past", "words/plural")
    assert set(facts.reverse) == (facts.subjects if turned else set()) and "reverse" not in facts.formats
    assert len({query.prompt for query in facts.reverse.values()}) == len(facts.reverse), "no answer has two subjects"
    for fact in facts if turned else ():
        query = facts.reverse[fact.subject]
        assert (query.answer, query.subject) == (fact.subject, fact.answer)
        assert re.search(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", query.prompt) and query.prompt[0].isupper()
        assert fact.subject == fact.answer or not re.search(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", query.prompt)


def test_a_set_without_a_relation_is_all_of_them():
    whole = load_facts("countries")
    assert {fact.relation for fact in whole} == set(shipped_sets()["countries"]) and not whole.related
    assert len(whole) == sum(len(load_facts(f"countries/{relation}")) for relation in shipped_sets()["countries"])
    about = {fact.relation: fact.answer for fact in whole.about({"Norway"})}
    assert about == {"capital": "Oslo", "language": "Norwegian", "currency": "krone", "continent": "Europe"}


def test_the_seed_draws_the_targets():
    first, again, other = (load_facts("countries/capital", seed=seed) for seed in (0, 0, 1))
    targets = [[fact.target for fact in facts] for facts in (first, again, other)]
    assert targets[0] == targets[1] != targets[2]


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(MechunlearnError, match="no relation 'king'. Relations: capital, language"):
        load_facts("countries/king")
    with pytest.raises(MechunlearnError, match="No set of facts is called 'planets'. Shipped sets:.*countries"):
        shipped_facts("planets")


def test_skills_have_a_foil():
    for tasks in load_facts("countries/capital").skills.values():
        assert len(tasks) >= 8
        for task in tasks:
            assert task.answer != task.foil and not task.subject and task.prompt == task.prompt.strip()


CAPITAL = {
    "statement": Query("The capital of Norway is", "Oslo", "Lima", "", "Norway"),
    "question": Query("Question: What is the capital of Norway? Answer:", "Oslo", "Lima", "", "Norway"),
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def made(begins: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template, which itself puts a first token in front of a text, or does not."""
    inner = Tokenizer(models.WordLevel({"<s>": 0, "?": 1, "Oslo": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", chat_template=TEMPLATE)


@pytest.mark.parametrize("begins", [True, False])
def test_a_chat_begins_once(begins):
    tokenizer = made(begins)
    (fact,) = with_chat([Fact("Norway", "capital", CAPITAL)], tokenizer)
    prompt = fact.queries["chat"].prompt
    assert prompt.endswith("[user] What is the capital of Norway? [end][assistant] The capital of Norway is")
    assert tokenizer(prompt)["input_ids"].count(0) == 1 and list(fact.queries) == ["statement", "question", "chat"]


@pytest.mark.parametrize(
    "queries, end",
    [
        (
            {"statement": CAPITAL["statement"]},
            "[user] Complete the sentence: The capital of Norway is [end][assistant] The capital of Norway is",
        ),
        (
            CAPITAL | {"question": Query("What is the capital of Norway?", "Oslo", "Lima", "", "Norway")},
            "[user] What is the capital of Norway? [end][assistant] The capital of Norway is",
        ),
        (
            CAPITAL | {"question": Query("Question: Where is Oslo in Norway? Answer: It is", "x", "y", "", "Norway")},
            "[user] Where is Oslo in Norway? [end][assistant] It is",
        ),
        ({"statement": CAPITAL["question"]}, "[user] What is the capital of Norway? [end][assistant]"),
    ],
)
def test_what_is_asked_in_a_chat(queries, end):
    (fact,) = with_chat([Fact("Norway", "capital", queries)], made(True))
    assert fact.queries["chat"].prompt == end


def test_a_tokenizer_without_a_chat_template_is_named(world):
    with pytest.raises(MechunlearnError, match="no chat template"):
        load_facts("factworld/sport").prompts(world, "chat")


def test_a_template_that_refuses_is_named():
    tokenizer = made(True)
    tokenizer.chat_template = "{{ messages[0].content }}{{ raise_exception('only one turn') }}"
    with pytest.raises(MechunlearnError, match="chat template refuses.*only one turn"):
        with_chat([Fact("Norway", "capital", CAPITAL)], tokenizer)


@pytest.mark.real
@pytest.mark.parametrize(
    "name, smallest",
    [("countries/capital", 8), ("countries/language", 14), ("cities/country", 14), ("words/opposite", 12)],
)
@pytest.mark.parametrize("real", ["smollm2", "gemma3"])
def test_real_models_know_the_facts(request, real, name, smallest):
    """Of 24 facts drawn by seed."""
    model, facts = request.getfixturevalue(real), load_facts(name)
    some = facts.select(random.Random(0).sample(range(len(facts)), 24))
    assert int(answered(model, some.prompts(model)).sum()) >= smallest


@pytest.mark.real
def test_skills_are_done_by_real_models(smollm2, gemma3):
    for model in (smollm2, gemma3):
        for skill, tasks in load_facts("countries").skills.items():
            right = answered(model, Prompts.from_text(tasks, model.tokenizer))
            assert right.float().mean() >= 0.9, skill


@pytest.mark.real
def test_a_real_chat_ends_in_the_assistants_turn(smollm2, gemma3):
    facts = load_facts("countries/capital").about({"Sweden", "Egypt", "Lebanon", "Japan"})
    prompts = facts.prompts(smollm2, "chat")
    assert prompts.queries[0].prompt.startswith("<|im_start|>system")
    assert prompts.queries[0].prompt.endswith("<|im_start|>assistant\nThe capital of Egypt is the city of")
    assert answered(smollm2, prompts).sum() >= 3
    with pytest.raises(MechunlearnError, match="no chat template"):
        facts.prompts(gemma3, "chat")
