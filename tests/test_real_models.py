"""Language models that others trained: SmolLM2 and Gemma 3, read from GGUF files of Python packages."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechunlearn.model.gguf import packaged

pytestmark = pytest.mark.real


@pytest.fixture(params=["smollm2", "gemma3"])
def real(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def test_logits_are_those_of_plain_transformers(real):
    folder = packaged(real.name)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
    assert torch.equal(real("The capital of France is"), plain(**ids).logits)
