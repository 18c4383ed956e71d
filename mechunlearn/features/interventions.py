"""Codebooks and what feature edits do to activations, in plain torch: this file travels with an exported model.

It imports nothing of the package, so that an exported folder can load it by itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Codes(nn.Module):
    """A discrete bottleneck: each activation becomes the sum of the `used` codes nearest to it by cosine.

    `hook_ids` is an identity that the ids `[..., groups * used]` go through: a forward hook on it sees or replaces
    them.

    Args:
        d_model: The width of activations.
        size: The number of codes.
        used: How many codes are summed (of each group).
        groups: Into how many parts what is looked up is cut, each with `size / groups` codes of its own.
        linear: How many times as wide a linear map and ReLU before the look-up make it, with a linear map behind the
            sum; 0 has no linear maps.
    """

    def __init__(self, d_model: int, size: int, used: int, groups: int = 1, linear: int = 2) -> None:
        super().__init__()
        self.d_model, self.size, self.used, self.groups, self.linear = d_model, size, used, groups, linear
        inner = d_model * (linear or 1)
        self.encoder = nn.Linear(d_model, inner) if linear else None
        self.codes = nn.Parameter(torch.randn(size, inner // groups) / d_model**0.5)
        self.decoder = nn.Linear(inner, d_model) if linear else None
        self.hook_ids = nn.Identity()

    def entering(self, h: Tensor) -> Tensor:
        """Return what is looked up.

        Args:
            h: Activations `[..., d_model]`.
        """
        h = h.to(self.codes.dtype)
        return h if self.encoder is None else functional.relu(self.encoder(h))

    def leaving(self, summed: Tensor) -> Tensor:
        """Return the activations that sums of codes stand for.

        Args:
            summed: Sums `[..., d_model * linear]`.
        """
        return summed if self.decoder is None else self.decoder(summed)

    def nearest(self, entering: Tensor, used: int | None = None, without: Tensor | None = None) -> Tensor:
        """Return the ids of the nearest codes `[..., groups * used]`, nearest first in each group.

        Args:
            entering: What is looked up.
            used: How many of each group; None is the number of the bottleneck.
            without: Codes to pass over, bool `[size]`.
        """
        parts = entering.unflatten(-1, (self.groups, -1))
        codes = functional.normalize(self.codes, dim=-1).unflatten(0, (self.groups, -1))
        # of one activation all cosines share its norm, which changes no order
        cosines = parts[..., 0, :] @ codes[0].T if self.groups == 1 else torch.einsum("...gd,gkd->...gk", parts, codes)
        if without is not None:
            banned = without.view(self.groups, -1) if self.groups > 1 else without
            cosines = cosines.masked_fill(banned, -torch.inf)
        ids = cosines.topk(self.used if used is None else used, dim=-1).indices
        if self.groups == 1:
            return ids
        first = torch.arange(self.groups, device=ids.device)[:, None] * (self.size // self.groups)
        return (ids + first).flatten(-2)

    def summed(self, ids: Tensor, without: Tensor | None = None) -> Tensor:
        """Return the sum of codes.

        Args:
            ids: Their ids `[..., groups * used]`.
            without: Codes that count as zero, bool `[size]`.
        """
        codes = self.codes if without is None else self.codes.masked_fill(without[:, None], 0.0)
        if self.groups == 1:
            flat = functional.embedding_bag(ids.reshape(-1, ids.shape[-1]), codes, mode="sum")
            return flat.view(*ids.shape[:-1], -1)
        return codes[ids.unflatten(-1, (self.groups, -1))].sum(-2).flatten(-2)

    def forward(self, h: Tensor) -> Tensor:
        """Return the activation that takes the place of h.

        Gradients reach h as if nothing stood between (straight-through).

        Args:
            h: Activations `[..., d_model]`.
        """
        new = self.leaving(self.summed(self.hook_ids(self.nearest(self.entering(h)))))
        return new + (h - h.detach()) if h.requires_grad else new


class CodeDeletion(nn.Module):
    """The bottleneck without some codes.

    Args:
        codes: The bottleneck.
        deleted: The codes, bool `[size]`.
        reselect: Whether the next nearest codes take their places; else they count as zero.
    """

    deleted: Tensor

    def __init__(self, codes: Codes, deleted: Tensor, reselect: bool = True) -> None:
        super().__init__()
        self.codes, self.reselect = codes, reselect
        self.register_buffer("deleted", deleted)

    def forward(self, h: Tensor) -> Tensor:
        """Return the activation that takes the place of h.

        Args:
            h: Activations `[..., d_model]`.
        """
        ids = self.codes.nearest(self.codes.entering(h), without=self.deleted if self.reselect else None)
        empty = None if self.reselect else self.deleted
        new = self.codes.leaving(self.codes.summed(self.codes.hook_ids(ids), empty))
        return new + (h - h.detach()) if h.requires_grad else new


class PlainSAE(nn.Module):
    """The arithmetic of a sparse autoencoder.

    Args:
        d_model: The width of activations.
        size: The number of features.
        activation: `relu`, `topk` or `jumprelu` (with a threshold for each feature).
        k: How many features `topk` keeps.
        centred: Whether the decoder's bias is subtracted before encoding.
    """

    def __init__(self, d_model: int, size: int, activation: str, k: int = 0, centred: bool = True) -> None:
        super().__init__()
        self.activation, self.k, self.centred = activation, k, centred
        self.W_enc = nn.Parameter(torch.zeros(d_model, size))
        self.b_enc = nn.Parameter(torch.zeros(size))
        self.W_dec = nn.Parameter(torch.zeros(size, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        if activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(size))

    def encode(self, h: Tensor) -> Tensor:
        """Return how strongly each feature is active, `[..., size]`.

        Args:
            h: Activations `[..., d_model]`.
        """
        before = (h.to(self.W_enc.dtype) - (self.b_dec if self.centred else 0)) @ self.W_enc + self.b_enc
        z = functional.relu(before)
        if self.activation == "topk":
            kept = z.topk(self.k, dim=-1)
            return torch.zeros_like(z).scatter(-1, kept.indices, kept.values)
        return z * (before > self.threshold) if self.activation == "jumprelu" else z

    def decode(self, z: Tensor) -> Tensor:
        """Return the activations that features stand for, `[..., d_model]`.

        Args:
            z: How strongly each feature is active, `[..., size]`.
        """
        return z @ self.W_dec + self.b_dec


class FeatureClamp(nn.Module):
    """Some features are set to values where they are active.

    Args:
        sae: The SAE.
        units: The features, `[unit]`.
        values: Their values, `[unit]`.
        error: Whether what the dictionary misses is added back.
        gate: "token", or "sequence": only once enough of the sequence's tokens so far have had one of the features.
        share: The share of them that a sequence must exceed.
    """

    units: Tensor
    values: Tensor

    def __init__(
        self, sae: Any, units: Tensor, values: Tensor, error: bool = True, gate: str = "token", share: float = 0.0
    ) -> None:
        super().__init__()
        self.sae, self.error, self.gate, self.share = sae, error, gate, share
        self.register_buffer("units", units)
        self.register_buffer("values", values)

    def forward(self, h: Tensor) -> Tensor:
        """Return the activation that takes the place of h.

        Args:
            h: Activations `[..., pos, d_model]`.
        """
        z = self.sae.encode(h)
        mine = z[..., self.units]
        active = mine > 0
        if self.gate == "sequence":
            active = active & (shares(active.any(-1)) > self.share)[..., None]
        clamped = torch.where(active, self.values.to(z), mine)
        changed = z.clone()
        changed[..., self.units] = clamped
        new = self.sae.decode(changed).to(h.dtype)
        made: Tensor = h + (new - self.sae.decode(z).to(h.dtype)) if self.error else new
        return made


def shares(fired: Tensor) -> Tensor:
    """Return the share of the tokens of each sequence so far that has fired, `[..., pos]`: causal.

    Args:
        fired: Whether each token has, `[..., pos]`.
    """
    return fired.float().cumsum(-1) / torch.arange(1, fired.shape[-1] + 1, device=fired.device)


def attach(module: nn.Module, side: str, intervention: nn.Module) -> Any:
    """Let an intervention see, and replace, the first tensor that enters or leaves a module.

    Args:
        module: The module.
        side: "in" or "out".
        intervention: What is called with the tensor, and returns its replacement.

    Returns:
        The handle, whose `remove()` ends it.
    """

    def entering(_: nn.Module, args: Any, kwargs: Any) -> Any:
        name = None if args else "hidden_states"
        if name is None:
            return (intervention(args[0]), *args[1:]), kwargs
        return args, {**kwargs, name: intervention(kwargs[name])}

    def leaving(_: nn.Module, args: Any, out: Any) -> Any:
        return (intervention(out[0]), *out[1:]) if isinstance(out, tuple) else intervention(out)

    if side == "in":
        return module.register_forward_pre_hook(entering, with_kwargs=True)
    return module.register_forward_hook(leaving)


def build(part: dict[str, Any]) -> nn.Module:
    """Build an intervention of the right shapes from its description, for a checkpoint to fill.

    Args:
        part: The description, one of those in the checkpoint's configuration.
    """
    kind, about = part["kind"], part["about"]
    if kind == "delete":
        return CodeDeletion(Codes(**about), torch.zeros(about["size"], dtype=torch.bool), part["reselect"])
    units = part["units"]
    held = torch.zeros(units, dtype=torch.long), torch.zeros(units)
    return FeatureClamp(PlainSAE(**about), *held, part["error"], part["gate"], part["share"])
