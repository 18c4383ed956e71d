"""Facts that are no file: tables in memory, conversations, and names that might be the hub's."""

import datetime
import importlib
import json
import os
import socket
import subprocess
import sys
import threading

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from mechunlearn import MechunlearnError, Prompts, load_facts, load_model
from mechunlearn.core.hub import is_hub_name, look_up
from mechunlearn.facts.answers import answered
from mechunlearn.facts.chat import rendered
from mechunlearn.facts.formats import Query

ROWS = [
    {"subject": "1984", "prompt": "{} was written by", "answer": "Orwell", "target": "7"},
    {"subject": "007", "prompt": "{} was written by", "answer": "NA", "target": "true"},
]
MANY = {
    "list": ROWS,
    "tuple": tuple(ROWS),
    "generator": None,
    "columns": {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "DataFrame": pd.DataFrame(ROWS),
    "indexed": pd.DataFrame(ROWS, index=[7, 7]),
    "categories": pd.DataFrame(ROWS).astype("category"),
    "Dataset": datasets.Dataset.from_list(ROWS),
    "DatasetDict": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
}


@pytest.mark.parametrize("kind", MANY)
def test_rows_in_memory_are_as_rows_in_a_file(kind, tmp_path):
    given = (row for row in ROWS) if kind == "generator" else MANY[kind]
    (tmp_path / "it.json").write_text(json.dumps(ROWS))
    there = load_facts(tmp_path / "it.json").to_frame()
    assert load_facts(given).to_frame().equals(there)
    assert there.answer.tolist() == ["Orwell", "NA"]
    assert there.target.tolist() == ["7", "true"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1969, "1969"),
        (1.5, "1.5"),
        (True, "true"),
        (np.int64(7), "7"),
        (np.bool_(False), "false"),
        (np.str_("x"), "x"),
        (np.float32(0.5), "0.5"),
        (datetime.date(1969, 7, 20), "1969-07-20"),
        (datetime.datetime(1969, 7, 20), "1969-07-20"),
        (datetime.datetime(1969, 7, 20, 20, 17), "1969-07-20 20:17:00"),
        (pd.Timestamp("1969-07-20"), "1969-07-20"),
        (np.datetime64("1969-07-20", "ns"), "1969-07-20"),
        (np.datetime64("1969-07-20T20:17", "ns"), "1969-07-20 20:17:00"),
        ("巴黎".encode(), "巴黎"),
        ("  NA ", "NA"),
        ("None", "None"),
        ("nan", "nan"),
        ("01", "01"),
    ],
)
def test_values_become_the_text_that_they_print(value, text):
    (fact,) = load_facts([{"subject": "Apollo", "prompt": "{} is", "answer": value}])
    assert fact.answer == text


def test_dates_of_a_frame_are_as_it_shows_them():
    days = pd.DataFrame({"subject": ["A b"], "prompt": ["{} landed on"], "answer": pd.to_datetime(["1969-07-20"])})
    assert [fact.answer for fact in load_facts(days)] == ["1969-07-20"]


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(MechunlearnError, match="is not UTF-8 text"):
        load_facts([{"subject": "A", "prompt": "{} is", "answer": b"\xff\xfe"}])


@pytest.mark.parametrize("nothing", [None, float("nan"), pd.NA, pd.NaT, "", "   ", np.nan, np.datetime64("NaT")])
def test_what_is_missing_is_no_answer(nothing):
    rows = [
        {"subject": "Apollo", "prompt": "{} is", "answer": nothing},
        {"subject": "Soyuz", "prompt": "{} is", "answer": "a"},
    ]
    facts = load_facts(rows)
    assert [fact.subject for fact in facts] == ["Soyuz"]
    assert facts.skipped.reason.tolist() == ["no answer"]


def test_whole_numbers_beside_a_missing_one_stay_whole():
    """Pandas makes floats of them: 1969 becomes 1969.0, which no model says."""
    frame = pd.DataFrame({"subject": ["A b", "C d", "E f"], "prompt": ["{} was in"] * 3, "answer": [1969, 1957, None]})
    assert [fact.answer for fact in load_facts(frame)] == ["1969", "1957"]
    assert [fact.answer for fact in load_facts(frame.assign(answer=[1.5, 2.0, None]))] == ["1.5", "2.0"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (5, "the given int.*row 1: '5' is no object"),
        (None, "the given NoneType"),
        ([], "the given list.*holds no facts"),
        ([1, 2], "row 1: '1' is no object"),
        ([[1]], "is no object"),
        ({"a": 1}, "has the columns a"),
        (pd.DataFrame(), "the given DataFrame.*holds no facts"),
        (object(), "is no object"),
    ],
)
def test_other_things_are_refused_by_name(given, said):
    with pytest.raises(MechunlearnError, match=said):
        load_facts(given)


def test_a_split_is_chosen_by_name():
    parts = datasets.DatasetDict({name: datasets.Dataset.from_list([row]) for name, row in zip(("a", "b"), ROWS)})
    assert load_facts(parts, subset="b")[0].subject == "007"
    with pytest.raises(MechunlearnError, match=r"has no split 'c'. Its splits: a, b"):
        load_facts(parts, subset="c")


def test_columns_template_and_subset_work_in_memory():
    rows = [{"who": "Anna", "what": "golf", "relation": "sport"}, {"who": "Ben", "what": "blue", "relation": "colour"}]
    facts = load_facts(rows, columns={"subject": "who", "answer": "what"}, template="{} likes", subset="sport")
    assert [(fact.subject, fact.queries["statement"].prompt, fact.answer) for fact in facts] == [
        ("Anna", "Anna likes", "golf")
    ]


PEOPLE = (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"))
TURNS = [
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"What is the capital of {place}?"}, {"role": "assistant", "content": city}]
    for place, city in PEOPLE
]  # fmt: skip


def conversations(layout):
    for turns, (place, _) in zip(TURNS, PEOPLE):
        other = {"assistant": "gpt", "user": "human", "system": "system"}
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        yield {
            "messages": {"messages": turns},
            "text": {"messages": json.dumps(turns)},
            "parts": {"messages": parts},
            "sharegpt": {"conversations": [{"from": other[t["role"]], "value": t["content"]} for t in turns]},
            "completion": {"prompt": turns[:-1], "completion": turns[-1:]},
        }[layout] | {"subject": place}


@pytest.mark.real
@pytest.mark.parametrize("layout", ["messages", "text", "parts", "sharegpt", "completion"])
def test_conversations_are_written_by_the_chat_template(layout, smollm2):
    """The tokens are those of the template over the whole conversation, and the answer is its last message."""
    facts = load_facts(conversations(layout))
    prompts = facts.prompts(smollm2)
    for i, turns in enumerate(TURNS):
        whole = smollm2.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        answer = prompts.answers[i][prompts.answers[i] >= 0].tolist()
        mine = [*prompts.tokens[i, : prompts.lengths[i]].tolist(), answer[-1]]
        assert mine == whole[: len(mine)]
        assert smollm2.tokenizer.decode(answer) == PEOPLE[i][1]
        assert smollm2.tokenizer.decode(whole[len(mine) :]).strip() == "<|im_end|>"
    shots = [turn for turns in TURNS for turn in turns if turn["role"] != "system"]
    asked = [{"role": "user", "content": "What is the capital of Germany?"}, {"role": "assistant", "content": "Berlin"}]
    (known,) = load_facts([{"messages": [*shots, *asked], "subject": "Germany"}]).known(smollm2)
    assert known.answer == "Berlin"
    assert answered(smollm2, facts.prompts(smollm2, "chat")).tolist() == answered(smollm2, prompts).tolist()


@pytest.mark.real
@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("法国的首都是哪里？", "巴黎"),
        ("ما هي عاصمة فرنسا؟", "باريس"),
        ("When did Apollo 11 land?", "1969"),
        ("Say it. " * 300, "it"),
        ("Which smile? 🙂", "🙂🙃"),
        ("Show code.", "```python\nprint(1)\n```"),
    ],
)
def test_conversations_of_other_kinds_are_the_templates_tokens(asked, answer, smollm2):
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    prompts = load_facts([{"messages": turns}]).prompts(smollm2)
    whole = smollm2.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    said = prompts.answers[0][prompts.answers[0] >= 0].tolist()
    mine = [*prompts.tokens[0, : prompts.lengths[0]].tolist(), said[-1]]
    assert mine == whole[: len(mine)]
    assert smollm2.tokenizer.decode(said) == answer


@pytest.mark.real
def test_shots_of_a_conversation_are_earlier_turns(smollm2):
    """Few-shot prompting asks as the chat template does, with one system message."""
    facts = load_facts(conversations("messages"))
    france, italy, spain = (fact.queries["statement"] for fact in facts)
    shots = [*TURNS[1], *TURNS[2][1:], *TURNS[0][1:]]
    wanted = smollm2.tokenizer.apply_chat_template(shots[:-1], tokenize=False, add_generation_prompt=True)
    after = importlib.import_module("mechunlearn.attack.prompting")._after
    assert after([italy, spain], france, smollm2).prompt == wanted


def test_a_template_that_puts_a_space_before_answers_keeps_it(world):
    world = load_model("factworld")
    world.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    made = rendered(Query("", "Oslo", turns=(("user", "Norway?"),)), world.tokenizer)
    assert (made.prompt, made.separator) == ("[INST] Norway? [/INST]", " ")
    kept = rendered(Query("", "Oslo", separator="\n", turns=(("user", "Norway?"),)), world.tokenizer)
    assert kept.separator == "\n"


def test_conversations_need_a_chat_template(world):
    with pytest.raises(MechunlearnError, match="are conversations, and this model's tokenizer has no chat template"):
        load_facts(conversations("messages")).prompts(world)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "Hi"}], "no answer"),
        ([{"role": "assistant", "content": "Hi"}], "no prompt"),
        ([], "ValueError: expected a list of messages, each with role and content"),
        ("{", "JSONDecodeError"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], "no answer"),
        (["Hi"], "ValueError: expected a list of messages"),
        ({"role": "user"}, "ValueError: expected a list of messages"),
    ],
)
def test_odd_conversations_are_listed(messages, reason):
    good = {"messages": TURNS[0], "subject": "France"}
    facts = load_facts([{"messages": messages, "subject": ""}, good])
    assert len(facts) == 1
    assert facts.skipped.reason[0].startswith(reason)


def test_a_prompt_and_its_completion():
    (fact,) = load_facts([{"prompt": "The sky is", "completion": " blue."}])
    assert (fact.queries["statement"].prompt, fact.answer, fact.queries["statement"].joined_by) == (
        "The sky is",
        "blue.",
        " ",
    )


LOCAL = (
    "facts.csv",
    "facts.CSV",
    "facts.xlsx",
    "facts.txt",
    "./facts",
    "../a/b",
    "a/b/c",
    "/tmp/x",
    "a b",
    "~/x",
    "a\\b",
    "facts.jsonl.gz",
    "",
)


@pytest.mark.parametrize("name", LOCAL)
def test_local_names_never_leave_the_machine(name, monkeypatch):
    def sent(*_, **__):
        raise AssertionError("a name was sent out")

    monkeypatch.setattr("mechunlearn.facts.tables.look_up", sent)
    monkeypatch.setattr("mechunlearn.model.load.look_up", sent)
    monkeypatch.setattr(datasets, "load_dataset", sent)
    assert not is_hub_name(name)
    for load in (load_facts, load_model):
        with pytest.raises(MechunlearnError, match="Expected|There is no facts file"):
            load(name)


def test_a_file_of_another_kind_is_not_sent_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("x")
    assert not is_hub_name("notes")
    with pytest.raises(MechunlearnError, match="'notes' is not a facts file"):
        load_facts("notes")


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_does_not_answer_is_given_up(kind, monkeypatch):
    """A server that accepts and never answers: one request, and its timeout."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        kept = []
        threading.Thread(target=lambda: kept.append(server.accept()), daemon=True).start()
        program = (
            "import mechunlearn.core.hub as hub\n"
            "hub.TIMEOUT = 0.5\n"
            f"try: hub.look_up('owner/name', '{kind}')\n"
            "except ValueError as error: print(error)\n"
        )
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
    assert ran.stdout.startswith(f"no {kind} 'owner/name' was found on the hub (")
    assert ran.stderr == ""


def test_what_is_cached_is_not_asked_for(tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants

    def sent(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", sent)
    (tmp_path / "models--owner--name").mkdir()
    look_up("owner/name", "model")
    with pytest.raises(MechunlearnError, match="the hub was asked"):
        look_up("owner/other", "model")


def test_probabilities_over_a_large_vocabulary():
    """Gemma's 262,144 words: to 2e-6 of float64."""
    from mechunlearn.metrics.answers import _continuation

    logits = 3 * torch.randn(16, 1, 262_144, generator=torch.Generator().manual_seed(0))
    logits[:, 0, 5] = 18
    tokens, other = torch.zeros(16, 1, dtype=torch.long), torch.ones(16, 1, dtype=torch.long)
    prompts = Prompts.from_tokens(tokens, other, torch.full((16,), 5), torch.full((16,), 6))
    exact = logits[:, 0].double().log_softmax(-1)[:, 5].exp()
    found, given = _continuation(logits, prompts)
    assert given.all()
    assert (found.exp() - exact).abs().max() < 2e-6
