"""MEMIT: many facts written into, or erased from, the output weights of a few MLPs by ridge regression."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit.closed_form.washing import WEIGHTS, How, Position, Target, washing
from mechunlearn.edit.goal import Goal
from mechunlearn.edit.remake import editor
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.solve import solve


@editor
def memit(
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
    """Erase facts (`target="end-of-text"`), or replace them (`"targets"`), in one closed-form step a layer.

    D_l = R K^T (covariance_weight * C + K K^T + retain_weight * K_r K_r^T)^-1,   R = (z - h) / (layers left)

    (Mass-Editing Memory, arXiv 2210.07229, eqs. 14 and 20, without the last term). K are the inputs of W_out at the
    token `position` of each forget fact (half the bare prompt, half the mean behind prefixes), h the residual stream
    leaving the mask's last layer there, z its target value, C = E[k k^T] over text. Layers are the mask's `mlp.out`
    sites, lowest first, h measured anew at each; of a partly selected site only the chosen neurons' weights change.
    Facts that the model does not give are skipped, with a warning and in the card's `skipped`. Solved in float64.

    It tells no relation from others where keys are the same: at the subject's last token the subject's other facts
    change too. 1.5 as `overshoot` with a larger `covariance_weight` can forget more than 1 with a smaller one, for
    less damage to text.

    Args:
        model: The model to edit.
        mask: The neurons whose output weights may move; sites other than `mlp.out` are left alone.
        forget: Facts to erase or replace.
        retain: Facts to hold; they matter with `retain_weight`, and for the targets `mean` and `shared`.
        target: What the facts' prompts shall be followed by: `end-of-text`, `targets` (each fact's own wrong answer),
            `shared` (end-of-text, one value for all facts), or `mean` (the retain facts' average, no search).
        position: The token to act at, `subject last` or `last`. Take it, and the layers, from a localization
            (`Localization.strongest_role`), not from a table.
        efficacy: Least share of the forget facts to edit: they answer the target with `target="targets"`, else they no
            longer give the truth (greedy).
        max_kl: Largest mean KL of the next token on the model's own text, in nats a token.
        min_retention: Least share of the known retain facts to keep.
        covariance_weight: Weight of C. A larger one protects text more and edits less; the papers use 15,000 to
            100,000 for thousands of facts. None: the largest of 20,000, 2,000, ... 2 that reaches `efficacy`; a
            warning says what else it misses of the goal.
        retain_weight: Weight of the retain facts' keys K_r, whose outputs are kept.
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
        New rows of the neurons. The card's `trajectory` has weight, norms and jitter by layer.

    Raises:
        MechunlearnError: For a mask without `mlp.out` sites, statistics of another model or of too few tokens, no known
            fact, no subject where the position needs one, and numbers out of range.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out[0]"], toy.model.signature)
    >>> prompts = toy.prompts()
    >>> seen = Covariance(toy.model, ["L0.mlp.out"]).update(prompts.tokens, prompts.lengths)
    >>> settings = {"covariance": seen, "covariance_weight": 1e-6, "target": "shared"}
    >>> edit = memit(toy.model, mask, toy.prompts([0]), toy.prompts([1, 2]), **settings)
    >>> with edit.applied(toy.model):
    ...     right = toy.model.forward(prompts.tokens)[:, -1].argmax(-1) == prompts.answers[:, 0]
    >>> bool(right[0]), bool(right[1:].all())
    (False, True)
    """
    how, keep = How(target, position, prefixes, steps, lr, overshoot, batch_size), retain_weight > 0
    work = washing(model, mask, forget, retain, how, covariance, texts, target_values, keep, seed, progress)

    def made(weight: float) -> WeightEdit:
        def solution(layer: int) -> tuple[Tensor, dict[str, Any]]:
            sums = work.sums(layer)
            left = weight * work.second_moment(layer) + sums.gram + work.kept(layer, retain_weight)
            change, jitter = solve(left, sums.cross)
            return change, {"covariance_weight": float(weight), "jitter": jitter}

        with work.undone():
            return work.edit(work.solved(solution)[1])

    if covariance_weight is not None:
        return made(covariance_weight)
    return work.sought(Goal(efficacy, max_kl, min_retention), "covariance_weight", WEIGHTS, made)
