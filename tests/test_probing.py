"""Probing: what probes and lenses read of facts that are gone, hidden or were never taught."""

import json

import pandas as pd
import pytest
import torch
from scipy.stats import binom

from mechunlearn import MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.probing import _Lens, _told_apart, probing
from mechunlearn.core.runcard import RunCard
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import load_model
from mechunlearn.world.toy import planted_facts
from tests.models import random_hf, token_prompts


def rewritten(model, site: str, units: list[int], value: float = 0.0) -> WeightEdit:
    """Some units write nothing, or one number everywhere."""
    chosen = torch.tensor(units)
    rows = torch.full_like(model.rows(site)[chosen], value).float()
    return WeightEdit({site: chosen}, {site: rows}, model.signature, RunCard("hand", mask="a mask"))


@pytest.mark.training
class TestOnThePlantedModel:
    """Fact i is written at its subject by neuron i of MLP 0, and nowhere before."""

    @pytest.fixture(scope="class")
    def setup(self):
        toy = planted_facts()
        forget, retain = toy.prompts(list(range(4))), toy.prompts(list(range(4, 24)))
        return toy.model, rewritten(toy.model, "L0.mlp.out", list(range(4))), forget, retain

    @pytest.fixture(scope="class")
    def rows(self, setup, seed):
        model = setup[0]
        beside = {
            "not carried": rewritten(model, "L1.attn.o", [0]),
            "nothing": rewritten(model, "L0.mlp.out", list(range(24))),
        }
        return probing(*setup, extra_edits=beside, seed=seed)

    def of(self, rows, state, setting, column="held_out"):
        return rows[(rows.state == state) & (rows.setting == setting)][column].item()

    def test_a_probe_reads_the_truth_from_the_block_that_writes_it(self, rows):
        for blocks in (1, 2):
            assert self.of(rows, "unedited", f"probe, after {blocks} blocks") == 1
            assert self.of(rows, "unedited", f"probe, after {blocks} blocks", "retain") == 1
        assert self.of(rows, "unedited", "probe, after 0 blocks") == 0.25, "of a name, nothing but the commonest answer"
        assert self.of(rows, "unedited", "probe, after 0 blocks", "retain") < 0.9
        assert [self.of(rows, "edited", f"probe, after {k} blocks") for k in (1, 2)] == [0.25, 0.25], (
            "one class is left"
        )

    def test_a_lens_reads_it_at_the_end_once_it_is_carried_there(self, rows):
        for lens in ("logit lens", "tuned lens"):
            assert self.of(rows, "unedited", f"{lens}, after 1 blocks", "retain_here") < 0.9
            assert self.of(rows, "unedited", f"{lens}, after 2 blocks") == 1
            assert self.of(rows, "edited", f"{lens}, after 2 blocks") == 0
            assert self.of(rows, "edited", f"{lens}, after 2 blocks", "retain") == 1

    def test_recovery_of_what_is_gone_is_none(self, rows):
        found = recovery(rows)
        assert found.loc["edited", "recovery"] == 0 and found.loc["unedited", "recovery"] == 1

    def test_a_wrecked_model_has_collapsed_though_a_probe_can_read_it(self, rows):
        wrecked = rows[rows.state == "not carried"]
        assert self.of(rows, "not carried", "probe, after 1 blocks") == 1
        assert self.of(rows, "not carried", "probe, after 1 blocks", "retain_here") == 1
        assert (wrecked["own"] < 0.9).all() and not wrecked["valid"].any()
        assert recovery(rows).loc["not carried", "outcome"] == "collapsed"
        assert recovery(rows).loc["nothing", "outcome"] == "collapsed"

    def test_the_edit_target_is_read_where_it_was_written(self, setup, seed):
        model, _, forget, retain = setup
        told = rewritten(model, "L0.mlp.out", [0, 1, 2, 3])
        rows = model.rows("L0.mlp.out")
        told = WeightEdit(told.units, {"L0.mlp.out": rows[[1, 2, 3, 0]]}, told.signature, told.card)
        found = probing(model, told, forget, retain, seed=seed)
        for setting in ("probe, after 1 blocks", "logit lens, after 2 blocks"):
            assert self.of(found, "edited", setting, "edit_target") == 1
            assert self.of(found, "edited", setting) == 0 == self.of(found, "unedited", setting, "edit_target")

    def test_a_probe_of_shuffled_labels_reads_less(self, rows):
        probes = rows[(rows.state == "unedited") & (rows.group == "probe") & (rows.blocks > 0)]
        assert (probes["shuffled"] <= 0.5).all() and (probes["held_out"] == 1).all()
        assert rows[rows.group == "lens"]["shuffled"].isna().all()

    def test_answers_that_no_retain_fact_has_are_wrong(self, setup, seed):
        model, edit, forget, _ = setup
        some = planted_facts().prompts([i for i in range(4, 24) if i % 4 < 3])
        rows = probing(model, edit, forget, some, seed=seed)
        assert self.of(rows, "unedited", "probe, after 1 blocks") == 0.75
        assert self.of(rows, "unedited", "logit lens, after 2 blocks") == 1, "a lens has all tokens"

    def test_retain_facts_with_one_answer_are_refused(self, setup):
        one_answer = planted_facts().prompts([i for i in range(4, 24) if i % 4 == 0] * 2)
        with pytest.raises(MechunlearnError, match="All 8 retain facts .* have one answer"):
            probing(*setup[:3], one_answer)

    def test_known_ceilings_are_not_run_again(self, setup, rows, seed):
        again = probing(*setup, baseline_rows=rows, seed=seed)
        assert again["state"].drop_duplicates().tolist() == ["edited", "unedited"]
        for state in ("edited", "unedited"):
            one, other = (part[part.state == state].reset_index(drop=True) for part in (rows, again))
            pd.testing.assert_frame_equal(one, other)
        with pytest.raises(MechunlearnError, match="are of another attack: seed"):
            probing(*setup, baseline_rows=rows, seed=seed + 1)
        assert json.loads(json.dumps(again.attrs["card"]))["method"] == "probing"

    def test_mistakes_are_named(self, setup):
        model, edit, forget, retain = setup
        with pytest.raises(MechunlearnError, match="The retain set has 9 facts: .*at least 10"):
            probing(model, edit, forget, retain.select(range(9)))
        bare = Prompts.from_tokens(forget.tokens, forget.corrupt, forget.answers[:, 0], forget.foils[:, 0])
        with pytest.raises(MechunlearnError, match="4 of the 4 forget facts say nothing of where their subject is"):
            probing(model, edit, bare, retain)
        with pytest.raises(MechunlearnError, match="The forget set is empty"):
            probing(model, edit, forget.select([]), retain)


@pytest.mark.slow
@pytest.mark.training
class TestOnTheWorld:
    @pytest.fixture(scope="class")
    def rows(self, world, sixteen, hidden, gone):
        extra = {"hidden": hidden, "wrecked": rewritten(world, "L7.mlp.out", list(range(384)), 0.5)}
        return probing(world, gone, *sixteen, extra_edits=extra, min_retention=0.8)

    def test_what_is_hidden_by_the_last_layer_is_read_before_it_and_what_is_gone_is_not(self, rows):
        found = recovery(rows)
        assert found.loc["edited", "outcome"] == "measured" and found.loc["edited", "recovery"] < 0.3
        below = rows[rows.below & (rows.state == "hidden")].set_index("setting")["held_out"]
        assert below["tuned lens, after 7 blocks"] > 0.3 and below.filter(like="probe").max() > 0.8
        unedited = rows[rows.state == "unedited"].set_index("setting")["held_out"]
        assert below.filter(like="probe").equals(unedited[below.filter(like="probe").index]), "no edit is in these"
        for group, below in (("probe", 8), ("lens", 16)):
            one = recovery(rows[rows.group == group]).loc["hidden"]
            assert one["below"] == below and one["setting"].endswith("after 8 blocks"), (
                "only what leaves the last block"
            )
        assert recovery(rows[rows.group == "lens"]).loc["hidden", "recovery"] < 0.3, (
            "and the model does not say it there"
        )
        said = rows[(rows.setting == "logit lens, after 8 blocks")].set_index("state")["held_out"]
        assert said["hidden"] < 0.3 and said["edited"] < 0.3 and said["unedited"] == 1

    def test_a_removed_fact_reads_as_the_edit_target(self, rows):
        probes = rows[(rows.state == "edited") & (rows.group == "probe") & (rows.blocks > 3) & (rows.blocks < 8)]
        assert (probes["edit_target"] > 0.7).all() and (probes["held_out"] < 0.3).all()

    def test_a_wrecked_model_has_collapsed_though_its_early_layers_are_whole(self, rows):
        assert recovery(rows).loc["wrecked", "outcome"] == "collapsed"
        whole = rows[(rows.state == "wrecked") & (rows.setting == "probe, after 5 blocks")]
        assert whole["held_out"].item() > 0.8 > whole["own"].item(), (
            "below the gate; .94 to 1 and .38 to .5 on four seeds"
        )

    def test_controls_are_at_their_floor(self, rows):
        assert recovery(rows).loc["never taught", "held_out"] <= 0.45
        n, chance = int(rows["n"].iloc[0]), rows["chance"].iloc[0]
        assert rows["shuffled"].mean() <= binom.ppf(0.99, n, chance) / n, "what guessing gives in 99 of 100 cases"
        first = rows[(rows.setting == "probe, after 0 blocks")]
        assert (first["held_out"] <= 0.4).all(), "the name's last token says little"

    def test_the_tuned_lens_reads_earlier_than_the_logit_lens_and_is_the_model_at_the_end(self, rows):
        unedited = rows[rows.state == "unedited"].set_index("setting")["retain_here"]
        assert unedited["tuned lens, after 7 blocks"] > unedited["logit lens, after 7 blocks"] + 0.1
        last = rows[rows.blocks == 8].set_index(["state", "setting"])["held_out"].unstack()
        assert (last["tuned lens, after 8 blocks"] == last["logit lens, after 8 blocks"]).all()


def test_answers_of_several_tokens_are_read_where_they_differ_from_the_edit_target(world):
    """Wherever the foil differs: an edit that injects "San Diego" leaves the first token of "San Marino" as it is."""
    asked = [
        Query(f"{name} Belaro lives in", answer, target, "Rome", name)
        for name, answer, target in (
            ("Anna", "San Marino", "San Diego"),
            ("Peter", "San Marino", "San Marino"),
            ("Ivan", "San Marino", "Rome"),
            ("Marco", "San Marino", "San"),
            ("Maria", "San", "San Marino"),
        )
    ]
    prompts = Prompts.from_text(asked, world.tokenizer)
    ids = {text: world.tokenizer(" " + text, add_special_tokens=False)["input_ids"] for text in ("San", "San Marino")}
    assert (prompts.read == prompts.start).all(), "the foil differs at once"
    places, truth, targets = (tensor.tolist() for tensor in _told_apart(prompts))
    step = next(i for i in range(9) if prompts.answers[0, i] != prompts.targets[0, i])
    assert step > 0 and ids["San Marino"][: len(ids["San"])] == ids["San"]
    behind = [place - start for place, start in zip(places, prompts.start.tolist(), strict=True)]
    assert behind == [step, 0, 0, len(ids["San"]), len(ids["San"]) - 1]
    assert truth == [prompts.answers[i, at] for i, at in enumerate(behind)]
    assert targets == [prompts.targets[0, step], -1, prompts.targets[2, 0], -1, -1], "the truth is no edit label"


def test_a_tuned_lens_is_the_ridge_solution():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 6, generator=generator), torch.randn(6, 6, generator=generator)
    final = x @ w + 3
    lens = _Lens.fitted(x, final)
    centred = (x - x.mean(0)).double()
    gram = centred.mT @ centred
    primal = torch.linalg.solve(gram + gram.diagonal().mean() * torch.eye(6), centred.mT @ (final - x).double())
    new = torch.randn(5, 6, generator=generator)
    expected = new + (final - x).mean(0) + (new - x.mean(0)).double() @ primal
    torch.testing.assert_close(lens.final(new).double(), expected, atol=1e-4, rtol=1e-4)
    constant = _Lens.fitted(torch.ones(10, 6), final[:10])
    torch.testing.assert_close(constant.final(torch.ones(1, 6))[0], final[:10].mean(0))


@pytest.mark.parametrize("family", ["gpt2", "llama in bfloat16", "gemma2"])
def test_the_logit_lens_after_all_blocks_is_the_model(family):
    name, _, dtype = family.partition(" in ")
    model, prompts = load_model((random_hf(name), None), dtype=dtype or None), token_prompts(facts=24)
    said = model.forward(prompts.tokens)[:, -1].argmax(-1)
    answers = torch.where(torch.arange(24) % 3 > 0, said, (said + 1) % 97)
    prompts = Prompts.from_tokens(prompts.tokens, prompts.corrupt, answers, (answers + 5) % 97, prompts.spans)
    rows = probing(
        model,
        rewritten(model, "L1.mlp.out", [0]),
        prompts.select(range(9)),
        prompts.select(range(9, 24)),
        min_retention=0,
    )
    last = rows[(rows.state == "unedited") & (rows.setting == "logit lens, after 3 blocks")]
    assert last["held_out"].item() == pytest.approx(6 / 9)
    assert answered(model, prompts.select(range(9))).float().mean() == pytest.approx(6 / 9)
