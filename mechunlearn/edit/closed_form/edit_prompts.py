"""Where a closed-form editor reads and writes: the facts' prompts, bare and behind prefixes, and the edited token of each."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel

PREFIX_TOKENS = 10
PLACES = ("subject last", "last")


@dataclass(frozen=True, eq=False)
class EditPrompts:
    """Each fact in a few contexts: the bare prompt first, then the same behind prefixes.

    `tokens` are `[fact context pos]`, prompt and continuation padded on the right; `at` is the edited token, `start` the
    position that predicts the first of `labels` (-1: none). `weight` is each context's share of a key.
    """

    tokens: Int[Tensor, "fact context pos"]
    at: Int[Tensor, "fact context"]
    start: Int[Tensor, "fact context"]
    labels: Int[Tensor, "fact label"]
    weight: Float[Tensor, " context"]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(
        cls,
        model: HookedModel,
        prompts: Prompts,
        place: str,
        prefixes: Sequence[Sequence[int]] = (),
        labels: Int[Tensor, "fact label"] | None = None,
    ) -> "EditPrompts":
        """The prompts with `labels` (by default their answers) to follow, edited at a token role.

        Prefixes go behind a special token that begins the prompts. A key is half the bare prompt's and
        half the mean of the others', as MEMIT's code has it. Raises `MechunlearnError` for an unknown role, or a prompt
        without it.
        """
        labels = prompts.answers if labels is None else labels
        at, given = _places(prompts, place), labels != PAD
        longest = max(map(len, prefixes), default=0)
        width = int((prompts.start + given.sum(1)).max()) + longest
        tokens = torch.zeros(len(prompts), 1 + len(prefixes), width, dtype=torch.long)
        shifts = torch.tensor([0, *map(len, prefixes)])
        special = model.tokenizer.all_special_ids if model.tokenizer is not None else []
        head = int(bool(torch.isin(prompts.tokens[:, 0], torch.tensor(special, dtype=torch.long)).all()))
        rows, steps = (given & (given.cumsum(1) < given.sum(1)[:, None])).nonzero(as_tuple=True)
        for context, prefix in enumerate([(), *prefixes]):
            shift = len(prefix)
            kept = min(prompts.tokens.shape[1], width - shift)
            tokens[:, context, shift + head : shift + kept] = prompts.tokens[:, head:kept]
            tokens[:, context, :head] = prompts.tokens[:, :head]
            tokens[:, context, head : head + shift] = torch.tensor(prefix, dtype=torch.long)
            tokens[:, context][torch.arange(width) > (prompts.start + shift)[:, None]] = 0
            tokens[rows, context, prompts.start[rows] + shift + 1 + steps] = labels[rows, steps]
        count = len(prefixes)
        weight = torch.full((1 + count,), 0.5 / max(1, count))
        weight[0] = 0.5 if count else 1.0
        return cls(tokens, at[:, None] + shifts, prompts.start[:, None] + shifts, labels, weight)

    def select(self, facts: Tensor) -> "EditPrompts":
        """These facts, no wider than the longest of them."""
        width = int((self.start[facts] + (self.labels[facts] != PAD).sum(1)[:, None]).max())
        return replace(
            self,
            tokens=self.tokens[facts][..., :width],
            at=self.at[facts],
            start=self.start[facts],
            labels=self.labels[facts],
        )

    def mixed(self, x: Float[Tensor, "_fact context _width"]) -> Float[Tensor, "_fact _width"]:
        """The mean over contexts by weight, in float64."""
        return torch.einsum("fcw,c->fw", x.double(), self.weight.to(x.device, torch.float64))

    @property
    def bare(self) -> "EditPrompts":
        return replace(
            self, tokens=self.tokens[:, :1], at=self.at[:, :1], start=self.start[:, :1], weight=torch.ones(1)
        )


def _places(prompts: Prompts, place: str) -> Int[Tensor, " fact"]:
    if place not in PLACES:
        raise MechunlearnError(
            f"Cannot edit at the token role '{place}'. Expected one of {', '.join(PLACES)}; a localization by role says "
            "which: see Localization.strongest_role."
        )
    if place == "last":
        return prompts.start
    if (prompts.spans < 0).any():
        raise MechunlearnError(
            f"{int((prompts.spans[:, 1] < 0).sum())} of the {len(prompts)} prompts name no subject, so they have no token "
            "'subject last'. Give position='last', or prompts with subjects."
        )
    return torch.minimum(prompts.spans[:, 1], prompts.start)


def sampled_prefixes(model: HookedModel, texts: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """The first tokens of some passages, drawn by the seed, all of one length; none without a tokenizer or a text."""
    if model.tokenizer is None or not texts or not count:
        return []
    special = set(model.tokenizer.all_special_ids)
    drawn = random.Random(seed).sample(list(texts), min(len(texts), 4 * count))
    encoded = [[t for t in ids if t not in special] for ids in model.tokenizer(drawn)["input_ids"]]
    return [ids[:PREFIX_TOKENS] for ids in encoded if len(ids) >= PREFIX_TOKENS][:count]


def output_sites(model: HookedModel, mask: ComponentMask) -> dict[int, Int[Tensor, " _unit"]]:
    """The chosen neurons by layer, of the mask's `mlp.out` sites, which alone a closed form moves.

    Raises `MechunlearnError` for a mask of another architecture or without such a site.
    """
    mask.check(model.signature)
    found = {
        Component.parse(site).layer: chosen.nonzero().flatten()
        for site, chosen in mask.sites.items()
        if Component.parse(site).kind == "mlp.out" and chosen.any()
    }
    if not found:
        raise MechunlearnError(
            f"The mask has no neuron of an MLP's output (sites: {', '.join(mask.sites) or 'none'}), and a closed form changes "
            "nothing else. Expected sites such as 'L3.mlp.out'; fact_lookup(...).above(0) gives them."
        )
    return dict(sorted(found.items()))


@torch.no_grad()
def seen(
    model: HookedModel, edit_prompts: EditPrompts, sites: Sequence[str], batch_size: int
) -> Iterator[tuple[Int[Tensor, " _fact"], dict[str, Float[Tensor, "_fact context _width"]]]]:
    """What is at these sites at the edited tokens, for batches of facts: one forward pass each, ending at the last site."""
    per = edit_prompts.tokens.shape[1]
    for facts in edit_prompts.start.max(1).values.argsort().split(max(1, batch_size // per)):
        part = edit_prompts.select(facts)
        kept: dict[str, Tensor] = {}
        at = part.at.flatten().to(model.device)
        model.decoder.observe(part.tokens.flatten(0, 1), {site: partial(_keep, kept, site, at) for site in sites})
        yield facts, {site: found.unflatten(0, (-1, per)) for site, found in kept.items()}


def _keep(kept: dict[str, Tensor], site: str, at: Int[Tensor, " row"], x: Tensor) -> None:
    kept[site] = x[torch.arange(len(x), device=x.device), at]
