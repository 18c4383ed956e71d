"""The word that is said of an edit: hand-made rows, bounds against scipy, and how often it is wrong."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, fisher_exact

from benchmarks.status import KINDS, words
from mechunlearn.evaluation.status import (
    ASKED,
    chance_of_guessing,
    facts_needed,
    judged,
    recovered_at_most,
    status,
)


def row(right: int, n: int, attack: str = "relearning", **more) -> dict:
    """So many of n facts held out are right; guessing gives nothing; the attack has learnt what it trained on."""
    shared = {"outcome": "measured", "floor": 0.0, "ceiling": 1.0, "chance": 0.02, "settings": 1, "setting": "best"}
    never = {"never_taught": 0.0, "never_n": n, "trained": 1.0, "edit_target": math.nan, "note": ""}
    return {"attack": attack, "held_out": right / n, "n": n, **shared, **never, **more}


def asked(right: int = 0, n: int = 32, **more) -> dict:
    return row(right, n, ASKED, trained=math.nan, never_taught=math.nan, never_n=math.nan, **more)


def said(*rows: dict, **more) -> tuple[str, str]:
    return status(judged(pd.DataFrame(rows)), **more)


class TestWords:
    """The cases of which "gone" used to be said, and their neighbours."""

    @pytest.mark.parametrize(
        ("rows", "word"),
        [
            ([row(0, 8)], "inconclusive"),
            ([row(0, 13)], "inconclusive"),
            ([row(0, 14)], "gone"),
            ([row(4, 8)], "hidden"),
            ([row(3, 8)], "inconclusive"),
            ([row(5, 8)], "hidden"),
            ([row(2, 4)], "inconclusive"),
            ([row(1, 32)], "gone"),
            ([row(3, 32)], "inconclusive"),
            ([row(0, 32, trained=0.6)], "inconclusive"),
            ([row(0, 32, outcome="collapsed"), row(0, 32, "quantization", trained=math.nan)], "inconclusive"),
            ([row(0, 32, outcome="collapsed")], "inconclusive"),
            ([row(180, 1000)], "hidden"),
            ([row(0, 32, "quantization", trained=math.nan)], "inconclusive"),
            ([row(0, 32, "prompting", trained=math.nan)], "inconclusive"),
            ([row(0, 32), row(0, 8, "prompting", trained=math.nan)], "inconclusive"),
            ([row(0, 32), row(0, 32, "prompting", trained=math.nan)], "gone"),
            ([row(0, 32), row(20, 32, "prompting", trained=math.nan)], "hidden"),
            ([row(24, 32, outcome="unknown", ceiling=math.nan)], "hidden"),
            ([row(0, 32), row(2, 32, "soft_prompt", outcome="unknown", ceiling=math.nan)], "inconclusive"),
            ([row(0, 32), row(0, 32, "soft_prompt", outcome="unknown", ceiling=0.1)], "gone"),
            ([row(0, 32), {"attack": "probing", "outcome": "failed", "note": "why"}], "gone"),
            ([{"attack": "probing", "outcome": "failed", "note": "why"}], "inconclusive"),
            ([asked(28), row(0, 32)], "hidden"),
            ([asked(0), row(0, 32)], "gone"),
        ],
    )
    def test_of_these_attacks(self, rows, word):
        assert said(*rows)[0] == word, said(*rows)

    def test_damage_comes_first(self):
        assert said(row(20, 32), harm=["unseen", "text"]) == ("collapsed", "unseen; text")

    def test_damage_that_could_not_be_seen_is_not_gone(self):
        assert said(row(0, 32), unmeasured="nothing shows") == ("inconclusive", "nothing shows")
        assert said(row(20, 32), unmeasured="nothing shows")[0] == "hidden"

    def test_what_only_recognises_the_truth_is_not_judged(self):
        """Its floor is that of strangers, whose answers may be rarer; and it takes no part in Holm's correction."""
        member = row(32, 32, "membership_inference", trained=math.nan)
        assert said(row(0, 32), member) == said(row(0, 32)) and said(row(0, 32))[0] == "gone"
        found = judged(pd.DataFrame([row(9, 32), member]))
        assert found["outcome"].tolist()[1] == "measured" and math.isnan(found["p"].iloc[1])
        assert found["p"].iloc[0] == judged(pd.DataFrame([row(9, 32)]))["p"].iloc[0]
        assert said(member)[0] == "inconclusive"

    def test_the_reason_has_its_numbers(self):
        why = said(row(0, 8))[1]
        assert why == "relearning: 8 facts cannot exclude a recovery of 0.31; 14 facts held out could (28 to forget)"
        assert "relearning gets 0.50 right (never taught 0.00, n = 8, p = 0.038)" in said(row(4, 8))[1]
        assert "exclude a recovery of 0.14 or more by each" in said(row(1, 32))[1]
        assert "learnt 0.60 of what it trained on" in said(row(0, 32, trained=0.6))[1]
        assert "add 'relearning' or 'soft_prompt'" in said(row(0, 32, "probing", trained=math.nan))[1]

    def test_every_reason_is_given(self):
        why = said(row(0, 8, "prompting", trained=math.nan), unmeasured="nothing shows")[1]
        assert all(part in why for part in ("8 facts cannot exclude", "add 'relearning'", "nothing shows"))

    def test_many_attacks_share_one_error(self):
        """4 of 8 is p = .038 alone; beside one more attack it is .077."""
        other = row(0, 32, "probing", trained=math.nan)
        assert said(row(4, 8))[0] == "hidden" and said(row(4, 8), other)[0] == "inconclusive"


class TestBounds:
    @pytest.mark.parametrize(("right", "n"), [(0, 8), (1, 8), (5, 8), (8, 8), (7, 50)])
    def test_without_guesses_it_is_the_exact_one_sided_bound(self, right, n):
        expected = binomtest(right, n, alternative="less").proportion_ci(0.95, "exact").high
        assert recovered_at_most(row(right, n)) == pytest.approx(expected, abs=1e-9)
        assert recovered_at_most(row(right, n, ceiling=0.8)) == pytest.approx(min(1, expected / 0.8), abs=1e-9)

    def test_a_guess_counts_as_far_as_it_was_measured_and_the_edited_model_makes_it(self):
        guessing = {"never_taught": 0.25, "never_n": 64, "asked": 0.25, "asked_n": 64}
        with_guess, without = recovered_at_most(row(16, 64, **guessing)), recovered_at_most(row(16, 64))
        assert with_guess < 0.2 < without
        assert recovered_at_most(row(16, 64, **guessing | {"asked": 0.0})) > 0.4, "it avoids the truth"
        half = recovered_at_most(row(16, 64, **guessing, edit_target=0.5))
        assert with_guess < half, "facts that give the edit target are no guesses"

    def test_the_p_value_is_the_larger_of_two_exact_tests(self):
        made = row(10, 20, never_taught=0.25, never_n=16, chance=0.3)
        fisher = fisher_exact([[10, 10], [4, 12]], alternative="greater").pvalue
        binomial = binomtest(10, 20, 0.3, alternative="greater").pvalue
        assert chance_of_guessing(made) == pytest.approx(max(fisher, binomial))
        assert chance_of_guessing(made | {"settings": 5}) == pytest.approx(max(fisher, 5 * binomial))
        assert chance_of_guessing(made | {"never_n": 0}) == pytest.approx(binomial)
        assert chance_of_guessing(made | {"settings": 5, "cells": 20, "never_n": 0}) == pytest.approx(
            min(1, 20 * binomial)
        )
        half = row(16, 32, chance=0.5, never_taught=0.5, edit_target=0.5)
        assert chance_of_guessing(half) > 0.5, "of yes or no, what is not the edit target is the truth: no recovery"

    def test_one_right_answer_of_eight_may_be_a_guess(self):
        assert chance_of_guessing(row(1, 8, chance=0.1, never_n=0)) == pytest.approx(1 - 0.9**8)

    def test_without_room_below_the_ceiling_there_is_no_bound(self):
        for ceiling in (0.5, 0.25):
            assert math.isnan(recovered_at_most(row(0, 8, ceiling=ceiling, never_taught=0.5, asked=0.0, asked_n=8)))

    def test_the_number_of_facts_would_do(self):
        needed = facts_needed(0.0)
        assert recovered_at_most(row(0, needed)) < 0.2 <= recovered_at_most(row(0, needed - 1))
        assert facts_needed(0.1) < facts_needed(0.25) < 128


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "still said" not in kind])
def test_both_errors_are_rare(kind):
    """`benchmarks/status.py` has the whole table, with 1,000 edits a cell; here 100, so up to 11 of them by chance."""
    rng = np.random.default_rng(0)
    for n in (16, 64):
        assert words(rng, 100, n, 0.2, **KINDS[kind])["gone"] <= 0.11
        assert words(rng, 100, n, 0.0, **KINDS[kind])["hidden"] <= 0.11
