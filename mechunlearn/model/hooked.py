"""The hooked model: all that methods know of a model.

The Hugging Face module is the truth, stays an ordinary module, and is what runs. Hooks act on it and on the bridge of
TransformerLens alike. Fused matrices that the bridge keeps as copies (GPT-NeoX) are updated by `write_` and `refresh_`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechunlearn.core.files import whole_folder
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.bridge import Bridge
from mechunlearn.model.component import Component
from mechunlearn.model.decoder import Decoder
from mechunlearn.model.fingerprint import checksum, fingerprint
from mechunlearn.model.hook_points import ActivationCache
from mechunlearn.model.layout import Layout, Signature, flat
from mechunlearn.model.load import checkpoint
from mechunlearn.model.table_check import check_registered
from mechunlearn.model.taps import Hook
from mechunlearn.model.text import Begun, Given, continued, decoded, ids_of, padded, padding_token
from mechunlearn.model.unwrap import DTYPES, evaluating, unwrapped


class HookedModel:
    """A Hugging Face decoder with hooks: the model as all methods see it. Make one with `load_model`.

    Sites are `L<layer>.<kind>` with a kind of `attn.o` (`[fact pos head d_head]`, what W_O reads), `attn.q`, `attn.k`,
    `attn.v` (what these projections give), `mlp.out` (`[fact pos neuron]`, what W_out reads), `resid_pre`, `resid_mid`,
    `resid_post`, `attn_out`, `mlp_out` (what is added to the residual stream), `mlp_in` (what the MLP reads,
    normalised) or `attn_projected` (what W_O gives, before any norm). A hook name of TransformerLens stands for its
    site: `blocks.3.hook_resid_post` is `L3.resid_post`.

    A text or a list of texts may be given instead of tokens. Rows are padded on the right: with causal attention no
    real position sees the padding, so a padded batch gives the same numbers as single prompts.

    Attributes:
        hf: The Hugging Face module.
        tokenizer: Its tokenizer, if there is one.
        name: What the model was loaded from.
        layout: The parts of its architecture.

    >>> model = load_model("factworld")
    >>> logits, cache = model.run_with_cache("The capital of")
    >>> torch.equal(cache["L3.resid_post"], cache["blocks.3.hook_resid_post"])
    True
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str = "model") -> None:
        """Put hooks around a module, which is set to evaluation and stays an ordinary module.

        Args:
            hf: A Hugging Face decoder.
            tokenizer: Its tokenizer; without one, the model reads tokens only.
            name: What the model is called.

        Raises:
            MechunlearnError: The architecture has no layout, or a table that does not fit.
        """
        self.layout = Layout.of(hf.config)
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.hf.train(False)
        self._bridge = Bridge(hf, self.layout, tokenizer, name)
        self._fingerprints: dict[int, str] = {}
        check_registered(self.decoder)

    def __getstate__(self) -> dict[str, Any]:
        """Without the bridge, whose parameters would become others than the module's: it is made again where it is asked for."""
        return self.__dict__ | {"_bridge": Bridge(self.hf, self.layout, self.tokenizer, self.name)}

    @property
    def bridge(self) -> Any:
        """The same parameters as a `TransformerBridge` of transformer_lens, under the hooks that are on now.

        Raises:
            MechunlearnError: The parameters of the Hugging Face module were replaced, so the bridge would have others.
        """
        return self._bridge.booted()

    @property
    def signature(self) -> Signature:
        """The architecture: family, layers, heads and widths."""
        return self.layout.signature

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.hf.parameters()).dtype

    @property
    def fingerprint(self) -> str:
        """A hash of the architecture and of every weight as it is now, however it was written.

        The weights are read each time (`model.fingerprint.checksum`), and hashed once for each state they have been in.
        """
        weights = dict(self.hf.named_parameters())
        state = checksum(weights)
        if state not in self._fingerprints:
            self._fingerprints[state] = fingerprint(self.signature, weights)
        return self._fingerprints[state]

    def forward(self, tokens: Given) -> Float[Tensor, "fact pos d_vocab"]:
        """Return logits, through the hooks. `model(tokens)` is the same.

        Args:
            tokens: Tokens, a text or several texts.
        """
        ids = tokens.to(self.device) if isinstance(tokens, Tensor) else self.to_tokens(tokens)
        with evaluating(self.hf):
            logits: Tensor = self.hf(input_ids=ids, use_cache=False).logits
        return logits

    __call__ = forward

    def cache(
        self, tokens: Given, sites: Sequence[str], grad: bool = False
    ) -> tuple[Float[Tensor, "fact pos d_vocab"], ActivationCache]:
        """Return logits, and activations by site.

        Args:
            tokens: Tokens, a text or several texts.
            sites: Sites or hook names of TransformerLens.
            grad: Make both part of one graph, for `torch.autograd.grad`.

        Raises:
            MechunlearnError: The model does not have such a site.
        """
        kept = ActivationCache(self.decoder.site)
        hooks = {site: partial(_kept, kept, self.decoder.site(site), grad) for site in sites}
        with torch.set_grad_enabled(grad), frozen(self.hf) if grad else nullcontext(), self.decoder.hooks(hooks):
            logits = self.forward(tokens)
        return logits, kept

    def run_with_cache(
        self, tokens: Given, names: str | Sequence[str] | None = None
    ) -> tuple[Float[Tensor, "fact pos d_vocab"], ActivationCache]:
        """Return logits, and activations that are found by site and by hook name of TransformerLens; without gradients.

        Args:
            tokens: Tokens, a text or several texts.
            names: Sites or hook names; all sites unless given.

        Raises:
            MechunlearnError: The model does not have such a site.
        """
        sites = self.decoder.sites if names is None else [names] if isinstance(names, str) else names
        return self.cache(tokens, sites)

    def generate(self, text: Begun, max_new_tokens: int = 10, **settings: Any) -> Any:
        """Continue texts with `hf.generate`, by the most likely token unless the settings say otherwise.

        Hooks are on. After the first step they see new positions only; with `use_cache=False` all positions each time.

        Args:
            text: A text, several texts, or tokens (rows without padding, as a tensor or as lists).
            max_new_tokens: The number of tokens to add, unless a text ends before.
            settings: Keywords of `hf.generate`, such as `do_sample=True`.

        Returns:
            The text with its continuation, a list of such texts, or tokens: as given. With `return_dict_in_generate`
            what `hf.generate` returns.

        >>> load_model("factworld").generate("The capital of", max_new_tokens=1).startswith("The capital of ")
        True
        """
        with evaluating(self.hf):
            return continued(self.hf, self.tokenizer, text, {"max_new_tokens": max_new_tokens} | settings)

    def to_tokens(self, text: str | Sequence[str]) -> Int[Tensor, "text pos"]:
        """Tokenize as the model's tokenizer does, its special tokens included.

        Args:
            text: One text or several; shorter ones are padded on the right.

        Raises:
            MechunlearnError: The model has no tokenizer, or a text has no tokens.
        """
        return padded(ids_of(text, self.tokenizer), padding_token(self.tokenizer)).to(self.device)

    def to_str_tokens(self, text: str | Sequence[str] | Int[Tensor, "..."]) -> list[Any]:
        """Return the text of each token.

        Args:
            text: A text, several texts, or tokens `[pos]` or `[text pos]`.

        Returns:
            A list of strings; a list of such lists if several texts or rows are given.

        >>> load_model("factworld").to_str_tokens("A company")
        ['<|bos|>', 'A', ' company']
        """
        rows = text.reshape(-1, text.shape[-1]).tolist() if isinstance(text, Tensor) else ids_of(text, self.tokenizer)
        found = [decoded([[token] for token in row], self.tokenizer) for row in rows]
        single = len(found) == 1 if isinstance(text, Tensor) else isinstance(text, str)
        return found[0] if single else found

    def to_string(self, tokens: Int[Tensor, "..."]) -> str | list[str]:
        """Return the text of tokens.

        Args:
            tokens: `[pos]`, or `[text pos]` for a list of texts.

        >>> model = load_model("factworld")
        >>> model.to_string(model.to_tokens("The capital")[0, 1:])
        'The capital'
        """
        texts = decoded(tokens.reshape(-1, tokens.shape[-1]), self.tokenizer)
        return texts[0] if tokens.ndim == 1 else texts

    @contextmanager
    def hooks(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        """Within the block each hook sees the activation at its site; what it returns takes its place.

        The hooks act on the Hugging Face module (and so on every method) and on the bridge alike.

        Args:
            hooks: Functions of one tensor, by site or hook name of TransformerLens.

        Raises:
            MechunlearnError: The model does not have such a site.
        """
        sites = [(self.decoder.site(name), hook) for name, hook in hooks.items()]
        with self.decoder.hooks(hooks), self._bridge.hooks(sites):
            yield

    @cached_property
    def decoder(self) -> Decoder:
        """The Hugging Face module as a residual stream: what exact patching and edge attribution are built on."""
        return Decoder(self.hf, self.layout)

    def run_from(
        self, layer: int, resid: Float[Tensor, "fact pos d_model"], positions: Int[Tensor, " fact"] | None = None
    ) -> Tensor:
        """Return logits when `resid` enters a block. Earlier blocks are skipped; equal to a full forward pass to 1e-6.

        Args:
            layer: The block.
            resid: What enters it.
            positions: One position a fact; other positions are not unembedded.

        Returns:
            `[fact pos d_vocab]`, or `[fact d_vocab]` at the positions.
        """
        restart = self.decoder.restart(0, resid.shape[1])
        for later in range(layer, self.signature.layers):
            resid = restart.block(later, resid)
        if positions is not None:
            resid = resid[torch.arange(len(resid)), positions]
        return self.decoder.unembed(resid)

    def attention(self, tokens: Int[Tensor, "fact pos"], layer: int) -> Float[Tensor, "fact head pos pos"]:
        """Return the attention pattern of a layer.

        How much each position (third axis) takes from each before it (fourth).

        Args:
            tokens: What the model reads.
            layer: The layer.
        """
        self.decoder.place(f"L{layer}.attn.o")
        return self.decoder.attention(tokens, layer)

    def unit_weights(self, kind: str) -> int:
        """Count the weights of one unit of a kind, its bias included.

        Args:
            kind: The kind of a site, such as `attn.o`.
        """
        return sum(view[0].numel() for view in self._views(Component(0, kind)))

    def rows(self, site: str) -> Float[Tensor, "unit weight"]:
        """Return a copy of the weights at a site, one row a unit, its bias last.

        Args:
            site: A site that has weights; `blocks.3.attn.hook_z` stands for `L3.attn.o`.

        Raises:
            MechunlearnError: The model has no weights there.
        """
        return flat(self._views(Component.parse(site)))

    @torch.no_grad()
    def write_(self, site: str, rows: Float[Tensor, "unit weight"], units: Int[Tensor, " unit"] | None = None) -> None:
        """Set the weights of some units, in the Hugging Face module and in the bridge.

        Args:
            site: A site that has weights.
            rows: The new weights, one row a unit, as `rows` returns them.
            units: The units that are written; all unless given.

        Raises:
            MechunlearnError: The model has no weights there.
        """
        address, start = Component.parse(site), 0
        for view in self._views(address):
            chosen = view if units is None else view[units.to(view.device)]
            width = view[0].numel()
            new = rows[:, start : start + width].to(view).view(chosen.shape)
            if units is None:
                view.copy_(new)
            else:
                view[units.to(view.device)] = new
            start += width
        self._bridge.refresh(address, self._views(address))

    def refresh_(self) -> None:
        """Bring the bridge's copies up to date after the Hugging Face parameters were changed directly."""
        for site in self._bridge.copies:
            self._bridge.refresh(site, self._views(site))

    def _views(self, site: Component) -> list[Tensor]:
        if site.layer >= self.signature.layers:
            raise MechunlearnError(f"No site '{site}': the model has {self.signature.layers} layers.")
        named = {name: attrgetter(name)(self.hf) for name in self.layout.parameter_names(site.layer, site.kind)}
        return self.layout.views(named, site.layer, site.kind)

    def __repr__(self) -> str:
        return f"HookedModel({self.name}, {self.signature}, {self.dtype}, {self.device})"


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block no parameter of a module is part of a graph.

    Args:
        module: The module.
    """
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


@steady()
def load_model(
    source: str | Path | nn.Module | tuple[nn.Module, PreTrainedTokenizerBase | None],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> HookedModel:
    """Load a model with hooks. No weight is ever folded or centred.

    A Hugging Face model of yours is used as it is, without a copy: it is set to evaluation mode, and moved to `device`
    and `dtype` if they are given. `torch.compile` and `DataParallel` around it are taken off.

    Args:
        source: A real language model that comes as a package (`smollm2`, `gemma3`), a shipped world (`factworld`,
            `factworld-twin`, `factworld-naive`), a folder, a GGUF file, a hub name, or a Hugging Face model, alone or
            with its tokenizer. A GGUF file is converted to float32 once, and kept in the user's cache folder.
        tokenizer: The model's tokenizer; by default the one beside its weights.
        device: Where it runs; the processor unless given.
        dtype: A torch dtype or its name; the stored one unless given.

    Raises:
        MechunlearnError: There is no such model, its package is not installed, its architecture has no layout, it is
            wrapped in a way that hooks or edits would miss (adapters, quantization), or the dtype is unknown, or the
            device is not there.

    >>> model = load_model("factworld")
    >>> model.signature.family, model.signature.layers
    ('qwen2', 8)
    >>> load_model(model.hf, tokenizer=model.tokenizer).fingerprint == model.fingerprint
    True
    """
    wanted: Any = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted not in DTYPES:
        raise MechunlearnError(f"Unknown dtype '{dtype}'. Expected float32, bfloat16, float16 or float64.")
    _check_device(device)
    if isinstance(source, str | Path):
        hf, tokenizer = checkpoint(str(source), wanted, tokenizer)
        name, device = str(source), device or "cpu"
    else:
        given, own = source if isinstance(source, tuple) else (source, None)
        hf, tokenizer = unwrapped(given), own if tokenizer is None else tokenizer
        name = hf.name_or_path or "model"
        # not the buffers: rotary frequencies stay in float32, as from_pretrained has them
        for weight in hf.parameters():
            weight.data = weight.data.to(dtype=wanted)
    module: nn.Module = hf
    module.to(device=device)
    return HookedModel(hf, tokenizer, name)


def _check_device(device: str | torch.device | None) -> None:
    """Raise an error if no weights can be put on a device."""
    try:
        if device is not None and torch.empty(1, device=device).is_meta:
            raise MechunlearnError("The device 'meta' holds no numbers. Expected cpu, cuda or mps.")
    except (RuntimeError, AssertionError, TypeError):
        raise MechunlearnError(
            f"Device '{device}' is not available on this machine. Expected cpu, or cuda, cuda:1 or mps where there is one."
        ) from None


def export(model: HookedModel, folder: str | Path, beside_it: Mapping[str, str] | None = None) -> None:
    """Write an ordinary Hugging Face checkpoint with its tokenizer.

    Args:
        model: What is written.
        folder: Where; it must be new or empty.
        beside_it: Texts of further files, by name.

    Raises:
        MechunlearnError: The folder is not empty, or cannot be written.
    """
    with whole_folder(folder) as beside:
        model.hf.save_pretrained(beside)
        for name, text in (beside_it or {}).items():
            (beside / name).write_text(text + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(beside)
