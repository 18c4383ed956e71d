"""For the README, the docs and doctests: offline, and files go to a temporary folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest


@pytest.fixture
def in_a_temporary_folder(tmp_path, monkeypatch):
    """What an example writes does not land in the checkout, and `evaluate` looks at fewer facts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mechunlearn.evaluation.LIMIT", 30)
