"""One table a model family: which parameters hold which weights, and where the blocks read and write.

The tables are the only place that knows parameter names. `register_family` adds one of a user's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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


Table = Mapping[str, tuple[Matrix, ...]]


@dataclass(frozen=True)
class Modules:
    """Where a family's blocks read and write: the paths of the modules, and the fields of the configuration that matter.

    Attributes:
        blocks: The blocks, from the whole module.
        final_norm: The norm in front of the unembedding, from the whole module.
        attention_norm: The norm that attention reads, from the block like all that follow; nothing if it reads the
            residual stream itself (OLMo 2 and 3, EXAONE 4).
        mlp_norm: The norm that the MLP reads, or nothing.
        mlp: The MLP.
        attention_post: A norm on what attention writes (Gemma 2 and 3, OLMo 2 and 3, GLM 4, EXAONE 4), or nothing.
        mlp_post: A norm on what the MLP writes, or nothing.
        centred: Whether norms are LayerNorm; else they are RMSNorm.
        offset: What is added to the weights of the norms.
        parallel: Whether the MLP reads what the attention of its layer reads, or the field that says so.
        parallel_norm: The norm that the MLP reads in parallel blocks, if it is not `mlp_norm`.
        residual_scale: The field by which what attention and MLP write is multiplied (Granite), or nothing.
        logit_scale: The field by which logits are multiplied (Cohere), or nothing.
        logit_divisor: The field by which logits are divided (Granite), or nothing.
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
    parallel: bool | str = False
    parallel_norm: str = ""
    residual_scale: str = ""
    logit_scale: str = ""
    logit_divisor: str = ""


def _with_bias(name: str, axes: str, part: int | None = None, blocks: tuple[str, ...] = ()) -> tuple[Matrix, ...]:
    """A weight whose bias belongs to its units: same leading axis, no input axis."""
    bias_axes = axes.replace("d_model", "").strip()
    return Matrix(f"{name}.weight", axes, part, blocks), Matrix(f"{name}.bias", bias_axes, part, blocks)


def _no_bias(name: str, axes: str) -> tuple[Matrix, ...]:
    return (Matrix(f"{name}.weight", axes),)


def _llama(layers: str = "model.layers", mlp: str = "mlp") -> dict[str, tuple[Matrix, ...]]:
    attention, neurons = f"{layers}.{{layer}}.self_attn", f"{layers}.{{layer}}.{mlp}"
    return {
        "attn.q": _with_bias(f"{attention}.q_proj", HEADS),
        "attn.k": _with_bias(f"{attention}.k_proj", HEADS),
        "attn.v": _with_bias(f"{attention}.v_proj", HEADS),
        "attn.o": _no_bias(f"{attention}.o_proj", HEAD_COLUMNS),
        "mlp.in": _with_bias(f"{neurons}.up_proj", NEURONS),
        "mlp.gate": _with_bias(f"{neurons}.gate_proj", NEURONS),
        "mlp.out": _no_bias(f"{neurons}.down_proj", COLUMNS),
    }


def _two_matrices(mlp_in: str, mlp_out: str) -> dict[str, tuple[Matrix, ...]]:
    """An MLP without a gate."""
    return {"mlp.in": _with_bias(mlp_in, NEURONS), "mlp.out": _no_bias(mlp_out, COLUMNS)}


LLAMA = _llama()
_ATTENTION = {kind: matrices for kind, matrices in LLAMA.items() if kind.startswith("attn.")}
_QKV, _GATE_UP = ("heads", "kv_heads", "kv_heads"), ("d_mlp", "d_mlp")
_FUSED_GATE = {
    "mlp.gate": (Matrix("model.layers.{layer}.mlp.gate_up_proj.weight", NEURONS, 0, _GATE_UP),),
    "mlp.in": (Matrix("model.layers.{layer}.mlp.gate_up_proj.weight", NEURONS, 1, _GATE_UP),),
    "mlp.out": _no_bias("model.layers.{layer}.mlp.down_proj", COLUMNS),
}
_LIKE_LLAMA = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("olmo", "olmo2", "olmo3", "smollm3", "granite", "stablelm", "cohere", "exaone4"),
)

FAMILIES: dict[str, Table] = {
    **dict.fromkeys(_LIKE_LLAMA, LLAMA),
    **dict.fromkeys(("gemma3", "mistral3"), _llama("model.language_model.layers")),
    "llama4_text": _llama(mlp="feed_forward"),
    "starcoder2": {
        **_ATTENTION,
        **_two_matrices("model.layers.{layer}.mlp.c_fc", "model.layers.{layer}.mlp.c_proj"),
    },
    "glm4": {**_ATTENTION, **_FUSED_GATE},
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
        **_two_matrices("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", "gpt_neox.layers.{layer}.mlp.dense_4h_to_h"),
    },
    "gptj": {
        "attn.q": _no_bias("transformer.h.{layer}.attn.q_proj", HEADS),
        "attn.k": _no_bias("transformer.h.{layer}.attn.k_proj", HEADS),
        "attn.v": _no_bias("transformer.h.{layer}.attn.v_proj", HEADS),
        "attn.o": _no_bias("transformer.h.{layer}.attn.out_proj", HEAD_COLUMNS),
        **_two_matrices("transformer.h.{layer}.mlp.fc_in", "transformer.h.{layer}.mlp.fc_out"),
    },
    "phi": {
        **_ATTENTION,
        "attn.o": _no_bias("model.layers.{layer}.self_attn.dense", HEAD_COLUMNS),
        **_two_matrices("model.layers.{layer}.mlp.fc1", "model.layers.{layer}.mlp.fc2"),
    },
    "phi3": {
        "attn.q": (Matrix("model.layers.{layer}.self_attn.qkv_proj.weight", HEADS, 0, _QKV),),
        "attn.k": (Matrix("model.layers.{layer}.self_attn.qkv_proj.weight", HEADS, 1, _QKV),),
        "attn.v": (Matrix("model.layers.{layer}.self_attn.qkv_proj.weight", HEADS, 2, _QKV),),
        "attn.o": _no_bias("model.layers.{layer}.self_attn.o_proj", HEAD_COLUMNS),
        **_FUSED_GATE,
    },
}

_GEMMA = Modules(
    mlp_norm="pre_feedforward_layernorm",
    attention_post="post_attention_layernorm",
    mlp_post="post_feedforward_layernorm",
    offset=1.0,
)
_TEXT_PART = {"blocks": "model.language_model.layers", "final_norm": "model.language_model.norm"}
MODULES: dict[str, Modules] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"), Modules()),
    "mistral3": Modules(_TEXT_PART["blocks"], _TEXT_PART["final_norm"]),
    "llama4_text": Modules(mlp="feed_forward"),
    "granite": Modules(residual_scale="residual_multiplier", logit_divisor="logits_scaling"),
    "gemma": Modules(offset=1.0),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "gemma3": replace(_GEMMA, blocks=_TEXT_PART["blocks"], final_norm=_TEXT_PART["final_norm"]),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), replace(_GEMMA, attention_norm="", mlp_norm="", offset=0.0)),
    "glm4": Modules(attention_post="post_self_attn_layernorm", mlp_post="post_mlp_layernorm"),
    **dict.fromkeys(("olmo", "starcoder2"), Modules(centred=True)),
    "stablelm": Modules(centred=True, parallel="use_parallel_residual", parallel_norm="input_layernorm"),
    "cohere": Modules(mlp_norm="input_layernorm", centred=True, parallel=True, logit_scale="logit_scale"),
    "gpt2": Modules("transformer.h", "transformer.ln_f", "ln_1", "ln_2", centred=True),
    "gpt_neox": Modules("gpt_neox.layers", "gpt_neox.final_layer_norm", centred=True, parallel="use_parallel_residual"),
    "gptj": Modules("transformer.h", "transformer.ln_f", "ln_1", "ln_1", centred=True, parallel=True),
    "phi": Modules(final_norm="model.final_layernorm", mlp_norm="input_layernorm", centred=True, parallel=True),
}

REGISTERED: set[str] = set()
"""The families that a user has added. Their tables are tried on the model when it is loaded."""

_GEMMA4 = (
    "Each of its blocks multiplies the whole residual stream by a number, so the stream is not the sum of what heads and "
    "neurons write; its layers also share keys and values and differ in the width of their heads."
)
_QWEN3_5 = (
    "Most of its layers are linear attention: they keep a recurrent state instead of keys and values, so they have no "
    "attention heads and no run can restart in the middle of a prompt."
)
_REFUSED = {
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _GEMMA4),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), _QWEN3_5),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def why_refused(family: str, text: object) -> str:
    """Say why no table can describe a model; nothing if one does or could.

    Args:
        family: The model type.
        text: The configuration of the model, or of its text part.
    """
    mixture = (
        "Mixtures of experts are not supported: a router chooses other neurons for each token, so a mask of neurons would "
        "not say what an edit does."
    )
    layers = getattr(text, "moe_layers", None) or ()
    if family in FAMILIES:
        chosen = family == "llama4_text" and layers
        return f"{len(layers)} of its layers are mixtures of experts. {mixture}" if chosen else ""
    experts = next((field for field in _EXPERTS if getattr(text, field, None)), None)
    if "moe" in family or (experts and family not in _REFUSED):
        return f"It is a mixture of experts{f' ({experts} = {getattr(text, experts)})' if experts else ''}. {mixture}"
    return _REFUSED.get(family, "")


def register_family(name: str, table: Table, modules: Modules | None = None) -> None:
    """Let models of another type load, by a table that says where their weights are.

    The table is tried on each such model when it is loaded, with a few tokens: the parameters must be there, what
    attention and MLP write must add up to the residual stream, weights by unit must give what the model computes and be
    its own storage, and a run that restarts in the middle must equal a whole one. A table that does not fit is refused
    with the entry that is wrong. Call this before `load_model`, in each program: nothing is stored.

    Args:
        name: The model type, as `model.config.model_type` says it.
        table: The matrices of each kind of site: `attn.q`, `attn.k`, `attn.v`, `attn.o`, `mlp.in`, `mlp.out`, and
            `mlp.gate` for a gated MLP. The weight comes first, then its bias if that belongs to the units. A model that
            names its parameters as Llama does takes `FAMILIES["llama"]`.
        modules: Where the blocks read and write; as in Llama unless given.

    Raises:
        MechunlearnError: The name is built in, or the table is malformed.

    >>> from mechunlearn.model.families import FAMILIES, Matrix, Modules, register_family
    >>> register_family("my_model", {
    ...     **{kind: FAMILIES["llama"][kind] for kind in ("attn.q", "attn.k", "attn.v", "attn.o")},
    ...     "mlp.in": (Matrix("model.layers.{layer}.mlp.up_proj.weight", "unit d_model"),),
    ...     "mlp.out": (Matrix("model.layers.{layer}.mlp.down_proj.weight", "d_model unit"),),
    ... })
    """
    if name in FAMILIES and name not in REGISTERED:
        raise MechunlearnError(
            f"The family '{name}' is built in. Expected another model type; {name} models load without a table."
        )
    missing = [kind for kind in KINDS if kind not in table and kind != "mlp.gate"]
    unknown = [kind for kind in table if kind not in KINDS]
    if missing or unknown:
        wrong = f"has no '{missing[0]}'" if missing else f"has a kind '{unknown[0]}'"
        raise MechunlearnError(
            f"The table of '{name}' {wrong}. Expected the kinds {', '.join(KINDS)}; mlp.gate for gated MLPs only."
        )
    held: dict[Matrix, str] = {}
    for kind, matrices in table.items():
        _check_matrices(name, kind, tuple(matrices))
        if other := held.get(matrices[0]):
            raise MechunlearnError(f"The table of '{name}' says that {other} and {kind} are both {matrices[0]!r}.")
        held[matrices[0]] = kind
    FAMILIES[name] = {kind: tuple(matrices) for kind, matrices in table.items()}
    MODULES[name] = modules or Modules()
    REGISTERED.add(name)


def _check_matrices(name: str, kind: str, matrices: tuple[object, ...]) -> None:
    axes = "unit, d_head and d_model" if kind.startswith("attn.") else "unit and d_model"
    for i, matrix in enumerate(matrices or (None,)):
        needed = {"unit"} | ({"d_head"} if kind.startswith("attn.") else set()) | ({"d_model"} if i == 0 else set())
        if (
            not isinstance(matrix, Matrix)
            or "{layer}" not in matrix.name
            or not matrix.name.endswith(".weight" if i == 0 else ".bias")
            or needed - set(matrix.axes.replace("(", " ").replace(")", " ").split())
        ):
            raise MechunlearnError(
                f"The table of '{name}' says {kind} is {matrix!r}. Expected Matrix('path.{{layer}}.name.weight', axes) "
                f"with the axes {axes}, as in Matrix('model.layers.{{layer}}.mlp.up_proj.weight', 'unit d_model'), and "
                "behind it at most its bias, without d_model."
            )
