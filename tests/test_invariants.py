"""Invariants, over every method: the folders are walked, so a new file is tested before anyone writes a test for it."""

import importlib
import inspect
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import mechunlearn
from mechunlearn import Circuit, Component, ComponentMask, Localization, MechunlearnError, load_facts
from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.methods import CALLED_WITH, RETURNS, methods, ready_methods
from mechunlearn.edit import codebook_delete, feature_clamp
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.localize import (
    attribution_patching,
    causal_tracing,
    direct_logit_attribution,
    feature_discovery,
)
from mechunlearn.metrics.answers import measure
from mechunlearn.model.component import SCORED
from mechunlearn.model.hooked import load_model
from mechunlearn.training.covariance import Covariance
from tests.handmade import axes, entering, mask_of, planted, random_codebook, random_sae
from tests.models import random_hf, token_prompts


def functions(folder: str) -> list:
    """Every method of a folder that returns what its kind returns."""
    return [method.function for method in methods(folder).values() if method.returns in RETURNS[folder]]


def takes(function, *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


LOCALIZERS, EDITORS = functions("localize"), functions("edit")
CLOSED_FORM = [f for f in EDITORS if takes(f, "covariance")]
FEATURE = [f for f in EDITORS if takes(f, "dictionary")]  # of a dictionary's units, in the mask too
WEIGHTS = [f for f in EDITORS if f not in FEATURE]
UNPAIRED = [causal_tracing, feature_discovery]
PAIRED = [f for f in LOCALIZERS if takes(f, "metric") and f not in UNPAIRED]
UNITS = [f for f in PAIRED if takes(f, "kinds")]
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2")


def discovery(rule: str):
    """Discovery by another than its usual rule, as a method of its own."""
    made = partial(feature_discovery, by=rule)
    made.__name__ = f"feature_discovery_{rule}"
    return made


WALKED = [*LOCALIZERS, discovery("squared"), discovery("attribution")]


def named(function) -> str:
    return function.__name__


def parameters_of(model) -> dict:
    return {name: p.detach().clone() for name, p in (*model.hf.named_parameters(), *model.bridge.named_parameters())}


def outcome(toy, method):
    return located(method, toy.model, toy.prompts())


def found_by(method, model, prompts, **settings) -> Localization | Circuit:
    """What a method finds. Features are the dimensions of the residual stream, single edges some of each kind."""
    if takes(method, "dictionary"):
        settings = {"dictionary": axes(model, "L0.resid_post"), **settings}
    if takes(method, "names"):
        settings = {"names": ["m0->m1", "a0.h1->logits", "m1->logits", "m0->a1.h0<v>"], **settings}
    return method(model, prompts, **settings)


def located(method, model, prompts, **settings) -> Localization:
    """What a method finds, by unit; a circuit by its nodes."""
    found = found_by(method, model, prompts, **settings)
    return found if isinstance(found, Localization) else found.nodes()


@pytest.mark.parametrize("folder", CALLED_WITH)
def test_the_walk_finds_every_file_that_is_named_like_its_function(folder):
    root = Path(mechunlearn.__file__).parent / folder
    named_alike = {f.stem for f in root.glob("*.py") if f"\ndef {f.stem}(" in f.read_text()}
    assert set(methods(folder)) == named_alike and len(named_alike) > 5
    package = importlib.import_module(f"mechunlearn.{folder}")
    assert named_alike <= set(dir(package)) and named_alike <= set(package.__all__)
    assert all(getattr(package, name) is method.function for name, method in methods(folder).items())
    assert set(ready_methods(folder)) <= {f.__name__ for f in functions(folder)}


@pytest.mark.parametrize("localizer", LOCALIZERS, ids=named)
def test_every_localizer_takes_a_seed_and_shows_progress(localizer):
    parameters = inspect.signature(localizer).parameters
    assert (parameters["seed"].default, parameters["progress"].default) == (0, None)
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])


@pytest.mark.parametrize("localizer", ready_methods("localize"))
def test_a_data_set_is_as_good_as_its_prompts(localizer, world):
    """And the card says how the result was made, whatever the method."""
    facts, localizer = load_facts("factworld/sport").select(range(4)), methods("localize")[localizer]
    one, two = localizer(world, facts, seed=3), localizer(world, facts.prompts(world), seed=3)
    one, two = (found if isinstance(found, Localization) else found.nodes() for found in (one, two))
    assert all(torch.equal(one.scores[site], two.scores[site]) for site in two.scores)
    card = {"method": localizer.name, "model": world.fingerprint, "data": facts.prompts(world).fingerprint, "seed": 3}
    assert all(getattr(one.card, name) == value for name, value in card.items()) and one.card.seconds > 0
    recorded = {"model", "prompts", "seed", "batch_size", "budget", "progress"}
    assert set(one.card.settings) == set(localizer.takes) - recorded
    with pytest.raises(MechunlearnError, match="the prompts are empty"):
        localizer(world, facts.prompts(world).select([]))


@pytest.mark.parametrize("localizer", WALKED, ids=named)
def test_a_localizer_leaves_no_trace(localizer, toy):
    for parameter in toy.model.hf.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, flags = parameters_of(toy.model), [p.requires_grad for p in toy.model.hf.parameters()]
    random_state = torch.get_rng_state()
    logits = toy.model.forward(toy.prompts().tokens)
    outcome(toy, localizer)
    assert all(torch.equal(before[name], p) for name, p in parameters_of(toy.model).items())
    assert [p.requires_grad for p in toy.model.hf.parameters()] == flags and not toy.model.hf.training
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in toy.model.hf.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(toy.model.forward(toy.prompts().tokens), logits), "a hook was left behind"
    assert not any(p.fwd_hooks or p.bwd_hooks for p in toy.model.bridge.hook_dict.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in toy.model.hf.modules())


@pytest.mark.parametrize("localizer", WALKED, ids=named)
def test_a_localization_survives_save_and_load(localizer, toy, tmp_path):
    found = outcome(toy, localizer)
    for suffix in (".json", ".safetensors"):
        found.save(tmp_path / f"found{suffix}")
        again = Localization.load(tmp_path / f"found{suffix}")
        assert all(torch.equal(again.scores[s], found.scores[s]) for s in found.scores) and again.card == found.card
        assert (again.evidence, again.note, again.total_weights) == (found.evidence, found.note, found.total_weights)
        assert again.by_fact.keys() == found.by_fact.keys()
        assert all(torch.equal(again.by_fact[site], facts) for site, facts in found.by_fact.items())


@pytest.mark.parametrize("localizer", WALKED, ids=named)
def test_scores_by_fact_average_to_the_scores(localizer, toy):
    found = outcome(toy, localizer)
    none = {"fact_lookup", "random_units"}  # scores that are no mean over facts
    assert bool(found.by_fact) != (named(localizer) in none or takes(localizer, "dictionary"))
    assert not found.by_fact or found.by_fact.keys() == found.scores.keys()
    for site, facts in found.by_fact.items():
        assert len(facts) == len(toy.prompts())
        torch.testing.assert_close(facts.mean(0), found.scores[site], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("localizer", WALKED, ids=named)
def test_the_same_seed_gives_the_same_scores(localizer, toy):
    one, two = outcome(toy, localizer), outcome(toy, localizer)
    assert all(torch.equal(one.scores[s], two.scores[s]) for s in one.scores)


@pytest.mark.parametrize("localizer", PAIRED, ids=named)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_found_when_corrupt_equals_clean(localizer, family):
    model, prompts = load_model((random_hf(family), None)), token_prompts()
    same = Prompts.from_tokens(prompts.tokens, prompts.tokens, prompts.answers[:, 0], prompts.foils[:, 0])
    nothing = found_by(localizer, model, same)
    assert max(s.abs().max() for s in located(localizer, model, same).scores.values()) == 0
    assert "clean and corrupt prompts are the same" in nothing.note
    assert max(s.abs().max() for s in located(localizer, model, prompts).scores.values()) > 1e-4, "could be found"


RAGGED = [*PAIRED, causal_tracing, direct_logit_attribution]
RAGGED += [discovery("attribution")]  # the other rules compare sums over all texts, not one text after another


@pytest.mark.parametrize("localizer", RAGGED, ids=named)
def test_a_padded_batch_gives_the_scores_of_single_facts(localizer, world, sport):
    forget, _ = sport
    chosen = forget.select(range(6))
    assert len(set(chosen.lengths.tolist())) > 1, "the batch must be ragged"
    together = located(localizer, world, chosen)
    single = [located(localizer, world, _unpadded(chosen, i)) for i in range(6)]
    assert max(scores.abs().max() for scores in together.scores.values()) > 1e-2
    for site, scores in together.scores.items():
        mean = torch.stack([found.scores[site] for found in single]).mean(0)
        torch.testing.assert_close(scores, mean, atol=1e-5, rtol=1e-4)
    for site, facts in together.by_fact.items():
        alone = torch.stack([found.scores[site] for found in single])
        torch.testing.assert_close(facts, alone, atol=1e-4, rtol=1e-4)


def _unpadded(prompts: Prompts, row: int) -> Prompts:
    one = prompts.select([row])
    length = int(one.lengths[0])
    return replace(one, tokens=one.tokens[:, :length], corrupt=one.corrupt[:, :length], roles=one.roles[:, :length])


@pytest.mark.parametrize("rule", ["gradient", "relp"])
def test_attribution_equals_patching_where_the_metric_is_linear(rule):
    """Behind the last block with its normalisation held, a linear metric makes the estimate exact."""
    model, prompts = load_model((random_hf("gpt2"), None)), token_prompts()
    localizer = partial(attribution_patching, rule=rule)

    def linear(logits, prompts):
        return held["L2.resid_post"][:, -1].sum(-1)

    held: dict = {}
    with model.hooks({"L2.resid_post": lambda resid: held.__setitem__("L2.resid_post", resid)}):
        found = localizer(model, prompts, metric=linear, kinds=("mlp.out",))
        _, corrupt = model.cache(prompts.corrupt, ["L2.mlp.out"])
        with torch.no_grad():
            model.forward(prompts.tokens)
            clean = linear(None, prompts)
            for unit in (0, 7):

                def patch(z, unit=unit):
                    z = z.clone()
                    z[..., unit] = corrupt["L2.mlp.out"][..., unit]
                    return z

                with model.hooks({"L2.mlp.out": patch}):
                    model.forward(prompts.tokens)
                effect = (linear(None, prompts) - clean).mean()
                torch.testing.assert_close(found.scores["L2.mlp.out"][unit], effect, atol=1e-5, rtol=1e-4)


def edited(editor, model, mask, forget, retain, text=None, **settings):
    """The editor's edit, with those of the settings that it has.

    Adapters have rank 1 and a null space much energy, which fit any mask. A closed form has statistics of `text`, prompts
    without padding (random tokens, unless given), and washes every layer. An editor of features has its dictionary.
    """
    given = {"rank": 1, "energy": 0.6, "eliminate": False}
    if editor in FEATURE:
        given["dictionary"] = dictionary_for(editor, model)
    if editor in CLOSED_FORM:
        given["covariance"] = statistics(model, mask, text)
    taken = inspect.signature(editor).parameters
    return editor(model, mask, forget, retain, **{k: v for k, v in {**given, **settings}.items() if k in taken})


def statistics(model, mask, text=None) -> Covariance:
    """The second moments of the mask's MLP outputs over more tokens than there are neurons."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, 97, (40, 8), generator=generator) if text is None else text.tokens.repeat(8, 1)
    sites = [site for site in mask.sites if Component.parse(site).kind == "mlp.out"]
    return Covariance(model, sites).update(rows, torch.full((len(rows),), rows.shape[1]))


def dictionary_for(editor, model):
    return (random_codebook if editor is codebook_delete else random_sae)(model, "L1.resid_post")


def suited_mask(editor, model, prompts) -> ComponentMask:
    """A mixed mask, or of features some that are active at the prompts and one that hardly is."""
    if editor not in FEATURE:
        return mixed_mask(model)
    dictionary = dictionary_for(editor, model)
    often = dictionary.encode(entering(model, prompts.tokens, "L1.resid_post")).sum((0, 1)).argsort(descending=True)
    return mask_of(model, dictionary, [*often[:3].tolist(), int(often[-1])])


def moved_by(editor, mask, edit) -> ComponentMask | None:
    """What the editor moves of a mask: a closed form the outputs of its MLPs alone, a hook on activations no weight."""
    if editor in FEATURE:
        return None if isinstance(edit, FeatureEdit) else edit.mask
    kinds = ["mlp.out"] if editor in CLOSED_FORM else {component.kind for component in mask}
    return ComponentMask.of([component for component in mask if component.kind in kinds], mask.signature)


def known(model, prompts) -> Prompts:
    """The same prompts with the model's own answers, which closed forms ask for; foils are other tokens still."""
    with torch.no_grad():
        logits = model.forward(prompts.tokens).cpu()
    answers = logits[torch.arange(len(prompts)), prompts.start].argmax(-1)[:, None]
    foils = torch.where(prompts.foils == answers, (answers + 1) % 97, prompts.foils)
    return replace(prompts, answers=answers, foils=foils, targets=foils)


def mixed_mask(model) -> ComponentMask:
    """Some heads of every projection, some neurons, one whole matrix."""
    kinds = model.layout.kinds
    some = [f"L1.{kind}[{unit}]" for kind in kinds for unit in (0, 1)]
    return ComponentMask.of([*some, "L0.mlp.out"], model.signature)


@pytest.mark.parametrize("editor", EDITORS, ids=named)
@pytest.mark.parametrize("family", FAMILIES)
class TestEditors:
    @pytest.fixture
    def made(self, editor, family):
        model = load_model((random_hf(family), None))
        prompts = known(model, token_prompts(facts=8))
        mask = suited_mask(editor, model, prompts)
        before = parameters_of(model)
        grads = [p.grad for p in model.hf.parameters()]
        halves = prompts.select(range(4)), prompts.select(range(4, 8))
        edit = edited(editor, model, mask, *halves, steps=3, lr=0.05, weight_decay=0.1)
        assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items()), "the model was changed"
        assert [p.grad for p in model.hf.parameters()] == grads
        return model, mask, edit, before, prompts

    @pytest.mark.training
    def test_an_edit_moves_only_what_its_mask_selects(self, made, editor, family):
        model, mask, edit, before, _ = made
        assert isinstance(edit, Edit)
        moving = moved_by(editor, mask, edit)
        inside = {} if moving is None else moving.parameter_masks(model)
        assert editor in FEATURE or inside.keys() <= mask.parameter_masks(model).keys()
        with edit.applied(model):
            after = dict(model.hf.named_parameters())
            for name, parameter in after.items():
                outside = ~inside.get(name, torch.zeros_like(parameter, dtype=torch.bool))
                assert torch.equal(parameter[outside], before[name][outside]), f"{name} moved outside the mask"
            moved = [name for name in inside if not torch.equal(after[name], before[name])]
        matrices = {name for name in inside if after[name].ndim == 2}
        few = getattr(edit, "low_rank", {})
        assert set(moved) == (matrices if few else set(inside)), "every selected matrix can move"

    def test_undo_is_bit_identical(self, made):
        model, _, edit, before, prompts = made
        logits = model.forward(prompts.tokens)
        with edit.applied(model):
            assert not torch.equal(model.forward(prompts.tokens), logits)
        assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items())
        assert torch.equal(model.forward(prompts.tokens), logits)

    def test_undo_happens_after_an_error_too(self, made):
        model, _, edit, before, _ = made
        with pytest.raises(RuntimeError, match="inside"), edit.applied(model):
            raise RuntimeError("inside")
        assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items())

    def test_an_edit_made_on_the_hooked_model_does_the_same_to_the_hugging_face_model(self, made):
        model, _, edit, _, prompts = made
        with edit.applied(model), torch.no_grad():
            hooked, plain = model.forward(prompts.tokens), model.hf(prompts.tokens).logits
        torch.testing.assert_close(hooked, plain, atol=5e-5, rtol=1e-4)

    def test_saving_and_loading_is_bit_identical(self, made, tmp_path):
        model, _, edit, _, prompts = made
        edit.save(tmp_path / "made.safetensors")
        again = type(edit).load(tmp_path / "made.safetensors")
        assert again.card == edit.card and again.mask == edit.mask
        with edit.applied(model):
            logits = model.forward(prompts.tokens)
        with again.applied(model):
            assert torch.equal(model.forward(prompts.tokens), logits)

    @pytest.mark.training
    def test_the_same_seed_gives_the_same_edit(self, made, editor, family):
        model, mask, edit, _, prompts = made
        halves = prompts.select(range(4)), prompts.select(range(4, 8))
        again = edited(editor, model, mask, *halves, steps=3, lr=0.05, weight_decay=0.1)
        one, other = content(edit, model), content(again, model)
        assert one and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    def test_a_mask_of_another_architecture_is_refused(self, made, editor, family):
        model, _, _, _, prompts = made
        other = ComponentMask.of(["L0.mlp.out"], load_model((random_hf("qwen3"), None)).signature)
        with pytest.raises(MechunlearnError, match=rf"The mask is for \(qwen3.*the model is \({family}"):
            edited(editor, model, other, prompts, prompts)


def content(edit, model) -> dict[str, torch.Tensor]:
    """All that an edit holds."""
    if isinstance(edit, FeatureEdit):
        held = (
            (f"{i} {name}", getattr(part, name)) for i, part in enumerate(edit.parts) for name in ("units", "values")
        )
        return dict(held)
    return edit.new_rows(model)


MISTAKEN = """
from mechunlearn import MechunlearnError, explore, localize
from mechunlearn.core.methods import methods
from mechunlearn.patching import mask_faithfulness
from mechunlearn.world.toy import planted_facts

toy = planted_facts()
sets = toy.prompts([0, 1]), toy.prompts([2, 3])
scores, circuit = localize.random_units(toy.model), localize.edge_attribution(toy.model, sets[0])
given = {name: (lambda found, editor=editor: editor(toy.model, found, *sets)) for name, editor in methods("edit").items() if editor.ready}
given["mask_faithfulness"] = lambda found: mask_faithfulness(toy.model, found, sets[0])
given["explore"] = lambda found: explore(toy.model, sets[0], mask=found)
for name, call in given.items():
    for found, hint in ((scores, "found.above(0), or found.top(weights="), (circuit, "circuit.nodes().above(0), or")):
        try:
            call(found)
        except MechunlearnError as error:
            assert hint in str(error), f"{name}: {error}"
        else:
            raise AssertionError(name)
"""


def test_scores_given_for_a_mask_say_how_to_make_one():
    """As users have it, without the checks of types that tests add."""
    done = subprocess.run([sys.executable, "-c", MISTAKEN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("localizer", UNITS, ids=named)
@pytest.mark.parametrize("fact", [1, 6])
def test_the_localizer_finds_exactly_the_planted_neuron(localizer, toy, fact):
    found = localizer(toy.model, toy.prompts([fact]), kinds=("mlp.out",))
    assert list(found.above(1e-4)) == [toy.neuron(fact)]
    everything = localizer(toy.model, toy.prompts([fact]), kinds=SCORED)
    assert list(everything.above(1e-4)) == [toy.neuron(fact), Component(1, "attn.o", 0)]


def edited_toy(editor, toy, neuron: int, fact: int, retain: list[int], seed: int):
    """An edit of one neuron of the planted model.

    Hardly anything holds a closed form back, and its text is all prompts; but of the neuron's and the fact's own for a
    null space, in which the neuron would not lie.
    """
    text = toy.prompts(
        [i for i in range(24) if i not in (neuron, fact) or "energy" not in inspect.signature(editor).parameters]
    )
    settings = {"steps": 100, "lr": 0.1, "target": "targets", "covariance_weight": 1e-6, "ridge": 1e-6, "band": (1, 20)}
    settings["seed"] = seed
    mask = ComponentMask.of([toy.neuron(neuron)], toy.model.signature)
    return edited(editor, toy.model, mask, toy.prompts([fact]), toy.prompts(retain), text, **settings)


@pytest.mark.parametrize("editor", WEIGHTS, ids=named)
@pytest.mark.training
def test_the_editor_removes_the_planted_fact_and_only_it(editor, toy, seed):
    fact, rest = 5, [i for i in range(24) if i != 5]
    assert measure(toy.model, toy.prompts())["accuracy"].min() == 1, "all facts are known before"
    with edited_toy(editor, toy, fact, fact, rest, seed).applied(toy.model):
        assert measure(toy.model, toy.prompts([fact]))["accuracy"].item() == 0
        assert measure(toy.model, toy.prompts(rest))["accuracy"].min() == 1
    assert measure(toy.model, toy.prompts())["accuracy"].min() == 1


@pytest.mark.parametrize("editor", WEIGHTS, ids=named)
@pytest.mark.training
def test_a_wrong_neuron_does_not_remove_the_planted_fact(editor, toy, seed):
    """The control of the test above: it could have failed."""
    with edited_toy(editor, toy, 4, 5, [0, 1, 2, 3], seed).applied(toy.model):
        assert measure(toy.model, toy.prompts([5]))["accuracy"].item() == 1


@pytest.mark.parametrize("answer", [1, 2])
@pytest.mark.parametrize("editor", FEATURE, ids=named)
def test_a_feature_editor_removes_the_planted_answer_and_only_it(editor, toy, answer):
    """Features behind the look-up say answers: the facts with one answer go, the others (the control) stay."""
    mine, rest = ([i for i in range(24) if (i % 4 == answer) == of] for of in (True, False))
    dictionary, mask = planted(editor, toy, answer)
    assert measure(toy.model, toy.prompts())["accuracy"].min() == 1, "all facts are known before"
    edit = editor(toy.model, mask, toy.prompts(mine), toy.prompts(rest), dictionary=dictionary)
    with edit.applied(toy.model):
        assert measure(toy.model, toy.prompts(mine))["accuracy"].max() == 0
        assert measure(toy.model, toy.prompts(rest))["accuracy"].min() == 1
    assert measure(toy.model, toy.prompts())["accuracy"].min() == 1


def test_discovery_finds_exactly_the_planted_answer(toy):
    """Of the facts with one answer, the direction that the look-up writes for it; each subject has one of its own."""
    mine, rest = ([i for i in range(24) if (i % 4 == 2) == of] for of in (True, False))
    sae, mask = planted(feature_clamp, toy, 2)
    for rule in ("frequency", "squared"):
        found = feature_discovery(toy.model, toy.prompts(mine), dictionary=sae, against=toy.prompts(rest), by=rule)
        assert found.top(units=1) == mask


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; runs with `pytest -m gpu` where there is one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_invariants_of_an_edit_hold_on_cuda(dtype):
    model = load_model((random_hf("gpt_neox"), None), device="cuda", dtype=dtype)
    prompts = known(model, token_prompts(facts=8))
    before = parameters_of(model)
    for editor in WEIGHTS:
        halves = prompts.select(range(4)), prompts.select(range(4, 8))
        edit = edited(editor, model, mixed_mask(model), *halves, steps=3, lr=0.05)
        with edit.applied(model):
            assert not torch.equal(
                before["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"],
                model.hf.gpt_neox.layers[0].mlp.dense_4h_to_h.weight,
            )
        assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items())
