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
    """One parameter of a site: `axes` names its dimensions, `part` is (index, sizes of the stacked row blocks) or an index."""

    name: str
    axes: str
    part: int | None = None
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Modules:
    """Where a family's blocks read and write: `blocks` and `final_norm` from the whole module, the rest within a block.

    `attention_post` and `mlp_post` are norms on what attention and the MLP write (Gemma 2 and 3). Norms are LayerNorm if
    `centred`, else RMSNorm with a factor of `offset` + weight.
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
    """The architecture a mask or an edit belongs to.

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
        """How many units a site of this kind has; None for features and codes, whose number the dictionary knows."""
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

    `parallel` says that the MLP reads what the attention of its layer reads (GPT-J, Phi, Pythia).
    """

    signature: Signature
    d_head: int
    parallel: bool = False

    @classmethod
    def of(cls, config: object) -> "Layout":
        """Read the architecture from a Hugging Face configuration.

        Raises `MechunlearnError` for a family without a table, and for mixtures of experts.
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
        return tuple(kind for kind in KINDS if kind in FAMILIES[self.signature.family])

    def views(
        self, parameters: Mapping[str, Tensor], layer: int, kind: str, only: str | None = None
    ) -> list[Shaped[Tensor, "unit *rest"]]:  # noqa: F821
        """Views of a site's weights, one per parameter that holds some (or of `only` one), unit first.

        Writing to them writes the model.
        """
        if kind not in self.kinds:
            hint = " Features and codes live in activations: a FeatureEdit takes them." if ":" in kind else ""
            raise MechunlearnError(
                f"A {self.signature.family} model has no weights of kind '{kind}'. "
                f"Its kinds are {', '.join(self.kinds)}.{hint}"
            )
        found = []
        for matrix in FAMILIES[self.signature.family][kind]:
            name = matrix.name.format(layer=layer)
            parameter = parameters.get(name) if only in (None, name) else None
            if parameter is not None:
                found.append(self._view(parameter, matrix, kind))
        return found

    def parameter_names(self, layer: int, kind: str) -> list[str]:
        return [matrix.name.format(layer=layer) for matrix in FAMILIES[self.signature.family][kind]]

    @property
    def modules(self) -> Modules:
        return MODULES[self.signature.family]

    def module_name(self, layer: int, kind: str) -> str:
        """The module that multiplies with a site's weights, from the whole module."""
        return self.parameter_names(layer, kind)[0].removesuffix(".weight")

    def heads(self, kind: str, projected: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch unit d_head"]:
        """A view of what a query, key or value projection gives, by head; writing to it writes the projection."""
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
        """Weights and biases of an attention projection by head, always in this orientation."""
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
    """The weights of each unit as one row, copied."""
    return torch.cat([view.flatten(1) for view in views], dim=1).clone()
