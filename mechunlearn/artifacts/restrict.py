"""Masks in other people's training loops: a restriction that holds under any optimiser, and a PEFT configuration.

Knows parameters and modules by name, and no mask: `ComponentMask.restrict_` and `.to_lora_config` hand over names.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    import peft

_RESTRICTED: "weakref.WeakKeyDictionary[nn.Module, Restriction]" = weakref.WeakKeyDictionary()


@dataclass
class _Partly:
    """A parameter of which some entries stay: which, and what they were."""

    parameter: nn.Parameter
    frozen: Bool[Tensor, "*shape"]
    backup: Float[Tensor, "*shape"]

    def masked(self, gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        self.frozen = self.frozen.to(gradient.device)
        return gradient.masked_fill(self.frozen, 0)

    @torch.no_grad()
    def restore(self) -> None:
        self.frozen, self.backup = self.frozen.to(self.parameter.device), self.backup.to(self.parameter)
        self.parameter.copy_(torch.where(self.frozen, self.backup, self.parameter))


class Restriction:
    """A module that trains only the selected entries of its parameters, until `remove()` or the end of a `with` block.

    Gradients of the other entries are zero; parameters without selected entries need no gradient and have none. Weight
    decay and the momentum of earlier steps move an entry whatever its gradient, so after every step of a torch
    optimiser that holds a partly selected parameter, built before or after the restriction, the frozen entries are
    copied back from a backup, to the bit. The backup is one copy of every *partly* selected parameter and its bool
    mask; wholly selected and wholly frozen parameters cost nothing. Frozen entries are those at the time of the call:
    do not load other weights until `remove()`, or they come back. The restriction lasts as long as the module does,
    also if this object is thrown away; a deep copy of the module is another module, and is not restricted.

    It does not see what is written without a torch optimiser (`restore()` copies back then), nor parameters that are
    replaced by others (FSDP, DeepSpeed).

    Args:
        module: The module.
        masks: `{parameter name: bool tensor of its shape}`, true where an entry trains.

    Raises:
        MechunlearnError: If nothing is selected, a name or shape is not the module's, or the module is restricted
            already.

    >>> layer = nn.Linear(3, 2)
    >>> with Restriction(layer, {"weight": torch.tensor([[True, False, False]] * 2)}) as restriction:
    ...     restriction
    Restriction(2 weights of 1 parameter can move)
    """

    trainable: int
    """How many weights can move."""

    def __init__(self, module: nn.Module, masks: Mapping[str, Bool[Tensor, "..."]]) -> None:
        parameters = dict(module.named_parameters())
        for name, mask in masks.items():
            if name not in parameters or mask.shape != parameters[name].shape:
                found = f"shape {list(parameters[name].shape)}" if name in parameters else "no such parameter"
                raise MechunlearnError(
                    f"A mask of shape {list(mask.shape)} is given for '{name}', but the model has {found}. "
                    "Make the masks with `ComponentMask.parameter_masks` of this model."
                )
        chosen = {name: mask for name, mask in masks.items() if mask.any()}
        if not chosen:
            raise MechunlearnError("The mask selects nothing, so nothing could train. Give a mask with selected units.")
        if module in _RESTRICTED:
            raise MechunlearnError("The model is restricted already. Call `remove()` of that restriction first.")
        self.trainable = sum(int(mask.sum()) for mask in chosen.values())
        self._names = sorted(chosen)
        self._partly = [
            _Partly(p, ~mask.to(p.device), p.detach().clone())
            for p, mask in ((parameters[name], mask) for name, mask in chosen.items())
            if not mask.all()
        ]
        self._required = [(p, p.requires_grad) for p in parameters.values()]
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
            if name not in chosen:
                parameter.grad = None
        self._remove: list[Callable[[], None]] = []
        for part in self._partly:
            if part.parameter.grad is not None:
                part.parameter.grad = part.masked(part.parameter.grad)
            self._remove.append(part.parameter.register_hook(part.masked).remove)
        self._remove.append(weakref.finalize(self, _after_steps(weakref.ref(self))))
        self._module = weakref.ref(module)
        _RESTRICTED[module] = self

    def restore(self) -> None:
        """Copy the frozen entries back now, for a training loop whose steps are not those of a torch optimiser."""
        for part in self._partly:
            part.restore()

    def remove(self) -> None:
        """Let everything train again that trained before; frozen entries are copied back once more."""
        if not self._remove:
            return
        self.restore()
        for remove in self._remove:
            remove()
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        module = self._module()
        if module is not None:
            del _RESTRICTED[module]
        self._remove, self._partly, self._required = [], [], []

    def _after_step(self, optimiser: torch.optim.Optimizer) -> None:
        ours = {id(part.parameter) for part in self._partly}
        if any(id(parameter) in ours for group in optimiser.param_groups for parameter in group["params"]):
            self.restore()

    def __enter__(self) -> "Restriction":
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        parameters = f"{len(self._names)} parameter{'s' * (len(self._names) > 1)}"
        return f"Restriction({self.trainable} weights of {parameters} can move)"


def _after_steps(restriction: "weakref.ref[Restriction]") -> Callable[[], None]:
    """Have a living restriction hear of every optimiser's steps; returns what ends that."""

    def hook(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        living = restriction()
        if living is not None:
            living._after_step(optimiser)

    return register_optimizer_step_post_hook(hook).remove


def lora_config(
    modules: Mapping[str, tuple[int, int]], limit: int, r: int, alpha: int | None, settings: dict[str, Any]
) -> "peft.LoraConfig":
    """Return a LoRA configuration for the modules that hold selected units.

    Args:
        modules: For each module how many of its units are selected, and how many it has.
        limit: The width of the narrowest matrix.
        r: The rank.
        alpha: LoRA's alpha, 2r unless given.
        settings: Further settings of `peft.LoraConfig`.

    Raises:
        MechunlearnError: If there is no module, or the rank is out of range.
    """
    from peft import LoraConfig  # heavy, and only needed here

    if not modules:
        raise MechunlearnError("The mask selects nothing, so LoRA has no module. Give a mask with selected units.")
    if not 1 <= r <= limit:
        raise MechunlearnError(
            f"LoRA of rank {r} does not fit: the smallest of the matrices has {limit} rows or columns. "
            f"Give an r between 1 and {limit}."
        )
    chosen, held = (sum(counts) for counts in zip(*modules.values(), strict=True))
    if chosen < held:
        matrices = f"{len(modules)} matri{'ces' if len(modules) > 1 else 'x'}"
        warnings.warn(
            f"LoRA trains whole matrices: the mask selects {chosen} of {held} units in {matrices}, so "
            f"{held / chosen:.2f} times as many can move. Use restrict_ or fisher_lora to keep to the mask.",
            stacklevel=3,
        )
    alpha = 2 * r if alpha is None else alpha
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=sorted(modules), **{"task_type": "CAUSAL_LM", **settings})
