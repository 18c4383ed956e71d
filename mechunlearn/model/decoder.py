"""The ordinary module as a residual stream: named activation sites, recorded runs, and runs that restart in the middle.

Hooks sit on the Hugging Face module itself, so training, patching and attribution all see them and nothing is paid for
a wrapper. A restarted run calls the model's own blocks with the model's own masks and rotary embeddings; keys and
values of the positions before the restart come from the recorded run.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.hook_points import hook_points_of, site_of
from mechunlearn.model.layout import Layout
from mechunlearn.model.restart import Prefix, Restart, calls_of
from mechunlearn.model.taps import Hook, Tap, between, scaled, tapped
from mechunlearn.model.unwrap import evaluating

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "attn_projected", "mlp_out", "mlp_in")
UNITS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.out")


@dataclass(frozen=True)
class Run:
    """What is kept of a forward pass.

    Attributes:
        resid: The residual stream that enters each block, then the one that leaves the last.
        keys: The keys of each layer.
        values: The values of each layer.
        logits: Those at the positions that `record` was asked for.
        kept: The activations at the sites that `record` was asked for, by site.
    """

    resid: list[Float[Tensor, "fact pos d_model"]]
    keys: list[Float[Tensor, "fact kv pos d_head"]]
    values: list[Float[Tensor, "fact kv pos d_head"]]
    logits: Float[Tensor, "fact read d_vocab"]
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoder:
    """A Hugging Face decoder seen through its layout.

    Attributes:
        hf: The model.
        layout: The parts of its architecture.
    """

    hf: PreTrainedModel
    layout: Layout

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's blocks, first to last."""
        blocks: Any = self.hf.get_submodule(self.layout.modules.blocks)
        return list(blocks)

    @property
    def final_norm(self) -> nn.Module:
        """The norm in front of the unembedding."""
        return self.hf.get_submodule(self.layout.modules.final_norm)

    @property
    def unembedding(self) -> nn.Module:
        """The module that turns the stream into logits."""
        unembedding: nn.Module = self.hf.get_output_embeddings()
        return unembedding

    @property
    def sites(self) -> list[str]:
        """Every activation site of this model, layer by layer."""
        kinds = [kind for kind in (*UNITS, *STREAMS) if kind != "resid_mid" or not self.layout.parallel]
        return [f"L{layer}.{kind}" for layer in range(self.layout.signature.layers) for kind in kinds]

    def site(self, name: str) -> str:
        """Return the site that a hook point of TransformerLens is in this architecture; other names stay what they are.

        Args:
            name: A site such as `L3.resid_post`, or a hook name such as `blocks.3.hook_resid_post`.

        Raises:
            MechunlearnError: No site is this hook point.
        """
        return site_of(name, hook_points_of(self.layout))

    def part(self, layer: int, name: str) -> nn.Module:
        """Return a module of a block.

        Args:
            layer: The block.
            name: `attention_norm`, `mlp_norm`, `mlp`, `attention_post` or `mlp_post` (see `families.Modules`). Where the
                family has no such norm it is `nn.Identity`, which no hook sees.
        """
        path = getattr(self.layout.modules, name)
        return self.blocks[layer].get_submodule(path) if path else nn.Identity()

    def projection(self, layer: int, kind: str) -> nn.Module:
        """Return the module that multiplies with the weights of a site.

        Args:
            layer: The layer of the site.
            kind: The kind of the site, such as `attn.o`.
        """
        return self.hf.get_submodule(self.layout.module_name(layer, kind))

    def place(self, site: str) -> tuple[nn.Module, str]:
        """Return the module of a site, and whether its input (`in`) or its output (`out`) is the activation.

        Args:
            site: A site or a hook name of TransformerLens.

        Raises:
            MechunlearnError: The model has no such site.
        """
        name, site = site, self.site(site)
        found = re.fullmatch(r"L(\d+)\.([a-z_.]+)", site)
        kind, layer = (found[2], int(found[1])) if found else ("", self.layout.signature.layers)
        if layer < self.layout.signature.layers:
            match kind:
                case "resid_pre":
                    return self.blocks[layer], "in"
                case "resid_post":
                    return self.blocks[layer], "out"
                case "resid_mid" if not self.layout.parallel:
                    return self.part(layer, "mlp_norm" if self.layout.modules.mlp_norm else "mlp"), "in"
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
            f"No activation site '{name}' in {self.layout.signature}. Expected L<layer>.<kind> with a layer below "
            f"{self.layout.signature.layers} and a kind of {', '.join((*UNITS, *STREAMS))}, or a hook name of "
            "TransformerLens"
            f"{'; models with parallel attention have no resid_mid' if kind == 'resid_mid' else ''}."
        )

    def taps(self, site: str, hook: Hook) -> list[Tap]:
        """Return the taps that let a hook see the activation at a site, heads as `[fact pos head d_head]`.

        No module gives or takes the residual stream between attention and MLP, so there a change is added to what
        attention writes.

        Args:
            site: A site or a hook name of TransformerLens.
            hook: Sees the activation; what it returns takes its place.
        """
        module, side = self.place(site)
        layer, kind = self.site(site).split(".", 1)
        if kind != "resid_mid":
            return [self._tap(module, side, kind, hook)]
        entered: list[Tensor] = []
        write = self._tap(*self.place(f"{layer}.attn_out"), "attn_out", partial(between, entered, hook))
        return [(*self.place(f"{layer}.resid_pre"), entered.append), write]

    def _tap(self, module: nn.Module, side: str, kind: str, hook: Hook) -> Tap:
        if kind in ("attn_out", "mlp_out") and self.layout.residual_scale != 1:
            return module, side, partial(scaled, self.layout.residual_scale, hook)
        if kind == "attn.o":
            return module, side, partial(self._by_head, hook)
        if kind in ("attn.q", "attn.k", "attn.v"):
            return module, side, partial(self._by_projection, kind, hook)
        return module, side, hook

    def _by_head(self, hook: Hook, z: Tensor) -> Tensor | None:
        heads = self.layout.signature.heads
        changed = hook(z.view(*z.shape[:-1], heads, z.shape[-1] // heads))
        return None if changed is None else changed.flatten(-2)

    def _by_projection(self, kind: str, hook: Hook, projected: Tensor) -> Tensor | None:
        if getattr(self.hf.config, "clip_qkv", None):  # OLMo clips queries and keys in place, after the hook
            projected = projected.clone()
        changed = hook(self.layout.heads(kind, projected))
        if changed is None:
            return None
        written = projected.clone()
        self.layout.heads(kind, written).copy_(changed)
        return written

    @contextmanager
    def hooks(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        """Within the block each hook sees the activation at its site; what it returns takes its place.

        Args:
            hooks: Functions of one tensor, by site or hook name of TransformerLens.
        """
        with tapped(tap for site, hook in hooks.items() for tap in self.taps(site, hook)):
            yield

    def reading(self, at: Int[Tensor, "fact read"] | None) -> Tap:
        """Return the tap that lets the model unembed some positions only.

        Args:
            at: The positions of each fact; None for all.
        """
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
        """Run the model, and keep what enters its blocks.

        Args:
            tokens: What it reads.
            at: The positions of each fact where logits are wanted.
            sites: Where activations are kept.
            hooks: Hooks that are on meanwhile, in front of all others.
            keys: Keep keys and values, so that the run can be restarted.
        """
        resid: list[Tensor] = []
        kept: dict[str, Tensor] = {}
        cache = DynamicCache()
        taps: list[Tap] = [(block, "first", resid.append) for block in (*self.blocks, self.final_norm)]
        for site, hook in (hooks or {}).items():  # in front of what is kept, which is in front of hooks of the user's
            taps += [(module, "first" if side == "in" else side, tap) for module, side, tap in self.taps(site, hook)]
        taps += [tap for site in sites for tap in self.taps(site, partial(kept.__setitem__, site))]
        with evaluating(self.hf), tapped([*taps, self.reading(at)]):
            held = {self.cache_argument: cache} if keys else {}
            logits = self.hf(input_ids=tokens.to(self.hf.device), use_cache=keys, **held).logits
        layers: list[Any] = list(cache.layers)
        return Run(resid, [layer.keys for layer in layers], [layer.values for layer in layers], logits, kept)

    @torch.no_grad()
    def behind_shared(
        self, tokens: Int[Tensor, "fact pos"], shared: int, at: Int[Tensor, "fact read"]
    ) -> Float[Tensor, "fact read d_vocab"]:
        """Return logits of texts that begin with the same tokens, which the model reads once for all of them.

        Modules see the first tokens in one call and the rest in another, as in generation with a cache: a hook that
        counts positions from the beginning of a text does not fit.

        Args:
            tokens: What the model reads.
            shared: How many first tokens all texts have in common.
            at: The positions of each fact where logits are wanted, none of them among the shared tokens.
        """
        first = self.record(tokens[:1, :shared], torch.zeros(1, 1, dtype=torch.long))
        prefixes: list[Any] = [Prefix(keys, values) for keys, values in zip(first.keys, first.values, strict=True)]
        held = {self.cache_argument: Cache(layers=prefixes)}
        device = self.hf.device
        positions = torch.arange(shared, tokens.shape[1], device=device)[None]
        with evaluating(self.hf), tapped([self.reading(at - shared)]):
            logits: Tensor = self.hf(
                input_ids=tokens[:, shared:].to(device), position_ids=positions, use_cache=True, **held
            ).logits
        return logits

    @cached_property
    def cache_argument(self) -> str:
        """What the module calls its key-value cache: transformers renames `past_key_values` to `cache`."""
        return "cache" if "cache" in inspect.signature(self.hf.forward).parameters else "past_key_values"

    @torch.no_grad()
    def attention(self, tokens: Int[Tensor, "fact pos"], layer: int) -> Float[Tensor, "fact head pos pos"]:
        """Return the attention pattern of a layer, from a forward pass that ends there.

        Fused kernels do not compute it, so the pass runs with the plain one.

        Args:
            tokens: What the model reads.
            layer: The layer.
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
        """Return the residual stream that enters a block, from a forward pass that ends there.

        Args:
            tokens: What the model reads.
            layer: The block.
        """
        found: list[Tensor] = []
        with suppress(_Reached), tapped([(self.blocks[layer], "first", partial(_stop, found))]):
            self.hf(input_ids=tokens.to(self.hf.device), use_cache=False)
        return found[0]

    @torch.no_grad()
    def observe(self, tokens: Int[Tensor, "row pos"], hooks: Mapping[str, Hook]) -> None:
        """Run the model under hooks until each of their sites has been seen.

        Args:
            tokens: What the model reads.
            hooks: Functions of one tensor, by site.
        """
        waiting = set(hooks)
        until = {site: partial(_until, waiting, site, hook) for site, hook in hooks.items()}
        with suppress(_Reached), self.hooks(until):
            self.hf(input_ids=tokens.to(self.hf.device), use_cache=False)

    def restart(self, start: int, stop: int, before: Run | None = None) -> Restart:
        """Prepare to call blocks on some positions.

        Args:
            start: The first position.
            stop: The position after the last.
            before: The run that has the keys and values of the positions before `start`.
        """
        signature = self.layout.signature
        like: dict[str, Any] = {"device": self.hf.device, "dtype": self.hf.dtype}
        nothing = torch.zeros((), **like).expand(1, signature.kv_heads, start, self.layout.d_head)
        prefixes: list[Any] = [Prefix(nothing, nothing) for _ in range(signature.layers)]
        at = torch.zeros(1, 1, dtype=torch.long, device=self.hf.device)
        blocks = self.blocks
        with calls_of(blocks, self._blocks_return_tuples) as calls, tapped([self.reading(at)]), torch.no_grad():
            self.hf(
                inputs_embeds=torch.zeros(1, stop - start, signature.d_model, **like),
                position_ids=torch.arange(start, stop, device=self.hf.device)[None],
                use_cache=True,
                **{self.cache_argument: Cache(layers=prefixes)},
            )
        if before is not None:
            for layer, keys, values in zip(prefixes, before.keys, before.values, strict=True):
                layer.keys, layer.values = keys[:, :, :start], values[:, :, :start]
        return Restart(blocks, calls, start, stop)

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
        """Turn what leaves the last block into logits.

        Args:
            resid: The residual stream.
        """
        logits: Tensor = self.unembedding(self.final_norm(resid))
        if self.layout.logit_scale != 1:
            logits = logits * self.layout.logit_scale
        cap = getattr(self.hf.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def first_not_finite(self, tokens: Int[Tensor, "fact pos"]) -> str:
        """Return in words where the residual stream stops being finite.

        Args:
            tokens: What the model reads.
        """
        resid = self.record(tokens, torch.zeros(len(tokens), 1, dtype=torch.long, device=self.hf.device)).resid
        for layer, stream in enumerate(resid):
            if not torch.isfinite(stream).all():
                return "the embedding" if layer == 0 else f"layer {layer - 1}"
        return "the unembedding"


class _Reached(Exception):
    """A forward pass has come as far as it is needed."""


def _until(waiting: set[str], site: str, hook: Hook, activation: Tensor) -> Tensor | None:
    changed = hook(activation)
    waiting.discard(site)
    if not waiting:
        raise _Reached
    return changed


def _stop(found: list[Tensor], resid: Tensor) -> None:
    found.append(resid)
    raise _Reached


def _gather(at: Int[Tensor, "fact read"] | None, hidden: Tensor) -> Tensor | None:
    if at is None:
        return None
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], at.to(hidden.device)]
