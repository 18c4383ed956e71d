"""Invariants, over every attack: the folder is walked, so a new file is tested before anyone writes a test for it."""

import inspect
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack import relearning
from mechunlearn.attack.bounds import COLUMNS, recovery
from mechunlearn.attack.states import states_to_attack
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import codebook_delete, feature_clamp, masked_gradient
from mechunlearn.evaluation.robustness import PLACED
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Fact, Query
from mechunlearn.facts.load import load_facts
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.localize import random_units
from mechunlearn.model.hooked import load_model
from mechunlearn.world.toy import LOOKED_UP, planted_facts
from tests.handmade import (
    assert_untouched,
    axes,
    hand_made,
    mask_of,
    random_codebook,
    random_sae,
    rows_of_tokens,
    state_of,
)
from tests.models import random_hf, token_prompts
from tests.test_invariants import functions, named

ATTACKS = functions("attack")
SHORT = {
    "relearning": {"lrs": {"full": [1e-3]}, "steps": 2, "eval_every": 1},
    "soft_prompt": {"lrs": [1e-4], "steps": 2, "eval_every": 1},
    "activation_perturbation": {"lrs": [1e-2], "steps": 2, "eval_every": 1},
}
"""On the planted model."""
TWICE = {
    "relearning": {"lrs": {"full": [0.01, 0.02]}, "steps": 3, "eval_every": 2},
    "soft_prompt": {"tokens": 3, "lrs": [0.1, 0.2], "steps": 3, "eval_every": 2},
    "activation_perturbation": {"lrs": [0.1, 0.2], "steps": 3, "eval_every": 2},
    "unlearning_depth": {"threshold": -100.0},  # so that some depth of a random model holds its facts
}
"""On random models, with two settings where there are any."""
CASES = [pytest.param(attack, TWICE.get(attack.__name__, {}), id=attack.__name__) for attack in ATTACKS]
CASES.append(
    pytest.param(relearning, TWICE["relearning"] | {"lrs": {"lora": [0.01, 0.02]}}, id="relearning by adapters")
)
TEXT = {"hints", "multiple_choice", "membership_inference"}
"""They ask in words, or need facts that were never taught: on the shipped world, and on random models with words."""
CANNOT = {"soft_prompt": "the hand-made model takes no prefix at all", "multiple_choice": "the world knows no letters"}
FAMILIES = ("gpt2", "gpt_neox", "llama in bfloat16")
"""Tied and untied weights, blocks in sequence and in parallel, two number formats: attacks see no more of a family."""
ASK = {*TEXT, "sampling", "prompting"}
"""They write nothing into the model, so one family in sequence and one in parallel are enough."""
IN_FAMILIES = [
    pytest.param(*case.values, family, id=f"{case.id}-{family}")
    for case in CASES
    for family in (FAMILIES[:2] if case.values[0].__name__ in ASK else FAMILIES)
]


@pytest.fixture(scope="module")
def setup(seed):
    toy = planted_facts()
    forget, retain = toy.prompts(list(range(8))), toy.prompts(list(range(8, 24)))
    mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    return toy.model, masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1, seed=seed), forget, retain


@pytest.fixture(scope="module")
def in_words(world):
    forget, retain = load_facts("factworld/city").prompts(world).split(forget=8, retain=16, seed=1)
    noise = torch.randn(world.rows("L2.mlp.out").shape, generator=torch.Generator().manual_seed(0))
    rows = {"L2.mlp.out": 5 * world.rows("L2.mlp.out").std() * noise}
    return (
        world,
        WeightEdit({"L2.mlp.out": torch.arange(len(noise))}, rows, world.signature, RunCard("noise")),
        forget,
        retain,
    )


def attacked(attack, setup, **settings):
    model, edit, forget, retain = setup
    return attack(model, edit, forget, retain, **SHORT.get(attack.__name__, {}), **settings)


@pytest.mark.parametrize("attack", ATTACKS, ids=named)
class TestEveryAttack:
    @pytest.fixture
    def setup(self, attack, setup, in_words):
        return in_words if attack.__name__ in TEXT else setup

    def test_gives_the_rows_that_recovery_reads(self, attack, setup):
        rows = attacked(attack, setup)
        assert set(COLUMNS) <= set(rows) and set(rows["state"]) - {"never taught"} == {"edited", "unedited"}
        assert all(name.isidentifier() and name.islower() for name in rows), "columns are in snake case"
        card = json.loads(json.dumps(rows.attrs["card"]))
        assert card["method"] == attack.__name__ and card["model"] == setup[0].fingerprint
        assert ((rows["low"] <= rows["held_out"]) & (rows["held_out"] <= rows["high"])).all() and (rows["n"] > 0).all()
        assert "edited" in recovery(rows).index

    def test_the_same_seed_gives_the_same_rows(self, attack, setup):
        one, two = attacked(attack, setup, seed=3), attacked(attack, setup, seed=3)
        assert one.equals(two)

    def test_an_edit_of_nothing_is_the_ceiling(self, attack, setup):
        model, _, forget, retain = setup
        same = {"L0.mlp.out": model.rows("L0.mlp.out")[:32]}
        nothing = WeightEdit(
            {"L0.mlp.out": torch.arange(32)}, same, model.signature, RunCard("none", model=model.fingerprint)
        )
        rows = attack(model, nothing, forget, retain, **SHORT.get(attack.__name__, {}))
        states = {
            state: part.drop(columns=["state", "below"], errors="ignore").reset_index(drop=True)
            for state, part in rows.groupby("state")
        }
        assert states["edited"].equals(states["unedited"])
        found = recovery(rows)["recovery"]
        assert found["edited"] == pytest.approx(found["unedited"], nan_ok=True)
        if attack.__name__ not in CANNOT:
            assert found["edited"] == pytest.approx(1.0)

    def test_known_rows_stand_for_ceiling_and_floor(self, attack, setup):
        first = attacked(attack, setup)
        again = attacked(attack, setup, baseline_rows=first)
        assert sorted(again["state"]) == sorted(first["state"])
        ceiling = [rows[rows.state == "unedited"].reset_index(drop=True)[list(COLUMNS)] for rows in (first, again)]
        assert ceiling[0].equals(ceiling[1])
        with pytest.raises(MechunlearnError, match="another attack"):
            attacked(attack, setup, baseline_rows=first, seed=9)

    def test_ceiling_and_floor_can_be_run_alone(self, attack, setup):
        if attack.__name__ in PLACED:
            pytest.skip("its ceiling depends on where the edit is")
        model, _, forget, retain = setup
        rows = attack(model, None, forget, retain, **SHORT.get(attack.__name__, {}))
        never = {"never taught"} & set(rows["state"])
        assert set(rows["state"]) - never == {"unedited"}
        assert set(attacked(attack, setup, baseline_rows=rows)["state"]) - never == {"edited", "unedited"}

    def test_feature_edits_are_attacked_with_their_hooks_on(self, attack, setup):
        model, _, forget, retain = setup
        if attack.__name__ in CANNOT.keys() & TEXT:
            pytest.skip(CANNOT[attack.__name__])
        dictionary = axes(model, "L0.resid_post")
        units = range(model.signature.d_model) if attack.__name__ in TEXT else range(LOOKED_UP, LOOKED_UP + 4)
        mask = mask_of(model, dictionary, units)
        edit = feature_clamp(model, mask, forget, retain, dictionary=dictionary, scale=0.0)
        assert isinstance(edit, FeatureEdit)
        rows = attack(model, edit, forget, retain, **SHORT.get(attack.__name__, {}))
        start = rows[(rows.state == "edited") & (rows["step"] == 0)]
        unedited = rows[(rows.state == "unedited") & (rows["step"] == 0)]
        assert start["held_out"].min() < unedited["held_out"].max()

    def test_a_name_that_is_taken_is_refused(self, attack, setup):
        with pytest.raises(MechunlearnError, match="cannot be named"):
            attacked(attack, setup, extra_edits={"unedited": None})

    def test_a_gate_that_the_unedited_model_does_not_reach_is_refused(self, attack, setup):
        model, edit, forget, retain = setup
        wrong = replace(retain, answers=retain.foils.clone())
        with pytest.raises(MechunlearnError, match=r"knows 0% of the retain facts.*asks for 90%.*or a lower gate"):
            attacked(attack, (model, edit, forget, wrong))
        with pytest.raises(MechunlearnError, match=r"got min_retention=2. Expected a share, from 0 to 1"):
            attacked(attack, setup, min_retention=2)


@pytest.fixture(scope="module")
def random_models():
    """Models of each family, made once: what these tests leave behind would fail them."""
    made: dict = {}

    def model(family: str, tokenizer=None):
        key = family, tokenizer is not None
        if key not in made:
            name, _, dtype = family.partition(" in ")
            made[key] = load_model((random_hf(name), tokenizer), dtype=dtype or None)
            parameters = list(made[key].hf.parameters())
            parameters[1].requires_grad_(False)
            parameters[2].grad = torch.ones_like(parameters[2])
        return made[key]

    return model


@pytest.mark.parametrize(("attack", "settings", "family"), IN_FAMILIES)
class TestNoTrace:
    """Also of edits by hooks and by weights one behind the other; after an error and Ctrl-C wherever they happen."""

    passes: dict = {}  # noqa: RUF012

    @pytest.fixture
    def run(self, attack, settings, family, random_models):
        """Run the attack while something may happen in the so-many-th pass through the last block; gives the passes."""
        words = word_tokenizer() if attack.__name__ in TEXT else None
        model = random_models(family, words)
        prompts = token_prompts(facts=16) if words is None else in_few_words().prompts(model)
        codebook, sae = random_codebook(model, "L0.resid_post"), random_sae(model, "L1.resid_post")
        clamp = feature_clamp(model, mask_of(model, sae, [1, 2]), rows_of_tokens(), dictionary=sae)
        edit = codebook_delete(model, mask_of(model, codebook, [0, 5]), dictionary=codebook) | clamp
        sets = prompts.select(range(4)), prompts.select(range(4, 16))
        counted: list = []

        def ran(happens=lambda: None, at: int = -1, **more):
            counted.clear()

            def note(*_):
                counted.append(1)
                if len(counted) == at:
                    happens()

            handle = last_block(model).register_forward_pre_hook(note)
            before = state_of(model)
            try:
                return attack(model, edit, *sets, min_retention=0, **settings, **more)
            finally:
                assert_untouched(model, before)
                handle.remove()

        ran.passes = lambda: len(counted)  # type: ignore[attr-defined]
        return ran

    def all_passes(self, run, attack, settings) -> int:
        key = attack, str(settings)  # it is the same for all families
        if key not in self.passes:
            run()
            self.passes[key] = run.passes()
        return self.passes[key]

    def test_in_peace(self, run, attack, settings, family):
        words = word_tokenizer() if attack.__name__ in TEXT else None
        other = load_model((random_hf(family.partition(" in ")[0]), words))
        before = state_of(other)
        rows = run(extra_edits={"other": other, "rows": hand_made(other)})
        assert_untouched(other, before)
        states = [state for state in dict.fromkeys(rows["state"]) if state != "never taught"]
        assert [state for state in states if "removed" not in state] == ["edited", "unedited", "other", "rows"]
        if "steps" in settings:
            assert rows[rows.state == "other"]["step"].tolist() == [0, 2, 3] * 2, "two settings"
            assert rows["trained"].notna().any()

    @pytest.mark.parametrize("moment", [0.0, 0.5, 0.9])
    def test_after_an_error(self, run, attack, settings, family, moment):
        def fail():
            raise RuntimeError("on the way")

        total = self.all_passes(run, attack, settings)
        with pytest.raises(RuntimeError, match="on the way"):
            run(fail, 1 + int(moment * total))
        assert run.passes() <= total

    @pytest.mark.parametrize("moment", [0.1, 0.4])
    def test_after_ctrl_c_which_leaves_no_rows_either(self, run, attack, settings, family, moment):
        total = self.all_passes(run, attack, settings)
        with pytest.raises(KeyboardInterrupt):
            run(lambda: os.kill(os.getpid(), signal.SIGINT), 1 + int(moment * total))
        assert run.passes() < total, "it ended at once, not after the last setting"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Few words, for random models: all others are one unknown word."""
    words = [
        "?",
        "lives",
        "in",
        *"ABCD",
        *(f"{kind}{i}" for kind in ("s", "n") for i in range(16)),
        "red",
        "blue",
        "green",
    ]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def in_few_words() -> FactDataset:
    """Sixteen facts, and as many that nobody was taught."""

    def facts(kind: str) -> tuple[Fact, ...]:
        towns = ("red", "blue", "green")
        return tuple(
            Fact(f"{kind}{i}", "town", {"statement": Query(f"{kind}{i} lives in", towns[i % 3], towns[(i + 1) % 3])})
            for i in range(16)
        )

    return FactDataset("words", facts("s"), untaught=FactDataset("strangers", facts("n")))


def last_block(model) -> torch.nn.Module:
    (found,) = [
        module for name, module in model.hf.named_modules() if name.split(".")[-2:] in (["layers", "2"], ["h", "2"])
    ]
    return found


def test_a_localization_or_a_mask_is_no_edit(setup):
    """Past the type checker of the tests, as users call it."""
    model, edit, forget, _ = setup
    found = random_units(model)
    find = inspect.unwrap(states_to_attack)
    for given, told in ((found, r"found.above\(0\) or found.top\(weights=0.05\)"), (found.above(0), "edit them first")):
        for call in (lambda g=given: find(model, g, forget), lambda g=given: find(model, edit, forget, {"mine": g})):
            with pytest.raises(MechunlearnError, match=f"Expected an edit, got a {type(given).__name__}.*{told}"):
                call()


class TestRelearningOnOtherThings:
    def test_other_facts_share_no_name_and_no_relation(self, world, sixteen):
        from mechunlearn.attack.relearning import _unrelated

        forget, retain = sixteen
        shown = _unrelated(world, forget, retain)
        names = {word for subject in forget.facts.subjects for word in subject.split()}
        assert len(shown) > 10 and not any(names & set(query.subject.split()) for query in shown.queries)
        sports = {fact.answer for fact in forget.facts.source}
        assert not sports & {query.answer for query in shown.queries}

    @pytest.mark.parametrize("on", ["other facts", "text"])
    def test_all_forgotten_facts_are_held_out(self, world, sixteen, hidden, on):
        forget, retain = sixteen
        settings = {"lrs": {"full": [5e-4]}, "steps": 2, "eval_every": 2, "batch_size": 8}
        rows = relearning(world, hidden, forget, retain, on=on, **settings)
        assert (rows["n"] == 16).all() and rows["trained"].isna().all()
        assert set(rows["state"]) == {"edited", "unedited", "never taught"}

    def test_data_without_other_relations_or_text_say_so(self, setup):
        with pytest.raises(MechunlearnError, match="come without any"):
            relearning(*setup, on="other facts")
        with pytest.raises(MechunlearnError, match="without text"):
            relearning(*setup, on="text")
