"""TOFU, MUSE and CounterFact: their metrics are those of plain loops over plain transformers, and of values worked by hand."""

import itertools
import math
import re

import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.benchmarks import counterfact, muse, tofu
from mechunlearn.benchmarks.asking import cut
from mechunlearn.benchmarks.counterfact import Rewrite
from mechunlearn.benchmarks.muse import MuseRow
from mechunlearn.benchmarks.tofu import TofuRow
from tests.plain import (
    TOWNS,
    asked_plainly,
    bytewise,
    common_words,
    plain_answer,
    plain_logprobs,
    plain_probability,
    rows_of,
    words_of,
)


@pytest.fixture(scope="module")
def tiny():
    return bytewise()


def plain_tofu(model, rows, tokens: int, options: bool) -> dict[str, list[float]]:
    """TOFU's three figures of each row of a set, R, and what is known by heart."""
    found = {
        name: []
        for name in ("probability", "rouge_l_recall", "truth_ratio", "exact_memorization", "extraction_strength")
    }
    for row in rows:
        prompt, part = asked_plainly(model, row.question)
        likely = plain_probability(model, prompt, part + row.answer, end=True)
        right = plain_probability(model, prompt, part + (row.paraphrased_answer or row.answer), end=True)
        wrong = [plain_probability(model, prompt, part + each, end=True) for each in row.perturbed_answers]
        found["probability"].append(likely / (likely + sum(wrong)) if options else likely)
        found["truth_ratio"].append(math.exp(sum(map(math.log, wrong)) / len(wrong)) / right)
        said, truth = words_of(plain_answer(model, prompt, tokens), True), words_of(row.answer, True)
        found["rouge_l_recall"].append(common_words(truth, said) / len(truth))
        first = plain_logprobs(model, prompt, part + row.answer)[1]
        found["exact_memorization"].append(sum(first) / len(first))
        given = next(k for k in range(len(first) + 1) if all(first[k:]))
        found["extraction_strength"].append(1 - given / len(first))
    return found


def check_tofu(model, data, tokens: int, tolerance: float) -> None:
    retain = torch.linspace(0.5, 1.5, 15)
    scores = tofu.evaluate(model, data, forget="forget01", retain_model=retain, tokens=tokens)
    sets = {"forget01": "forget01_perturbed", **tofu.UTILITY}
    plain = {
        name: plain_tofu(model, data[split], tokens, name in ("real_authors", "world_facts"))
        for name, split in sets.items()
    }
    for name, found in plain.items():
        for metric in found if name == "forget01" else ("probability", "rouge_l_recall", "truth_ratio"):
            assert scores.values[name, metric].tolist() == pytest.approx(found[metric], rel=1e-4, abs=tolerance), (
                name,
                metric,
            )
    ratios = plain["forget01"]["truth_ratio"]
    assert scores["forget01", "truth_ratio_closeness"] == pytest.approx(
        sum(min(r, 1 / r) for r in ratios) / len(ratios), abs=tolerance
    )
    nine = []
    for name in tofu.UTILITY:
        found, count = plain[name], len(plain[name]["probability"])
        kept = sum(max(0.0, 1 - ratio) for ratio in found["truth_ratio"]) / count
        nine += [sum(found["probability"]) / count, sum(found["rouge_l_recall"]) / count, kept]
    utility = 9 / sum(1 / figure for figure in nine) if all(nine) else 0.0
    assert scores["all", "model_utility"] == pytest.approx(utility, abs=tolerance)
    assert scores["forget01", "forget_quality"] == pytest.approx(tofu.forget_quality(torch.tensor(ratios), retain))


@pytest.fixture(scope="module")
def fictitious() -> dict[str, tuple[TofuRow, ...]]:
    rows = rows_of(20)
    short = [TofuRow(row.question, row.answer, "", row.perturbed_answers[:3]) for row in rows]
    made = {"forget01_perturbed": rows, "retain_perturbed": rows[:6], "real_authors_perturbed": tuple(short[:5])}
    return made | {"world_facts_perturbed": tuple(short[5:9])}


class TestTofu:
    def test_the_five_metrics_on_twenty_answers_are_those_of_a_plain_loop(self, tiny, fictitious):
        check_tofu(tiny, fictitious, tokens=12, tolerance=2e-5)

    @pytest.mark.real
    def test_on_a_real_model_they_are_those_of_a_plain_loop(self, smollm2, fictitious):
        data = {name: rows[:3] for name, rows in fictitious.items()}
        capitals = (("What is the capital of France?", "Paris", ("Rome", "Oslo", "Bern")),)
        data["real_authors_perturbed"] = tuple(TofuRow(q, a, "", wrong) for q, a, wrong in capitals)
        check_tofu(smollm2, data, tokens=8, tolerance=2e-3)

    def test_a_retrained_model_and_its_ratios_give_the_same_quality(self, tiny, fictitious):
        ratios = tofu.truth_ratios(tiny, fictitious, "forget01")
        found = tofu.evaluate(tiny, fictitious, forget="forget01", retain_model=tiny, tokens=2)
        assert torch.equal(found.values["forget01", "truth_ratio"], ratios)
        assert found["forget01", "forget_quality"] == 1  # the model itself

    def test_the_ratio_by_hand(self):
        right, wrong = torch.tensor([0.4, 0.2]), torch.tensor([[0.1, 0.4], [0.1, torch.nan]])
        assert tofu.truth_ratio(right, wrong).tolist() == pytest.approx([0.5, 0.5])  # sqrt(.1 x .4) / .4, .1 / .2
        assert tofu.truth_ratio(right, wrong, mean="arithmetic").tolist() == pytest.approx([0.625, 0.5])

    def test_the_quality_is_the_share_of_orders_that_part_as_far(self):
        ours, theirs = torch.tensor([0.1, 0.2, 0.35, 0.9]), torch.tensor([0.3, 0.5, 0.8, 1.2])

        def distance(a, b):
            return max(abs(sum(x <= at for x in a) / len(a) - sum(x <= at for x in b) / len(b)) for at in (*a, *b))

        everyone = (*ours.tolist(), *theirs.tolist())
        seen = distance(ours.tolist(), theirs.tolist())
        drawn = [set(some) for some in itertools.combinations(range(8), 4)]
        split = [([everyone[i] for i in some], [everyone[i] for i in range(8) if i not in some]) for some in drawn]
        as_far = sum(distance(a, b) >= seen - 1e-9 for a, b in split)
        assert seen == 0.5 and len(drawn) == 70
        assert tofu.forget_quality(ours, theirs) == pytest.approx(as_far / 70)
        assert tofu.forget_quality(1 / ours, 1 / theirs) == pytest.approx(as_far / 70)  # TOFU's code inverts R

    def test_utility_is_a_harmonic_mean_of_nine(self):
        assert tofu.model_utility([0.25, 0.5, 1.0] * 3) == pytest.approx(9 / (3 * (4 + 2 + 1)))
        assert tofu.model_utility([0.0, *[1.0] * 8]) == 0
        with pytest.raises(MechunlearnError, match="Got 8 figures.*Expected nine"):
            tofu.model_utility([0.5] * 8)

    def test_missing_splits_are_named(self, tiny, fictitious):
        with pytest.raises(MechunlearnError, match="The data lack forget10_perturbed. Load them too"):
            tofu.evaluate(tiny, fictitious)


NEWS = {
    "verbmem": tuple(
        MuseRow(f"In the year {i} the town", f"of {TOWNS[i % 7]} was built by the sea.") for i in range(5)
    ),
    "forget_qa": tuple(MuseRow(f"Who built {town}?", f"Ada of {town}") for town in TOWNS[:4]),
    "forget_qa_icl": (MuseRow("Who built Rome?", "Romulus"), MuseRow("Who built Troy?", "Ilus")),
    "retain_qa": (MuseRow("Where is the sea?", "by the town"),),
    "privleak_forget": tuple(MuseRow("", f"{town} lies by the sea, they say.") for town in TOWNS[:4]),
    "privleak_holdout": tuple(MuseRow("", f"Nobody lives in {town} any more") for town in TOWNS[2:7]),
}


class TestMuse:
    def plain(self, model, rows: int) -> dict[str, list[float] | float]:
        found = {"verbmem": [], "knowmem": []}
        for row in NEWS["verbmem"][:rows]:
            said, truth = words_of(plain_answer(model, row.question, 128)), words_of(row.answer)
            found["verbmem"].append(2 * common_words(truth, said) / (len(truth) + len(said)))
        for row in NEWS["forget_qa"][:rows]:
            if model.tokenizer.chat_template:
                shots = [
                    turn for r in NEWS["forget_qa_icl"] for turn in (("user", r.question), ("assistant", r.answer))
                ]
                turns = [{"role": role, "content": text} for role, text in (*shots, ("user", row.question))]
                prompt = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            else:
                prompt = "".join(f"Question: {r.question}\nAnswer: {r.answer}\n\n" for r in NEWS["forget_qa_icl"])
                prompt += f"Question: {row.question}\nAnswer:"
            said = words_of(re.split(r"\n\n|\nQuestion|Question:", plain_answer(model, prompt, 32))[0])
            truth = words_of(row.answer)
            found["knowmem"].append(2 * common_words(truth, said) / (len(truth) + len(said)))
        scores = []
        for name in ("forget", "holdout"):
            told = [sorted(plain_logprobs(model, "", row.answer)[0]) for row in NEWS[f"privleak_{name}"][:rows]]
            least = [each[: max(1, int(len(each) * 0.4))] for each in told]
            scores.append([sum(each) / len(each) for each in least])
        pairs = [(held > forgotten) + 0.5 * (held == forgotten) for forgotten in scores[0] for held in scores[1]]
        return found | {"private_auc": sum(pairs) / len(pairs)}

    def check(self, model, tolerance: float, rows: int = 5) -> None:
        scores, plain = muse.evaluate(model, NEWS, retrained=0.4, rows=rows), self.plain(model, rows)
        assert scores.values["forget", "verbmem"].tolist() == pytest.approx(plain["verbmem"], abs=tolerance)
        assert scores.values["forget", "knowmem"].tolist() == pytest.approx(plain["knowmem"], abs=tolerance)
        assert scores["forget", "private_auc"] == pytest.approx(plain["private_auc"])
        assert scores["forget", "privacy_leakage"] == pytest.approx(100 * (plain["private_auc"] / 0.4 - 1))
        assert len(scores.values["retain", "knowmem"]) == 1

    def test_every_metric_is_that_of_a_plain_loop(self, tiny):
        self.check(tiny, 1e-6)

    @pytest.mark.real
    def test_on_a_real_model_they_are_those_of_a_plain_loop(self, smollm2):
        self.check(smollm2, 1e-6, rows=2)

    def test_who_was_retrained_is_said(self, tiny):
        data = {name: rows for name, rows in NEWS.items() if name.startswith("privleak")}
        found = {given: muse.evaluate(tiny, data, retrained=given) for given in (None, "news", tiny)}
        assert found[tiny]["forget", "privacy_leakage"] == 0
        assert "AUC of 0.5 (no retrained model given)." in found[None].note and "AUC of 0.4772." in found["news"].note
        with pytest.raises(MechunlearnError, match="none of MUSE's splits. Expected some of verbmem, forget_qa"):
            muse.evaluate(tiny, {})

    def test_answers_are_cut_where_the_model_asks_itself_the_next_question(self, tiny, monkeypatch):
        asked = []

        def said(model, prompts, tokens, until=(), **_):
            asked.append((tokens, until))
            return [cut(f" Ada of {town}\n\nQuestion: Who?", until) for town in TOWNS[: len(prompts)]]

        monkeypatch.setattr(muse, "write", said)
        found = muse.evaluate(tiny, NEWS)
        assert found.values["forget", "knowmem"].tolist() == [1] * 4 and found["forget", "verbmem"] < 1
        assert asked == [(128, ()), (32, muse.STOPS), (32, muse.STOPS)]

    def test_only_as_many_true_tokens_count_as_the_model_may_write(self, tiny, monkeypatch):
        monkeypatch.setattr(muse, "write", lambda *_, **__: ["b" * 127])  # a byte is a token, and the space is one too
        row = MuseRow("A", "b" * 127 + " c" * 50)
        assert muse.evaluate(tiny, {"verbmem": (row,)})["forget", "verbmem"] == 1


class TestCounterFact:
    FACTS = tuple(
        Rewrite(
            town,
            f"{town} lies in",
            "Norland",
            TOWNS[-1 - i],
            (f"One finds {town} in", f"{town} is a town of")[: 1 + i % 2],
            (f"{TOWNS[(i + 1) % 7]} lies in",) * (i % 3),
            "Norland",
            generation=(f"My home is {town} and",),
            case=str(i),
        )
        for i, town in enumerate(TOWNS[:5])
    )

    def check(self, model, tolerance: float) -> None:
        scores = counterfact.evaluate(model, self.FACTS, tokens=0)
        for i, fact in enumerate(self.FACTS):
            for name, prompts in {
                "rewrite": [fact.prompt],
                "paraphrase": fact.paraphrases,
                "neighbourhood": fact.neighbours,
            }.items():
                target = [plain_probability(model, prompt, f" {fact.target}") for prompt in prompts]
                truth = [plain_probability(model, prompt, f" {fact.truth}") for prompt in prompts]
                better = [t > f if name != "neighbourhood" else t < f for t, f in zip(target, truth)]
                further = [t - f if name != "neighbourhood" else f - t for t, f in zip(target, truth)]
                got = [float(scores.values[name, metric][i]) for metric in ("score", "magnitude")]
                if not prompts:
                    assert all(map(math.isnan, got))
                    continue
                wanted = [sum(better) / len(prompts), sum(further) / len(prompts)]
                assert got == pytest.approx(wanted, abs=tolerance), (name, i)
        three = [scores[name, "score"] for name in ("rewrite", "paraphrase", "neighbourhood")]
        assert scores["all", "score"] == pytest.approx(3 / sum(1 / x for x in three) if all(three) else 0)
        frame = scores.to_frame().set_index(["split", "metric"])
        assert frame.loc[("neighbourhood", "score"), "n"] == 3 and frame.loc[("rewrite", "score"), "n"] == 5

    def test_scores_are_those_of_a_plain_loop(self, tiny):
        self.check(tiny, 1e-5)

    @pytest.mark.real
    def test_on_a_real_model_they_are_those_of_a_plain_loop(self, smollm2):
        self.check(smollm2, 1e-4)

    def test_what_it_writes_is_drawn_by_the_seed_alone(self, tiny):
        state = torch.random.get_rng_state()
        first, again, other = (counterfact.generate(tiny, self.FACTS, 8, seed) for seed in (0, 0, 1))
        assert first == again != other and torch.equal(torch.random.get_rng_state(), state)
        assert all(
            text.startswith(opening)
            for texts, fact in zip(first, self.FACTS)
            for text, opening in zip(texts, fact.generation)
        )

    def test_consistency_is_a_cosine(self):
        # idf of n texts: 1 + ln((1 + n) / (1 + df)); each word stands in one of two references
        assert counterfact.consistency(["red"], [["red blue"]]).tolist() == pytest.approx([1 / math.sqrt(2)])
        assert counterfact.consistency(["red red"], [["red", "green"]]).tolist() == pytest.approx([1 / math.sqrt(2)])
        assert counterfact.consistency(["green"], [["red", "blue"]]).tolist() == [0]
        with pytest.raises(MechunlearnError, match="Expected one text or more for each"):
            counterfact.consistency(["green"], [[]])

    def test_facts_without_references_have_no_consistency(self, tiny):
        found = counterfact.evaluate(tiny, self.FACTS[:2], tokens=4, references={"1": ["My home is a town"]})
        assert found.values["generation", "consistency"].isnan().tolist() == [True, False]
        assert len(found.values["generation", "ngram_entropy"]) == 2
