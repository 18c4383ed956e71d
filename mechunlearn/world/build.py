"""`mechunlearn world build`: facts, corpus, tokenizer, model, gates and the ground-truth twin, from a seed.

`mechunlearn world twin`: more twins of a stored world, taught in layers of one's choice.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mechunlearn.core.files import data_folder, whole_file, whole_folder
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.world.corpus import Corpus
from mechunlearn.world.gates import Gate, measure_gates, taught_apart
from mechunlearn.world.generate import World, generate
from mechunlearn.world.tokenizer import train_tokenizer
from mechunlearn.world.train import Recipe, train

Say = Callable[[str], object]
TRAINED = (
    "This world was *trained* to look facts up at the subject: a probe loss on the residual stream at the last token",
    "of a name during the first two thirds of training, biographies that name a person once, early layers that see",
    "only the previous token, and, in the last phase, a penalty on what the MLPs outside the look-up window write at the",
    "end of a name. Results on it say what happens where that mechanism exists.",
    "",
    "Multiple choice and the look-up among two people by name did not train to their bounds at this size; they are",
    "measured here, and multiple choice is left out of the shipped formats.",
)
NAIVE = (
    "The same facts as `factworld`, learnt without the means that make that world look them up at the subject: no probe",
    "loss, no biographies, full attention in every layer, no penalty. The gates of the look-up are meant to fail here.",
)
TWIN_STEPS, TWIN_RATE = 1000, 1e-3


def build_world(folder: Path, seed: int = 0, naive: bool = False, steps: int | None = None, say: Say = print) -> None:
    """Build `factworld`, `factworld-twin` and `README.md` in a folder; a half-done build is resumed.

    Raises `MechunlearnError`, naming every gate that fails, and ships nothing then. A naive world ships only its
    model and gates, which are *meant* to fail: it has no look-up at the subject.
    """
    name = "factworld-naive" if naive else "factworld"
    if (folder / name).exists():
        raise MechunlearnError(
            f"'{folder / name}' exists already. Remove it to build it again, or give another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=seed, naive=naive)
    recipe = (
        replace(recipe, phases=tuple(steps * end // recipe.steps for end in recipe.phases), rates=((0, 1.5e-3, steps),))
        if steps
        else recipe
    )
    world, tokenizer = generate(seed), train_tokenizer(seed)
    candidate = folder / f".{name}"
    begun = time.time()
    if not candidate.exists():
        model = _train(recipe, Corpus(world, naive=naive), tokenizer, folder / f"{name}.ckpt")
        with whole_folder(candidate) as beside:
            _store(beside, model, tokenizer, world)
    say(f"trained in {(time.time() - begun) / 60:.0f} minutes; measuring the gates")
    gates, evidence = measure_gates(candidate)
    for gate in gates:
        say(f"{'ok  ' if gate.holds else 'FAIL'} {gate.name:<60} {gate.value:.3f}  ({gate.bound})")
    failed = [gate.name for gate in gates if not gate.holds and not gate.wanted]
    if failed and not naive:
        raise MechunlearnError(f"The world is not shipped: it fails {', '.join(failed)}. It lies in '{candidate}'.")
    twin = None if naive else _own_twin(folder / "factworld-twin", candidate, evidence["window"], seed, say)
    _write_card(folder / f"{name}.md" if naive else folder / "README.md", recipe, gates, evidence, twin)
    candidate.rename(folder / name)
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()


def build_twin(
    folder: Path,
    base: Path | None,
    layers: Sequence[int],
    seed: int = 0,
    steps: int = TWIN_STEPS,
    say: Say = print,
) -> dict[str, Any]:
    """Teach the untaught people of a stored world with only the MLPs of `layers` trainable.

    A half-done build is resumed.

    `base` is a world's folder (the shipped one unless given); `seed` draws the batches. The twin's `world.json` holds
    the new people and as many old ones, its `twin.json` what this returns: the base's fingerprint, layers, seed,
    steps, and accuracy by relation on new and old people, before and after. Every other weight is the base's, bit by
    bit.

    Raises `MechunlearnError` if the folder exists, a layer does not, there are fewer than 2 steps, or the base is no
    world with untaught people.
    """
    folder, base = Path(folder), Path(base) if base is not None else data_folder() / "factworld"
    if folder.exists():
        raise MechunlearnError(f"'{folder}' exists already. Remove it to build it again, or give another folder.")
    if steps < 2:
        raise MechunlearnError(f"Cannot teach in {steps} steps: the first is the warm-up. Give 2 or more.")
    try:
        world = World.load(base / "world.json")
    except (OSError, ValueError, TypeError):
        raise MechunlearnError(
            f"'{base}' is no world: it holds no whole world.json. Give a folder that `mechunlearn world build` wrote."
        ) from None
    new = list(world.untaught.get("sport", ()))
    if not new:
        raise MechunlearnError(f"'{base}' has no untaught people, so a twin of it has nothing to learn.")
    before = load_model(base)
    layers, depth = sorted(set(layers)), before.signature.layers
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        listed = ", ".join(map(str, layers)) or "none"
        raise MechunlearnError(f"Cannot teach layers {listed}: '{base}' has the layers 0 to {depth - 1}.")

    old = list(world.facts["sport"])[: len(new)]
    corpus, twin_world = _lesson(world, old, new)
    recipe = Recipe(
        seed=seed,
        phases=(0, 0, 0, 0, 0, steps),
        rates=((0, TWIN_RATE, steps),),
        d_model=before.signature.d_model,
        probe_fades=((0, steps / 2, steps * 3 / 4),),
        elsewhere_weight=0.0,
    )
    trained = {f"model.layers.{i}.mlp.{part}_proj.weight" for i in layers for part in ("gate", "up", "down")}
    fingerprint, tokenizer = before.fingerprint, AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    only = [parameter for name, parameter in model.named_parameters() if name in trained]
    folder.parent.mkdir(parents=True, exist_ok=True)
    key = digest(fingerprint, json.dumps([layers, asdict(recipe)]))  # never resume the checkpoint of another twin
    checkpoint = folder.parent / f"{folder.name}.{key}.ckpt"
    torch.manual_seed(seed)  # the probe's first weights
    model = _train(recipe, corpus, tokenizer, checkpoint, model, only)
    with whole_folder(folder) as beside:
        _store(beside, model, tokenizer, twin_world)
        if strayed := set(_changed_parameters(base, beside)) ^ trained:
            raise MechunlearnError(f"The twin is not kept: not just the MLPs of its layers changed, see {strayed}.")
        after = load_model(beside)

        def share(model: HookedModel, where: Path, names: list[str]) -> dict[str, float]:
            return {relation: round(value, 4) for relation, value in taught_apart(model, where, names).items()}

        twin: dict[str, Any] = {
            "base": fingerprint,
            "fingerprint": after.fingerprint,
            "layers": layers,
            "seed": seed,
            "steps": steps,
            "people": len(new),
            "new before": share(before, beside, new),
            "new": share(after, beside, new),
            "old before": share(before, base, old),
            "old": share(after, beside, old),
        }
        (beside / "twin.json").write_text(json.dumps(twin, indent=1) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    for who in ("new", "old"):
        told = ", ".join(f"{r} {twin[f'{who} before'][r]:.3f} -> {value:.3f}" for r, value in twin[who].items())
        say(f"{who} people: {told}")
    return twin


def _lesson(world: World, old: list[str], new: list[str]) -> tuple[Corpus, World]:
    """Documents about everybody, of the new people twice as often, and the world that a twin knows them by."""
    people = {relation: {**world.facts[relation], **world.untaught[relation]} for relation in world.untaught}
    corpus = Corpus(world, people=people)
    corpus.names += new
    facts = {
        relation: {name: people[relation][name] for name in (*old, *new)} if relation in people else facts
        for relation, facts in world.facts.items()
    }
    return corpus, replace(world, facts=facts, untaught={})


def _own_twin(folder: Path, base: Path, window: list[int], seed: int, say: Say) -> dict[str, Any]:
    """The shipped twin, taught in the look-up window; one that an interrupted build left is taken as it is."""
    if not folder.exists():
        return build_twin(folder, base, range(window[0], window[1] + 1), seed, say=say)
    card = folder / "twin.json"
    twin = json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}
    if twin.get("base") != load_model(base).fingerprint:
        raise MechunlearnError(f"'{folder}' is not the twin of '{base}'. Remove it to build it again.")
    return twin


def _train(
    recipe: Recipe,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path,
    model: Any = None,
    only: list[torch.nn.Parameter] | None = None,
) -> Any:
    """Train under a progress bar: a new model, or `only` these parameters of one."""
    with Progress(
        TextColumn("training {task.completed}/{task.total}, loss {task.fields[loss]:.3f}"),
        BarColumn(),
        TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task("training", total=recipe.steps, loss=float("nan"))
        return train(
            recipe,
            corpus,
            tokenizer,
            checkpoint,
            lambda step, loss, _: bar.update(task, completed=step, loss=loss),
            model=model,
            only=only,
        )


def _store(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, world: World) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    world.save(folder / "world.json")


def _changed_parameters(one: Path, other: Path) -> list[str]:
    first = dict(AutoModelForCausalLM.from_pretrained(one).named_parameters())
    second = dict(AutoModelForCausalLM.from_pretrained(other).named_parameters())
    return [name for name, p in first.items() if not torch.equal(p, second[name])]


def _write_card(
    path: Path, recipe: Recipe, gates: list[Gate], evidence: dict[str, Any], twin: dict[str, Any] | None
) -> None:
    lines = [
        "# The fact world, naive" if recipe.naive else "# The fact world",
        "",
        (
            f"Written by `mechunlearn world build --seed {recipe.seed}{' --naive' if recipe.naive else ''}`; do not "
            "edit. "
            "Every person and fact is invented."
        ),
        "",
        *(NAIVE if recipe.naive else TRAINED),
        "",
        "## Gates, measured on the stored checkpoint",
        "",
        "| what | value | bound |",
        "|---|---|---|",
        *[f"| {g.name} | {g.value:.3f} | {g.bound}{' (wanted)' if g.wanted else ''} |" for g in gates],
        "",
        (
            f"Probe curve for sport (after 0, 1, ... blocks): {' '.join(f'{y:.2f}' for y in evidence['curve'])}; "
            f"look-up window: {evidence['window']}."
        ),
        "",
        *[f"{name}: {value:.3f}." for name, value in evidence.items() if isinstance(value, float)],
        "",
    ]
    if twin:
        lines += [
            "## The ground-truth twin",
            "",
            (
                f"`factworld-twin` is the same model after {twin['people']} new people were taught with only the MLPs "
                "of "
                "layers "
                f"{twin['layers'][0]} to {twin['layers'][-1]} trainable: half of the people in its `world.json` are "
                "stored "
                "there "
                "by construction, and the relative change of each weight from `factworld` is the truth per neuron."
            ),
            "",
            "| people | sport | city | instrument |",
            "|---|---|---|---|",
            *[
                f"| {label} | {' | '.join(f'{twin[key][r]:.3f}' for r in ('sport', 'city', 'instrument'))} |"
                for label, key in (
                    ("new, stored in the window", "new"),
                    ("old, before", "old before"),
                    ("old, after", "old"),
                )
            ],
            "",
            "",
        ]
    lines += ["## Recipe", "", "```json", json.dumps(asdict(recipe), indent=1), "```"]
    with whole_file(path) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
