"""Whether an edit is evaluated on the model and the facts that it was made for."""

import warnings
from collections.abc import Iterable

from mechunlearn.artifacts.weight_edit import Edit, WeightEdit
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel

COLUMNS = ("before", "after", "control")


def check_same(model: HookedModel, edit: Edit, forget: Prompts, retain: Prompts) -> None:
    """Warn of a model or of facts that an edit was not made for, and refuse what makes its numbers meaningless.

    Args:
        model: The unedited model.
        edit: The edit.
        forget: The facts that it removed.
        retain: The facts that were to stay.

    Raises:
        MechunlearnError: If the model is edited already, or a fact is in both sets.
    """
    forget.check_apart(retain)
    made_on = edit.card.model
    if made_on not in ("", model.fingerprint):
        if isinstance(edit, WeightEdit) and edit.signature == model.signature and edit.is_applied(model):
            raise MechunlearnError(
                "The edit is in this model already, so there is no model without it to compare with. Give the model as it "
                "was, and evaluate applies the edit itself."
            )
        warnings.warn(
            f"The edit was made on other weights (fingerprint {made_on}) than this model's ({model.fingerprint}): another "
            "checkpoint, another dtype, or one that was edited since.",
            stacklevel=3,
        )
    for name, given in (("forget", forget), ("retain", retain)):
        if edit.card.sets.get(name) not in (None, given.fingerprint):
            warnings.warn(f"The edit was made with another {name} set than this one.", stacklevel=3)


def check_names(names: Iterable[str]) -> None:
    """Refuse names of further edits that the report's own columns have.

    Args:
        names: The names.

    Raises:
        MechunlearnError: If one of them is taken.
    """
    if taken := sorted(set(names) & set(COLUMNS)):
        raise MechunlearnError(
            f"The name '{taken[0]}' in others= is a column of the report itself ({', '.join(COLUMNS)}). Give another one."
        )
