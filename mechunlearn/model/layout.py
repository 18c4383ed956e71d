"""Where each unit's weights live, by the table of the model's family (`families`).

A matrix is a parameter name, its einops axes and, if it is fused with others, which part of it. `Layout.views` turns
a parameter into a *view* of shape `[unit, ...]`, so reading, writing and masking are ordinary indexing on the Hugging
Face storage itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.families import FAMILIES, MODULES, Matrix, Modules, Table, why_refused
from mechunlearn.model.families import KINDS as KINDS

UNKNOWN = "Its family is not known here. mechunlearn.model.register_family adds one: its docstring shows the table of a family."


@dataclass(frozen=True)
class Signature:
    """The architecture that a mask or an edit belongs to.

    Attributes:
        family: The model type of Hugging Face.
        layers: The number of blocks.
        heads: The number of query heads a layer.
        kv_heads: The number of key and value heads a layer.
        d_mlp: The number of neurons a layer.
        d_model: The width of the residual stream.

    >>> str(Signature("llama", 2, 4, 2, 64, 32))
    'llama: 2 layers, 4 heads, 2 kv heads, d_mlp 64, d_model 32'
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    d_mlp: int
    d_model: int

    def __str__(self) -> str:
        return (
            f"{self.family}: {self.layers} layers, {self.heads} heads, {self.kv_heads} kv heads, "
            f"d_mlp {self.d_mlp}, d_model {self.d_model}"
        )

    def units(self, kind: str) -> int | None:
        """Count the units of a site: None for features and codes, whose number their dictionary knows.

        Args:
            kind: The kind of the site.
        """
        if kind in ("attn.q", "attn.o"):
            return self.heads
        if kind in ("attn.k", "attn.v"):
            return self.kv_heads
        return self.d_mlp if kind.startswith("mlp.") else None


@dataclass(frozen=True)
class Layout:
    """The units of one architecture, the parameters that hold them and the modules that use them.

    Attributes:
        signature: The family, its layers and its widths.
        d_head: The width of a head.
        parallel: Whether the MLP reads what the attention of its layer reads (GPT-J, Phi, Pythia, Cohere).
        residual_scale: What attention and MLP write is multiplied by this on its way into the stream (Granite).
        logit_scale: What the unembedding gives is multiplied by this (Cohere, Granite).
    """

    signature: Signature
    d_head: int
    parallel: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @classmethod
    def of(cls, config: object) -> "Layout":
        """Read the architecture from a Hugging Face configuration, or from its text part.

        Args:
            config: The configuration.

        Raises:
            MechunlearnError: The family has no table; no mixture of experts has one.
        """
        family = getattr(config, "model_type", type(config).__name__)
        text: Any = getattr(config, "text_config", None) or config
        reason = why_refused(family, text)
        if reason or family not in FAMILIES:
            raise MechunlearnError(
                f"No parameter layout for model type '{family}'. {reason or UNKNOWN} "
                f"Supported: {', '.join(sorted(FAMILIES))}."
            )
        read, modules = partial(_first, text), MODULES[family]
        d_model, heads = read("hidden_size", "n_embd", "d_model"), read("num_attention_heads", "n_head", "n_heads")
        layers = read("num_hidden_layers", "n_layer", "n_layers")
        if not (d_model and heads and layers):
            raise MechunlearnError(
                f"The configuration of this {family} model does not say how wide and how deep it is. Expected "
                "hidden_size, num_attention_heads and num_hidden_layers."
            )
        signature = Signature(
            family=family,
            layers=layers,
            heads=heads,
            kv_heads=read("num_key_value_heads") or heads,
            d_mlp=read("intermediate_size_mlp", "intermediate_size", "n_inner", "ffn_dim") or 4 * d_model,
            d_model=d_model,
        )
        said = modules.parallel
        return cls(
            signature,
            read("head_dim") or d_model // heads,
            bool(getattr(text, said, True)) if isinstance(said, str) else said,
            float(getattr(text, modules.residual_scale, 1.0)),
            float(getattr(text, modules.logit_scale, 1.0)) / float(getattr(text, modules.logit_divisor, 1.0)),
        )

    @property
    def _table(self) -> Table:
        if self.signature.family not in FAMILIES:
            raise MechunlearnError(f"No parameter layout for model type '{self.signature.family}'. {UNKNOWN}")
        return FAMILIES[self.signature.family]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that have weights."""
        return tuple(kind for kind in KINDS if kind in self._table)

    def views(
        self, parameters: Mapping[str, Tensor | None], layer: int, kind: str
    ) -> list[Shaped[Tensor, "unit *rest"]]:  # noqa: F821
        """Return views of a site's weights, one a parameter that holds some, unit first.

        Writing to them writes the model.

        Args:
            parameters: Those of the model by name; what is missing or None has no view.
            layer: The layer of the site.
            kind: The kind of the site.

        Raises:
            MechunlearnError: The architecture has no weights of this kind.
        """
        held = zip(self.parameter_names(layer, kind), self.matrices(kind), strict=True)
        found = ((parameters.get(name), matrix) for name, matrix in held)
        return [self.view(parameter, matrix, kind) for parameter, matrix in found if parameter is not None]

    def matrices(self, kind: str) -> tuple[Matrix, ...]:
        """Return what may hold weights of a kind of site: the weight, then its bias.

        Args:
            kind: The kind of the site.
        """
        return self._table[kind]

    def parameter_names(self, layer: int, kind: str) -> list[str]:
        """List the parameters that may hold weights of a site; not every model has the biases.

        Args:
            layer: The layer of the site.
            kind: The kind of the site.

        Raises:
            MechunlearnError: The architecture has no weights of this kind.
        """
        if kind not in self.kinds:
            hint = " Features and codes live in activations: a FeatureEdit takes them." if ":" in kind else ""
            raise MechunlearnError(
                f"A {self.signature.family} model has no weights of kind '{kind}'. "
                f"Its kinds are {', '.join(self.kinds)}.{hint}"
            )
        return [matrix.name.format(layer=layer) for matrix in self.matrices(kind)]

    @property
    def modules(self) -> Modules:
        """Where the blocks read and write."""
        known = MODULES[self.signature.family]
        return replace(known, mlp_norm=known.parallel_norm) if self.parallel and known.parallel_norm else known

    def module_name(self, layer: int, kind: str) -> str:
        """Return the path of the module that multiplies with a site's weights.

        Args:
            layer: The layer of the site.
            kind: The kind of the site.
        """
        return self.parameter_names(layer, kind)[0].removesuffix(".weight")

    def heads(self, kind: str, projected: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch unit d_head"]:
        """Return a view by head of what a query, key or value projection gives. Writing to it writes the projection.

        Args:
            kind: `attn.q`, `attn.k` or `attn.v`.
            projected: What the module gives, which may hold all three.
        """
        matrix = self.matrices(kind)[0]
        axes = " ".join(matrix.axes.replace("d_model", "").split())
        view = self._block(projected, matrix, -1)
        sizes = {"unit": self.signature.units(kind), "d_head": self.d_head}
        if "part" not in axes:
            return rearrange(view, f"... {axes} -> ... unit d_head", **sizes)
        return rearrange(view, f"... {axes} -> part ... unit d_head", part=3, **sizes)[matrix.part]

    def head_weights(
        self, parameters: Mapping[str, Tensor], layer: int, kind: str
    ) -> tuple[Float[Tensor, "unit d_head d_model"], Float[Tensor, "unit d_head"] | None]:
        """Return weights and biases of an attention projection by head, in the same orientation for every family.

        Args:
            parameters: Those of the model by name.
            layer: The layer.
            kind: `attn.q`, `attn.k`, `attn.v` or `attn.o`.
        """
        weight, *bias = self.views(parameters, layer, kind)
        axes = self.matrices(kind)[0].axes
        if axes.index("d_model") < axes.index("d_head"):
            weight = weight.transpose(1, 2)
        return weight, bias[0] if bias else None

    def view(self, parameter: Tensor, matrix: Matrix, kind: str) -> Tensor:
        """Return the view of one parameter, unit first.

        Args:
            parameter: The parameter.
            matrix: How it holds the weights.
            kind: The kind of the site.
        """
        view, axes = parameter.detach(), matrix.axes
        sizes = {"unit": self.signature.units(kind)}
        view = self._block(view, matrix, 0)
        if "d_head" in axes:
            sizes["d_head"] = self.d_head
        rest = [axis for axis in axes.replace("(", "").replace(")", "").split() if axis not in ("unit", "part")]
        if not rest:
            rest = ["1"]  # one bias a unit
        if "part" not in axes:
            return rearrange(view, f"{axes} -> unit {' '.join(rest)}", **sizes)
        return rearrange(view, f"{axes} -> part unit {' '.join(rest)}", part=3, **sizes)[matrix.part]

    def _block(self, tensor: Tensor, matrix: Matrix, dim: int) -> Tensor:
        """The rows of one of several stacked matrices."""
        if not matrix.blocks:
            return tensor
        unit = {"heads": self.signature.heads, "kv_heads": self.signature.kv_heads, "d_mlp": self.signature.d_mlp}
        rows = [unit[block] * (1 if block == "d_mlp" else self.d_head) for block in matrix.blocks]
        assert matrix.part is not None
        return tensor.narrow(dim, sum(rows[: matrix.part]), rows[matrix.part])


def _first(config: object, *names: str) -> int | None:
    """What a configuration has under the first of these names that it gives."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def flat(views: list[Tensor]) -> Float[Tensor, "unit weight"]:
    """Copy the weights of each unit into one row.

    Args:
        views: As `Layout.views` returns them.
    """
    return torch.cat([view.flatten(1) for view in views], dim=1).clone()
