"""What a gradient method reads: token sequences, and the layers above the lowest trained one, computed once."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.answers import supervised
from mechunlearn.metrics.text import encode
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.taps import tapped
from mechunlearn.training.precision import Arithmetic, arithmetic

if TYPE_CHECKING:
    from mechunlearn.model.restart import Restart

BATCH = 64


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences, padded on the right, and the token that each position is to predict (-1: none).

    Attributes:
        tokens: Padded on the right.
        labels: The token that each position is to predict (-1: none).
        lengths: How many tokens of a row are no padding.
    """

    tokens: Int[Tensor, "row pos"]
    labels: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]

    @classmethod
    def of(cls, prompts: Prompts, which: str = "answers") -> "Sequences":
        """Return prompts followed by their answers or targets, whose tokens are the labels.

        Args:
            prompts: The facts.
            which: `answers` or `targets`.

        Raises:
            MechunlearnError: If a fact has no target.
        """
        wanted = prompts.every_target if which == "targets" else prompts.answers
        tokens, fact, position, label = supervised(prompts, which)
        labels = torch.full_like(tokens, PAD)
        labels[fact, position] = label
        return cls(tokens, labels, prompts.start + (wanted != PAD).sum(1))

    @classmethod
    def of_text(cls, encoded: Sequence[Sequence[int]]) -> "Sequences":
        """Return texts, of which every next token is a label. Texts of fewer than two tokens are left out.

        Args:
            encoded: Token ids of each text.
        """
        kept = [torch.tensor(ids) for ids in encoded if len(ids) > 1]
        if not kept:
            none = torch.zeros(0, 1, dtype=torch.long)
            return cls(none, none, none[:, 0])
        tokens = pad_sequence(kept, batch_first=True)
        labels = pad_sequence([F.pad(ids[1:], (0, 1), value=PAD) for ids in kept], batch_first=True, padding_value=PAD)
        return cls(tokens, labels, torch.tensor([len(ids) for ids in kept]))

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Tensor) -> "Sequences":
        """Return these rows, no wider than the longest of them.

        Args:
            rows: Their numbers.
        """
        lengths = self.lengths[rows]
        width = int(lengths.max())
        return Sequences(self.tokens[rows, :width], self.labels[rows, :width], lengths)


class TopLayers:
    """A model from its lowest trained layer up.

    What enters that layer is a constant while nothing below is trained: no backward pass goes there, and with `keep`
    it is computed once an example.

    Args:
        model: The model.
        layer: The lowest trained one; `None` if everything is trained, so that nothing is constant.
        keep: Whether what enters the layer is kept.
    """

    def __init__(self, model: HookedModel, layer: int | None, keep: bool = True) -> None:
        self.model, self.layer, self.keep = model, layer, keep and bool(layer)
        self.arithmetic = arithmetic(model)
        self._restarts: dict[int, Restart] = {}

    def states(
        self, resid: Tensor, part: Sequences, hidden: int | None = None, last: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return what is unembedded at the labelled places, and what leaves layer `hidden` at every real token.

        Args:
            resid: What enters the lowest trained layer.
            part: The sequences.
            hidden: The layer whose output is wanted, if any.
            last: Whether the first is wanted.

        Returns:
            The residual stream; where everything is trained the logits themselves, which `unembed` leaves as they are.
        """
        decoder, device = self.model.decoder, self.model.device
        rows, places = (part.labels != PAD).to(device).nonzero(as_tuple=True)
        if self.layer is None:
            counts = (part.labels != PAD).sum(1).to(device)
            at = pad_sequence(list(torch.split(places, counts.tolist())), batch_first=True)
            with tapped([decoder.reading(at)]):
                logits = self.model.hf(input_ids=part.tokens.to(device), use_cache=False).logits
            return logits[torch.arange(at.shape[1], device=device) < counts[:, None]], None
        width = resid.shape[1]
        if width not in self._restarts:
            self._restarts[width] = decoder.restart(0, width)
        found = None
        for layer in range(self.layer, self.model.signature.layers):
            resid = self._restarts[width].block(layer, resid)
            if layer == hidden:
                found = resid[real(part).to(device)]
                if not last:
                    return None, found
        return resid[rows, places] if last else None, found

    def unembed(self, state: Tensor) -> Tensor:
        """Return the logits of what `states` gave. No trained weight is in the unembedding unless everything is trained.

        Args:
            state: What it gave.
        """
        return state if self.layer is None else self.model.decoder.unembed(state)


def real(part: Sequences) -> Bool[Tensor, "row pos"]:
    """Return which positions hold a token, not padding.

    Args:
        part: The sequences.
    """
    return torch.arange(part.tokens.shape[1]) < part.lengths[:, None]


class CachedInputs:
    """Sequences as the trained part of a model reads them.

    Memory of what is kept: tokens x d_model, and of constants labelled tokens x 1 and x d_model, tokens x d_model.

    Args:
        upper: The trained part of the model.
        sequences: What is read.
        wanted: What an objective asks for of the *unedited* model (`reference`, `reference_logits`,
            `reference_hidden`), which is computed at once.
        hidden: The layer whose output the objective reads, if any.
        exact: Whether they are read to measure, not to train: then in the model's own type, not in that of
            `precision.products`.
    """

    def __init__(
        self,
        upper: TopLayers,
        sequences: Sequences,
        wanted: frozenset[str] = frozenset(),
        hidden: int | None = None,
        exact: bool = False,
    ) -> None:
        self.upper, self.sequences, self.hidden = upper, sequences, hidden
        self._arithmetic: Arithmetic = nullcontext if exact else upper.arithmetic
        ends = sequences.lengths.cumsum(0)
        self._begins = ends - sequences.lengths
        self._kept: Tensor | None = None
        self._known = torch.zeros(len(sequences), dtype=torch.bool)
        self._constants: dict[str, list[Tensor]] = {name: [] for name in wanted if name.startswith("reference")}
        if self._constants and len(sequences):
            for rows in torch.split(torch.arange(len(sequences)), BATCH):
                self._remember(rows)

    def __len__(self) -> int:
        return len(self.sequences)

    def read(self, rows: Int[Tensor, " _row"], wanted: frozenset[str] | set[str]) -> dict[str, Tensor]:
        """Return what is asked for of these rows: `logits`, `labels`, `fact`, `hidden` and what was remembered.

        Args:
            rows: Numbers of the rows.
            wanted: Names of what is asked for.
        """
        return self._read(rows, wanted, self._arithmetic)

    def _read(self, rows: Tensor, wanted: frozenset[str] | set[str], arithmetic: Arithmetic) -> dict[str, Tensor]:
        part = self.sequences.select(rows)
        found: dict[str, Tensor] = {}
        reads = bool({"logits", "hidden"} & set(wanted))
        entering = self._entering(rows, part) if reads else None
        with arithmetic():
            if entering is not None:
                state, hidden = self.upper.states(entering, part, self.hidden, "logits" in wanted)
                logits = None if state is None else self.upper.unembed(state)
                found |= {
                    name: tensor for name, tensor in (("logits", logits), ("hidden", hidden)) if tensor is not None
                }
            for name, constants in self._constants.items():
                found[name] = torch.cat([constants[i] for i in rows.tolist()])
                if name == "reference_logits" and name in wanted:
                    found[name] = self.upper.unembed(found[name]).detach()
        scored = part.labels != PAD
        found["labels"] = part.labels[scored].to(self.upper.model.device)
        found["fact"] = scored.nonzero()[:, 0].to(self.upper.model.device)
        return {name: tensor for name, tensor in found.items() if name in wanted}

    @torch.no_grad()
    def _remember(self, rows: Tensor) -> None:
        part = self.sequences.select(rows)
        entering = self._entering(rows, part)
        with self._arithmetic():  # rounded as what is compared with it
            state, hidden = self.upper.states(entering, part, self.hidden)
            assert state is not None
            logits = self.upper.unembed(state) if "reference" in self._constants else None
        counts = (part.labels != PAD).sum(1).tolist()
        labels = part.labels[part.labels != PAD].to(state.device)
        for name, kept in self._constants.items():
            if name == "reference":
                assert logits is not None
                log_p = logits.float().log_softmax(-1)
                kept += torch.split(log_p.gather(1, labels[:, None])[:, 0], counts)
            elif name == "reference_logits":
                kept += [chunk.clone() for chunk in torch.split(state, counts)]
            else:
                assert hidden is not None
                kept += [chunk.clone() for chunk in torch.split(hidden, part.lengths.tolist())]

    def _entering(self, rows: Tensor, part: Sequences) -> Tensor:
        decoder, layer = self.upper.model.decoder, self.upper.layer
        if layer is None:
            return torch.empty(0)
        if not self.upper.keep:
            return decoder.entering(part.tokens, layer)
        if not self._known[rows].all():
            resid = decoder.entering(part.tokens, layer)
            if self._kept is None:
                self._kept = resid.new_empty(int(self.sequences.lengths.sum()), resid.shape[-1])
            places = real(part)
            self._kept[self._at(rows, part)[places].to(resid.device)] = resid[places.to(resid.device)]
            self._known[rows] = True
        assert self._kept is not None
        return self._kept[self._at(rows, part).to(self._kept.device)]

    def _at(self, rows: Tensor, part: Sequences) -> Int[Tensor, "row pos"]:
        """Return where each token's stream is kept; padding reads the last real token's, so that it is finite."""
        steps = torch.minimum(torch.arange(part.tokens.shape[1]), part.lengths[:, None] - 1)
        return self._begins[rows][:, None] + steps

    @torch.no_grad()
    def right(self, batch_size: int = 2 * BATCH) -> Bool[Tensor, " row"]:
        """Return whether greedy decoding gives all labelled tokens, by row.

        Args:
            batch_size: Rows at a time.
        """
        wrong = torch.zeros(len(self))
        for rows in torch.split(self.sequences.lengths.argsort(), batch_size):
            read = self._read(rows, {"logits", "labels", "fact"}, nullcontext)
            wrong[rows] = (~all_right(read, len(rows))).float()
        return wrong == 0


def all_right(read: Mapping[str, Tensor], rows: int) -> Bool[Tensor, " row"]:
    """Return whether the most likely token is the label everywhere in a row.

    Args:
        read: `logits`, `labels` and `fact` of `CachedInputs.read`.
        rows: How many rows were read.
    """
    missed = (read["logits"].argmax(-1) != read["labels"]).float().cpu()
    return torch.zeros(rows).index_add_(0, read["fact"].cpu(), missed) == 0


def text_sequences(model: HookedModel, texts: Sequence[str]) -> Sequences:
    """Return texts, of which every next token is a label.

    Args:
        model: The model, for its tokenizer.
        texts: The texts.
    """
    return Sequences.of_text(encode(model, tuple(texts)))
