"""Dictionaries made by hand, and masks of their units: what tests of feature edits and of discovery act with."""

import signal

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

from mechunlearn import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.features.dictionaries import SAE, Codebook
from mechunlearn.features.places import installed, signature_of, width
from mechunlearn.world.toy import FIRST_SUBJECT, LOOKED_UP, SUBJECTS


def random_codebook(model, hook_name: str, size: int = 24, used: int = 3, seed: int = 0, **shape) -> Codebook:
    """A codebook of random codes, about as large as what they stand for."""
    wide = width(model, hook_name) or signature_of(model).d_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Codebook(wide, size, used, hook_name=hook_name, signature=signature_of(model), **shape).eval()


def random_sae(model, hook_name: str, kind: str = "relu", size: int = 24, seed: int = 0) -> SAE:
    """A random SAE of sae-lens, whose features are each active at about a quarter of random tokens."""
    wide, generator = width(model, hook_name), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        if kind == "topk":
            made = TopKSAE(TopKSAEConfig(d_in=wide, d_sae=size, k=6, rescale_acts_by_decoder_norm=True))
        elif kind == "jumprelu":
            made = JumpReLUSAE(JumpReLUSAEConfig(d_in=wide, d_sae=size, apply_b_dec_to_input=False))
        else:
            made = StandardSAE(StandardSAEConfig(d_in=wide, d_sae=size))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / wide**0.5)
        above = 0.0
        if kind == "jumprelu":
            made.threshold.copy_(0.1 + 0.3 * torch.rand(size, generator=generator))
            above = made.threshold
        h = entering(model, rows_of_tokens(seed=9)[0], hook_name).flatten(0, 1).float()
        if kind != "topk":
            made.b_enc.copy_(above - ((h - (kind == "relu") * made.b_dec) @ made.W_enc).quantile(0.75, dim=0))
    return SAE(made, hook_name, signature_of(model))


def seldom(model, sae, count: int) -> list[int]:
    """Features that are active at a few of random tokens."""
    fired = sae.encode(entering(model, rows_of_tokens(texts=24, seed=8)[0], sae.hook_name)) > 0
    share = fired.float().mean((0, 1))
    chosen = ((share > 0.03) & (share < 0.25)).nonzero().flatten().tolist()
    assert len(chosen) >= count
    return chosen[:count]


def entering(model, tokens, hook_name: str) -> torch.Tensor:
    """The activation at a hook point, heads side by side."""
    found = []
    with torch.no_grad(), installed(model, hook_name, lambda h: found.append(h.detach().clone())):
        model.forward(tokens)
    return found[0]


def axes(model, hook_name: str) -> SAE:
    """An SAE with a feature for each dimension, which reconstructs what has no entry below zero."""
    d = width(model, hook_name)
    with torch.random.fork_rng(devices=[]):
        made = StandardSAE(StandardSAEConfig(d_in=d, d_sae=d))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.eye(d) if name.startswith("W") else torch.zeros(d))
    return SAE(made, hook_name, signature_of(model))


def mask_of(model, dictionary, units) -> ComponentMask:
    chosen = torch.zeros(dictionary.size, dtype=torch.bool)
    chosen[torch.as_tensor(units, dtype=torch.long)] = True
    return ComponentMask({dictionary.site: chosen}, signature_of(model))


def rows_of_tokens(texts: int = 6, length: int = 8, vocabulary: int = 97, seed: int = 0):
    """Random tokens and their lengths, ragged, as models without a tokenizer take them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (texts,), generator=generator)
    lengths[0] = length
    return torch.randint(2, vocabulary, (texts, length), generator=generator), lengths


def planted(editor, toy, answer: int):
    """A dictionary behind the planted model's look-up, and the mask of what says one answer: for each editor its own.

    Of the residual stream the SAE's features are the dimensions, and the codebook's codes all there is at these facts'
    tokens: look-ups of the answer are some of them.
    """
    site = "L0.resid_post"
    if editor.__name__ != "codebook_delete":
        sae = axes(toy.model, site)
        return sae, mask_of(toy.model, sae, [LOOKED_UP + answer])
    tokens = torch.tensor([[0, token, 1] for token in range(2, FIRST_SUBJECT + SUBJECTS)])
    _, kept = toy.model.cache(tokens, [site])
    d = toy.model.signature.d_model
    codebook = Codebook(d, len(tokens) + 2, 1, hook_name=site, linear=0, signature=toy.model.signature)
    with torch.no_grad():
        codebook.codes.copy_(torch.cat([kept[site][:, 1], kept[site][0, [0, 2]]]))
    mine = [1 + i for i in range(SUBJECTS) if i % 4 == answer]
    return codebook, mask_of(toy.model, codebook, mine)


def hand_made(model) -> WeightEdit:
    """New weights for two neurons."""
    units = torch.tensor([0, 2])
    rows = model.rows("L1.mlp.out")[units].float() + 0.1
    return WeightEdit({"L1.mlp.out": units}, {"L1.mlp.out": rows}, model.signature, RunCard("hand", mask="a mask"))


def state_of(model) -> dict:
    """All that an attack could leave behind."""
    everything = [*model.hf.named_parameters(), *model.bridge.named_parameters()]
    return {
        "weights": [p.detach().clone() for _, p in everything],
        "flags": [p.requires_grad for _, p in everything],
        "gradients": [None if p.grad is None else p.grad.clone() for _, p in everything],
        "random": torch.get_rng_state(),
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.hf.modules()
        ],
        "training": [m.training for m in model.hf.modules()],
        "forwards": [name for name, m in model.hf.named_modules() if "forward" in vars(m)],
        "handler": signal.getsignal(signal.SIGINT),
    }


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_untouched(model, before: dict) -> None:
    after = state_of(model)
    assert [name for name in before if not same(before[name], after[name])] == []
