"""The Unlearning Depth Score beside a naive loop of plain transformers, fact by fact and layer by layer."""

import pytest
import torch

from mechunlearn import load_facts, load_model
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.depth_score import depth_scores, unlearning_depth_score
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.world.toy import planted_facts
from tests.models import random_hf


def changed(model, site: str, scale: float, seed: int) -> WeightEdit:
    """Noise on all units of a site, in units of the rows' own spread."""
    rows = model.rows(site)
    noise = scale * rows.std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    return WeightEdit({site: torch.arange(len(rows))}, {site: rows + noise}, model.signature, RunCard("noise"))


def mean_logprob(hf, prompts, i: int, layer: int | None = None, source=None) -> float:
    """The mean log-probability of an answer's tokens, with a layer's output replaced where they are predicted."""
    tokens, answer = prompts.tokens[i : i + 1, : int(prompts.lengths[i])], prompts.answers[i]
    answer = answer[answer != PAD]
    at = torch.arange(int(prompts.start[i]), int(prompts.start[i]) + len(answer))

    def patched(module, inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, at] = source[0, at]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = hf.model.layers[layer].register_forward_hook(patched) if layer is not None else None
    with torch.no_grad():
        logits = hf(tokens).logits[0, at].double()
    if handle is not None:
        handle.remove()
    return float(logits.log_softmax(-1)[torch.arange(len(answer)), answer].mean())


def naive(hf, states, prompts, layers) -> torch.Tensor:
    """By state, layer and fact: what the state's stream costs."""
    own = [mean_logprob(hf, prompts, i) for i in range(len(prompts))]
    return torch.tensor(
        [
            [
                [own[i] - mean_logprob(hf, prompts, i, layer, streams[i][layer]) for i in range(len(prompts))]
                for layer in layers
            ]
            for streams in states
        ]
    )


def streams_of(hf, prompts) -> list[list[torch.Tensor]]:
    """What leaves every layer, by hooks: the last hidden state of transformers has the final norm in it."""
    found = []
    for i in range(len(prompts)):
        kept: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(
                lambda m, a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
            )
            for layer in hf.model.layers
        ]
        with torch.no_grad():
            hf(prompts.tokens[i : i + 1, : int(prompts.lengths[i])])
        for handle in handles:
            handle.remove()
        found.append(kept)
    return found


def agrees(model, gold, edit, prompts, layers=None) -> None:
    """In these layers, or all; the score by hand, from what every layer costs."""
    made = unlearning_depth_score(model, edit, gold, prompts)
    layers = list(range(len(model.hf.model.layers)) if layers is None else layers)
    theirs = streams_of(gold.hf, prompts)
    with edit.applied(model):
        ours = streams_of(model.hf, prompts)
    expected = naive(model.hf, [theirs, ours], prompts, layers)
    for found, by_loop in zip((made.retain, made.edited), expected, strict=True):
        assert torch.allclose(found[layers], by_loop, atol=2e-4)
    retain, edited = made.retain, made.edited
    by_hand = []
    for fact in range(len(prompts)):
        layers = [layer for layer in range(len(retain)) if retain[layer, fact] > 0.05]
        whole = sum(float(retain[layer, fact]) for layer in layers)
        parts = [
            float(retain[layer, fact]) * min(max(float(edited[layer, fact] / retain[layer, fact]), 0.0), 1.0)
            for layer in layers
        ]
        by_hand.append(sum(parts) / whole if layers else float("nan"))
    assert torch.allclose(made.by_fact, torch.tensor(by_hand), atol=1e-3, equal_nan=True)
    assert made.score == pytest.approx(float(made.by_fact.nanmean()), abs=1e-6) and made.low <= made.score <= made.high


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_it_is_what_a_naive_loop_gives(family):
    model, gold = load_model((random_hf(family), None)), load_model((random_hf(family), None))
    changed(gold, "L0.mlp.out", 4.0, 0).apply_(gold)
    tokens = torch.randint(1, 97, (5, 9), generator=torch.Generator().manual_seed(0))
    answers = torch.randint(1, 97, (5,), generator=torch.Generator().manual_seed(1))
    prompts = Prompts.from_tokens(tokens, tokens.flip(0), answers, (answers + 5) % 97, torch.full((5, 2), 3))
    agrees(model, gold, changed(model, "L1.mlp.out", 2.0, 2), prompts)


SOME = (0, 11, 12, 20, 29)  # below, at and above the noise; a loop over all thirty takes minutes


@pytest.mark.real
def test_it_is_what_a_naive_loop_gives_on_a_real_model(smollm2_gold):
    agrees(*smollm2_gold, layers=SOME)


@pytest.mark.real
@pytest.mark.slow
def test_so_of_other_languages_a_long_prompt_and_a_number(smollm2_gold):
    model, gold, edit, _ = smollm2_gold
    rows = [
        {"subject": "中国", "prompt": "{}的首都是", "answer": "北京"},
        {"subject": "مصر", "prompt": "عاصمة {} هي", "answer": "القاهرة"},
        {"subject": "Anna", "prompt": "The bus was late again. " * 60 + "The age of {} is", "answer": "42"},
    ]
    agrees(model, gold, edit, load_facts(rows).prompts(model), layers=SOME)


@pytest.fixture
def smollm2_gold():
    """SmolLM2, itself with noise in one MLP as the model without the knowledge, and an edit with less of it; two answers of several tokens."""
    model, gold = load_model("smollm2"), load_model("smollm2")
    changed(gold, "L12.mlp.out", 3.0, 0).apply_(gold)
    prompts = load_facts("countries/capital").prompts(model)
    long = ((prompts.answers != PAD).sum(1) > 1).nonzero().flatten()[:2].tolist()
    prompts = prompts.select([0, *long])
    return model, gold, changed(model, "L12.mlp.out", 1.0, 0), prompts


class TestEnds:
    def test_an_untouched_model_scores_nothing_and_the_retain_model_itself_one(self):
        toy, gold = planted_facts(), planted_facts().model
        forget = toy.prompts([0, 1, 2, 3])
        gone = WeightEdit(
            {"L0.mlp.out": torch.arange(4)},
            {"L0.mlp.out": torch.zeros(4, toy.model.signature.d_model)},
            toy.model.signature,
            RunCard("silenced"),
        )
        gone.apply_(gold)
        assert unlearning_depth_score(toy.model, gone, gold, forget).score == 1
        nothing = WeightEdit(
            {"L0.mlp.out": torch.arange(4)},
            {"L0.mlp.out": toy.model.rows("L0.mlp.out")[:4]},
            toy.model.signature,
            RunCard("nothing"),
        )
        found = unlearning_depth_score(toy.model, nothing, gold, forget)
        assert found.score == 0 and found.n == 4 and found.edited.abs().max() == 0

    def test_a_retain_model_that_knows_the_facts_is_refused(self):
        toy = planted_facts()
        edit = changed(toy.model, "L0.mlp.out", 0.1, 0)
        with pytest.raises(MechunlearnError, match="no layer holds a fact"):
            unlearning_depth_score(toy.model, edit, planted_facts().model, toy.prompts([0, 1]))

    def test_the_cost_below_the_threshold_counts_nowhere(self):
        retain, edited = torch.tensor([[0.05], [0.06]]), torch.tensor([[5.0], [0.03]])
        assert depth_scores(retain, edited).item() == pytest.approx(0.5)
        assert depth_scores(retain, edited, threshold=0.04).item() == pytest.approx((0.05 + 0.03) / 0.11)
        assert depth_scores(retain, -edited).item() == 0, "what helps is intact"
