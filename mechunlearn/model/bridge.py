"""The bridge of transformer_lens to the same parameters: the only file that imports that library."""

import copy
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.component import Component
from mechunlearn.model.hook_points import hook_points_of
from mechunlearn.model.layout import Layout
from mechunlearn.model.taps import Hook, between


class Bridge:
    """The bridge of a model, made when it is first used, from a second module that shares the parameters.

    Booting rewrites the module it is given, and would rewrite the user's.
    """

    def __init__(
        self, hf: PreTrainedModel, layout: Layout, tokenizer: PreTrainedTokenizerBase | None, name: str
    ) -> None:
        """Copy the module, but not its parameters and buffers.

        Args:
            hf: The Hugging Face module.
            layout: The parts of its architecture.
            tokenizer: The tokenizer that the bridge will have.
            name: The name that the bridge will have.
        """
        self._hf, self._layout, self._tokenizer, self._name = hf, layout, tokenizer, name
        self._shared = list(hf.parameters())
        self._second = copy.deepcopy(hf, {id(t): t for t in (*self._shared, *hf.buffers())})
        self._bridge: Any = None
        self._on: dict[ExitStack, list[tuple[str, Callable[..., Any]]]] = {}
        self.copies: dict[Component, Any] = {}
        """The bridge's module of each site whose weights it keeps apart from the Hugging Face storage."""

    def booted(self) -> Any:
        """Return the `TransformerBridge`.

        Raises:
            MechunlearnError: The parameters of the Hugging Face module were replaced, or TransformerLens has no bridge
                that computes what this model computes.
        """
        if list(map(id, self._hf.parameters())) != list(map(id, self._shared)):
            raise MechunlearnError(
                "The parameters of the Hugging Face module were replaced since it was given to this model, for example "
                "by load_state_dict(assign=True), and the bridge cannot follow. Call load_model((model.hf, "
                "model.tokenizer))."
            )
        if self._bridge is None:
            with torch.random.fork_rng(devices=[]):  # new weights are drawn, and thrown away
                self._bridge = self._like_the_module()
            self.copies = _find_copies(self._bridge, self._layout.signature.layers, self._shared)
            for stack, hooks in self._on.items():
                stack.enter_context(self._bridge.hooks(fwd_hooks=hooks))
        return self._bridge

    @torch.no_grad()
    def _like_the_module(self) -> Any:
        """Boot the second module, and see that the bridge gives its logits."""
        tokens = torch.arange(4, device=next(self._second.parameters()).device)[None]
        expected = self._second(input_ids=tokens, use_cache=False).logits.float()
        try:
            bridge = _boot(self._second, self._tokenizer, self._name)
            difference = float((bridge(tokens).float() - expected).abs().max())
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).strip().split(". ")[0] + "."
        else:
            reason = f"Its logits differ from those of the model by {difference:.2g}."
            if difference <= 0.05 * float(expected.abs().max()):
                return bridge
        raise MechunlearnError(
            f"TransformerLens has no bridge to {self._layout.signature}: {reason} Nothing else needs it: hooks, caches, "
            "methods and export use the Hugging Face module. Use model.hooks and model.run_with_cache in its place."
        )

    @contextmanager
    def hooks(self, hooks: Iterable[tuple[str, Hook]]) -> Iterator[None]:
        """Within the block the hooks are on the bridge, also if it is made meanwhile.

        Args:
            hooks: Sites and hooks.
        """
        with ExitStack() as stack:
            self._on[stack] = _bridge_hooks(hooks, self._layout)
            stack.callback(self._on.pop, stack)
            if self._bridge is not None:
                stack.enter_context(self._bridge.hooks(fwd_hooks=self._on[stack]))
            yield

    @torch.no_grad()
    def refresh(self, site: Component, views: Iterable[Tensor]) -> None:
        """Bring the bridge's copy of a site up to date, if there is one.

        Args:
            site: The site.
            views: Its weights in the Hugging Face module.
        """
        if module := self.copies.get(site):
            for target, view in zip((module.weight, module.bias), views, strict=False):
                target.copy_(view.reshape(target.shape))


def _boot(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> Any:
    """The bridge of a module, which is rewritten by it. Parameters that this adds are frozen.

    Booting reads the tokenizer again from its path, or else from the hub, so it is given a placeholder. Of a model that
    also sees images it would read a processor, and run `pip install torchvision` where that fails: text needs neither.
    """
    from transformer_lens.model_bridge import TransformerBridge  # seconds to import

    own = {id(parameter) for parameter in hf.parameters()}
    cohere = hf.config.model_type == "cohere"
    if cohere:
        rotary: Any = hf.get_submodule("model.rotary_emb")
        rotary.register_forward_hook(_by_halves)
    hf.config = copy.copy(hf.config)
    hf.config.architectures = [type(hf).__name__]
    no_images = patch.object(AutoProcessor, "from_pretrained", return_value=None)
    with tempfile.TemporaryDirectory() as folder, no_images:
        bridge = TransformerBridge.boot_transformers(
            "local/" + (re.sub(r"[^\w.-]", "-", Path(name).name) or "model"),
            hf_model=hf,
            tokenizer=_placeholder_tokenizer(Path(folder)),
            device=str(next(hf.parameters()).device),
        )
    bridge.tokenizer = tokenizer
    for block in bridge.blocks if cohere else ():
        block.attn.config.rotary_adjacent_pairs = True
    for parameter in bridge.parameters():
        if id(parameter) not in own:  # such as the bias of the unembedding
            parameter.requires_grad_(False)
    return bridge


def _by_halves(module: nn.Module, args: object, out: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Cosines and sines of the rotary embedding, which Cohere gives pair by pair, in the order that the bridge reads."""
    del module, args
    return tuple(torch.cat([pairs[..., ::2], pairs[..., ::2]], -1) for pairs in out)


def _placeholder_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")),
        **dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<unk>"),
    )
    made.save_pretrained(folder)
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return loaded


def _bridge_hooks(hooks: Iterable[tuple[str, Hook]], layout: Layout) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks as the bridge takes them: names of hook points, and functions of two arguments."""
    points = hook_points_of(layout)
    found: list[tuple[str, Callable[..., Any]]] = []
    for site, hook in hooks:
        layer, kind = site[1:].split(".", 1)
        if kind == "resid_mid":  # the bridge gives it to the MLP alone, so a change is added to what attention writes
            entered: list[Tensor] = []
            change = partial(between, entered, hook)
            found += _bridge_hooks([(f"L{layer}.resid_pre", entered.append), (f"L{layer}.attn_out", change)], layout)
        else:
            heads = layout.signature.units(kind) if kind.startswith("attn.") else None
            found.append((f"blocks.{layer}.{points[kind][0]}", partial(_bridged, hook, heads)))
    return found


def _bridged(user_hook: Hook, heads: int | None, activation: Tensor, hook: object) -> Tensor | None:
    """A hook of the user's as the bridge calls it, seeing heads apart."""
    del hook
    shape = activation.shape
    changed = user_hook(activation if heads is None else activation.view(*shape[:2], heads, -1))
    return None if changed is None else changed.reshape(shape)


def _find_copies(bridge: Any, layers: int, parameters: Iterable[Tensor]) -> dict[Component, Any]:
    """The bridge's module of each site whose weights it keeps apart from the Hugging Face storage."""
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    copies: dict[Component, Any] = {}
    for layer in range(layers):
        for kind in ("attn.q", "attn.k", "attn.v", "mlp.in", "mlp.gate"):
            part, name = kind.split(".")
            module = getattr(getattr(bridge.blocks[layer], part), name, None)
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.untyped_storage().data_ptr() not in storages:
                copies[Component(layer, kind)] = module
    return copies
