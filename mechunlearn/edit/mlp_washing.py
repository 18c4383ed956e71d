"""LAW: thousands of facts washed out of MLP output weights in closed form, layer by layer until none is left."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.edit.closed_form.washing import How, remaining, washing
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.solve import Spectrum, solve, within_band

ASCENTS = ("path", "adam", "off")
BETA, ADAM_STEPS, ADAM_RATE = 1.1, 1000, 1e-7


def mlp_washing(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    target: str = "end-of-text",
    position: str = "subject last",
    covariance_weight: float | int = 20_000,
    band: tuple[float | int, float | int] = (1 / 3, 3 / 4),
    ascent: str = "path",
    growth: float | int = 2.0,
    eliminate: bool = True,
    retain_weight: float | int = 0.0,
    covariance: Covariance | None = None,
    texts: Sequence[str] | None = None,
    target_values: Float[Tensor, "fact d_model"] | None = None,
    prefixes: int = 5,
    steps: int = 25,
    lr: float | int = 0.2,
    overshoot: float | int = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> WeightEdit:
    """Wash facts out of the chosen MLPs: as far as the norm of the change allows, while what text needs stays.

    max_D ||D K_w||_F^2   subject to   tr(D C D^T) = beta tr(C)

    (Large Scale Knowledge Washing, arXiv 2405.16720, section 3), begun at `memit`'s change towards end-of-text. First each
    layer's change is found for all facts, with the strength nearest to `covariance_weight` at which ||D||_F lies in `band` times
    ||W||_F: the norm, not the strength, says how much is changed. Then, layer by layer, the objective is climbed for the
    keys K_w of the facts that are still known, with beta = 1.1 tr(D C D^T) / tr(C); what the model no longer answers
    leaves the set (`eliminate`, one forward pass), and when it is empty the layers above are left as they are.

    `ascent="path"` follows the gradient flow in closed form until the strongest direction has grown `growth` times as much
    as one without keys; its limit has rank one, so more is not better. `"adam"` is the authors' schedule (1,000 steps, rate
    1e-7, back onto the ellipsoid after each), which beside the rescaling moves D by a thousandth; `"off"` keeps the initialisation.
    Everything else is as in `memit`; `retain_weight` adds the retain facts' keys to what is kept.

    Raises `MechunlearnError` as `memit` does, and for a band or growth that is none. Facts about the same subjects, and
    neighbours, pay most: measure them, and compare `memit` with `overshoot` and retain keys (docs/reproductions/law.md). Where
    the band is out of reach (few facts), the card's `trajectory` says so.

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
    watch = Stopwatch()
    _check(covariance_weight, band, ascent, growth, retain_weight)
    work = washing(
        model,
        mask,
        forget,
        retain,
        How(target, position, prefixes, steps, lr, overshoot, batch_size),
        covariance=covariance,
        texts=texts,
        target_values=target_values,
        keep=retain_weight > 0,
        seed=seed,
        progress=progress,
    )
    trajectory: list[dict] = []
    first: dict[int, Tensor] = {}
    with work.undone():
        for layer in work.layers:
            sums, size = work.sums(layer), float(work.weight(layer).norm())
            moment = work.second_moment(layer)
            gram = sums.gram + work.kept(layer, retain_weight)
            norm = Spectrum.of(gram, moment).norms(sums.cross)
            chosen, reached = within_band(norm, covariance_weight, (band[0] * size, band[1] * size))
            first[layer], jitter = solve(chosen * moment + gram, sums.cross)
            entry = {
                "layer": layer,
                "covariance_weight": chosen,
                "norm": float(first[layer].norm()),
                "weight norm": size,
            }
            trajectory.append({**entry, "in band": reached, "jitter": jitter})
            work.add_(layer, first[layer])
    left = torch.arange(len(work.facts))
    with work.undone():
        for layer, entry in zip(work.layers, trajectory):
            entry["known before"] = len(left)
            if not len(left):
                break
            moment = work.second_moment(layer)
            change = first[layer]
            if ascent != "off":
                keys = work.gram(layer, work.edit_prompts.select(left))
                change = _ascended(change.T, keys, moment, ascent, growth).T
            entry["moved"] = float((change - first[layer]).norm() / first[layer].norm().clamp_min(1e-300))
            work.add_(layer, change)
            if eliminate:
                left = remaining(work, left)
        settings = {
            "covariance_weight": float(covariance_weight),
            "band": list(band),
            "ascent": ascent,
            "growth": float(growth),
            "eliminate": eliminate,
            "retain_weight": float(retain_weight),
        }
        stopped = "" if len(left) else "nothing is left"
        return work.edit("mlp_washing", mask, retain, settings, trajectory, watch, seed, stopped)


def _ascended(
    change: Float[Tensor, "d_model unit"],
    gram: Float[Tensor, "unit unit"],
    moment: Float[Tensor, "unit unit"],
    ascent: str,
    growth: float | int,
) -> Float[Tensor, "d_model unit"]:
    """The change after the ascent, on the ellipsoid tr(D C D^T) = 1.1 times what it was."""
    size = BETA * _energy(change, moment)
    if ascent == "path":
        return Spectrum.of(gram, moment).ascended(change, growth) * BETA**0.5
    found = change.clone().requires_grad_()
    optimiser = torch.optim.Adam([found], lr=ADAM_RATE, maximize=True)
    with torch.no_grad():
        for _ in range(ADAM_STEPS):
            found.grad = 2 * found @ gram
            optimiser.step()
            found *= (size / _energy(found, moment).clamp_min(1e-300)).sqrt()
    return found.detach()


def _energy(change: Float[Tensor, "d_model unit"], moment: Float[Tensor, "unit unit"]) -> Float[Tensor, ""]:
    """tr(D C D^T)."""
    return ((change @ moment) * change).sum()


def _check(
    covariance_weight: float | int,
    band: Sequence[float | int],
    ascent: str,
    growth: float | int,
    retain_weight: float | int,
) -> None:
    if covariance_weight <= 0 or retain_weight < 0 or len(band) != 2 or not 0 < band[0] <= band[1]:
        raise MechunlearnError(
            f"Got a covariance_weight of {covariance_weight:g}, a band of {tuple(band)} and a retain weight of {retain_weight:g}. Expected "
            "more than 0, two shares of the weight's norm with the smaller first, and 0 or more."
        )
    if ascent not in ASCENTS or not 1 <= growth < 1e30:
        raise MechunlearnError(
            f"Got ascent='{ascent}' with a growth of {growth:g}. Expected one of {', '.join(ASCENTS)}, and 1 or more."
        )
