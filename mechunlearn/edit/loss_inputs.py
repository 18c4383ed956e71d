"""What a loss reads in each step: rows of one or more sets of sequences, by the names of its arguments."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.edit import losses
from mechunlearn.errors import MechunlearnError
from mechunlearn.training.inputs import CachedInputs, Sequences, TopLayers, all_right


class LossInputs:
    """A loss, and the streams that it reads its arguments from.

    Args:
        loss: The loss.
        upper: The trained part of the model.
        sets: By prefix of argument names ('', 'target_', 'retain_'): which draw of rows it reads, and the sequences.
    """

    def __init__(
        self, loss: losses.Loss, upper: TopLayers, sets: Mapping[str, tuple[str, Callable[[], Sequences]]]
    ) -> None:
        self.loss = loss
        self.streams: dict[str, tuple[str, CachedInputs, frozenset[str]]] = {}
        layer = losses.described(loss)["settings"].get("layer")
        if layer is not None and upper.layer is not None and not upper.layer <= layer < upper.model.signature.layers:
            raise MechunlearnError(
                f"{losses.described(loss)['name']} reads layer {layer}, but the lowest masked layer is {upper.layer} "
                "of "
                f"{upper.model.signature.layers}: no selected weight could move what it reads. Give a layer from "
                f"{upper.layer} to {upper.model.signature.layers - 1}, or another mask."
            )
        left = losses.needs(loss)
        for prefix in sorted(sets, reverse=True):
            mine = frozenset(name for name in left if name.startswith(prefix))
            left -= mine
            if mine:
                draw, sequences = sets[prefix]
                wanted = frozenset(name.removeprefix(prefix) for name in mine)
                self.streams[prefix] = draw, CachedInputs(upper, sequences(), wanted, layer), wanted
        self._ahead: tuple[str, Tensor, dict[str, Tensor]] | None = None

    def __call__(self, drawn: Mapping[str, Tensor]) -> Tensor:
        """Return the loss on these rows of each draw."""
        return self.loss(
            **{
                prefix + name: tensor
                for prefix, (draw, _, wanted) in self.streams.items()
                for name, tensor in self._read(prefix, drawn[draw]).items()
                if name in wanted
            }
        )

    def right(self, prefix: str, rows: Tensor) -> Bool[Tensor, " row"]:
        """Return whether greedy decoding gives all tokens that these rows ask for.

        What is read for it is the beginning of the next call's backward pass, if that is on the same rows in the same
        order: call it only where no weight moves in between.

        Args:
            prefix: The stream. Its loss must read logits.
            rows: Numbers of the rows.
        """
        _, stream, wanted = self.streams[prefix]
        read = stream.read(rows, wanted | {"logits", "labels", "fact"})
        self._ahead = prefix, rows, read
        return all_right(read, len(rows))

    def drop(self) -> None:
        """Let go of what `right` has read."""
        self._ahead = None

    def _read(self, prefix: str, rows: Tensor) -> dict[str, Tensor]:
        _, stream, wanted = self.streams[prefix]
        if self._ahead is not None and self._ahead[0] == prefix and torch.equal(self._ahead[1], rows):
            read, self._ahead = self._ahead[2], None
            return read
        return stream.read(rows, wanted)
