"""Side effects in the terms of model editing: every number against a plain loop, and no row silently missing."""

import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest, t

from mechunlearn import evaluate, load_facts
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.evaluation import fluency as written
from mechunlearn.evaluation.damage import damage
from mechunlearn.evaluation.portability import aliases, portability, shared_answer
from mechunlearn.evaluation.side_effects import as_text, derived, least_seen, side_effects
from mechunlearn.facts.formats import Query
from mechunlearn.metrics import answered
from mechunlearn.metrics.text import WORD, ngram_entropy
from mechunlearn.world.toy import planted_facts

TERMS = ["efficacy", "generalization", "specificity", "same subject", "portability", "fluency"]


def rome(text: str) -> float:
    """The formula as the authors' code has it: the mean of the weighted entropies, from arrays of counts."""
    words, weighted = WORD.findall(text), []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        share = np.unique(grams, return_counts=True)[1] / len(grams)
        weighted.append(weight * float((-share * np.log(share) / np.log(2)).sum()))
    return float(np.mean(weighted))


def says(model, prompt: str, answer: str) -> bool:
    """Whether greedy decoding of the plain Hugging Face model begins with the answer."""
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    wanted = model.tokenizer(f"{prompt} {answer}", return_tensors="pt").input_ids[0, ids.shape[1] :]
    for token in wanted:
        with torch.no_grad():
            said = model.hf(ids).logits[0, -1].argmax()
        if said != token:
            return False
        ids = torch.cat([ids, said[None, None]], 1)
    return True


def goes_on(model, prompt: str) -> str:
    """What greedy decoding of the plain Hugging Face model adds to a prompt."""
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(written.TOKENS):
        with torch.no_grad():
            said = model.hf(ids).logits[0, -1].argmax()
        if said == model.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, said[None, None]], 1)
    start = len(model.tokenizer(prompt).input_ids)
    return model.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def noisy(model, site: str, scale: float) -> WeightEdit:
    """Noise on all neurons of an MLP, in units of its rows' own spread."""
    rows = model.rows(site)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    changed = {site: rows + scale * rows.std() * noise}
    return WeightEdit({site: torch.arange(len(rows))}, changed, model.signature, RunCard("noise"))


class TestEntropy:
    def test_it_is_the_formula_of_the_published_code(self):
        rng = random.Random(0)
        for length in (3, 10, 60):
            text = " ".join(rng.choice(["it", "rains", "on", "us,", "again."]) for _ in range(length))
            assert ngram_entropy(text) == pytest.approx(rome(text), abs=1e-12)

    def test_numbers_by_hand(self):
        assert ngram_entropy("a b c d") == pytest.approx((math.log2(3) + 2 * 1) / 3)
        assert ngram_entropy("a b a b") == pytest.approx((0.9183 + 2 * 1) / 3, abs=1e-4), "bigrams 2 1, trigrams 1 1"
        assert ngram_entropy("") == ngram_entropy("one two") == 0, "one bigram, and no trigram"


class TestPortability:
    def test_capitals_are_asked_the_other_way_round(self, world):
        facts = load_facts("countries/capital")
        assert facts.reverse["Norway"] == Query(
            "The city of Oslo is the capital of the country of", "Norway", subject="Oslo"
        )
        found, about = portability(world, facts.prompts(world).select([3, 5]))
        ((split, prompts),) = found
        assert (split, prompts.format, len(prompts)) == ("portability", "reverse", 2)
        assert [query.answer for query in prompts.queries] == [facts[3].subject, facts[5].subject]
        assert "chance 0.01" in about["reverse"] and "no question that needs a second fact" in about["one hop"]

    def test_a_relation_that_is_not_one_to_one_is_not_turned_round(self, world):
        facts = load_facts("countries/currency")
        turned = {fact.subject: Query(f"The {fact.answer} is used in", fact.subject) for fact in facts}
        asked = replace(facts, reverse=turned).prompts(world).select([0, 1])
        found, about = portability(world, asked)
        assert not found and about["reverse"].startswith("several subjects have the answer 'dollar'")
        assert shared_answer(asked.facts) == "dollar", "two facts that share none come from many that do"

    def test_a_second_hop_is_asked_where_the_data_have_one(self, world):
        facts = load_facts("factworld/city")
        (only,) = portability(world, facts.prompts(world).select([0, 1, 2]))[0]
        assert [query.answer for query in only[1].queries] == [facts.two_hop[facts[i].subject].answer for i in range(3)]

    def test_another_name_is_of_the_answer_or_the_subject_in_every_fact(self):
        facts = load_facts("factworld/sport")[:3]
        assert aliases(facts) == ["league"], "and not yes or no"
        asked = [dict(fact.queries) for fact in facts]
        for queries, fact in zip(asked, facts):
            queries["question"] = replace(queries["question"], subject=f"Mr {fact.subject}")
            queries["held_out"] = replace(queries["held_out"], subject=fact.subject.upper())
        renamed = [replace(fact, queries=queries) for fact, queries in zip(facts, asked)]
        assert aliases(replace(facts, facts=tuple(renamed))) == ["question", "league"]
        assert aliases(replace(facts, facts=(*renamed[:2], facts[2]))) == ["league"]


def test_facts_that_were_wrong_before_count_for_nothing():
    def known(*before: float, after: tuple) -> dict:
        return {"before": torch.tensor(before).float(), "after": torch.tensor(after)}

    values = {
        ("forget", "statement", "accuracy"): known(1, 1, 1, after=(0.0, 0, 0)),
        ("forget", "statement", "target_accuracy"): known(0, 0, 0, after=(1.0, 1, 1)),
        ("forget", "question", "accuracy"): known(1, 1, 0, after=(1.0, 0, 1)),
        ("forget", "question", "target_accuracy"): known(0, 0, 1, after=(0.0, 1, 1)),
        ("forget", "held_out", "accuracy"): known(1, 0, 0, after=(0.0, 1, 0)),
        ("forget", "held_out", "target_accuracy"): known(0, 0, 0, after=(0.0, 0, 1)),
        ("same subject: city", "statement", "accuracy"): known(0, 1, 1, after=(1.0, 0, 1)),
        ("retain", "statement", "accuracy"): known(0, 0, after=(1.0, 1)),
    }
    found = derived(values, None)
    kept = found["same subject: city", "statement", "kept"]
    assert kept["before"].tolist() == [1, 1] and kept["after"].tolist() == [0, 1]
    assert ("retain", "statement", "kept") not in found, "the model knew none"
    general = found["generalization", "other formats", "kept"]
    assert general["before"].tolist() == [1, 1] and general["after"].tolist() == [0.5, 0], "the third knew neither"
    assert found["generalization", "other formats", "target_accuracy"]["after"].tolist() == [0, 0.5, 1]
    frame = pd.DataFrame(
        [{"split": "retain", "format": "statement", "metric": "kept", "n": 20, "before": 1, "after": 0}]
    )
    assert not damage(frame), "a share of facts that an editor was shown is no damage by itself"


class TestTable:
    def test_every_term_has_a_row_with_its_reason_where_nothing_was_measured(self):
        found = side_effects(pd.DataFrame(columns=["split", "format", "metric", "n", "before", "after"]), {})
        assert list(dict.fromkeys(found["term"])) == TERMS
        assert (found["n"] == 0).all() and found["measured"].str.contains(": not measured, .{20}").all()
        assert found[["before", "after", "low", "high"]].isna().all(axis=None)

    def test_a_toy_of_tokens_says_what_it_lacks(self):
        toy = planted_facts()
        edit, other = (noisy(toy.model, "L0.mlp.out", scale) for scale in (0.1, 0.0))
        sets = {"forget": toy.prompts([*range(4)]), "retain": toy.prompts([*range(4, 8)])}
        found = evaluate(toy.model, edit, **sets, unseen=toy.prompts([*range(8, 16)]), control=other).side_effects()
        assert list(dict.fromkeys(found["term"])) == TERMS
        assert set(found["term"][found["n"] > 0]) == {"efficacy", "specificity"}
        assert found["measured"].str.contains("the facts are tokens").sum() == 2

    def test_power_is_what_so_few_could_have_missed(self):
        for n in (1, 8, 29):
            assert (1 - least_seen(n)) ** n == pytest.approx(0.2)
        row = {"split": "unseen", "format": "statement", "metric": "kept", "before": 1.0, "after": 0.5}
        rows = pd.DataFrame([row | {"n": n, "after_low": 0.2, "after_high": 0.8} for n in (29, 30)])
        few, many = (side_effects(rows[rows.n == n], {}).set_index("term").loc["specificity"] for n in (29, 30))
        assert few.power == "a share of .05 or more that differs shows in at least one of 29, with probability .8"
        assert many.power == ""


@pytest.fixture(scope="module")
def cities(world):
    """A report on people's cities, which have a second hop; the edit is noise, the control a little of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechunlearn.evaluation.cells.LIMIT", 32)
        patch.setattr("mechunlearn.evaluation.cells.OWN_COUNT", 6)
        forget, retain = load_facts("factworld/city").prompts(world).split(forget=8, retain=8, seed=0)
        edit, other = noisy(world, "L2.mlp.out", 4), noisy(world, "L2.mlp.out", 0.01)
        report = evaluate(world, edit, forget=forget, retain=retain, control=other, progress=False)
        yield report, edit, forget


class TestShippedWorld:
    def test_shares_are_those_of_a_plain_loop(self, world, cities):
        report, edit, forget = cities
        found = report.side_effects().set_index("measured")
        facts = forget.facts
        formats = [f for f in facts.formats if f != "statement"]
        asked = {
            "same subject": [fact.queries["statement"] for fact in facts.related["sport"].about(facts.subjects)],
            "one hop": [facts.two_hop[fact.subject] for fact in facts if fact.subject in facts.two_hop],
            **{format: [fact.queries[format] for fact in facts] for format in formats},
        }
        before = {k: np.array([says(world, q.prompt, q.answer) for q in some]) for k, some in asked.items()}
        with edit.applied(world):
            after = {k: np.array([says(world, q.prompt, q.answer) for q in some]) for k, some in asked.items()}
        for kind, name in (("same subject", "sport, known before"), ("one hop", "one hop, known before")):
            row = found.loc[[measured.startswith(name) for measured in found.index]].iloc[0]
            kept = after[kind][before[kind]]
            exact = binomtest(int(kept.sum()), len(kept)).proportion_ci(method="exact")
            assert (row.n, row.before) == (len(kept), 1) and len(kept) > 0
            assert [row.after, row.low, row.high] == pytest.approx([kept.mean(), exact.low, exact.high])
        knew, said = (np.stack([table[format] for format in formats]) for table in (before, after))
        each = (said & knew).sum(0)[knew.any(0)] / knew.sum(0)[knew.any(0)]
        row = found.loc["truth, other formats, where known before"]
        assert row.n == len(each) and row.after == pytest.approx(each.mean()) and 0 < row.after < 1

    def test_entropy_is_that_of_each_continuation_alone_and_its_change_is_paired(self, world, cities):
        report, edit, forget = cities
        row = report.side_effects().set_index("measured").loc["n-gram entropy, forget prompts, bits"]
        prompts = [query.prompt for query in forget.queries]
        before = np.array([rome(goes_on(world, prompt)) for prompt in prompts])
        with edit.applied(world):
            after = np.array([rome(goes_on(world, prompt)) for prompt in prompts])
        change = after - before
        half = t.ppf(0.975, 7) * change.std(ddof=1) / math.sqrt(8)
        assert row.n == 8 and row.interval_of == "change" and np.abs(change).max() > 0.01
        assert [row.before, row.after] == pytest.approx([before.mean(), after.mean()], abs=1e-5)
        assert [row.low, row.high] == pytest.approx([change.mean() - half, change.mean() + half], abs=1e-5)
        least = half / t.ppf(0.975, 7) * (t.ppf(0.975, 7) + t.ppf(0.8, 7))
        assert row.power == f"a mean of {least:.3f} or more shows as different from 0 with 8 texts, with probability .8"

    def test_text_is_the_drift_of_the_report_and_the_control_has_its_own_column(self, cities):
        report = cities[0]
        found, control = (report.side_effects(column).set_index("measured") for column in ("after", "control"))
        row = found.loc["KL to before, passages, nats a token"]
        assert row.after == report.value("text", "passages", "kl_to_before") > 0
        assert control.loc["KL to before, passages, nats a token"].after < row.after
        shown = as_text(report.side_effects())
        assert len(shown) == len(found) and not shown.isna().any(axis=None)

    def test_the_page_has_the_table_and_the_summary_is_as_long_as_before(self, cities, tmp_path):
        report = cities[0]
        report.to_html(tmp_path / "report.html")
        part = (tmp_path / "report.html").read_text().split("In the terms of model editing")[1].split("</table>")[0]
        assert all(f"<td>{term}</td>" in part for term in TERMS) and "one hop, known before" in part
        assert not report.summary()["what"].str.contains("portability|generalization|entropy").any()


@pytest.mark.real
class TestRealModel:
    COUNTRIES = ("Norway", "France", "Italy")

    def test_the_other_way_round_and_entropy_are_those_of_plain_transformers(self, smollm2, monkeypatch):
        monkeypatch.setattr(written, "TOKENS", 16)
        facts = load_facts("countries/capital").about(set(self.COUNTRIES))
        forget = facts.prompts(smollm2)
        edit = noisy(smollm2, "L6.mlp.out", 2)
        ((_, prompts),) = portability(smollm2, forget)[0]
        asked = [facts.reverse[fact.subject] for fact in facts]
        plain = [says(smollm2, query.prompt, query.answer) for query in asked]
        assert answered(smollm2, prompts).tolist() == plain and any(plain)
        found = written.fluency(
            smollm2, {"before": None, "after": edit}, forget, {"neutral": ("The bus was late again, so we",)}
        )
        assert list(found) == ["forget prompts", "openings of neutral"]
        opening = "The bus was late again, so"
        with edit.applied(smollm2):
            assert answered(smollm2, prompts).tolist() == [says(smollm2, q.prompt, q.answer) for q in asked]
            value = rome(goes_on(smollm2, opening))
        assert float(found["openings of neutral"]["after"]) == pytest.approx(value, abs=1e-5)
        first = rome(goes_on(smollm2, forget.queries[0].prompt))
        assert float(found["forget prompts"]["before"][0]) == pytest.approx(first, abs=1e-5)
        assert not torch.equal(found["forget prompts"]["before"], found["forget prompts"]["after"])
