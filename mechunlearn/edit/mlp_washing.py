"""LAW: thousands of facts washed out of MLP output weights in closed form, layer by layer until none is left."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit.closed_form.washing import WEIGHTS, How, Position, Target, remaining, washing
from mechunlearn.edit.goal import Goal
from mechunlearn.edit.remake import editor
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.solve import Spectrum, solve, within_band

BETA, ADAM_STEPS, ADAM_RATE = 1.1, 1000, 1e-7


@editor
def mlp_washing(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    target: Target = "end-of-text",
    position: Position = "subject last",
    efficacy: float = 0.99,
    max_kl: float = 0.05,
    min_retention: float = 0.95,
    covariance_weight: float | None = None,
    band: tuple[float, float] | None = None,
    ascent: Literal["path", "adam", "off"] = "path",
    growth: float = 2.0,
    eliminate: bool = True,
    retain_weight: float = 1.0,
    covariance: Covariance | None = None,
    texts: Sequence[str] | None = None,
    target_values: Float[Tensor, "fact d_model"] | None = None,
    prefixes: int = 5,
    steps: int = 25,
    lr: float = 0.2,
    overshoot: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> WeightEdit:
    """Wash facts out of the chosen MLPs: as far as the norm of the change allows, while what text needs stays.

    max_D ||D K_w||_F^2   subject to   tr(D C D^T) = beta tr(C)

    (Large Scale Knowledge Washing, arXiv 2405.16720, section 3), begun at `memit`'s change towards end-of-text. First
    each layer's change is found for all facts: with a `band`, as in the paper, at the weight of C nearest to
    `covariance_weight` at which ||D||_F lies in `band` times ||W||_F. Then, layer by layer, the
    objective is climbed for the keys K_w of the facts that are still known, with beta = 1.1 tr(D C D^T) / tr(C); what
    the model no longer answers leaves the set, and when it is empty the layers above are left as they are. Everything
    else is as in `memit`.

    Facts about the same subjects, and neighbours, pay most: measure them, and compare `memit` with `overshoot` and
    retain keys (docs/reproductions/law.md). Where the band is out of reach (few facts), the card's `trajectory` says
    so.

    Args:
        model: The model to edit.
        mask: The neurons whose output weights may move; sites other than `mlp.out` are left alone.
        forget: Facts to wash out.
        retain: Facts to hold; they matter with `retain_weight`, and for the targets `mean` and `shared`.
        target: What the facts' prompts shall be followed by (see `memit`).
        position: The token to act at, `subject last` or `last`.
        efficacy: Least share of the forget facts to edit: they answer the target with `target="targets"`, else they no
            longer give the truth (greedy).
        max_kl: Largest mean KL of the next token on the model's own text, in nats a token.
        min_retention: Least share of the known retain facts to keep.
        covariance_weight: Weight of C; with a band, the one that its search begins at (20,000 unless given). None
            without a band: the largest of 20,000, 2,000, ... 2 that reaches `efficacy`.
        band: Least and largest norm of a layer's change, as shares of its weight's norm; the paper has (1/3, 3/4) for
            thousands of facts. With few facts that destroys a model, so None leaves the norm to `covariance_weight`.
        ascent: `path` follows the gradient flow in closed form; `adam` is the authors' schedule (1,000 steps, rate
            1e-7, back onto the ellipsoid after each), which beside the rescaling moves D by a thousandth; `off` keeps
            the initialisation.
        growth: How many times as much the path's strongest direction grows as one without keys. Its limit has rank
            one, so more is not better.
        eliminate: Whether facts leave the set once the model no longer answers them (one forward pass a layer).
        retain_weight: Weight of the retain facts' keys, whose outputs are kept.
        covariance: C, collected over text before (`Covariance.of_text`), to try several settings. Sites that it lacks
            are collected over the same text.
        texts: What C and the prefixes are from, by default a half of the forget data set's, or else samples of the
            model itself, three tokens a neuron.
        target_values: z of every forget fact, to skip the search.
        prefixes: How many beginnings of `texts` each prompt is read behind, besides bare.
        steps: Steps of Adam for each target value, many facts at a time.
        lr: Adam's learning rate, in units of the residual stream's root mean square.
        overshoot: Moves z that many times as far from h: a ridge falls short of its targets; the papers have 1. None:
            a value that was searched is drawn back to twice the least share of its way from h that edits the fact.
        batch_size: Prompts in memory.
        seed: Seed of prefixes, and of the facts that a shared target value is found on.
        progress: Whether to show bars.

    Returns:
        New rows of the neurons. The card's `trajectory` has weight, norms and what was still known by layer.

    Raises:
        MechunlearnError: As `memit` does, and for a band that is none.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of([toy.neuron(3)], toy.model.signature)
    >>> prompts = toy.prompts()
    >>> seen = Covariance(toy.model, ["L0.mlp.out"]).update(prompts.tokens, prompts.lengths)
    >>> settings = {"covariance": seen, "band": (1, 20), "target": "shared"}
    >>> edit = mlp_washing(toy.model, mask, toy.prompts([3]), toy.prompts([0, 1]), **settings)
    >>> with edit.applied(toy.model):
    ...     right = toy.model.forward(prompts.tokens)[:, -1].argmax(-1) == prompts.answers[:, 0]
    >>> (~right).nonzero().flatten().tolist()
    [3]
    """
    if band is not None and (len(band) != 2 or not 0 < band[0] <= band[1]):
        raise MechunlearnError(
            f"Got a band of {band}. Expected two shares of the weight's norm above 0, the smaller first."
        )
    how, keep = How(target, position, prefixes, steps, lr, overshoot, batch_size), retain_weight > 0
    work = washing(model, mask, forget, retain, how, covariance, texts, target_values, keep, seed, progress)

    def made(weight: float) -> WeightEdit:
        def initial(layer: int) -> tuple[Tensor, dict[str, Any]]:
            sums, size, moment = work.sums(layer), float(work.weight(layer).norm()), work.second_moment(layer)
            gram, chosen, about = sums.gram + work.kept(layer, retain_weight), weight, {}
            if band is not None:
                norm = Spectrum.of(gram, moment).norms(sums.cross)
                chosen, reached = within_band(norm, weight, (band[0] * size, band[1] * size))
                about = {"in band": reached}
            change, jitter = solve(chosen * moment + gram, sums.cross)
            return change, {"covariance_weight": float(chosen), **about, "jitter": jitter}

        with work.undone():
            first, trajectory = work.solved(initial)
        left = torch.arange(len(work.facts))
        with work.undone():
            for (layer, change), entry in zip(first.items(), trajectory):
                entry["known before"] = len(left)
                if not len(left):
                    break
                climbed = change
                if ascent != "off":
                    keys = work.gram(layer, work.edit_prompts.select(left))
                    climbed = _ascended(change.T, keys, work.second_moment(layer), ascent, growth).T
                entry["moved"] = float((climbed - change).norm() / change.norm().clamp_min(1e-300))
                work.add_(layer, climbed)
                left = remaining(work, left) if eliminate else left
            return work.edit(trajectory, "" if len(left) else "nothing is left")

    if band is not None or covariance_weight is not None:
        return made(WEIGHTS[0] if covariance_weight is None else covariance_weight)
    return work.sought(Goal(efficacy, max_kl, min_retention), "covariance_weight", WEIGHTS, made)


def _ascended(
    change: Float[Tensor, "d_model unit"],
    gram: Float[Tensor, "unit unit"],
    moment: Float[Tensor, "unit unit"],
    ascent: str,
    growth: float,
) -> Float[Tensor, "d_model unit"]:
    """Return the change after the ascent, on the ellipsoid tr(D C D^T) = 1.1 times what it was."""
    size = BETA * _energy(change, moment)
    if ascent == "path":
        return Spectrum.of(gram, moment).ascended(change, growth) * float(BETA**0.5)
    found = change.clone().requires_grad_()
    optimiser = torch.optim.Adam([found], lr=ADAM_RATE, maximize=True)
    with torch.no_grad():
        for _ in range(ADAM_STEPS):
            found.grad = 2 * found @ gram
            optimiser.step()
            found *= (size / _energy(found, moment).clamp_min(1e-300)).sqrt()
    return found.detach()


def _energy(change: Float[Tensor, "d_model unit"], moment: Float[Tensor, "unit unit"]) -> Float[Tensor, ""]:
    """Return tr(D C D^T)."""
    return ((change @ moment) * change).sum()
