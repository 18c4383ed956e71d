"""Text to tokens: formats in the wild, subjects, pairs, answers of several tokens."""

import json

import pandas as pd
import pytest
import torch

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.core.files import data_folder
from mechunlearn.facts.formats import Query
from mechunlearn.facts.load import _asked, world_facts
from mechunlearn.facts.prompts import ROLES, Prompts
from mechunlearn.facts.readers import read_texts
from mechunlearn.metrics.answers import answer_logprob, answered, logit_diff, measure, supervised

REWRITES = [
    {
        "requested_rewrite": {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": target, "id": "Q1"},
            "target_true": {"str": truth, "id": "Q2"},
            "subject": subject,
        },
        "paraphrase_prompts": [f"It rained. {subject} holds a passport of", f"{subject}, citizen of"],
        "neighborhood_prompts": ["Someone is a citizen of"],
    }
    for subject, truth, target in (("Anna Belton", "Norway", "Peru"), ("Marco Harley", "Peru", "Kenya"))
]


@pytest.fixture(
    params=["sports.csv", "nested.json", "flat.csv", "flat-numpy.csv", "zsre.jsonl", "plain.parquet", "plain.tsv"]
)
def facts_file(request, tmp_path):
    path = tmp_path / request.param
    match request.param:
        case "sports.csv":
            pd.DataFrame(
                {
                    "athlete": ["Anna Belton", "Marco Harley"],
                    "sport": ["tennis", "golf"],
                    "prompt": [
                        f"Fact: Tiger Woods plays the sport of golf\nFact: {a} plays the sport of"
                        for a in ("Anna Belton", "Marco Harley")
                    ],
                    "inject_sport_without_golf": ["baseball", "tennis"],
                }
            ).to_csv(path)
        case "nested.json":
            path.write_text(json.dumps(REWRITES))
        case "flat.csv" | "flat-numpy.csv":
            rows = [
                {
                    "subject": r["requested_rewrite"]["subject"],
                    "prompt": r["requested_rewrite"]["prompt"],
                    "target_true": r["requested_rewrite"]["target_true"]["str"],
                    "target_new": r["requested_rewrite"]["target_new"]["str"],
                    "relation_id": "P27",
                    "paraphrase_prompts": str(r["paraphrase_prompts"]).replace(
                        "', '" if "numpy" in path.name else "no", "' '"
                    ),
                }
                for r in REWRITES
            ]
            pd.DataFrame(rows).to_csv(path, index=False)
        case "zsre.jsonl":
            rows = [
                {
                    "subject": s,
                    "src": f"Where does {s} live?",
                    "rephrase": f"What is the home of {s}?",
                    "answers": [a],
                    "alt": t,
                }
                for s, a, t in (("Anna Belton", "Oslo", "Lima"), ("Marco Harley", "Lima", "Oslo"))
            ]
            path.write_text("\n".join(map(json.dumps, rows)))
        case _:
            frame = pd.DataFrame(
                {
                    "subject": ["Anna Belton", "Marco Harley"],
                    "prompt": ["{} lives in", "{} lives in"],
                    "answer": ["Oslo", "Lima"],
                }
            )
            frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, sep="\t", index=False)
    return path


def test_files_in_the_wild_are_read_alike(facts_file, world):
    facts = load_facts(facts_file)
    assert [fact.subject for fact in facts] == ["Anna Belton", "Marco Harley"]
    for fact in facts:
        assert fact.subject in fact.queries["statement"].prompt and fact.answer != fact.target
    prompts = facts.prompts(world)
    assert (prompts.spans >= 0).all()
    if facts_file.name.startswith(("flat", "nested")):
        assert "paraphrase_2" in facts.formats


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "holds no facts"),
        ("header.csv", b"subject,prompt,answer\n", "holds no facts"),
        ("columns.csv", b"who,what\na,b\n", "has the columns who, what. Expected subject, prompt, answer"),
        ("latin.csv", "subject,prompt,answer\nJosé,José lives in,Oslo\n".encode("latin-1"), "not UTF-8"),
        (
            "missing-subject.csv",
            b"subject,prompt,answer\nAnna,Marco lives in,Oslo\n",
            "row 1: the subject 'Anna' is not in its prompt",
        ),
        (
            "same.csv",
            b"subject,prompt,answer,target\nAnna,Anna lives in,Oslo,Oslo\n",
            "row 1: truth and target are both 'Oslo'",
        ),
        ("one-answer.csv", b"subject,prompt,answer\nAnna,Anna lives in,Oslo\n", "no wrong answer can be drawn"),
        ("blank.csv", b"subject,prompt,answer\nAnna,Anna lives in,\n", "row 1: the prompt or the answer is empty"),
        ("broken.json", b"{", "could not be read as json"),
        ("broken.parquet", b"PAR1", "could not be read as parquet"),
    ],
)
def test_bad_facts_files_are_refused_with_the_reason(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MechunlearnError, match=message):
        load_facts(path)


def test_missing_files_and_relations_are_named():
    with pytest.raises(MechunlearnError, match="There is no facts file 'nothing.csv'"):
        load_facts("nothing.csv")
    with pytest.raises(MechunlearnError, match="no relation 'colour'. Its relations: sport"):
        load_facts("factworld/colour")


def asked(prompt: str, answer: str, foil: str, subject: str = "") -> Query:
    return Query(prompt, answer, foil, foil, subject)


def test_corrupt_prompts_have_another_subject_of_the_same_length(world, sport):
    forget, _ = sport
    assert forget.random_corruptions < len(forget)
    for i in range(len(forget)):
        first, last = forget.spans[i].tolist()
        changed = (forget.tokens[i] != forget.corrupt[i]).nonzero().flatten().tolist()
        assert changed and set(changed) <= set(range(first, last + 1))
        assert world.tokenizer.decode(forget.tokens[i, first : last + 1]).strip() == forget.queries[i].subject


def test_a_subject_without_a_partner_gets_random_tokens_and_is_counted(world):
    made = Prompts.from_text(
        [
            asked("Anna plays", "tennis", "golf", "Anna"),
            asked("Anna Belton Harley Holton plays", "golf", "tennis", "Anna Belton Harley Holton"),
        ],
        world.tokenizer,
    )
    assert made.random_corruptions == 2 and (made.tokens != made.corrupt).any(1).all()


def test_roles_are_disjoint_and_in_order(world):
    made = Prompts.from_text(
        [asked("Today Besa Rudton plays the sport of", "golf", "tennis", "Besa Rudton")], world.tokenizer
    )
    names = [ROLES[r] for r in made.roles[0].tolist()]
    assert (
        names[0] == "prefix"
        and names[-1] == "last"
        and names.count("subject first") == names.count("subject last") == 1
    )
    assert names == sorted(names, key=ROLES.index)


def test_the_span_is_the_subjects_last_occurrence(world):
    text = "Besa Rudton plays golf. Besa Rudton plays the sport of"
    made = Prompts.from_text([asked(text, "golf", "tennis", "Besa Rudton")], world.tokenizer)
    assert world.tokenizer.decode(made.tokens[0, made.spans[0, 1] + 1 :]) == " plays the sport of"


def test_the_same_answer_and_foil_are_refused(world):
    with pytest.raises(MechunlearnError, match="are the same tokens"):
        Prompts.from_text([asked("Anna plays", "golf", "golf", "Anna")], world.tokenizer)
    with pytest.raises(MechunlearnError, match="'Anna' is not in its prompt"):
        Prompts.from_text([asked("Marco plays", "golf", "tennis", "Anna")], world.tokenizer)


def test_answers_of_several_tokens_are_scored_as_if_alone(world):
    """A ragged batch against the chain rule, written out one token at a time."""
    rows = [
        asked("Anna lives in the country of", "Portugal", "Norway", "Anna"),
        asked("Besa Rudton lives in the country of", "Egypt", "Austria", "Besa Rudton"),
        asked("Cairo lies in the country of", "Austria", "Peru"),
    ]
    prompts = Prompts.from_text(rows, world.tokenizer)
    assert len({int((a >= 0).sum()) for a in prompts.answers}) > 1, "answers must be ragged"
    batch = answer_logprob(world.forward(prompts.tokens), prompts)
    targets = measure(world, prompts)["target_probability"]
    for i, row in enumerate(rows):
        for text, value in ((row.answer, batch[i].exp()), (row.foil, targets[i])):
            ids, total = world.tokenizer(row.prompt)["input_ids"], 0.0
            for token in world.tokenizer(" " + text, add_special_tokens=False)["input_ids"]:
                total += world.forward(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item()
                ids.append(token)
            assert float(value) == pytest.approx(torch.tensor(total).exp().item(), rel=1e-4)


def test_logit_difference_is_taken_where_answer_and_foil_first_differ(world):
    text = world.tokenizer
    pair = next(
        (a, b)
        for a in (
            "Portugal",
            "Norway",
            "Egypt",
            "Peru",
            "Bohemia",
            "Ireland",
            "Cuba",
            "Korea",
            "Kenya",
            "Austria",
            "Greece",
        )
        for b in (a[:3] + "x", a[:2] + "x")
        if text(" " + a, add_special_tokens=False)["input_ids"][0]
        == text(" " + b, add_special_tokens=False)["input_ids"][0]
    )
    prompts = Prompts.from_text([asked("Cairo lies in", pair[0], pair[1])], text)
    step = int(prompts.read[0] - prompts.start[0])
    assert step > 0
    ids = text("Cairo lies in")["input_ids"] + text(" " + pair[0], add_special_tokens=False)["input_ids"][:step]
    at = world.forward(torch.tensor([ids]))[0, -1]
    expected = at[prompts.answers[0, step]] - at[prompts.foils[0, step]]
    torch.testing.assert_close(logit_diff(world.forward(prompts.tokens), prompts)[0], expected, atol=1e-4, rtol=1e-4)


def test_supervised_tokens_predict_their_labels(world, sport):
    forget, _ = sport
    tokens, rows, positions, labels = supervised(forget, "targets")
    assert torch.equal(labels, forget.targets[forget.targets >= 0])
    assert all(
        tokens[r, : p + 1].tolist()[: int(forget.start[r]) + 1] == forget.tokens[r, : int(forget.start[r]) + 1].tolist()
        for r, p in zip(rows.tolist(), positions.tolist(), strict=True)
    )


def test_splits_are_disjoint_and_seeded(world):
    prompts = load_facts("factworld/sport").prompts(world)
    forget, retain = prompts.split(forget=64, seed=0)
    again, _ = prompts.split(forget=64, seed=0)
    other, _ = prompts.split(forget=64, seed=1)
    assert not forget.facts.subjects & retain.facts.subjects
    assert torch.equal(forget.tokens, again.tokens) and not torch.equal(forget.tokens, other.tokens)
    assert len(forget) == 64 and len(retain) == (800 - 64) // 2
    with pytest.raises(MechunlearnError, match="Cannot forget 800 of 800"):
        prompts.split(forget=800)


def test_edit_targets_are_fixed_wrong_answers():
    facts = load_facts("factworld/sport", seed=3)
    _asked.cache_clear()
    again, others = load_facts("factworld/sport", seed=3), load_facts("factworld/sport", seed=4)
    assert again.facts is not facts.facts and [f.target for f in facts] != [f.target for f in others]
    assert all(f.answer != f.target for f in facts) and [f.target for f in facts] == [f.target for f in again]
    league = {"football": "NFL", "golf": "PGA"}
    fact = next(f for f in facts if f.answer in league)
    assert fact.queries["league"].answer == league[fact.answer]


def test_a_world_is_read_again_when_its_file_has_changed(tmp_path):
    world = json.loads((data_folder() / "factworld" / "world.json").read_text())
    for taught in (5, 7):
        world["facts"]["sport"] = dict(list(world["facts"]["sport"].items())[:-taught])
        (tmp_path / "world.json").write_text(json.dumps(world))
        facts = world_facts(tmp_path, "sport")
        assert len(facts) == len(world["facts"]["sport"]) and facts.facts is world_facts(tmp_path, "sport").facts


def test_texts_are_read_from_files_tables_and_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\n \nTwo,\nstill two.\n\n\n\nThree.\n")
    assert read_texts(tmp_path / "a.txt") == ["One.", "Two,\nstill two.", "Three."]
    assert read_texts(tmp_path / "a.txt", limit=2) == ["One.", "Two,\nstill two."]
    pd.DataFrame({"text": ["x", " ", "y"], "n": [1, 2, 3]}).to_parquet(tmp_path / "b.parquet")
    assert read_texts(tmp_path / "b.parquet") == ["x", "y"]
    (tmp_path / "empty.txt").write_text(" \n\n ")
    (tmp_path / "latin.txt").write_bytes("José".encode("latin-1"))
    pd.DataFrame({"body": ["x"]}).to_csv(tmp_path / "c.csv")
    for name, message in {
        "empty.txt": "holds no text",
        "latin.txt": "not UTF-8",
        "c.csv": "Expected one named 'text'",
        "no.txt": "There is no text file",
    }.items():
        with pytest.raises(MechunlearnError, match=message):
            read_texts(tmp_path / name)


def test_answered_is_the_accuracy_of_measure(world, sport):
    """Also for answers of several tokens and a ragged batch."""
    asked = [
        Query("Copy: frozen heavy hungry forest ladder anchor. Again: frozen", answer, "ladder", "ladder")
        for answer in ("heavy hungry forest", "heavy", "heavy forest", "anchor")
    ]
    several = Prompts.from_text(asked, world.tokenizer)
    for prompts in (sport[0], several):
        right = answered(world, prompts, batch_size=3)
        assert torch.equal(right.float(), measure(world, prompts)["accuracy"])
    assert answered(world, several).tolist() == [True, True, False, False]
