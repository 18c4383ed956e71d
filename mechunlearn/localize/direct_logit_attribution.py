"""Direct logit attribution: what is written, read as the unembedding will read it."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.progress import track
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.component import SCORED
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.taps import tapped
from mechunlearn.patching.edges import Norm
from mechunlearn.patching.scores import at_read, localization, localizer

POST = {"attn.o": "attention_post", "mlp.out": "mlp_post"}


@localizer
def direct_logit_attribution(
    model: HookedModel,
    prompts: Prompts,
    *,
    kinds: Sequence[str] = SCORED,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Localization:
    """Split the logit difference between answer and foil into what each head and neuron writes towards it.

    At the position where `logit_diff` is taken the residual stream is a sum, and with the scale s of the final norm
    held at its value of this run so is the logit difference: a head scores z_h W_O,h . d, a neuron its activation
    times (its column of W_out . d), in logits, averaged over facts, with d = gain * (W_U[answer] - W_U[foil]) / s
    (centred for LayerNorm). Norms on what attention or the MLP writes (Gemma 2 and 3) are held as well (Elhage et al.
    2021, "A mathematical framework for transformer circuits"; Wang et al. 2022, arXiv 2211.00593). Corrupt prompts
    are not looked at. Cost: one forward pass, and a product with each output matrix at one position a fact.

    It sees no indirect effect: what a unit writes for later units to read, and anything at other positions (a look-up
    at the subject, say), scores nothing here; later units may erase or repeat what scores high. It describes, it does
    not
    intervene: use `activation_patching` for what a unit causes.

    Args:
        model: The model.
        prompts: The facts.
        kinds: `attn.o` (heads), `mlp.out` (neurons), or both.
        seed: Recorded only: nothing is drawn.
        batch_size: Facts a batch.
        progress: Show a bar; None shows one on a terminal or in a notebook.

    Returns:
        Logits by unit. All heads, all neurons, `evidence["embedding"]` and `evidence["biases"]` (of outputs, final
        norm and unembedding) add up to `evidence["logit_diff"]`, exactly in float32; it is taken before a final
        softcap (Gemma 2).

    Raises:
        MechunlearnError: Another kind, no facts, or facts longer than the context.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> found = direct_logit_attribution(toy.model, toy.prompts([1]))
    >>> list(found.above(1e-4))  # the head that carries the fact, not the neuron that knows it
    [L1.attn.o[0]]
    """
    unknown = [kind for kind in kinds if kind not in SCORED]
    if unknown:
        raise MechunlearnError(
            f"No direct effect of kind '{unknown[0]}'. Expected kinds among {', '.join(SCORED)}: only these write to "
            "the "
            "residual stream by unit. For other kinds use activation_patching."
        )
    parts: dict[str, list[Tensor]] = defaultdict(list)
    batches = torch.split(torch.arange(len(prompts)), batch_size)
    for rows in track(batches, "direct logit attribution", progress=progress):
        for name, part in _contributions(model, prompts.select(rows), kinds).items():
            parts[name].append(part.cpu())
    by_fact = {name: torch.cat(batches) for name, batches in parts.items()}
    evidence = {name: float(by_fact.pop(name).mean()) for name in ("embedding", "biases", "logit_diff")}
    scores = {site: facts.mean(0) for site, facts in by_fact.items()}
    return localization(model, scores, evidence, by_fact=by_fact)


@torch.no_grad()
def _contributions(
    model: HookedModel, prompts: Prompts, kinds: Sequence[str]
) -> dict[str, Float[Tensor, " fact *unit"]]:
    """Contributions to each fact of a batch: by unit of each site, and of what belongs to no unit."""
    decoder, layers = model.decoder, range(model.signature.layers)
    rows, read, answer, foil = at_read(model, prompts)
    seen: dict[str, Tensor] = {}

    def keep(name: str, activation: Tensor) -> None:
        seen[name] = activation[rows, read].float()

    hooks = {f"L{layer}.{kind}": partial(keep, f"L{layer}.{kind}") for layer in layers for kind in kinds}
    posts = [(layer, post) for layer in layers for post in POST.values() if getattr(model.layout.modules, post)]
    with tapped((decoder.part(layer, post), "in", partial(keep, f"L{layer}.{post}")) for layer, post in posts):
        run = decoder.record(prompts.tokens, read[:, None], hooks=hooks)
    first, last = run.resid[0][rows, read], run.resid[-1][rows, read]

    unembedding: Any = decoder.unembedding
    norm: Any = decoder.final_norm
    scale = model.layout.logit_scale
    difference = (unembedding.weight[answer] - unembedding.weight[foil]).float() * scale
    towards = _before(model, norm, last.float(), difference)
    no_units = torch.zeros(len(rows), device=model.device)
    if unembedding.bias is not None:
        no_units += (unembedding.bias[answer] - unembedding.bias[foil]) * scale
    made = {
        "embedding": (first.float() * towards).sum(-1),
        "logit_diff": (norm(last).float() * difference).sum(-1) + no_units,
    }
    if getattr(norm, "bias", None) is not None:
        no_units += difference @ norm.bias.float()
    written = towards * model.layout.residual_scale
    for layer in layers:
        for kind, post in POST.items():
            direction, projection = written, decoder.projection(layer, kind)
            if (layer, post) in posts:
                direction = _before(model, decoder.part(layer, post), seen[f"L{layer}.{post}"], written)
            if isinstance(projection.bias, Tensor):
                no_units += direction @ projection.bias.float()
            if kind in kinds:
                made[f"L{layer}.{kind}"] = _by_unit(model, layer, kind, seen[f"L{layer}.{kind}"], direction)
    return {**made, "biases": no_units}


def _before(
    model: HookedModel, norm: Any, entered: Float[Tensor, "fact d_model"], direction: Float[Tensor, "fact d_model"]
) -> Float[Tensor, "fact d_model"]:
    """The direction before a norm, its scale held, that is `direction` behind it."""
    parts = Norm.of(model.decoder, norm)
    return parts.weigh(direction) / parts.spread(entered)


def _by_unit(
    model: HookedModel,
    layer: int,
    kind: str,
    activation: Float[Tensor, "fact unit *d_head"],
    direction: Float[Tensor, "fact d_model"],
) -> Float[Tensor, "fact unit"]:
    """What each unit writes along each fact's direction."""
    parameters = dict(model.hf.named_parameters())
    if kind == "attn.o":
        weight, _ = model.layout.head_weights(parameters, layer, kind)
        written = torch.einsum("fm,uhm->fuh", direction, weight.float())
        return (activation * written).sum(2)
    weight = model.layout.views(parameters, layer, kind)[0]
    return activation * (direction @ weight.float().T)
