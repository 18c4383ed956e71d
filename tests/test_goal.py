"""Settings that come from a goal: the search, what it measures, and the texts that it measures on."""

import gc
import math
import warnings
import weakref

import pytest
import torch

import mechunlearn as mu
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.edit import fisher_lora, losses, masked_gradient, memit, mlp_washing, null_space
from mechunlearn.edit.goal import Goal, Judge, Reached
from mechunlearn.edit.loss_inputs import LossInputs
from mechunlearn.edit.objective import HELD_LADDER, STEPS
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.model import samples
from mechunlearn.model.samples import own_texts
from mechunlearn.training.inputs import TopLayers
from mechunlearn.world.toy import planted_facts

GOAL = Goal(efficacy=0.9, max_kl=0.1, min_retention=0.9)


def tried(*found: Reached, goal: Goal = GOAL, between: int = 0):
    """Search over made-up attempts, of which each is called by its setting."""
    settings, seen = iter(found), []

    def attempt(setting: float):
        seen.append(setting)
        return f"edit {setting:g}", {"setting": setting}, next(settings)

    return goal.search([1.0, 4.0, 16.0], attempt, between), seen


@pytest.fixture(scope="module")
def toy():
    return planted_facts()


@pytest.fixture(scope="module")
def mask(toy):
    return ComponentMask.of(["L0.mlp.out"], toy.model.signature)


class TestSearch:
    def test_it_ends_with_the_gentlest_that_meets_the_goal(self):
        (made, entries), seen = tried(Reached(0.5, 1, 0.01), Reached(0.95, 1, 0.05))
        assert made == "edit 4" and seen == [1, 4]
        assert [entry["chosen"] for entry in entries] == [False, True]
        assert entries[1] == {"setting": 4, "efficacy": 0.95, "retention": 1, "kl": 0.05, "chosen": True}

    def test_it_goes_no_further_once_the_facts_are_edited_and_warns_of_what_failed(self):
        with pytest.warns(UserWarning, match=r"KL on ordinary text 0.200 nats a token \(wanted 0.1 or less\)\. Try"):
            (made, _), seen = tried(Reached(0.2, 1, 0.0), Reached(1, 1, 0.2))
        assert seen == [1, 4] and made == "edit 4", "half of the KL too much is nearer than most facts not edited"

    def test_the_nearest_is_taken_where_none_edits_enough(self):
        with pytest.warns(UserWarning, match="efficacy 0.40"):
            (made, _), seen = tried(Reached(0.1, 1, 0), Reached(0.4, 1, 0.05), Reached(0.3, 1, 0.09))
        assert made == "edit 4" and seen == [1, 4, 16]

    def test_settings_between_are_tried_where_the_facts_are_edited_at_a_price(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (made, _), seen = tried(Reached(0.2, 1, 0), Reached(1, 0.5, 0), Reached(1, 0.95, 0), between=2)
        assert seen == [1, 4, 2] and made == "edit 2"

    def test_what_cannot_be_measured_counts_neither_way(self):
        (made, entries), _ = tried(Reached(1, math.nan, math.nan))
        assert made == "edit 1" and entries[0]["kl"] is None and entries[0]["retention"] is None


class TestEditors:
    def test_the_goal_is_reached_by_the_gentlest_rate_and_the_card_says_how(self, world, sport):
        forget, retain = sport[0].select(range(8)), sport[1].select(range(16))
        mask, before = ComponentMask.of(["L1.mlp.out", "L2.mlp.out"], world.signature), world.fingerprint
        edit = masked_gradient(world, mask, forget, retain, max_kl=1.0)
        chosen = [entry for entry in edit.card.search if entry["chosen"]]
        assert len(chosen) == 1 and chosen[0]["efficacy"] == 1 and world.fingerprint == before
        rates = [entry["lr"] for entry in edit.card.search]
        size = float(torch.cat([world.rows(f"L{i}.mlp.out").float() for i in (1, 2)]).square().mean().sqrt())
        assert rates == pytest.approx([share * size for share in HELD_LADDER[: len(rates)]])
        assert [entry["step"] for entry in edit.card.trajectory] == [*range(1, len(edit.card.trajectory) + 1)]
        assert sum(entry["steps"] for entry in edit.card.search) == len(edit.card.trajectory) <= STEPS * len(rates)
        with edit.applied(world):
            assert measure(world, forget)["target_accuracy"].mean() == 1
            kept = measure(world, retain)["accuracy"].mean()
        assert float(kept) == pytest.approx(chosen[0]["retention"])

    @pytest.mark.parametrize("given", [{"lr": 1e-3}, {"steps": 2}, {"lr": 1e-3, "steps": 2}])
    def test_a_rate_or_steps_turn_the_search_off(self, toy, mask, given):
        edit = masked_gradient(toy.model, mask, toy.prompts([0]), toy.prompts([1, 2]), **given)
        assert edit.card.search == [] and len(edit.card.trajectory) == given.get("steps", STEPS)

    def test_a_goal_out_of_reach_is_warned_of_and_the_model_stays(self, toy):
        mask, before = ComponentMask.of([toy.neuron(5)], toy.model.signature), toy.model.fingerprint
        with pytest.warns(UserWarning, match=r"No setting met the goal.*efficacy 0\.00"):
            edit = masked_gradient(toy.model, mask, toy.prompts([0]), toy.prompts([1, 2]))
        assert len(edit.card.search) == len(HELD_LADDER) and toy.model.fingerprint == before

    def test_the_rank_of_adapters_fits_the_mask(self, toy):
        mask = ComponentMask.of([toy.neuron(0), toy.neuron(1)], toy.model.signature)
        edit = fisher_lora(toy.model, mask, toy.prompts([0]), toy.prompts([2, 3]), steps=1)
        assert {left.shape[1] for left, _ in edit.low_rank.values()} <= {2, 4}, "two rows have a rank of two"
        with pytest.raises(mu.MechunlearnError, match="A rank of 8 does not fit"):
            fisher_lora(toy.model, mask, toy.prompts([0]), toy.prompts([2, 3]), steps=1, rank=8)

    def test_a_closed_form_searches_its_weight_and_a_given_one_is_taken(self, world, sport):
        forget, retain = sport[0].select(range(8)), sport[1].select(range(32))
        mask = ComponentMask.of(["L1.mlp.out"], world.signature)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = memit(world, mask, forget, retain, target="mean", prefixes=0)
        given = memit(world, mask, forget, retain, target="mean", prefixes=0, covariance_weight=20)
        assert given.card.search == [] and found.card.search[0]["covariance_weight"] == 20_000
        assert [entry["chosen"] for entry in found.card.search].count(True) == 1

    @pytest.mark.parametrize("editor", [memit, mlp_washing, null_space], ids=lambda each: each.__name__)
    def test_a_closed_form_tries_one_setting_where_no_later_token_reads_the_layer(self, world, sport, editor):
        """At the model's last layer nothing reads the subject's token."""
        forget, retain = sport[0].select(range(4)), sport[1].select(range(8))
        site, before = f"L{world.signature.layers - 1}.mlp.out", world.fingerprint
        with pytest.warns(UserWarning, match="change what is said for 0 of 4 facts, so no .* can: the gentlest"):
            edit = editor(world, ComponentMask.of([site], world.signature), forget, retain, steps=2, prefixes=0)
        assert len(edit.card.search) == 1 and edit.card.search[0]["efficacy"] == 0
        assert world.fingerprint == before


class TestJudgedByTheNextPass:
    """What a step's forward pass says of the facts also ends the search: no pass of its own is made for that."""

    @pytest.fixture
    def passes(self, monkeypatch):
        """How many rows each pass over the upper layers reads, and whether it is followed by a backward pass."""
        made, states = [], TopLayers.states

        def counted(self, resid, part, *more, **settings):
            made.append((len(part), torch.is_grad_enabled()))
            return states(self, resid, part, *more, **settings)

        monkeypatch.setattr(TopLayers, "states", counted)
        return made

    @pytest.fixture
    def apart(self, monkeypatch):
        """Each step is judged by a pass of its own, as `Judge.efficacy` makes it."""
        monkeypatch.setattr(LossInputs, "right", lambda self, prefix, rows: self.streams[prefix][1].right()[rows])

    @pytest.mark.parametrize("editor", [masked_gradient, fisher_lora])
    @pytest.mark.parametrize("loss", [losses.cross_entropy, losses.log_one_minus_p, losses.inverted_hinge])
    def test_the_edit_is_the_same_to_the_last_bit(self, toy, mask, editor, loss, request):
        forget, retain = toy.prompts([0, 1, 2]), toy.prompts([3, 4, 5])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            together = editor(toy.model, mask, forget, retain, loss=loss)
            request.getfixturevalue("apart")
            alone = editor(toy.model, mask, forget, retain, loss=loss)
        assert together.rows.keys() == alone.rows.keys()
        assert all(torch.equal(rows, alone.rows[site]) for site, rows in together.rows.items())
        assert together.card.search == alone.card.search and together.card.trajectory == alone.card.trajectory

    def test_a_step_reads_the_forget_facts_once(self, world, sport, passes, request):
        forget, retain = sport[0].select(range(6)), sport[1].select(range(20))
        mask = ComponentMask.of(["L1.mlp.out"], world.signature)
        card = masked_gradient(world, mask, forget, retain).card
        together = sum(rows == 6 for rows, _ in passes)
        passes.clear()
        request.getfixturevalue("apart")
        masked_gradient(world, mask, forget, retain)
        steps, attempts = len(card.trajectory), len(card.search)
        assert sum(rows == 6 for rows, _ in passes) == together + steps - attempts > together

    @pytest.mark.real
    def test_on_a_real_model_too(self, smollm2, request):
        """In another language, behind a long prompt, and with a number for an answer."""
        long = "It had rained all week, and the harbour was grey. " * 8
        asked = [
            Query("La capitale de la France est la ville de", "Paris", "Rome", "", "France"),
            Query(f"{long}The capital of Italy is the city of", "Rome", "Paris", "", "Italy"),
            Query("The number after 41 is", "42", "17", "", "41"),
        ]
        prompts = Prompts.from_text(asked, smollm2.tokenizer)
        mask = ComponentMask.of(["L28.mlp.out", "L29.mlp.out"], smollm2.signature)
        settings = {"retain_weight": 0, "text_weight": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            together = masked_gradient(smollm2, mask, prompts, prompts, **settings)
            request.getfixturevalue("apart")
            alone = masked_gradient(smollm2, mask, prompts, prompts, **settings)
        assert all(torch.equal(rows, alone.rows[site]) for site, rows in together.rows.items())
        assert together.card.search == alone.card.search and len(together.card.trajectory) > 1

    def test_facts_that_do_not_fit_one_batch_are_judged_apart(self, world, sport, passes):
        forget, retain = sport[0].select(range(6)), sport[1].select(range(20))
        mask = ComponentMask.of(["L1.mlp.out"], world.signature)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masked_gradient(world, mask, forget, retain, batch_size=4)
        assert (6, False) in passes and (6, True) not in passes


class TestJudge:
    def test_it_measures_what_plain_code_measures(self, world, sport):
        forget, retain = sport[0].select(range(8)), sport[1].select(range(16))
        mask = ComponentMask.of(["L2.mlp.out"], world.signature)
        judge = Judge(TopLayers(world, 2), forget, retain, aimed=False)
        still = judge.reached()
        assert (still.efficacy, still.retention) == (0, 1) and still.kl == pytest.approx(0, abs=1e-6)
        edit = masked_gradient(world, mask, forget, retain, lr=5e-3, steps=5)
        texts = own_texts(world, 64, 32)[1::2]
        plain = [world(torch.tensor([world.tokenizer(text)["input_ids"]]))[0].log_softmax(-1) for text in texts]
        with edit.applied(world):
            found = judge.reached()
            truth, kept = (float(measure(world, each)["accuracy"].mean()) for each in (forget, retain))
            moved = [world(torch.tensor([world.tokenizer(text)["input_ids"]]))[0].log_softmax(-1) for text in texts]
        kl = [(p.exp() * (p - q)).sum(-1)[:-1] for p, q in zip(plain, moved, strict=True)]
        assert found.efficacy == pytest.approx(1 - truth) and found.retention == pytest.approx(kept)
        assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3) and found.kl > 1e-4


class TestOwnTexts:
    def test_they_are_drawn_by_the_seed_and_leave_the_random_state(self, world):
        state = torch.get_rng_state()
        first = own_texts(world, count=6, tokens=8, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        assert first == own_texts(world, count=6, tokens=8, seed=5) != own_texts(world, count=6, tokens=8, seed=6)
        assert all(len(world.tokenizer(text)["input_ids"]) >= 4 for text in first)

    def test_another_state_of_the_weights_writes_other_texts(self):
        model = mu.load_model("factworld")
        before = own_texts(model, count=4, tokens=8)
        model.write_("L0.mlp.out", torch.zeros_like(model.rows("L0.mlp.out")))
        assert own_texts(model, count=4, tokens=8) != before

    def test_what_a_model_wrote_does_not_keep_it_alive(self):
        model = mu.load_model("factworld")
        own_texts(model, count=2, tokens=4)
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None

    def test_what_took_long_is_read_by_the_next_process_and_a_damaged_file_is_made_again(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path))
        monkeypatch.setattr(samples, "WORTH", 0.0)
        first = own_texts(mu.load_model("factworld"), count=3, tokens=8)
        (path,) = (tmp_path / "samples").iterdir()

        def another() -> tuple[str, ...]:
            """The texts of the same model in another process, which may not write any."""
            model = mu.load_model("factworld")
            monkeypatch.setattr(
                model, "generate", lambda *_, **__: pytest.fail("they were sampled again"), raising=False
            )
            return own_texts(model, count=3, tokens=8)

        assert another() == first
        other = mu.load_model("factworld")
        other.write_("L0.mlp.out", torch.zeros_like(other.rows("L0.mlp.out")))
        assert own_texts(other, count=3, tokens=8) != first and len(list(path.parent.iterdir())) == 2
        for broken in ("", "[]", '{"texts": ["a b c d"], "hash": "0"}', '{"texts": 3, "hash": 3}'):
            path.write_text(broken)
            assert own_texts(mu.load_model("factworld"), count=3, tokens=8) == first
            assert another() == first, "the file is whole again"

    def test_what_was_quick_and_what_cannot_be_kept_leave_nothing(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "file"))
        own_texts(mu.load_model("factworld"), count=2, tokens=4)
        assert not list(tmp_path.iterdir())
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(samples, "WORTH", 0.0)
        assert own_texts(mu.load_model("factworld"), count=2, tokens=5)

    def test_a_model_without_a_tokenizer_writes_none(self):
        with pytest.raises(mu.MechunlearnError, match="without a tokenizer writes no text"):
            own_texts(planted_facts().model)


def test_text_is_held_by_its_kl_unless_asked_otherwise(world, sport):
    """At the first step nothing has moved, so the KL of text is zero; its cross-entropy is not."""
    forget, retain = sport[0].select(range(8)), sport[1].select(range(8))
    mask = ComponentMask.of(["L1.mlp.out"], world.signature)
    edits = [
        masked_gradient(world, mask, forget, retain, steps=1, text_loss=loss)
        for loss in (losses.kl_retain, losses.cross_entropy)
    ]
    kl, entropy = (edit.card.trajectory[0]["text"] for edit in edits)
    assert kl == pytest.approx(0, abs=1e-5) and entropy > 0.1


@pytest.mark.real
def test_a_real_model_keeps_its_text_while_its_facts_change(smollm2):
    """Few steps: the rate is the goal's gentlest, and what is not trained hardly moves."""
    known = mu.load_facts("countries/capital")[:60].known(smollm2)
    forget, retain = known.prompts(smollm2).split(forget=4, retain=6, seed=0)
    mask = ComponentMask.of([f"L{layer}.mlp.out" for layer in range(16, 20)], smollm2.signature)
    gentle = float(HELD_LADDER[0] * smollm2.rows("L17.mlp.out").float().square().mean().sqrt())
    edit = masked_gradient(smollm2, mask, forget, retain, lr=gentle, steps=4)
    terms = edit.card.trajectory
    assert terms[-1]["forget"] < terms[0]["forget"] and terms[0]["text"] == pytest.approx(0, abs=1e-4)
    with edit.applied(smollm2):
        assert measure(smollm2, retain)["accuracy"].mean() > 0.8


def test_steps_without_a_rate_are_warned_of():
    """They turned the search off in silence, and the edit changed nothing."""
    toy = planted_facts()
    mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    with pytest.warns(UserWarning, match="steps=2 without lr turns the search off"):
        masked_gradient(toy.model, mask, toy.prompts([0]), toy.prompts([1]), steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked_gradient(toy.model, mask, toy.prompts([0]), toy.prompts([1]), steps=2, lr=0.1)
