"""Where each unit's weights live: the only module that knows parameter names.

A family is one table from site kind to matrices. A matrix is a parameter name, its einops axes and, if it is fused
with others, which part of it. `Layout.views` turns a parameter into a *view* of shape `[unit, ...]`, so reading,
writing and masking are ordinary indexing on the Hugging Face storage itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

from mechunlearn.errors import MechunlearnError

KINDS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.in", "mlp.gate", "mlp.out")
HEADS, NEURONS, COLUMNS = "(unit d_head) d_model", "unit d_model", "d_model unit"
HEAD_COLUMNS = "d_model (unit d_head)"


@dataclass(frozen=True)
class Matrix:
    """A parameter that holds weights of a site.

    Attributes:
        name: Its name in the Hugging Face module, with `{layer}` for the layer.
        axes: Its dimensions, as einops writes them.
        part: Which of several fused matrices it is; None for a matrix on its own.
        blocks: What the fused matrices are as high as, if they are stacked as blocks of rows.
    """

    name: str
    axes: str
    part: int | None = None
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Modules:
    """Where a family's blocks read and write: the paths of the modules.

    Attributes:
        blocks: The blocks, from the whole module.
        final_norm: The norm in front of the unembedding, from the whole module.
        attention_norm: The norm that attention reads, from the block like all that follow.
        mlp_norm: The norm that the MLP reads.
        mlp: The MLP.
        attention_post: A norm on what attention writes (Gemma 2 and 3), or nothing.
        mlp_post: A norm on what the MLP writes, or nothing.
        centred: Whether norms are LayerNorm; else they are RMSNorm.
        offset: What is added to the weights of the norms.
    """

    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    attention_post: str = ""
    mlp_post: str = ""
    centred: bool = False
    offset: float = 0.0


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


def _with_bias(name: str, axes: str, part: int | None = None, blocks: tuple[str, ...] = ()) -> tuple[Matrix, ...]:
    """A weight whose bias belongs to its units: same leading axis, no input axis."""
    bias_axes = axes.replace("d_model", "").strip()
    return Matrix(f"{name}.weight", axes, part, blocks), Matrix(f"{name}.bias", bias_axes, part, blocks)


def _no_bias(name: str, axes: str) -> tuple[Matrix, ...]:
    return (Matrix(f"{name}.weight", axes),)


def _llama(block: str) -> dict[str, tuple[Matrix, ...]]:
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    return {
        "attn.q": _with_bias(f"{attention}.q_proj", HEADS),
        "attn.k": _with_bias(f"{attention}.k_proj", HEADS),
        "attn.v": _with_bias(f"{attention}.v_proj", HEADS),
        "attn.o": _no_bias(f"{attention}.o_proj", HEAD_COLUMNS),
        "mlp.in": _with_bias(f"{mlp}.up_proj", NEURONS),
        "mlp.gate": _with_bias(f"{mlp}.gate_proj", NEURONS),
        "mlp.out": _no_bias(f"{mlp}.down_proj", COLUMNS),
    }


LLAMA = _llama("model.layers.{layer}")
_QKV, _GATE_UP = ("heads", "kv_heads", "kv_heads"), ("d_mlp", "d_mlp")

FAMILIES: dict[str, dict[str, tuple[Matrix, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), LLAMA),
    "gpt2": {
        "attn.q": _with_bias("transformer.h.{layer}.attn.c_attn", "d_model (part unit d_head)", 0),
        "attn.k": _with_bias("transformer.h.{layer}.attn.c_attn", "d_model (part unit d_head)", 1),
        "attn.v": _with_bias("transformer.h.{layer}.attn.c_attn", "d_model (part unit d_head)", 2),
        "attn.o": _no_bias("transformer.h.{layer}.attn.c_proj", HEADS),
        "mlp.in": _with_bias("transformer.h.{layer}.mlp.c_fc", COLUMNS),
        "mlp.out": _no_bias("transformer.h.{layer}.mlp.c_proj", NEURONS),
    },
    "gpt_neox": {
        "attn.q": _with_bias("gpt_neox.layers.{layer}.attention.query_key_value", "(unit part d_head) d_model", 0),
        "attn.k": _with_bias("gpt_neox.layers.{layer}.attention.query_key_value", "(unit part d_head) d_model", 1),
        "attn.v": _with_bias("gpt_neox.layers.{layer}.attention.query_key_value", "(unit part d_head) d_model", 2),
        "attn.o": _no_bias("gpt_neox.layers.{layer}.attention.dense", HEAD_COLUMNS),
        "mlp.in": _with_bias("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", NEURONS),
        "mlp.out": _no_bias("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", COLUMNS),
    },
    "gptj": {
        "attn.q": _no_bias("transformer.h.{layer}.attn.q_proj", HEADS),
        "attn.k": _no_bias("transformer.h.{layer}.attn.k_proj", HEADS),
        "attn.v": _no_bias("transformer.h.{layer}.attn.v_proj", HEADS),
        "attn.o": _no_bias("transformer.h.{layer}.attn.out_proj", HEAD_COLUMNS),
        "mlp.in": _with_bias("transformer.h.{layer}.mlp.fc_in", NEURONS),
        "mlp.out": _no_bias("transformer.h.{layer}.mlp.fc_out", COLUMNS),
    },
    "phi": {
        "attn.q": _with_bias("model.layers.{layer}.self_attn.q_proj", HEADS),
        "attn.k": _with_bias("model.layers.{layer}.self_attn.k_proj", HEADS),
        "attn.v": _with_bias("model.layers.{layer}.self_attn.v_proj", HEADS),
        "attn.o": _no_bias("model.layers.{layer}.self_attn.dense", HEAD_COLUMNS),
        "mlp.in": _with_bias("model.layers.{layer}.mlp.fc1", NEURONS),
        "mlp.out": _no_bias("model.layers.{layer}.mlp.fc2", COLUMNS),
    },
    "phi3": {
        "attn.q": (Matrix("model.layers.{layer}.self_attn.qkv_proj.weight", HEADS, 0, _QKV),),
        "attn.k": (Matrix("model.layers.{layer}.self_attn.qkv_proj.weight", HEADS, 1, _QKV),),
        "attn.v": (Matrix("model.layers.{layer}.self_attn.qkv_proj.weight", HEADS, 2, _QKV),),
        "attn.o": _no_bias("model.layers.{layer}.self_attn.o_proj", HEAD_COLUMNS),
        "mlp.gate": (Matrix("model.layers.{layer}.mlp.gate_up_proj.weight", NEURONS, 0, _GATE_UP),),
        "mlp.in": (Matrix("model.layers.{layer}.mlp.gate_up_proj.weight", NEURONS, 1, _GATE_UP),),
        "mlp.out": _no_bias("model.layers.{layer}.mlp.down_proj", COLUMNS),
    },
}

_GEMMA_POST = Modules(
    mlp_norm="pre_feedforward_layernorm",
    attention_post="post_attention_layernorm",
    mlp_post="post_feedforward_layernorm",
    offset=1.0,
)
MODULES: dict[str, Modules] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), Modules()),
    "gemma": Modules(offset=1.0),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA_POST),
    "gpt2": Modules("transformer.h", "transformer.ln_f", "ln_1", "ln_2", centred=True),
    "gpt_neox": Modules("gpt_neox.layers", "gpt_neox.final_layer_norm", centred=True),
    "gptj": Modules("transformer.h", "transformer.ln_f", "ln_1", "ln_1", centred=True),
    "phi": Modules(final_norm="model.final_layernorm", mlp_norm="input_layernorm", centred=True),
}


@dataclass(frozen=True)
class Layout:
    """The units of one architecture, the parameters that hold them and the modules that use them.

    Attributes:
        signature: The family, its layers and its widths.
        d_head: The width of a head.
        parallel: Whether the MLP reads what the attention of its layer reads (GPT-J, Phi, Pythia).
    """

    signature: Signature
    d_head: int
    parallel: bool = False

    @classmethod
    def of(cls, config: object) -> "Layout":
        """Read the architecture from a Hugging Face configuration.

        Args:
            config: The configuration.

        Raises:
            MechunlearnError: The family has no table; no mixture of experts has one.
        """
        family = getattr(config, "model_type", type(config).__name__)
        if family not in FAMILIES:
            raise MechunlearnError(
                f"No parameter layout for model type '{family}'. Supported: {', '.join(sorted(FAMILIES))}. "
                "Mixtures of experts and folded norms are not supported; to add a family, write its table in "
                "mechunlearn/model/layout.py."
            )
        read = partial(_first, config)
        d_model, heads = read("hidden_size", "n_embd"), read("num_attention_heads", "n_head")
        layers = read("num_hidden_layers", "n_layer")
        assert d_model and heads and layers
        signature = Signature(
            family=family,
            layers=layers,
            heads=heads,
            kv_heads=read("num_key_value_heads") or heads,
            d_mlp=read("intermediate_size", "n_inner") or 4 * d_model,
            d_model=d_model,
        )
        parallel = family in ("gptj", "phi") or (
            family == "gpt_neox" and getattr(config, "use_parallel_residual", True)
        )
        return cls(signature, read("head_dim") or d_model // heads, parallel)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that have weights."""
        return tuple(kind for kind in KINDS if kind in FAMILIES[self.signature.family])

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
        held = zip(self.parameter_names(layer, kind), FAMILIES[self.signature.family][kind], strict=True)
        found = ((parameters.get(name), matrix) for name, matrix in held)
        return [self._view(parameter, matrix, kind) for parameter, matrix in found if parameter is not None]

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
        return [matrix.name.format(layer=layer) for matrix in FAMILIES[self.signature.family][kind]]

    @property
    def modules(self) -> Modules:
        """Where the blocks read and write."""
        return MODULES[self.signature.family]

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
        matrix = FAMILIES[self.signature.family][kind][0]
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
        axes = FAMILIES[self.signature.family][kind][0].axes
        if axes.index("d_model") < axes.index("d_head"):
            weight = weight.transpose(1, 2)
        return weight, bias[0] if bias else None

    def _view(self, parameter: Tensor, matrix: Matrix, kind: str) -> Tensor:
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
