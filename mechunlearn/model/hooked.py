"""The hooked model: all that methods know of a model, implemented once over TransformerBridge.

The Hugging Face module is the truth, stays an ordinary module, and is what runs. The bridge is made when it is first asked
for, from a second module that shares the same parameters, because booting rewrites the module it is given; hooks act on both. Fused
matrices that the bridge keeps as copies (GPT-NeoX) are brought up to date by `write_` and `refresh_`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from mechunlearn.core.files import data_folder, whole_folder
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.bridge import boot, bridged, find_copies, freeze_additions
from mechunlearn.model.component import Component
from mechunlearn.model.decoder import UNITS, Decoder, Hook, between
from mechunlearn.model.hook_points import HOOK_POINTS
from mechunlearn.model.layout import Layout, Signature, flat

SHIPPED = ("factworld", "factworld-twin", "factworld-naive")


class HookedModel:
    """A Hugging Face decoder with hooks: the model as all methods see it. Make one with `load_model`.

    Sites are `L<layer>.<kind>` with a kind of `attn.o` (`[fact pos head d_head]`, what W_O reads), `attn.q`, `attn.k`, `attn.v` (what
    these projections give), `mlp.out` (`[fact pos neuron]`, what W_out reads), `resid_pre`, `resid_mid`, `resid_post`, `attn_out`,
    `mlp_out` (what is added to the residual stream) or `mlp_in` (what the MLP reads, normalised).

    Tokens are padded on the right: with causal attention no real position sees the padding, so a padded batch gives the same
    numbers as single prompts.
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str = "model") -> None:
        self.layout = Layout.of(hf.config)
        self.name = name
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self._parameters = dict(hf.named_parameters())
        shared = {id(t): t for t in (*hf.parameters(), *hf.buffers())}
        self._second = copy.deepcopy(hf, shared)
        self._within: dict[ExitStack, Mapping[str, Hook]] = {}
        self._copies: dict[Component, Any] = {}
        self._hashed: tuple[tuple, str] | None = None

    @cached_property
    def bridge(self) -> Any:
        """The same parameters as a `TransformerBridge` of transformer_lens, under the hooks that are on now. No method here needs it."""
        with torch.random.fork_rng(devices=[]):  # new weights are drawn, and thrown away
            bridge = boot(self._second, self.tokenizer, self.name)
        freeze_additions(bridge, self._parameters)
        self._copies = find_copies(bridge, self.signature.layers, self._parameters)
        for stack, hooks in self._within.items():
            stack.enter_context(bridge.hooks(fwd_hooks=self._on_bridge(hooks)))
        return bridge

    @property
    def signature(self) -> Signature:
        return self.layout.signature

    @property
    def device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self._parameters.values())).dtype

    @property
    def fingerprint(self) -> str:
        """A hash of every weight as it is now, computed again once torch has counted a write to one of them."""
        writes = tuple((parameter.data_ptr(), parameter._version) for parameter in self._parameters.values())
        if self._hashed is None or self._hashed[0] != writes:
            parts = (
                part
                for name, parameter in self._parameters.items()
                for part in (name, parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            )
            self._hashed = (writes, digest(str(self.signature), *parts))
        return self._hashed[1]

    def forward(self, tokens: Int[Tensor, "fact pos"]) -> Float[Tensor, "fact pos d_vocab"]:
        """Logits, through the hooks."""
        return self.hf(input_ids=tokens.to(self.device), use_cache=False).logits

    __call__ = forward

    def cache(
        self, tokens: Int[Tensor, "fact pos"], sites: Sequence[str], grad: bool = False
    ) -> tuple[Float[Tensor, "fact pos d_vocab"], dict[str, Tensor]]:
        """Logits and activations at sites. With `grad` both are part of one graph, for `torch.autograd.grad`."""
        kept: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            if grad:
                stack.enter_context(frozen(self.hf))
            stack.enter_context(self.decoder.hooks({site: partial(_kept, kept, site, grad) for site in sites}))
            logits = self.forward(tokens)
        return logits, kept

    @contextmanager
    def hooks(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        """Within the block each hook sees the activation at its site; what it returns takes its place.

        The hooks act on the Hugging Face module (and so on every method) and on the bridge alike.
        Raises `MechunlearnError` for a site this model does not have.
        """
        with self.decoder.hooks(hooks), ExitStack() as on_bridge:
            self._within[on_bridge] = hooks
            on_bridge.callback(self._within.pop, on_bridge)
            if "bridge" in vars(self):
                on_bridge.enter_context(self.bridge.hooks(fwd_hooks=self._on_bridge(hooks)))
            yield

    def _on_bridge(self, hooks: Mapping[str, Hook]) -> list[tuple[str, Callable]]:
        entries: list[tuple[str, Callable]] = []
        for site, hook in hooks.items():
            layer, kind = site[1:].split(".", 1)
            if kind == "resid_mid":
                # the bridge gives it to the MLP alone, so a change is added to what attention writes
                entered: list[Tensor] = []
                change = partial(between, entered, hook)
                entries += self._on_bridge({f"L{layer}.resid_pre": entered.append, f"L{layer}.attn_out": change})
            elif kind in HOOK_POINTS:
                heads = self.signature.heads if kind == "attn.o" else None
                canonical, alias = HOOK_POINTS[kind]
                point = (
                    canonical if kind in UNITS else alias
                )  # behind a norm after the sublayer, only the alias is the sum
                entries.append((f"blocks.{layer}.{point}", partial(bridged, hook, heads)))
        return entries

    @cached_property
    def decoder(self) -> Decoder:
        """The Hugging Face module as a residual stream: what exact patching and edge attribution are built on."""
        return Decoder(self.hf, self.layout)

    def run_from(
        self, layer: int, resid: Float[Tensor, "fact pos d_model"], positions: Int[Tensor, " fact"] | None = None
    ) -> Tensor:
        """Logits when `resid` enters block `layer`: `[fact pos d_vocab]`, or `[fact d_vocab]` at one position a fact.

        Earlier blocks are skipped, and other positions are not unembedded; masks, rotary embeddings and everything
        after are the model's own code. Equal to a full forward to 1e-6.
        """
        restart = self.decoder.restart(0, resid.shape[1])
        for later in range(layer, self.signature.layers):
            resid = restart.block(later, resid)
        if positions is not None:
            resid = resid[torch.arange(len(resid)), positions]
        return self.decoder.unembed(resid)

    def attention(self, tokens: Int[Tensor, "fact pos"], layer: int) -> Float[Tensor, "fact head pos pos"]:
        """Attention patterns of one layer: how much each position (third axis) takes from each before it (fourth)."""
        self.decoder.place(f"L{layer}.attn.o")
        return self.decoder.attention(tokens, layer)

    def unit_weights(self, kind: str) -> int:
        """How many weights one unit of a kind has, its bias included."""
        return sum(view[0].numel() for view in self.layout.views(self._parameters, 0, kind))

    def rows(self, site: str) -> Float[Tensor, "unit weight"]:
        """A copy of the weights at a site, one row a unit (its bias last)."""
        return flat(self._views(site))

    @torch.no_grad()
    def write_(self, site: str, rows: Float[Tensor, "unit weight"], units: Int[Tensor, " unit"] | None = None) -> None:
        """Set the weights of some units (all, unless given), in the Hugging Face module and in the bridge."""
        start = 0
        for view in self._views(site):
            chosen = view if units is None else view[units.to(view.device)]
            width = view[0].numel()
            new = rows[:, start : start + width].to(view).view(chosen.shape)
            if units is None:
                view.copy_(new)
            else:
                view[units.to(view.device)] = new
            start += width
        self._refresh(Component.parse(site))

    def refresh_(self) -> None:
        """Bring the bridge's copies up to date after the Hugging Face parameters were changed directly."""
        for site in self._copies:
            self._refresh(site)

    def _views(self, site: str) -> list[Tensor]:
        address = Component.parse(site)
        if address.layer >= self.signature.layers:
            raise MechunlearnError(f"No site '{site}': the model has {self.signature.layers} layers.")
        return self.layout.views(self._parameters, address.layer, address.kind)

    @torch.no_grad()
    def _refresh(self, site: Component) -> None:
        module = self._copies.get(site)
        if module is None:
            return
        for target, view in zip((module.weight, module.bias), self._views(str(site)), strict=False):
            target.copy_(view.reshape(target.shape))

    def __repr__(self) -> str:
        return f"HookedModel({self.name}, {self.signature}, {self.dtype}, {self.device})"


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module takes part in a graph within the block."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _kept(into: dict[str, Tensor], site: str, grad: bool, activation: Tensor) -> Tensor | None:
    if not grad:
        into[site] = activation.detach()
        return None
    into[site] = activation if activation.requires_grad else activation.detach().requires_grad_()
    return into[site]


def load_model(
    source: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase | None],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> HookedModel:
    """Load a model with hooks: a shipped world (`factworld`, `factworld-twin`,
    `factworld-naive`), a directory, a hub name, or objects.

    `dtype` is a torch dtype or its name; without it the stored one is kept. No weight is ever folded or centred.
    Raises `MechunlearnError` if there is no such model, its architecture has no layout, or the dtype is unknown.

    >>> model = load_model("factworld")
    >>> model.signature.family, model.signature.layers
    ('qwen2', 8)
    """
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(wanted, torch.dtype):
        raise MechunlearnError(f"Unknown dtype '{dtype}'. Expected float32, bfloat16 or float16.")
    if isinstance(source, tuple):
        given: nn.Module = source[0]
        given.to(device=device, dtype=wanted)
        return HookedModel(source[0], source[1], source[0].name_or_path or "model")
    folder = _folder(str(source))
    try:
        with _no_bar() if source in SHIPPED else nullcontext():
            hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted or "auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        where = "in this folder" if Path(folder).is_dir() else "as a folder, a shipped model or a hub name"
        raise MechunlearnError(
            f"Could not load a model from '{source}': {reason} Looked {where}. Expected one of "
            f"{', '.join(SHIPPED)}, a folder written by save_pretrained (with its tokenizer), or a reachable hub name."
        ) from None
    module: nn.Module = hf
    module.to(device or "cpu")
    return HookedModel(hf, tokenizer, str(source))


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the progress bar of transformers: a shipped model is there at once."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def export(model: HookedModel, folder: str | Path, beside_it: Mapping[str, str] | None = None) -> None:
    """Write an ordinary Hugging Face checkpoint, its tokenizer and more text files; the folder must be new or empty."""
    with whole_folder(folder) as beside:
        model.hf.save_pretrained(beside)
        for name, text in (beside_it or {}).items():
            (beside / name).write_text(text + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(beside)


def _folder(source: str) -> str:
    if source in SHIPPED:
        return str(data_folder() / source)
    path = Path(source).expanduser()
    if path.is_dir():
        if not list(path.glob("*.safetensors")) and not list(path.glob("pytorch_model*.bin")):
            raise MechunlearnError(
                f"The folder '{source}' holds no weights. Expected model.safetensors beside config.json, "
                "as save_pretrained writes them."
            )
        return str(path)
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise MechunlearnError(
            f"There is no folder '{source}'. Expected a model folder, or one of {', '.join(SHIPPED)}."
        )
    return source
