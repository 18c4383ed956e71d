"""What tells two models of one architecture apart, unit by unit."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.fingerprint import INTEGERS
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import flat

BETWEEN = "between"
"""What the card of such an edit has as its method."""
TOKENS = 16
NAMED = 3
NOT_COMPUTED = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}


def changed_rows(
    before: HookedModel, after: HookedModel
) -> tuple[dict[str, Int[Tensor, " _unit"]], dict[str, Float[Tensor, "_unit _weight"]]]:
    """Return the units that differ in some bit, and their weights in the second model, both by site.

    Args:
        before: A model.
        after: Another of the same architecture and dtype.

    Raises:
        MechunlearnError: If the models are of different kinds, differ where no unit has weights, or not at all.

    >>> from mechunlearn.world.toy import planted_facts
    >>> before, after = planted_facts().model, planted_facts().model
    >>> after.hf.model.layers[0].mlp.up_proj.weight.data[5] += 1
    >>> changed_rows(before, after)[0]
    {'L0.mlp.in': tensor([5])}
    """
    old, new = (dict(model.hf.named_parameters(remove_duplicate=False)) for model in (before, after))
    _check_alike(before, after, old, new)
    layout, units, rows = before.layout, {}, {}
    outside: dict[str, int] = {}
    left = set(old)
    for layer in range(before.signature.layers):
        sites = {f"L{layer}.{kind}": kind for kind in layout.kinds}
        names = {name for kind in sites.values() for name in layout.parameter_names(layer, kind)} & left
        left -= names
        changed = {name: _differ(old[name], new[name]) for name in sorted(names)}
        for site, kind in sites.items():
            views = layout.views(changed, layer, kind)
            chosen = torch.stack([view.flatten(1).any(1) for view in views]).any(0).nonzero().flatten()
            for view in views:
                view.zero_()  # what is left is in no unit
            if len(chosen):
                units[site] = chosen.cpu()
                rows[site] = flat(layout.views(new, layer, kind))[chosen.to(after.device)].cpu()
        outside |= {name: int(each.sum()) for name, each in changed.items() if each.any()}
    rest = {name: int(_differ(old[name], new[name]).sum()) for name in old if name in left}
    outside |= {name: count for name, count in rest.items() if count}
    if outside:
        told = [_told(name, count, old[name], new[name]) for name, count in list(outside.items())[:NAMED]]
        more = f", and {len(outside) - NAMED} more" if len(outside) > NAMED else ""
        raise MechunlearnError(
            f"Parameters differ that belong to no head or neuron: {', '.join(told)}{more}. An edit holds "
            f"units of {', '.join(layout.kinds)} alone. Train with everything else frozen (ComponentMask.everything("
            "model).restrict_(model)), or measure the trained model as a whole with mu.benchmarks."
        )
    if not units:
        one = "are one and the same module" if before.hf is after.hf else "have the same weights, bit for bit"
        raise MechunlearnError(
            f"The two models {one}, so there is no edit between them. Expected the model from before the training, "
            "loaded again if it was trained in place, and the trained one."
        )
    return units, rows


@torch.no_grad()
def check_same_logits(one: HookedModel, other: HookedModel) -> None:
    """Refuse two models that have the same weights and still do not compute the same.

    Args:
        one: A model.
        other: Another of the same architecture and weights.

    Raises:
        MechunlearnError: If their logits of a few tokens differ by more than rounding.
    """
    tokens = torch.arange(TOKENS)[None] % len(_embeddings(one))
    here, there = (model.forward(tokens).float().cpu() for model in (one, other))
    apart, size = float((here - there).abs().max()), float(there.abs().max())
    if not apart <= torch.finfo(one.dtype).eps ** 0.5 * size:
        first, second = (model.hf.config.to_dict() for model in (one, other))
        differ = [k for k in sorted(first.keys() | second.keys()) if first.get(k) != second.get(k)]
        differ = [f"{k} ({first.get(k)} before, {second.get(k)} after)" for k in differ if k not in NOT_COMPUTED]
        raise MechunlearnError(
            f"With the same weights the two models still differ by up to {apart:.2g} in their logits, so what is between "
            f"them is not in the weights alone. Their configurations differ in {', '.join(differ) or 'nothing'}. "
            "Expected two models that compute the same of the same weights."
        )


def _check_alike(before: HookedModel, after: HookedModel, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Refuse models whose units do not correspond."""
    if before.signature != after.signature:
        raise MechunlearnError(
            f"The models are of different architectures: ({before.signature}) before, ({after.signature}) after. "
            "Expected the same one before and after its training."
        )
    if other := sorted(old.keys() ^ new.keys()):
        where = "before" if other[0] in old else "after"
        raise MechunlearnError(
            f"The models are of different architectures: {len(other)} of their parameters are in one only, such as "
            f"'{other[0]}' {where}. Expected the same model before and after its training, its adapters merged."
        )
    if before.tokenizer is not None and after.tokenizer is not None:
        known = before.tokenizer.get_vocab(), after.tokenizer.get_vocab()
        if known[0] != known[1]:
            raise MechunlearnError(
                f"The tokenizers differ: {len(known[0])} tokens before, {len(known[1])} after, "
                f"{len(known[0].items() ^ known[1].items())} of them not the same. Expected one tokenizer; if the model was "
                "trained with that of before, give after as load_model((after.hf, before.tokenizer))."
            )
    for name, weight in old.items():
        if weight.shape != new[name].shape:
            words = "vocabularies" if weight.shape[:1] == _embeddings(before).shape[:1] else "shapes"
            raise MechunlearnError(
                f"The models have different {words}: '{name}' is {list(weight.shape)} before, {list(new[name].shape)} "
                "after. Expected the same ones: train without resizing the embeddings."
            )
        if weight.dtype != new[name].dtype:
            raise MechunlearnError(
                f"The models have different dtypes: '{name}' is {weight.dtype} before, {new[name].dtype} after, so every "
                f"weight would differ. Load both alike, for example with dtype='{str(new[name].dtype)[6:]}'."
            )


def _embeddings(model: HookedModel) -> Tensor:
    table: Any = model.hf.get_input_embeddings()
    found: Tensor = table.weight
    return found


def _differ(old: Tensor, new: Tensor) -> Bool[Tensor, "..."]:
    """Say which weights differ in some bit; those of the second model are brought to the first's device."""
    integers = INTEGERS[old.element_size()]
    here, there = (weight.detach().contiguous().view(integers) for weight in (old, new.to(old.device)))
    return here != there


def _told(name: str, count: int, old: Tensor, new: Tensor) -> str:
    most = float((old.detach().float() - new.detach().to(old.device).float()).abs().max())
    return f"{name} ({count} of {old.numel()} weights, by up to {most:.2g})"
