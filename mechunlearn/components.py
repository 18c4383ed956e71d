"""Which and how much: component addresses, masks and scores. None of them knows a method or a parameter name."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import total_ordering
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechunlearn.display import by_kind, card, unit_name
from mechunlearn.errors import MechunlearnError
from mechunlearn.files import whole_file
from mechunlearn.layout import KINDS, Layout, Signature
from mechunlearn.restrict import Restriction, lora_config
from mechunlearn.runcard import RunCard, digest

if TYPE_CHECKING:
    import peft
    from torch import nn

_ADDRESS = re.compile(r"L(\d+)\.((?:attn\.[qkvo]|mlp\.(?:in|gate|out))|(?:sae|codebook):[\w./-]+)(?:\[(\d+)\])?")
SCORED = ("attn.o", "mlp.out")


@runtime_checkable
class HasLayout(Protocol):
    """What masks need to know of a model: its layout, and how many weights one unit of a kind has."""

    @property
    def layout(self) -> Layout: ...

    def unit_weights(self, kind: str) -> int: ...


@total_ordering
@dataclass(frozen=True)
class Component:
    """The address of a unit, or of a whole site if `unit` is None. It knows no model.

    >>> Component.parse("L9.attn.o[7]")
    L9.attn.o[7]
    >>> Component.parse("L2.mlp.out") < Component.parse("L2.mlp.out[0]") < Component.parse("L3.attn.q[1]")
    True
    """

    layer: int
    kind: str
    unit: int | None = None

    @classmethod
    def parse(cls, address: str) -> "Component":
        """Raises `MechunlearnError` if the address is malformed."""
        found = _ADDRESS.fullmatch(address)
        if not found:
            raise MechunlearnError(
                f"Component address '{address}' is malformed. Expected 'L<layer>.<kind>' or 'L<layer>.<kind>[<unit>]' "
                f"with a kind of {', '.join(KINDS)}, for example 'L9.attn.o[7]'."
            )
        layer, kind, unit = found.groups()
        return cls(int(layer), kind, None if unit is None else int(unit))

    @property
    def site(self) -> str:
        return f"L{self.layer}.{self.kind}"

    def __str__(self) -> str:
        return self.site if self.unit is None else f"{self.site}[{self.unit}]"

    __repr__ = __str__

    def _key(self) -> tuple[int, int, str, int]:
        known = KINDS.index(self.kind) if self.kind in KINDS else len(KINDS)
        return self.layer, known, self.kind, -1 if self.unit is None else self.unit

    def __lt__(self, other: "Component") -> bool:
        return self._key() < other._key()


def check_site(site: str, units: int, signature: Signature) -> Component:
    """The site's address, if a model of this architecture has it and it has so many units."""
    address = Component.parse(site)
    expected = signature.units(address.kind)
    if address.unit is not None or address.layer >= signature.layers or (expected is not None and units != expected):
        raise MechunlearnError(
            f"Site '{site}' with {units} units does not fit {signature}. "
            f"Expected a layer below {signature.layers} and {expected} units, and no [unit] in the name."
        )
    return address


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
    def everything(cls, model: HasLayout) -> "ComponentMask":
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

    def tied(self, layout: Layout | HasLayout) -> "ComponentMask":
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

    def weights(self, model: HasLayout) -> int:
        """How many weights of the model the mask selects."""
        self.check(model.layout.signature)
        return sum(
            int(chosen.sum()) * model.unit_weights(Component.parse(site).kind) for site, chosen in self.sites.items()
        )

    def parameter_masks(self, model: "HasLayout | nn.Module") -> dict[str, Bool[Tensor, "*shape"]]:
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

    def restrict_(self, model: "HasLayout | nn.Module") -> Restriction:
        """Make an ordinary model train only the selected units, in any training loop and under any torch optimiser.

        Give a Hugging Face model, or a hooked model (`refresh_()` it after training). Holds until `.remove()` of what
        is returned, or for a `with` block; costs one copy of every partly selected matrix. See `Restriction` for what
        it guards against and what not. Raises `MechunlearnError` if the mask is empty, of another architecture or of
        features, or the model is restricted already.

        >>> from mechunlearn.toy import planted_facts
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


@dataclass(frozen=True, eq=False)
class Localization:
    """How much each unit matters: `{site: Float[unit]}`, the weights a unit of each kind has, and how it was found.

    `unit_weights` maps every kind of the model to the weights of one unit; `total_weights` counts all editable weights
    (embeddings, norms and output biases excluded). `evidence` holds what a method found on the way (probe curves,
    windows); `note` is a sentence for the reader, such as "no window found". `by_role` may hold `[role unit]` scores of
    activation sites (`L3.attn.o`, `L3.resid_post`, with one unit), one row a name in `roles`: token roles or positions.
    """

    scores: Mapping[str, Float[Tensor, " _unit"]]
    signature: Signature
    unit_weights: Mapping[str, int]
    total_weights: int
    card: RunCard
    evidence: dict = field(default_factory=dict)
    note: str = ""
    by_role: Mapping[str, Float[Tensor, "role _unit"]] = field(default_factory=dict)
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for site, rows in self.by_role.items():
            if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(self.roles):
                raise MechunlearnError(
                    f"Scores by role of '{site}' must be a tensor [role unit], one row a name in roles."
                )
        object.__setattr__(self, "by_role", {site: rows.detach().float().cpu() for site, rows in self.by_role.items()})
        object.__setattr__(self, "roles", tuple(self.roles))
        for site, scores in self.scores.items():
            if not isinstance(scores, Tensor) or scores.ndim != 1 or not scores.is_floating_point():
                raise MechunlearnError(f"Scores of '{site}' must be a one-dimensional float tensor, one entry a unit.")
            if not torch.isfinite(scores).all():
                raise MechunlearnError(f"Scores of '{site}' are not finite: check the model's dtype and the metric.")
            check_site(site, len(scores), self.signature)
        ordered = sorted(self.scores, key=Component.parse)
        object.__setattr__(self, "scores", {site: self.scores[site].detach().float().cpu() for site in ordered})

    def above(self, threshold: float | int) -> ComponentMask:
        """The units whose |score| is larger than the threshold."""
        return ComponentMask({site: s.abs() > threshold for site, s in self.scores.items()}, self.signature)

    def strongest_role(self, among: Iterable[str] | None = None) -> str:
        """The token role with the largest sum of |score| over sites: where a closed-form edit should act.

        `among` limits the choice, by default to `subject last` and `last`. Raises `MechunlearnError` if nothing was scored by
        these roles.

        >>> tiny = Signature("llama", 2, 4, 2, 64, 32)
        >>> scores = {"L0.mlp_out": torch.tensor([[0.1], [0.6]]), "L1.mlp_out": torch.tensor([[0.3], [0.1]])}
        >>> roles = ("last", "subject last")
        >>> Localization({}, tiny, {}, 0, RunCard("example"), by_role=scores, roles=roles).strongest_role()
        'subject last'
        """
        chosen = [role for role in (among or ("subject last", "last")) if role in self.roles]
        if not self.by_role or not chosen:
            raise MechunlearnError(
                f"This localization has no scores by the token roles asked for (it has: {', '.join(self.roles) or 'none'}). "
                "Expected one such as causal_tracing(model, prompts, kinds=['mlp_out'], by='role')."
            )
        sums = {
            role: sum(float(s[self.roles.index(role)].abs().sum()) for s in self.by_role.values()) for role in chosen
        }
        return max(chosen, key=lambda role: sums[role])

    def ranked(self, first: int | None = None) -> list[Component]:
        """Units, largest |score| first, ties in component order: all, or the first so many."""
        sites = [Component.parse(site) for site in self.scores]
        _, site, unit = (ranks[:first].tolist() for ranks in self._order())
        return [Component(sites[i].layer, sites[i].kind, u) for i, u in zip(site, unit)]

    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        """By rank: the place among all scores, the number of the site, the unit in it."""
        sizes = torch.tensor([len(scores) for scores in self.scores.values()], dtype=torch.long)
        everything = torch.cat([torch.zeros(0), *self.scores.values()])
        order = everything.abs().argsort(descending=True, stable=True)
        site = torch.arange(len(sizes)).repeat_interleave(sizes)[order]
        return order, site, order - (sizes.cumsum(0) - sizes)[site]

    def top(self, units: int | None = None, weights: float | int | None = None, tied: bool = False) -> ComponentMask:
        """The units with the largest |score| within a budget: a number of units, or a share of all editable weights.

        Taken in order and stopped before the first that would exceed the budget, so that masks of growing budgets
        nest. With `tied=True` the result is tied (see `ComponentMask.tied`) and tied weights count.
        Raises `MechunlearnError` if the budget is out of range or both are given.
        """
        if (units is None) == (weights is None):
            raise MechunlearnError("Give one budget: top(units=64) or top(weights=0.05).")
        available = sum(len(s) for s in self.scores.values())
        if units is not None and not 0 <= units <= available:
            raise MechunlearnError(f"A budget of {units} units is out of range: the scores cover {available} units.")
        if weights is not None and not 0 <= weights <= 1:
            raise MechunlearnError(f"A budget of {weights} is out of range: a share of the weights lies in [0, 1].")
        limit = float("inf") if weights is None else weights * self.total_weights + 1e-6
        return self._largest(units, limit, tied)

    def _largest(self, units: int | None, limit: float, tied: bool) -> ComponentMask:
        """Without a loop over units: a model of billions of weights has half a million."""
        order, site, unit = self._order()
        sites = [Component.parse(name) for name in self.scores]
        costs = torch.tensor([self._cost(each.kind, tied) for each in sites], dtype=torch.long)[site]
        if tied:
            head = torch.tensor([each.kind == "attn.o" for each in sites], dtype=torch.bool)[site]
            layer = torch.tensor([each.layer for each in sites], dtype=torch.long)[site]
            group = layer * self.signature.kv_heads + unit // (self.signature.heads // self.signature.kv_heads)
            first = ~torch.tensor(pd.Series(torch.where(head, group, -1).numpy()).duplicated().to_numpy())
            costs = costs + (first & head) * sum(self.unit_weights.get(kind, 0) for kind in ("attn.k", "attn.v"))
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[: int((costs.cumsum(0) <= limit).sum()) if units is None else units]] = True
        parts = chosen.split([len(scores) for scores in self.scores.values()]) if self.scores else ()
        mask = ComponentMask(dict(zip(self.scores, parts)), self.signature)
        return mask.tied(Layout(self.signature, 0)) if tied else mask

    def _cost(self, kind: str, tied: bool) -> int:
        """Weights of one unit, and of what is tied to it and to no other unit."""
        also = {"mlp.out": ("mlp.in", "mlp.gate"), "attn.o": ("attn.q",)}.get(kind, ()) if tied else ()
        return sum(self.unit_weights.get(each, 0) for each in (kind, *also))

    def share(self, mask: ComponentMask) -> float:
        """The mask's weights as a share of all editable weights."""
        mask.check(self.signature)
        used = sum(int(m.sum()) * self.unit_weights[Component.parse(site).kind] for site, m in mask.sites.items())
        return used / self.total_weights

    def to_frame(self) -> pd.DataFrame:
        """One row a unit: component, layer, kind, unit, score; largest |score| first."""
        order, site, unit = (ranks.numpy() for ranks in self._order())
        sites = pd.DataFrame(
            [(name, at.layer, at.kind) for name, at in ((name, Component.parse(name)) for name in self.scores)],
            columns=["component", "layer", "kind"],
        )
        frame = sites.iloc[site].reset_index(drop=True).assign(unit=unit)
        frame["component"] += "[" + frame.unit.astype(str) + "]"
        return frame.assign(score=torch.cat([torch.zeros(0), *self.scores.values()]).double().numpy()[order])

    def save(self, path: str | Path) -> None:
        """Write a `.json` or `.safetensors` file; both are complete."""
        path = Path(path)
        about = {
            "kind": "localization",
            "signature": asdict(self.signature),
            "unit_weights": dict(self.unit_weights),
            "total_weights": self.total_weights,
            "card": asdict(self.card),
            "evidence": self.evidence,
            "note": self.note,
            "roles": self.roles,
        }
        if path.suffix == ".safetensors":
            metadata = {"kind": "localization", "about": json.dumps(about)}
            by_role = {f"by role/{site}": rows for site, rows in self.by_role.items()}
            save_tensors(path, {**self.scores, **by_role}, metadata)
            return
        tensors = {"scores": self.scores, "by_role": self.by_role}
        listed = {name: {site: t.tolist() for site, t in of.items()} for name, of in tensors.items()}
        with whole_file(path) as beside:
            beside.write_text(json.dumps({**about, **listed}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Localization":
        """Raises `MechunlearnError` if the file is missing, truncated or something else."""
        path = Path(path)
        try:
            if path.suffix == ".safetensors":
                tensors, metadata = load_tensors(path, "localization")
                about = json.loads(metadata["about"])
                by_role = {k.split("/", 1)[1]: t for k, t in tensors.items() if k.startswith("by role/")}
                scores = {site: t for site, t in tensors.items() if not site.startswith("by role/")}
            else:
                about = json.loads(path.read_text(encoding="utf-8"))
                scores, by_role = (
                    {site: torch.tensor(t, dtype=torch.float32) for site, t in about.get(name, {}).items()}
                    for name in ("scores", "by_role")
                )
            return cls(
                scores,
                Signature(**about["signature"]),
                about["unit_weights"],
                about["total_weights"],
                RunCard(**about["card"]),
                about["evidence"],
                about["note"],
                by_role,
                tuple(about.get("roles", ())),
            )
        except (OSError, UnicodeDecodeError) as error:
            raise MechunlearnError(f"Could not read the localization '{path}': {error}.") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise MechunlearnError(f"'{path}' is not a whole localization file ({error}).") from None

    def __repr__(self) -> str:
        units = sum(len(s) for s in self.scores.values())
        best = ", ".join(f"{c} {float(self.scores[c.site][c.unit]):+.3g}" for c in self.ranked(3))
        note = f"; {self.note}" if self.note else ""
        return f"Localization({self.card.method}, {units} units, largest: {best or 'none'}{note})"

    def _repr_html_(self) -> str:
        scored = by_kind(
            (at.layer, at.kind, len(s), len(s)) for s, at in ((s, Component.parse(k)) for k, s in self.scores.items())
        )
        best = self.ranked(5)
        about = {
            "scored": ", ".join(f"{n} {unit_name(kind)}s at {kind} (layers {layers})" for kind, layers, n, _ in scored),
            "for": self.signature,
            "note": self.note,
            "by token role": ", ".join(self.roles) if self.by_role else "",
        }
        rows = [
            (
                one,
                f"{float(self.scores[one.site][one.unit]):+.4g}",
                f"{self.unit_weights.get(one.kind, 0) / self.total_weights:.3%}",
            )
            for one in best
            if one.unit is not None and self.total_weights
        ]
        return card(f"Localization: {self.card.method}", about, ("largest", "score", "of the weights"), rows)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole; a disk that is full raises `OSError`, as for any other file."""
    with whole_file(path) as beside:
        try:
            save_file({name: t.clone().contiguous() for name, t in tensors.items()}, beside, metadata=metadata)
        except SafetensorError as error:  # what it makes of an OSError
            raise OSError(str(error)) from None


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of ours; one clear error if it is not such a file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MechunlearnError(f"'{path}' is not a whole .safetensors file ({error}).") from None
    if metadata.get("kind") != kind:
        raise MechunlearnError(f"'{path}' holds a {metadata.get('kind', 'foreign file')}, not a {kind}.")
    return tensors, metadata
