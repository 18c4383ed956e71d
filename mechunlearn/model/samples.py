"""Ordinary text for a model to keep: what it writes itself."""

import json
import time
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import transformers

from mechunlearn.core.files import cache_folder, whole_file
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.hooked import HookedModel

OPENINGS = (
    *("The", "In", "A", "It", "When", "On", "There", "Many", "After", "I", "We", "This", "For", "One", "If", "They"),
    *("As", "You", "At", "My", "With", "What", "He", "She", "Some", "But", "Most", "To", "From", "By", "How", "All"),
)
BATCH = 32
WORTH = 2.0
"""Seconds: samples that took longer are kept in the user's cache folder."""
_SAMPLED: "WeakKeyDictionary[HookedModel, dict[tuple[str, int, int, int], tuple[str, ...]]]" = WeakKeyDictionary()
"""What each model wrote, as long as the model lives."""


def own_texts(model: HookedModel, count: int = 64, tokens: int = 48, seed: int = 0) -> tuple[str, ...]:
    """Sample ordinary text from a model, at temperature 1, behind common first words.

    Editors hold what the model says on it, and evaluations measure how far that moves. The expected divergence of an
    edited model on the unedited model's own samples needs no corpus. Texts of one seed are the same in a process: they
    are sampled once for each state of the weights. Another seed gives other texts. Samples that took more than two
    seconds are kept in the user's cache folder (`$MECHUNLEARN_CACHE`), so the next process reads them.

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
        path = _file(model, asked)
        kept[asked] = _read(path) or _made(path, model, count, tokens, seed)
    return kept[asked]


def _file(model: HookedModel, asked: tuple[str, int, int, int]) -> Path:
    """Where these samples are kept: the name says of which weights, tokenizer, settings and versions they are."""
    vocabulary = sorted(model.tokenizer.get_vocab().items()) if model.tokenizer is not None else []
    what = [asked, vocabulary, OPENINGS, torch.__version__, transformers.__version__]
    return cache_folder() / "samples" / f"{digest(json.dumps(what))}.json"


def _read(path: Path) -> tuple[str, ...]:
    """The texts of a file that is whole; none otherwise."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        texts = tuple(found["texts"])
        return texts if found["hash"] == digest(*texts) else ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def _made(path: Path, model: HookedModel, count: int, tokens: int, seed: int) -> tuple[str, ...]:
    """Sample texts, and keep them if that took long. A folder that cannot be written to is no reason to stop."""
    began = time.perf_counter()
    texts = _sampled(model, count, tokens, seed)
    if time.perf_counter() - began > WORTH:
        try:
            with whole_file(path) as beside:
                beside.write_text(json.dumps({"texts": texts, "hash": digest(*texts)}) + "\n", encoding="utf-8")
        except (MechunlearnError, OSError):
            pass
    return texts


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
