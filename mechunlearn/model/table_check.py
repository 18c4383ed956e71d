"""Whether a family's table describes a model: its parameters, its modules, and what they compute on a few tokens."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import torch
from einops import EinopsError
from torch import Tensor, nn

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.decoder import Decoder, Run
from mechunlearn.model.families import REGISTERED, Matrix
from mechunlearn.model.layout import Layout

TOKENS = 6
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


def check_registered(decoder: Decoder) -> None:
    """Try a table that a user has registered on its model; nothing for built-in families, which the tests try.

    Args:
        decoder: The model.

    Raises:
        MechunlearnError: The table does not fit.
    """
    if decoder.layout.signature.family in REGISTERED:
        check_table(decoder)


@torch.no_grad()
def check_table(decoder: Decoder) -> None:
    """Try a table on its model.

    Args:
        decoder: The model.

    Raises:
        MechunlearnError: A parameter or a module is missing or has another shape, or the parts do not compute what the
            model computes.
    """
    _check_modules(decoder)
    _check_parameters(decoder)
    _check_computation(decoder)


def _refused(layout: Layout, reason: str) -> MechunlearnError:
    return MechunlearnError(f"The table of '{layout.signature.family}' does not fit this model: {reason}")


def _check_modules(decoder: Decoder) -> None:
    modules, layers = decoder.layout.modules, decoder.layout.signature.layers
    names = dict(decoder.hf.named_modules())
    for field in ("blocks", "final_norm"):
        if getattr(modules, field) not in names:
            raise _refused(decoder.layout, _missing("module", getattr(modules, field), names, f"modules.{field}"))
    if not isinstance(decoder.hf.get_submodule(modules.blocks), nn.ModuleList):
        raise _refused(decoder.layout, f"'{modules.blocks}' (modules.blocks) is no list of blocks.")
    if len(decoder.blocks) != layers:
        raise _refused(decoder.layout, f"'{modules.blocks}' holds {len(decoder.blocks)} blocks, expected {layers}.")
    for layer in range(layers):
        for field in ("attention_norm", "mlp_norm", "mlp", "attention_post", "mlp_post"):
            path = f"{modules.blocks}.{layer}.{getattr(modules, field)}"
            if getattr(modules, field) and path not in names:
                raise _refused(decoder.layout, _missing("module", path, names, f"modules.{field}"))


def _missing(what: str, path: str, names: object, wanted: str) -> str:
    near = get_close_matches(path, list(names), n=3, cutoff=0.5)  # type: ignore[call-overload]
    return f"expected a {what} '{path}' ({wanted}), and the model has none. Nearest: {', '.join(near) or 'none'}."


def _check_parameters(decoder: Decoder) -> None:
    layout, signature = decoder.layout, decoder.layout.signature
    parameters = dict(decoder.hf.named_parameters())
    for layer in range(signature.layers):
        for kind in layout.kinds:
            for matrix, name in zip(layout.matrices(kind), layout.parameter_names(layer, kind), strict=True):
                if name not in parameters:
                    if name.endswith(".bias"):
                        continue
                    raise _refused(layout, _missing("parameter", name, parameters, kind))
                _check_shape(layout, kind, matrix, name, parameters[name])


def _check_shape(layout: Layout, kind: str, matrix: Matrix, name: str, parameter: Tensor) -> None:
    sizes = {"unit": layout.signature.units(kind), "d_head": layout.d_head, "d_model": layout.signature.d_model}
    try:
        view = layout.view(parameter, matrix, kind)
    except (EinopsError, RuntimeError):
        fits = False
    else:
        own = view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        rest = [axis for axis in matrix.axes.replace("(", "").replace(")", "").split() if axis in ("d_head", "d_model")]
        fits = own and list(view.shape) == [sizes["unit"], *([sizes[axis] for axis in rest] or [1])]
    if not fits:
        said = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if axis in matrix.axes)
        raise _refused(
            layout,
            f"expected '{name}' ({kind}) to have the axes '{matrix.axes}' with {said}; its shape is "
            f"{tuple(parameter.shape)}.",
        )


def _check_computation(decoder: Decoder) -> None:
    layout = decoder.layout
    embedding: Any = decoder.hf.get_input_embeddings()
    tokens = torch.randint(len(embedding.weight), (1, TOKENS), generator=torch.Generator().manual_seed(0))
    kinds = ("attn_out", "mlp_out", "mlp_in", "attn_projected", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.out")
    sites = [f"L{layer}.{kind}" for layer in range(len(decoder.blocks)) for kind in kinds]
    run = decoder.record(tokens, torch.arange(TOKENS)[None], sites)
    for field in ("attention_norm", "mlp_norm", "attention_post", "mlp_post"):
        if getattr(layout.modules, field):
            _check_norm(layout, decoder.part(0, field), run.resid[1], f"modules.{field}")
    _check_norm(layout, decoder.final_norm, run.resid[1], "modules.final_norm")
    _check_heads(decoder, tokens, run.kept["L0.attn.o"])
    for said, made, seen in _compared(decoder, tokens, run):
        off = float((made.float() - seen.float()).abs().max() / seen.float().abs().max().clamp(min=1e-12))
        if not off <= TOLERANCE.get(decoder.hf.dtype, 0.05):
            raise _refused(layout, f"{said} (off by {off:.2g} of the largest value).")


def _compared(decoder: Decoder, tokens: Tensor, run: Run) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What the table says the model computes, and what it computes."""
    plain = decoder.hf(input_ids=tokens.to(decoder.hf.device), use_cache=False).logits
    said = "the final norm and the unembedding do not give the model's logits: see modules.final_norm, logit_scale and "
    yield said + "logit_divisor", decoder.unembed(run.resid[-1]), plain
    restart = decoder.restart(1, TOKENS, run)
    parameters: dict[str, Tensor] = dict(decoder.hf.named_parameters())
    for layer, (before, after) in enumerate(zip(run.resid, run.resid[1:], strict=False)):
        kept = {site.split(".", 1)[1]: z for site, z in run.kept.items() if site.startswith(f"L{layer}.")}
        said = f"what attention and MLP of layer {layer} write does not add up to the residual stream: see modules.blocks, "
        written = before + kept["attn_out"] + kept["mlp_out"]
        yield said + "attention_post, mlp_post and residual_scale", written, after
        said = f"block {layer}, called on later positions alone, does not give what the whole run gives"
        yield said, restart.block(layer, before[:, 1:]), after[:, 1:]
        for what, made, seen in _by_unit(decoder, parameters, layer, before, kept):
            yield f"in layer {layer} {what}", made, seen


def _check_heads(decoder: Decoder, tokens: Tensor, z: Tensor) -> None:
    """What changes in the first head of a projection reaches that head alone, or the heads that share its keys."""
    signature = decoder.layout.signature
    for kind in ("attn.q", "attn.k", "attn.v"):
        at = torch.zeros(1, 1, dtype=torch.long)
        changed = decoder.record(tokens, at, ["L0.attn.o"], {f"L0.{kind}": _roll_first_head}, keys=False)
        moved = (changed.kept["L0.attn.o"] - z).float()
        moved[:, :, : 1 if kind == "attn.q" else signature.heads // signature.kv_heads] = 0
        if moved.abs().max() > 0.01 * z.float().abs().max():
            raise _refused(
                decoder.layout,
                f"the first head of {kind} changes what other heads write: see its axes. Heads of d_head rows, one after "
                "another, are '(unit d_head) d_model'.",
            )


def _roll_first_head(projected: Tensor) -> Tensor:
    changed = projected.clone()
    changed[:, :, 0] = changed[:, :, 0].roll(1, -1)
    return changed


def _check_norm(layout: Layout, norm: Any, x: Tensor, name: str) -> None:
    x = 100 * x / x.abs().max()  # so that what the norm adds to the variance does not matter
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    centred = x.float() - x.float().mean(-1, keepdim=True) * layout.modules.centred
    made = centred * centred.pow(2).mean(-1, keepdim=True).rsqrt()
    made = made * (1 if weight is None else weight.float() + layout.modules.offset) + (
        0 if bias is None else bias.float()
    )
    seen = norm(x).float()
    if float((made - seen).abs().max()) > 0.02 * float(seen.abs().max()):
        kind = "a LayerNorm" if layout.modules.centred else "an RMSNorm"
        raise _refused(
            layout,
            f"'{name}' does not compute {kind} whose weights have an offset of {layout.modules.offset:g}: see "
            "modules.centred and offset.",
        )


def _by_unit(
    decoder: Decoder, parameters: dict[str, Tensor], layer: int, resid: Tensor, kept: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What the weights by unit give, and what the model gave."""
    layout = decoder.layout
    read = decoder.part(layer, "attention_norm")(resid)
    for kind in ("attn.q", "attn.k", "attn.v"):
        weight, bias = layout.head_weights(parameters, layer, kind)
        made = torch.einsum("fpd,uhd->fpuh", read, weight)
        said = f"the heads of {kind} do not give what the model computes: see its axes and modules.attention_norm"
        yield said, made if bias is None else made + bias, kept[kind]
    stream = resid if layout.parallel else resid + kept["attn_out"]
    said = "the norm that the MLP reads does not give its input: see modules.mlp_norm, mlp and parallel"
    yield said, decoder.part(layer, "mlp_norm")(stream), kept["mlp_in"]
    made = torch.einsum("fpuh,uhd->fpd", kept["attn.o"], layout.head_weights(parameters, layer, "attn.o")[0])
    said = "the heads of attn.o do not give what attention writes: see its axes"
    yield said, _with_bias(decoder, layer, "attn.o", made), kept["attn_projected"]
    if not layout.modules.mlp_post:
        made = kept["mlp.out"] @ layout.views(parameters, layer, "mlp.out")[0]
        made = _with_bias(decoder, layer, "mlp.out", made) * layout.residual_scale
        yield "the neurons of mlp.out do not give what the MLP writes: see its axes", made, kept["mlp_out"]


def _with_bias(decoder: Decoder, layer: int, kind: str, made: Tensor) -> Tensor:
    bias = decoder.projection(layer, kind).bias
    return made + bias if isinstance(bias, Tensor) else made
