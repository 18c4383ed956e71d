"""Which and how much: component addresses, masks and scores. None of them knows a method or a parameter name."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.artifacts.restrict import Restriction, lora_config
from mechunlearn.core.display import by_kind, card, unit_name
from mechunlearn.core.files import whole_file
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.layout import Layout, Signature

if TYPE_CHECKING:
    import peft
    from torch import nn
from mechunlearn.core.tensors import load_tensors, save_tensors
from mechunlearn.model.component import Component, check_site
from mechunlearn.model.hooked import HookedModel


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
    """Which units an edit may touch: `{site: Bool[unit]}` and the architecture it belongs to.

    Masks combine with `&`, `|`, `-`; `~` is the complement within the sites that the mask names.

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
        """The mask that selects these units; an address without `[unit]` selects its whole site."""
        sites: dict[str, Tensor] = {}
        for address in addresses:
            component = Component.parse(address) if isinstance(address, str) else address
            units = signature.units(component.kind)
            if units is None:
                raise MechunlearnError(f"'{component}' has no fixed number of units: build the mask from scores.")
            check_site(component.site, units, signature)
            if component.unit is not None and component.unit >= units:
                raise MechunlearnError(f"'{component}' is out of range: '{component.site}' has {units} units.")
            chosen = sites.setdefault(component.site, torch.zeros(units, dtype=torch.bool))
            chosen[slice(None) if component.unit is None else component.unit] = True
        return cls(sites, signature)

    @classmethod
    def everything(cls, model: HookedModel) -> "ComponentMask":
        """The mask of all heads and neurons of a model, in every site."""
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
        """Units in both over units in either; 1 for two empty masks."""
        either = len(self | other)
        return len(self & other) / either if either else 1.0

    def check(self, signature: Signature) -> None:
        """Raises `MechunlearnError` unless the mask belongs to this architecture."""
        if self.signature != signature:
            raise MechunlearnError(
                f"The mask is for ({self.signature}), the model is ({signature}). "
                "A mask fits one architecture only: localize again on this model."
            )

    @property
    def fingerprint(self) -> str:
        named = (
            (Component.parse(site).site, chosen.nonzero().flatten().tolist()) for site, chosen in self.sites.items()
        )
        return digest(str(self.signature), *(f"{site}[{unit}]" for site, units in named for unit in units))

    def tied(self, layout: Layout | HookedModel) -> "ComponentMask":
        """Add what feeds each unit: a head's q and its group's k and v, a neuron's input and gate rows.

        A kv head is selected if any of its query heads is.
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
        """How many weights of the model the mask selects."""
        self.check(model.layout.signature)
        return sum(
            int(chosen.sum()) * model.unit_weights(Component.parse(site).kind) for site, chosen in self.sites.items()
        )

    def parameter_masks(self, model: "HookedModel | nn.Module") -> dict[str, Bool[Tensor, "*shape"]]:
        """`{parameter name: bool tensor of its shape}`, for any training loop on the ordinary model.

        Only parameters with selected entries appear. Give a hooked model, or a Hugging Face model.
        Raises `MechunlearnError` for another architecture, a model wrapped by another module, and for features and
        codes, which have no weights.
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

        Give a Hugging Face model, or a hooked model (`refresh_()` it after training). Holds until `.remove()` of what
        is returned, or for a `with` block; costs one copy of every partly selected matrix. See `Restriction` for what
        it guards against and what not. Raises `MechunlearnError` if the mask is empty, of another architecture or of
        features, or the model is restricted already.

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
        """A PEFT configuration of rank `r` whose target modules are exactly those that hold the selected units.

        `alpha` is 2r unless given; `settings` are further ones of `peft.LoraConfig`. LoRA moves whole matrices and no
        biases: a `UserWarning` says how many times as many units can move as the mask selects. Not for an edit that
        has to stay inside the mask: use `restrict_`. Raises `MechunlearnError` if the mask is empty or of features, or
        if `r` is larger than d_model or d_mlp (a mask does not know d_head, which may bound it further).

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
        """Write `.json` (readable) or `.safetensors` (compact); both are complete."""
        path = Path(path)
        if path.suffix == ".safetensors":
            save_tensors(path, dict(self.sites), {"kind": "mask", "signature": json.dumps(asdict(self.signature))})
            return
        units = {
            site: {"of": len(chosen), "selected": chosen.nonzero().flatten().tolist()}
            for site, chosen in self.sites.items()
        }
        text = json.dumps({"kind": "mask", "signature": asdict(self.signature), "units": units}, indent=1)
        with whole_file(path) as beside:
            beside.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "ComponentMask":
        """Raises `MechunlearnError` if the file is missing, truncated or something else than a mask."""
        path = Path(path)
        if path.suffix == ".safetensors":
            tensors, metadata = load_tensors(path, "mask")
            return cls(tensors, Signature(**json.loads(metadata["signature"])))
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            signature = Signature(**entry["signature"])
            sites = {}
            for site, units in entry["units"].items():
                sites[site] = torch.zeros(units["of"], dtype=torch.bool)
                sites[site][torch.tensor(units["selected"], dtype=torch.long)] = True
        except (OSError, UnicodeDecodeError) as error:
            raise MechunlearnError(f"Could not read the mask '{path}': {error}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise MechunlearnError(
                f"'{path}' is not a whole mask file ({type(error).__name__}: {error}). "
                "Expected JSON as `ComponentMask.save` writes it, or a .safetensors file."
            ) from None
        return cls(sites, signature)

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
