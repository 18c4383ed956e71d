"""Where a closed-form editor reads and writes.

The facts' prompts, bare and behind prefixes, and the edited token of each.
"""

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


@dataclass(frozen=True, eq=False)
class EditPrompts:
    """The prompts at which each fact is edited: the bare prompt first, then the same behind prefixes.

    Attributes:
        tokens: Prompt and continuation, padded on the right.
        at: The position of the edited token.
        start: The position that predicts the first of the labels.
        labels: What is to follow (-1: none).
        weight: Each prompt's share of a key.
    """

    tokens: Int[Tensor, "fact prompt pos"]
    at: Int[Tensor, "fact prompt"]
    start: Int[Tensor, "fact prompt"]
    labels: Int[Tensor, "fact label"]
    weight: Float[Tensor, " prompt"]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(
        cls,
        model: HookedModel,
        prompts: Prompts,
        position: str,
        prefixes: Sequence[Sequence[int]] = (),
        labels: Int[Tensor, "fact label"] | None = None,
    ) -> "EditPrompts":
        """Return prompts with labels to follow.

        A key is half the bare prompt's and half the mean of the others', as in MEMIT's code.

        Args:
            model: The model.
            prompts: The facts.
            position: The token that is edited, `subject last` or `last`.
            prefixes: Tokens to put in front, behind a special token that begins the prompts.
            labels: What is to follow, by default the answers.

        Raises:
            MechunlearnError: For a prompt without a subject, where the position needs one.
        """
        labels = prompts.answers if labels is None else labels
        at, given = _positions(prompts, position), labels != PAD
        longest = max(map(len, prefixes), default=0)
        width = int((prompts.start + given.sum(1)).max()) + longest
        tokens = torch.zeros(len(prompts), 1 + len(prefixes), width, dtype=torch.long)
        shifts = torch.tensor([0, *map(len, prefixes)])
        special = model.tokenizer.all_special_ids if model.tokenizer is not None else []
        head = int(bool(torch.isin(prompts.tokens[:, 0], torch.tensor(special, dtype=torch.long)).all()))
        rows, steps = (given & (given.cumsum(1) < given.sum(1)[:, None])).nonzero(as_tuple=True)
        for prefix, made in zip([(), *prefixes], tokens.unbind(1), strict=True):
            shift = len(prefix)
            kept = min(prompts.tokens.shape[1], width - shift)
            made[:, shift + head : shift + kept] = prompts.tokens[:, head:kept]
            made[:, :head] = prompts.tokens[:, :head]
            made[:, head : head + shift] = torch.tensor(prefix, dtype=torch.long)
            made[torch.arange(width) > (prompts.start + shift)[:, None]] = 0
            made[rows, prompts.start[rows] + shift + 1 + steps] = labels[rows, steps]
        count = len(prefixes)
        weight = torch.full((1 + count,), 0.5 / max(1, count))
        weight[0] = 0.5 if count else 1.0
        return cls(tokens, at[:, None] + shifts, prompts.start[:, None] + shifts, labels, weight)

    def select(self, facts: Tensor) -> "EditPrompts":
        """Return these facts, no wider than the longest of them.

        Args:
            facts: Their numbers.
        """
        width = int((self.start[facts] + (self.labels[facts] != PAD).sum(1)[:, None]).max())
        return replace(
            self,
            tokens=self.tokens[facts][..., :width],
            at=self.at[facts],
            start=self.start[facts],
            labels=self.labels[facts],
        )

    def mixed(self, x: Float[Tensor, "_fact prompt _width"]) -> Float[Tensor, "_fact _width"]:
        """Return the mean over a fact's prompts by weight, in float64.

        Args:
            x: What is at the edited token of each prompt.
        """
        return torch.einsum("fpw,p->fw", x.double(), self.weight.to(x.device, torch.float64))

    @property
    def bare(self) -> "EditPrompts":
        """The bare prompts alone."""
        return replace(
            self, tokens=self.tokens[:, :1], at=self.at[:, :1], start=self.start[:, :1], weight=torch.ones(1)
        )


def _positions(prompts: Prompts, position: str) -> Int[Tensor, " fact"]:
    """Return where the edited token is."""
    if position == "last":
        return prompts.start
    if (prompts.spans < 0).any():
        raise MechunlearnError(
            f"{int((prompts.spans[:, 1] < 0).sum())} of the {len(prompts)} prompts name no subject, so they have no "
            "token "
            "'subject last'. Give position='last', or prompts with subjects."
        )
    return torch.minimum(prompts.spans[:, 1], prompts.start)


def sampled_prefixes(model: HookedModel, texts: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """Return the first tokens of some texts, drawn by the seed, all of one length; none without a tokenizer or a text.

    Args:
        model: The model.
        texts: Where they are from.
        count: How many, at most.
        seed: Seed of the draw.
    """
    if model.tokenizer is None or not texts or not count:
        return []
    special = set(model.tokenizer.all_special_ids)
    drawn = random.Random(seed).sample(list(texts), min(len(texts), 4 * count))
    encoded = [[t for t in ids if t not in special] for ids in model.tokenizer(drawn)["input_ids"]]
    return [ids[:PREFIX_TOKENS] for ids in encoded if len(ids) >= PREFIX_TOKENS][:count]


def output_sites(model: HookedModel, mask: ComponentMask) -> dict[int, Int[Tensor, " _unit"]]:
    """Return the chosen neurons by layer, of the mask's `mlp.out` sites, which alone a closed form moves.

    Args:
        model: The model, on whose device they are.
        mask: The mask.

    Raises:
        MechunlearnError: For a mask of another architecture or without such a site.
    """
    mask.check(model.signature)
    found = {
        Component.parse(site).layer: chosen.nonzero().flatten().to(model.device)
        for site, chosen in mask.sites.items()
        if Component.parse(site).kind == "mlp.out" and chosen.any()
    }
    if not found:
        raise MechunlearnError(
            f"The mask has no neuron of an MLP's output (sites: {', '.join(mask.sites) or 'none'}), and a closed form "
            "changes "
            "nothing else. Expected sites such as 'L3.mlp.out'; fact_lookup(...).above(0) gives them."
        )
    return dict(sorted(found.items()))


@torch.no_grad()
def seen(
    model: HookedModel, edit_prompts: EditPrompts, sites: Sequence[str], batch_size: int
) -> Iterator[tuple[Int[Tensor, " _fact"], dict[str, Float[Tensor, "_fact prompt _width"]]]]:
    """Yield what is at these sites at the edited tokens, batch by batch.

    One forward pass each, ending at the last site.

    Args:
        model: The model.
        edit_prompts: The facts.
        sites: Where to look.
        batch_size: Prompts in a batch.

    Yields:
        The numbers of the facts, and what each site holds.
    """
    per = edit_prompts.tokens.shape[1]
    for facts in torch.split(edit_prompts.start.max(1).values.argsort(), max(1, batch_size // per)):
        part = edit_prompts.select(facts)
        kept: dict[str, Tensor] = {}
        at = part.at.flatten().to(model.device)
        model.decoder.observe(part.tokens.flatten(0, 1), {site: partial(_keep, kept, site, at) for site in sites})
        yield facts, {site: found.reshape(len(facts), per, -1) for site, found in kept.items()}


def _keep(kept: dict[str, Tensor], site: str, at: Int[Tensor, " row"], x: Tensor) -> None:
    kept[site] = x[torch.arange(len(x), device=x.device), at]
