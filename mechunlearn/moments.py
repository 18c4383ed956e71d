"""Statistics of a model over a stream of text: a fitter is fed batch by batch, its numbers are read, it is let go."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from rich.progress import track
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from mechunlearn.components import Component, load_tensors, save_tensors
from mechunlearn.errors import MechunlearnError
from mechunlearn.hooked import HookedModel
from mechunlearn.runcard import digest
from mechunlearn.solve import add_products, symmetric

CHUNK = 2**24  # entries of the weight gradients that are formed at a time
SAVE_EVERY = 30.0  # seconds between the saves of sums that are not finished


class DiagonalFisher:
    """How much the loss of each sequence depends on each weight of some linear layers: the empirical Fisher's diagonal.

    F[i, j] is the mean over sequences s of (d L_s / d W[i, j])^2, where L_s is the mean cross-entropy of the labelled
    tokens of s, in nats (LoKU, arXiv 2408.06621, the importance in FILA). Sequences are squared one by one: the square
    of a batch's mean gradient is another number. With `per="token"` each labelled token is a sample of its own. Labels
    drawn from the model instead of the text give the true Fisher. Biases, and a tied embedding's use as a table, are
    left out.

    Weight gradients are delta^T X of a layer's inputs X and output gradients delta, [pos in] and [pos out], so the
    model's parameters need no gradient and theirs is not touched. `update` costs one forward and one backward pass
    (`per="token"`: a backward pass for each labelled token of the row that has most), holds X and delta of all layers
    for the batch, and does pos * in * out operations a layer and sequence. `rows_only` keeps sums over each row of W
    alone, as diag(delta^T (X X^T) delta) without forming a weight gradient (after arXiv 1510.01799 and 2110.05679):
    pos^2 * (in + out) operations, less while pos is below in * out / (in + out), and 8 bytes a row in place of 8 a weight.

    Sums are float64, whatever the model's dtype. In float16 small gradients become zero: use bfloat16 or float32.

    Raises `MechunlearnError` if a name is not that of an `nn.Linear` or transformers `Conv1D`.

    >>> from mechunlearn.toy import planted_facts
    >>> toy = planted_facts()
    >>> prompts = toy.prompts([0, 1])
    >>> labels = torch.full_like(prompts.tokens, -1)
    >>> labels[:, -1] = prompts.answers[:, 0]
    >>> fisher = DiagonalFisher(toy.model.hf, ["model.layers.0.mlp.down_proj"]).update(prompts.tokens, labels)
    >>> neurons = fisher.elements("model.layers.0.mlp.down_proj").sum(0)
    >>> neurons.topk(2).indices.sort().values.tolist(), fisher.count
    ([0, 1], 2)
    """

    def __init__(
        self,
        hf: nn.Module,
        modules: Sequence[str],
        per: Literal["sequence", "token"] = "sequence",
        rows_only: bool = False,
    ) -> None:
        if per not in ("sequence", "token") or not modules:
            raise MechunlearnError(
                f"per='{per}' and {len(modules)} modules were given. Expected 'sequence' or 'token', and a module or more."
            )
        self.per, self.rows_only, self.count = per, rows_only, 0
        """`count` is the number of sequences, or tokens, seen so far."""
        self._hf = hf
        self._modules = {name: _linear(hf, name) for name in modules}
        self._sums = {
            name: torch.zeros(_shape(module)[: 1 if rows_only else 2], dtype=torch.float64, device=module.weight.device)
            for name, module in self._modules.items()
        }

    def update(self, tokens: Int[Tensor, "row pos"], labels: Int[Tensor, "row pos"]) -> "DiagonalFisher":
        """Add a batch: `labels[r, t]` is the token that the logits at position t should give, -1 where there is none.

        Padding is on the right, any token there, with labels of -1. A row without a label is not counted. If this
        raises, memory running out included, the batch may have been added in part: start anew.

        Raises `MechunlearnError` if the module is in training mode (dropout is noise in the Fisher), if shapes differ,
        or if a layer does not see its inputs as `[row pos in]`, as the experts of a mixture do not.
        """
        if self._hf.training or tokens.shape != labels.shape:
            raise MechunlearnError(
                f"Got tokens {tuple(tokens.shape)}, labels {tuple(labels.shape)} and a module in "
                f"{'training' if self._hf.training else 'evaluation'} mode. Expected equal shapes and evaluation mode: "
                "call eval() on the module, and give one label a position."
            )
        device = next(self._hf.parameters()).device
        with torch.enable_grad(), _watched(self._modules) as calls:
            logits = self._hf(input_ids=tokens.to(device), use_cache=False).logits
        labels = labels.to(logits.device)
        rows, positions = (labels >= 0).nonzero(as_tuple=True)
        if not len(rows):
            return self
        for name, seen in calls.items():
            _check_calls(name, [x for x, _ in seen], tokens.shape)
        outs = [out for seen in calls.values() for _, out in seen]
        with torch.enable_grad():
            parts = self._samples(logits[rows, positions], labels, rows, positions)
        del logits
        while parts:
            gradients = iter(torch.autograd.grad(parts.pop(), outs, retain_graph=bool(parts), materialize_grads=True))
            for name, seen in calls.items():
                x = torch.cat([x for x, _ in seen], 1)
                delta = torch.cat([next(gradients) for _ in seen], 1)
                (_add_rows if self.rows_only else _add_elements)(self._sums[name], x, delta)
        self.count += len(rows) if self.per == "token" else len(rows.unique())
        return self

    def elements(self, name: str) -> Float[Tensor, "out in"]:
        """The Fisher of each weight of a layer, always [out in], also where the module stores [in out] (`Conv1D`).

        Raises `MechunlearnError` if it was not asked for, or before the first label.
        """
        if self.rows_only:
            raise MechunlearnError("Only row sums were kept. Use row_sums, or make the Fisher with rows_only=False.")
        return self._mean(name)

    def row_sums(self, name: str) -> Float[Tensor, " out"]:
        """The Fisher of each output of a layer: the sum over its weights, with or without `rows_only`."""
        return self._mean(name) if self.rows_only else self._mean(name).sum(1)

    def _mean(self, name: str) -> Tensor:
        if name not in self._sums or not self.count:
            raise MechunlearnError(
                f"No Fisher of '{name}' after {self.count} {self.per}s. Expected one of {', '.join(self._sums)}, "
                "after an update with labels."
            )
        return self._sums[name] / self.count

    def _samples(self, logits: Tensor, labels: Tensor, rows: Tensor, positions: Tensor) -> list[Tensor]:
        """Scalars whose gradient in a row of the batch is that of one sample: the rows' losses, or their k-th tokens'."""
        chosen = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = cross_entropy(chosen, labels[rows, positions], reduction="none")
        labelled = labels >= 0
        if self.per == "sequence":
            return [(losses / labelled.sum(1)[rows]).sum()]
        order = labelled.cumsum(1)[rows, positions] - 1
        return [losses[order == k].sum() for k in range(int(order.max()) + 1)]


def _add_elements(total: Tensor, x: Float[Tensor, "row pos in"], delta: Float[Tensor, "row pos out"]) -> None:
    """Add the squares of the rows' weight gradients, a few rows at a time."""
    wide = torch.promote_types(x.dtype, torch.float32)
    size = max(1, CHUNK // total.numel())
    for inputs, outputs in zip(x.split(size), delta.split(size), strict=True):
        gradient = outputs.to(wide).mT @ inputs.to(wide)
        total += gradient.to(total.dtype).square_().sum(0)


def _add_rows(total: Tensor, x: Float[Tensor, "row pos in"], delta: Float[Tensor, "row pos out"]) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs, outputs = x.to(wide), delta.to(wide)
    products = outputs * ((inputs @ inputs.mT) @ outputs)
    total += products.sum(1, dtype=total.dtype).clamp_(min=0).sum(0)  # a square that rounds below zero is zero


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Within the block each call of a module is kept by name: its input, and its output as part of the graph."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(_keep, calls[name]), prepend=True).remove)
        yield calls


def _keep(calls: list[tuple[Tensor, Tensor]], module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    del module
    out = out if out.requires_grad else out.detach().requires_grad_()
    calls.append((args[0].detach(), out))
    return out


def _linear(hf: nn.Module, name: str) -> Any:
    """The linear module of this name."""
    named = dict(hf.named_modules())
    if isinstance(named.get(name), nn.Linear | Conv1D):
        return named[name]
    linear = [other for other, module in named.items() if isinstance(module, nn.Linear | Conv1D)]
    given = f"'{name}' is a {type(named[name]).__name__}" if name in named else f"There is no module '{name}'"
    near = get_close_matches(name, linear, n=3, cutoff=0) or ["(this module has none)"]
    raise MechunlearnError(f"{given}. Expected the name of an nn.Linear or Conv1D, such as {', '.join(near)}.")


def _shape(module: Any) -> tuple[int, int]:
    """Outputs and inputs."""
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)


def _check_calls(name: str, inputs: list[Tensor], shape: torch.Size) -> None:
    for x in inputs:
        if x.dim() != 3 or x.shape[:2] != shape:
            raise MechunlearnError(
                f"Module '{name}' saw inputs of shape {tuple(x.shape)}. Expected (row, pos, in) with {shape[0]} rows and "
                f"{shape[1]} positions, so that sequences can be told apart: leave this module out."
            )
    if not inputs:
        raise MechunlearnError(f"Module '{name}' was not called in the forward pass. Leave it out.")


class Covariance:
    """Which directions of MLP activations text uses, and how much: the uncentred second moment of what enters W_out.

    C = E[k k^T], [neuron neuron], over all tokens of a text, k being the activation at `L<layer>.mlp.out` (MEMIT, arXiv
    2210.07229, whose C_0 is lambda C; LAW, arXiv 2405.16720). tr(D C D^T) is the mean |D k|^2 by which a change D of
    W_out moves the MLP's output on that text: closed-form editors keep it small. One pass, which ends at the last of the
    sites, collects them all. `skip_first` leaves out position 0, whose activations are far larger in many models.

    Products of a few thousand tokens are formed in float32 (float64 if the model is), on and above the diagonal alone, and
    added in float64. Memory: d_mlp^2 float64 a site, and one batch; as much again for one site while it is written to a
    cache, and twice that while `matrix` makes it.

    Not for another model, nor for the same one after an edit: collect again. With fewer tokens than neurons C is
    singular, and it speaks for no text unlike the one it has seen.

    Raises `MechunlearnError` if a site is not `L<layer>.mlp.out` with a layer of the model.

    >>> from mechunlearn.toy import planted_facts
    >>> toy = planted_facts()
    >>> prompts = toy.prompts()
    >>> moment = Covariance(toy.model, ["L0.mlp.out"]).update(prompts.tokens, prompts.lengths)
    >>> moment.check(toy.model, ["L0.mlp.out"])
    >>> c = moment.matrix("L0.mlp.out")  # each neuron fires on a subject of its own
    >>> moment.count, torch.equal(c, c.diag().diag()), int((c.diag() > 0).sum())
    (72, True, 24)
    """

    def __init__(self, model: HookedModel, sites: Sequence[str], skip_first: bool = False) -> None:
        self.sites = tuple(sorted({_mlp_out(model, site) for site in sites}, key=Component.parse))
        if not self.sites:
            raise MechunlearnError("No site was given. Expected one or more, such as 'L0.mlp.out'.")
        self.fingerprint, self.skip_first, self.count = model.fingerprint, skip_first, 0
        """`fingerprint` is the model's, `count` the number of tokens seen so far."""
        self._model = model
        units = model.signature.d_mlp
        self._sums = {site: torch.zeros(units, units, dtype=torch.float64, device=model.device) for site in self.sites}

    def update(self, tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"]) -> "Covariance":
        """Add a batch of right-padded rows, of which the first `lengths` tokens count. If this raises, start anew.

        Raises `MechunlearnError` if the model's weights have changed since the start, if it is in training mode, or if
        activations are not finite.
        """
        self.count += self._add(tokens, lengths, self.sites)
        return self

    def matrix(self, site: str) -> Float[Tensor, "unit other"]:
        """The mean of k k^T at a site, exactly symmetric, in float64 on the model's device.

        Raises `MechunlearnError` if the site was not asked for, or before the first token.
        """
        if site not in self._sums or not self.count:
            raise MechunlearnError(
                f"No second moment of '{site}' after {self.count} tokens. Expected one of {', '.join(self.sites)}, "
                "after an update."
            )
        return symmetric(self._sums[site] / self.count)

    def check(self, model: HookedModel, sites: Iterable[str]) -> None:
        """Raises `MechunlearnError` unless these are invertible statistics of this model at these sites."""
        if model.fingerprint != self.fingerprint:
            raise MechunlearnError(
                f"The second moments are of the model {self.fingerprint}, the given one is {model.fingerprint}. "
                "Collect them again on the model that is edited."
            )
        for site in sites:
            if site not in self._sums:
                raise MechunlearnError(f"No second moment of '{site}'. Expected one of {', '.join(self.sites)}.")
            needed = len(self._sums[site])
            if self.count < needed:
                raise MechunlearnError(
                    f"The second moment of '{site}' is singular: {self.count} tokens were seen. Expected at least "
                    f"{needed}, as many as it has neurons: give more text."
                )

    @classmethod
    def of_text(
        cls,
        model: HookedModel,
        sites: Sequence[str],
        texts: Sequence[str],
        *,
        skip_first: bool = False,
        batch: int = 32,
        cache: str | Path | None = None,
        progress: bool = False,
    ) -> "Covariance":
        """Collect over texts, shortest first so that little is padding, `batch` texts at a time.

        In the folder `cache` each site has a file, named by the model's fingerprint, the texts' tokens and the site.
        Sites found there are read, the others collected in one pass. Unfinished sums are kept every `SAVE_EVERY`
        seconds, so that a killed run goes on to the same bits if called again. Do not cache under hooks that change
        activations: the name knows the weights alone.

        Raises `MechunlearnError` if the model has no tokenizer, there are no tokens, a text is longer than the model's
        context, or a cached file is damaged, is not what its name says, or cannot be written.
        """
        made = cls(model, sites, skip_first)
        rows = sorted(_tokenized(model, texts), key=len)
        made.count = sum(len(row) - skip_first for row in rows)
        if made.count < 1 or batch < 1:
            raise MechunlearnError(
                f"{len(texts)} texts have {made.count} tokens to count, and batch={batch}. Expected one or more of each."
            )
        batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        text = digest(str(skip_first), *map(str, rows))
        about = {"model": made.fingerprint, "text": text, "tokens": str(made.count)}
        files = None if cache is None else _Files(Path(cache), about, batch, len(batches))
        done = {site: 0 if files is None else files.read(site, sums) for site, sums in made._sums.items()}
        saved = time.monotonic()
        steps = range(min(done.values()), len(batches))
        for step in track(steps, "collecting second moments", disable=not progress, transient=True):
            waiting = [site for site in made.sites if done[site] <= step]
            ids = [torch.tensor(row) for row in batches[step]]
            made._add(pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in ids]), waiting)
            if files is not None and time.monotonic() - saved > SAVE_EVERY:
                for site in waiting:
                    files.write(site, made._sums[site], step + 1)
                saved = time.monotonic()
        if files is not None:
            for site, sums in made._sums.items():
                files.write(site, sums, len(batches))
        return made

    def _add(self, tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"], sites: Sequence[str]) -> int:
        """Add a batch to the sums of some sites, and say how many tokens counted."""
        if self._model.hf.training or self._model.fingerprint != self.fingerprint:
            raise MechunlearnError(
                f"The model has the fingerprint {self._model.fingerprint} and is in "
                f"{'training' if self._model.hf.training else 'evaluation'} mode. Expected evaluation mode and the "
                f"weights it had at the start ({self.fingerprint}): undo the edit, call hf.eval(), or start anew."
            )
        at = torch.arange(tokens.shape[1])
        counted = (at < lengths.cpu()[:, None]) & (at >= int(self.skip_first))

        def add(site: str, activation: Tensor) -> None:
            total = self._sums[site]
            add_products(total, activation[counted.to(activation.device)].to(total.device))
            if not total.diagonal().isfinite().all():
                raise MechunlearnError(
                    f"Activations at '{site}' are not finite in {activation.dtype}. Load the model with "
                    "dtype='float32' or 'bfloat16', or check its weights."
                )

        self._model.decoder.observe(tokens, {site: partial(add, site) for site in sites})
        return int(counted.sum())


@dataclass(frozen=True)
class _Files:
    """A file of sums a site: a whole one, and before that a partial one of the batches done so far."""

    folder: Path
    about: dict[str, str]
    batch: int
    batches: int

    def path(self, site: str, whole: bool) -> Path:
        return self.folder / f"{'-'.join(self.about.values())}-{site}{'' if whole else '.partial'}.safetensors"

    def read(self, site: str, sums: Float[Tensor, "unit other"]) -> int:
        """Fill in the sums of a site as far as they are on disk, and say how many batches that is."""
        whole = self.path(site, whole=True).exists()
        path = self.path(site, whole)
        if not path.exists():
            return 0
        try:
            tensors, found = load_tensors(path, "covariance")
        except MechunlearnError as error:
            raise MechunlearnError(f"{error} Delete it, and it is collected again.") from None
        known = self.about | {"site": site} | ({} if whole else {"batch": str(self.batch)})
        wrong = [
            f"{key} {found.get(key)} (expected {value})" for key, value in known.items() if found.get(key) != value
        ]
        if wrong or tensors["sums"].shape != sums.shape:
            wrong = wrong or [f"shape {tuple(tensors['sums'].shape)} (expected {tuple(sums.shape)})"]
            raise MechunlearnError(f"'{path}' has {', '.join(wrong)}. Delete it, and it is collected again.")
        sums.copy_(tensors["sums"])
        return self.batches if whole else int(found["done"])

    def write(self, site: str, sums: Float[Tensor, "unit other"], done: int) -> None:
        """Write the sums of so many batches; all of them take the place of the partial file."""
        whole = done == self.batches
        path = self.path(site, whole)
        about = {"kind": "covariance", "site": site, **self.about, "batch": str(self.batch), "done": str(done)}
        try:
            if not (whole and path.exists()):
                save_tensors(path, {"sums": sums}, about)
        except SafetensorError as error:
            raise MechunlearnError(f"Could not write '{path}': {error}. Nothing was left half-written.") from None
        if whole:
            self.path(site, whole=False).unlink(missing_ok=True)


def _tokenized(model: HookedModel, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the texts that have any."""
    if model.tokenizer is None:
        raise MechunlearnError("The model has no tokenizer. Load it with one, or give tokens to `update`.")
    rows = [ids for ids in model.tokenizer(list(texts))["input_ids"] if ids] if texts else []
    context, longest = getattr(model.hf.config, "max_position_embeddings", None), max(map(len, rows), default=0)
    if context is not None and longest > context:
        raise MechunlearnError(
            f"The longest text has {longest} tokens, the model's context is {context}. Expected texts that fit: cut them."
        )
    return rows


def _mlp_out(model: HookedModel, site: str) -> str:
    """The site, if what enters W_out of a layer of the model has this name."""
    address = Component.parse(site)
    if address.kind != "mlp.out" or address.unit is not None or address.layer >= model.signature.layers:
        raise MechunlearnError(
            f"'{site}' is not what enters a W_out of {model.signature}. Expected L<layer>.mlp.out with a layer below "
            f"{model.signature.layers} and no [unit]."
        )
    return address.site
