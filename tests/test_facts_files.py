"""Facts files: every layout, values as text, odd rows by rule, and the names that a caller may give."""

import json

import pandas as pd
import pyarrow.parquet
import pytest
import torch

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.core.files import data_folder
from mechunlearn.edit import losses, masked_gradient, memit
from mechunlearn.facts.tables import read_rows, read_texts

REWRITE = {
    "prompt": "The river {} ends in the",
    "relation_id": "P403",
    "subject": "Danube",
    "target_true": {"str": "Black Sea", "id": "Q1"},
    "target_new": {"str": "North Sea", "id": "Q2"},
    "question": "Where does the Danube end?",
}
SECOND = {**REWRITE, "subject": "Rhine", "target_true": {"str": "North Sea"}, "target_new": {"str": "Black Sea"}}
ROWS = {  # layout: (rows of the file, subjects, prompt of the first, its answer, its target or None for a drawn one)
    "counterfact": (
        [{"requested_rewrite": r, "paraphrase_prompts": [f"It was late. {r['subject']} flows into the", "No subject"]} for r in (REWRITE, SECOND)],
        ["Danube", "Rhine"], "The river Danube ends in the", "Black Sea", "North Sea",
    ),
    "mquake": (
        [{"case_id": 1, "requested_rewrite": [REWRITE, SECOND], "questions": ["Which sea?"]}],
        ["Danube", "Rhine"], "The river Danube ends in the", "Black Sea", "North Sea",
    ),
    "easyedit": (
        [
            {"prompt": "Oslo is in", "subject": "Oslo", "ground_truth": "Norway", "target_new": "Peru", "rephrase_prompt": "One finds Oslo in"},
            {"prompt": "Lima is in", "subject": "Lima", "ground_truth": ["Peru"], "target_new": "Norway", "rephrase_prompt": "One finds Lima in"},
            {"prompt": "The river of Lima is the", "subject": "Lima", "ground_truth": "Rímac", "target_new": "Rhine", "rephrase_prompt": "Lima lies on the"},
        ],
        ["Oslo", "Lima", "Lima"], "Oslo is in", "Norway", "Peru",
    ),
    "zsre": (
        [{"subject": "Oslo", "src": "Where is Oslo?", "rephrase": "In which country is Oslo?", "answers": ["Norway", "the north"], "alt": "Peru"}],
        ["Oslo"], "Question: Where is Oslo? Answer:", "Norway", "Peru",
    ),
    "known": (
        [{"known_id": 0, "subject": "Oslo", "attribute": "Norway", "template": "{} lies", "prediction": " Norway, far", "prompt": "Oslo lies in", "relation_id": "P17", "some/model": True}],
        ["Oslo"], "Oslo lies in", "Norway", "",
    ),
    "lre": (
        {"name": "city country", "prompt_templates": ["{} is in", "{} lies in"], "prompt_templates_zs": ["The country of {} is"], "properties": {"symmetric": False},
         "samples": [{"subject": "Oslo", "object": "Norway"}, {"subject": " Lima", "object": "Peru"}]},
        ["Oslo", "Lima"], "The country of Oslo is", "Norway", "Peru",
    ),
    "ravel": (
        {"Oslo": {"Country": "Norway", "Latitude": "59"}, "Lima": {"Country": "Peru", "Latitude": "-12"}},
        ["Oslo", "Oslo", "Lima", "Lima"], "The country of Oslo is", "Norway", "Peru",
    ),
    "tofu": (
        [{"question": "Which sea does the Rhine reach?", "answer": "The Rhine reaches the North Sea.", "paraphrased_question": "Where does the Rhine end?", "perturbed_answer": ["It reaches the Red Sea.", "None."]}],
        [""], "Question: Which sea does the Rhine reach? Answer:", "The Rhine reaches the North Sea.", "It reaches the Red Sea.",
    ),
    "options": (
        [{"question": "Which is a river?", "option1": "Rhine", "option2": "Alps", "answer": "Rhine"}],
        [""], "Question: Which is a river? Answer:", "Rhine", "",
    ),
    "muse": ([{"prompt": "Once there was", "gt": "a river named Rhine"}], [""], "Once there was", "a river named Rhine", ""),
    "rwku": (
        [
            {"query": "Lima lies in ___.", "answer": "Peru", "level": "1", "type": "cloze", "subject": "Lima"},
            {"query": "The ___ is where Lima is.", "answer": "coast", "level": "1", "type": "cloze", "subject": "Lima"},
            {"query": "What country is Lima in?", "answer": "Peru", "level": "2", "type": "simple", "subject": "Lima"},
        ],
        ["Lima"] * 3, "Lima lies in", "Peru", "coast",
    ),
    "sports": ([{"athlete": "Ann Lee", "sport": "golf", "prompt": "Fact: Ann Lee plays the sport of", "inject_sport_without_golf": "polo"}], ["Ann Lee"], "Fact: Ann Lee plays the sport of", "golf", "polo"),
    "plain": ([{"subject": "Oslo", "prompt": "{} is in", "answer": "Norway", "target": "Peru"}], ["Oslo"], "Oslo is in", "Norway", "Peru"),
}  # fmt: skip


def written(path, rows, how="json"):
    """A file of these rows."""
    match how:
        case "lines":
            rows = rows if isinstance(rows, list) else [rows]
            text = "".join(json.dumps(row) + "\n" for row in rows)
        case "columns":
            text = pd.DataFrame(rows).to_json()
        case _:
            text = json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("how", ["json", "lines"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_every_layout_under_both_suffixes(tmp_path, layout, how, suffix):
    rows, subjects, prompt, answer, target = ROWS[layout]
    if layout == "ravel" and suffix == "jsonl":
        pytest.skip("an object of objects is a table of entities in .json")
    facts = load_facts(written(tmp_path / f"{layout}.{suffix}", rows, how))
    assert [fact.subject for fact in facts] == subjects
    query = facts[0].queries["statement"]
    assert (query.prompt, query.answer, query.target) == (prompt, answer, target)
    assert len(facts.skipped) == 0 and facts.name == layout


def test_further_prompts_of_the_layouts(tmp_path):
    def formats(layout):
        facts = load_facts(written(tmp_path / f"{layout}.json", ROWS[layout][0]))
        return {name: query.prompt for name, query in facts[0].queries.items() if name != "statement"}

    assert formats("counterfact") == {
        "paraphrase_1": "It was late. Danube flows into the",
        "question": "Question: Where does the Danube end? Answer:",
    }
    assert formats("mquake") == {"question": "Question: Where does the Danube end? Answer:"}
    assert formats("easyedit") == {"paraphrase": "One finds Oslo in"}
    assert formats("zsre") == {"paraphrase": "Question: In which country is Oslo? Answer:"}
    assert formats("lre") == {"paraphrase_1": "Oslo is in", "paraphrase_2": "Oslo lies in"}
    assert formats("tofu") == {"paraphrase": "Question: Where does the Rhine end? Answer:"}


def test_a_middle_blank_is_asked_to_be_filled_in(tmp_path):
    facts = load_facts(written(tmp_path / "rwku.json", ROWS["rwku"][0]))
    assert [fact.queries["statement"].prompt for fact in facts][1:] == [
        "Fill in the blank: The ___ is where Lima is. Answer:",
        "Question: What country is Lima in? Answer:",
    ]
    assert [fact.relation for fact in facts] == ["cloze", "cloze", "simple"]


def test_options_of_a_question_are_those_of_its_row(tmp_path):
    facts = load_facts(written(tmp_path / "options.json", ROWS["options"][0]))
    assert facts[0].queries["statement"].options == ("Rhine", "Alps")


def test_relations_without_a_name_are_those_of_a_shared_frame(tmp_path):
    """So a drawn foil answers the same question."""
    facts = load_facts(written(tmp_path / "easyedit.json", ROWS["easyedit"][0]))
    assert [fact.relation for fact in facts] == ["{} is in", "{} is in", "The river of {} is the"]


def test_trex_takes_its_prompts_from_pararel_and_lama_beside_it(tmp_path):
    facts, patterns = tmp_path / "trex_lms_vocab", tmp_path / "pattern_data" / "graphs_json"
    for folder in (facts, patterns):
        folder.mkdir(parents=True)
    rows = [{"sub_label": s, "obj_label": o, "uuid": "1"} for s, o in (("Oslo", "Norway"), ("Lima", "Peru"))]
    for relation in ("P17", "P31", "P99"):
        written(facts / f"{relation}.jsonl", rows, "lines")
    written(
        patterns / "P17.jsonl",
        [{"pattern": p} for p in ("[Y] holds [X].", "[X] is in [Y] .", "[X], in [Y]", "[X] is in the [Y] state.")],
        "lines",
    )
    templates = [{"relation": "P31", "template": "[X] is a [Y] ."}, {"relation": "P17", "template": "[X] is in [Y]."}]
    written(tmp_path / "LAMA_relations.jsonl", templates, "lines")
    loaded = load_facts(facts / "P17.jsonl")
    assert {name: query.prompt for name, query in loaded[1].queries.items()} == {
        "statement": "Lima is in",
        "paraphrase_1": "Lima, in",
    }
    assert loaded[0].relation == "P17" and loaded[1].answer == "Peru"
    assert load_facts(facts / "P31.jsonl")[0].queries["statement"].prompt == "Oslo is a"
    with pytest.raises(MechunlearnError, match="no pattern file .* Give template="):
        load_facts(facts / "P99.jsonl")
    asked = load_facts(facts / "P99.jsonl", template="The country of {} is")
    assert asked[0].queries["statement"].prompt == "The country of Oslo is"
    for path in (patterns / "P17.jsonl", tmp_path / "LAMA_relations.jsonl"):
        with pytest.raises(MechunlearnError, match="holds the prompts of relations and no facts"):
            load_facts(path)


@pytest.mark.parametrize("error", [MemoryError("malloc of size 2 TiB failed"), NotImplementedError("a new encoding")])
def test_tables_that_cannot_be_held_or_decoded_are_named(tmp_path, monkeypatch, error):
    """A header that lies about its size lets the library ask for more memory than there is."""

    def read(path):
        raise error

    pd.DataFrame([{"subject": "s", "prompt": "s is", "answer": "a"}]).to_parquet(path := tmp_path / "lies.parquet")
    monkeypatch.setattr(pyarrow.parquet, "read_table", read)
    with pytest.raises(MechunlearnError, match=f"could not be read as parquet: {error}"):
        load_facts(path)


TYPES = {
    "1984": "1949",
    "007": "0",
    "7.10": "1e3",
    "true": "false",
    "True": "False",
    "NA": "None",
    "nan": "null",
    "2024-05-01": "01/05/2024",
    "-0": "+5",
    "12345678901234567890123": "0.1000",
}


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "bare", "columns", "parquet"])
def test_types_are_read_as_text(tmp_path, kind):
    """A pandas that guesses makes 7 of "007", 1949.0 of "1949" and nothing of "NA"."""
    rows = [{"subject": s, "prompt": f"{s} is", "answer": a, "target": "x"} for s, a in TYPES.items()]
    path = tmp_path / f"types.{kind}"
    match kind:
        case "csv" | "tsv":
            pd.DataFrame(rows).to_csv(path, sep="," if kind == "csv" else "\t", index=False)
        case "json" | "jsonl" | "columns":
            path = path.with_suffix(".json" if kind == "columns" else path.suffix)
            written(path, rows, {"json": "json", "jsonl": "lines", "columns": "columns"}[kind])
        case "bare":  # numbers and truth values of JSON, as they are written there
            path = path.with_suffix(".json")
            bare = {"1984": "1949", "7.10": "1e3", "true": "false", "-0": "5", "12345678901234567890123": "0.1000"}
            lines = [f'{{"subject": {s}, "prompt": "{s} is", "answer": {a}, "target": "x"}}' for s, a in bare.items()]
            path.write_text("\n".join(lines))
            rows = [{"subject": s, "answer": a} for s, a in bare.items()]
        case "parquet":
            pd.DataFrame(rows).to_parquet(path)
    facts = load_facts(path)
    assert [(fact.subject, fact.answer) for fact in facts] == [(row["subject"], row["answer"]) for row in rows]
    assert len(facts.skipped) == len(facts.repaired) == 0


def test_typed_columns_of_parquet_become_text(tmp_path):
    frame = pd.DataFrame({"subject": [1984, 7], "prompt": ["1984 is", "7 is"], "answer": [True, False]})
    frame["target"] = pd.array([5, None], dtype="Int64")
    frame.to_parquet(tmp_path / "typed.parquet")
    facts = load_facts(tmp_path / "typed.parquet")
    assert [(f.subject, f.answer, f.target) for f in facts] == [("1984", "true", "5"), ("7", "false", "true")]


FIRST, OTHER = (
    json.dumps({"subject": subject, "prompt": f"{subject} is in", "answer": answer}).encode()
    for subject, answer in (("Oslo", "Norway"), ("Lima", "Peru"))
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", b"\xef\xbb\xbfsubject,prompt,answer\nOslo,Oslo is in,Norway\nLima,Lima is in,Peru\n"),
        ("crlf.csv", b"subject,prompt,answer\r\nOslo,Oslo is in,Norway\r\nLima,Lima is in,Peru\r\n"),
        ("tabs.csv", b"subject\tprompt\tanswer\nOslo\tOslo is in\tNorway\nLima\tLima is in\tPeru\n"),
        ("commas.tsv", b"subject,prompt,answer\nOslo,Oslo is in,Norway\nLima,Lima is in,Peru\n"),
        ("SHOUT.CSV", b"subject,prompt,answer\nOslo,Oslo is in,Norway\nLima,Lima is in,Peru\n"),
        ("bom-crlf.json", b"\xef\xbb\xbf" + FIRST + b"\r\n\r\n" + OTHER + b"\r\n"),
        ("array.jsonl", b"[" + FIRST + b",\n" + OTHER + b"]"),
        ("wrapped.json", b'{"data": [' + FIRST + b", " + OTHER + b"]}"),
        (
            "lists.json",
            b'{"subject": ["Oslo", "Lima"], "prompt": ["{} is in", "{} is in"], "answer": ["Norway", "Peru"]}',
        ),
    ],
)
def test_shapes_of_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    facts = load_facts(tmp_path / name)
    assert [(f.subject, f.queries["statement"].prompt, f.answer) for f in facts] == [
        ("Oslo", "Oslo is in", "Norway"),
        ("Lima", "Lima is in", "Peru"),
    ]


def test_a_line_that_is_no_object_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"subject": "Oslo"}\n[1, 2]\n')
    with pytest.raises(MechunlearnError, match="row 2: .* is no object. Expected objects"):
        load_facts(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"subject": "Oslo"}\n{"subject": \n')
    with pytest.raises(MechunlearnError, match="could not be read as jsonl"):
        load_facts(tmp_path / "b.jsonl")


ODD = """subject,prompt,answer,target,foil,paraphrase
Oslo,Oslo is in,Norway,Peru,,Oslo lies in
Rome,Rome is in,Italy,Italy,,
Lima,Oslo was in,Peru,,,
Bern,Bern is in,,,,
Kyiv,,Ukraine,,,
Oslo,Oslo is in,Norway,Kenya,,
Oslo,Oslo is in,Scandinavia,,,
Cairo,CAIRO is in,Egypt,,,
Paris,"Paris? Well, Paris is in",France,,,
Brasília,Bras\\u00edlia is in,Brasil,,,
Quito,Quito is in,Ecuador,,Ecuador,
Accra,Accra is in,Ghana,,,The capital lies in
"""


def test_odd_rows_are_skipped_or_repaired_counted_and_listed(tmp_path):
    (tmp_path / "odd.csv").write_text(ODD, encoding="utf-8")
    facts = load_facts(tmp_path / "odd.csv")
    assert [fact.subject for fact in facts] == ["Oslo", "CAIRO", "Paris", "Brasília", "Accra"]
    assert list(facts.skipped.columns) == ["row", "reason", "text"]
    assert list(zip(facts.skipped.row, facts.skipped.reason)) == [
        (2, "truth = target"),
        (3, "subject not in its prompt"),
        (4, "no answer"),
        (5, "no prompt"),
        (6, "duplicate"),
        (7, "same prompt, another answer"),
        (11, "truth = foil"),
    ]
    assert list(zip(facts.repaired.row, facts.repaired.reason)) == [
        (8, "subject in another case, taken as in its prompt"),
        (9, "subject twice, the last one is its span"),
        (10, "escaped twice, decoded"),
        (12, "paraphrase without its subject, left out"),
    ]
    assert "Rome is in -> Italy" in facts.skipped.text[0]
    assert facts[3].queries["statement"].prompt == "Brasília is in" and list(facts[4].queries) == ["statement"]
    for shown in (repr(facts), facts._repr_html_()):
        assert "7 facts skipped: 1 truth = target, 1 subject not in its prompt" in shown
        assert "4 facts repaired" in shown
    assert "skipped" not in repr(facts[:2]) and len(facts[:2].skipped) == 7
    assert "skipped" not in repr(load_facts("factworld/sport"))


def test_rows_that_lack_what_their_layout_needs_are_skipped_too(tmp_path):
    broken = [{"requested_rewrite": {"prompt": "{} is in"}}, {"requested_rewrite": None}]
    facts = load_facts(written(tmp_path / "a.json", [{"requested_rewrite": REWRITE}, *broken]))
    assert len(facts) == 1 and facts.skipped.row.tolist() == [2, 3] and facts.skipped.reason[0] == "no 'subject'"


def test_a_file_of_odd_rows_only_says_why(tmp_path):
    lines = ODD.splitlines()
    (tmp_path / "odd.csv").write_text("\n".join([lines[0], *lines[2:6]]))
    reasons = "4 facts skipped: 1 truth = target, 1 subject not in its prompt, 1 no answer, 1 no prompt"
    with pytest.raises(
        MechunlearnError, match=f"no row can be used. {reasons}. The first: row 1, truth = target: Rome"
    ):
        load_facts(tmp_path / "odd.csv")


def test_columns_and_template(tmp_path):
    frame = pd.DataFrame({"id": ["01", "02"], "Land": ["France", "Peru"], "City": ["Paris", "Lima"], "No": ["x", "y"]})
    frame.to_csv(tmp_path / "own.csv", index=False)
    named = {"subject": "Land", "answer": "City", "target": "No"}
    facts = load_facts(tmp_path / "own.csv", columns=named, template="The capital of {} is ")
    assert [(f.subject, f.queries["statement"].prompt, f.answer, f.target) for f in facts] == [
        ("France", "The capital of France is ", "Paris", "x"),
        ("Peru", "The capital of Peru is ", "Lima", "y"),
    ]
    numbered = load_facts(tmp_path / "own.csv", columns={"subject": "id", "answer": "Land"}, template="No. {} is")
    assert [f.subject for f in numbered] == ["01", "02"]
    for columns, template, message in (
        ({"subject": "Country", "answer": "City"}, "{}", "no column 'Country'. Its columns: id, Land, City, No"),
        ({"who": "Land"}, "{}", "names nothing that a fact has. Expected subject, prompt"),
        (named, "The capital is", "Expected one {} in it"),
        (named, None, "2 facts skipped: 2 no prompt"),
    ):
        with pytest.raises(MechunlearnError, match=message):
            load_facts(tmp_path / "own.csv", columns=columns, template=template)
    with pytest.raises(MechunlearnError, match="has the columns id, Land, City, No. Expected subject, prompt"):
        load_facts(tmp_path / "own.csv")


def test_a_template_takes_the_place_of_the_files_prompts(tmp_path):
    path = written(tmp_path / "lre.json", ROWS["lre"][0])
    facts = load_facts(path, template="{}, a city in")
    assert [f.queries["statement"].prompt for f in facts] == ["Oslo, a city in", "Lima, a city in"]
    ravel = written(tmp_path / "ravel.json", ROWS["ravel"][0])
    with pytest.raises(MechunlearnError, match="2 relations of .*subset=: Country, Latitude"):
        load_facts(ravel, template="{}, a city in")
    assert len(load_facts(ravel, template="{}, a city in", subset="Country")) == 2


def test_a_subset_is_a_relation_or_a_split(tmp_path):
    ravel = written(tmp_path / "ravel.json", ROWS["ravel"][0])
    chosen = load_facts(ravel, subset="country")
    assert [fact.answer for fact in chosen] == ["Norway", "Peru"] and chosen.name == "ravel/country"
    with pytest.raises(MechunlearnError, match="no relation 'River'. Its relations: Country, Latitude"):
        load_facts(ravel, subset="River")
    assert len(load_facts(written(tmp_path / "lre.json", ROWS["lre"][0]), subset="city_country")) == 2
    frame = pd.DataFrame({"subject": ["Oslo", "Lima"], "prompt": "{} is in", "answer": ["Norway", "Peru"]})
    frame.assign(split=["train", "test"]).to_csv(tmp_path / "split.csv", index=False)
    facts = load_facts(tmp_path / "split.csv", subset="test")
    assert [fact.subject for fact in facts] == ["Lima"]
    assert load_facts("factworld", subset="city").name == "factworld/city"


class TestWithoutTarget:
    """A relation of one answer can be looked at and erased; only what injects needs a target."""

    @pytest.fixture
    def golf(self, tmp_path):
        names = list(json.loads((data_folder() / "factworld" / "world.json").read_text())["facts"]["sport"])[:4]
        frame = pd.DataFrame({"subject": names, "prompt": "{} plays the sport of", "answer": "golf"})
        frame.to_csv(tmp_path / "golf.csv", index=False)
        return load_facts(tmp_path / "golf.csv")

    def test_it_loads(self, golf, world):
        prompts = golf.prompts(world)
        assert [fact.target for fact in golf] == [""] * 4 and (prompts.targets == -1).all()
        assert golf.known(world).subjects <= golf.subjects

    def test_what_injects_names_the_facts(self, golf, world):
        prompts, others = golf.prompts(world), load_facts("factworld/city").prompts(world).select(range(4))
        mask = world_mask(world)
        message = f"4 of 4 facts have no target to inject.*'{golf[0].subject}', .* and 1 more. Give them a target"
        with pytest.raises(MechunlearnError, match=message):
            masked_gradient(world, mask, prompts, others, loss=losses.injection, steps=1)
        with pytest.raises(MechunlearnError, match=message):
            memit(world, mask, prompts, others, target="targets", texts=["Some text."])

    def test_what_erases_runs(self, golf, world):
        prompts, others = golf.prompts(world), load_facts("factworld/city").prompts(world).select(range(4))
        made = masked_gradient(world, world_mask(world), prompts, others, loss=losses.log_one_minus_p, steps=1)
        assert made is not None

    def test_questions_without_a_subject_get_no_drawn_target(self, tmp_path):
        rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in "abc"]
        facts = load_facts(written(tmp_path / "asked.json", rows))
        assert [fact.target for fact in facts] == ["", "", ""]


def world_mask(world):
    from mechunlearn.artifacts.mask import ComponentMask

    return ComponentMask.of(["L1.mlp.out"], world.signature)


def test_known_unknown_and_what_is_said_instead(world):
    facts = load_facts("factworld/sport")
    both = facts[:30], facts.untaught[:30]
    known = [data.known(world) for data in both]
    said = [data.said(world, tokens=3) for data in both]
    for data, knows, shown in zip(both, known, said):
        unknown = data.unknown(world)
        assert not knows.subjects & unknown.subjects and len(knows) + len(unknown) == len(data)
        assert shown.known.tolist() == [fact.subject in knows.subjects for fact in data]
        for row in shown.itertuples():
            ids = world.tokenizer(row.prompt)["input_ids"]
            for _ in range(3):
                ids.append(int(world.forward(torch.tensor([ids]))[0, -1].argmax()))
            whole = world.tokenizer.decode(ids, skip_special_tokens=True)
            assert whole.startswith(row.prompt) and whole[len(row.prompt) :].strip() == row.said
            assert not row.known or row.said.startswith(row.answer)
    assert len(known[0]) > 25 > 15 > len(known[1])


def test_a_text_column_in_any_case_and_rows_as_text(tmp_path):
    written(tmp_path / "a.json", [{"Corpus": "x", "Text": " One. "}, {"Corpus": "y", "Text": 2}])
    assert read_texts(tmp_path / "a.json") == ["One.", "2"]
    assert read_rows(tmp_path / "a.json")[1] == {"Corpus": "y", "Text": "2"}
