"""Side effects on ordinary text: how far an edit moves what the model says next."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.batches import in_batches
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.metrics.text import encode, padded, token_losses
from mechunlearn.model.hooked import HookedModel

LOGITS = 1 << 27  # of one batch of texts: half a gigabyte in float32


@steady()
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
    return text_drift(model, {"edited": edit}, texts, batch_size)["edited"]["kl_to_before"]


@steady()
@torch.no_grad()
def text_drift(
    model: HookedModel,
    edits: Mapping[str, Edit | None],
    texts: Sequence[str],
    batch_size: int = 64,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, dict[str, Float[Tensor, " text"]]]:
    """Measure the loss of texts under several edits, and how far each moves what the model says next.

    The unedited model reads each text once, every edit once more, and both numbers come from the same logits.

    Args:
        model: The unedited model; edits are applied and undone once a batch.
        edits: The edits by name; None is the unedited model.
        texts: The texts.
        batch_size: The largest number of texts a batch.
        done: Called with the number of texts each time that so many more are read.

    Returns:
        By the edit's name `loss` (see `text_loss`) and `kl_to_before` (see `next_token_kl`), one value a text.

    Raises:
        MechunlearnError: For a model without a tokenizer, a text without a token, or no texts.

    >>> from mechunlearn import load_model
    >>> found = text_drift(load_model("factworld"), {"before": None}, ["The old bridge opened the cottage."])
    >>> round(float(found["before"]["kl_to_before"]), 6)
    0.0
    """
    encoded = encode(model, tuple(texts))
    if not encoded or not all(encoded):
        lacks = "there are none" if not texts else "the model has no tokenizer" if not encoded else "one has no token"
        raise MechunlearnError(f"Cannot compare what is said after {len(texts)} texts: {lacks}.")
    lengths = torch.tensor([len(ids) for ids in encoded])
    order = lengths.argsort()
    most = LOGITS // (int(lengths.max()) * model.hf.config.get_text_config().vocab_size)

    def read(rows: Tensor) -> Float[Tensor, "edit measure text"]:
        part = [encoded[i] for i in order[rows].tolist()]
        tokens, weight = padded(part)
        before, found = model.forward(tokens), []
        for edit in edits.values():
            if edit is None:
                after = before
            else:
                with edit.applied(model):
                    after = model.forward(tokens)
            loss = (token_losses(after, tokens).cpu() * weight).sum(1) / weight.sum(1)
            moved = torch.stack([_kl(p[: len(ids)], q[: len(ids)]) for p, q, ids in zip(before, after, part)]).cpu()
            found.append(torch.stack([loss, moved]))
        done(len(rows))
        return torch.stack(found)

    values = torch.zeros(len(edits), 2, len(encoded))
    values[:, :, order] = torch.cat(in_batches(len(encoded), max(1, min(batch_size, most)), read), dim=2)
    return {name: {"loss": loss, "kl_to_before": moved} for name, (loss, moved) in zip(edits, values)}


def _kl(before: Float[Tensor, "pos d_vocab"], after: Float[Tensor, "pos d_vocab"]) -> Float[Tensor, ""]:
    """Mean KL(before || after) over positions, in nats."""
    p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)
