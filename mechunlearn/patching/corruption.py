"""Clean and corrupt runs of the same facts: what patching takes activations from."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import ROLES, Prompts
from mechunlearn.metrics.answers import Metric, name_of, per_fact, positions_read
from mechunlearn.model.decoder import Run
from mechunlearn.model.hooked import HookedModel

CORRUPTIONS = ("prompts", "random", "noise", "resample", "zero", "mean")


@dataclass(frozen=True)
class Paired:
    """A batch of facts, run clean and corrupt, with activations at sites.

    Attributes:
        prompts: The facts.
        base: The run that is patched.
        source: The activations that are put in, by site.
        other: The run that `source` comes from; None for zero and mean.
        differs: The positions from the first corrupt token on.
        clean: The metric of the clean run.
        corrupt: The metric of the corrupt run; that of the clean one where only activations are replaced.
    """

    prompts: Prompts
    base: Run
    source: dict[str, Tensor]
    other: Run | None
    differs: Bool[Tensor, "fact pos"]
    clean: Float[Tensor, " fact"]
    corrupt: Float[Tensor, " fact"]


def check_prompts(model: HookedModel, prompts: Prompts, batch_size: int = 1) -> None:
    """Check that there are facts, that they fit the model, and that a batch is a number of them.

    Args:
        model: The model that will run them.
        prompts: The facts.
        batch_size: Facts a batch.

    Raises:
        MechunlearnError: The prompts are empty or longer than the model's context, or the batch is smaller than 1.
    """
    if batch_size < 1:
        raise MechunlearnError(f"A batch of {batch_size} facts is out of range. Expected batch_size=1 or more.")
    context = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    if len(prompts) == 0:
        raise MechunlearnError("There are no facts to localize: the prompts are empty.")
    if context is not None and prompts.tokens.shape[1] > context:
        row = int(prompts.lengths.argmax())
        raise MechunlearnError(
            f"Fact {row} has {int(prompts.lengths[row])} tokens, the model's context is {context}. Expected prompts "
            "that fit: "
            "shorten it, or leave it out with prompts.select."
        )


def check_finite(model: HookedModel, values: Tensor, tokens: Tensor, metric: Metric) -> None:
    """Check that a metric is finite, and name the layer where activations stop being so if it is not.

    Args:
        model: The model that ran.
        values: The metric by fact.
        tokens: The tokens it ran on, `[fact pos]`.
        metric: The metric.

    Raises:
        MechunlearnError: A value is infinite or not a number.
    """
    if not torch.isfinite(values).all():
        where = model.decoder.first_not_finite(tokens)
        raise MechunlearnError(
            f"The metric '{name_of(metric)}' is not finite; activations first overflow at {where}. "
            "Load the model with dtype='float32' or 'bfloat16', or check its weights."
        )


def paired(
    model: HookedModel,
    prompts: Prompts,
    sites: Sequence[str],
    metric: Metric,
    corrupt: str = "prompts",
    denoise: bool = False,
    seed: int = 0,
    means: Mapping[str, Tensor] | None = None,
    sigma: float = 3.0,
    base_sites: Sequence[str] = (),
) -> Paired:
    """Run a batch of facts clean and corrupt; the corrupt tokens are those of `with_corruption`.

    Args:
        model: The model.
        prompts: The facts.
        sites: Where the run that activations are taken from is kept.
        metric: What is measured of both runs.
        corrupt: One of `CORRUPTIONS`.
        denoise: Patch the corrupt run with clean activations, not the clean run with corrupt ones.
        seed: Seed of the noise.
        means: The mean activations by role, for `corrupt="mean"` (see `role_means`).
        sigma: Size of the noise, in standard deviations of the embeddings.
        base_sites: Where the run that is patched is kept.
    """
    at = positions_read(metric, prompts).to(model.device)
    clean = model.decoder.record(prompts.tokens, at, sites if denoise else base_sites)
    if corrupt in ("zero", "mean"):
        value = per_fact(metric, clean.logits, prompts)[0]
        check_finite(model, value, prompts.tokens, metric)
        return Paired(prompts, clean, _ablated(model, prompts, sites, means), None, inside(prompts), value, value)
    hooks = {"L0.resid_pre": partial(torch.add, _noise(model, prompts, seed, sigma))} if corrupt == "noise" else {}
    tokens = prompts.tokens if corrupt == "noise" else prompts.corrupt
    other = model.decoder.record(tokens, at, base_sites if denoise else sites, hooks)
    values = [per_fact(metric, run.logits, prompts)[0] for run in (clean, other)]
    for value, seen in zip(values, (prompts.tokens, tokens), strict=True):
        check_finite(model, value, seen, metric)
    base, source = (other, clean.kept) if denoise else (clean, other.kept)
    differs = (_changed(prompts, corrupt).cumsum(1) > 0) & inside(prompts)
    return Paired(prompts, base, source, clean if denoise else other, differs, values[0], values[1])


def with_corruption(prompts: Prompts, corrupt: str, seed: int, model: HookedModel) -> Prompts:
    """Return the prompts with other corrupt tokens, where the corruption is one of tokens.

    Args:
        prompts: The facts.
        corrupt: One of `CORRUPTIONS`: `random` subjects have as many tokens, `resample` takes another fact's prompt.
        seed: Seed of what is drawn.
        model: The model whose vocabulary is drawn from.

    Raises:
        MechunlearnError: The corruption is none of `CORRUPTIONS`.
    """
    if corrupt not in CORRUPTIONS:
        raise MechunlearnError(f"Unknown corruption '{corrupt}'. Expected one of {', '.join(CORRUPTIONS)}.")
    generator = torch.Generator().manual_seed(seed)
    if corrupt == "random":
        embed: Any = model.hf.get_input_embeddings()
        drawn = torch.randint(len(embed.weight), prompts.tokens.shape, generator=generator)
        return replace(prompts, corrupt=torch.where(subjects(prompts), drawn, prompts.tokens))
    if corrupt == "resample":
        source = torch.arange(len(prompts))
        for length in sorted(set(prompts.lengths.tolist())):
            same = (prompts.lengths == length).nonzero().flatten()
            order = same[torch.randperm(len(same), generator=generator)]
            source[order] = order.roll(1)
        return replace(prompts, corrupt=prompts.tokens[source])
    return prompts


def unchanged(prompts: Prompts, corrupt: str) -> int:
    """Count the facts that a corruption leaves as they are: same tokens, or no token to hide.

    Args:
        prompts: The facts, after `with_corruption`.
        corrupt: One of `CORRUPTIONS`.
    """
    return 0 if corrupt in ("zero", "mean") else int((~_changed(prompts, corrupt).any(1)).sum())


def subjects(prompts: Prompts) -> Bool[Tensor, "fact pos"]:
    """Mark the subject's tokens; where no subject is named, the tokens in which clean and corrupt differ.

    Args:
        prompts: The facts.
    """
    places = torch.arange(prompts.tokens.shape[1])
    within = (places >= prompts.spans[:, :1]) & (places <= prompts.spans[:, 1:])
    return torch.where(prompts.spans[:, :1] >= 0, within, prompts.tokens != prompts.corrupt)


def inside(prompts: Prompts) -> Bool[Tensor, "fact pos"]:
    """Mark the positions that are not padding.

    Args:
        prompts: The facts.
    """
    return torch.arange(prompts.tokens.shape[1]) < prompts.lengths[:, None]


def _changed(prompts: Prompts, corrupt: str) -> Bool[Tensor, "fact pos"]:
    return subjects(prompts) if corrupt == "noise" else prompts.tokens != prompts.corrupt


def _noise(model: HookedModel, prompts: Prompts, seed: int, sigma: float) -> Float[Tensor, "fact pos d_model"]:
    """One draw a fact, which depends on its tokens and the seed alone: the same in every patched run and batch."""
    where = subjects(prompts)
    noise = torch.zeros(*prompts.tokens.shape, model.signature.d_model)
    for row, (tokens, chosen) in enumerate(zip(prompts.tokens, where, strict=True)):
        number = hashlib.sha256(f"{seed} {tokens[: prompts.lengths[row]].tolist()}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)
        noise[row, chosen] = torch.randn(int(chosen.sum()), noise.shape[-1], generator=generator)
    with torch.no_grad():
        embed: Any = model.hf.get_input_embeddings()
        whole = embed.weight
        some = torch.arange(min(64, len(whole)), device=model.device)
        scale = whole.std() * embed(some).norm() / whole[some].norm()  # Gemma scales what it embeds
    return noise.to(model.device, whole.dtype).mul_(sigma * scale)


def role_means(
    model: HookedModel, prompts: Prompts, sites: Sequence[str], batch_size: int
) -> dict[str, Float[Tensor, "role ..."]]:
    """Average the clean activation at each site by token role, over all facts.

    Args:
        model: The model.
        prompts: The facts.
        sites: Where to look.
        batch_size: Facts a batch.

    Returns:
        One row a role of `ROLES`, by site.
    """
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(len(ROLES))
    for rows in torch.split(torch.arange(len(prompts)), batch_size):
        part = prompts.select(rows)
        flat = part.roles.flatten()
        counts += torch.bincount(flat, minlength=len(ROLES))
        for site, z in _kept(model, part, sites).items():
            total = sums.setdefault(site, z.new_zeros(len(ROLES), *z.shape[2:], dtype=torch.float32))
            total.index_add_(0, flat.to(z.device), z.flatten(0, 1).float())
    return {
        site: total / counts.clamp(min=1).to(total).view(-1, *[1] * (total.ndim - 1)) for site, total in sums.items()
    }


def _ablated(
    model: HookedModel, prompts: Prompts, sites: Sequence[str], means: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    if means is not None:
        return {site: means[site][prompts.roles.to(model.device)] for site in sites}
    return {site: torch.zeros_like(z) for site, z in _kept(model, prompts, sites).items()}


def _kept(model: HookedModel, prompts: Prompts, sites: Sequence[str]) -> dict[str, Tensor]:
    """The clean activations at sites."""
    return model.decoder.record(prompts.tokens, torch.zeros(len(prompts), 1, dtype=torch.long), sites).kept
