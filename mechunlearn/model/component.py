"""Addresses of components. They know no model and no parameter name."""

import re
from dataclasses import dataclass
from functools import total_ordering

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.hook_points import site_of
from mechunlearn.model.layout import KINDS, Signature

_ADDRESS = re.compile(
    r"L(0|[1-9]\d*)\.((?:attn\.[qkvo]|mlp\.(?:in|gate|out))|(?:sae|codebook):[\w./-]+)(?:\[(0|[1-9]\d*)\])?", re.ASCII
)
SCORED = ("attn.o", "mlp.out")


@total_ordering
@dataclass(frozen=True)
class Component:
    """The address of a unit, or of a whole site.

    Attributes:
        layer: The layer, from 0.
        kind: The kind of the site, such as `attn.o`, `mlp.out` or `sae:<id>`.
        unit: The head, neuron, feature or code; None for the whole site.

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
        """Read an address.

        Args:
            address: `L<layer>.<kind>` or `L<layer>.<kind>[<unit>]`. Hook names of TransformerLens stand for their site.

        Raises:
            MechunlearnError: The address is malformed, or names an activation that has no weights.

        >>> Component.parse("blocks.9.attn.hook_z[7]")
        L9.attn.o[7]
        """
        name, bracket, unit = address.partition("[")
        found = _ADDRESS.fullmatch(site_of(name) + bracket + unit)
        if not found:
            raise MechunlearnError(
                f"Component address '{address}' is malformed. Expected 'L<layer>.<kind>' or 'L<layer>.<kind>[<unit>]' "
                f"with a kind of {', '.join(KINDS)}, for example 'L9.attn.o[7]'."
            )
        layer, kind, number = found.groups()
        return cls(int(layer), kind, None if number is None else int(number))

    @property
    def site(self) -> str:
        """The address of the whole site."""
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
    """Return the address of a site, if an architecture has it with so many units.

    Args:
        site: The address of a whole site.
        units: The number of units that it must have.
        signature: The architecture.

    Raises:
        MechunlearnError: There is no such site, or it has another number of units.
    """
    address = Component.parse(site)
    expected = signature.units(address.kind)
    if address.unit is not None or address.layer >= signature.layers or (expected is not None and units != expected):
        raise MechunlearnError(
            f"Site '{site}' with {units} units does not fit {signature}. "
            f"Expected a layer below {signature.layers} and {expected} units, and no [unit] in the name."
        )
    return address
