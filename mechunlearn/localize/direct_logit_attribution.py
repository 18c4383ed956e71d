"""Direct logit attribution and the logit lens: what is written, read as the unembedding will read it."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.runcard import RunCard, Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.component import SCORED
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.taps import tapped
from mechunlearn.patching.corruption import check_prompts
from mechunlearn.patching.edges import Norm
from mechunlearn.patching.scores import localization

POST = {"attn.o": "attention_post", "mlp.out": "mlp_post"}


def direct_logit_attribution(
    model: HookedModel, prompts: Prompts, *, kinds: Sequence[str] = SCORED, batch_size: int = 32
) -> Localization:
    """Split the logit difference between answer and foil into what each head and neuron writes towards it.

    At the position where `logit_diff` is taken the residual stream is a sum, and with the scale s of the final norm held
    at its value of this run so is the logit difference: a head scores z_h W_O,h . d, a neuron its activation times
    (its column of W_out . d), in logits, averaged over facts, with d = gain * (W_U[answer] - W_U[foil]) / s (centred for
    LayerNorm). Norms on what attention or the MLP writes (Gemma 2 and 3) are held as well (Elhage et al. 2021, "A
    mathematical framework for transformer circuits"; Wang et al. 2022, arXiv 2211.00593).
    All heads, all neurons, `evidence["embedding"]` and `evidence["biases"]` (of outputs, final norm and unembedding) add
    up to `evidence["logit_diff"]`, exactly in float32; it is taken before a final softcap (Gemma 2). Corrupt prompts are not looked
    at. Cost: one forward pass, and a product with each output matrix at one position a fact.

    It sees no indirect effect: what a unit writes for later units to read, and anything at other positions (a look-up
    at the subject, say), scores nothing here; later units may erase or repeat what scores high. It describes, it does not
    intervene: use `activation_patching` for what a unit causes.
    Raises `MechunlearnError` for kinds other than `attn.o` and `mlp.out`, without facts, and for facts longer than the
    context.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> found = direct_logit_attribution(toy.model, toy.prompts([1]))
    >>> list(found.above(1e-4))  # the head that carries the fact, not the neuron that knows it
    [L1.attn.o[0]]
    """
    watch = Stopwatch()
    unknown = [kind for kind in kinds if kind not in SCORED]
    if unknown:
        raise MechunlearnError(
            f"No direct effect of kind '{unknown[0]}'. Expected kinds among {', '.join(SCORED)}: only these write to the "
            "residual stream by unit. For other kinds use activation_patching."
        )
    check_prompts(model, prompts, batch_size)
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for rows in torch.arange(len(prompts)).split(batch_size):
        for name, part in _contributions(model, prompts.select(rows), kinds).items():
            totals[name] = totals[name] + part.cpu()
    card = RunCard(
        "direct_logit_attribution",
        model=model.fingerprint,
        data=prompts.fingerprint,
        settings={"kinds": list(kinds)},
        device=str(model.device),
    )
    evidence = {name: float(totals.pop(name) / len(prompts)) for name in ("embedding", "biases", "logit_diff")}
    scores = {site: total / len(prompts) for site, total in totals.items()}
    return localization(model, scores, watch.stamp(card), evidence)


@torch.no_grad()
def logit_lens(model: HookedModel, prompts: Prompts, batch_size: int = 128) -> pd.DataFrame:
    """Read the answer from the residual stream after each block, as if that block were the last.

    The stream at the position where `logit_diff` is taken goes through the model's own final norm, unembedding and
    softcap (nostalgebraist 2020, "interpreting GPT: the logit lens"). One row a depth (`depth`: blocks passed, 0 is the
    embedding, the last is the model itself): `logit_diff` (answer minus foil, in logits, mean over facts) with its 95 %
    bootstrap interval `low` to `high`, `probability` of the answer's token, `rank_1` (the share of facts whose answer
    has the largest logit of the full vocabulary), and `n` facts.

    It misleads at early depths: they are written in another basis than the last one, so an answer that cannot be read
    here may be there all the same, and how early it can be read differs between families for that reason alone
    (Belrose et al. 2023, arXiv 2303.08112, call it brittle). For what is encoded, train a probe (`fact_lookup`); for
    where it is made, patch. Raises `MechunlearnError` without facts, and for facts longer than the context.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> logit_lens(toy.model, toy.prompts()).rank_1.tolist()  # written by the second block
    [0.0, 0.0, 1.0]
    """
    check_prompts(model, prompts)
    found: dict[int, list[Tensor]] = defaultdict(list)
    for chosen in torch.arange(len(prompts)).split(batch_size):
        part = prompts.select(chosen)
        rows, read, answer, foil = _where(model, part)
        for depth, resid in enumerate(model.decoder.record(part.tokens, read[:, None]).resid):
            logits = model.decoder.unembed(resid[rows, read]).float()
            right = logits[rows, answer]
            first = (logits.argmax(-1) == answer).float()
            values = [right - logits[rows, foil], logits.softmax(-1)[rows, answer], first]
            found[depth].append(torch.stack(values).cpu())
    table = []
    for depth, batches in found.items():
        difference, probability, first = torch.cat(batches, 1)
        interval = bootstrap_interval(difference.numpy())
        means = [float(values.mean()) for values in (difference, probability, first)]
        table.append((depth, means[0], *interval, *means[1:], len(prompts)))
    return pd.DataFrame(table, columns=["depth", "logit_diff", "low", "high", "probability", "rank_1", "n"])


def _where(model: HookedModel, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, position read, and the tokens of answer and foil there, of each fact, on the model's device."""
    tensors = (torch.arange(len(prompts)), prompts.read, prompts.answer_at_read, prompts.foil_at_read)
    rows, read, answer, foil = (tensor.to(model.device) for tensor in tensors)
    return rows, read, answer, foil


@torch.no_grad()
def _contributions(model: HookedModel, prompts: Prompts, kinds: Sequence[str]) -> dict[str, Float[Tensor, " *unit"]]:
    """Contributions summed over the facts of a batch: by unit of each site, and of what belongs to no unit."""
    decoder, layers = model.decoder, range(model.signature.layers)
    rows, read, answer, foil = _where(model, prompts)
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
    difference = (unembedding.weight[answer] - unembedding.weight[foil]).float()
    towards = _before(model, norm, last.float(), difference)
    no_units = torch.zeros(len(rows), device=model.device)
    if unembedding.bias is not None:
        no_units += unembedding.bias[answer] - unembedding.bias[foil]
    made = {
        "embedding": (first.float() * towards).sum(),
        "logit_diff": (norm(last).float() * difference).sum() + no_units.sum(),
    }
    if model.layout.modules.centred:
        no_units += difference @ norm.bias.float()
    for layer in layers:
        for kind, post in POST.items():
            direction, projection = towards, decoder.projection(layer, kind)
            if (layer, post) in posts:
                direction = _before(model, decoder.part(layer, post), seen[f"L{layer}.{post}"], towards)
            if isinstance(projection.bias, Tensor):
                no_units += direction @ projection.bias.float()
            if kind in kinds:
                made[f"L{layer}.{kind}"] = _by_unit(model, layer, kind, seen[f"L{layer}.{kind}"], direction)
    return {**made, "biases": no_units.sum()}


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
) -> Float[Tensor, " unit"]:
    """What each unit writes along each fact's direction, summed over facts."""
    parameters = dict(model.hf.named_parameters())
    if kind == "attn.o":
        weight, _ = model.layout.head_weights(parameters, layer, kind)
        written = torch.einsum("fm,uhm->fuh", direction, weight.float())
        return (activation * written).sum((0, 2))
    weight = model.layout.views(parameters, layer, kind)[0]
    return (activation * (direction @ weight.float().T)).sum(0)
