"""Features removed from MLP output weights: the in-weights form of a clamp."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit.remake import editor
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.dictionaries import SAE
from mechunlearn.features.feature_edit import feature_units
from mechunlearn.features.firing import Texts, observed, tokenized
from mechunlearn.model.hook_points import layer_of
from mechunlearn.model.hooked import HookedModel

DAMPING = 0.01  # of the largest gain of a norm: rows are not taken back through smaller ones


@editor
def dictionary_rows(
    model: HookedModel,
    mask: ComponentMask,
    forget: Texts,
    retain: Texts | None = None,
    *,
    dictionary: SAE,
    scale: float = 1.0,
    seed: int = 0,
) -> WeightEdit:
    """Take a topic's SAE features out of what MLP neurons write: an edit of weights, which can be given away.

    Each W_out row w of the MLPs up to the dictionary's hook point is brought to the mean norm of the activations on
    `forget`, in the sign that the selected features see more of, and encoded. Where selected features are active they
    are set to -`scale` times what they were, the row is decoded, what the dictionary missed is added back, and the
    norm and sign are undone (after PISCES, arXiv 2505.22586). Where a norm follows the MLP (Gemma 2 and 3), a row is
    what it is behind the norm's weights. Rows in which no selected feature is active stay as they are, bit by bit. It
    removes only what MLPs write: a feature that the embedding or attention writes stays.

    Args:
        model: The model to edit.
        mask: The features to take out, of this dictionary.
        forget: The topic: prompts, texts, or tokens with lengths.
        retain: Not looked at. A random control is matched on it, where it is given.
        dictionary: An SAE of a residual stream.
        scale: How many times what they were the features are set to, with the other sign; 0 takes them out.
        seed: Not used; every editor has one.

    Returns:
        New rows of the neurons that write the features: the edit's own `mask` is of these, not of features.

    Raises:
        MechunlearnError: For a codebook, a mask of another dictionary or one that selects nothing, a negative scale,
            a hook point that is no residual stream, and if no row has any of the features.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.features.dictionaries import load_dictionary
    >>> from mechunlearn.localize import feature_discovery
    >>> model, sae = load_model("factworld"), load_dictionary("factworld-sae")
    >>> topic, other = ["The knight fought the army."] * 8, ["The cook baked the soup."] * 8
    >>> found = feature_discovery(model, topic, dictionary=sae, against=other)
    >>> edit = dictionary_rows(model, found.top(units=4), topic, dictionary=sae)
    >>> {component.kind for component in edit.mask}
    {'mlp.out'}
    """
    del retain, seed
    if not isinstance(dictionary, SAE):
        raise MechunlearnError(f"{dictionary} is no SAE: its codes are not directions that rows are sums of.")
    units = feature_units(mask, dictionary, model)
    layer, kind = layer_of(dictionary.hook_name), dictionary.hook_name.split(".", 1)[1]
    if not kind.startswith("resid_"):
        raise MechunlearnError(
            f"'{dictionary.hook_name}' is no residual stream, so no rows write into it. Use resid_post."
        )
    norm = _norm(model, dictionary, forget)
    sites, rows = {}, {}
    for below in range(layer + (kind == "resid_post")):
        site = f"L{below}.mlp.out"
        old = model.rows(site)
        through, back = _norm_behind(model, below, old)
        changed, change = _change(old.float() * through, dictionary, units.to(old.device), norm, float(scale))
        if changed.any():
            new = old.float() + change * back
            sites[site] = changed.nonzero().flatten().cpu()
            rows[site] = new[changed].to(old.dtype).cpu()
    if not sites:
        raise MechunlearnError(
            "No MLP row has any of the mask's features, so there is nothing to edit. Clamp them instead."
        )
    return WeightEdit(sites, rows, model.signature, RunCard(""))


@torch.no_grad()
def _change(
    written: Float[Tensor, "neuron d_model"],
    dictionary: SAE,
    units: Int[Tensor, " unit"],
    norm: float,
    scale: float,
) -> tuple[Bool[Tensor, " neuron"], Float[Tensor, "neuron d_model"]]:
    """Return which neurons have the features, and how what each writes changes without them."""
    stretch = norm / written.norm(dim=1, keepdim=True).clamp(min=1e-12)
    z = dictionary.encode(torch.stack([written * stretch, -written * stretch]))
    sign = z[..., units].sum(-1).argmax(0)
    active = z[sign, torch.arange(len(written), device=written.device)]
    edited = active.clone()
    edited[:, units] *= -scale
    change = (dictionary.decode(edited) - dictionary.decode(active)).float() / stretch
    return (active[:, units] > 0).any(-1), change * torch.where(sign == 0, 1.0, -1.0)[:, None]


def _norm_behind(
    model: HookedModel, layer: int, rows: Float[Tensor, "neuron d_model"]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Return what each dimension is multiplied by behind the MLP (a norm's gain, or a number), and the way back."""
    if not model.layout.modules.mlp_post:
        scale = torch.full(rows.shape[1:], model.layout.residual_scale, device=rows.device)
        return scale, 1 / scale
    norm: Any = model.decoder.part(layer, "mlp_post")
    gain = model.layout.modules.offset + norm.weight.detach().float()
    return gain, gain / (gain.square() + (DAMPING * gain.abs().max()).square())


def _norm(model: HookedModel, dictionary: SAE, forget: Texts) -> float:
    """Return the mean norm of the activations on the topic."""
    tokens, counted = tokenized(model, forget)
    seen: list[torch.Tensor] = []
    for rows in torch.split(torch.arange(len(tokens)), 64):

        def see(h: torch.Tensor, rows: torch.Tensor = rows) -> None:
            seen.append(h.detach().float().norm(dim=-1).cpu()[counted[rows]])

        observed(model, dictionary, tokens[rows], see)
    return float(torch.cat(seen).mean())
