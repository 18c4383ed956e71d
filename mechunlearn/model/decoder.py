"""The ordinary module as a residual stream: named activation sites, recorded runs, and runs that restart in the middle.

Hooks sit on the Hugging Face module itself, so training, patching and attribution all see them and nothing is paid for
a wrapper. A restarted run calls the model's own blocks with the model's own masks and rotary embeddings; keys and values
of the positions before the restart come from the recorded run.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.layout import Layout

Hook = Callable[[Tensor], Tensor | None]
Tap = tuple[nn.Module, str, Hook]
STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "attn_projected", "mlp_out", "mlp_in")
UNITS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.out")


@dataclass(frozen=True)
class Run:
    """One forward pass, kept: the residual stream entering each block and leaving the last, keys and values by layer.

    `kept` holds the activations that were asked for, by site; `logits` those at the positions that were asked for.
    """

    resid: list[Float[Tensor, "fact pos d_model"]]
    keys: list[Float[Tensor, "fact kv pos d_head"]]
    values: list[Float[Tensor, "fact kv pos d_head"]]
    logits: Float[Tensor, "fact read d_vocab"]
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoder:
    """A Hugging Face decoder seen through its layout."""

    hf: PreTrainedModel
    layout: Layout

    @property
    def blocks(self) -> list[nn.Module]:
        blocks: Any = self.hf.get_submodule(self.layout.modules.blocks)
        return list(blocks)

    @property
    def final_norm(self) -> nn.Module:
        return self.hf.get_submodule(self.layout.modules.final_norm)

    @property
    def unembedding(self) -> nn.Module:
        return self.hf.get_output_embeddings()

    def part(self, layer: int, name: str) -> nn.Module:
        """A module of a block: `attention_norm`, `mlp_norm`, `mlp`, or a post-norm (see `layout.Modules`)."""
        return self.blocks[layer].get_submodule(getattr(self.layout.modules, name))

    def projection(self, layer: int, kind: str) -> nn.Module:
        return self.hf.get_submodule(self.layout.module_name(layer, kind))

    def place(self, site: str) -> tuple[nn.Module, str]:
        """The module of a site, and whether its input (`in`) or its output (`out`) is the activation."""
        found = re.fullmatch(r"L(\d+)\.([a-z_.]+)", site)
        kind, layer = (found[2], int(found[1])) if found else ("", self.layout.signature.layers)
        if layer < self.layout.signature.layers:
            match kind:
                case "resid_pre":
                    return self.blocks[layer], "in"
                case "resid_post":
                    return self.blocks[layer], "out"
                case "resid_mid" if not self.layout.parallel:
                    return self.part(layer, "mlp_norm"), "in"
                case "mlp_in":
                    return self.part(layer, "mlp"), "in"
                case "attn_projected":
                    return self.projection(layer, "attn.o"), "out"
                case "attn.o" | "mlp.out":
                    return self.projection(layer, kind), "in"
                case "attn.q" | "attn.k" | "attn.v":
                    return self.projection(layer, kind), "out"
                case "attn_out" | "mlp_out":
                    post = "attention_post" if kind == "attn_out" else "mlp_post"
                    if getattr(self.layout.modules, post):
                        return self.part(layer, post), "out"
                    return self.projection(layer, "attn.o" if kind == "attn_out" else "mlp.out"), "out"
        raise MechunlearnError(
            f"No activation site '{site}' in {self.layout.signature}. Expected L<layer>.<kind> with a layer below "
            f"{self.layout.signature.layers} and a kind of {', '.join((*UNITS, *STREAMS))}"
            f"{'; models with parallel attention have no resid_mid' if kind == 'resid_mid' else ''}."
        )

    def taps(self, site: str, hook: Hook) -> list[Tap]:
        """The hook at a site, seeing heads as `[fact pos head d_head]`.

        No module gives or takes the residual stream between attention and MLP, so there a change is added to what
        attention writes.
        """
        module, side = self.place(site)
        layer, kind = site.split(".", 1)
        if kind != "resid_mid":
            return [self._tap(module, side, kind, hook)]
        entered: list[Tensor] = []
        write = partial(between, entered, hook)
        return [(*self.place(f"{layer}.resid_pre"), entered.append), (*self.place(f"{layer}.attn_out"), write)]

    def _tap(self, module: nn.Module, side: str, kind: str, hook: Hook) -> Tap:
        if kind == "attn.o":
            return module, side, partial(self._by_head, hook)
        if kind in ("attn.q", "attn.k", "attn.v"):
            return module, side, partial(self._by_projection, kind, hook)
        return module, side, hook

    def _by_head(self, hook: Hook, z: Tensor) -> Tensor | None:
        changed = hook(z.unflatten(-1, (self.layout.signature.heads, -1)))
        return None if changed is None else changed.flatten(-2)

    def _by_projection(self, kind: str, hook: Hook, projected: Tensor) -> Tensor | None:
        changed = hook(self.layout.heads(kind, projected))
        if changed is None:
            return None
        written = projected.clone()
        self.layout.heads(kind, written).copy_(changed)
        return written

    @contextmanager
    def hooks(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        """Within the block each hook sees the activation at its site; what it returns takes its place."""
        with tapped(tap for site, hook in hooks.items() for tap in self.taps(site, hook)):
            yield

    def reading(self, at: Int[Tensor, "fact read"] | None) -> Tap:
        """Unembed only these positions of each fact."""
        return self.unembedding, "in", partial(_gather, at)

    @torch.no_grad()
    def record(
        self,
        tokens: Int[Tensor, "fact pos"],
        at: Int[Tensor, "fact read"],
        sites: Sequence[str] = (),
        hooks: Mapping[str, Hook] | None = None,
        keys: bool = True,
    ) -> Run:
        """A forward pass under `hooks`, kept, with logits at the positions `at`; without `keys` it cannot be restarted."""
        resid: list[Tensor] = []
        kept: dict[str, Tensor] = {}
        cache = DynamicCache()
        taps: list[Tap] = [(block, "first", resid.append) for block in (*self.blocks, self.final_norm)]
        for site, hook in (hooks or {}).items():  # in front of what is kept, which is in front of hooks of the user's
            taps += [(module, "first" if side == "in" else side, tap) for module, side, tap in self.taps(site, hook)]
        taps += [tap for site in sites for tap in self.taps(site, partial(kept.__setitem__, site))]
        with tapped([*taps, self.reading(at)]):
            held = {self.cache_argument: cache} if keys else {}
            logits = self.hf(input_ids=tokens.to(self.hf.device), use_cache=keys, **held).logits
        layers: list[Any] = list(cache.layers)
        return Run(resid, [layer.keys for layer in layers], [layer.values for layer in layers], logits, kept)

    @cached_property
    def cache_argument(self) -> str:
        """What the module calls its key-value cache: transformers renames `past_key_values` to `cache`."""
        return "cache" if "cache" in inspect.signature(self.hf.forward).parameters else "past_key_values"

    @torch.no_grad()
    def attention(self, tokens: Int[Tensor, "fact pos"], layer: int) -> Float[Tensor, "fact head pos pos"]:
        """The attention pattern of a layer, from a forward pass that ends there.

        The fused kernels do not give it, so the pass is run with the plain one.
        """
        name, _, _ = self.layout.module_name(layer, "attn.o").rpartition(".")
        found: list[Tensor] = []

        def stop(module: nn.Module, given: object, out: tuple[Tensor, Tensor]) -> None:
            del module, given
            found.append(out[1])
            raise _Reached

        before = self.hf.config._attn_implementation
        handle = self.hf.get_submodule(name).register_forward_hook(stop)
        try:
            self.hf.set_attn_implementation("eager")
            with suppress(_Reached):
                self.hf(input_ids=tokens.to(self.hf.device), use_cache=False)
        finally:
            handle.remove()
            self.hf.set_attn_implementation(before)
        return found[0]

    @torch.no_grad()
    def entering(self, tokens: Int[Tensor, "row pos"], layer: int) -> Float[Tensor, "row pos d_model"]:
        """The residual stream that enters a block, from a forward pass that ends there."""
        found: list[Tensor] = []
        with suppress(_Reached), tapped([(self.blocks[layer], "first", partial(_stop, found))]):
            self.hf(input_ids=tokens.to(self.hf.device), use_cache=False)
        return found[0]

    @torch.no_grad()
    def observe(self, tokens: Int[Tensor, "row pos"], hooks: Mapping[str, Hook]) -> None:
        """A forward pass under hooks that ends once each of their sites has been seen."""
        waiting = set(hooks)
        until = {site: partial(_until, waiting, site, hook) for site, hook in hooks.items()}
        with suppress(_Reached), self.hooks(until):
            self.hf(input_ids=tokens.to(self.hf.device), use_cache=False)

    def restart(self, start: int, stop: int, before: Run | None = None) -> "Restart":
        """The means to call blocks on positions `start` to `stop`, with the keys and values that `before` has earlier."""
        signature = self.layout.signature
        calls: list[tuple[tuple, dict]] = []
        shape = (1, signature.kv_heads, start, self.layout.d_head)
        nothing = torch.zeros((), device=self.hf.device, dtype=self.hf.dtype).expand(shape)
        prefixes: list[Any] = [_Prefix(nothing, nothing) for _ in range(signature.layers)]
        as_tuple = self._blocks_return_tuples
        with ExitStack() as stack, torch.no_grad():
            for block in self.blocks:
                block.forward = partial(_recorded, calls, as_tuple)
                stack.callback(delattr, block, "forward")
                stack.enter_context(_without_hooks(block))
            stack.enter_context(tapped([self.reading(torch.zeros(1, 1, dtype=torch.long, device=self.hf.device))]))
            self.hf(
                inputs_embeds=torch.zeros(
                    1, stop - start, signature.d_model, device=self.hf.device, dtype=self.hf.dtype
                ),
                position_ids=torch.arange(start, stop, device=self.hf.device)[None],
                use_cache=True,
                **{self.cache_argument: Cache(layers=prefixes)},
            )
        if before is not None:
            for layer, keys, values in zip(prefixes, before.keys, before.values, strict=True):
                layer.keys, layer.values = keys[:, :, :start], values[:, :, :start]
        return Restart(self, calls, start, stop)

    @cached_property
    def _blocks_return_tuples(self) -> bool:
        seen: list[bool] = []
        handle = self.blocks[0].register_forward_hook(lambda module, args, out: seen.append(isinstance(out, tuple)))
        try:
            with torch.no_grad():
                self.hf(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.hf.device), use_cache=False)
        finally:
            handle.remove()
        return seen[0]

    def unembed(self, resid: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_vocab"]:
        """Logits of what leaves the last block."""
        logits = self.unembedding(self.final_norm(resid))
        cap = getattr(self.hf.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def first_not_finite(self, tokens: Int[Tensor, "fact pos"]) -> str:
        """Where the residual stream stops being finite, in words."""
        resid = self.record(tokens, torch.zeros(len(tokens), 1, dtype=torch.long, device=self.hf.device)).resid
        for layer, stream in enumerate(resid):
            if not torch.isfinite(stream).all():
                return "the embedding" if layer == 0 else f"layer {layer - 1}"
        return "the unembedding"


@dataclass(frozen=True)
class Restart:
    """Blocks, ready to be called on some positions. Rows may be any multiple of the facts that were recorded."""

    decoder: Decoder
    calls: list[tuple[tuple, dict]]
    start: int
    stop: int

    def block(self, layer: int, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """What leaves a block when `resid` enters it."""
        args, kwargs = self.calls[layer]
        out = self.decoder.blocks[layer](resid, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class _Reached(Exception):
    """A forward pass has come as far as it is needed."""


class _Prefix(DynamicLayer):
    """Keys and values of earlier positions, repeated for as many rows as ask; nothing is added to them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys.shape[-2] == 0:
            return key_states, value_states
        repeats = (len(key_states) // len(self.keys), 1, 1, 1)
        return (
            torch.cat([self.keys.repeat(repeats), key_states], dim=-2),
            torch.cat([self.values.repeat(repeats), value_states], dim=-2),
        )


@contextmanager
def tapped(taps: Iterable[Tap]) -> Iterator[None]:
    """Within the block, each function sees the first tensor that enters (`in`) or leaves (`out`) its module.

    With `first` it sees what enters before any other hook has changed it.

    What it returns takes the tensor's place. Hooks are removed whatever happens.
    """
    with ExitStack() as stack:
        for module, side, function in taps:
            if side != "out":
                first = side == "first"
                handle = module.register_forward_pre_hook(partial(_entering, function), prepend=first, with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(_leaving, function))
            stack.callback(handle.remove)
        yield


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Within the block the module is called as if it had no hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, type(kept[name])())
    try:
        yield
    finally:
        for name, hooks in kept.items():
            setattr(module, name, hooks)


def _entering(function: Hook, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    del module
    changed = function(args[0] if args else kwargs["hidden_states"])
    if changed is None:
        return None
    return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})


def _leaving(function: Hook, module: nn.Module, args: tuple, out: Tensor | tuple) -> Tensor | tuple | None:
    del module, args
    changed = function(out[0] if isinstance(out, tuple) else out)
    if changed is None:
        return None
    return (changed, *out[1:]) if isinstance(out, tuple) else changed


def _until(waiting: set[str], site: str, hook: Hook, activation: Tensor) -> Tensor | None:
    changed = hook(activation)
    waiting.discard(site)
    if not waiting:
        raise _Reached
    return changed


def _recorded(
    calls: list[tuple[tuple, dict]], as_tuple: bool, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor | tuple[Tensor]:
    calls.append((args, kwargs))
    return (hidden_states,) if as_tuple else hidden_states


def _stop(found: list[Tensor], resid: Tensor) -> None:
    found.append(resid)
    raise _Reached


def _gather(at: Int[Tensor, "fact read"] | None, hidden: Tensor) -> Tensor | None:
    if at is None:
        return None
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], at.to(hidden.device)]


def between(entered: list[Tensor], hook: Hook, attn_out: Tensor) -> Tensor | None:
    """What attention is to write so that the stream behind it is what the hook makes of it; `entered` holds what came in."""
    resid = entered.pop()
    changed = hook(resid + attn_out)
    return None if changed is None else changed - resid
