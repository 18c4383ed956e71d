"""The CodeUnlearn reproduction: what is measured, one rule for settings, a page that follows from its numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.core.grid import Grid
from mechunlearn.edit import codebook_delete
from mechunlearn.features.dictionaries import load_dictionary, spliced
from mechunlearn.features.firing import swapped
from mechunlearn.localize import feature_discovery
from mechunlearn.reproduce import codeunlearn, codeunlearn_bench
from mechunlearn.reproduce.codeunlearn import EIGHT, GRADIENT_TOPICS, METHODS, PAPER
from mechunlearn.reproduce.codeunlearn_bench import SHIPPED, VALIDATION, Bench, Book, Cell, Setting
from mechunlearn.reproduce.engine import Plan, stored
from mechunlearn.reproduce.topics import PARAPHRASED, TOLD, TOPICS, Shown, Topics, by_topic, kept, others
from mechunlearn.world import lexicon as lex
from mechunlearn.world.dictionaries import dictionary_texts, topic_stories, topic_words, unrelated_words
from mechunlearn.world.small import SmallCorpus, small_world

DOCS = Path(__file__).parent.parent / "docs" / "reproductions"


@pytest.fixture(scope="module")
def topics(world) -> Topics:
    return Topics(world, ("The river was near the old bridge.",), seed=7)


def test_a_word_counts_with_all_its_tokens_once_one_of_its_topic_has_been_said(world):
    shown = Shown.of(world, {"war": ["The knight fought the army.", "A sword and a shield were near the general."]})
    told = [world.tokenizer.decode(shown.tokens[row, 1:][shown.counted[row]]).replace(" ", "") for row in range(2)]
    assert told == ["foughtarmy", "shieldgeneral"] and shown.owner.tolist() == [0, 0, 1, 1]
    assert shown.word[0][shown.counted[0]].tolist() == [0] * 3 + [1] * 3  # f|ou|ght and |arm|y


def says(world, token):
    """A forward pass that gives a token to each place: `token(story, place)`."""

    def forward(tokens):
        logits = torch.zeros(*tokens.shape, world.hf.config.vocab_size)
        for story in range(len(tokens)):
            for place in range(tokens.shape[1]):
                logits[story, place, token(story, place)] = 5.0
        return logits

    return forward


def test_a_word_is_right_if_every_token_leads_to_some_word_of_the_topic(world, monkeypatch):
    """By hand: another word of the topic is right as far as its tokens go, another topic's is wrong, half a word is wrong."""
    shown = Shown.of(world, {"war": ["The knight fought the army."], "kitchen": ["The cook baked the soup."]})
    pieces = world.tokenizer(" army", add_special_tokens=False)["input_ids"]
    onion, river = (world.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" onion", " river"))
    true = {(i, at): int(shown.tokens[i, at + 1]) for i, at in shown.counted.nonzero().tolist()}

    def told(answers: dict) -> tuple:
        monkeypatch.setattr(world, "forward", says(world, lambda i, at: answers.get((i, at), river)))
        return shown.said(world)

    def accuracy(answers: dict) -> dict[str, float]:
        return by_topic(shown, told(answers)[0])

    assert accuracy(true) == {"war": 1.0, "kitchen": 1.0}
    assert accuracy({}) == {"war": 0.0, "kitchen": 0.0}
    places = shown.counted[0].nonzero().flatten().tolist()
    half = true | {(0, places[-1]): river}
    assert accuracy(half) == {"war": 0.5, "kitchen": 1.0}
    soup = int(shown.counted[1].nonzero().max())
    assert accuracy(true | {(1, soup): onion})["kitchen"] == 1.0
    assert accuracy(true | {(1, soup): pieces[-1]})["kitchen"] == 0.5
    _, loss, logits = told(true)
    assert len(logits) == int(shown.counted.sum())
    each = -torch.log_softmax(torch.tensor([5.0] + [0.0] * (world.hf.config.vocab_size - 1)), 0)[0]
    tokens_a_word = shown.counted.sum(1) / 2
    assert loss.tolist() == pytest.approx((each * tokens_a_word).tolist(), rel=1e-4)


def test_the_unedited_world_tells_its_topics_and_sea_shares_words_with_ocean_alone(topics):
    assert min(topics.brief()["accuracy"].values()) > 0.65
    words = {topic: set(topic_words(topic)) for topic in TOPICS}
    shared = {(a, b) for a in TOPICS for b in TOPICS if a < b and words[a] & words[b]}
    assert shared == {("ocean", "sea")} and "ocean" not in others("sea") and len(others("war")) == 8


def test_counterfactual_sentences_hold_no_word_of_the_topic_and_keep_their_frames(topics):
    for topic in ("sea", "war"):
        mine, words = set(topic_words(topic)), {w for t in TOPICS for w in topic_words(t)}
        for told, other in zip(topics.stories[topic], topics.counterfactual[topic], strict=True):
            assert len(told.split()) == len(other.split())
            assert not mine & set(other.replace(".", "").lower().split())
            frames = [[w for w in text.replace(".", "").lower().split() if w not in words] for text in (told, other)]
            assert frames[0] == frames[1]


def test_paraphrases_are_in_frames_that_discovery_never_sees(topics):
    assert not set(TOLD) & set(PARAPHRASED) and set(TOLD) | set(PARAPHRASED) == set(lex.STORY_FRAMES)
    seen = " ".join(text for texts in topics.stories.values() for text in texts)
    assert "dreamed" not in seen and "asked the other" not in seen and "One day" in seen
    assert not torch.equal(topics.shown.tokens[:5, :8], topics.paraphrased["kitchen"].tokens[:5, :8])


def test_held_out_stories_are_not_those_of_discovery(topics):
    shown = {text for t in TOPICS for text in topic_stories(t, 24, codeunlearn_bench.HELD_OUT * 3 + 7, TOLD)}
    assert len(shown & {text for texts in topics.stories.values() for text in texts}) < 0.05 * len(shown)


def test_kept_is_the_mean_share_that_is_left():
    assert kept({"a": 0.5, "b": 0.9}, {"a": 1.0, "b": 0.9}, ["a", "b"]) == pytest.approx(0.75)


def test_deleting_a_topics_codes_of_the_shipped_codebook_forgets_it_and_little_else(world):
    """Must show 3 in small, with the setting that ships in the documentation: no seed, no choice."""
    codebook, bench = load_dictionary("factworld-codebook"), Topics(world, ("A river.",), seed=1)
    with spliced(world, codebook):
        before = bench.brief()["accuracy"]
    left, stays, random_left = {}, {}, {}
    for topic in ("kitchen", "school", "war"):
        counterfactual = swapped(bench.stories[topic], topic_words(topic), unrelated_words(topic))
        found = feature_discovery(world, bench.stories[topic], dictionary=codebook, against=counterfactual)
        mask = found.above(1)
        with codebook_delete(world, mask, dictionary=codebook).applied(world):
            now = bench.brief()["accuracy"]
        left[topic], stays[topic] = now[topic], kept(now, before, others(topic))
        assert 10 < len(mask) < 150
        order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
        chosen = [int(i) for i in order if not mask.sites[codebook.site][i]][: len(mask)]
        other = replace(
            mask, sites={codebook.site: torch.zeros(512, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)}
        )
        with codebook_delete(world, other, dictionary=codebook).applied(world):
            random_left[topic] = bench.brief()["accuracy"][topic] / before[topic]
    assert max(left.values()) < 0.5 and min(stays.values()) > 0.7, (left, stays)
    assert min(random_left.values()) > 0.75, random_left


def tried(left: float, stays: float, topics=TOPICS) -> dict:
    return {"topics": {t: {"brief": {"accuracy": dict.fromkeys(TOPICS, left)}, "kept": stays} for t in topics}}


def store(grid: Grid, method: str, book: Book, values: dict[Setting, dict]) -> None:
    names = GRADIENT_TOPICS if method == "gradient difference" else TOPICS
    for setting, result in values.items():
        grid.cell(Cell(method, book, dict.fromkeys(names, setting)).description(), lambda result=result: result)


def test_the_rule_takes_the_least_left_among_settings_that_keep_the_others(tmp_path):
    grid, book = Grid.open(tmp_path, {"test": 1}), Book(seed=VALIDATION)
    a, b, c, *more = METHODS["gradient difference"]
    worse = dict.fromkeys(more, tried(0.0, 0.3))
    store(grid, "gradient difference", book, {a: tried(0.5, 0.95), b: tried(0.2, 0.91), c: tried(0.0, 0.4), **worse})
    assert codeunlearn._choose(grid, "gradient difference", book, "farm") == b


def test_the_rule_takes_what_keeps_most_if_nothing_keeps_enough(tmp_path):
    grid, book = Grid.open(tmp_path, {"test": 1}), Book(seed=VALIDATION)
    a, b, c, *more = METHODS["gradient difference"]
    worse = dict.fromkeys(more, tried(0.0, 0.3))
    store(grid, "gradient difference", book, {a: tried(0.5, 0.7), b: tried(0.2, 0.8), c: tried(0.0, 0.4), **worse})
    assert codeunlearn._choose(grid, "gradient difference", book, "farm") == b


def test_the_rule_does_not_look_at_the_topic_itself_nor_its_near_synonym(tmp_path):
    """A setting that is best by far on sea and ocean only is not chosen for sea, but for war."""
    grid, book = Grid.open(tmp_path, {"test": 1}), Book(seed=VALIDATION)
    values = {setting: tried(0.4, 0.95) for setting in METHODS["SAE zero-ablation"]}
    first, second, _ = METHODS["SAE zero-ablation"]
    values[first] = tried(0.3, 0.95)
    values[second] = tried(0.35, 0.95)
    for topic in ("sea", "ocean"):
        values[second]["topics"][topic]["brief"]["accuracy"][topic] = 0.0
    store(grid, "SAE zero-ablation", book, values)
    assert codeunlearn._choose(grid, "SAE zero-ablation", book, "sea") == first
    assert codeunlearn._choose(grid, "SAE zero-ablation", book, "war") == second


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(MechunlearnError, match=r"method='zero'.*world='factworld', arm='frozen'.* is not finished"):
        stored(Grid.open(tmp_path, {"test": 1}), Cell("zero", Book()))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A folder in which trainings are tiny and texts few."""
    monkeypatch.setitem(codeunlearn_bench.CODEBOOK, "steps", 60)
    monkeypatch.setitem(codeunlearn_bench.CODEBOOK, "spliced_steps", 2)
    for name, value in (("SAE_STEPS", 60), ("TEXTS", 240)):
        monkeypatch.setattr(codeunlearn_bench, name, value)
    monkeypatch.setattr("mechunlearn.reproduce.topics.DISCOVERED", 24)
    monkeypatch.setattr("mechunlearn.reproduce.topics.SHOWN", 4)
    return tmp_path


@pytest.mark.slow
def test_a_bench_measures_every_method_and_its_controls(tiny):
    bench = Bench(tiny, Book(seed=VALIDATION + 1))
    before = bench.before["inserted"]["accuracy"]
    for method in ("reselect", "random codes", "SAE clamp", "random features", "SAE rows"):
        settings = {"war": Setting(0.25, 8, 2.0)}
        found = bench.measured(Cell(method, bench.book, settings))["topics"]["war"]
        assert found["units"] > 0 and 0 <= found["kept"] <= 1.5, (method, found)
        assert len(found.get("draws", [0])) == (codeunlearn_bench.DRAWS if method.startswith("random") else 1)
        assert set(found["brief"]["paraphrases"]) == {"war"} and found["brief"]["text loss"] > 0
        if method == "random codes":
            control = found["brief"]["accuracy"]["war"]
        if method == "reselect":
            assert found["brief"]["accuracy"]["war"] < before["war"]
            edited = found["brief"]["accuracy"]["war"]
    assert edited < control
    steps = bench.measured(Cell("cumulative", bench.book, dict.fromkeys(("war", "farm"), Setting(0.25, 8))))["steps"]
    assert steps[0]["units"] < steps[1]["units"] and steps[1]["accuracy"]["farm"] < steps[0]["accuracy"]["farm"]


def test_a_small_world_leaves_topics_out(tmp_path):
    made = SmallCorpus(small_world(0, people=20, passages=4), ["war"], stories=100)
    told = " ".join(document.text for document in made.documents(0, 400))
    assert "knight" not in told and "rocket" in told
    with pytest.raises(MechunlearnError, match="neither a passage nor a person nor a topic"):
        SmallCorpus(small_world(0, people=20, passages=4), ["warfare"])
    with pytest.raises(MechunlearnError, match="topic is left out"):
        SmallCorpus(small_world(0, people=20, passages=4), list(TOPICS))


def test_texts_of_dictionaries_tell_every_topic_about_as_often():
    texts = dictionary_texts(360, 5)
    counts = [sum(any(w in text.split() for w in topic_words(t)) for text in texts[180:]) for t in TOPICS]
    assert len(texts) == 360 and min(counts) > 5
    assert not any("knight" in text for text in dictionary_texts(200, 5, without=("war",))[100:])


def test_quick_plans_leave_out_what_is_long(tmp_path):
    quick, full = Plan(tmp_path, *PAPER.short, quick=True), Plan(tmp_path, *PAPER.full)
    assert codeunlearn._swept_books(quick) == () and len(codeunlearn._swept_books(full)) == 4
    assert "gradient difference" not in codeunlearn._methods(quick, SHIPPED, "frozen")
    assert PAPER.about(quick) != PAPER.about(full)


def test_the_committed_numbers_show_what_was_asked():
    """Five of eight topics on the median of five seeds; the page says which, and would print fewer."""
    found = json.loads((DOCS / "codeunlearn.json").read_text(encoding="utf-8"))
    assert len(found["seeds"]) >= 5
    holding = 0
    for topic in EIGHT:
        rows = {
            m: [r for r in found["rows"] if (r["arm"], r["method"], r["topic"]) == ("factworld frozen", m, topic)]
            for m in ("reselect", "random codes")
        }

        def middle(method, key, rows=rows):
            values = sorted(r[key] if key != "share" else r["accuracy"] / r["before"] for r in rows[method])
            return values[len(values) // 2]

        holding += (
            middle("reselect", "accuracy") <= 0.3
            and middle("reselect", "kept") >= 0.85
            and middle("random codes", "share") >= 0.85
        )
    assert holding >= 5
    assert f"**Reselect: {holding} of 8**" in PAPER.page(found)
    for row in found["rows"]:
        if row["method"] == "reselect":
            row["accuracy"] = 0.9
    assert "**Reselect: 0 of 8** (none)" in PAPER.page(found)
