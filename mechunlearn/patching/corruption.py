"""Clean and corrupt runs of the same facts: what patching takes activations from."""

import hashlib
from collections.abc import Sequence
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

    `base` is the run that is patched, `source` what is put in, `other` the run it comes from (none for zero and mean),
    `differs` the positions from the first corrupt token on; `clean` and `corrupt` are the metric of the two runs (the same where only activations are replaced).
    """

    prompts: Prompts
    base: Run
    source: dict[str, Tensor]
    other: Run | None
    differs: Bool[Tensor, "fact pos"]
    clean: Float[Tensor, " fact"]
    corrupt: Float[Tensor, " fact"]


def check_prompts(model: HookedModel, prompts: Prompts, batch_size: int = 1) -> None:
    """Raises `MechunlearnError` if the prompts are empty or longer than the model's context, or the batch is no number."""
    if batch_size < 1:
        raise MechunlearnError(f"A batch of {batch_size} facts is out of range. Expected batch_size=1 or more.")
    context = getattr(model.hf.config, "max_position_embeddings", None)
    if len(prompts) == 0:
        raise MechunlearnError("There are no facts to localize: the prompts are empty.")
    if context is not None and prompts.tokens.shape[1] > context:
        row = int(prompts.lengths.argmax())
        raise MechunlearnError(
            f"Fact {row} has {int(prompts.lengths[row])} tokens, the model's context is {context}. Expected prompts that fit: "
            "shorten it, or leave it out with prompts.select."
        )


def check_finite(model: HookedModel, values: Tensor, tokens: Tensor, metric: Metric) -> None:
    """Raises `MechunlearnError` that names the layer where activations stop being finite."""
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
    corrupt: str,
    denoise: bool,
    seed: int,
    means: dict[str, Tensor] | None = None,
    sigma: float | int = 3.0,
    base_sites: Sequence[str] = (),
) -> Paired:
    """Run a batch of facts clean and corrupt; the corrupt tokens are those of `with_corruption`.

    The run that is patched keeps `base_sites`.
    """
    at = positions_read(metric, prompts).to(model.device)
    clean = model.decoder.record(prompts.tokens, at, sites if denoise else base_sites)
    if corrupt in ("zero", "mean"):
        value = per_fact(metric, clean.logits, prompts)[0]
        check_finite(model, value, prompts.tokens, metric)
        everywhere = torch.arange(prompts.tokens.shape[1]) < prompts.lengths[:, None]
        return Paired(prompts, clean, _ablated(model, prompts, sites, means), None, everywhere, value, value)
    hooks = {"L0.resid_pre": partial(_noised, _noise(model, prompts, seed, sigma))} if corrupt == "noise" else {}
    tokens = prompts.tokens if corrupt == "noise" else prompts.corrupt
    other = model.decoder.record(tokens, at, base_sites if denoise else sites, hooks)
    values = [per_fact(metric, run.logits, prompts)[0] for run in (clean, other)]
    for value, seen in zip(values, (prompts.tokens, tokens), strict=True):
        check_finite(model, value, seen, metric)
    base, source = (other, clean.kept) if denoise else (clean, other.kept)
    changed = subjects(prompts) if corrupt == "noise" else prompts.tokens != prompts.corrupt
    inside = torch.arange(prompts.tokens.shape[1]) < prompts.lengths[:, None]
    differs = (changed.cumsum(1) > 0) & inside
    return Paired(prompts, base, source, clean if denoise else other, differs, values[0], values[1])


def with_corruption(prompts: Prompts, corrupt: str, seed: int, model: HookedModel) -> Prompts:
    """The prompts with other corrupt tokens: `random` subjects of the same length, or another fact (`resample`)."""
    if corrupt not in CORRUPTIONS:
        raise MechunlearnError(f"Unknown corruption '{corrupt}'. Expected one of {', '.join(CORRUPTIONS)}.")
    if corrupt == "random":
        generator = torch.Generator().manual_seed(seed)
        embed: Any = model.hf.get_input_embeddings()
        drawn = torch.randint(len(embed.weight), prompts.tokens.shape, generator=generator)
        return replace(prompts, corrupt=torch.where(subjects(prompts), drawn, prompts.tokens))
    if corrupt == "resample":
        generator = torch.Generator().manual_seed(seed)
        source = torch.arange(len(prompts))
        for length in prompts.lengths.unique():
            same = (prompts.lengths == length).nonzero().flatten()
            order = same[torch.randperm(len(same), generator=generator)]
            source[order] = order.roll(1)
        return replace(prompts, corrupt=prompts.tokens[source])
    return prompts


def unchanged(prompts: Prompts, corrupt: str) -> int:
    """How many facts the corruption leaves as they are: same tokens, or no token to hide."""
    if corrupt in ("zero", "mean"):
        return 0
    changed = subjects(prompts) if corrupt == "noise" else prompts.tokens != prompts.corrupt
    return int((~changed.any(1)).sum())


def subjects(prompts: Prompts) -> Bool[Tensor, "fact pos"]:
    """The subject's tokens; where no subject is named, the tokens in which clean and corrupt differ."""
    places = torch.arange(prompts.tokens.shape[1])
    inside = (places >= prompts.spans[:, :1]) & (places <= prompts.spans[:, 1:])
    return torch.where(prompts.spans[:, :1] >= 0, inside, prompts.tokens != prompts.corrupt)


def _noise(model: HookedModel, prompts: Prompts, seed: int, sigma: float | int) -> Float[Tensor, "fact pos d_model"]:
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
    return sigma * scale * noise.to(model.device, whole.dtype)


def _noised(noise: Tensor, resid: Tensor) -> Tensor:
    return resid + noise


def role_means(
    model: HookedModel, prompts: Prompts, sites: Sequence[str], batch_size: int
) -> dict[str, Float[Tensor, "role ..."]]:
    """The mean clean activation at each site by token role, over all facts."""
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(len(ROLES))
    for rows in torch.arange(len(prompts)).split(batch_size):
        part = prompts.select(rows)
        run = model.decoder.record(part.tokens, torch.zeros(len(part), 1, dtype=torch.long), sites)
        flat = part.roles.flatten()
        counts += torch.bincount(flat, minlength=len(ROLES))
        for site, z in run.kept.items():
            total = sums.setdefault(site, z.new_zeros(len(ROLES), *z.shape[2:], dtype=torch.float32))
            total.index_add_(0, flat.to(z.device), z.flatten(0, 1).float())
    return {
        site: total / counts.clamp(min=1).to(total).view(-1, *[1] * (total.ndim - 1)) for site, total in sums.items()
    }


def _ablated(
    model: HookedModel, prompts: Prompts, sites: Sequence[str], means: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    if means is not None:
        return {site: means[site][prompts.roles.to(model.device)] for site in sites}
    run = model.decoder.record(prompts.tokens, torch.zeros(len(prompts), 1, dtype=torch.long), sites)
    return {site: torch.zeros_like(z) for site, z in run.kept.items()}
