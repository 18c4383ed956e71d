"""Shared machinery of gradient editors: batches, and an optimiser that knows only the selected rows."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mechunlearn.components import Component, ComponentMask
from mechunlearn.hooked import HookedModel


def epochs(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of row indices without end, each epoch in a new order."""
    while True:
        yield from torch.randperm(count, generator=generator).split(batch)


class SelectedRows:
    """The selected rows of a model as float32 leaf tensors, with AdamW on them alone.

    The gradient of a touched matrix is taken whole, its selected rows are kept; only these rows are ever written, so
    what is not selected cannot move, whatever the optimiser does. The model is trained through its plain module.
    """

    def __init__(
        self, model: HookedModel, mask: ComponentMask, rate: float | int, weight_decay: float | int = 0.0
    ) -> None:
        mask.check(model.signature)
        self.model = model
        self.parameters = dict(model.hf.named_parameters())
        self.places: list[tuple[str, str, Tensor, Tensor]] = []  # site, parameter name, units, view
        self.leaves: list[Tensor] = []
        for site, chosen in mask.sites.items():
            units = chosen.nonzero().flatten().to(model.device)
            if len(units):
                address = Component.parse(site)
                for name in model.layout.parameter_names(address.layer, address.kind):
                    for view in model.layout.views(self.parameters, address.layer, address.kind, only=name):
                        self.places.append((site, name, units, view))
                        self.leaves.append(view[units].float().clone())
        self.touched = sorted({name for _, name, _, _ in self.places})
        self.before = [leaf.clone() for leaf in self.leaves]
        self.optimiser = torch.optim.AdamW(self.leaves, lr=rate, weight_decay=weight_decay)

    def gradient(self, loss: Tensor) -> None:
        """Take the loss's gradient for the selected rows; the parameters' own `.grad` stays as it is."""
        gradients = torch.autograd.grad(loss, [self.parameters[name] for name in self.touched])
        by_name = dict(zip(self.touched, gradients, strict=True))
        for leaf, (site, name, units, _) in zip(self.leaves, self.places, strict=True):
            address = Component.parse(site)
            view = self.model.layout.views(by_name, address.layer, address.kind, only=name)[0]
            leaf.grad = view[units].float()

    def step(self, rate: float | int, clip: float | int) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.leaves, clip)
        self.optimiser.step()
        self._write(self.leaves)

    def restore(self) -> None:
        self._write(self.before)

    @torch.no_grad()
    def _write(self, leaves: list[Tensor]) -> None:
        for leaf, (_, _, units, view) in zip(leaves, self.places, strict=True):
            view[units] = leaf.to(view.dtype)

    def rows(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Units and new rows of every site, as `WeightEdit` takes them."""
        parts: dict[str, list[Tensor]] = {}
        units: dict[str, Tensor] = {}
        for leaf, (site, _, chosen, view) in zip(self.leaves, self.places, strict=True):
            units[site] = chosen.cpu()
            parts.setdefault(site, []).append(leaf.to(view.dtype).flatten(1).cpu())
        return units, {site: torch.cat(found, 1) for site, found in parts.items()}
