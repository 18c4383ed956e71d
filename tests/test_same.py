"""The right edit on the right thing: another model, other facts or an edit that is applied already are noticed."""

import warnings

import pytest
import torch

from mechunlearn import ComponentMask, MechunlearnError, WeightEdit, evaluate, load_edit, load_facts, load_model
from mechunlearn.attack import quantization
from mechunlearn.cli import main as cli
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import fisher_lora, masked_gradient
from mechunlearn.evaluation.same import check_names, check_same
from mechunlearn.world.toy import planted_facts


@pytest.fixture(scope="module")
def sets(world):
    return load_facts("factworld/sport").prompts(world).split(forget=4, retain=8, seed=0)


@pytest.fixture(scope="module")
def made(world, sets):
    return masked_gradient(world, ComponentMask.of(["L1.mlp.out[0]"], world.signature), *sets, lr=1e-3, steps=1)


def warned(call):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in told if "edit was made" in str(each.message)]


class TestEvaluate:
    def test_what_it_was_made_for_is_silent(self, world, made, sets):
        assert warned(lambda: check_same(world, made, *sets)) == []
        assert made.card.sets == {"forget": sets[0].fingerprint, "retain": sets[1].fingerprint}

    def test_another_forget_set_is_warned_of(self, world, made, sets):
        other = load_facts("factworld/sport").prompts(world).split(forget=4, retain=8, seed=1)
        assert warned(lambda: check_same(world, made, other[0], sets[1])) == [
            "The edit was made with another forget set than this one."
        ]
        assert len(warned(lambda: check_same(world, made, *other))) == 2

    def test_another_checkpoint_is_warned_of(self, made, sets):
        (told,) = warned(lambda: check_same(load_model("factworld-twin"), made, *sets))
        assert told.startswith("The edit was made on other weights")

    def test_an_edit_that_is_in_the_model_is_refused(self, made, sets):
        model = load_model("factworld")
        made.apply_(model)
        with pytest.raises(MechunlearnError, match="The edit is in this model already"):
            evaluate(model, made, forget=sets[0], retain=sets[1])

    def test_sets_that_share_a_fact_are_refused(self, world, made, sets):
        forget, retain = sets
        with pytest.raises(MechunlearnError, match="4 of 4 forget facts are in the retain set too"):
            evaluate(world, made, forget=forget, retain=forget)
        both = load_facts("factworld/sport").prompts(world)
        with pytest.raises(MechunlearnError, match="4 of 4 forget facts"):
            check_same(world, made, forget, both)
        assert not forget.pairs & retain.pairs and len(both.pairs) == len(both)

    @pytest.mark.parametrize("name", ["before", "after", "control"])
    def test_a_column_of_its_own_is_not_taken(self, world, made, sets, name):
        with pytest.raises(MechunlearnError, match=f"The name '{name}' in others= is a column of the report itself"):
            evaluate(world, made, forget=sets[0], retain=sets[1], others={name: made})
        check_names(["mine"])


class TestApply:
    def test_the_model_it_was_made_on_is_silent_and_so_is_a_second_time(self, made):
        model = load_model("factworld")
        assert warned(lambda: made.apply_(model)) == []
        assert made.is_applied(model)
        assert warned(lambda: made.apply_(model)) == []

    @pytest.mark.parametrize("other", ["checkpoint", "dtype", "data"])
    def test_other_weights_are_warned_of_and_edited(self, made, other):
        name, dtype = (
            ("factworld-twin" if other == "checkpoint" else "factworld"),
            "bfloat16" if other == "dtype" else None,
        )
        model = load_model(name, dtype=dtype)
        if other == "data":
            model.hf.model.layers[3].mlp.down_proj.weight.data.mul_(1.01)
        (told,) = warned(lambda: made.apply_(model))
        assert told.startswith("This edit was made on other weights") and made.is_applied(model)

    def test_an_edit_by_hand_knows_no_model(self, world, made):
        bare = WeightEdit(made.units, made.rows, made.signature, RunCard("by hand"))
        model = load_model("factworld-twin")
        assert warned(lambda: bare.apply_(model)) == []

    def test_a_low_rank_edit_is_refused_on_other_weights(self, world, sets):
        edit = fisher_lora(world, ComponentMask.of(["L1.mlp.out"], world.signature), *sets, rank=1, lr=1e-3, steps=1)
        model = load_model("factworld")
        model.hf.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
        with pytest.raises(MechunlearnError, match="A low-rank edit adds to the weights it was made on"):
            edit.apply_(model)


class TestCommandLine:
    def test_evaluate_draws_the_sets_that_the_edit_was_made_with(self, tmp_path, monkeypatch, capsys, world):
        """Neither --forget nor --seed is given again."""
        monkeypatch.setattr("mechunlearn.evaluation.cells.LIMIT", 10)
        monkeypatch.setattr("mechunlearn.evaluation.cells.OWN_COUNT", 2)

        def run(*words):
            monkeypatch.setattr("sys.argv", ["mechunlearn", *map(str, words)])
            try:
                cli.main()
            except SystemExit as ended:
                assert ended.code in (0, None), capsys.readouterr().err
            return " ".join(capsys.readouterr().out.split())

        mask, edit = tmp_path / "it.mask.json", tmp_path / "it.edit.safetensors"
        ComponentMask.of(["L1.mlp.out[0]"], world.signature).save(mask)
        drawn = ("--forget", 4, "--seed", 3)
        run("edit", "factworld", "factworld/sport", mask, "-o", edit, "--steps", 1, "--lr", 1e-3, *drawn)
        assert {name: load_edit(edit).card.sets[name] for name in ("facts", "count", "seed")} == {
            "facts": "factworld/sport",
            "count": 4,
            "seed": 3,
        }
        said = run("evaluate", "factworld", "factworld/sport", edit, "-o", tmp_path / "same.html")
        assert "warning" not in said
        said = run("evaluate", "factworld", "factworld/sport", edit, "-o", tmp_path / "other.html", "--seed", 4)
        assert "warning: The edit was made with another forget set than this one." in said

    @pytest.mark.parametrize("number", [-1, 1.5, "3", True, None, 2**70])
    def test_numbers_of_a_strangers_card_are_checked(self, number):
        from mechunlearn.cli.evaluate import _drawn

        with pytest.raises(MechunlearnError, match="The edit's card says count="):
            _drawn({"count": number}, "count", None, 64)
        assert _drawn({"count": number}, "count", 8, 64) == 8
        assert _drawn({}, "count", None, 64) == 64


def test_rows_are_compared_bit_by_bit(world, made):
    model = load_model("factworld")
    made.apply_(model)
    with torch.no_grad():
        model.hf.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-6
    assert not made.is_applied(model)


def test_an_attack_refuses_sets_that_share_facts():
    """Its gate would watch facts that the edit removed."""
    toy = planted_facts()
    forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts(list(range(3, 16)))
    mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    made = masked_gradient(toy.model, mask, forget, toy.prompts([4, 5]), steps=1, lr=0.1)
    with pytest.raises(MechunlearnError, match="1 of 4 forget facts are in the retain set too"):
        quantization(toy.model, made, forget, retain)
