"""MEMIT: many facts written into, or erased from, the output weights of a few MLPs by ridge regression."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.edit.closed_form.washing import How, washing
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.solve import solve


def memit(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    target: str = "end-of-text",
    position: str = "subject last",
    covariance_weight: float | int = 20_000,
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
    """Erase facts (`target="end-of-text"`), or replace them (`"targets"`), in one closed-form step a layer.

    D_l = R K^T (covariance_weight * C + K K^T + retain_weight * K_r K_r^T)^-1,   R = (z - h) / (layers left)

    (Mass-Editing Memory, arXiv 2210.07229, eqs. 14 and 20, without the last term). K are the inputs of W_out at the token
    `position` of each forget fact (half the bare prompt, half the mean behind `prefixes` openings of `texts`), h the residual
    stream leaving the mask's last layer there, z its target value, found by `steps` of Adam for many facts at a time
    (`"mean"`: the retain facts' average, no optimisation). C = E[k k^T] over `texts` (by default the forget data set's
    passages), or as given. A larger `covariance_weight` protects text more and edits less; the papers use 15,000 to 100,000. `overshoot`
    moves z that many times as far from h: a ridge falls short of its targets, and 1.5 with a larger strength can forget
    more than 1 with a smaller one, for less damage to text.
    Retain facts matter only with `retain_weight`, which keeps the outputs for their keys.

    Layers are the mask's `mlp.out` sites, lowest first, h measured anew at each; of a partly selected site only the
    chosen neurons' weights change; other sites are left alone. Take the role and layers from a localization
    (`Localization.strongest_role`), not from a table. Facts that the model does not give are skipped, with a warning and
    in the card's `skipped`. Solved in float64; the card's `trajectory` has strength, norms and jitter by layer.

    Raises `MechunlearnError` for a mask without `mlp.out` sites, statistics of another model or of too few tokens, no
    known fact, no subject where the role needs one. It maps no relation apart from others where keys are the same: at the
    subject's last token the subject's other facts change too.

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
    watch = Stopwatch()
    if covariance_weight <= 0 or retain_weight < 0:
        raise MechunlearnError(
            f"Got a covariance_weight of {covariance_weight:g} and a retain weight of {retain_weight:g}. Expected more than 0, and 0 or more."
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
        keep=retain_weight > 0,
        seed=seed,
        progress=progress,
    )
    trajectory = []
    with work.undone():
        for layer in work.layers:
            sums = work.sums(layer)
            left = covariance_weight * work.second_moment(layer) + sums.gram + work.kept(layer, retain_weight)
            change, jitter = solve(left, sums.cross)
            trajectory.append(
                {
                    "layer": layer,
                    "covariance_weight": float(covariance_weight),
                    "norm": float(change.norm()),
                    "weight norm": float(work.weight(layer).norm()),
                    "jitter": jitter,
                }
            )
            work.add_(layer, change)
        settings = {"covariance_weight": float(covariance_weight), "retain_weight": float(retain_weight)}
        return work.edit("memit", mask, retain, settings, trajectory, watch, seed)
