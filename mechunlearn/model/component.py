"""Which and how much: component addresses, masks and scores. None of them knows a method or a parameter name."""

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import TYPE_CHECKING

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.layout import KINDS, Signature

if TYPE_CHECKING:
    pass

_ADDRESS = re.compile(
    r"L(0|[1-9]\d*)\.((?:attn\.[qkvo]|mlp\.(?:in|gate|out))|(?:sae|codebook):[\w./-]+)(?:\[(0|[1-9]\d*)\])?", re.ASCII
)
SCORED = ("attn.o", "mlp.out")


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
