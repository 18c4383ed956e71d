"""Names of activations: sites of this package (`L3.resid_post`) and hook points of TransformerLens (`blocks.3.hook_out`)."""

import difflib
import re

from mechunlearn.errors import MechunlearnError

HOOK_POINTS = {
    "resid_pre": ("hook_in", "hook_resid_pre"),
    "resid_mid": ("ln2.hook_in", "hook_resid_mid"),
    "resid_post": ("hook_out", "hook_resid_post"),
    "attn_out": ("attn.hook_out", "hook_attn_out"),
    "mlp_out": ("mlp.hook_out", "hook_mlp_out"),
    "attn.o": ("attn.o.hook_in", "attn.hook_z"),
    "mlp.out": ("mlp.out.hook_in", "mlp.hook_post"),
}


def layer_of(hook_name: str) -> int:
    """The layer that a hook point is in: the first number of its name, 0 where it has none."""
    found = re.search(r"\d+", hook_name)
    return int(found[0]) if found else 0


def site_of(hook_name: str) -> str:
    """A hook point of TransformerLens as a site; any other name as it is.

    >>> site_of("blocks.8.hook_resid_pre"), site_of("blocks.3.hook_out"), site_of("L3.resid_post")
    ('L8.resid_pre', 'L3.resid_post', 'L3.resid_post')
    """
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if not found:
        return hook_name
    for kind, names in HOOK_POINTS.items():
        if found[2] in names:
            return f"L{found[1]}.{kind}"
    known = [name for names in HOOK_POINTS.values() for name in names]
    near = difflib.get_close_matches(found[2], known, n=3, cutoff=0.4)
    raise MechunlearnError(
        f"The hook point '{hook_name}' has no site here. Nearest: {', '.join(near) or 'none'}. Expected blocks.<layer>. with "
        f"{', '.join(known)}."
    )


def hook_name_of(site: str) -> str:
    """A site as the canonical hook point of TransformerLens; any other name as it is."""
    layer, _, kind = site.partition(".")
    return f"blocks.{layer[1:]}.{HOOK_POINTS[kind][0]}" if kind in HOOK_POINTS and layer[1:].isdecimal() else site
