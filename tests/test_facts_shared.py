"""Every facts file in public use that lies beside the repository loads: its rows are all used or counted as odd.

The files are not part of the repository. They are looked for in ../shared/data, or where MECHUNLEARN_SHARED says.
"""

import os
from pathlib import Path

import pytest

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.facts.tables import read_texts

SHARED = Path(os.environ.get("MECHUNLEARN_SHARED", Path(__file__).parents[2] / "shared")) / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no public data files in {SHARED} (MECHUNLEARN_SHARED)")

FILES = {  # file: (facts used, skipped, by reason)
    "known_1000/known_1000.json": (1208, {"duplicate": 1}),
    "known/known_1000.csv": (1208, {"duplicate": 1}),
    "known/known_by_smollm2.csv": (1402, {"duplicate": 213}),
    "known/known_by_gemma3.csv": (1301, {"duplicate": 155}),
    "known/known_by_smollm2_5shot.csv": (967, {}),
    "known/known_by_gemma3_5shot.csv": (780, {}),
    "counterfact/counterfact-edit.json": (9917, {"same prompt, another answer": 82, "duplicate": 1}),
    "counterfact/counterfact-val.json": (1912, {"same prompt, another answer": 7}),
    "zsre/zsre_mend_train-1k.json": (983, {"truth = target": 17}),
    "mquake/MQuAKE-hard.json": (767, {"duplicate": 949}),
    "ravel/ravel_city_entity.json": (18731, {"no answer": 1}),
    "tofu/full.jsonl": (3999, {"same prompt, another answer": 1}),
    "tofu/retain90.jsonl": (3599, {"same prompt, another answer": 1}),
    "tofu/retain99.jsonl": (3959, {"same prompt, another answer": 1}),
    "tofu/retain_perturbed.json": (400, {}),
    "tofu/forget01.jsonl": (40, {}),
    "tofu/forget05.jsonl": (200, {}),
    "tofu/forget10.jsonl": (400, {}),
    "tofu/forget01_perturbed.json": (40, {}),
    "tofu/forget05_perturbed.json": (200, {}),
    "tofu/forget10_perturbed.json": (400, {}),
    "tofu/holdout10.json": (400, {}),
    "tofu/real_authors.json": (100, {}),
    "tofu/real_authors_perturbed.json": (100, {}),
    "tofu/world_facts.json": (117, {}),
    "tofu/world_facts_perturbed.json": (117, {}),
    "loku/real_authors_perturbed.json": (100, {}),
    "loku/world_facts_perturbed.json": (117, {}),
}


def counted(facts):
    """How many facts are used, and how many are skipped, by reason."""
    return len(facts), facts.skipped.reason.value_counts().to_dict()


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_used_or_counted(name):
    facts = load_facts(SHARED / name)
    assert counted(facts) == FILES[name]
    for fact in facts:
        asked = fact.queries["statement"]
        assert asked.prompt.strip() and asked.answer and asked.answer != asked.target
        assert all(fact.subject in query.prompt for query in fact.queries.values())
        assert bool(fact.subject) == (not name.startswith(("tofu", "loku")))


def test_all_relations_of_lre():
    files = sorted((SHARED / "lre").glob("*/*.json"))
    loaded = [load_facts(file) for file in files]
    assert len(files) == 47 and sum(map(len, loaded)) == 10997
    reasons = [odd.reason for facts in loaded for odd in facts.odd if not odd.kept]
    assert (reasons.count("duplicate"), reasons.count("same prompt, another answer"), len(reasons)) == (40, 52, 92)
    assert 10997 + 92 == 11089
    capitals = load_facts(SHARED / "lre" / "factual" / "country_capital_city.json")
    assert len(capitals) == 24 and capitals.formats == ("statement", "paraphrase_1", "paraphrase_2", "paraphrase_3")
    assert capitals[0].queries["statement"].prompt == "The capital of United States is the city of"
    assert [fact.answer for fact in capitals if fact.subject in ("Brazil", "Colombia")] == ["Brasília", "Bogotá"]
    years = load_facts(SHARED / "lre" / "factual" / "presidents_birth_year.json")
    assert years[0].answer == "1735" and all(len(fact.answer) == 4 for fact in years)


def test_all_relations_of_trex_with_their_patterns():
    files = sorted((SHARED / "pararel" / "trex_lms_vocab").glob("*.jsonl"))
    loaded = {file.stem: load_facts(file) for file in files}
    assert len(files) == 41 and sum(map(len, loaded.values())) == 27430
    assert sum(len(facts.skipped) for facts in loaded.values()) == 1981 == 29411 - 27430
    assert loaded["P36"][0].queries["statement"].prompt == "The capital of Cook County is"
    assert loaded["P31"][0].queries["statement"].prompt.endswith(" is a")  # LAMA's template: there is no pattern file
    assert len(loaded["P36"].formats) == 8 and loaded["P36"][0].relation == "P36"


def test_a_relation_with_one_answer_loads():
    twins = load_facts(SHARED / "known_1000" / "known_1000.json", subset="P190")
    assert len({fact.answer for fact in twins}) == 1 and {fact.target for fact in twins} == {""}


def test_a_relation_of_ravel_is_chosen_by_name():
    facts = load_facts(SHARED / "ravel" / "ravel_city_entity.json", subset="Country", template="{} is a city in")
    assert len(facts) == 3122 and facts[0].queries["statement"].prompt == "Aarau is a city in"
    assert facts[0].answer == "Switzerland" and {fact.relation for fact in facts} == {"Country"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pararel/LAMA_relations.jsonl", "holds the prompts of relations and no facts"),
        ("pararel/pattern_data/graphs_json/P36.jsonl", "holds the prompts of relations and no facts"),
        ("mquake/cloze_templates.json", "has the columns P17, P19, .* and 32 more. Expected subject, prompt, answer"),
        ("circuits/ioi_llama.csv", "has the columns .*clean, corrupted.* Expected subject, prompt, answer"),
    ],
)
def test_what_holds_no_facts_is_refused(name, message):
    with pytest.raises(MechunlearnError, match=message):
        load_facts(SHARED / name)


def test_texts_for_perplexity():
    assert len(read_texts(SHARED / "me_ppl" / "ME-PPL_1k.json")) == 1000
