"""Features removed from MLP output weights: the in-weights form of a clamp."""

import torch

from mechunlearn.activity import Texts, observed, tokenized
from mechunlearn.components import ComponentMask
from mechunlearn.dictionaries import SAE, layer_of
from mechunlearn.edits import WeightEdit
from mechunlearn.errors import MechunlearnError
from mechunlearn.feature_edits import feature_units
from mechunlearn.hooked import HookedModel
from mechunlearn.runcard import RunCard, Stopwatch


def dictionary_rows(
    model: HookedModel,
    mask: ComponentMask,
    forget: Texts,
    retain: Texts | None = None,
    *,
    dictionary: SAE,
    strength: float | int = 1.0,
    seed: int = 0,
) -> WeightEdit:
    """Take a topic's SAE features out of what MLP neurons write: an edit of weights, which can be given away.

    Each W_out row w of the MLPs up to the dictionary's hook point is brought to the mean norm of the activations on
    `forget`, in the sign that the selected features see more of, and encoded. Where selected features are active they are
    set to -`strength` times what they were, the row is decoded, what the dictionary missed is added back, and the norm and
    sign are undone (after PISCES, arXiv 2505.22586). Rows in which no selected feature is active stay as they are, bit by
    bit. It removes only what MLPs write: a feature that the embedding or attention writes stays.

    Raises `MechunlearnError` for a codebook, a mask of another dictionary or one that selects nothing, a hook point that is
    no residual stream, and if no row has any of the features.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.dictionaries import load_dictionary
    >>> from mechunlearn.localize import feature_discovery
    >>> model, sae = load_model("factworld"), load_dictionary("factworld-sae")
    >>> topic, other = ["The knight fought the army."] * 8, ["The cook baked the soup."] * 8
    >>> found = feature_discovery(model, topic, dictionary=sae, against=other)
    >>> edit = dictionary_rows(model, found.top(units=4), topic, dictionary=sae)
    >>> {component.kind for component in edit.mask}
    {'mlp.out'}
    """
    del retain
    watch = Stopwatch()
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
        old = model.rows(site).float()
        changed, new = _without(old, dictionary, units.to(old.device), norm, float(strength))
        if changed.any():
            sites[site] = changed.nonzero().flatten().cpu()
            rows[site] = new[changed].to(model.rows(site).dtype).cpu()
    if not sites:
        raise MechunlearnError(
            "No MLP row has any of the mask's features, so there is nothing to edit. Clamp them instead."
        )
    settings = {"strength": strength, "dictionary": dictionary.site}
    card = RunCard("dictionary_rows", model.fingerprint, seed=seed, settings=settings, mask=mask.fingerprint)
    return WeightEdit(sites, rows, model.signature, watch.stamp(card))


@torch.no_grad()
def _without(old, dictionary: SAE, units, norm: float, strength: float):
    """Which rows have the features, and all rows without them."""
    scale = norm / old.norm(dim=1, keepdim=True).clamp(min=1e-12)
    both = torch.stack([old * scale, -old * scale])
    z = dictionary.encode(both)
    sign = z[..., units].sum(-1).argmax(0)
    at = torch.arange(len(old), device=old.device)
    mine, active = both[sign, at], z[sign, at]
    changed = (active[:, units] > 0).any(-1)
    edited = active.clone()
    edited[:, units] = torch.where(active[:, units] > 0, -strength * active[:, units], active[:, units])
    new = mine + dictionary.decode(edited) - dictionary.decode(active)
    return changed, new / scale * torch.where(sign == 0, 1.0, -1.0)[:, None]


def _norm(model: HookedModel, dictionary: SAE, forget: Texts) -> float:
    tokens, counted = tokenized(model, forget)
    seen: list[torch.Tensor] = []
    for rows in torch.arange(len(tokens)).split(64):

        def see(h: torch.Tensor, rows: torch.Tensor = rows) -> None:
            seen.append(h.detach().float().norm(dim=-1).cpu()[counted[rows]])

        observed(model, dictionary, tokens[rows], see)
    return float(torch.cat(seen).mean())
