"""Text to tokens: formats in the wild, subjects, pairs, answers of several tokens."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.core.files import data_folder
from mechunlearn.facts.formats import Query
from mechunlearn.facts.load import _asked, world_facts
from mechunlearn.facts.prompts import ROLES, Prompts
from mechunlearn.facts.tables import read_texts
from mechunlearn.localize import activation_patching, attribution_patching
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
            "no row can be used. 1 fact skipped: 1 subject not in its prompt. The first: row 1, .* Marco lives in -> Oslo",
        ),
        (
            "same.csv",
            b"subject,prompt,answer,target\nAnna,Anna lives in,Oslo,Oslo\n",
            "1 fact skipped: 1 truth = target",
        ),
        ("blank.csv", b"subject,prompt,answer\nAnna,Anna lives in,\n", "1 fact skipped: 1 no answer"),
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


def said_corrupt(model, prompts: Prompts) -> torch.Tensor:
    """What the corrupt run says where the logit difference is taken."""
    rows = torch.arange(len(prompts))
    return model.forward(prompts.corrupt)[rows, prompts.read].argmax(-1)


class TestFoil:
    """The foil is what the corrupt run says; the target is what an edit injects."""

    @pytest.mark.parametrize("format", ["statement", "question", "league", "yes_no"])
    def test_the_corrupt_run_says_the_foil(self, world, format):
        facts = load_facts("factworld/sport")
        prompts = facts[:200].prompts(world, format)
        share = (said_corrupt(world, prompts) == prompts.foil_at_read).float().mean()
        assert share >= 0.95, f"{share:.3f}"
        assert prompts.random_corruptions == 0
        differ = (prompts.foils != prompts.targets).any(1).float().mean()
        assert format == "yes_no" or differ > 0.5, "foils are not the edit targets"

    def test_the_targets_are_those_of_the_facts(self, world):
        facts = load_facts("factworld/sport")[:50]
        prompts = facts.prompts(world)
        for i, fact in enumerate(facts):
            ids = world.tokenizer(" " + fact.target, add_special_tokens=False)["input_ids"]
            assert prompts.targets[i, : len(ids)].tolist() == ids
        other = facts.prompts(world, seed=1)
        assert torch.equal(prompts.targets, other.targets) and not torch.equal(prompts.foils, other.foils)
        assert measure(world, prompts)["target_probability"].equal(measure(world, other)["target_probability"])

    def test_a_target_that_no_fact_answers_is_no_foil(self, world, tmp_path):
        """An edit makes "Copenhagen" of twelve facts, and no corrupt run answers "Copenhagen"."""
        known = load_facts("factworld/city")
        rows = [(f.subject, f.queries["statement"].prompt, f.answer, "Copenhagen") for f in known]
        rows = [row for row in rows if row[2] != "Copenhagen"][:200]
        frame = pd.DataFrame(rows, columns=["subject", "prompt", "answer", "target"])
        frame.loc[12:, "target"] = ""
        frame.to_csv(tmp_path / "cities.csv", index=False)
        facts = load_facts(tmp_path / "cities.csv")
        prompts = facts.prompts(world)
        assert [query.target for query in prompts.queries[:12]] == ["Copenhagen"] * 12
        answers = {fact.subject: fact.answer for fact in facts}
        for i, query in enumerate(prompts.queries):
            first, last = prompts.spans[i].tolist()
            partner = world.tokenizer.decode(prompts.corrupt[i, first : last + 1]).strip()
            assert query.foil == answers[partner] != query.answer
        assert (said_corrupt(world, prompts) == prompts.foil_at_read).float().mean() >= 0.95

    def test_a_given_foil_stays_and_its_partner_says_it(self, world, tmp_path):
        known = load_facts("factworld/sport")[:200]
        rows = [
            (f.subject, f.queries["statement"].prompt, f.answer, "golf" if f.answer != "golf" else "") for f in known
        ]
        rows[0] = (*rows[0][:3], "polo")
        pd.DataFrame(rows, columns=["subject", "prompt", "answer", "foil"]).to_csv(tmp_path / "given.csv", index=False)
        prompts = load_facts(tmp_path / "given.csv").prompts(world)
        assert prompts.queries[0].foil == "polo" and prompts.random_corruptions == 0
        answers = {fact.subject: fact.answer for fact in known}
        for i, query in enumerate(prompts.queries[1:], start=1):
            first, last = prompts.spans[i].tolist()
            partner = world.tokenizer.decode(prompts.corrupt[i, first : last + 1]).strip()
            assert query.foil == answers[partner] and (query.foil == "golf") == (query.answer != "golf")
        assert any(query.foil != query.target for query in prompts.queries)

    def test_a_multiple_choice_is_compared_with_another_answer_that_it_shows(self, world):
        facts = []
        for fact in load_facts("factworld/sport")[:60]:
            shown = [fact.answer, fact.target]
            text = f"Question: Which sport does {fact.subject} play? {shown[0]} A, {shown[1]} B. Answer:"
            asked = Query(text, "A", "B", subject=fact.subject, options=("A", "B"))
            facts.append(replace(fact, queries={**fact.queries, "multiple_choice": asked}))
        data = replace(load_facts("factworld/sport"), facts=tuple(facts))
        prompts = data.prompts(world, "multiple_choice")
        answers = {fact.subject: fact.answer for fact in facts}
        assert {query.foil for query in prompts.queries} == {"B"}
        for i, fact in enumerate(facts):
            first, last = prompts.spans[i].tolist()
            partner = world.tokenizer.decode(prompts.corrupt[i, first : last + 1]).strip()
            if partner in answers:
                assert answers[partner] == fact.target
        assert prompts.random_corruptions < 30

    def test_partners_are_of_the_same_relation(self, world):
        sport, city = (load_facts(f"factworld/{name}")[:40] for name in ("sport", "city"))
        both = replace(sport, facts=(*sport.facts, *city.facts))
        answers = {
            "sport": {fact.answer for fact in sport},
            "city": {fact.answer for fact in city},
        }
        for query, fact in zip(both.prompts(world).queries, both, strict=True):
            assert query.foil in answers[fact.relation]

    def test_without_a_partner_the_foil_is_another_facts_answer(self, world):
        rows = [
            Query("Anna plays", "tennis", "polo", "", "Anna"),
            Query("Anna Belton Harley Holton plays", "golf", "polo", "", "Anna Belton Harley Holton"),
        ]
        made = Prompts.from_text(rows, world.tokenizer)
        assert made.random_corruptions == 2 and [query.foil for query in made.queries] == ["golf", "tennis"]
        without_subject = [replace(row, subject="") for row in rows]
        made = Prompts.from_text(without_subject, world.tokenizer)
        assert [query.foil for query in made.queries] == ["golf", "tennis"]
        assert torch.equal(made.tokens, made.corrupt) and made.random_corruptions == 0

    def test_one_answer_is_an_error_only_where_a_foil_is_needed(self, world, tmp_path):
        frame = pd.DataFrame(
            {
                "subject": ["Besa Rudton", "Anna Belton"],
                "prompt": ["{} plays the sport of"] * 2,
                "answer": ["golf", "golf"],
                "target": ["tennis", "hockey"],
            }
        )
        frame.to_csv(tmp_path / "golf.csv", index=False)
        prompts = load_facts(tmp_path / "golf.csv").prompts(world)
        found = measure(world, prompts)
        assert prompts.random_corruptions == 2 and (prompts.foils == -1).all()
        assert 0 <= float(found["target_probability"].min()) < 1
        logits = world.forward(prompts.tokens)
        assert answer_logprob(logits, prompts).isfinite().all()
        with pytest.raises(MechunlearnError, match="2 of 2 facts have no foil .* no other fact of their relation"):
            logit_diff(logits, prompts)

    def test_an_answer_that_begins_with_another_is_no_partner(self, world):
        """ "San" and "San Marino" cannot be told apart by a token of the shorter one."""
        rows = [
            Query(f"{name} lives in", answer, "Rome", "", name)
            for name, answer in (("Anna", "San"), ("Marco", "San Marino"), ("Peter", "Oslo"), ("Maria", "San"))
        ]
        foils = [query.foil for query in Prompts.from_text(rows, world.tokenizer).queries]
        assert foils[0] == foils[1] == foils[3] == "Oslo" and foils[2] != "Oslo"

    def test_without_target_and_foil_nothing_is_given_as_the_target(self, world):
        prompts = Prompts.from_text([Query("Besa Rudton plays the sport of", "golf")], world.tokenizer)
        found = measure(world, prompts)
        assert found["target_accuracy"].item() == found["target_probability"].item() == 0

    def test_tokens_have_targets_of_their_own(self):
        clean, corrupt, answer, foil, target = torch.arange(5)[:, None]
        given = (clean[:, None], corrupt[:, None], answer, foil)
        made = Prompts.from_tokens(*given, targets=target)
        assert (made.foils.item(), made.targets.item()) == (3, 4)
        assert Prompts.from_tokens(*given).targets.item() == 3


def test_a_selection_is_as_wide_as_its_longest_prompt_and_scores_the_same(world):
    """One long prompt must not slow the others down."""
    texts = ["Besa Rudton plays the sport of", "Today the cook said that Anna Belton plays the sport of"]
    rows = [
        Query(f"{'It rained. ' * n}{text}", answer, "polo", "", text[text.index(" plays") - 11 : text.index(" plays")])
        for text, answer in zip(texts, ("golf", "tennis"))
        for n in (0, 9)
    ]
    prompts = Prompts.from_text(rows, world.tokenizer)
    short = prompts.select([2, 0])
    assert short.tokens.shape == short.corrupt.shape == short.roles.shape == (2, int(prompts.lengths[[2, 0]].max()))
    assert short.tokens.shape[1] < prompts.tokens.shape[1]
    wide, narrow = (metric(world.forward(p.tokens), p) for metric in (logit_diff,) for p in (prompts, short))
    torch.testing.assert_close(wide[[2, 0]], narrow, atol=1e-4, rtol=1e-5)
    whole = measure(world, prompts)
    for name, values in measure(world, short).items():
        torch.testing.assert_close(values, whole[name][[2, 0]], atol=1e-5, rtol=1e-4)
    for found in (activation_patching, attribution_patching):
        one, many = (found(world, prompts, kinds=["attn_out"], by="position", batch_size=b) for b in (1, 4))
        for site, values in one.by_role.items():
            torch.testing.assert_close(values, many.by_role[site], atol=1e-4, rtol=1e-3)
    assert len(prompts.select([])) == 0


def test_facts_are_taken_by_number_and_by_slice():
    facts = load_facts("factworld/sport")
    assert facts[3] is facts.facts[3] and facts[-1] is facts.facts[-1]
    part = facts[2:5]
    assert [fact.subject for fact in part] == [fact.subject for fact in facts.facts[2:5]]
    assert part.source is facts and part.texts == facts.texts
    with pytest.raises(IndexError):
        facts[800]
