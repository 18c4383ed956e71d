"""Statistics of a model over a stream of text: a fitter is fed batch by batch, its numbers are read, it is let go."""

import time
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechunlearn.core import tensors
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.solve import add_products, symmetric

SAVE_EVERY = 30.0  # seconds between the saves of sums that are not finished


class Covariance:
    """Which directions of MLP activations text uses, and how much: the uncentred second moment of what enters W_out.

    C = E[k k^T], [neuron neuron], over all tokens of a text, k being the activation at `L<layer>.mlp.out` (MEMIT, arXiv
    2210.07229, whose C_0 is lambda C; LAW, arXiv 2405.16720). tr(D C D^T) is the mean |D k|^2 by which a change D of
    W_out moves the MLP's output on that text: closed-form editors keep it small. One pass, which ends at the last of
    the sites, collects them all.

    Products of a few thousand tokens are formed in float32 (float64 if the model is), on and above the diagonal alone,
    and added in float64. Memory: d_mlp^2 float64 a site, and one batch; as much again for one site while it is written
    to a cache, and twice that while `matrix` makes it.

    Not for another model, nor for the same one after an edit: collect again. With fewer tokens than neurons C is
    singular, and it speaks for no text unlike the one it has seen.

    Args:
        model: The model.
        sites: Names `L<layer>.mlp.out`.
        skip_first: Whether to leave out position 0, whose activations are far larger in many models.

    Attributes:
        sites: The sites, in the order of layers.
        fingerprint: The model's.
        count: How many tokens were seen so far.

    Raises:
        MechunlearnError: If a site is not `L<layer>.mlp.out` with a layer of the model.

    >>> from mechunlearn.world.toy import planted_facts
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
        self.texts: tuple[str, ...] | None = None
        """`fingerprint` is the model's, `count` the number of tokens seen so far, `texts` those of `of_text`."""
        self._model = model
        units = model.signature.d_mlp
        self._sums = {site: torch.zeros(units, units, dtype=torch.float64, device=model.device) for site in self.sites}

    def update(self, tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"]) -> "Covariance":
        """Add a batch. If this raises, start anew.

        Args:
            tokens: Rows of tokens, padded on the right.
            lengths: How many tokens of each row count.

        Returns:
            This object.

        Raises:
            MechunlearnError: If the model's weights have changed since the start, it is in training mode, or
                activations are not finite.
        """
        self.texts = None  # they are not all of what is counted any more
        self.count += self._add(tokens, lengths, self.sites)
        return self

    def matrix(self, site: str) -> Float[Tensor, "unit other"]:
        """Return the mean of k k^T at a site, exactly symmetric, in float64 on the model's device.

        Args:
            site: One of `sites`.

        Raises:
            MechunlearnError: If the site was not asked for, or no token was seen yet.
        """
        if site not in self._sums or not self.count:
            raise MechunlearnError(
                f"No second moment of '{site}' after {self.count} tokens. Expected one of {', '.join(self.sites)}, "
                "after an update."
            )
        return symmetric(self._sums[site] / self.count)

    def at(self, model: HookedModel, sites: Sequence[str]) -> "Covariance":
        """Return these statistics with further sites: what is not known of them is collected over the same texts.

        Where texts are not known (`update`), it is this covariance, without the further sites.

        Args:
            model: The model that these are statistics of.
            sites: The sites that are wanted, such as `L3.mlp.out`.
        """
        missing = [site for site in sites if site not in self._sums]
        if not missing or self.texts is None or model.fingerprint != self.fingerprint:
            return self
        more, made = Covariance.of_text(model, missing, self.texts, skip_first=self.skip_first), copy(self)
        made.sites, made._sums = (*self.sites, *more.sites), self._sums | more._sums
        return made

    def check(self, model: HookedModel, sites: Iterable[str]) -> None:
        """Check that these are invertible statistics of a model at some sites.

        Args:
            model: The model.
            sites: The sites.

        Raises:
            MechunlearnError: If they are not.
        """
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
        batch_size: int = 32,
        cache: str | Path | None = None,
        progress: bool = False,
    ) -> "Covariance":
        """Collect over texts, shortest first so that little is padding.

        With a cache, unfinished sums are kept every `SAVE_EVERY` seconds, so that a killed run goes on to the same bits
        if called again. Do not cache under hooks that change activations: the name knows the weights alone.

        Args:
            model: The model.
            sites: Names `L<layer>.mlp.out`.
            texts: The texts.
            skip_first: Whether to leave out position 0.
            batch_size: Texts in a batch.
            cache: A folder with a file for each site, named by the model's fingerprint, the texts' tokens and the site.
                Sites found there are read, the others collected in one pass.
            progress: Whether to show a bar.

        Raises:
            MechunlearnError: If the model has no tokenizer, there are no tokens, a text is longer than the model's
                context, or a cached file is damaged, is not what its name says, or cannot be written.
        """
        made = cls(model, sites, skip_first)
        made.texts = tuple(texts)
        rows = sorted(_tokenized(model, texts), key=len)
        made.count = sum(len(row) - skip_first for row in rows)
        if made.count < 1 or batch_size < 1:
            raise MechunlearnError(
                f"{len(texts)} texts have {made.count} tokens to count, and batch_size={batch_size}. Expected one or "
                "more of each."
            )
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        text = digest(str(skip_first), *map(str, rows))
        about = {"model": made.fingerprint, "text": text, "tokens": made.count}
        files = None if cache is None else _Files(Path(cache), about, batch_size, len(batches))
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
    about: dict[str, Any]
    batch_size: int
    batches: int

    def path(self, site: str, whole: bool) -> Path:
        return (
            self.folder / f"{'-'.join(map(str, self.about.values()))}-{site}{'' if whole else '.partial'}.safetensors"
        )

    def read(self, site: str, sums: Float[Tensor, "unit other"]) -> int:
        """Fill in the sums of a site as far as they are on disk, and say how many batches that is."""
        whole = self.path(site, whole=True).exists()
        path = self.path(site, whole)
        if not path.exists():
            return 0
        advice = "Delete it, and it is collected again."
        found = tensors.load(path, {"covariance": lambda held, about: {**about, "sums": held["sums"]}}, advice)
        known = {**self.about, "site": site, **({} if whole else {"batch_size": self.batch_size})}
        known |= {"shape": tuple(sums.shape)}
        there = {**found, "shape": tuple(found["sums"].shape)}
        wrong = [
            f"{key} {there.get(key)} (expected {value})" for key, value in known.items() if there.get(key) != value
        ]
        if wrong:
            raise MechunlearnError(f"'{path}' has {', '.join(wrong)}. {advice}")
        sums.copy_(found["sums"])
        return self.batches if whole else int(found["done"])

    def write(self, site: str, sums: Float[Tensor, "unit other"], done: int) -> None:
        """Write the sums of so many batches; all of them take the place of the partial file."""
        whole = done == self.batches
        path = self.path(site, whole)
        if not (whole and path.exists()):
            about = {**self.about, "site": site, "batch_size": self.batch_size, "done": done}
            tensors.save(path, "covariance", {"sums": sums}, about)
        if whole:
            self.path(site, whole=False).unlink(missing_ok=True)


def _tokenized(model: HookedModel, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the texts that have any."""
    if model.tokenizer is None:
        raise MechunlearnError("The model has no tokenizer. Load it with one, or give tokens to `update`.")
    rows = [ids for ids in model.tokenizer(list(texts))["input_ids"] if ids] if texts else []
    context, longest = (
        getattr(model.hf.config.get_text_config(), "max_position_embeddings", None),
        max(map(len, rows), default=0),
    )
    if context is not None and longest > context:
        raise MechunlearnError(
            f"The longest text has {longest} tokens, the model's context is {context}. Expected texts that fit: cut "
            "them."
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
