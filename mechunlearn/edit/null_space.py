"""AlphaEdit: a closed-form edit that moves nothing in the directions that ordinary text uses."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, eye

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit.closed_form.edit_prompts import EditPrompts
from mechunlearn.edit.closed_form.washing import How, Position, Target, washing
from mechunlearn.edit.goal import Goal
from mechunlearn.edit.remake import editor
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.solve import null_space as directions
from mechunlearn.training.solve import solve

ENERGIES = (0.02, 0.05, 0.1, 0.2, 0.5)


@editor
def null_space(
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
    energy: float | None = None,
    ridge: float = 1.0,
    earlier: Sequence[Prompts] = (),
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
    """Erase or replace facts as `memit` does, with a change confined to the null space of what text uses.

    D_l = R K^T P (K_p K_p^T P + K K^T P + ridge * 1)^-1,   P = U U^T

    (AlphaEdit, arXiv 2410.02355, eq. 14). U are eigenvectors of C = E[k k^T], those of least energy that together
    hold at most the share `energy` of its trace: a relative threshold, where the paper's code has an absolute one
    that depends on model and text. Solved in the projected space, |U| by |U|. Everything else is as in `memit`. Not
    for a model or a mask whose text fills every direction: the card's `trajectory` says how many are left.

    Args:
        model: The model to edit.
        mask: The neurons whose output weights may move; sites other than `mlp.out` are left alone.
        forget: Facts to erase or replace.
        retain: Other facts; only the targets `mean` and `shared` use them.
        target: What the facts' prompts shall be followed by (see `memit`).
        position: The token to act at, `subject last` or `last`.
        efficacy: Least share of the forget facts to edit: they answer the target with `target="targets"`, else they no
            longer give the truth (greedy).
        max_kl: Largest mean KL of the next token on the model's own text, in nats a token.
        min_retention: Least share of the known retain facts to keep.
        energy: Share of C's trace, above 0 and below 1, that the directions of the change may hold. None: the smallest
            of .02, .05, .1, .2 and .5 that reaches `efficacy`; a warning says what else it misses of the goal.
        ridge: Weight of the change's own size.
        earlier: Facts of edits made before on this model. The changes for their keys K_p are held near zero, so that
            edits can follow one another.
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
        New rows of the neurons. The card's `trajectory` has directions, norms and jitter by layer.

    Raises:
        MechunlearnError: As `memit` does, and where no direction is left below the threshold.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> others = toy.prompts(list(range(1, 24)))
    >>> seen = Covariance(toy.model, ["L0.mlp.out"])
    >>> for _ in range(2):
    ...     seen = seen.update(others.tokens, others.lengths)
    >>> edit = null_space(toy.model, mask, toy.prompts([0]), others, covariance=seen, ridge=1e-6)
    >>> with edit.applied(toy.model):
    ...     right = toy.model.forward(others.tokens)[:, -1].argmax(-1) == others.answers[:, 0]
    >>> bool(right.all()), edit.card.trajectory[0]["directions"]
    (True, 9)
    """
    how, keep = How(target, position, prefixes, steps, lr, overshoot, batch_size), False
    work = washing(model, mask, forget, retain, how, covariance, texts, target_values, keep, seed, progress)
    before = [EditPrompts.of(model, prompts, position) for prompts in earlier]

    def made(share: float) -> WeightEdit:
        def solution(layer: int) -> tuple[Tensor, dict[str, Any]]:
            basis = directions(work.second_moment(layer), share)
            if not basis.shape[1]:
                raise MechunlearnError(
                    f"Text uses every direction of the {len(basis)} neurons chosen in layer {layer}: none holds less "
                    f"than {share:g} of the energy. Raise energy=, choose more neurons, or use memit."
                )
            sums = work.sums(layer)
            left = basis.T @ sum((work.gram(layer, prompts) for prompts in before), sums.gram) @ basis
            found, jitter = solve(left + ridge * eye(len(left)).to(left), basis.T @ sums.cross)
            return basis @ found, {"directions": basis.shape[1], "jitter": jitter}

        with work.undone():
            return work.edit(work.solved(solution)[1])

    if energy is not None:
        return made(energy)
    return work.sought(Goal(efficacy, max_kl, min_retention), "energy", ENERGIES, made)
