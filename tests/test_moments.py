"""The diagonal Fisher equals the plain loop that squares one gradient at a time, and leaves no trace on the model."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from mechunlearn import MechunlearnError
from mechunlearn.training import fisher as moments
from mechunlearn.training.fisher import DiagonalFisher
from tests.models import random_hf

MODULES = {
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.h.2.mlp.c_proj", "lm_head"],
    "llama": ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.gate_proj"],
}
LENGTHS = (9, 4, 7, 2, 5, 1)


@pytest.fixture(params=list(MODULES))
def hf(request) -> nn.Module:
    return random_hf(request.param).double()


def names(hf: nn.Module) -> list[str]:
    return MODULES[hf.config.model_type]


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows whose labels start at the third token, as those of an answer do; the last row has none."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 97, (len(LENGTHS), max(LENGTHS)), generator=generator)
    labels = torch.full_like(tokens, -1)
    labels[:, :-1] = tokens[:, 1:]
    for row, length in enumerate(LENGTHS):
        labels[row, length - 1 :] = -1
        labels[row, : min(2, length - 2)] = -1
    return tokens, labels


def by_loop(hf: nn.Module, name: str) -> torch.Tensor:
    """One sequence without its padding, one loss, one gradient of the weight itself, at a time."""
    tokens, labels = texts()
    squares = []
    for row, length in enumerate(LENGTHS):
        where = (labels[row] >= 0).nonzero().flatten()
        if len(where):
            logprobs = hf(tokens[row : row + 1, :length]).logits[0].log_softmax(-1)
            loss = -logprobs[where, labels[row, where]].mean()
            gradient = torch.autograd.grad(loss, hf.get_submodule(name).weight)[0]
            is_in_out = isinstance(hf.get_submodule(name), transformers.pytorch_utils.Conv1D)
            squares.append((gradient.T if is_in_out else gradient) ** 2)
    return torch.stack(squares).mean(0)


def untie(hf: nn.Module) -> nn.Module:
    """GPT-2's unembedding with a weight of its own, so that the loop sees its use as a linear layer alone."""
    if hf.config.tie_word_embeddings:
        hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach().clone())
    return hf


def test_it_is_the_mean_of_squares_of_single_gradients(hf):
    untie(hf)
    fisher = DiagonalFisher(hf, names(hf)).update(*texts())
    assert fisher.count == 5 and fisher.modules == set(names(hf))
    for name in names(hf):
        truth = by_loop(hf, name)
        torch.testing.assert_close(fisher.elements(name), truth, rtol=1e-10, atol=1e-10 * truth.max().item(), msg=name)
        torch.testing.assert_close(fisher.elements(name).sum(1), truth.sum(1), rtol=1e-10, atol=0, msg=name)
        assert truth.max() > 0


def test_any_split_into_batches_gives_the_same(hf, monkeypatch):
    tokens, labels = texts()
    whole = DiagonalFisher(hf, names(hf)).update(tokens, labels)
    monkeypatch.setattr(moments, "CHUNK", 3 * 32 * 32)
    for split in ([1] * 6, [2, 1, 3], [6]):
        parts = DiagonalFisher(hf, names(hf))
        for some, their in zip(tokens.split(split), labels.split(split)):
            width = int((their >= 0).any(0).nonzero().max()) + 1 if (their >= 0).any() else 1
            parts.update(some[:, :width], their[:, :width])
        assert parts.count == whole.count
        for name in names(hf):
            torch.testing.assert_close(parts.elements(name).sum(1), whole.elements(name).sum(1), rtol=1e-10, atol=0)
            torch.testing.assert_close(parts.elements(name), whole.elements(name), rtol=1e-10, atol=1e-25)


def test_float32_agrees_with_float64(hf):
    single = DiagonalFisher(copy.deepcopy(hf).float(), names(hf)).update(*texts())
    double = DiagonalFisher(hf, names(hf)).update(*texts())
    for name in names(hf):
        torch.testing.assert_close(single.elements(name).sum(1), double.elements(name).sum(1), rtol=1e-5, atol=0)


def test_the_square_of_a_batch_mean_gradient_is_another_number(hf):
    """The control: it is smaller by what sequences disagree on."""
    tokens, labels = (part[:5] for part in texts())
    fisher = DiagonalFisher(hf, names(hf)).update(tokens, labels)
    sizes = (labels >= 0).sum(1)
    rows, positions = (labels >= 0).nonzero(as_tuple=True)
    losses = nn.functional.cross_entropy(hf(tokens).logits[rows, positions], labels[rows, positions], reduction="none")
    mean = torch.autograd.grad((losses / sizes[rows]).sum() / 5, hf.get_submodule(names(hf)[1]).weight)[0] ** 2
    assert 0 < mean.sum() < 0.7 * fisher.elements(names(hf)[1]).sum()


def test_padding_does_not_matter(hf):
    tokens, labels = texts()
    other = torch.where(torch.arange(9) < torch.tensor(LENGTHS)[:, None], tokens, 50)
    assert (other != tokens).any()
    fisher, again = (DiagonalFisher(hf, names(hf)).update(given, labels) for given in (tokens, other))
    for name in names(hf):
        torch.testing.assert_close(fisher.elements(name), again.elements(name), rtol=1e-10, atol=1e-20)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_model_is_left_as_it_was(hf, wanted):
    hf.requires_grad_(wanted)
    marked = hf.get_submodule(names(hf)[0]).weight
    marked.grad = torch.ones_like(marked)
    before = {name: parameter.detach().clone() for name, parameter in hf.named_parameters()}
    with torch.no_grad():
        fisher = DiagonalFisher(hf, names(hf)).update(*texts())
    for name, parameter in hf.named_parameters():
        assert parameter.requires_grad == wanted and torch.equal(parameter, before[name]), name
        assert parameter.grad is None or parameter is marked
    assert torch.equal(marked.grad, torch.ones_like(marked))
    hf.requires_grad_(not wanted)
    other = DiagonalFisher(hf, names(hf)).update(*texts())
    for name in names(hf):
        torch.testing.assert_close(fisher.elements(name), other.elements(name))
        assert not fisher.elements(name).requires_grad


def test_hooks_are_gone_after_an_error(hf):
    fisher = DiagonalFisher(hf, names(hf))
    with pytest.raises(IndexError):
        fisher.update(torch.full((1, 3), 10_000), torch.zeros(1, 3, dtype=torch.long))
    assert not any(module._forward_hooks for module in hf.modules())
    with pytest.raises(MechunlearnError, match="after 0 sequences"):
        fisher.elements(names(hf)[0])
    fisher.update(*texts())
    assert not any(module._forward_hooks for module in hf.modules())


def test_a_users_hook_changes_what_follows_and_not_the_layer(hf):
    """With outputs doubled behind a layer, its weight gradients are those of the doubled model."""
    name = names(hf)[1]
    handle = hf.get_submodule(name).register_forward_hook(lambda module, args, out: out.square() + out)
    fisher = DiagonalFisher(hf, [name]).update(*texts())
    torch.testing.assert_close(fisher.elements(name), by_loop(hf, name), rtol=1e-10, atol=1e-20)
    assert list(hf.get_submodule(name)._forward_hooks) == [handle.id], "the user's hook is still there"


class Twice(nn.Module):
    """Calls one linear layer twice, another as a flat list of tokens, and a third never."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shared = nn.Embedding(97, 8), nn.Linear(8, 8)
        self.flat, self.idle, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 97)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.embed(input_ids)
        x = self.shared(torch.tanh(self.shared(x))).cumsum(1)
        return SimpleNamespace(logits=self.head(x + self.flat(x.flatten(0, 1)).view_as(x)))


@pytest.fixture
def twice() -> Twice:
    torch.manual_seed(0)
    return Twice().double().eval()


def test_the_calls_of_a_module_are_added_before_they_are_squared(twice):
    fisher = DiagonalFisher(twice, ["shared", "head"]).update(*texts())
    torch.testing.assert_close(fisher.elements("shared"), by_loop(twice, "shared"), rtol=1e-10, atol=1e-18)
    torch.testing.assert_close(fisher.elements("head"), by_loop(twice, "head"), rtol=1e-10, atol=1e-18)


def test_a_bfloat16_model_adds_up_in_float64(hf):
    half = copy.deepcopy(hf).to(torch.bfloat16)
    fisher, same = (DiagonalFisher(model, names(hf)).update(*texts()) for model in (half, copy.deepcopy(half).float()))
    for name in names(hf):
        assert fisher.elements(name).dtype == torch.float64
        assert fisher.elements(name).sum() == pytest.approx(same.elements(name).sum().item(), rel=0.1)


def test_many_small_updates_are_not_lost(twice):
    """After 400 equal sequences the mean is still that of one; in bfloat16 a sum of equal numbers stops at 256."""
    half, (tokens, labels) = twice.to(torch.bfloat16), (part[:1] for part in texts())
    once = DiagonalFisher(half, ["shared"]).update(tokens, labels)
    often = DiagonalFisher(half, ["shared"])
    for _ in range(20):
        often.update(tokens.repeat(20, 1), labels.repeat(20, 1))
    assert often.count == 400
    torch.testing.assert_close(often.elements("shared").sum(1), once.elements("shared").sum(1), rtol=1e-6, atol=0)


def test_no_label_counts_for_nothing(hf):
    tokens, labels = texts()
    fisher = DiagonalFisher(hf, names(hf)).update(tokens, torch.full_like(labels, -1))
    assert fisher.count == 0
    assert fisher.update(tokens[:1], labels[:1]).count == 1


def test_names_that_are_no_linear_layer_are_refused(hf):
    near = names(hf)[1]
    with pytest.raises(MechunlearnError, match=f"no module '{near}s'. Expected .* such as .*{near}"):
        DiagonalFisher(hf, [f"{near}s"])
    block = near.rpartition(".")[0]
    with pytest.raises(MechunlearnError, match=f"'{block}' is a .*MLP. Expected the name of an nn.Linear or Conv1D"):
        DiagonalFisher(hf, [block])


def test_mistakes_are_named(hf, twice):
    tokens, labels = texts()
    name = names(hf)[0]
    with pytest.raises(MechunlearnError, match="a module or more"):
        DiagonalFisher(hf, [])
    with pytest.raises(MechunlearnError, match="training mode"):
        DiagonalFisher(hf.train(), [name]).update(tokens, labels)
    fisher = DiagonalFisher(hf.eval(), [name]).update(tokens, labels)
    with pytest.raises(MechunlearnError, match="No Fisher of 'other' after 5 sequences"):
        fisher.elements("other")
    with pytest.raises(MechunlearnError, match=r"'flat' saw inputs of shape \(54, 8\)"):
        DiagonalFisher(twice, ["flat"]).update(tokens, labels)
    with pytest.raises(MechunlearnError, match="'idle' was not called"):
        DiagonalFisher(twice, ["idle"]).update(tokens, labels)
