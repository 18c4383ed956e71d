"""Names of activations: sites of this package (`L3.resid_post`), hook points of TransformerLens (`blocks.3.hook_out`)."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.layout import Layout

# kind: the canonical name in TransformerBridge, then the name in HookedTransformer
HOOK_POINTS = {
    "resid_pre": ("hook_in", "hook_resid_pre"),
    "resid_mid": ("ln2.hook_in", "hook_resid_mid"),
    "resid_post": ("hook_out", "hook_resid_post"),
    "attn_out": ("attn.hook_out", "hook_attn_out"),
    "mlp_out": ("mlp.hook_out", "hook_mlp_out"),
    "mlp_in": ("mlp.hook_in",),
    "attn_projected": ("attn.o.hook_out",),
    "attn.q": ("attn.q.hook_out", "attn.hook_q"),
    "attn.k": ("attn.k.hook_out", "attn.hook_k"),
    "attn.v": ("attn.v.hook_out", "attn.hook_v"),
    "attn.o": ("attn.o.hook_in", "attn.hook_z"),
    "mlp.out": ("mlp.out.hook_in", "mlp.hook_post"),
}
# where a norm follows attention and MLP (Gemma 2 and 3), `attn.hook_out` and `mlp.hook_out` are what enters that norm
POST_NORM_HOOK_POINTS = HOOK_POINTS | {
    "attn_out": ("ln1_post.hook_out", "hook_attn_out"),
    "mlp_out": ("ln2_post.hook_out", "hook_mlp_out"),
    "attn_projected": ("attn.o.hook_out", "attn.hook_out"),
}
# where a norm follows attention and MLP and none is in front of them (OLMo 2 and 3, EXAONE 4)
NO_PRE_NORM_HOOK_POINTS = POST_NORM_HOOK_POINTS | {
    "resid_mid": ("hook_resid_mid",),
    "attn_out": ("ln1.hook_out", "hook_attn_out"),
    "mlp_out": ("ln2.hook_out", "hook_mlp_out"),
}
# where what attention and MLP write is multiplied by a number (Granite)
SCALED_HOOK_POINTS = HOOK_POINTS | {
    "attn_out": ("hook_attn_out",),
    "mlp_out": ("hook_mlp_out",),
    "attn_projected": ("attn.o.hook_out", "attn.hook_out"),
}
# the dense layers of Llama 4
LLAMA4_HOOK_POINTS = HOOK_POINTS | {"mlp.out": ("mlp.dense_out.hook_in", "mlp.hook_post")}


def hook_points_of(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Return the hook points of each kind of site in one architecture.

    Args:
        layout: The parts of the architecture.
    """
    if layout.signature.family == "llama4_text":
        return LLAMA4_HOOK_POINTS
    if not layout.modules.mlp_post:
        return SCALED_HOOK_POINTS if layout.modules.residual_scale else HOOK_POINTS
    return POST_NORM_HOOK_POINTS if layout.modules.mlp_norm else NO_PRE_NORM_HOOK_POINTS


class ActivationCache(dict[str, Tensor]):
    """Activations by site. A TransformerLens hook name finds the same tensor: `cache["blocks.3.hook_resid_post"]`."""

    def __init__(self, site: Callable[[str], str] | None = None) -> None:
        """Make an empty cache.

        Args:
            site: Turns a hook name into a site, as `Decoder.site` does for one architecture.
        """
        super().__init__()
        self._site = site or site_of

    def __missing__(self, name: str) -> Tensor:
        try:
            site = self._site(name)
        except MechunlearnError as error:
            raise KeyError(str(error)) from None
        if site == name or site not in self.keys():
            raise KeyError(f"'{name}' is not in this cache, which holds {', '.join(self) or 'nothing'}.")
        return self[site]

    __contains__ = Mapping.__contains__

    def get(self, name: str, default: Any = None) -> Any:
        """Return an activation as `[]` finds it, or the default.

        Args:
            name: A site or a hook name of TransformerLens.
            default: What to return for a name that is not in the cache.
        """
        return Mapping.get(self, name, default)


def layer_of(hook_name: str) -> int:
    """Return the layer of a hook point: the first number in its name, or 0 if there is none.

    Args:
        hook_name: A site, a hook point of TransformerLens or the path of a module.
    """
    found = re.search(r"\d+", hook_name)
    return int(found[0]) if found else 0


def site_of(hook_name: str, points: Mapping[str, tuple[str, ...]] = HOOK_POINTS) -> str:
    """Turn a hook point of TransformerLens into a site. Any other name stays what it is.

    Args:
        hook_name: A name such as `blocks.3.hook_resid_post`, or its canonical form `blocks.3.hook_out`.
        points: The hook points of each kind of site, in the model at hand.

    Raises:
        MechunlearnError: No site is this hook point.

    >>> site_of("blocks.8.hook_resid_pre"), site_of("blocks.3.hook_out"), site_of("L3.resid_post")
    ('L8.resid_pre', 'L3.resid_post', 'L3.resid_post')
    """
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if not found:
        return hook_name
    kinds = {name: kind for kind, names in points.items() for name in names}
    if found[2] in kinds:
        return f"L{found[1]}.{kinds[found[2]]}"
    near = difflib.get_close_matches(found[2], kinds, n=3, cutoff=0.4)
    pattern = " For attention patterns call model.attention(tokens, layer)." if "pattern" in found[2] else ""
    raise MechunlearnError(
        f"The hook point '{hook_name}' has no site here. Nearest: {', '.join(near) or 'none'}. Expected "
        "blocks.<layer>. "
        f"with {', '.join(kinds)}.{pattern}"
    )


def hook_name_of(site: str) -> str:
    """Turn a site into the canonical hook point of TransformerLens. Any other name stays what it is.

    Args:
        site: A name such as `L3.resid_post`.

    >>> hook_name_of("L3.resid_post"), hook_name_of("encoder.block.2")
    ('blocks.3.hook_out', 'encoder.block.2')
    """
    layer, _, kind = site.partition(".")
    return f"blocks.{layer[1:]}.{HOOK_POINTS[kind][0]}" if kind in HOOK_POINTS and layer[1:].isdecimal() else site
