"""Ordinary text for a model to keep: what it writes itself."""

from weakref import WeakKeyDictionary

import torch

from mechunlearn.errors import MechunlearnError
from mechunlearn.model.hooked import HookedModel

OPENINGS = (
    *("The", "In", "A", "It", "When", "On", "There", "Many", "After", "I", "We", "This", "For", "One", "If", "They"),
    *("As", "You", "At", "My", "With", "What", "He", "She", "Some", "But", "Most", "To", "From", "By", "How", "All"),
)
BATCH = 32
_SAMPLED: "WeakKeyDictionary[HookedModel, dict[tuple[str, int, int, int], tuple[str, ...]]]" = WeakKeyDictionary()
"""What each model wrote, as long as the model lives."""


def own_texts(model: HookedModel, count: int = 64, tokens: int = 48, seed: int = 0) -> tuple[str, ...]:
    """Sample ordinary text from a model, at temperature 1, behind common first words.

    Editors hold what the model says on it, and evaluations measure how far that moves. The expected divergence of an
    edited model on the unedited model's own samples needs no corpus. Texts of one seed are the same in a process: they
    are sampled once for each state of the weights. Another seed gives other texts.

    Args:
        model: The model, as it is now.
        count: How many texts.
        tokens: Tokens that are sampled for each text. A text is shorter where the model ends it.
        seed: Draws them. The random state of torch stays as it is.

    Returns:
        Texts of four or more tokens each. Fewer than `count` if the model ends most texts at once.

    Raises:
        MechunlearnError: For a model without a tokenizer, and one that writes nothing.

    >>> from mechunlearn import load_model
    >>> model = load_model("factworld")
    >>> own_texts(model, count=2, tokens=8) == own_texts(model, count=2, tokens=8)
    True
    """
    kept, asked = _SAMPLED.setdefault(model, {}), (model.fingerprint, count, tokens, seed)
    if asked not in kept:
        kept[asked] = _sampled(model, count, tokens, seed)
    return kept[asked]


def _sampled(model: HookedModel, count: int, tokens: int, seed: int) -> tuple[str, ...]:
    if model.tokenizer is None:
        raise MechunlearnError("A model without a tokenizer writes no text. Give texts.")
    known = [word for word in OPENINGS if model.tokenizer.unk_token_id not in model.tokenizer(word)["input_ids"]]
    if not known:
        raise MechunlearnError(
            f"The tokenizer knows none of {', '.join(OPENINGS[:3])} ... to begin a text with. Give texts."
        )
    asked = [known[i % len(known)] for i in range(count)]
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    cuda = [model.device] if model.device.type == "cuda" else []
    found: list[str] = []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for i in range(0, count, BATCH):
            found += model.generate(asked[i : i + BATCH], max_new_tokens=tokens, **settings)
    texts = tuple(text for text in found if len(model.tokenizer(text)["input_ids"]) >= 4)
    if not texts:
        raise MechunlearnError(
            f"The model ends every text at once: of {count} samples none has four tokens. Give texts."
        )
    return texts
