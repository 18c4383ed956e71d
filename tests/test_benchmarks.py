"""The loaders of benchmarks: public files with all their rows, the hub by name, and one clear line for what is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mechunlearn as mu
from mechunlearn import MechunlearnError
from mechunlearn.benchmarks import counterfact, mquake, muse, rwku, sources, tofu, wmdp, zsre
from mechunlearn.benchmarks.asking import as_prompts

SHARED = Path(os.environ.get("MECHUNLEARN_SHARED", Path(__file__).parents[2] / "shared")) / "data"
public = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no public data files in {SHARED} (MECHUNLEARN_SHARED)")

TOFU = {"full": 4000, "forget01": 40, "forget05": 200, "forget10": 400, "retain90": 3600, "retain99": 3960}
TOFU |= {"holdout10": 400, "forget01_perturbed": 40, "forget05_perturbed": 200, "forget10_perturbed": 400}
TOFU |= {"retain_perturbed": 400, "real_authors": 100, "real_authors_perturbed": 100}
TOFU |= {"world_facts": 117, "world_facts_perturbed": 117}

NESTED = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "target_new": {"str": "harp", "id": "Q1"},
        "target_true": {"str": "drums", "id": "Q2"},
        "subject": "Ada Lind",
    },
    "paraphrase_prompts": ["One hears Ada Lind on the", "Ada Lind is known for the"],
    "neighborhood_prompts": ["Bo Ek plays the"],
    "attribute_prompts": ["Cai Om plays the"],
    "generation_prompts": ["On stage Ada Lind"],
}
MEND = {"subject": "Ada", "src": "Who is Ada?", "pred": "no", "rephrase": "Ada is who?", "alt": "a smith"}
MEND |= {"answers": ["a baker"], "loc": "nq question: who is bo", "loc_ans": "a cook", "cond": ""}
KNOWEDIT = {"subject": "Ada", "prompt": "Who is Ada?", "target_new": "a smith", "ground_truth": ["a baker"]}
KNOWEDIT |= {"rephrase_prompt": "Ada is who?", "cond": ""}
KNOWEDIT["locality"] = {"Relation_Specificity": [{"prompt": "Who is Bo?", "ground_truth": [["a cook", "cook"]]}]}
KNOWEDIT["portability"] = {"Reasoning": [{"prompt": "What does Ada work with?", "ground_truth": [["iron"]]}]}
STEP = {"question": "Who wrote it?", "cloze": "It was written by", "answer": "Ada", "answer_alias": ["A. L."]}
HOPS = {
    "case_id": 3,
    "requested_rewrite": [{**NESTED["requested_rewrite"], "question": "What does Ada Lind play?"}],
    "questions": ["a?", "b?", "c?"],
    "answer": "Oslo",
    "answer_alias": [],
    "new_answer": "Rome",
    "new_answer_alias": ["Roma"],
    "single_hops": [STEP],
    "new_single_hops": [STEP, STEP],
}


def stored(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@public
class TestPublicFiles:
    def test_every_split_of_tofu_has_all_its_rows(self):
        data = tofu.load(SHARED / "tofu")
        assert {name: len(rows) for name, rows in data.items()} == TOFU
        for name, rows in data.items():
            perturbed = name.endswith("_perturbed")
            wrong = 0 if not perturbed else 3 if name.startswith(("real", "world")) else 5
            assert {len(row.perturbed_answers) for row in rows} == {wrong}, name
            paraphrased = perturbed and not name.startswith(("real", "world"))
            assert all(bool(row.paraphrased_answer) == paraphrased for row in rows), name
        assert [len(row.options) for row in data["real_authors"][:2]] == [4, 4]
        assert data["forget01"] == tuple(data["full"][3960:]) == tuple(data["forget10"][360:])
        assert data["forget01"][0].question == data["forget01_perturbed"][0].question

    def test_one_file_of_tofu_is_the_split_that_it_is_called(self):
        assert {name: len(rows) for name, rows in tofu.load(SHARED / "tofu" / "forget01.jsonl").items()} == {
            "forget01": 40
        }

    def test_a_split_that_a_folder_lacks_is_named(self):
        with pytest.raises(MechunlearnError, match=r"lacks retain95.json. Expected files of these names"):
            tofu.load(SHARED / "tofu", splits=["forget01", "retain95"])

    def test_counterfact_as_easyedit_has_it(self):
        for split, count in {"edit": 10_000, "val": 1919}.items():
            facts = counterfact.load(SHARED / "counterfact", split)
            assert len(facts) == count
            assert all(len(fact.paraphrases) == len(fact.neighbours) == 1 and fact.neighbour_truth for fact in facts)
        fact = counterfact.load(SHARED / "counterfact" / "counterfact-edit.json")[0]
        assert (fact.prompt, fact.truth, fact.target) == (
            "The mother tongue of Danielle Darrieux is",
            "French",
            "English",
        )

    def test_zsre(self):
        rows = zsre.load(SHARED / "zsre" / "zsre_mend_train-1k.json")
        assert len(rows) == 1000 and sum(not row.target for row in rows) == 2
        assert sum(row.truth == row.target for row in rows) == 17
        assert (rows[0].truth, rows[0].target) == ("uniform", "unmanned aircraft")
        assert rows[0].neighbour.startswith("john goodman") and rows[0].neighbour_truth == "Walter Sobchak"

    def test_mquake(self):
        cases = mquake.load(SHARED / "mquake", "hard")
        assert len(cases) == 429 and {len(case.questions) for case in cases} == {3}
        assert sum(len(case.edits) for case in cases) == 1716
        assert cases[0].new_answer[:2] == ("Arabic", "ar") and cases[0].answer[0] == "English"
        assert cases[0].edits[0].cloze == "Hey Jude was performed by" and cases[0].edits[0].answer == "Madonna"
        assert cases[0].truths[0] == "The Beatles" and len(cases[0].new_hops) == 4


class TestLayouts:
    def test_counterfact_as_its_authors_have_it(self, tmp_path):
        (fact,) = counterfact.load(stored(tmp_path / "counterfact.json", [NESTED]))
        assert (fact.prompt, fact.truth, fact.target, fact.case) == ("Ada Lind plays the", "drums", "harp", "7")
        assert (
            fact.neighbours == ("Bo Ek plays the",) and fact.neighbour_truth == "drums" and len(fact.paraphrases) == 2
        )
        assert fact.generation == ("On stage Ada Lind",) and fact.attributes == ("Cai Om plays the",)

    def test_zsre_of_mend_and_of_knowedit_is_the_same(self, tmp_path):
        (ours,) = zsre.load(stored(tmp_path / "mend.json", [MEND]))
        (theirs,) = zsre.load(stored(tmp_path / "knowedit.json", [KNOWEDIT]))
        assert (ours.question, ours.truth, ours.target) == (theirs.question, theirs.truth, theirs.target)
        assert (ours.neighbour, ours.neighbour_truth) == ("who is bo", "a cook")
        assert (theirs.neighbour, theirs.neighbour_truth) == ("Who is Bo?", "a cook")
        assert theirs.portability == (("What does Ada work with?", "iron"),)

    def test_mquake(self, tmp_path):
        (case,) = mquake.load(stored(tmp_path / "any.json", [HOPS]), "T")
        assert case.new_answer == ("Rome", "Roma") and case.hops[0].answers == ("Ada", "A. L.")
        assert case.edits[0].cloze == "Ada Lind plays the" and case.edits[0].answer == "harp"

    def test_muse_as_its_authors_have_it(self, tmp_path):
        stored(tmp_path / "verbmem" / "forget.json", [{"prompt": "It was", "gt": "a dark night"}])
        stored(tmp_path / "knowmem" / "retain_qa.json", [{"question": "Who?", "answer": "Ada"}])
        stored(tmp_path / "privleak" / "holdout.json", ["One text.", "Another."])
        data = muse.load(tmp_path)
        assert {name: len(rows) for name, rows in data.items()} == {"verbmem": 1, "retain_qa": 1, "privleak_holdout": 2}
        assert data["verbmem"][0].answer == "a dark night" and data["privleak_holdout"][1].answer == "Another."

    def test_wmdp_and_mmlu(self, tmp_path):
        row = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}
        data = wmdp.load(stored(tmp_path / "wmdp-bio.json", [row, {**row, "answer": "D"}]).parent)
        assert [asked.answer for asked in data["bio"]] == [2, 3] and data["bio"][0].subject == "biology"
        more = wmdp.load_mmlu(stored(tmp_path / "mmlu.json", [{**row, "subject": "high_school_physics"}]))
        assert more["mmlu"][0].subject == "high school physics"
        with pytest.raises(MechunlearnError, match=r"row 1 makes no sense \(answer 4 of 4 choices\)"):
            wmdp.load(stored(tmp_path / "other.json", [{**row, "answer": 4}]), ["bio"])

    def test_rwku_and_one_person_of_it(self, tmp_path):
        rows = [
            {"query": f"{name} was born in ___.", "answer": "Rome", "subject": name, "level": "1", "type": "x"}
            for name in ("Ada", "Bo")
        ]
        stored(tmp_path / "forget_level1.json", rows)
        stored(tmp_path / "forget_mia.json", [{"text": "Ada was here.", "subject": "Ada"}])
        data = rwku.load(tmp_path, subject="Bo")
        assert len(data["forget_level1"]) == 1 and data["mia_forget"] == ()
        assert rwku.asked(data["forget_level1"][0]).question == "Fill in the blank: Bo was born in ___."
        with pytest.raises(MechunlearnError, match="RWKU has no 'Cai'. Its people: Ada, Bo"):
            rwku.load(tmp_path, subject="Cai")

    def test_a_row_that_lacks_a_column_is_named(self, tmp_path):
        with pytest.raises(MechunlearnError, match=r"split full, row 2 has no 'answer'. Its columns: question."):
            tofu.load(stored(tmp_path / "full.json", [{"question": "a", "answer": "b"}, {"question": "a"}]))

    def test_one_file_of_many_splits_has_to_say_which(self, tmp_path):
        with pytest.raises(MechunlearnError, match=r"is one file. Say which split it is: splits="):
            tofu.load(stored(tmp_path / "mine.json", [{"question": "a", "answer": "b"}]))


CALLS = {  # loader, arguments: what the hub is asked for
    "tofu": (lambda: tofu.load(splits=["forget01", "real_authors_perturbed"]), [("locuslab/TOFU", "forget01"), ("locuslab/TOFU", "real_authors_perturbed")]),
    "news": (lambda: muse.load(splits=["forget_qa", "retain_qa", "verbmem"]), [("muse-bench/MUSE-News", "knowmem"), ("muse-bench/MUSE-News", "verbmem")]),
    "books": (lambda: muse.load("books", ["privleak_holdout"]), [("muse-bench/MUSE-Books", "privleak")]),
    "wmdp": (lambda: wmdp.load(), [("cais/wmdp", "wmdp-bio"), ("cais/wmdp", "wmdp-chem"), ("cais/wmdp", "wmdp-cyber")]),
    "mmlu": (lambda: wmdp.load_mmlu(), [("cais/mmlu", "all")]),
    "rwku": (lambda: rwku.load(splits=["forget_level1"]), [("jinzhuoran/RWKU", "forget_level1")]),
    "counterfact": (lambda: counterfact.load(), [("azhx/counterfact",)]),
    "zsre": (lambda: zsre.load(), [("zjunlp/KnowEdit", "benchmark/ZsRE/ZsRE-test-all.json")]),
    "mquake": (lambda: mquake.load(), [("henryzhongsc/MQuAKE-Remastered",)]),
}  # fmt: skip
ROW = {
    **NESTED,
    **KNOWEDIT,
    **HOPS,
    "question": "q",
    "answer": "1",
    "gt": "g",
    "text": "t",
    "query": "q",
    "choices": ["a", "b"],
}
PARTS = ("train", "test", "forget", "forget_qa", "retain_qa", "holdout", "CF3k")


class TestTheHub:
    @pytest.mark.parametrize("name", CALLS)
    def test_is_asked_by_name_once_a_configuration(self, name, monkeypatch):
        asked, looked = [], []

        def load_dataset(*given, **named):
            asked.append((*given, *named.values()))
            return {part: [NESTED if "counterfact" in given[0] else ROW] for part in PARTS}

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        monkeypatch.setattr(sources, "look_up", lambda *given: looked.append(given))
        load, wanted = CALLS[name]
        assert load()
        assert asked == wanted and looked == [(wanted[0][0], "dataset")]

    def test_a_split_that_is_called_otherwise_is_taken_if_it_is_the_only_one(self, monkeypatch):
        monkeypatch.setattr("datasets.load_dataset", lambda *given, **named: {"validation": [ROW]})
        monkeypatch.setattr(sources, "look_up", lambda *given: None)
        assert len(wmdp.load(splits=["bio"])["bio"]) == 1

    @pytest.mark.parametrize("name", CALLS)
    def test_without_a_network_there_is_one_clear_line(self, name, monkeypatch, tmp_path):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        with pytest.raises(MechunlearnError) as error:
            CALLS[name][0]()
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"Could not load '{CALLS[name][1][0][0]}' from the hub: ")
        assert str(error.value).endswith("Expected a data set that can be reached, or its files in a local folder.")
        assert error.value.__suppress_context__

    def test_a_hub_that_does_not_answer_is_asked_once(self, monkeypatch):
        asked = []

        def info(self, name, timeout):
            asked.append((name, timeout))
            raise ConnectionError("no route to host\nand more")

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
        with pytest.raises(MechunlearnError, match=r"was found on the hub \(no route to host\)\. Expected a data set"):
            tofu.load()
        assert asked == [("locuslab/TOFU", 10)]

    def test_an_error_of_many_lines_is_one(self, monkeypatch):
        def broken(*_, **__):
            raise RuntimeError("the file is broken.\nHere is why:\n...")

        monkeypatch.setattr("datasets.load_dataset", broken)
        monkeypatch.setattr(sources, "look_up", lambda *given: None)
        with pytest.raises(
            MechunlearnError, match=r"^Could not load 'cais/wmdp' from the hub: the file is broken\. Expected a data"
        ):
            wmdp.load()

    def test_what_is_no_name_and_no_file_is_said(self):
        with pytest.raises(MechunlearnError, match="There is no file or folder 'a/b/c', and it is no name on the hub"):
            mquake.load("a/b/c")


def test_benchmarks_are_there_and_wait_for_nothing_heavy():
    assert {"tofu", "muse", "wmdp", "rwku", "counterfact", "zsre", "mquake", "Scores"} <= set(dir(mu.benchmarks))
    heavy = "print([name for name in ('torch', 'datasets', 'rouge_score', 'pandas') if name in sys.modules])"
    for line in ("import mechunlearn as mu; mu.benchmarks", "from mechunlearn import benchmarks"):
        command = [sys.executable, "-c", f"import sys; {line}; {heavy}"]
        ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(mu.__file__).parents[1])
        assert ran.stdout.strip() == "[]"


@public
def test_rows_become_prompts_without_an_invented_subject(world):
    rows = tofu.load(SHARED / "tofu" / "forget01.jsonl")["forget01"]
    prompts = as_prompts(world, rows, "forget01")
    assert len(prompts) == 40 and prompts.facts.subjects == {""} and (prompts.spans == -1).all()
    assert prompts.queries[0].prompt.startswith("Question: ") and prompts.queries[0].prompt.endswith("\nAnswer:")
    forget, retain = prompts.split(forget=10, retain=20)
    assert (len(forget), len(retain)) == (10, 20)


@public
def test_facts_to_rewrite_become_prompts_with_their_subjects(world):
    made = {
        "counterfact": (counterfact.facts(counterfact.load(SHARED / "counterfact", "val")), 1919),
        "zsre": (zsre.facts(zsre.load(SHARED / "zsre" / "zsre_mend_train-1k.json")), 1000),
        "mquake": (mquake.facts(mquake.load(SHARED / "mquake", "hard")), 769),
    }
    for name, (facts, count) in made.items():
        assert len(facts) == count and facts.name == name
        assert all(fact.subject in fact.queries["statement"].prompt and fact.answer != fact.target for fact in facts)
        assert (facts[:100].prompts(world).spans >= 0).all()
    assert made["zsre"][0].formats == ("statement", "paraphrase_1")
    assert made["counterfact"][0][0].queries["paraphrase_1"].target == made["counterfact"][0][0].target
