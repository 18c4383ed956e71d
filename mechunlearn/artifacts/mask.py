"""Which units: masks and their set algebra. A mask knows no method and no score."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.artifacts.restrict import Restriction, lora_config
from mechunlearn.core import tensors
from mechunlearn.core.display import by_kind, card, unit_name
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.component import Component, check_site
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import Layout, Signature

if TYPE_CHECKING:
    import peft
    from torch import nn


def _with_weights(site: str, layout: Layout) -> Component:
    """The site's address, if a model of this layout has weights there."""
    address = Component.parse(site)
    if ":" in address.kind:
        raise MechunlearnError(
            f"'{site}' holds features, which live in activations and have no weights to train: give the mask to "
            "feature_clamp or codebook_delete, which return a FeatureEdit."
        )
    layout.views({}, address.layer, address.kind)
    return address


@dataclass(frozen=True, eq=False)
class ComponentMask:
    """Which units an edit may touch.

    Masks combine with `&`, `|`, `-`; `~` is the complement within the sites that the mask names.

    Attributes:
        sites: `{site: Bool[unit]}`, true where a unit is selected.
        signature: The architecture that the mask belongs to.

    Raises:
        MechunlearnError: If a site is not of this architecture, or has another number of units.

    >>> tiny = Signature("llama", layers=2, heads=4, kv_heads=2, d_mlp=3, d_model=8)
    >>> mask = ComponentMask.of(["L0.mlp.out", "L1.attn.o[2]"], tiny)
    >>> len(mask), list(mask)[-1]
    (4, L1.attn.o[2])
    """

    sites: Mapping[str, Bool[Tensor, " _unit"]]
    signature: Signature

    def __post_init__(self) -> None:
        for site, chosen in self.sites.items():
            if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.ndim != 1:
                raise MechunlearnError(f"Mask entry '{site}' must be a one-dimensional bool tensor, one entry a unit.")
            check_site(site, len(chosen), self.signature)
        ordered = sorted(self.sites, key=Component.parse)
        object.__setattr__(self, "sites", {site: self.sites[site].detach().cpu() for site in ordered})

    @classmethod
    def of(cls, addresses: Iterable[str | Component], signature: Signature) -> "ComponentMask":
        """Return the mask that selects some units.

        Args:
            addresses: The units, such as `L9.attn.o[7]`; an address without `[unit]` selects its whole site.
            signature: The architecture.

        Raises:
            MechunlearnError: If an address is malformed, or the architecture has no such unit.
        """
        sites: dict[str, Tensor] = {}
        for address in addresses:
            component = Component.parse(address) if isinstance(address, str) else address
            units = signature.units(component.kind)
            if units is None:
                raise MechunlearnError(f"'{component}' has no fixed number of units: build the mask from scores.")
            check_site(component.site, units, signature)
            if component.unit is not None and not 0 <= component.unit < units:
                raise MechunlearnError(f"'{component}' is out of range: '{component.site}' has {units} units.")
            chosen = sites.setdefault(component.site, torch.zeros(units, dtype=torch.bool))
            chosen[slice(None) if component.unit is None else component.unit] = True
        return cls(sites, signature)

    @classmethod
    def everything(cls, model: HookedModel) -> "ComponentMask":
        """Return the mask of all heads and neurons of a model, in every site.

        Args:
            model: The model.
        """
        signature = model.layout.signature
        sites = (Component(layer, kind) for layer in range(signature.layers) for kind in model.layout.kinds)
        return cls.of(sites, signature)

    def __len__(self) -> int:
        return sum(int(chosen.sum()) for chosen in self.sites.values())

    def __iter__(self) -> Iterator[Component]:
        for site, chosen in self.sites.items():
            address = Component.parse(site)
            for unit in chosen.nonzero().flatten().tolist():
                yield Component(address.layer, address.kind, unit)

    def __contains__(self, component: Component) -> bool:
        chosen = self.sites.get(component.site)
        return chosen is not None and bool(chosen.all() if component.unit is None else chosen[component.unit])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ComponentMask) and self.signature == other.signature and set(self) == set(other)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def _combine(self, other: "ComponentMask", how: Callable[[Tensor, Tensor], Tensor]) -> "ComponentMask":
        if self.signature != other.signature:
            raise MechunlearnError(f"Masks of different architectures: ({self.signature}) and ({other.signature}).")
        none = {s: torch.zeros_like(m) for s, m in {**self.sites, **other.sites}.items()}
        mine, theirs = {**none, **self.sites}, {**none, **other.sites}
        return ComponentMask({site: how(mine[site], theirs[site]) for site in none}, self.signature)

    def __and__(self, other: "ComponentMask") -> "ComponentMask":
        return self._combine(other, torch.logical_and)

    def __or__(self, other: "ComponentMask") -> "ComponentMask":
        return self._combine(other, torch.logical_or)

    def __sub__(self, other: "ComponentMask") -> "ComponentMask":
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def __invert__(self) -> "ComponentMask":
        return ComponentMask({site: ~chosen for site, chosen in self.sites.items()}, self.signature)

    def jaccard(self, other: "ComponentMask") -> float:
        """Return the units in both masks over the units in either; 1 for two empty masks.

        Args:
            other: A mask of the same architecture.

        Raises:
            MechunlearnError: If it is of another.
        """
        either = len(self | other)
        return len(self & other) / either if either else 1.0

    def check(self, signature: Signature) -> None:
        """Refuse a mask of another architecture.

        Args:
            signature: The architecture that is expected.

        Raises:
            MechunlearnError: If the mask is of another.
        """
        if self.signature != signature:
            raise MechunlearnError(
                f"The mask is for ({self.signature}), the model is ({signature}). "
                "A mask fits one architecture only: localize again on this model."
            )

    @property
    def fingerprint(self) -> str:
        """A hash of the selected units and the architecture."""
        named = (
            (Component.parse(site).site, chosen.nonzero().flatten().tolist()) for site, chosen in self.sites.items()
        )
        return digest(str(self.signature), *(f"{site}[{unit}]" for site, units in named for unit in units))

    def tied(self, layout: Layout | HookedModel) -> "ComponentMask":
        """Return the mask with what feeds each unit.

        A head's q and its group's k and v, a neuron's input and gate rows.

        A kv head is selected if any of its query heads is.

        Args:
            layout: The model or its layout, which says whether neurons have a gate.
        """
        kinds = layout.kinds if isinstance(layout, Layout) else layout.layout.kinds
        sites: dict[str, Tensor] = {site: chosen.clone() for site, chosen in self.sites.items()}

        def add(site: str, chosen: Tensor) -> None:
            sites[site] = sites[site] | chosen if site in sites else chosen.clone()

        for site, chosen in self.sites.items():
            address = Component.parse(site)
            if address.kind == "attn.o":
                group = chosen.view(self.signature.kv_heads, -1).any(1)
                add(f"L{address.layer}.attn.q", chosen)
                add(f"L{address.layer}.attn.k", group)
                add(f"L{address.layer}.attn.v", group)
            if address.kind == "mlp.out":
                for kind in ("mlp.in", "mlp.gate"):
                    if kind in kinds:
                        add(f"L{address.layer}.{kind}", chosen)
        return ComponentMask(sites, self.signature)

    def weights(self, model: HookedModel) -> int:
        """Return how many weights of a model the mask selects.

        Args:
            model: The model.

        Raises:
            MechunlearnError: If it is of another architecture.
        """
        self.check(model.layout.signature)
        return sum(
            int(chosen.sum()) * model.unit_weights(Component.parse(site).kind) for site, chosen in self.sites.items()
        )

    def parameter_masks(self, model: "HookedModel | nn.Module") -> dict[str, Bool[Tensor, "*shape"]]:
        """Return which entries of which parameters are selected, for any training loop on the ordinary model.

        Args:
            model: A hooked model, or a Hugging Face model.

        Returns:
            `{parameter name: bool tensor of its shape}`, of the parameters with selected entries alone.

        Raises:
            MechunlearnError: For another architecture, a model wrapped by another module, and for features and codes,
                which have no weights.
        """
        hf: Any = getattr(model, "hf", model)
        layout = Layout.of(hf.config)
        self.check(layout.signature)
        shapes = dict(hf.named_parameters())
        masks: dict[str, Tensor] = {}
        for site, chosen in self.sites.items():
            if not chosen.any():
                continue
            address = _with_weights(site, layout)
            known = layout.parameter_names(address.layer, address.kind)
            names = [name for name in known if name in shapes]
            if not names:
                raise MechunlearnError(
                    f"The model has no parameter '{known[0]}' for '{site}'. Expected the Hugging Face model itself: "
                    "give what PEFT, torch.compile or a parallel wrapper was built on."
                )
            for name in names:
                masks.setdefault(name, torch.zeros(shapes[name].shape, dtype=torch.bool, device=shapes[name].device))
            for view in layout.views({name: masks[name] for name in names}, address.layer, address.kind):
                view[chosen.to(view.device)] = True
        return masks

    def restrict_(self, model: "HookedModel | nn.Module") -> Restriction:
        """Make an ordinary model train only the selected units, in any training loop and under any torch optimiser.

        Holds until `.remove()` of what is returned, or for a `with` block; costs one copy of every partly selected
        matrix. See `Restriction` for what it guards against and what not.

        Args:
            model: A Hugging Face model, or a hooked model (`refresh_()` it after training).

        Returns:
            The restriction, to remove.

        Raises:
            MechunlearnError: If the mask is empty, of another architecture or of features, or the model is restricted
                already.

        >>> from mechunlearn.world.toy import planted_facts
        >>> model = planted_facts().model
        >>> mask = ComponentMask.of(["L0.mlp.out[3]", "L1.attn.q[0]"], model.signature)
        >>> with mask.restrict_(model.hf) as restriction:  # train here
        ...     restriction.trainable == mask.weights(model)
        True
        """
        hf: Any = getattr(model, "hf", model)
        return Restriction(hf, self.parameter_masks(hf))

    def to_lora_config(self, r: int = 8, alpha: int | None = None, **settings: Any) -> "peft.LoraConfig":
        """Return a PEFT configuration whose target modules are exactly those that hold the selected units.

        LoRA moves whole matrices and no biases: a `UserWarning` says how many times as many units can move as the mask
        selects. Not for an edit that has to stay inside the mask: use `restrict_`.

        Args:
            r: The rank, up to d_model and d_mlp (a mask does not know d_head, which may bound it further).
            alpha: LoRA's alpha, 2r unless given.
            **settings: Further settings of `peft.LoraConfig`.

        Returns:
            The configuration.

        Raises:
            MechunlearnError: If the mask is empty or of features, or the rank is out of range.

        >>> mask = ComponentMask.of(["L1.mlp.out"], Signature("llama", 2, 4, 2, 64, 32))
        >>> sorted(mask.to_lora_config(r=4).target_modules)
        ['model.layers.1.mlp.down_proj']
        """
        layout, held = Layout(self.signature, 0), self.signature.units
        selected = {_with_weights(site, layout): int(m.sum()) for site, m in self.sites.items() if m.any()}
        units: dict[str, list[int]] = {}
        for layer in {address.layer for address in selected}:
            for kind in layout.kinds:
                counts = units.setdefault(layout.module_name(layer, kind), [0, 0])
                counts[0] += selected.get(Component(layer, kind), 0)
                counts[1] += held(kind) or 0
        modules = {name: (chosen, of) for name, (chosen, of) in units.items() if chosen}
        neurons = any(address.kind.startswith("mlp.") for address in selected)
        limit = min(self.signature.d_model, self.signature.d_mlp) if neurons else self.signature.d_model
        settings = {"fan_in_fan_out": self.signature.family == "gpt2", **settings}
        return lora_config(modules, limit, r, alpha, settings)

    def save(self, path: str | Path) -> None:
        """Write the mask to a file: addresses and the architecture, no weights.

        Args:
            path: A name in `.json` (readable) or `.safetensors` (compact); both are complete.

        Raises:
            MechunlearnError: If the name ends in something else, or the disk refuses.
        """
        tensors.save(path, "mask", self.sites, {"signature": self.signature})

    @classmethod
    def load(cls, path: str | Path) -> "ComponentMask":
        """Read a mask from a file of `save`.

        Args:
            path: The `.json` or `.safetensors` file.

        Returns:
            The mask, equal to the one that was saved.

        Raises:
            MechunlearnError: If the file is missing, damaged or something else than a mask.
        """
        hints = {"signature": Signature}
        return tensors.load(path, {"mask": lambda sites, about: cls(sites, **tensors.checked(about, hints))})

    def _by_kind(self) -> list[tuple[str, str, int, int]]:
        addresses = ((Component.parse(site), chosen) for site, chosen in self.sites.items())
        return by_kind((at.layer, at.kind, int(chosen.sum()), len(chosen)) for at, chosen in addresses)

    def __repr__(self) -> str:
        names = [
            f"L{layers}.{kind} {some}/{units}" if layers.isdecimal() else f"{kind} {some}/{units} in layers {layers}"
            for kind, layers, some, units in self._by_kind()
        ]
        return f"ComponentMask({len(self)} units: {'; '.join(names) or 'none'}; {self.signature})"

    def _repr_html_(self) -> str:
        rows = [(kind, f"{unit_name(kind)}s", layers, f"{n} of {of}") for kind, layers, n, of in self._by_kind()]
        about = {"for": self.signature, "fingerprint": self.fingerprint, "weights": "mask.weights(model) counts them"}
        return card(f"ComponentMask: {len(self)} units", about, ("site", "units", "layers", "selected there"), rows)
