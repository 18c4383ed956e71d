"""For the README, the docs and doctests: offline, and files go to a temporary folder."""

import importlib
import inspect
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are as many test processes as cores
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)

USED = (
    "transformers.modeling_utils",
    "pandas",
    "plotly.graph_objects",
    "anywidget",
    "typer",
    "rich.progress",
    "sklearn.linear_model",
)


def pytest_collectstart() -> None:
    """Import what the package imports before it: within the package, jaxtyping's hook looks for other bytecode and compiles it all again."""
    for name in USED:
        importlib.import_module(name)


# fmt: off
LONG = {
    "activation_perturbation", "bad_calls", "cli", "cli_dictionary", "codeunlearn", "compare",
    "dictionary_training", "doctor", "evaluation", "explore_page", "extending", "faults", "feature_discovery",
    "jupyter", "law", "mechanistic_unlearning", "plots", "portability", "prompting", "relearning",
    "report_page", "reproduce", "robustness", "same", "soft_prompt", "trainers", "users_models", "washing", "workbench",
    "workflow", "world",
}
# fmt: on
"""Test files that train, start processes or open a browser: `pytest -m fast` leaves them out, and the pages."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks (`--nbmake`) are run with the slow tests; what is not slow, in no long file and needs no real model is fast."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("slow")
        if (
            item.path.suffix == ".py"
            and item.path.stem.removeprefix("test_") not in LONG
            and not any(map(item.get_closest_marker, ("slow", "real")))
        ):
            item.add_marker("fast")


@pytest.fixture
def in_a_temporary_folder(tmp_path, monkeypatch):
    """What an example writes does not land in the checkout; `evaluate` looks at fewer facts, and edits take fewer, smaller steps."""
    from mechunlearn.edit import masked_gradient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mechunlearn.evaluation.cells.LIMIT", 30)
    for name, value in {"steps": 8, "batch_size": 32}.items():
        monkeypatch.setitem(inspect.unwrap(masked_gradient).__kwdefaults__, name, value)
