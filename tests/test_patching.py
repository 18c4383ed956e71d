"""Exact patching against the naive loop: one full forward pass a cell."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from mechunlearn import Localization, MechunlearnError
from mechunlearn.facts.prompts import ROLES
from mechunlearn.localize import (
    activation_patching,
    attribution_patching,
    causal_tracing,
    edge_attribution,
    edge_patching,
    path_patching,
)
from mechunlearn.metrics.answers import answer_logprob, logit_diff
from mechunlearn.model.decoder import Decoder
from mechunlearn.model.hooked import load_model
from mechunlearn.patching import preview
from mechunlearn.patching.corruption import with_corruption
from tests.models import random_hf, token_prompts

UNITS = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.out"]
STREAMS = ["attn_out", "mlp_out", "resid_pre", "resid_post", "resid_mid"]


@torch.no_grad()
def naive(model, prompts, site, unit, where, denoise=False, metric=logit_diff) -> float:
    """The effect of one cell, by a whole forward pass with a hook."""
    clean, corrupt = (prompts.corrupt, prompts.tokens) if denoise else (prompts.tokens, prompts.corrupt)
    _, kept = model.cache(corrupt, [site])

    def patch(z):
        mask = where.view(*where.shape, *[1] * (z.ndim - 2)).expand_as(z)
        if unit is not None:
            chosen = torch.zeros(z.shape[2], dtype=torch.bool)
            chosen[unit] = True
            mask = mask & chosen.view(-1, *[1] * (z.ndim - 3))
        return torch.where(mask, kept[site], z)

    before = metric(model.forward(clean), prompts)
    with model.hooks({site: patch}):
        return float((metric(model.forward(clean), prompts) - before).mean())


def test_patching_equals_one_forward_pass_a_cell(model, prompts):
    check_cells(model, prompts, denoise=False)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma3"])
def test_denoising_equals_one_forward_pass_a_cell(family, prompts):
    """Clean and corrupt change places; no family has a part in that, so four are enough."""
    check_cells(load_model((random_hf(family), None)), prompts, denoise=True)


def check_cells(model, prompts, denoise):
    """Some cells of every site, each beside a whole forward pass."""
    streams = STREAMS[:-1] if model.layout.parallel else STREAMS
    found = [activation_patching(model, prompts, kinds=k, by="position", denoise=denoise) for k in (UNITS, streams)]
    assert found[0].roles == ("all", *map(str, range(7)))
    biggest = 0.0
    every = {**found[0].by_role, **found[1].by_role}
    for site, rows in every.items():
        kind = site.split(".", 1)[1]
        for unit in [rows.shape[1] - 1] if "." in kind else [None]:
            for row in (0, 4) if site.startswith("L2") else (3, 7):
                where = torch.ones(4, 7, dtype=torch.bool) if row == 0 else torch.arange(7).expand(4, 7) == row - 1
                expected = naive(model, prompts, site, unit, where, denoise)
                assert float(rows[row, unit or 0]) == pytest.approx(expected, abs=1e-5), (site, unit, row)
                biggest = max(biggest, abs(expected))
    assert biggest > 1e-2, "some cell must matter"


def test_patching_at_token_roles_of_ragged_prompts(world, sport):
    chosen = sport[0].select(range(6))
    assert len(set(chosen.lengths.tolist())) > 1
    found = activation_patching(world, chosen, kinds=["resid_post", "attn.o"], by="role")
    assert found.roles == ("all", *(role for role in ROLES if role != "padding"))
    for site, unit, role in (
        ("L2.resid_post", None, "subject last"),
        ("L6.attn.o", 3, "last"),
        ("L0.resid_post", None, "last"),
    ):
        where = chosen.roles == ROLES.index(role)
        expected = naive(world, chosen, site, unit, where)
        got = float(found.by_role[site][found.roles.index(role), unit or 0])
        assert got == pytest.approx(expected, abs=1e-5)
    assert abs(found.by_role["L3.resid_post"][found.roles.index("subject last"), 0]) > 1


def test_a_custom_metric_sees_all_logits(model, prompts):
    def everywhere(logits, prompts):
        return logits.logsumexp(-1).mean(1)

    found = activation_patching(model, prompts, kinds=["attn.o"], metric=everywhere)
    whole = torch.ones(4, 7, dtype=torch.bool)
    expected = naive(model, prompts, "L1.attn.o", 2, whole, metric=everywhere)
    assert float(found.scores["L1.attn.o"][2]) == pytest.approx(expected, abs=1e-5)


def test_scores_by_position_survive_save_and_load(prompts, tmp_path):
    model = load_model((random_hf("llama"), None))
    found = activation_patching(model, prompts, kinds=["attn.o", "resid_post"], by="position")
    for suffix in (".json", ".safetensors"):
        found.save(tmp_path / f"found{suffix}")
        again = Localization.load(tmp_path / f"found{suffix}")
        assert again.roles == found.roles and set(again.by_role) == set(found.by_role) == set(again.scores) | {
            f"L{layer}.resid_post" for layer in range(3)
        }
        assert all(torch.equal(again.by_role[site], rows) for site, rows in found.by_role.items())


def test_the_cost_is_said_before_the_work(prompts, capsys):
    model = load_model((random_hf("llama"), None))
    activation_patching(model, prompts, kinds=["attn.o"], progress=True)
    out = capsys.readouterr().out
    assert "12 patched runs, about 0 s" in out and "GB beside the weights" in out


def test_a_sweep_above_its_budget_is_refused_before_it_begins(prompts, monkeypatch):
    """The estimate is of the layers and positions that are computed: 3 layers of 48 neurons, positions 2 to 6 of 7."""
    model, begun = load_model((random_hf("llama"), None)), []
    monkeypatch.setattr("mechunlearn.patching.cost._timed", lambda model, prompts, copies: (30.0, 0))
    monkeypatch.setattr("mechunlearn.patching.sweep.sweep", lambda *given: begun.append(given))
    monkeypatch.setattr("mechunlearn.patching.paths.sweep", lambda *given: begun.append(given))
    cost = preview(model, prompts, runs=144, share=2 / 3)  # (1 + 2/3 + 1/3) / 3
    assert cost.runs == 144 and cost.seconds == pytest.approx(144 * 30 * 2 / 3 * 5 / 7)
    minutes = cost.seconds / 60
    for call in (activation_patching, causal_tracing):
        said = f"144 patched runs, about {minutes:.0f} min.*budget is 20 minutes.*neurons=64.*attribution_patching"
        with pytest.raises(MechunlearnError, match=said):
            call(model, prompts, kinds=["mlp.out"])
    with pytest.raises(MechunlearnError, match="15 patched runs, .* budget is 0.1 minutes"):
        path_patching(model, prompts, budget=0.1)
    with pytest.raises(MechunlearnError, match="1 patched runs, .* budget is 0.1 minutes"):
        edge_patching(model, prompts, ["m0->m1"], budget=0.1)
    with pytest.raises(MechunlearnError, match="got budget=0. Expected a number above 0"):
        activation_patching(model, prompts, budget=0)
    assert not begun
    monkeypatch.undo()
    activation_patching(model, prompts, kinds=["attn.o"], budget=None)


def test_whole_mlps_and_heads_are_what_is_patched_unless_neurons_are_asked_for(prompts):
    model = load_model((random_hf("llama"), None))
    usual, asked = activation_patching(model, prompts), activation_patching(model, prompts, kinds=["attn.o", "mlp_out"])
    assert list(usual.scores) == list(asked.scores) and len(usual.scores) == 6
    for site, scores in usual.scores.items():
        assert torch.equal(scores, asked.scores[site]) and len(scores.unique()) == (1 if "mlp" in site else 4)
    whole = torch.ones(4, 7, dtype=torch.bool)
    assert float(usual.scores["L1.mlp.out"][5]) == pytest.approx(
        naive(model, prompts, "L1.mlp_out", None, whole), abs=1e-5
    )


def test_neurons_in_blocks_share_a_score(prompts):
    model = load_model((random_hf("llama"), None))
    found = activation_patching(model, prompts, kinds=["mlp.out"], neurons=20)
    scores = found.scores["L1.mlp.out"]
    assert len(scores) == 48 and len(scores.unique()) == 3
    for block in (slice(0, 20), slice(20, 40), slice(40, 48)):
        expected = naive(model, prompts, "L1.mlp.out", block, torch.ones(4, 7, dtype=torch.bool))
        assert scores[block].tolist() == pytest.approx([expected] * len(scores[block]), abs=1e-5)


def test_patching_under_a_hook_of_yours_patches_the_hooked_model(prompts):
    """An intervention on any site is there once, in every run."""
    model, everywhere = load_model((random_hf("llama"), None)), torch.ones(4, 7, dtype=torch.bool)
    shift = torch.linspace(-1, 1, 32)
    for site in ("L1.resid_pre", "L1.resid_mid", "L0.mlp_out", "L1.resid_post"):
        calls = []

        def move(x, calls=calls):
            calls.append(x)
            return x + shift

        without = float(activation_patching(model, prompts, kinds=["attn.o"]).scores["L1.attn.o"][0])
        with model.hooks({site: move}):
            found = activation_patching(model, prompts, kinds=["attn.o"])
            for layer in (0, 1, 2):
                expected = naive(model, prompts, f"L{layer}.attn.o", 0, everywhere)
                assert float(found.scores[f"L{layer}.attn.o"][0]) == pytest.approx(expected, abs=1e-5), (site, layer)
        assert min(len(x) for x in calls) >= len(prompts), "a hook sees facts, nothing else"
        assert abs(float(found.scores["L1.attn.o"][0]) - without) > 1e-5, "the intervention must matter"


def test_facts_without_a_partner_are_counted(world, sport):
    chosen = sport[0].select(range(8))
    lengths = chosen.lengths.tolist()
    alone = sum(lengths.count(length) == 1 for length in lengths)
    found = activation_patching(
        world,
        chosen.select([lengths.index(max(lengths)), lengths.index(min(lengths))]),
        kinds=["attn_out"],
        corrupt="resample",
    )
    assert "clean and corrupt prompts are the same" in found.note
    some = activation_patching(world, chosen, kinds=["attn_out"], corrupt="resample")
    partner = f"{alone} facts have no corrupt partner"
    assert some.note.startswith(partner) if alone else "partner" not in some.note
    one = replace(chosen, corrupt=torch.cat([chosen.tokens[:1], chosen.corrupt[1:]]))
    assert activation_patching(world, one, kinds=["attn_out"]).note.startswith("1 facts have no corrupt partner")


def test_a_metric_needs_no_name(prompts):
    model = load_model((random_hf("gpt2"), None))
    unnamed = partial(logit_diff)
    for method in (activation_patching, attribution_patching, edge_attribution, path_patching):
        assert "logit_diff" in method(model, prompts, metric=unnamed).card.settings["metric"]


def test_a_whole_layers_score_goes_to_each_of_its_units(prompts):
    model = load_model((random_hf("gpt2"), None))
    found = activation_patching(model, prompts, kinds=["mlp_out", "attn_out"])
    expected = naive(model, prompts, "L2.mlp_out", None, torch.ones(4, 7, dtype=torch.bool))
    assert float(found.scores["L2.mlp.out"][5]) == pytest.approx(expected, abs=1e-5)
    assert len(found.scores["L2.mlp.out"].unique()) == 1 and set(found.by_role) >= {"L0.attn_out"}
    with pytest.raises(MechunlearnError, match="score the same units"):
        activation_patching(model, prompts, kinds=["mlp_out", "mlp.out"])


@pytest.mark.parametrize("corrupt", ["random", "resample", "noise", "zero", "mean"])
def test_every_corruption_is_what_it_says(corrupt, prompts):
    model = load_model((random_hf("llama"), None))
    found = activation_patching(model, prompts, kinds=["attn.o"], corrupt=corrupt, seed=3)
    again = activation_patching(
        model, prompts, kinds=["attn.o"], corrupt=corrupt, seed=3, batch_size=1 if corrupt != "resample" else 4
    )
    torch.testing.assert_close(found.scores["L1.attn.o"], again.scores["L1.attn.o"], atol=1e-5, rtol=1e-4)
    assert found.scores["L1.attn.o"].abs().max() > 1e-4
    if corrupt in ("random", "noise"):
        other = activation_patching(model, prompts, kinds=["attn.o"], corrupt=corrupt, seed=4)
        assert not torch.allclose(found.scores["L1.attn.o"], other.scores["L1.attn.o"])
    if corrupt == "zero":
        with torch.no_grad(), model.hooks({"L1.attn.o": lambda z: z.index_fill(2, torch.tensor([2]), 0.0)}):
            zeroed = logit_diff(model.forward(prompts.tokens), prompts)
        expected = float((zeroed - logit_diff(model.forward(prompts.tokens), prompts)).mean())
        assert float(found.scores["L1.attn.o"][2]) == pytest.approx(expected, abs=1e-5)
    if corrupt == "mean":
        _, kept = model.cache(prompts.tokens, ["L1.attn.o"])
        z = kept["L1.attn.o"]
        mean = torch.stack([z[prompts.roles == r].mean(0) for r in range(len(ROLES) - 1)]).nan_to_num()
        with (
            torch.no_grad(),
            model.hooks(
                {"L1.attn.o": lambda x: torch.cat([x[:, :, :2], mean[prompts.roles][:, :, 2:3], x[:, :, 3:]], 2)}
            ),
        ):
            changed = logit_diff(model.forward(prompts.tokens), prompts)
        expected = float((changed - logit_diff(model.forward(prompts.tokens), prompts)).mean())
        assert float(found.scores["L1.attn.o"][2]) == pytest.approx(expected, abs=1e-5)


def test_corrupt_tokens_differ_only_where_they_should(world, sport):
    chosen = sport[0].select(range(8))
    random = with_corruption(chosen, "random", 0, world)
    changed = random.corrupt != chosen.tokens
    inside = torch.stack(
        [(torch.arange(changed.shape[1]) >= a) & (torch.arange(changed.shape[1]) <= b) for a, b in chosen.spans]
    )
    assert changed.any(1).all() and not (changed & ~inside).any()
    other = with_corruption(chosen, "resample", 0, world)
    assert sorted(map(tuple, other.corrupt.tolist())) == sorted(map(tuple, chosen.tokens.tolist()))


def test_several_answer_tokens_are_patched_too(world, sport):
    """Half of the answers get a second token: the patched log-probability equals that of whole forward passes."""
    chosen = sport[0].select(range(4))
    second = torch.tensor([[5], [-1], [7], [-1]])
    tokens = torch.zeros(4, chosen.tokens.shape[1] + 1, dtype=torch.long)
    tokens[:, :-1] = chosen.tokens
    lengths = chosen.lengths + (second[:, 0] >= 0)
    for row in range(4):
        if second[row] >= 0:
            tokens[row, chosen.lengths[row]] = chosen.answers[row, 0]
    corrupt = torch.where(tokens == 0, tokens, tokens)
    corrupt[:, :-1] = torch.where(chosen.tokens != chosen.corrupt, chosen.corrupt, tokens[:, :-1])
    roles = torch.cat([chosen.roles, torch.full((4, 1), ROLES.index("padding"))], 1)
    longer = replace(
        chosen,
        tokens=tokens,
        corrupt=corrupt,
        roles=roles,
        lengths=lengths,
        answers=torch.cat([chosen.answers, second], 1),
    )
    found = activation_patching(world, longer, kinds=["attn_out"], metric=answer_logprob)
    where = torch.ones_like(tokens, dtype=torch.bool)
    expected = naive(world, longer, "L5.attn_out", None, where, metric=answer_logprob)
    assert float(found.scores["L5.attn.o"][0]) == pytest.approx(expected, abs=1e-4)


def test_running_out_of_memory_halves_the_batch(prompts, monkeypatch):
    model = load_model((random_hf("llama"), None))
    whole = activation_patching(model, prompts, kinds=["attn.o"])
    from mechunlearn.patching import sweep as patching

    real, sizes = patching._run, []

    def small_memory(decoder, base, patches, chunk, enters, restart):
        sizes.append(len(chunk))
        if len(chunk) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(decoder, base, patches, chunk, enters, restart)

    monkeypatch.setattr(patching, "_run", small_memory)
    found = activation_patching(model, prompts, kinds=["attn.o"])
    assert max(sizes) > 2 and sizes[-1] <= 2
    torch.testing.assert_close(found.scores["L2.attn.o"], whole.scores["L2.attn.o"], atol=1e-6, rtol=0)
    monkeypatch.setattr(
        patching, "_run", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(MechunlearnError, match="Out of memory with one at a time"):
        activation_patching(model, prompts, kinds=["attn.o"])


@pytest.mark.parametrize("method", [attribution_patching, edge_attribution], ids=lambda f: f.__name__)
def test_attribution_halves_its_batch_too(prompts, monkeypatch, method):
    model = load_model((random_hf("llama"), None))
    whole = method(model, prompts)
    real, sizes = model.decoder.record, []

    def small_memory(self, tokens, *args, **kwargs):
        sizes.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tokens, *args, **kwargs)

    monkeypatch.setattr(Decoder, "record", small_memory)
    found = method(model, prompts)
    assert max(sizes) == 4 and sizes[-1] == 2
    pairs = zip(scores_of(found), scores_of(whole), strict=True)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)


def scores_of(found) -> list[torch.Tensor]:
    return list(found.scores.values()) if isinstance(found, Localization) else [found.scores]


class TestBadInput:
    @pytest.fixture
    def model(self):
        return load_model((random_hf("llama"), None))

    def test_unknown_names(self, model, prompts):
        for wrong, message in (
            ({"kinds": ["mlp.nothing"]}, "No activation site 'L0.mlp.nothing'"),
            ({"corrupt": "chaos"}, "Unknown corruption 'chaos'. Expected one of prompts"),
            ({"by": "fact"}, "Cannot patch by 'fact'"),
            ({"corrupt": "zero", "denoise": True}, "no corrupt run to restore"),
            ({"neurons": 0}, "got neurons=0. Expected a whole number, 1 or more"),
            ({"neurons": 64}, "Cannot patch 64 neurons at a time with kinds .*Expected .*'mlp.out' among the kinds"),
            ({"kinds": []}, "Expected some, such as"),
            ({"kinds": ["attn.o", "attn.o"]}, "name one twice"),
            ({"batch_size": 0}, "batch_size=0. Expected a whole number, 1 or more"),
        ):
            with pytest.raises(MechunlearnError, match=message):
                activation_patching(model, prompts, **wrong)

    def test_a_metric_of_the_wrong_shape(self, model, prompts):
        with pytest.raises(MechunlearnError, match=r"returned shape \(4, 97\). Expected one number a fact"):
            activation_patching(model, prompts, metric=lambda logits, prompts: logits[:, -1])

    def test_a_fact_longer_than_the_context(self, model):
        with pytest.raises(MechunlearnError, match="has 70 tokens, the model's context is 64"):
            activation_patching(model, token_prompts(length=70))

    def test_activations_that_overflow(self, model, prompts):
        with torch.no_grad():
            model.hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
        with pytest.raises(MechunlearnError, match="not finite; activations first overflow at layer 1"):
            activation_patching(model, prompts)

    def test_no_difference_says_so(self, model, prompts):
        found = activation_patching(model, replace(prompts, corrupt=prompts.tokens), kinds=["attn.o"])
        assert "clean and corrupt prompts are the same" in found.note and len(found.above(0)) == 0

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_hooks_are_removed_after_any_error(self, model, prompts, error):
        calls = []

        def metric(logits, prompts):
            calls.append(1)
            if len(calls) > 3:
                raise error("stop")
            return logit_diff(logits, prompts)

        before = model.forward(prompts.tokens)
        with pytest.raises(error):
            activation_patching(model, prompts, metric=metric)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
        assert not any("forward" in vars(m) for m in model.hf.modules())
        assert torch.equal(model.forward(prompts.tokens), before)


def test_a_bar_is_shown_when_asked_for_and_never_in_a_pipe(toy, capsys):
    activation_patching(toy.model, toy.prompts([1]), kinds=["attn.o"])
    attribution_patching(toy.model, toy.prompts([1]))
    assert capsys.readouterr().out == ""
    activation_patching(toy.model, toy.prompts([1, 2]), kinds=["attn.o"], batch_size=1, progress=True)
    out = capsys.readouterr().out
    assert "4 patched runs, about" in out and "patched runs" in out and "8/8" in out
    for localizer, title in ((attribution_patching, "attribution patching"), (path_patching, "patched paths")):
        localizer(toy.model, toy.prompts([1, 2]), progress=True)
        out = capsys.readouterr().out
        assert title in out and ("patched runs, about" in out) == (localizer is path_patching)
