"""AlphaEdit: a closed-form edit that moves nothing in the directions that ordinary text uses."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, eye

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.edit.closed_form.edit_prompts import EditPrompts
from mechunlearn.edit.closed_form.washing import How, washing
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.solve import null_space as directions
from mechunlearn.training.solve import solve


def null_space(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    target: str = "end-of-text",
    position: str = "subject last",
    energy: float | int = 0.02,
    ridge: float | int = 1.0,
    earlier: Sequence[Prompts] = (),
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
    """Erase or replace facts as `memit` does, with a change confined to the null space of what text uses.

    D_l = R K^T P (K_p K_p^T P + K K^T P + ridge * 1)^-1,   P = U U^T

    (AlphaEdit, arXiv 2410.02355, eq. 14). U are eigenvectors of C = E[k k^T], those of least energy that together hold at
    most the share `energy` of its trace: a relative threshold, where the paper's code has an absolute one that depends on
    model and text. Solved in the projected space, |U| by |U|. `earlier` lists facts of edits made before on this model:
    the changes for their keys K_p are held near zero, so that edits can follow one another. The retain facts are not
    used, but for `target="mean"`. Everything else is as in `memit`.

    Raises `MechunlearnError` as `memit` does, and where no direction is left below the threshold. Not for a model or a mask
    whose text fills every direction: see the card's `trajectory` for how many are left.

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
    watch = Stopwatch()
    if not 0 < energy < 1 or ridge <= 0:
        raise MechunlearnError(
            f"Got an energy of {energy:g} and a ridge of {ridge:g}. Expected a share between 0 and 1, and more than 0."
        )
    work = washing(
        model,
        mask,
        forget,
        retain,
        How(target, position, prefixes, steps, lr, overshoot, batch_size),
        covariance=covariance,
        texts=texts,
        target_values=target_values,
        keep=False,
        seed=seed,
        progress=progress,
    )
    before = [EditPrompts.of(model, prompts, position) for prompts in earlier]
    trajectory = []
    with work.undone():
        for layer in work.layers:
            basis = directions(work.second_moment(layer), energy)
            if not basis.shape[1]:
                raise MechunlearnError(
                    f"Text uses every direction of the {len(basis)} neurons chosen in layer {layer}: none holds less than "
                    f"{energy:g} of the energy. Raise energy=, choose more neurons, or use memit."
                )
            sums = work.sums(layer)
            gram = sum((work.gram(layer, contexts) for contexts in before), sums.gram)
            left = basis.T @ gram @ basis
            found, jitter = solve(left + ridge * eye(len(left)).to(left), basis.T @ sums.cross)
            change = basis @ found
            trajectory.append(
                {
                    "layer": layer,
                    "directions": basis.shape[1],
                    "norm": float(change.norm()),
                    "weight norm": float(work.weight(layer).norm()),
                    "jitter": jitter,
                }
            )
            work.add_(layer, change)
        settings = {"energy": float(energy), "ridge": float(ridge)}
        return work.edit("null_space", mask, retain, settings, trajectory, watch, seed)
