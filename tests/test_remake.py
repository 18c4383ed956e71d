"""An edit remembers its call: made again it is bit-identical, and its random control is that call under another mask."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import mechunlearn.edit
from mechunlearn import ComponentMask, MechunlearnError, evaluate, load_facts
from mechunlearn.artifacts.calls import dealt
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.lazy import method_names
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import (
    codebook_delete,
    dictionary_rows,
    feature_clamp,
    fisher_lora,
    losses,
    masked_gradient,
    memit,
    null_space,
)
from mechunlearn.edit.fisher_lora import fisher_information
from mechunlearn.edit.remake import described, editor
from mechunlearn.evaluation.controls import random_control, random_mask
from mechunlearn.evaluation.recipes import delete_topic, wash, washing_texts
from mechunlearn.features.dictionaries import load_dictionary
from mechunlearn.features.feature_edit import FeatureEdit, load_edit
from mechunlearn.features.firing import FiringStatistics
from mechunlearn.model.hooked import load_model
from mechunlearn.training.covariance import Covariance
from mechunlearn.world.dictionaries import topic_stories
from tests.handmade import mask_of, random_codebook, random_sae, rows_of_tokens
from tests.models import random_hf, token_prompts
from tests.test_invariants import content, edited, known, suited_mask

TEXTS = ["The knight fought the army.", "The cook baked the soup.", "The sailor crossed the sea at night."] * 3
EDITORS = method_names("mechunlearn.edit")


def mine(logits, labels, sharpness=2.0):
    """A loss that is in no module."""
    return -losses.cross_entropy(sharpness * logits, labels)


def same(one, other, model) -> bool:
    mine, theirs = content(one, model), content(other, model)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def sets(world, sport):
    """Few facts, with few texts and nothing related, so that they are measured fast."""
    few = {"source": None, "related": {}, "skills": {}, "texts": sport[0].facts.texts[:40]}
    halves = (prompts.select(range(8)) for prompts in sport)
    return tuple(replace(prompts, facts=replace(prompts.facts, **few)) for prompts in halves)


@pytest.fixture(scope="module")
def some(world):
    return ComponentMask.of([f"L1.mlp.out[{unit}]" for unit in range(100)], world.signature)


@pytest.mark.parametrize("name", EDITORS)
class TestEveryEditor:
    @pytest.fixture
    def made(self, name):
        model = load_model((random_hf("llama"), None))
        prompts = known(model, token_prompts(facts=8))
        mask = suited_mask(getattr(mechunlearn.edit, name), model, prompts)
        halves = prompts.select(range(4)), prompts.select(range(4, 8))
        settings = {"steps": 3, "lr": 0.05, "loss": mine, "init": "random", "seed": 3, "scale": 2, "how": "zero"}
        settings |= {"measure": lambda step: {"square": step * step}, "target_values": torch.ones(4, 32)}
        return model, mask, edited(getattr(mechunlearn.edit, name), model, mask, *halves, **settings)

    def test_made_again_it_is_bit_identical(self, made, name):
        model, _, edit = made
        assert content(edit, model)
        for again in (edit.remake(), edit.remake(mask=edit.mask, seed=edit.card.seed), edit.remake(seed=3)):
            assert same(again, edit, model) and type(again) is type(edit)
            assert again.card.settings == edit.card.settings and again.card.mask == edit.card.mask
            assert [e.get("square") for e in again.card.trajectory] == [e.get("square") for e in edit.card.trajectory]
            assert same(again.remake(), edit, model), "it remembers its call as well"

    def test_another_mask_makes_another_edit_and_another_seed_is_on_the_card(self, made, name):
        model, mask, edit = made
        fewer = ComponentMask.of([], model.signature)
        for site, chosen in mask.sites.items():
            left = chosen & (chosen.cumsum(0) > 1) if ":" in site else chosen
            fewer = fewer | ComponentMask({site: left}, model.signature)
        fewer = ComponentMask({site: chosen for site, chosen in fewer.sites.items() if chosen.any()}, model.signature)
        other = edit.remake(mask=fewer if any(":" in site for site in mask.sites) else mask - one_unit(mask), seed=9)
        assert not same(other, edit, model) and other.card.seed == 9
        assert other.card.settings == edit.card.settings

    def test_the_card_says_what_was_given(self, made, name):
        model, mask, edit = made
        taken = edit.calls[0].arguments
        assert edit.card.method == name and edit.card.model == model.fingerprint and edit.card.mask == mask.fingerprint
        assert edit.card.settings.keys() == taken.keys() - {
            "model", "mask", "forget", "retain", "seed", "progress"
        }  # fmt: skip
        assert json.loads(json.dumps(edit.card.settings)) == edit.card.settings and edit.card.data
        if "loss" in taken:
            assert edit.card.settings["loss"] == {"name": "mine", "settings": {"sharpness": 2.0}}
        if isinstance(edit, WeightEdit):
            assert edit.card.weights == edit.mask.weights(model) > 0

    def test_what_was_given_is_held_and_not_copied(self, made, name):
        model, mask, edit = made
        held = edit.calls[0].arguments
        assert held["model"] is model and held["mask"] is mask
        for key, value in edit.remake(seed=4).calls[0].arguments.items():
            assert value is held[key] or key == "seed"

    def test_a_loaded_edit_says_why_it_cannot_be_made_again(self, made, name, tmp_path):
        model, _, edit = made
        edit.save(tmp_path / "made.safetensors")
        loaded = load_edit(tmp_path / "made.safetensors")
        assert same(loaded, edit, model)
        with pytest.raises(
            MechunlearnError, match=rf"This edit \({name}\) cannot be made again: it was loaded.*control="
        ):
            loaded.remake(seed=1)


def one_unit(mask: ComponentMask) -> ComponentMask:
    """A neuron's output, which every editor of weights moves."""
    return ComponentMask.of([next(unit for unit in mask if unit.kind == "mlp.out")], mask.signature)


class TestComposed:
    @pytest.fixture
    def parts(self, toy):
        facts = toy.prompts([5]), toy.prompts([0, 1, 2])
        one = masked_gradient(toy.model, ComponentMask.of(["L0.mlp.out[5]"], toy.model.signature), *facts, steps=2)
        mask = ComponentMask.of(["L0.mlp.out[6]", "L1.attn.o[0]"], toy.model.signature)
        return one, masked_gradient(toy.model, mask, *facts, steps=3, loss=mine, seed=4)

    def test_both_parts_are_made_again(self, toy, parts):
        both = parts[0] | parts[1]
        for again in (both.remake(), both.remake(mask=both.mask)):
            assert same(again, both, toy.model) and again.card.method == "masked_gradient | masked_gradient"
            assert [part["seed"] for part in again.card.settings["parts"]] == [0, 4]
        assert [part["seed"] for part in both.remake(seed=7).card.settings["parts"]] == [7, 7]
        three = both | masked_gradient(
            toy.model,
            ComponentMask.of(["L1.mlp.out"], toy.model.signature),
            toy.prompts([5]),
            toy.prompts([0]),
            steps=1,
        )
        assert len(three.calls) == 3 and same(three.remake(), three, toy.model)

    def test_each_part_gets_as_many_units_of_each_kind_as_it_had(self, toy, parts):
        both = parts[0] | parts[1]
        new = ComponentMask.of(["L0.mlp.out[9]", "L1.mlp.out[3]", "L0.attn.o[1]"], toy.model.signature)
        again = both.remake(mask=new)
        assert again.mask == new and not same(again, both, toy.model)
        masks = [call.mask for call in again.calls]
        assert [len(mask) for mask in masks] == [1, 2] and masks[0] | masks[1] == new
        assert {unit.kind for unit in masks[1]} == {"mlp.out", "attn.o"}

    def test_neurons_are_dealt_whole_and_no_part_has_the_lower_layers(self, world):
        def neurons(layers, count):
            kinds = ("mlp.in", "mlp.gate", "mlp.out")
            return [f"L{layer}.{kind}[{unit}]" for layer in layers for kind in kinds for unit in range(count)]

        old = [ComponentMask.of(neurons([layer], 40), world.signature) for layer in (1, 2)]
        first, second = dealt(ComponentMask.of(neurons(range(8), 10), world.signature), old)
        for part in (first, second):
            by_kind = [
                {(u.layer, u.unit) for u in part if u.kind == kind} for kind in ("mlp.in", "mlp.gate", "mlp.out")
            ]
            assert by_kind[0] == by_kind[1] == by_kind[2] and len(by_kind[0]) == 40
            assert 2.5 < sum(layer for layer, _ in by_kind[0]) / 40 < 4.5
        assert not len(first & second)

    def test_a_part_from_a_file_leaves_the_whole_without_its_calls(self, toy, parts, tmp_path):
        parts[1].save(tmp_path / "part.safetensors")
        with pytest.raises(
            MechunlearnError, match=r"This edit \(masked_gradient \| masked_gradient\) cannot be made again"
        ):
            (parts[0] | WeightEdit.load(tmp_path / "part.safetensors")).remake()

    def test_deletions_on_one_codebook(self):
        model = load_model((random_hf("llama"), None))
        codebook = random_codebook(model, "L1.resid_post")
        one, two = (codebook_delete(model, mask_of(model, codebook, u), dictionary=codebook) for u in ([0, 5], [3]))
        both = one | two
        assert both.parts[0].units.tolist() == [0, 3, 5] and same(both.remake(), both, model)
        new = mask_of(model, codebook, [7, 8, 9])
        assert both.remake(mask=new).mask == new

    def test_evaluate_takes_it(self, world, sets):
        attention, mlp = (ComponentMask.of([name], world.signature) for name in ("L6.attn.o[1]", "L1.mlp.out[4]"))
        both = masked_gradient(world, attention, *sets, steps=2) | memit(world, mlp, *sets, target="mean", prefixes=0)
        report = evaluate(world, both, forget=sets[0], retain=sets[1])
        assert report.columns == ["before", "after", "control"] and report.frame["control"].notna().all()
        control = random_control(world, both, *sets, seed=2)
        assert control.card.method == "masked_gradient | memit" and len(control.mask) == 2
        assert {unit.kind for unit in control.mask} == {"attn.o", "mlp.out"} and not len(control.mask & both.mask)


class TestControls:
    """What could not be controlled when a control was rebuilt from strings."""

    def test_it_has_the_same_texts(self, world, sets, some):
        edit = memit(world, some, *sets, texts=sets[0].facts.texts[1::2], target="mean", prefixes=1)
        control = random_control(world, edit, *sets, seed=1)
        assert control.calls[0].arguments["texts"] is edit.calls[0].arguments["texts"]
        assert control.card.settings == edit.card.settings and control.card.data == edit.card.data
        assert control.mask == random_mask(world, some, 1)
        assert control.card.data != memit(world, some, *sets, target="mean", prefixes=1).card.data

    def test_facts_of_ones_own_with_texts_of_ones_own(self, world, some, tmp_path):
        rows = [
            f"{f.subject},{f.queries['statement'].prompt},{f.answer}" for f in load_facts("factworld/sport").facts[:12]
        ]
        (tmp_path / "few.csv").write_text("\n".join(["subject,prompt,answer", *rows]))
        forget, retain = load_facts(tmp_path / "few.csv").prompts(world).split(forget=6, seed=0)
        texts = load_facts("factworld/sport").texts[:60]
        edit = memit(world, some, forget, retain, texts=texts, target="mean", prefixes=0)
        report = evaluate(world, edit, forget=forget, retain=retain)
        assert report.frame["control"].notna().all() and (report.frame["control"] != report.frame["after"]).any()

    def test_a_loss_of_ones_own(self, world, sets, some):
        edit = masked_gradient(world, some, *sets, loss=partial(mine, sharpness=1), steps=3, lr=0.05, batch_size=8)
        control = random_control(world, edit, *sets)
        assert control.card.settings["loss"] == {"name": "mine", "settings": {"sharpness": 1}}
        assert control.card.trajectory[0]["forget"] == pytest.approx(edit.card.trajectory[0]["forget"])
        assert control.card.trajectory[2]["forget"] != edit.card.trajectory[2]["forget"]

    def test_a_covariance_is_collected_where_the_control_is(self, world, sets, some):
        """Over its own texts, which are not those of the facts."""
        texts = load_facts("factworld/sport").texts[60:120]
        covariance = Covariance.of_text(world, ["L1.mlp.out"], texts)
        given = {"target": "mean", "prefixes": 0, "covariance_weight": 50}
        edit = memit(world, some, *sets, covariance=covariance, **given)
        control = random_control(world, edit, *sets, seed=1)
        assert len({unit.layer for unit in control.mask}) > 1 and covariance.sites == ("L1.mlp.out",)
        whole = Covariance.of_text(world, [f"L{layer}.mlp.out" for layer in range(8)], texts)
        wanted = memit(world, random_mask(world, some, 1), *sets, covariance=whole, **given)
        for site, rows in wanted.rows.items():
            torch.testing.assert_close(control.rows[site], rows, atol=1e-6, rtol=1e-5)

    def test_a_covariance_without_its_texts_keeps_the_control_to_its_layers(self, world, sets, some):
        seen = Covariance(world, ["L1.mlp.out", "L2.mlp.out"]).update(*rows_of_text(world))
        edit = memit(world, some, *sets, covariance=seen, target="mean", prefixes=0)
        control = random_control(world, edit, *sets, seed=1)
        assert {unit.layer for unit in control.mask} == {1, 2} and len(control.mask) == 100

    def test_a_control_without_other_units_warns(self, toy):
        everything = ComponentMask.everything(toy.model)
        edit = masked_gradient(toy.model, everything, toy.prompts([5]), toy.prompts([0]), steps=1)
        with pytest.warns(UserWarning, match="no other units of its kinds: the control says nothing"):
            random_control(toy.model, edit, toy.prompts([5]), toy.prompts([0]))

    def test_fisher_information_is_computed_where_it_lacks_a_matrix(self, world, sets, some):
        known = fisher_information(world, some, sets[0]), None
        edit = fisher_lora(world, some, *sets, rank=2, steps=2, fisher=known)
        assert same(edit, fisher_lora(world, some, *sets, rank=2, steps=2), world)
        control = random_control(world, edit, *sets, seed=1)
        plain = fisher_lora(world, random_mask(world, some, 1), *sets, rank=2, steps=2)
        assert same(control, plain, world)

    def test_rows_of_a_dictionary(self):
        model = load_model((random_hf("llama"), None))
        sae, prompts = random_sae(model, "L1.resid_post"), token_prompts(facts=8)
        edit = dictionary_rows(model, mask_of(model, sae, [0, 3, 7]), rows_of_tokens(), dictionary=sae, scale=2)
        control = random_control(model, edit, prompts, prompts, seed=1)
        others = control.calls[0].mask
        assert len(others) == 3 and not len(others & edit.calls[0].mask) and control.card.settings["scale"] == 2
        assert {unit.kind for unit in control.mask} == {"mlp.out"} and not same(control, edit, model)

    @pytest.mark.parametrize("statistics", [True, False])
    def test_clamped_features_are_matched_on_the_text_of_the_edit(self, statistics):
        model = load_model((random_hf("llama"), None))
        sae, topic = random_sae(model, "L1.resid_post"), rows_of_tokens()
        seen = FiringStatistics.of(model, sae, topic)
        mask, prompts = mask_of(model, sae, [0, 3]), token_prompts(facts=8)
        edit = feature_clamp(model, mask, seen if statistics else topic, dictionary=sae, scale=2, error=False)
        control = random_control(model, edit, prompts, prompts, seed=1)
        (part,) = control.parts
        assert not len(control.mask & mask) and part.settings == edit.parts[0].settings
        assert torch.equal(part.values, -2 * seen.max_activation.amax(0)[part.units])

    def test_something_that_knows_no_call(self, toy):
        class Ours:
            card = RunCard("ours")
            applied = apply_ = save = lambda self, model: None

        with pytest.raises(MechunlearnError, match="A Ours does not know its call.*control="):
            random_control(toy.model, Ours(), toy.prompts([5]), toy.prompts([0]))


def rows_of_text(world):
    texts = load_facts("factworld/sport").texts[:60]
    ids = [torch.tensor(row) for row in world.tokenizer(list(texts))["input_ids"]]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in ids])


class TestFromAFile:
    """A loaded edit has its card alone, which is enough where every setting is a number, a word or a loss of ours."""

    def loaded(self, edit, tmp_path):
        edit.save(tmp_path / "made.safetensors")
        return load_edit(tmp_path / "made.safetensors")

    @pytest.mark.parametrize(
        "method, settings",
        [
            (masked_gradient, {"steps": 3, "batch_size": 8, "loss": partial(losses.npo, beta=0.5), "seed": 2}),
            (fisher_lora, {"steps": 2, "rank": 2, "alpha": 3, "init": "pissa"}),
            (memit, {"target": "mean", "prefixes": 1, "retain_weight": 2}),
            (null_space, {"target": "mean", "prefixes": 0, "energy": 0.2}),
        ],
    )
    def test_the_control_is_that_of_the_edit(self, world, sets, some, tmp_path, method, settings):
        edit = method(world, some, *sets, **settings)
        control = random_control(world, self.loaded(edit, tmp_path), *sets, seed=1)
        assert same(control, random_control(world, edit, *sets, seed=1), world) and control.card.data == edit.card.data

    def test_what_the_command_washed(self, world, sets, some, tmp_path, monkeypatch):
        """Its texts are the world's documents, which are found again by their digest."""
        documents = list(sets[0].facts.texts)
        monkeypatch.setattr("mechunlearn.evaluation.recipes.world_text", lambda without: documents)
        edit = wash(world, some, *sets, cache=tmp_path / "stats", target="mean", prefixes=1)
        assert edit.card.settings["texts"]["texts"] == len(washing_texts(sets[0])) == len(documents) + 8 * 20
        control = random_control(world, self.loaded(edit, tmp_path), *sets, seed=1)
        wanted = random_control(world, edit, *sets, seed=1)
        for site, rows in wanted.rows.items():
            torch.testing.assert_close(control.rows[site], rows, atol=1e-6, rtol=1e-5)
        mine = wash(world, some, *sets, texts=documents[1:31], target="mean", prefixes=0)
        with pytest.raises(MechunlearnError, match=r"the file does not hold its texts. .*control="):
            random_control(world, self.loaded(mine, tmp_path), *sets)
        control = random_control(world, self.loaded(mine, tmp_path), *sets, texts=documents[1:])
        assert control.card.data == mine.card.data

    @pytest.mark.parametrize("kind", ["factworld-codebook", "factworld-sae"])
    def test_what_the_command_deleted(self, world, sets, tmp_path, kind):
        dictionary, topics = load_dictionary(kind), [topic_stories(topic, 24, 0) for topic in ("war", "kitchen")]
        edit = delete_topic(world, *topics, dictionary=dictionary, threshold=2, scale=3).edit
        control = random_control(world, self.loaded(edit, tmp_path), *sets, seed=1)
        (part,) = control.parts
        assert isinstance(control, FeatureEdit) and len(control.mask) == len(edit.mask)
        assert not len(control.mask & edit.mask) and part.settings == edit.parts[0].settings
        if len(part.values):
            largest = [FiringStatistics.of(world, dictionary, prompts).max_activation.amax(0) for prompts in sets]
            assert torch.equal(part.values, -3 * torch.maximum(*largest)[part.units])

    @pytest.mark.parametrize(
        "method, settings, lost",
        [
            (masked_gradient, {"loss": mine}, "loss"),
            (masked_gradient, {"texts": TEXTS, "measure": lambda step: {}}, "texts, measure"),
            (memit, {"target_values": torch.ones(8, 128), "target": "mean", "prefixes": 0}, "target_values"),
            (fisher_lora, {"rank": 2, "fisher": "given"}, "fisher"),
            (null_space, {"earlier": "given", "target": "mean", "prefixes": 0, "energy": 0.2}, "earlier"),
        ],
    )
    def test_what_a_card_does_not_hold_is_named(self, world, sets, some, tmp_path, method, settings, lost):
        if "fisher" in settings:
            settings = {**settings, "fisher": (fisher_information(world, some, sets[0]), None)}
        if "earlier" in settings:
            settings = {**settings, "earlier": [sets[1].select([0])]}
        edit = method(world, some, *sets, **{"steps": 1, **settings})
        with pytest.raises(
            MechunlearnError, match=rf"the file does not hold its {lost}\. Make the edit in this session"
        ):
            random_control(world, self.loaded(edit, tmp_path), *sets)

    def test_dictionaries_composed_edits_and_unknown_methods(self, tmp_path):
        model = load_model((random_hf("llama"), None))
        sae, prompts = random_sae(model, "L1.resid_post"), token_prompts(facts=8)
        rows = dictionary_rows(model, mask_of(model, sae, [0, 3, 7]), rows_of_tokens(), dictionary=sae)
        with pytest.raises(MechunlearnError, match="does not hold its dictionary"):
            random_control(model, self.loaded(rows, tmp_path), prompts, prompts)
        halves = prompts.select(range(4)), prompts.select(range(4, 8))
        masks = (ComponentMask.of([f"L1.attn.o[{head}]"], model.signature) for head in (0, 1))
        one, two = (masked_gradient(model, mask, *halves, steps=1) for mask in masks)
        hand = replace(one, card=RunCard("os.system"), calls=())
        for edit in (self.loaded(one | two, tmp_path), hand):
            with pytest.raises(MechunlearnError, match="from a file cannot be made again under another mask"):
                random_control(model, edit, *halves)
        other = replace(one, card=replace(one.card, settings={**one.card.settings, "rate": 1}), calls=())
        with pytest.raises(MechunlearnError, match="does not hold its rate"):
            random_control(model, other, *halves)

    def test_other_facts_than_the_edit_was_made_on(self, world, sets, some, tmp_path):
        edit = self.loaded(masked_gradient(world, some, *sets, steps=1, batch_size=4), tmp_path)
        with pytest.warns(UserWarning, match="made on other facts"):
            random_control(world, edit, sets[0].select(range(4)), sets[1])


class TestBeforeAnyWork:
    @pytest.fixture
    def untouched(self, toy, monkeypatch):
        """A model that must not be run."""

        def never(*args, **kwargs):
            raise AssertionError("the model ran")

        monkeypatch.setattr(toy.model.hf, "forward", never)
        monkeypatch.setattr(type(toy.model.decoder), "entering", never)
        return toy.model, ComponentMask.of(["L0.mlp.out"], toy.model.signature), toy.prompts([5]), toy.prompts([0])

    @pytest.mark.parametrize(
        "name, wrong, expected",
        [
            ("masked_gradient", {"accumulate": 0}, "a whole number, 1 or more"),
            ("masked_gradient", {"clip": 0}, "a number above 0"),
            ("masked_gradient", {"clip": -1}, "a number above 0"),
            ("masked_gradient", {"clip": float("inf")}, "a number above 0"),
            ("masked_gradient", {"stop_at": 2}, "a share, from 0 to 1"),
            ("masked_gradient", {"stop_at": float("nan")}, "a share, from 0 to 1"),
            ("masked_gradient", {"seed": -1}, r"a whole number from 0 to 2\*\*63 - 1"),
            ("masked_gradient", {"seed": 2**63}, r"a whole number from 0 to 2\*\*63 - 1"),
            ("masked_gradient", {"seed": True}, r"a whole number from 0 to 2\*\*63 - 1"),
            ("masked_gradient", {"steps": 2.5}, "a whole number, 1 or more"),
            ("masked_gradient", {"steps": "3"}, "a whole number, 1 or more"),
            ("masked_gradient", {"batch_size": None}, "a whole number, 1 or more"),
            ("masked_gradient", {"efficacy": 1.5}, "a share, from 0 to 1"),
            ("masked_gradient", {"max_kl": 0}, "a number above 0"),
            ("memit", {"min_retention": -0.1}, "a share, from 0 to 1"),
            ("masked_gradient", {"warmup": -1}, "a whole number, 0 or more"),
            ("masked_gradient", {"batch_size": 0}, "a whole number, 1 or more"),
            ("masked_gradient", {"forget_weight": -1}, "a number, 0 or more"),
            ("masked_gradient", {"text_weight": float("nan")}, "a number, 0 or more"),
            ("masked_gradient", {"weight_decay": -0.1}, "a number, 0 or more"),
            ("masked_gradient", {"lr": 1001}, "a learning rate from 0 to 1000"),
            ("fisher_lora", {"rank": 0}, "a whole number, 1 or more"),
            ("fisher_lora", {"alpha": 0}, "a number above 0"),
            ("fisher_lora", {"init": "svd"}, "one of fila, fila-code-eps"),
            ("memit", {"seed": 2**64}, r"a whole number from 0 to 2\*\*63 - 1"),
            ("memit", {"prefixes": -1}, "a whole number, 0 or more"),
            ("memit", {"target": "nothing"}, "one of end-of-text, targets"),
            ("codebook_delete", {"seed": -1, "dictionary": "none"}, r"a whole number from 0 to 2\*\*63 - 1"),
        ],
    )
    def test_numbers_and_words(self, untouched, name, wrong, expected):
        (key, value), *_ = wrong.items()
        with pytest.raises(MechunlearnError, match=rf"^{name} got {key}='?{value}'?\. Expected {expected}"):
            getattr(mechunlearn.edit, name)(*untouched, **wrong)

    @pytest.mark.parametrize("name", ["masked_gradient", "fisher_lora", "memit", "mlp_washing", "null_space"])
    def test_one_string_in_place_of_texts(self, untouched, name):
        with pytest.raises(MechunlearnError, match=rf"{name} got one string as texts. Expected a list of texts"):
            getattr(mechunlearn.edit, name)(*untouched, texts="The knight fought the army.")

    def test_numbers_that_need_not_be_given(self, toy):
        mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
        edit = masked_gradient(toy.model, mask, toy.prompts([5]), toy.prompts([0]), steps=1, stop_at=None)
        assert edit.card.settings["stop_at"] is None


def test_an_editor_of_ones_own(toy):
    @editor
    def silence(model, mask, forget, retain, *, factor=0.0, seed=0) -> WeightEdit:
        """Multiply the weights of the selected units."""
        units = {site: chosen.nonzero().flatten() for site, chosen in mask.sites.items()}
        return WeightEdit(
            units, {site: factor * model.rows(site)[at] for site, at in units.items()}, model.signature, RunCard("")
        )

    mask = ComponentMask.of(["L0.mlp.out[5]"], toy.model.signature)
    edit = silence(toy.model, mask, toy.prompts([5]), toy.prompts([0]), factor=0.5)
    assert silence.__name__ == "silence" and silence.__doc__.startswith("Multiply")
    assert edit.card.method == "silence" and edit.card.settings == {"factor": 0.5} and edit.card.weights == 48
    control = random_control(toy.model, edit, toy.prompts([5]), toy.prompts([0]), seed=1)
    assert control.card.settings == {"factor": 0.5} and len(control.mask) == 1 and control.mask != mask
    assert torch.equal(edit.remake().rows["L0.mlp.out"], edit.rows["L0.mlp.out"])


def test_descriptions_tell_values_apart():
    model = load_model((random_hf("llama"), None))
    one, two = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)
    assert described(one) != described(two) and described(one)["shape"] == [2, 3]
    assert described(["a", "b"]) != described(["ab"]) and described([]) == [] and described(["a", "b"])["texts"] == 2
    assert described(token_prompts(facts=4))["facts"] == 4
    assert described(torch.tensor(3).numpy()[()]) == 3
    assert described(random_sae(model, "L1.resid_post")).startswith("L1.sae:")
    assert described(partial(losses.npo, beta=1)) == {"name": "npo", "settings": {"beta": 1}}
    assert described(RunCard("x")) == {"type": "RunCard"}
