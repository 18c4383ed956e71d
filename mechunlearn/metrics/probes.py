"""Linear probes: what can be read from the residual stream at one position, layer by layer."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel


@steady()
@torch.no_grad()
def residuals(
    model: HookedModel, prompts: Prompts, positions: Tensor, batch_size: int = 128
) -> Float[Tensor, "layer fact d_model"]:
    """Return the layer-normed residual stream at one position a fact, after 0, 1, ... all blocks.

    Args:
        model: The model.
        prompts: The facts.
        positions: A position for each fact.
        batch_size: Facts at a time.
    """
    found = streams(model, prompts, positions, batch_size).float()
    return torch.nn.functional.layer_norm(found, found.shape[-1:])


@steady()
@torch.no_grad()
def streams(
    model: HookedModel, prompts: Prompts, positions: Tensor, batch_size: int = 128
) -> Float[Tensor, "layer fact d_model"]:
    """Return the residual stream at one position a fact, after 0, 1, ... all blocks.

    Args:
        model: The model.
        prompts: The facts.
        positions: A position for each fact.
        batch_size: Facts at a time.
    """
    layers = model.signature.layers
    sites = [f"L{layer}.resid_pre" for layer in range(layers)] + [f"L{layers - 1}.resid_post"]
    found = []
    for rows in torch.arange(len(prompts)).split(batch_size):
        _, kept = model.cache(prompts.tokens[rows], sites)
        found.append(torch.stack([kept[site][torch.arange(len(rows)), positions[rows]] for site in sites]).cpu())
    return torch.cat(found, 1)


def probe_curve(
    train: Float[Tensor, "layer fact d_model"],
    train_labels: Sequence[str],
    test: Float[Tensor, "layer held_out d_model"],
    test_labels: Sequence[str],
) -> list[float]:
    """Return the accuracy of a linear probe on held-out subjects, one number a depth (0 to 1).

    Args:
        train: Activations that the probe is trained on.
        train_labels: Their classes.
        test: Activations that it is tested on.
        test_labels: Their classes.
    """
    labels, held_out = np.asarray(train_labels), np.asarray(test_labels)
    return [
        float(np.mean(fitted(x, labels).predict(x_test) == held_out))
        for x, x_test in zip(train.numpy(), test.numpy(), strict=True)
    ]


def fitted(x: NDArray[Any], labels: NDArray[Any]) -> LogisticRegression:
    """Fit a multinomial logistic regression.

    Args:
        x: Activations, a row a fact.
        labels: The class of each fact.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # few facts may have many answers
        return LogisticRegression(max_iter=300).fit(x, labels)


def subject_ends(prompts: Prompts, name: str) -> Int[Tensor, " fact"]:
    """Return the position of each subject's last token.

    Args:
        prompts: The facts.
        name: What an error calls them, such as "forget".

    Raises:
        MechunlearnError: If a fact has no subject.
    """
    missing = int((prompts.spans[:, 1] < 0).sum())
    if missing:
        raise MechunlearnError(
            f"{missing} of the {len(prompts)} {name} facts say nothing of where their subject is, and the residual "
            "stream is "
            "read at its last token. Give prompts with subjects, or `spans` to Prompts.from_tokens."
        )
    return prompts.spans[:, 1]
