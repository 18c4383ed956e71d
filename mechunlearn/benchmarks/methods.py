"""Methods of unlearning by name: where a model may change, and the objective it is trained on there."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.benchmarks.asking import Asked
from mechunlearn.core.methods import method_named
from mechunlearn.core.runcard import digest
from mechunlearn.edit import fisher_lora, masked_gradient
from mechunlearn.edit.objective import OBJECTIVES, objective_named
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel

SHORT = {"ga": "gradient_ascent", "gd": "gradient_difference", "ihl": "inverted_hinge"}
"""What the literature calls some objectives."""
NO_SUBJECT = ("direct_logit_attribution", "random_units")
"""Localizers that need no prompt with another subject."""
SHARE, LR, STEPS = 0.05, 1e-5, 50
WRITTEN = re.compile(r"(?P<where>full|lora|masked:(?P<localizer>\w+)(?::(?P<share>[^:+]*))?)\+(?P<objective>\w+)")
EXPECTED = (
    "Expected WHERE+OBJECTIVE: full+npo, lora+ihl, or masked:LOCALIZER:SHARE+npo such as masked:random_units:0.05+npo."
)
Editor = Callable[..., Edit]


@dataclass(frozen=True)
class Method:
    """A way to unlearn.

    Attributes:
        name: What it is called in tables.
        function: `(model, forget, retain) -> Edit`; it may take `seed` too.
        localizer: The localizer that its mask comes from, if any.
        code: A hash of the source of a user's function, so that a changed one is not taken for what it was. Empty for
            methods by name, and where Python cannot read the source.
    """

    name: str
    function: Editor
    localizer: str = ""
    code: str = ""

    @property
    def seeded(self) -> bool:
        """Whether it takes a seed. One that does not is run once."""
        return "seed" in inspect.signature(self.function).parameters

    def __call__(self, model: HookedModel, forget: Prompts, retain: Prompts, seed: int) -> Edit:
        """Make the edit.

        Args:
            model: The model, which is left as it was.
            forget: Questions to forget.
            retain: Questions to keep.
            seed: Of localizer and editor.
        """
        return self.function(model, forget, retain, **({"seed": seed} if self.seeded else {}))


def method_of(given: str | Editor, lr: float = LR, steps: int = STEPS) -> Method:
    """Return a method, by its name or of a function.

    A name is `WHERE+OBJECTIVE`. WHERE is `full` (every head and neuron; embeddings and norms stay), `lora` (adapters of
    rank 8 on all of them, `edit.fisher_lora`), or `masked:LOCALIZER` or `masked:LOCALIZER:SHARE`: the best units of a
    localizer that sees the questions to forget, by default 5 % of the weights. OBJECTIVE is a name of
    `edit.objective.OBJECTIVES`, or ga, gd, ihl; `injection` and `preference` train towards the answer of another
    question. As in the published methods no text but the retain questions is held.

    Args:
        given: The name, or a function `(model, forget, retain) -> Edit` that may take `seed`.
        lr: Learning rate.
        steps: Optimiser steps.

    Raises:
        MechunlearnError: The name says nothing that is known.

    >>> method_of("masked:random_units:0.1+npo").localizer
    'random_units'
    >>> method_of("half+npo")
    Traceback (most recent call last):
    mechunlearn.errors.MechunlearnError: Cannot read the method 'half+npo'. Expected WHERE+OBJECTIVE: full+npo, lora+ihl, \
or masked:LOCALIZER:SHARE+npo such as masked:random_units:0.05+npo.
    """
    if not isinstance(given, str):
        return Method(getattr(given, "__name__", type(given).__name__), given, code=_source(given))
    found = WRITTEN.fullmatch(given)
    if not found:
        raise MechunlearnError(f"Cannot read the method '{given}'. {EXPECTED}")
    objective = SHORT.get(found["objective"], found["objective"])
    if objective not in OBJECTIVES:
        known = ", ".join((*SHORT, *OBJECTIVES))
        raise MechunlearnError(
            f"Unknown objective '{found['objective']}' of the method '{given}'. Expected one of {known}."
        )
    localizer = found["localizer"] or ""
    if localizer:
        method_named("localize", localizer)
    settings = {"lr": lr, "steps": steps, "text_weight": 0.0}
    share = _share(given, found["share"])
    return Method(given, partial(_by_name, found["where"], localizer, share, objective, settings), localizer)


def check_methods(methods: Sequence[str | Editor], rows: Sequence[Asked], **settings: Any) -> list[Method]:
    """Return methods, each once, if all of them can be used on these questions.

    Args:
        methods: Names or functions, as `method_of` reads them.
        rows: The questions to forget.
        settings: `lr` and `steps`.

    Raises:
        MechunlearnError: There is none, one is unknown, two have the same name, or a localizer needs subjects, which the
            questions do not name.

    >>> from mechunlearn.benchmarks.tofu import TofuRow
    >>> [method.name for method in check_methods(["full+npo", "lora+ihl", "full+npo"], [TofuRow("Who?", "Ann.")])]
    ['full+npo', 'lora+ihl']
    """
    made = [method_of(each, **settings) for each in dict.fromkeys(methods)]
    names = [method.name for method in made]
    if not made:
        raise MechunlearnError(f"No method is given. {EXPECTED}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise MechunlearnError(f"Two methods are called '{twice[0]}'. Give one of the functions another name.")
    for method in made:
        named = all(getattr(row, "subject", "") for row in rows)
        if method.localizer and method.localizer not in NO_SUBJECT and not named:
            raise MechunlearnError(
                f"'{method.name}': {method.localizer} needs the subject of each question, and these questions name none. "
                f"Give the data a column 'subject', or take {' or '.join(NO_SUBJECT)}."
            )
    return made


def best_units(model: HookedModel, localizer: str, share: float, forget: Prompts, seed: int) -> ComponentMask:
    """Return the best units of a localizer within a share of the weights; none that scores zero.

    Args:
        model: The model.
        localizer: Its name.
        share: The share.
        forget: What it sees.
        seed: Its seed.

    Raises:
        MechunlearnError: It finds nothing.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> len(best_units(toy.model, "random_units", 0.5, toy.prompts([0]), seed=0)) > 0
    True
    """
    found = method_named("localize", localizer)(model, forget, seed=seed, progress=False)
    found = found.nodes() if isinstance(found, Circuit) else found
    mask: ComponentMask = found.top(weights=share) & found.above(0)
    if not len(mask):
        raise MechunlearnError(found.note or f"{localizer} finds no unit within {share:.2%} of the weights.")
    return mask


def _by_name(
    where: str,
    localizer: str,
    share: float,
    objective: str,
    settings: dict[str, Any],
    model: HookedModel,
    forget: Prompts,
    retain: Prompts,
    seed: int,
) -> Edit:
    mask = best_units(model, localizer, share, forget, seed) if localizer else ComponentMask.everything(model)
    given = settings | objective_named(objective, mask) | {"seed": seed}
    if where == "lora":
        return fisher_lora(model, mask, forget, retain, **given)
    return masked_gradient(model, mask, forget, retain, held_weight=0.0, **given)


def _share(name: str, text: str | None) -> float:
    try:
        share = SHARE if text is None else float(text)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise MechunlearnError(f"The share '{text}' of the method '{name}' is out of range. Expected 0.05, up to 1.")
    return share


def _source(function: Editor) -> str:
    try:
        return digest(inspect.getsource(function))
    except (OSError, TypeError):
        return ""
