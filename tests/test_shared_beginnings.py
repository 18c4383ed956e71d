"""First tokens that all prompts have in common are read once: the same numbers as from whole prompts."""

from dataclasses import replace

import pytest
import torch

from mechunlearn.evaluation.cells import cells
from mechunlearn.facts import answers
from mechunlearn.facts.answers import answer_logits, shared_tokens
from mechunlearn.facts.formats import Query
from mechunlearn.facts.load import load_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import measure
from tests.models import token_prompts


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Share however little it saves."""
    monkeypatch.setattr(answers, "WORTH", 1)


@pytest.fixture
def alike(prompts):
    """Prompts of several lengths whose first five tokens are the same; the answer is predicted behind them."""
    beginning = torch.tensor([7, 3, 11, 2, 5]).expand(len(prompts), 5)
    tokens = torch.cat([beginning, prompts.tokens], 1)
    moved = {"start": prompts.start + 5, "read": prompts.read + 5, "lengths": prompts.lengths + 5}
    roles = torch.cat([torch.zeros_like(beginning), prompts.roles], 1)
    return replace(prompts, tokens=tokens, corrupt=tokens, roles=roles, **moved)


def whole(model, prompts):
    """The logits that predict each answer's tokens, from plain transformers, a prompt at a time."""
    found = []
    for i in range(len(prompts)):
        length, start = int(prompts.lengths[i]), int(prompts.start[i])
        with torch.no_grad():
            logits = model.hf(prompts.tokens[i : i + 1, :length]).logits[0]
        at = (start + torch.arange(prompts.answers.shape[1])).clamp(max=length - 1)
        found.append(logits[at])
    return torch.stack(found)


def test_of_every_architecture(model, alike):
    calls = []
    handle = model.hf.register_forward_hook(lambda module, given, kwargs, out: calls.append(kwargs), with_kwargs=True)
    logits, read = answer_logits(model, alike, share=True)
    handle.remove()
    assert len(calls) == 2, "the beginning and the rest"
    assert calls[0]["input_ids"].shape == (1, shared_tokens(alike))
    expected = whole(model, alike)
    given = torch.arange(alike.answers.shape[1]) < (alike.answers >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(logits[given], expected[given], atol=2e-5, rtol=1e-4)
    assert not read.start.any()


def test_what_is_shared_ends_before_the_answer_is_predicted():
    prompts = token_prompts()
    same = replace(prompts, tokens=prompts.tokens[:1].expand_as(prompts.tokens).clone())
    assert shared_tokens(same) == int(same.start.min())
    other = same.tokens.clone()
    other[-1, 1] += 1
    assert shared_tokens(replace(same, tokens=other)) == 1


def test_little_is_not_shared(monkeypatch, model, alike):
    monkeypatch.setattr(answers, "WORTH", 5 * (len(alike) - 1) + 1)
    calls = []
    handle = model.hf.register_forward_hook(lambda *_: calls.append(1))
    answer_logits(model, alike, share=True)
    handle.remove()
    assert len(calls) == 1


def test_not_unless_it_is_asked_for(model, alike):
    """A hook of the user's may count positions from the beginning of a text."""
    seen = []
    with model.hooks({"L1.resid_post": lambda resid: seen.append(resid.shape[1])}):
        answer_logits(model, alike)
    assert min(seen) > shared_tokens(alike)


@pytest.mark.real
@pytest.mark.parametrize("real", ["smollm2", "gemma3"])
def test_every_cell_of_a_real_model(real, request):
    model = request.getfixturevalue(real)
    forget, retain = load_facts("countries/capital").prompts(model).split(forget=3, retain=2, seed=0)
    formats = set()
    for split, prompts in cells(model, forget, retain):
        if split not in ("forget", "same subject: continent"):  # answers to choose among, of several tokens
            continue
        formats.add(prompts.format)
        found, plain = measure(model, prompts, share=True), measure(model, prompts)
        assert found.keys() == plain.keys()
        for name, values in found.items():
            torch.testing.assert_close(values, plain[name], atol=1e-4, rtol=1e-3, equal_nan=True, msg=f"{split} {name}")
    assert {"statement", "question", "one_shot", "multiple_choice"} <= formats


LONG = "It had rained all week, and the harbour was grey. " * 12
BEGUN = {
    "another language": ("La capitale de {} est la ville de", {"la France": "Paris", "l'Italie": "Rome", "l'Espagne": "Madrid"}),
    "a long prompt": (LONG + "The capital of {} is the city of", {"Peru": "Lima", "Kenya": "Nairobi", "North Macedonia": "Skopje"}),
    "a number": ("The number that comes after {} is", {"41": "42", "1999": "2000", "7": "8"}),
}  # fmt: skip


@pytest.mark.real
@pytest.mark.parametrize("begun", BEGUN)
@pytest.mark.parametrize("real", ["smollm2", "gemma3"])
def test_on_a_real_model_as_plain_transformers_reads_each_prompt(real, begun, request):
    model, (template, answers) = request.getfixturevalue(real), BEGUN[begun]
    rows = [Query(template.format(subject), answer, "", "", subject) for subject, answer in answers.items()]
    prompts = Prompts.from_text(rows, model.tokenizer)
    assert shared_tokens(prompts) >= 3
    logits, _ = answer_logits(model, prompts, share=True)
    given = torch.arange(prompts.answers.shape[1]) < (prompts.answers >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(logits[given], whole(model, prompts)[given], atol=5e-3, rtol=1e-3)
