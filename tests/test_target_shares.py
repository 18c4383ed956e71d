"""How far a target value goes: the least share of its way that edits the fact, beside a plain loop."""

import pytest
import torch

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.edit import memit
from mechunlearn.edit.closed_form import target_values, washing
from mechunlearn.edit.closed_form.edit_prompts import EditPrompts
from mechunlearn.edit.closed_form.target_values import SHARES, least_shares
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Prompts
from tests.test_washing import PREFIXES, exact, known, normal, ragged, seen_by

FACTS, LAYER = 16, 0


@pytest.fixture(autouse=True)
def far(monkeypatch):
    """Random models hardly read one token of many: let target values go further than on models that were trained."""
    monkeypatch.setattr(target_values, "MOST", 40.0)
    monkeypatch.setattr(target_values, "DECAY", 1e-3)


def behind(prompts, i: int, prefix: list[int]) -> tuple[list[int], int]:
    """The tokens of one prompt behind a prefix, and the place of its subject's last token."""
    start = int(prompts.start[i])
    return [*prefix, *prompts.tokens[i, : start + 1].tolist()], len(prefix) + min(int(prompts.spans[i, 1]), start)


@torch.no_grad()
def said(model, tokens: list[int], at: int, move: torch.Tensor) -> torch.Tensor:
    """The likeliest next token at each place, with something added to the residual stream at one token."""

    def add(resid):
        resid = resid.clone()
        resid[0, at] += move
        return resid

    with model.hooks({f"L{LAYER}.resid_post": add}):
        return model.forward(torch.tensor([tokens]))[0].argmax(-1)


@torch.no_grad()
def home(model, tokens: list[int], at: int) -> torch.Tensor:
    return model.cache(torch.tensor([tokens]), [f"L{LAYER}.resid_post"])[1][f"L{LAYER}.resid_post"][0, at]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("batch", [2, 64])
def test_erasing_takes_the_least_share_at_which_no_prompt_gives_the_truth(family, batch):
    model = exact(family)
    prompts = known(model, ragged(FACTS))
    edit_prompts = EditPrompts.of(model, prompts, "subject last", PREFIXES, torch.full((FACTS, 1), 3))
    values, expected = [], []
    for i in range(FACTS):
        bare, at = behind(prompts, i, [])
        here = home(model, bare, at)
        way = 4 * here.norm() * normal(32, seed=i)
        values.append(here + way)
        gone = [
            all(
                int(said(model, *behind(prompts, i, list(prefix)), share * way)[-1]) != int(prompts.answers[i, 0])
                for prefix in ((), *PREFIXES)
            )
            for share in SHARES
        ]
        least = gone.index(False) if False in gone else len(gone)
        expected.append(SHARES[max(least - 1, 0)])
    found = least_shares(model, LAYER, edit_prompts, torch.stack(values), prompts.answers, batch)
    assert found.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 2, "the facts must differ"


def test_replacing_takes_the_least_share_at_which_every_label_follows():
    model = exact("llama")
    prompts = known(model, ragged(FACTS))
    values, labels, expected = [], [], []
    for i in range(FACTS):
        tokens, at = behind(prompts, i, [])
        here = home(model, tokens, at)
        way = 4 * here.norm() * normal(32, seed=i)
        first = int(said(model, tokens, at, way)[-1])
        two = said(model, [*tokens, first], at, way)[-2:].tolist()
        edited = [said(model, [*tokens, first], at, share * way)[-2:].tolist() == two for share in SHARES]
        values.append(here + way)
        labels.append(two)
        expected.append(SHARES[edited.index(False) - 1] if False in edited else SHARES[-1])
    edit_prompts = EditPrompts.of(model, prompts, "subject last", (), torch.tensor(labels))
    found = least_shares(model, LAYER, edit_prompts, torch.stack(values), None, 5)
    assert found.tolist() == pytest.approx(expected) and len(set(expected)) > 2


@pytest.fixture(scope="module")
def asked():
    model = exact("llama")
    return model, known(model, ragged(7)), known(model, ragged(5, seed=1)), seen_by(model, ["L0.mlp.out", "L1.mlp.out"])


def values_of(asked, overshoot, target="targets", given=None):
    model, forget, retain, covariance = asked
    mask = ComponentMask.of(["L0.mlp.out", "L1.mlp.out"], model.signature)
    how = washing.How(target, "subject last", prefixes=0, steps=40, lr=0.3, overshoot=overshoot, batch_size=64)
    return washing.washing(model, mask, forget, retain, how, covariance, None, given, True, 0, False)


def test_a_searched_value_is_drawn_back_and_a_given_one_is_not(asked, monkeypatch):
    monkeypatch.setattr(washing, "MARGIN", 1.2)
    whole, least = values_of(asked, 1.0), values_of(asked, None)
    shares = least_shares(asked[0], 1, whole.edit_prompts, whole.target_values, None, 64)
    assert shares.min() < 0.8
    at = asked[1].spans[:, 1].minimum(asked[1].start)
    _, kept = asked[0].cache(asked[1].tokens, ["L1.resid_post"])
    here = kept["L1.resid_post"][torch.arange(7), at].float()
    reach = (1.2 * shares[:, None]).clamp_max(1)
    expected = here + reach * (whole.target_values - here)
    assert torch.allclose(least.target_values, expected, atol=1e-5)
    given = values_of(asked, None, given=whole.target_values)
    assert torch.equal(given.target_values, whole.target_values)


def test_the_mean_of_others_is_taken_whole(asked):
    assert torch.equal(values_of(asked, None, "mean").target_values, values_of(asked, 1.0, "mean").target_values)


def test_the_papers_value_is_one_option_away(asked, monkeypatch):
    monkeypatch.setattr(washing, "MARGIN", 1.2)
    model, forget, retain, covariance = asked
    mask = ComponentMask.of(["L1.mlp.out"], model.signature)
    settings = {"target": "targets", "covariance": covariance, "covariance_weight": 1e-3, "prefixes": 0, "lr": 0.3}
    sizes = [
        memit(model, mask, forget, retain, overshoot=overshoot, **settings).card.trajectory[0]["norm"]
        for overshoot in (1.0, None)
    ]
    assert sizes[1] < 0.99 * sizes[0]


@pytest.mark.real
def test_on_a_real_model_it_is_what_plain_hooks_give(smollm2):
    """Another language, a long prompt, and a number for an answer; hooks of torch on the Hugging Face module."""
    text = "The old road runs along the river and past the mill. " * 12
    asked = [
        Query("The capital of Norway is the city of", "Oslo", subject="Norway"),
        Query("La capitale de la France est la ville de", "Paris", subject="France"),
        Query(f"{text}The capital of Italy is the city of", "Rome", subject="Italy"),
        Query("The number of days in a week is", "seven", subject="week"),
    ]
    prompts = Prompts.from_text(asked, smollm2.tokenizer)
    layer, block = 8, smollm2.hf.model.layers[8]
    first, values, expected = [], [], []

    @torch.no_grad()
    def likeliest(ids: torch.Tensor, at: int, move: torch.Tensor | None) -> tuple[int, torch.Tensor]:
        seen = {}

        def add(module, args, out):
            out = out.clone()
            seen["home"] = out[0, at].clone()
            out[0, at] += 0 if move is None else move
            return out

        handle = block.register_forward_hook(add)
        logits = smollm2.hf(ids[None]).logits[0, -1]
        handle.remove()
        return int(logits.argmax()), seen["home"]

    for i in range(len(asked)):
        start = int(prompts.start[i])
        ids, at = prompts.tokens[i, : start + 1], int(prompts.spans[i, 1])
        said_now, here = likeliest(ids, at, None)
        way = 0.75 * here.norm() * torch.nn.functional.normalize(normal(len(here), seed=i).float(), dim=0) * 4
        gone = [likeliest(ids, at, share * way)[0] != said_now for share in SHARES]
        least = gone.index(False) if False in gone else len(gone)
        first.append(said_now)
        values.append(here + way)
        expected.append(SHARES[max(least - 1, 0)])
    truth = torch.tensor(first)[:, None]
    edit_prompts = EditPrompts.of(smollm2, prompts, "subject last", (), torch.zeros_like(truth))
    found = least_shares(smollm2, layer, edit_prompts, torch.stack(values), truth, 64)
    assert found.tolist() == pytest.approx(expected) and min(expected) < 1, expected
