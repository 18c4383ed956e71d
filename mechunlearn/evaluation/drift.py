"""Side effects on ordinary text: how far an edit moves what the model says next."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.batches import in_batches
from mechunlearn.errors import MechunlearnError
from mechunlearn.metrics.text import encode, padded
from mechunlearn.model.hooked import HookedModel

LOGITS = 1 << 27  # of one batch of texts: half a gigabyte in float32


@torch.no_grad()
def next_token_kl(model: HookedModel, edit: Edit, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, " text"]:
    """Measure how far an edit moves what the model says next, in nats a token.

    The mean over the tokens of a text of KL(p || q) = sum_v p(v) (log p(v) - log q(v)), where p and q are the
    unedited and the edited model's distributions of the token after it (the last token's too). On texts that have
    nothing to do with the forgotten facts it is a side effect, and finer than `text_loss`, in which gains and losses
    cancel.

    Args:
        model: The unedited model; the edit is applied and undone once a batch.
        edit: The edit.
        texts: The texts.
        batch_size: The largest number of texts a batch, whose logits must fit in memory twice.

    Returns:
        One value a text, 0 where nothing moves.

    Raises:
        MechunlearnError: For a model without a tokenizer, a text without a token, or no texts.

    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn import ComponentMask, load_facts, load_model
    >>> model = load_model("factworld")
    >>> facts = load_facts("factworld/sport")
    >>> forget, retain = facts.prompts(model).split(forget=8, retain=8)
    >>> mask = ComponentMask.of(["L1.mlp.out"], model.signature)
    >>> edit = masked_gradient(model, mask, forget, retain, steps=2)
    >>> moved = next_token_kl(model, edit, facts.texts[:4])
    >>> bool((moved > 0).all()), bool((moved < 1).all())
    (True, True)
    """
    encoded = encode(model, tuple(texts))
    if not encoded or not all(encoded):
        lacks = "there are none" if not texts else "the model has no tokenizer" if not encoded else "one has no token"
        raise MechunlearnError(f"Cannot compare what is said after {len(texts)} texts: {lacks}.")
    lengths = torch.tensor([len(ids) for ids in encoded])
    order = lengths.argsort()
    most = LOGITS // (int(lengths.max()) * model.hf.config.get_text_config().vocab_size)

    def moved(rows: Tensor) -> Float[Tensor, " text"]:
        part = [encoded[i] for i in order[rows].tolist()]
        tokens = padded(part)[0]
        before = model.forward(tokens)
        with edit.applied(model):
            after = model.forward(tokens)
        return torch.stack([_kl(p[: len(ids)], q[: len(ids)]) for p, q, ids in zip(before, after, part)]).cpu()

    found = torch.zeros(len(encoded))
    found[order] = torch.cat(in_batches(len(encoded), max(1, min(batch_size, most)), moved))
    return found


def _kl(before: Float[Tensor, "pos d_vocab"], after: Float[Tensor, "pos d_vocab"]) -> Float[Tensor, ""]:
    """Mean KL(before || after) over positions, in nats."""
    p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)
