"""A method is one file: a localizer, an editor and an attack in a folder of one's own are found everywhere, by name alone."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mechunlearn.core.methods import CALLED_WITH, methods

ROOT = Path(__file__).parents[1]
LOCALIZER = '''
"""Toy."""
import torch
from mechunlearn.artifacts.localization import Localization
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.scores import localization, localizer


@localizer
def toy_scores(
    model: HookedModel, prompts: Prompts, *, first: int = 3, seed: int = 0, progress: bool | None = None
) -> Localization:
    """Score the first neurons of the first MLP."""
    return localization(model, {"L0.mlp.out": (torch.arange(model.signature.d_mlp) < first).float()})
'''
EDITOR = '''
"""Toy."""
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel


def toy_silence(
    model: HookedModel, mask: ComponentMask, forget: Prompts, retain: Prompts, *, seed: int = 0
) -> WeightEdit:
    """Switch the selected units off."""
    units = {site: chosen.nonzero().flatten() for site, chosen in mask.sites.items() if chosen.any()}
    rows = {site: 0 * model.rows(site)[at] for site, at in units.items()}
    return WeightEdit(units, rows, model.signature, RunCard("toy_silence", model=model.fingerprint, seed=seed))
'''
ATTACK = '''
"""Toy."""
import pandas as pd
from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel


def toy_attack(
    model: HookedModel, edit: Edit | None, forget: Prompts, retain: Prompts, *, seed: int = 0
) -> pd.DataFrame:
    """Do nothing."""
    return pd.DataFrame()
'''
HELPER = '"""No method: no function of this name."""\n\ndef something_else() -> None: ...\n'
SCRIPT = """
import importlib, json, sys
from pathlib import Path

for folder in ("localize", "edit", "attack"):
    importlib.import_module(f"mechunlearn.{folder}").__path__.append(f"toys/{folder}")

import mechunlearn as mu
found = {folder: [name for name in dir(getattr(mu, folder)) if name.startswith("toy")] for folder in ("localize", "edit", "attack")}
found["function"] = mu.localize.toy_scores.__name__
from mechunlearn.localize import toy_scores
from mechunlearn.core.methods import ready_methods
found["ready"] = [name for folder in ("localize", "edit", "attack") for name in ready_methods(folder) if name.startswith("toy")]

sys.path.insert(0, sys.argv.pop(1))
import hooks
found["nav"] = hooks.with_pages([{"Methods": [{title: []} for title in hooks.SECTIONS]}])

from mechunlearn.evaluation.compare import check_grid
found["compare"] = check_grid(["toy_scores"], ["npo"], [0.05], 1, [1e-3], [1], 1)["localizers"]
from mechunlearn.evaluation.robustness import check_attacks
found["attacks"] = "toy_attack" in check_attacks("all")
from mechunlearn.explore import Workbench
from mechunlearn.world.toy import planted_facts
toy = planted_facts()
bench = Workbench(toy.model, toy.prompts([0, 1]))
view = bench.act({"do": "choose", "method": "toy_scores"})
found["menu"], found["map"] = "toy_scores" in view["methods"], view["heat"]["values"]

from mechunlearn.cli.main import main
def run(*given):
    sys.argv = ["mechunlearn", *given]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, given
few = ["factworld", "factworld/sport", "--forget", "4", "--seed", "2"]
run("localize", "--help")
run("localize", *few, "--method", "toy_scores", "-o", "toy.mask.json", "--scores", "toy.json")
run("edit", *few[:2], "toy.mask.json", *few[2:], "--method", "toy_silence", "-o", "toy.safetensors")
Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a process sees that has three methods more, each in a file of its own."""
    here = tmp_path_factory.mktemp("extended")
    for folder, name, text in (
        ("localize", "toy_scores", LOCALIZER),
        ("localize", "toy_helper", HELPER),
        ("edit", "toy_silence", EDITOR),
        ("attack", "toy_attack", ATTACK),
    ):
        (here / "toys" / folder).mkdir(parents=True, exist_ok=True)
        (here / "toys" / folder / f"{name}.py").write_text(text)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(ROOT / "docs")], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return here, json.loads((here / "found.json").read_text()), done.stdout


def test_it_is_listed_and_given_by_its_folder(found):
    _, seen, _ = found
    assert (seen["localize"], seen["edit"], seen["attack"]) == (["toy_scores"], ["toy_silence"], ["toy_attack"])
    assert seen["function"] == "toy_scores" and seen["ready"] == ["toy_scores", "toy_silence", "toy_attack"]


def test_it_is_in_the_navigation_of_the_docs(found):
    sections = found[1]["nav"][0]["Methods"]
    for section, name in zip(sections, ("toy_scores", "toy_silence", "toy_attack"), strict=True):
        assert {name: f"methods/{name}.md"} in next(iter(section.values()))


def test_it_is_compared_attacked_with_and_in_the_menu(found):
    _, seen, _ = found
    assert seen["compare"] == ["toy_scores"] and seen["attacks"] and seen["menu"]
    assert seen["map"] == [[3.0, None]], "of three neurons in the first of two layers"


def test_the_command_line_names_it_and_runs_it(found):
    from mechunlearn import ComponentMask, Localization
    from mechunlearn.artifacts.weight_edit import WeightEdit

    here, _, out = found
    assert "toy_scores" in out and "toy_helper" not in out
    mask = ComponentMask.load(here / "toy.mask.json")
    assert [str(component) for component in mask] == [f"L0.mlp.out[{unit}]" for unit in range(3)]
    card = Localization.load(here / "toy.json").card
    assert (card.method, card.seed, card.settings) == ("toy_scores", 2, {"first": 3})
    edit = WeightEdit.load(here / "toy.safetensors")
    assert edit.card.method == "toy_silence" and edit.mask == mask and edit.card.seed == 2


@pytest.mark.parametrize("folder", CALLED_WITH)
def test_type_checkers_see_every_method(folder):
    """They cannot walk: each method has one line in a block that nothing else reads."""
    file = Path(importlib.import_module(f"mechunlearn.{folder}").__file__ or "")
    block = next(node for node in ast.parse(file.read_text()).body if isinstance(node, ast.If))
    lines = [ast.unparse(node) for node in block.body]
    missing = [
        line
        for name in methods(folder)
        if (line := f"from mechunlearn.{folder}.{name} import {name} as {name}") not in lines
    ]
    assert not missing, f"add to {file}: {missing}"
    named = [line for line in lines if line.split(" import ")[0].endswith(line.split()[-1])]
    assert len(named) == len(methods(folder))
