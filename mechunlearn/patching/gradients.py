"""One pass forward and back through hooks: the metric, and its gradient wherever a hook keeps what it sees."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, per_fact, positions_read
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.model.taps import Tap, tapped
from mechunlearn.patching.corruption import check_finite


def differentiated(
    model: HookedModel,
    prompts: Prompts,
    metric: Metric,
    start: Float[Tensor, "fact pos d_model"] | None,
    taps: Iterable[Tap],
    points: dict[str, Tensor],
    rules: AbstractContextManager[None] | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Differentiate the metric by what hooks keep in `points`, summed over facts.

    Args:
        model: The model; its own gradients stay as they are.
        prompts: The facts.
        metric: What is differentiated.
        start: Embeddings to begin from; None for the prompts' own.
        taps: Hooks, some of which keep activations that are part of the graph.
        points: Where they keep them.
        rules: Rules of the backward pass (see `relevance_rules`).

    Returns:
        The metric by fact, the logits, and a gradient a point, zero where the metric does not depend on it.

    Raises:
        MechunlearnError: The metric is not finite.
    """

    def leaf(x: Tensor) -> Tensor:
        return (x.detach() if start is None else start).clone().requires_grad_()

    reading = model.decoder.reading(positions_read(metric, prompts).to(model.device))
    with torch.enable_grad(), frozen(model.hf), rules or nullcontext():
        with tapped([(model.decoder.blocks[0], "in", leaf), reading, *taps]):
            logits = model.hf(input_ids=prompts.tokens.to(model.device), use_cache=False).logits
        value = per_fact(metric, logits, prompts)[0]
        gradients = torch.autograd.grad(value.sum(), list(points.values()), allow_unused=True, materialize_grads=True)
    check_finite(model, value.detach(), prompts.tokens, metric)
    return value.detach(), logits.detach(), dict(zip(points, gradients, strict=True))
