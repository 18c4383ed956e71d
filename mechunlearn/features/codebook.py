"""Codebooks: activations at one point of a model as the sum of a few of many codes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load as tensors_in
from safetensors.torch import save_file
from torch import Tensor

from mechunlearn.core import tensors
from mechunlearn.core.files import whole_folder
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.interventions import Codes
from mechunlearn.features.places import weights_name
from mechunlearn.model.hook_points import layer_of
from mechunlearn.model.layout import Signature

SHAPE = {"d_model": int, "size": int, "used": int, "groups": int, "linear": int}
ORIGIN = {"signature": Signature | None, "fitted_on": str, "quality": dict[str, float]}
"""What the files of codebooks and SAEs say besides shape, place and weights."""
CONFIG, WEIGHTS = "config.json", "codebook.safetensors"


class Codebook(Codes):
    """A discrete bottleneck at one point of a model (CodeUnlearn, arXiv 2410.10866; codebook features, arXiv 2310.17230).

    x = ReLU(W h + b); the `used` codes with the largest cosine to x are summed, and a linear map of the sum takes the
    place of h: nothing else passes, so what no code says is lost. `hook_ids` is the module that the ids `[... used]` go
    through; hook it to see or replace them. Make one with `train_codebook`. Not for keeping a model as it is: every
    codebook costs some loss, look at its `quality`.

    Args:
        d_model: The width of h.
        size: The number of codes.
        used: How many codes stand for one activation (of each group).
        hook_name: The hook point.
        groups: Into how many parts x is cut, each with `size / groups` codes of its own.
        linear: How many times as wide as h x is (ReLU of a square map loses half of it); 0 for x = h.
        signature: The architecture of the model, if it is known.
        fitted_on: The fingerprint of the model that it was trained on.

    Raises:
        MechunlearnError: If there are fewer codes than are used, or groups do not divide size and width.

    >>> codebook = Codebook(d_model=16, size=32, used=4, hook_name="L1.resid_post")
    >>> h = torch.randn(2, 5, 16)
    >>> codebook(h).shape, codebook.encode(h).sum(-1).unique()
    (torch.Size([2, 5, 16]), tensor([4.]))
    """

    def __init__(
        self,
        d_model: int,
        size: int,
        used: int,
        *,
        hook_name: str,
        groups: int = 1,
        linear: int = 2,
        signature: Signature | None = None,
        fitted_on: str = "",
    ) -> None:
        if min(used, groups) < 1 or linear < 0 or size % groups or d_model * (linear or 1) % groups:
            raise MechunlearnError(
                f"A codebook of {size} codes, {used} used, in {groups} groups does not fit width {d_model}. Expected "
                "at "
                "least one used, and a number of groups that divides both the codes and the width."
            )
        if size // groups < used:
            raise MechunlearnError(
                f"A codebook of {size // groups} codes{' a group' if groups > 1 else ''} cannot use {used} of them at "
                "a "
                "time. Give more codes (size) or use fewer (used)."
            )
        super().__init__(d_model, size, used, groups, linear)
        self.hook_name, self.signature, self.fitted_on = hook_name, signature, fitted_on
        self.quality: dict[str, float] = {}

    @property
    def about(self) -> dict[str, Any]:
        """The shape, as `interventions.Codes` takes it."""
        return {name: getattr(self, name) for name in SHAPE}

    @property
    def site(self) -> str:
        """What its units are called in masks."""
        return f"L{layer_of(self.hook_name)}.codebook:{weights_name(self)}"

    def encode(self, h: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos feature"]:
        """Return how often each code is used, 0 or 1 (in each group).

        Args:
            h: Activations.
        """
        return self.counted(self.nearest(self.entering(h)))

    def counted(self, ids: Tensor) -> Float[Tensor, "*pos feature"]:
        """Return how often each code stands among ids.

        Args:
            ids: `[... used]`, the numbers of codes.
        """
        counts = torch.zeros(*ids.shape[:-1], self.size, device=ids.device)
        return counts.scatter_add_(-1, ids, torch.ones_like(ids, dtype=counts.dtype))

    def decode(self, z: Float[Tensor, "*pos feature"]) -> Float[Tensor, "*pos d_model"]:
        """Return what a weighted sum of codes writes.

        Args:
            z: The weight of each code.
        """
        codes = self.codes.unflatten(0, (self.groups, -1))
        summed = torch.einsum("...gk,gkd->...gd", z.unflatten(-1, (self.groups, -1)).to(codes), codes).flatten(-2)
        return self.leaving(summed)

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what `restored` makes the codebook of: a description for JSON, and the weights by name."""
        return {name: getattr(self, name) for name in (*SHAPE, "hook_name", *ORIGIN)}, self.state_dict()

    @classmethod
    def restored(cls, about: Mapping[str, Any], weights: Mapping[str, Tensor]) -> "Codebook":
        """Make a codebook of what `described` returns.

        Args:
            about: The description.
            weights: The weights by name.

        Raises:
            MechunlearnError, LookupError, TypeError, RuntimeError: If they are not those of a codebook.
        """
        settings = tensors.checked(about, {**SHAPE, "hook_name": str, **ORIGIN})
        quality = settings.pop("quality")
        with torch.device("meta"):  # sizes that a file claims take no memory, and nothing is drawn
            made = cls(**settings)
        made.load_state_dict(dict(weights), assign=True)
        made.quality = quality
        return made.eval()

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, which holds a hash of both files, and `codebook.safetensors`.

        Args:
            folder: A new or empty folder.

        Raises:
            MechunlearnError: If the folder holds something, or the disk refuses.
        """
        about, weights = self.described()
        with whole_folder(folder) as beside:
            save_file({name: t.detach().cpu().contiguous() for name, t in weights.items()}, beside / WEIGHTS)
            about["weights"] = digest((beside / WEIGHTS).read_bytes())
            tensors.save(beside / CONFIG, "codebook", {}, about)

    @classmethod
    def load(cls, folder: str | Path) -> "Codebook":
        """Read a codebook from a folder of `save`.

        Args:
            folder: The folder.

        Returns:
            The codebook, in evaluation mode.

        Raises:
            MechunlearnError: If the folder holds no codebook, or one that is damaged.
        """

        def made(_: dict[str, Tensor], about: dict[str, Any]) -> "Codebook":
            return cls.restored(about, hashed(Path(folder) / WEIGHTS, about["weights"]))

        return tensors.load(Path(folder) / CONFIG, {"codebook": made})

    def __repr__(self) -> str:
        return f"Codebook({self.size} codes, {self.used} used, {self.hook_name}, width {self.d_model})"


def hashed(path: Path, told: str) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file whose hash is known.

    Args:
        path: The file.
        told: The hash of its bytes.

    Raises:
        MechunlearnError: If it has another.
    """
    data = path.read_bytes()
    if digest(data) != told:
        raise MechunlearnError(f"{path.name}: {tensors.DAMAGED}")
    return tensors_in(data)
