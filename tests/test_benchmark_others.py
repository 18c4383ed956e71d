"""WMDP, RWKU, zsRE, MQuAKE, and what all benchmarks share: reading, asking, and figures with their intervals."""

import math
import sys
import zlib

import pytest
import torch

from mechunlearn import MechunlearnError, load_facts, load_model
from mechunlearn.benchmarks import mquake, rwku, tofu, wmdp, zsre
from mechunlearn.benchmarks.asking import CHAT, PLAIN, queries, rouge_l, write
from mechunlearn.benchmarks.scores import Scores
from mechunlearn.benchmarks.wmdp import Choice
from mechunlearn.benchmarks.zsre import ZsreRow
from mechunlearn.metrics.continuations import Continuations, extraction_strength, read_behind, read_tokens, read_whole
from mechunlearn.metrics.membership import auc, min_k, zlib_score
from tests.plain import TOWNS, bytewise, plain_answer, plain_logprobs, rows_of


@pytest.fixture(scope="module")
def tiny():
    return bytewise()


class TestOthers:
    def test_zsre_counts_tokens(self, tiny):
        rows = [
            ZsreRow("Ada", "Who is Ada?", "a baker", "a smith", "Ada is who?", "who is Bo", "a cook"),
            ZsreRow("Bo", "Who is Bo?", "no", ""),
        ]
        scores = zsre.evaluate(tiny, rows)
        asked = {
            "rewrite": ("Who is Ada?", " a smith"),
            "paraphrase": ("Ada is who?", " a smith"),
            "neighbourhood": ("who is Bo?", " a cook"),
        }
        for name, (prompt, answer) in asked.items():
            right = plain_logprobs(tiny, prompt, answer)[1]
            assert scores.values[name, "token_accuracy"][0] == pytest.approx(sum(right) / len(right))
            assert scores.to_frame().set_index("split").loc[name, "n"] == 1
        assert len(zsre.evaluate(tiny, rows, answer="truth").to_frame()) == 3

    def test_zsre_asks_as_its_authors_do(self, tiny, monkeypatch):
        seen = []
        monkeypatch.setattr(
            zsre, "token_accuracy", lambda model, asked, *_: seen.append(asked) or torch.ones(len(asked))
        )
        row = ZsreRow("Ada", "Who is Ada?", "a baker", "a smith", "", "who is Bo", "a cook", (("What of?", "iron"),))
        found = zsre.evaluate(tiny, [row], answer="truth")
        assert seen == [[("Who is Ada?", "a baker")], [("who is Bo?", "a cook")], [("What of?", "iron")]]
        assert [split for split, _ in found.values] == ["rewrite", "neighbourhood", "portability"]

    def test_a_teacher_forced_answer_can_be_right(self, world):
        facts = load_facts("factworld/sport")[:4]
        asked = [(fact.queries["statement"].prompt, fact.answer) for fact in facts]
        assert zsre.token_accuracy(world, asked).tolist() == [1] * 4

    def test_letters_are_compared_by_their_log_probabilities(self, tiny):
        rows = [Choice("Which town?", TOWNS[:4], 2, "towns"), Choice("And which?", TOWNS[3:7], 0)]
        scores = wmdp.choice_scores(tiny, rows)
        head = "The following are multiple choice questions (with answers)"
        prompt = f"{head} about towns.\n\nWhich town?\nA. Arnholt\nB. Bexa\nC. Corvin\nD. Dunmore\nAnswer:"
        assert scores[0].tolist() == pytest.approx(
            [sum(plain_logprobs(tiny, prompt, f" {x}")[0]) for x in "ABCD"], abs=1e-4
        )
        whole = wmdp.choice_scores(tiny, rows, by="answers")
        by_hand = [sum(plain_logprobs(tiny, "Question: And which?\nAnswer:", f" {town}")[0]) for town in TOWNS[3:7]]
        assert whole[1].tolist() == pytest.approx(by_hand, abs=1e-4)
        found = wmdp.evaluate(tiny, {"bio": rows})
        assert found.values["bio", "accuracy"].tolist() == [
            float(int(s.argmax()) == r.answer) for s, r in zip(scores, rows)
        ]

    def test_a_case_is_right_if_one_question_is(self):
        assert mquake.multi_hop_accuracy(
            [["no", " Roma. ", "x"], ["Romania", "", "in Rome"]], [["Rome", "Roma"]] * 2
        ).tolist() == [1, 0]
        assert mquake.says('"rome"\nand more', ["Rome"]) and not mquake.says("It is Rome", ["Rome"])

    def test_mquake_asks_every_question(self, tiny, monkeypatch):
        said = iter(["oslo", "Rome", "x", "Ada", "A. L.", "Bo"])
        seen = []
        monkeypatch.setattr(
            mquake, "write", lambda model, given, *_, **__: [seen.append(one) or next(said) for one in given]
        )
        step, other = (
            mquake.Hop("Who wrote it?", "It was written by", "Ada", ("A. L.",)),
            mquake.Hop("Who?", "By", "Cai"),
        )
        case = mquake.Case(
            (mquake.Hop("", "Ada plays the", "harp"),),
            ("drums",),
            ("a?", "b?", "c?"),
            ("Oslo",),
            ("Rome",),
            (other,),
            (step, step),
            "1",
        )
        found = mquake.evaluate(tiny, [case])
        assert (
            found["all", "multi_hop_accuracy"]
            == found["all", "multi_hop_accuracy_before"]
            == found["2 hops", "multi_hop_accuracy"]
            == 1
        )
        assert (found["hops", "instance_accuracy"], found["hops", "instance_accuracy_before"]) == (1, 0)
        assert len(seen) == 6 and all(one.startswith("Question: What is the capital of") for one in seen)
        assert seen[0].endswith("Answer: German\n\nQuestion: a?\nAnswer:")
        assert seen[3].endswith("Question: Who wrote it?\nAnswer:") and seen[5].endswith("Question: Who?\nAnswer:")

    def test_rwku_by_level_and_kind_of_attack(self, tiny):
        rows = tuple(rwku.RwkuRow("Ada", f"Was Ada {kind}?", "no", kind) for kind in ("prefix", "suffix", "prefix"))
        texts = tuple(
            rwku.RwkuRow("Ada", "", text) for text in ("Ada was born by the sea.", "Ada died young, they say.")
        )
        found = rwku.evaluate(tiny, {"forget_level3": rows, "mia_forget": texts})
        assert {split: len(v) for (split, _), v in found.values.items() if split.startswith("forget")} == {
            "forget_level3": 3,
            "forget_level3: prefix": 2,
            "forget_level3: suffix": 1,
        }
        told = plain_logprobs(tiny, "", texts[0].answer)[0]
        least = sorted(told)[: int(len(told) * 0.2)]
        packed = len(zlib.compress(texts[0].answer.encode()))
        level = sum(told) / len(told)
        wanted = {"loss": level, "min_k": sum(least) / len(least), "zlib": level / packed}
        assert {name: float(found.values["mia_forget", name][0]) for name in wanted} == pytest.approx(wanted, abs=1e-5)


def test_every_family_is_read_as_its_module_says(model):
    ids, starts = [[5, 9, 13, 21, 8, 30, 2], [7, 11, 3]], [4, 1]
    found = read_tokens(model, ids, starts)
    assert found.counts.tolist() == [3, 2]
    for i, (row, start) in enumerate(zip(ids, starts)):
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([row])).logits[0, start - 1 : -1].double()
        wanted = torch.tensor(row[start:])
        by_hand = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        assert torch.allclose(found.logprobs[i, : len(wanted)].double(), by_hand, atol=1e-4)
        assert torch.equal(found.right[i, : len(wanted)], logits.argmax(-1) == wanted)


class TestReading:
    def test_rows_of_unequal_length_are_those_read_alone(self, tiny):
        asked = [query for row in rows_of(5) for query in queries(tiny, [row.question], [row.answer])]
        together, alone = read_behind(tiny, asked, batch_size=3), [read_behind(tiny, [query]) for query in asked]
        for i, single in enumerate(alone):
            count = int(single.counts[0])
            assert together.counts[i] == count
            assert torch.allclose(together.logprobs[i, :count], single.logprobs[0], atol=1e-5)
            assert torch.equal(together.right[i, :count], single.right[0])

    def test_a_text_by_heart_has_all_of_it(self):
        right = torch.tensor([[True, True, True], [True, False, True], [True, True, False], [False, True, False]])
        counts = torch.tensor([3, 3, 3, 2])
        logprobs = torch.zeros(4, 3).masked_fill(torch.arange(3) >= counts[:, None], torch.nan)
        assert extraction_strength(Continuations(logprobs, right)).tolist() == pytest.approx([1, 1 / 3, 0, 0.5])

    def test_scores_of_membership_by_hand(self):
        told = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0], [-1.0, -7.0, torch.nan, torch.nan, torch.nan]])
        assert min_k(told, 0.4).tolist() == [-4.5, -7.0] and min_k(told).tolist() == [-5.0, -7.0]
        assert zlib_score(told, ["a", "b"]).tolist() == pytest.approx([-3 / 9, -4 / 9])  # one letter is nine bytes
        assert auc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])) == pytest.approx((1 + 1 + 0 + 0.5) / 4)

    def test_what_cannot_be_read_is_said(self, tiny):
        with pytest.raises(MechunlearnError, match=r"There is no answer to 'Question: a\\nAnswer:'"):
            read_behind(tiny, queries(tiny, ["a"], [" "]))
        with pytest.raises(MechunlearnError, match="texts of two tokens or more"):
            read_whole(tiny, ["a"])
        with pytest.raises(MechunlearnError, match="no tokenizer"):
            read_behind(load_model((tiny.hf, None)), [])


class TestAsking:
    def test_a_chat_template_is_used_where_there_is_one(self, tiny, monkeypatch):
        sets = ("forget01_perturbed", *tofu.UTILITY.values())
        fictitious = dict.fromkeys(sets, rows_of(1))
        assert tofu.evaluate(tiny, fictitious, forget="forget01", tokens=1, rows=1).note.startswith(PLAIN)
        template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
        monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
        (query,) = queries(tiny, ["Who?"], ["Ada"], [("Where?", "Oslo")])
        assert query.prompt == "[user] Where?[assistant] Oslo[user] Who?[assistant] " and query.joined_by == ""
        found = tofu.evaluate(tiny, fictitious, forget="forget01", tokens=1, rows=1)
        assert found.note.startswith(CHAT) and found.card.settings["chat"] is True

    def test_rouge_by_hand(self):
        truth, said = "the cat sat on the mat", "the cats sat there on a mat"
        # the, sat, on, mat without stems; cat too with them
        assert rouge_l([truth], [said], "recall", stem=False).tolist() == pytest.approx([4 / 6])
        assert rouge_l([truth], [said], "recall").tolist() == pytest.approx([5 / 6])
        assert rouge_l([truth], [said], "f1", stem=False).tolist() == pytest.approx([8 / 13])
        assert rouge_l([truth], [""]).tolist() == [0]

    def test_without_the_package_one_line_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
        with pytest.raises(MechunlearnError, match=r"pip install 'mechunlearn\[benchmarks\]'"):
            rouge_l(["a"], ["a"])

    def test_what_is_written_is_that_of_a_plain_loop(self, tiny):
        prompts = ["Question: Who? Answer:", "A", "The town of Bexa lies by the"]
        assert write(tiny, prompts, 6, batch_size=2) == [plain_answer(tiny, prompt, 6) for prompt in prompts]


class TestScores:
    def test_every_figure_has_its_rows_and_its_interval(self):
        shares, means = torch.tensor([1.0, 1.0, 0.0, torch.nan]), torch.tensor([0.2, 0.3, 0.4])
        frame = Scores("tofu", {("a", "share"): shares, ("a", "mean"): means}, {("all", "p"): (0.5, 40)}).to_frame()
        assert list(frame.columns) == ["benchmark", "split", "metric", "value", "low", "high", "n"]
        assert frame["value"].tolist() == pytest.approx([2 / 3, 0.3, 0.5]) and frame["n"].tolist() == [3, 3, 40]
        assert (frame["low"][0], frame["high"][0]) == pytest.approx((0.094, 0.992), abs=1e-3)  # exact, of 2 in 3
        assert 0.2 <= frame["low"][1] < 0.3 < frame["high"][1] <= 0.401 and math.isnan(frame["low"][2])

    def test_it_shows_itself(self):
        scores = Scores("muse", {("forget", "verbmem"): torch.tensor([0.5])}, note="as <b> it is")
        assert "verbmem" in repr(scores) and "as &lt;b&gt; it is" in scores._repr_html_()
