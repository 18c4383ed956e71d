"""What one component writes and another reads: contributions, linearised norms, and exact patches of single edges.

Writers are the input, each head and each MLP; readers are each query head, each key and value head, each MLP and the
logits (see `artifacts.edges`). In models that normalise what attention writes (Gemma 2 and 3) a
head's contribution passes that norm with its scale frozen at the clean run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.decoder import Decoder, Run
from mechunlearn.model.layout import Layout
from mechunlearn.patching.sweep import Patch

ATTENTION = ("attn.q", "attn.k", "attn.v")


def check_streams(decoder: Decoder) -> None:
    """Check that no hook stands at the entry of a block: what is read would not be what was written.

    Args:
        decoder: The model.

    Raises:
        MechunlearnError: There is such a hook.
    """
    if any(block._forward_pre_hooks for block in decoder.blocks):
        raise MechunlearnError(
            "A hook changes the residual stream (resid_pre or resid_mid), so it is not the sum of what components "
            "write and "
            "edges are not defined. Use activation_patching, or hook what is written: attn_out or mlp_out."
        )


def writer_sites(layout: Layout) -> list[str]:
    """List the sites a run must keep so that `written` can be computed.

    Args:
        layout: The model's layout.
    """
    kinds = ["attn.o", "mlp_out", *(["attn_projected"] if layout.modules.attention_post else [])]
    return [f"L{layer}.{kind}" for layer in range(layout.signature.layers) for kind in kinds]


def rows_before(layout: Layout, layer: int, mlp: bool) -> int:
    """Count the writers before a reader: those of earlier layers, and the heads of this one for a sequential MLP.

    Args:
        layout: The model's layout.
        layer: The reader's layer.
        mlp: Whether the reader is an MLP.
    """
    heads = layout.signature.heads
    return 1 + layer * (heads + 1) + (heads if mlp and not layout.parallel else 0)


def written(decoder: Decoder, change: Run, scales: dict[int, Tensor]) -> Float[Tensor, "writer fact pos d_model"]:
    """Compute what each writer adds to the residual stream.

    Args:
        decoder: The model.
        change: Its activations at `writer_sites`, or a change of them: it is linear.
        scales: The scale of each post-norm (see `frozen_scales`).
    """
    layout = decoder.layout
    parameters = dict(decoder.hf.named_parameters())
    first = change.resid[0]
    made = first.new_empty(1 + layout.signature.layers * (layout.signature.heads + 1), *first.shape)
    made[0] = first
    row = 1
    for layer in range(layout.signature.layers):
        weight = layout.head_weights(parameters, layer, "attn.o")[0]
        heads = made[row : row + layout.signature.heads]
        z = change.kept[f"L{layer}.attn.o"].permute(2, 0, 1, 3).flatten(1, 2)
        torch.bmm(z, weight, out=heads.flatten(1, 2))
        if layer in scales:
            heads *= scales[layer]
        made[row + layout.signature.heads] = change.kept[f"L{layer}.mlp_out"]
        row += layout.signature.heads + 1
    return made


def frozen_scales(
    decoder: Decoder, run: Run, layers: Sequence[int] | None = None
) -> dict[int, Float[Tensor, "fact pos d_model"]]:
    """Compute the factor by which each layer scales what its attention writes in a run; {} where nothing does.

    That is a post-norm (its scale in this run), or a number of the architecture (Granite).

    Args:
        decoder: The model.
        run: The run, with `attn_projected` kept.
        layers: The layers; all by default.
    """
    layers, found = range(decoder.layout.signature.layers) if layers is None else layers, {}
    if not decoder.layout.modules.attention_post:
        scale = decoder.layout.residual_scale
        return {} if scale == 1 else dict.fromkeys(layers, torch.full_like(run.resid[0], scale))
    for layer in layers:
        norm = Norm.of(decoder, decoder.part(layer, "attention_post"))
        found[layer] = norm.weight / norm.spread(run.kept[f"L{layer}.attn_projected"])
    return found


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm by its parts.

    Attributes:
        module: The norm itself.
        weight: Its gain.
        centred: Whether it subtracts the mean.
        eps: What it adds to the variance.
    """

    module: nn.Module
    weight: Float[Tensor, " d_model"]
    centred: bool
    eps: float

    @classmethod
    def of(cls, decoder: Decoder, module: Any) -> "Norm":
        """Take a norm of a model apart.

        Args:
            decoder: The model.
            module: One of its norms.
        """
        modules = decoder.layout.modules
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5))  # OLMo's norm has neither, nor a gain
        weight = getattr(module, "weight", None)
        if weight is None:
            weight = torch.ones(decoder.layout.signature.d_model, device=decoder.hf.device, dtype=decoder.hf.dtype)
        return cls(module, weight.detach() + modules.offset, modules.centred, eps)

    def spread(self, x: Tensor) -> Float[Tensor, "*batch 1"]:
        """Compute the standard deviation, or root mean square, that the norm divides by.

        Args:
            x: What enters the norm.
        """
        return self._centre(x.float()).pow(2).mean(-1, keepdim=True).add(self.eps).sqrt().to(x.dtype)

    def normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise (before the weight); give the inverse of the spread too.

        Args:
            x: What enters the norm.
        """
        centred = self._centre(x.float())
        inverse = centred.pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (centred * inverse).to(x.dtype), inverse.to(x.dtype)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def weigh(self, weight: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Turn rows of a matrix that reads the norm's output into rows that read the normalised and centred input.

        Args:
            weight: The rows.
        """
        weight = weight * self.weight
        return weight - weight.mean(-1, keepdim=True) if self.centred else weight


def attention_gradients(
    decoder: Decoder, layer: int, x: Float[Tensor, "token d_model"], projected: Sequence[Float[Tensor, "token _head d"]]
) -> Float[Tensor, "reader token d_model"]:
    """Compute d metric / d residual stream through each query, key and value head alone.

    The vector-Jacobian product of norm and projection, by hand: with n the normalised input, s the inverse of its
    spread and w = weight * W (centred for LayerNorm), it is s (w^T g - n (w^T g . n) / d_model).

    Args:
        decoder: The model.
        layer: The layer.
        x: The residual stream that its attention reads.
        projected: d metric / d q, k and v, by head.
    """
    parameters = dict(decoder.hf.named_parameters())
    weights = torch.cat([decoder.layout.head_weights(parameters, layer, kind)[0] for kind in ATTENTION])
    if not decoder.layout.modules.attention_norm:
        return torch.bmm(torch.cat(list(projected), 1).transpose(0, 1), weights)
    norm = Norm.of(decoder, decoder.part(layer, "attention_norm"))
    normal, inverse = norm.normal(x)
    weight = norm.weigh(weights)
    gradient = torch.cat(list(projected), 1).transpose(0, 1) * inverse
    along = torch.bmm(normal.expand(len(weight), -1, -1), weight.transpose(1, 2))
    along = (along * gradient).sum(-1, keepdim=True) / x.shape[-1]
    return torch.bmm(gradient, weight).addcmul_(normal, along, value=-1)


def mlp_gradient(
    decoder: Decoder, layer: int, x: Float[Tensor, "token d_model"], gradient: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token d_model"]:
    """Compute d metric / d residual stream through the MLP alone.

    Args:
        decoder: The model.
        layer: The layer.
        x: The residual stream that the MLP reads.
        gradient: d metric / d what it reads, normalised.
    """
    if not decoder.layout.modules.mlp_norm:
        return gradient
    norm = Norm.of(decoder, decoder.part(layer, "mlp_norm"))
    normal, inverse = norm.normal(x)
    weighed = norm.weigh(gradient) * inverse
    return weighed - normal * (weighed * normal).mean(-1, keepdim=True)


@dataclass(frozen=True)
class EdgePatch(Patch):
    """Cells in which one reader alone reads a change of one writer.

    A reader of `attn.q`, `attn.k` or `attn.v` is a head; `mlp_in` is an MLP, `resid_pre` behind the last layer the
    logits.

    The reader's input is that of the base run plus `change[writers[i]]`. The logits read the change on top of the run
    at hand, unless they are `held` too.

    Attributes:
        decoder: The model.
        read: The residual stream that the reader reads in the base run.
        change: What writers add in the other run minus what they add in the base run.
        writers: By cell, the writer.
        heads: By cell, the reader's head.
        held: Whether the logits too read the base run plus the change.
    """

    decoder: Decoder
    read: Float[Tensor, "fact pos d_model"]
    change: Float[Tensor, "writer fact pos d_model"]
    writers: Int[Tensor, " cell"]
    heads: Int[Tensor, " cell"]
    held: bool = False

    def applied(self, seen: Float[Tensor, "some fact t *unit"], chosen: Tensor, start: int) -> Tensor:
        """Let the reader of each cell read the change; see `sweep.Patch.applied`.

        Args:
            seen: Activations of the cells as computed.
            chosen: Indices of the cells in this patch.
            start: The position at which `seen` begins.
        """
        span = slice(start, start + seen.shape[2])
        change = self.change[self.writers[chosen], :, span]
        if self.kind == "resid_pre" and not self.held:
            return seen + change
        x = self.read[:, span] + change
        if self.kind == "resid_pre":
            return x
        if self.kind == "mlp_in":
            normed: Tensor = self.decoder.part(self.layer, "mlp_norm")(x)
            return normed
        parameters = dict(self.decoder.hf.named_parameters())
        weight, bias = self.decoder.layout.head_weights(parameters, self.layer, self.kind)
        heads = self.heads[chosen]
        projected = torch.einsum("cfpd,chd->cfph", self.decoder.part(self.layer, "attention_norm")(x), weight[heads])
        if bias is not None:
            projected = projected + bias[heads][:, None, None]
        changed = seen.clone()
        changed[torch.arange(len(chosen)), :, :, heads] = projected
        return changed


def read_by(run: Run, layout: Layout, layer: int, kind: str) -> Float[Tensor, "fact pos d_model"]:
    """Give the residual stream that a reader of this kind reads.

    Args:
        run: A run; of a sequential model it must keep `resid_mid`.
        layout: The model's layout.
        layer: The reader's layer.
        kind: What it reads, as in `EdgePatch`.
    """
    if kind == "mlp_in" and not layout.parallel:
        return run.kept[f"L{layer}.resid_mid"]
    return run.resid[layer]
