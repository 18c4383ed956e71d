"""The calls of editors that made an edit, so that it can be made again under another mask or with another seed."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from mechunlearn.artifacts.between import BETWEEN
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.errors import MechunlearnError


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an editor. Its arguments (model, sets, texts, functions) are held by reference, not copied.

    Attributes:
        editor: The editor.
        arguments: All of its arguments by name, defaults included.
    """

    editor: Callable[..., Any]
    arguments: Mapping[str, Any]

    @property
    def mask(self) -> ComponentMask:
        """The mask that the editor got.

        A closed form moves a part of it only, `dictionary_rows` what its features write.
        """
        mask: ComponentMask = self.arguments["mask"]
        return mask

    def again(self, mask: ComponentMask | None, seed: int | None) -> Any:
        """Return the edit of the same call with another mask, another seed, or both.

        Args:
            mask: The other mask, or `None` for the call's.
            seed: The other seed, or `None` for the call's.
        """
        changed = {name: value for name, value in (("mask", mask), ("seed", seed)) if value is not None}
        return self.editor(**{**self.arguments, **changed})


def remade(edit: Any, mask: ComponentMask | None, seed: int | None) -> Any:
    """Return the edit that the calls of another one make under another mask or seed (see `WeightEdit.remake`).

    Args:
        edit: A `WeightEdit` or a `FeatureEdit`.
        mask: Where to edit this time.
        seed: The seed this time.
    """
    if edit.card.method == BETWEEN:
        raise MechunlearnError(
            "No editor made this edit: it is the difference between two models, so it cannot be made again. Train the "
            "model again under the other mask or seed, and take WeightEdit.between(before, after)."
        )
    if not edit.calls:
        raise MechunlearnError(
            f"This edit ({edit.card.method}) cannot be made again: it was loaded or put together by hand, and holds a "
            "run "
            "card but not the model, facts and functions of the call that made it. Make it in this session with its "
            "editor, "
            "or give evaluate a control= of yours."
        )
    masks: Sequence[ComponentMask | None] = [None] * len(edit.calls)
    if mask is not None and mask != edit.mask:
        masks = dealt(mask, [call.mask for call in edit.calls])
    return reduce(or_, (call.again(part, seed) for call, part in zip(edit.calls, masks, strict=True)))


def dealt(mask: ComponentMask, among: Sequence[ComponentMask]) -> list[ComponentMask]:
    """Deal the units of a mask to the parts of a composed edit, which had the masks of `among`.

    A part gets as many units of each kind as it had; the last part that had units of a kind gets all that are left of
    it. The order is shuffled, the same for every kind, so that no part gets the lower layers and the rows of a neuron
    stay together.

    Args:
        mask: The units.
        among: What the parts had.

    >>> from mechunlearn.model.layout import Signature
    >>> tiny = Signature("llama", layers=2, heads=4, kv_heads=2, d_mlp=3, d_model=8)
    >>> units = (["L1.mlp.out", "L1.attn.o[0]"], ["L0.mlp.out[0]"], ["L0.mlp.out[1]", "L0.attn.o[1]"])
    >>> new, *old = (ComponentMask.of(each, tiny) for each in units)
    >>> [len(part) for part in dealt(new, old)]
    [1, 3]
    """
    if len(among) == 1:
        return [mask]
    left = sorted(mask, key=lambda unit: random.Random(f"{unit.layer}[{unit.unit}]").random())
    counts = [Counter(unit.kind for unit in part) for part in among]
    found = []
    for i, wanted in enumerate(counts):
        open_ended = {kind for kind in wanted if not any(kind in later for later in counts[i + 1 :])}
        taken: Counter[str] = Counter()
        sites: dict[str, Tensor] = {}
        units, left = left, []
        for unit in units:
            if unit.kind in open_ended or taken[unit.kind] < wanted[unit.kind]:
                taken[unit.kind] += 1
                sites.setdefault(unit.site, torch.zeros_like(mask.sites[unit.site]))[unit.unit] = True
            else:
                left.append(unit)
        found.append(ComponentMask(sites, mask.signature))
    return found
