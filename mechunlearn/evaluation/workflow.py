"""The whole job in one call: localize, mask, edit, evaluate beside controls, attack, and write everything into one folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.files import whole_folder
from mechunlearn.edit import masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.evaluate import evaluate
from mechunlearn.evaluation.report import Report
from mechunlearn.evaluation.robustness import check_attacks
from mechunlearn.facts.load import load_facts
from mechunlearn.facts.prompts import FactDataset, Prompts
from mechunlearn.localize import attribution_patching, fact_lookup
from mechunlearn.model.hooked import HookedModel, load_model

ATTACKS = ("prompting", "quantization", "unlearning_depth", "relearning")
SHARE = 0.05


@dataclass(frozen=True, eq=False)
class EditedFacts:
    """What `edit_facts` made: the localization, its mask, the edit, and the report; in a notebook it shows the report."""

    found: Localization
    mask: ComponentMask
    edit: WeightEdit
    report: Report

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def save(self, model: HookedModel, folder: str | Path) -> dict[str, Path]:
        """Write mask, edit, edited model and report into a new or empty folder; gives where they are."""
        name = str(self.report.about["facts"]).split("/")[-1]
        files = {
            "mask": f"{name}.mask.json",
            "edit": f"{name}.edit.safetensors",
            "model": "edited",
            "report": "report.html",
        }
        with whole_folder(folder) as beside:
            self.mask.save(beside / files["mask"])
            self.edit.save(beside / files["edit"])
            self.edit.export(model, beside / files["model"])
            self.report.to_html(beside / files["report"], found=self.found, edit=self.edit)
        return {kind: Path(folder) / file for kind, file in files.items()}


def edit_facts(
    facts: str | Path | FactDataset,
    model: str | Path | HookedModel,
    *,
    forget: int | Sequence[str] | None = None,
    attacks: Sequence[str] | str = ATTACKS,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    say: Callable[[str], object] | None = None,
) -> EditedFacts:
    """Make a model believe other answers to some facts, and find out whether the old ones are gone, in one call.

    `facts` is what `load_facts` reads (a table with subject, prompt, answer and perhaps target), `model` a loaded one or what
    `load_model` reads. `forget` are the facts to edit: a number drawn by `seed` (a quarter of them, at most 64, unless given) or
    subjects by name; half of the others are retained, the rest shows what the edit does to facts it never saw. The steps, each a
    function of its own: `fact_lookup` chooses the mask (where it finds no look-up window, `attribution_patching`'s largest units
    of 5 % of the weights), `masked_gradient` trains it towards the edit targets, `evaluate` measures it in every format beside
    a random mask and attribution patching's of the same weight, and `attacks` try to get the truth back ("all" for every one,
    () for none). The model is left as it came: `edit.apply_(model)`, `edit.export(model, folder)` or `save(model, folder)`.

    It uses default settings: how strongly facts are edited depends on the learning rate, and one edit is one seed. To compare
    masks or objectives use `compare`. Raises `MechunlearnError` for facts that cannot be read or fit no model, subjects that
    are not among them, and fewer than two facts.

    >>> from mechunlearn import load_facts, load_model
    >>> model = load_model("factworld")
    >>> few = load_facts("factworld/sport").select(range(48))
    >>> made = edit_facts(few, model, forget=["Surik Belman"], attacks=())  # doctest: +SKIP
    """
    hooked = load_model(model) if isinstance(model, str | Path) else model
    data = facts if isinstance(facts, FactDataset) else load_facts(facts)
    forgotten, retained = _sets(data.prompts(hooked), forget, seed)
    return edit_prompts(
        hooked, forgotten, retained, attacks=attacks, cache=cache, seed=seed, progress=progress, say=say
    )


def edit_prompts(
    model: HookedModel,
    forget: Prompts,
    retain: Prompts,
    *,
    attacks: Sequence[str] | str = (),
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    say: Callable[[str], object] | None = None,
) -> EditedFacts:
    """The same for sets that are chosen already."""
    tell = say or (lambda text: None)
    if attacks:
        check_attacks(attacks)
    attributed = attribution_patching(model, forget)
    try:
        found = fact_lookup(model, forget)
    except MechunlearnError as error:
        tell(f"fact_lookup: {error}")
        found = attributed
    if found.note:
        tell(f"fact_lookup: {found.note}")
    looked_up = len(found.above(0)) > 0 and found is not attributed
    mask = found.above(0) if looked_up else attributed.top(weights=SHARE)
    tell(f"mask: {len(mask)} units, {attributed.share(mask):.2%} of the editable weights")
    tell("editing: one edit a mask, the same settings")
    edit = masked_gradient(model, mask, forget, retain, seed=seed, progress=progress)
    others = {}
    if looked_up:
        rival = attributed.top(weights=attributed.share(mask))
        others["patching"] = masked_gradient(model, rival, forget, retain, seed=seed, progress=progress)
    report = evaluate(
        model,
        edit,
        forget=forget,
        retain=retain,
        others=others,
        attacks=attacks,
        cache=cache,
        seed=seed,
        progress=progress,
    )
    return EditedFacts(found if looked_up else attributed, mask, edit, report)


def _sets(prompts: Prompts, forget: int | Sequence[str] | None, seed: int) -> tuple[Prompts, Prompts]:
    if len(prompts) < 2:
        raise MechunlearnError(f"Cannot edit {len(prompts)} facts: at least one must be left to retain.")
    if forget is None or isinstance(forget, int):
        return prompts.split(forget=max(1, min(64, len(prompts) // 4)) if forget is None else forget, seed=seed)
    wanted = {forget} if isinstance(forget, str) else set(forget)
    assert prompts.facts is not None
    subjects = [fact.subject for fact in prompts.facts]
    if unknown := sorted(wanted - set(subjects)) or ([] if wanted else ["nobody"]):
        raise MechunlearnError(
            f"No fact is about '{unknown[0]}'. Expected subjects of '{prompts.facts.name}', such as '{subjects[0]}'."
        )
    chosen = [i for i, subject in enumerate(subjects) if subject in wanted]
    left = torch.tensor([i for i, subject in enumerate(subjects) if subject not in wanted])
    if not len(left):
        raise MechunlearnError("All facts are to be forgotten: leave out some, so that there is something to retain.")
    left = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))]
    return prompts.select(chosen), prompts.select(left[: max(1, len(left) // 2)])
