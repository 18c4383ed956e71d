"""The report says what was measured, and its control is a real one."""

import inspect
from dataclasses import replace

import pandas as pd
import pytest
import torch

from mechunlearn import ComponentMask, MechunlearnError, evaluate, load_facts
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import losses, masked_gradient
from mechunlearn.edit.goal import OWN, OWN_TOKENS
from mechunlearn.evaluation import cells, fluency
from mechunlearn.evaluation.controls import random_mask
from mechunlearn.evaluation.damage import DAMAGED_KL, DAMAGED_LOSS, damage, harm_was_measured
from mechunlearn.evaluation.drift import text_drift
from mechunlearn.evaluation.words import against_random, sentences
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Fact, Query
from mechunlearn.localize import attribution_patching, fact_lookup
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.samples import own_texts
from mechunlearn.world.toy import planted_facts


@pytest.fixture(scope="module")
def found(world, sport, seed):
    return fact_lookup(world, sport[0], seed=seed)


@pytest.fixture(scope="module")
def edit(world, sport, found, seed):
    return masked_gradient(world, found.above(0), *sport, steps=30, lr=2e-3, batch_size=16, seed=seed)


@pytest.fixture(scope="module")
def report(world, sport, edit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechunlearn.evaluation.cells.LIMIT", 32)  # the forget set whole, a part of the others
        return evaluate(world, edit, forget=sport[0], retain=sport[1])


@pytest.mark.training
def test_the_window_is_found_on_the_shipped_world(found, world):
    first, last = found.evidence["window"]
    assert 2 <= last - first + 1 <= 4 and last < world.signature.layers // 2 + 1
    assert set(found.above(0)) == set(
        ComponentMask.of([f"L{n}.mlp.out" for n in range(first, last + 1)], world.signature)
    )


@pytest.mark.training
def test_the_report_covers_every_split_and_format(report, sport):
    splits = set(report.frame.split)
    assert {
        "forget",
        "retain",
        "unseen",
        "neighbours",
        "same subject: city",
        "same subject: instrument",
        "skills",
        "text",
        "generalization",
        "portability",
        "fluency",
    } == splits
    assert set(report.frame[report.frame.split == "forget"].format) == set(sport[0].facts.formats)
    for name in ("before", "after", "control"):
        assert (report.frame[f"{name}_low"] <= report.frame[name] + 1e-9).all()
        assert (report.frame[name] <= report.frame[f"{name}_high"] + 1e-9).all()


@pytest.mark.training
def test_before_is_the_unedited_model(report, world, sport):
    expected = measure(world, sport[0])["accuracy"].mean().item()
    assert report.value("forget", "statement", "accuracy", "before") == pytest.approx(expected)
    assert report.value("forget", "statement", "target_accuracy", "before") < 0.1


def test_neighbours_share_a_name_and_were_never_seen(sport):
    from mechunlearn.evaluation.cells import splits

    forget, retain = sport
    near = splits(forget, retain)["neighbours"]
    names = {word for s in forget.facts.subjects for word in s.split()}
    assert not near.subjects & (forget.facts.subjects | retain.facts.subjects)
    assert all(names & set(subject.split()) for subject in near.subjects)


def test_the_control_has_the_weight_and_kinds_of_the_edit(world, edit):
    control = random_mask(world, edit.mask, seed=4)
    assert control.weights(world) == edit.mask.weights(world)
    assert control.jaccard(edit.mask) < 0.6
    tied = edit.mask.tied(world)
    control = random_mask(world, tied, seed=4)
    assert control.weights(world) == tied.weights(world)
    outs = {(c.layer, c.unit) for c in control if c.kind == "mlp.out"}
    assert outs == {(c.layer, c.unit) for c in control if c.kind == "mlp.gate"}


def test_the_page_is_self_contained_and_readable(report, edit, found, tmp_path):
    report.to_html(tmp_path / "report.html", found=found, edit=edit)
    page = (tmp_path / "report.html").read_text()
    for part in ("Is the knowledge gone?", report.verdict()[:60], "look-up window", "Run card", "95 % intervals"):
        assert part in page
    assert '<script src="http' not in page and '<link href="http' not in page


@pytest.mark.training
def test_the_verdict_carries_the_figures(report):
    edited = report.value("forget", "statement", "target_accuracy")
    assert f"{edited:.1%}" in report.verdict() and "same subjects' city" in report.verdict()


@pytest.mark.parametrize(("loss", "steps"), [(losses.log_one_minus_p, 20), (losses.gradient_ascent, 40)])
@pytest.mark.training
def test_unlearning_losses_remove_the_truth_and_the_retain_term_keeps_the_rest(loss, steps, world, sport, found, seed):
    """The probability of forgotten truths over that of retained ones, with the retain term, was .06 to .24 and .27 to .81
    on five seeds; without it both fell below .02.
    """
    forget, retain = sport
    left, kept = [], []
    for weight in (0, 1):
        made = masked_gradient(
            world,
            found.above(0),
            forget,
            retain,
            loss=loss,
            steps=steps,
            lr=2e-3,
            batch_size=16,
            retain_weight=weight,
            seed=seed,
        )
        with made.applied(world):
            left.append(float(measure(world, forget)["probability"].mean()))
            kept.append(float(measure(world, retain)["probability"].mean()))
    assert left[0] < 0.1 and left[1] < 0.9 * kept[1], "the truth is removed"
    assert kept[1] > kept[0] + 0.3, "without the retain term more is lost"


def test_the_summary_prints_its_numbers_in_full(report):
    """Where pandas would leave out columns: more of them than a terminal is wide."""
    shown = str(report.summary())
    assert "..." not in shown and len(shown.splitlines()) == len(report.summary()) + 1
    for name in ("before", "after", "control"):
        assert f"{report.value('forget', 'statement', 'accuracy', name):.2f} [" in shown and name in shown


def test_what_is_no_edit_is_refused(world, sport, found):
    """Past the type checker of the tests, as users call it."""
    measured = inspect.unwrap(evaluate)
    told = r"Expected an edit, got a Localization.*found.above\(0\) or found.top\(weights=0.05\)"
    for given in ({"edit": found}, {"edit": WeightEdit({}, {}, world.signature, RunCard("none")), "control": found}):
        with pytest.raises(MechunlearnError, match=told):
            measured(world, **given, forget=sport[0], retain=sport[1])


def test_reports_show_as_tables(report):
    assert isinstance(report.summary(), pd.DataFrame)
    assert "<table" in report._repr_html_()


def test_bootstrap_intervals_cover_at_about_their_rate():
    import numpy as np

    rng = np.random.default_rng(0)
    covered = [
        low <= 0.3 <= high
        for low, high in (bootstrap_interval(rng.random(200) < 0.3, seed=i, resamples=500) for i in range(200))
    ]
    assert 0.9 <= np.mean(covered) <= 0.99


class TestUnseen:
    def test_it_is_what_is_in_neither_set_from_all_over_the_file(self, sport):
        forget, retain = sport
        unseen = cells.splits(forget, retain)["unseen"]
        everyone = [fact.subject for fact in forget.facts.source]
        assert not unseen.subjects & (forget.facts.subjects | retain.facts.subjects)
        assert len(unseen) == cells.LIMIT and everyone.index(unseen[-1].subject) > len(everyone) - 20

    def test_with_few_facts_it_is_all_the_others(self, world):
        few = load_facts("factworld/sport")[:20]
        few = type(few)(few.name, few.facts)
        forget, retain = few.prompts(world).split(forget=4, retain=6)
        left = set(few.subjects) - forget.facts.subjects - retain.facts.subjects
        assert cells.splits(forget, retain)["unseen"].subjects == left and len(left) == 10

    def test_other_relations_of_the_file_are_a_split_of_their_own(self, world):
        sport, city = load_facts("factworld/sport")[:12], load_facts("factworld/city")[:12]
        both = type(sport)("both", (*sport.facts, *city.facts))
        forget, retain = (both.prompts(world).select(rows) for rows in ([0, 1], [2, 3]))
        found = cells.splits(forget, retain)
        assert {fact.relation for fact in found["unseen"]} == {"sport"} and len(found["unseen"]) == 8
        assert {fact.relation for fact in found["unseen: other relations"]} == {"city"}
        assert sport[0].subject in found["unseen: other relations"].subjects, "another fact of a forgotten subject"

    @pytest.mark.training
    def test_kept_counts_only_what_was_right_before(self, report, world, sport, edit, monkeypatch):
        monkeypatch.setattr("mechunlearn.evaluation.cells.LIMIT", 32)
        prompts = cells.splits(*sport)["unseen"].prompts(world)

        def right():
            return [
                int(world(prompts.tokens[i : i + 1, : prompts.start[i] + 1])[0, -1].argmax())
                == int(prompts.answers[i, 0])
                for i in range(len(prompts))
            ]

        before = right()
        with edit.applied(world):
            after = right()
        kept = [b for a, b in zip(before, after) if a]
        row = report.frame[(report.frame.split == "unseen") & (report.frame.metric == "kept")].iloc[0]
        assert row["n"] == len(kept) and row["after"] == pytest.approx(sum(kept) / len(kept)) and row["before"] == 1


class TestOrdinaryText:
    def test_the_page_is_plain_english_of_forty_passages(self):
        texts = cells.neutral_texts()
        assert 40 <= len(texts) <= 60 and len(set(texts)) == len(texts)
        assert all(40 <= len(text.split()) <= 80 and "\n" not in text for text in texts)

    def test_a_model_that_cannot_read_it_is_not_measured_on_it_and_that_is_said(self, world, sport):
        texts, left_out = cells.ordinary_texts(world, sport[0])
        assert list(texts) == ["own samples", "passages"]
        assert len(left_out) == 1 and "cannot read it" in left_out[0] and "guessing gives 7.0" in left_out[0]
        bare = planted_facts()
        assert cells.ordinary_texts(bare.model, bare.prompts([0]))[0] == {}

    def test_a_tokenizer_that_cannot_write_it_is_named(self, world, sport, monkeypatch):
        unknown = world.tokenizer("The")["input_ids"][-1]
        monkeypatch.setattr(type(world.tokenizer), "unk_token_id", property(lambda self: unknown), raising=False)
        assert "tokenizer cannot write it" in cells.ordinary_texts(world, sport[0])[1][0]

    def test_samples_are_not_those_that_editors_train_on(self, world, sport):
        texts = set(cells.ordinary_texts(world, sport[0])[0]["own samples"])
        held = set(own_texts(world, OWN, OWN_TOKENS))
        assert len(texts & held) < len(texts) / 4, "a model this small says some sentences often"

    @pytest.mark.training
    def test_loss_and_drift_are_those_of_each_text_alone(self, world, edit):
        texts = own_texts(world, count=5, tokens=12, seed=3)
        found = text_drift(world, {"before": None, "after": edit}, texts, batch_size=2)
        for i, text in enumerate(texts):
            tokens = torch.tensor([world.tokenizer(text)["input_ids"]])
            p = world(tokens)[0].log_softmax(-1)
            with edit.applied(world):
                q = world(tokens)[0].log_softmax(-1)
            assert float(found["after"]["kl_to_before"][i]) == pytest.approx(
                float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5
            )
            naive = -q[:-1].gather(1, tokens[0, 1:, None]).mean()
            assert float(found["after"]["loss"][i]) == pytest.approx(float(naive), abs=1e-4)
        assert torch.allclose(found["before"]["loss"], text_loss(world, texts), atol=1e-5)
        assert found["before"]["kl_to_before"].abs().max() == 0 < found["after"]["kl_to_before"].min()

    @pytest.mark.training
    def test_every_text_has_a_row_under_every_model(self, report):
        rows = report.frame[report.frame.split == "text"]
        assert {(f, m) for f, m in zip(rows.format, rows.metric)} == {
            (format, metric) for format in ("own samples", "passages") for metric in ("loss", "kl_to_before")
        }
        assert (rows[rows.metric == "kl_to_before"][["after", "control"]] > 0).all(axis=None)


def rows_of(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["split", "format", "metric", "n", "before", "after", "control"])


class TestDamage:
    def test_unseen_facts_below_nine_tenths_of_eight_or_more(self):
        assert damage(rows_of(("unseen", "statement", "kept", 20, 1.0, 0.89, 1.0)))
        assert not damage(rows_of(("unseen", "statement", "kept", 20, 1.0, 0.91, 1.0)))
        assert not damage(rows_of(("unseen", "statement", "kept", 7, 1.0, 0.1, 1.0))), "seven say nothing"
        assert damage(rows_of(("unseen: other relations", "statement", "kept", 20, 1.0, 0.1, 1.0)))

    def test_ordinary_text(self):
        for after in (DAMAGED_KL + 0.01, float("nan")):
            assert damage(rows_of(("text", "neutral", "kl_to_before", 42, 0.0, after, 0.0)))
        assert not damage(rows_of(("text", "neutral", "kl_to_before", 42, 0.0, DAMAGED_KL - 0.01, 0.0)))
        assert damage(rows_of(("text", "own samples", "loss", 42, 3.0, 3.01 + DAMAGED_LOSS, 3.0)))
        assert not damage(rows_of(("text", "own samples", "loss", 42, 3.0, 2.0 + DAMAGED_LOSS, 3.0)))

    def test_that_trained_facts_stay_proves_nothing(self):
        kept = ("retain", "statement", "accuracy", 64, 1.0, 1.0, 1.0)
        assert not harm_was_measured(rows_of(kept))
        assert damage(rows_of(kept, ("unseen", "statement", "kept", 24, 1.0, 0.3, 1.0)))

    def test_the_control_is_judged_too(self):
        frame = rows_of(("unseen", "statement", "kept", 24, 1.0, 0.95, 0.3))
        assert not damage(frame) and damage(frame, "control") and "damages the model" in against_random(frame)


def test_a_truth_that_other_wordings_still_bring_is_said():
    trained = [
        ("forget", "statement", "target_accuracy", 4, 0.0, 1.0, 1.0),
        ("forget", "statement", "accuracy", 4, 1.0, 0.0, 0.0),
        ("retain", "statement", "accuracy", 8, 1.0, 1.0, 1.0),
    ]
    told = sentences(rows_of(*trained, ("generalization", "other formats", "kept", 4, 1.0, 0.75, 0.5)))
    assert "the model still gives the truth in 75.0% of the cases in which it knew it (random mask: 50.0%)." in told
    assert "other ways" not in sentences(rows_of(*trained)), "of facts without other wordings nothing is said"


class TestAgainstRandom:
    def told(self, efficacy: float, kept: float, chosen: float = 0.98) -> str:
        return against_random(
            rows_of(
                ("forget", "statement", "target_accuracy", 16, 0.0, chosen, efficacy),
                ("unseen", "statement", "kept", 24, 1.0, 0.95, kept),
            )
        )

    def test_a_random_mask_that_does_as_well_is_named(self):
        assert (
            "A random mask of the same kinds and weight does as well: efficacy 0.90, the chosen mask 0.98"
            in self.told(0.9, 0.92)
        )
        assert "does as well" in self.told(1.0, 1.0)

    def test_one_that_edits_less_or_keeps_less_is_not(self):
        assert self.told(0.0, 0.95, chosen=0.0) == "", "neither edits anything"
        assert self.told(0.5, 0.95) == "" and "does as well" not in self.told(0.98, 0.7)


@pytest.fixture(scope="module")
def planted():
    """What the toy forgets, retains and never saw; and edits that silence the neurons of facts."""
    toy = planted_facts()

    def silenced(*facts: int) -> WeightEdit:
        units = torch.tensor(facts)
        rows = torch.zeros(len(units), toy.model.rows("L0.mlp.out").shape[1])
        return WeightEdit({"L0.mlp.out": units}, {"L0.mlp.out": rows}, toy.model.signature, RunCard("by hand"))

    return toy, silenced


class TestPlantedDamage:
    """Facts 0 to 7 are forgotten, 8 to 15 retained, 16 to 23 in neither set."""

    def judged(self, planted, edit, unseen: bool = True):
        toy, silenced = planted
        sets = {"forget": toy.prompts([*range(8)]), "retain": toy.prompts([*range(8, 16)])}
        more = {"unseen": toy.prompts([*range(16, 24)])} if unseen else {}
        return evaluate(toy.model, edit, **sets, **more, control=silenced(0), attacks=["quantization"])

    def test_an_edit_that_takes_the_unseen_facts_along_is_never_gone(self, planted):
        report = self.judged(planted, planted[1](*range(8), *range(16, 24)))
        assert report.value("retain", "statement", "accuracy") == 1
        assert report.status() == ("collapsed", "0% of 8 unseen facts that were right are still right")
        for shown in (str(report), repr(report), report._repr_html_(), report.verdict()):
            assert "damaged the model" in shown and "gone" not in shown.lower()

    def test_the_same_without_them_is_not_damaged_but_eight_facts_do_not_tell(self, planted):
        said, why = self.judged(planted, planted[1](*range(8))).status()
        assert said == "inconclusive" and "8 facts cannot exclude" in why and "collapsed" not in why

    def test_where_nothing_unseen_can_be_measured_it_is_not_gone(self, planted):
        report = self.judged(planted, planted[1](*range(8)), unseen=False)
        assert report.status()[0] == "inconclusive" and "no unseen fact" in report.status()[1]
        assert any("no edit saw" in line for line in report.about["left out"])


class TestSamples:
    @pytest.mark.training
    def test_they_are_what_the_model_writes_before_and_after(self, report, world, sport, edit):
        assert report.samples.index.tolist() == ["forget", "forget", "retain", "unseen", "text, own samples"]
        assert list(report.samples) == ["prompt", "before", "after"]
        first = report.samples.iloc[0]
        assert first["prompt"] == sport[0].queries[0].prompt
        told = world.generate(first["prompt"], max_new_tokens=20)
        with edit.applied(world):
            now = world.generate(first["prompt"], max_new_tokens=20)
        assert first["prompt"] + first["before"] == told and first["prompt"] + first["after"] == now
        assert told != now

    def test_a_model_without_a_tokenizer_writes_nothing(self, planted):
        toy, silenced = planted
        report = evaluate(toy.model, silenced(0), forget=toy.prompts([0]), retain=toy.prompts([1]), control=silenced(2))
        assert len(report.samples) == 0 and "What the model writes" not in report._repr_html_()
        assert str(report).strip() and "0 rows" not in repr(report)


KNOWN = (
    *(("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("Japan", "Tokyo")),
    *(("Russia", "Moscow"), ("Egypt", "Cairo"), ("Greece", "Athens"), ("Austria", "Vienna"), ("Poland", "Warsaw")),
    *(("Hungary", "Budapest"), ("Portugal", "Lisbon"), ("Ireland", "Dublin"), ("Sweden", "Stockholm")),
    *(("Norway", "Oslo"), ("Denmark", "Copenhagen"), ("Cuba", "Havana"), ("Peru", "Lima"), ("Iran", "Tehran")),
    *(("Iraq", "Baghdad"), ("Kenya", "Nairobi"), ("Thailand", "Bangkok"), ("Chile", "Santiago"), ("China", "Beijing")),
)


@pytest.fixture(scope="module")
def capitals(smollm2):
    """Capitals that the model knows: four to forget, four to retain, the rest unseen."""
    facts = tuple(
        Fact(name, "capital", {"statement": Query(f"The capital of {name} is", city, "", "", name)})
        for name, city in KNOWN
    )
    known = FactDataset("capitals", facts).known(smollm2)
    prompts = FactDataset(known.name, known.facts).prompts(smollm2)
    return prompts.select([*range(4)]), prompts.select([*range(4, 8)])


@pytest.mark.real
class TestRealModel:
    def noisy(self, model, scale: float) -> WeightEdit:
        """Noise on all neurons of an MLP, in units of its rows' own spread."""
        rows = model.rows("L12.mlp.out")
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        units = {"L12.mlp.out": torch.arange(len(rows))}
        return WeightEdit(units, {"L12.mlp.out": rows + scale * rows.std() * noise}, model.signature, RunCard("noise"))

    def test_a_wrecked_model_is_damaged_and_a_hardly_touched_one_is_not(self, smollm2, capitals, monkeypatch):
        """The noise is the edit; beside it, a thousandth of it."""
        texts = cells.neutral_texts()[:6]
        monkeypatch.setattr(cells, "neutral_texts", lambda: texts)
        monkeypatch.setattr(cells, "OWN_COUNT", 6)
        monkeypatch.setattr(fluency, "TOKENS", 10)
        forget, retain = capitals
        wrecked, touched = self.noisy(smollm2, 10), self.noisy(smollm2, 0.01)
        report = evaluate(smollm2, wrecked, forget=forget, retain=retain, control=touched, progress=False)
        assert {"neutral", "own samples"} == set(report.frame.format[report.frame.split == "text"])
        assert report.status()[0] == "collapsed" and "damaged the model" in str(report) and not report.harm("control")
        assert report.value("text", "neutral", "kl_to_before", "control") < 0.01
        unseen = report.frame[(report.frame.split == "unseen") & (report.frame.metric == "kept")].iloc[0]
        assert unseen["n"] >= 8 and unseen["control"] == 1
        assert "forget, chat" in report.samples.index and "chat" in set(report.frame.format)
        assert "capital of" in report.samples.loc["forget, chat", "prompt"]

    @pytest.mark.slow
    @pytest.mark.training
    def test_an_edit_that_keeps_what_it_was_shown_and_wrecks_the_rest_is_never_gone(self, smollm2, capitals):
        forget, retain = capitals
        forget = replace(forget, targets=forget.answers.roll(1, 0))
        mask = attribution_patching(smollm2, forget).top(weights=0.05)
        settings = {"text_loss": losses.cross_entropy, "text_weight": 0}
        edit = masked_gradient(smollm2, mask, forget, retain, lr=2e-3, steps=50, **settings)
        report = evaluate(smollm2, edit, forget=forget, retain=retain, control=edit, attacks=["quantization"])
        assert report.value("forget", "statement", "accuracy") < 0.2
        assert report.status()[0] == "collapsed", report
        assert "nats a token" in report.status()[1]
