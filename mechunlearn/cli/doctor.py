"""`mechunlearn doctor`: what a model is, what working on it will cost, and which shipped relations it knows."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from mechunlearn.cli.shared import console, open_model
from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mechunlearn.model.hooked import HookedModel

BATCH, LENGTH = 16, 12
"""Facts in the batch that is timed, and tokens of each: those of a short statement."""
SHARE, RANK = 0.05, 8
"""What memory is estimated for: the share of the editable weights in a mask, the rank of adapters."""
GIB = 2**30


def doctor(
    model: Annotated[
        str, typer.Argument(help="What load_model reads: a name, a folder, a .gguf file.", metavar="MODEL")
    ],
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")] = None,
) -> None:
    """Look at a model: family, tokenizer, memory a method needs, seconds a fact, shipped relations that it knows."""
    hooked = open_model(model, device, dtype)
    for name, value in (*_about(hooked), *_tokenizer(hooked.tokenizer), *_speed(hooked), *_memory(hooked)):
        console.print(f"{name:<18} {value}", soft_wrap=True)
    if hooked.tokenizer is None:
        return
    console.print("\nknown facts: the whole answer, by greedy decoding")
    for relation in _relations(model):
        console.print(f"{relation:<24} {_known(hooked, relation)}", soft_wrap=True)


def _about(model: "HookedModel") -> Iterator[tuple[str, str]]:
    signature, config = model.signature, model.hf.config.get_text_config()
    parameters = sum(weight.numel() for weight in model.hf.parameters())
    tied = " (tied embeddings)" if getattr(config, "tie_word_embeddings", False) else ""
    yield "model", f"{model.name}: {type(model.hf).__name__}, {parameters / 1e6:,.1f} million parameters{tied}"
    yield "family", str(signature)
    yield "weights", f"{model.dtype}, on {model.device}".removeprefix("torch.")
    context = getattr(config, "max_position_embeddings", None)
    yield "reads", f"{config.vocab_size:,} tokens" + (f", texts of up to {context:,}" if context else "")


def _tokenizer(tokenizer: "PreTrainedTokenizerBase | None") -> Iterator[tuple[str, str]]:
    if tokenizer is None:
        yield "tokenizer", "none: the model reads tokens only, and facts need text"
        return
    yield "tokenizer", f"{type(tokenizer).__name__}, {'fast' if tokenizer.is_fast else 'slow (written in Python)'}"
    bare, whole = (tokenizer("Oslo", add_special_tokens=added)["input_ids"] for added in (False, True))
    at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    for name, added in (("before a text", whole[:at]), ("after a text", whole[at + len(bare) :])):
        yield name, " ".join(tokenizer.convert_ids_to_tokens(added)) or "nothing"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(" Oslo", add_special_tokens=False)["input_ids"])
    alone = "; a space token apart, so prompt and answer are tokenized in one piece" if pieces[0] in ("▁", "Ġ") else ""
    yield "' Oslo' is", " ".join(pieces) + alone
    pad = tokenizer.pad_token or (tokenizer.eos_token and f"{tokenizer.eos_token} (end of text)") or "token 0"
    yield "pads with", str(pad)
    yield "chat template", "yes" if tokenizer.chat_template else "none"


def _speed(model: "HookedModel") -> Iterator[tuple[str, str]]:
    """A forward pass, and one with its backward pass, on a batch of random tokens."""
    import torch

    from mechunlearn.evaluation.preview import seconds_a_token

    generator, vocabulary = torch.Generator().manual_seed(0), model.hf.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=generator)
    forward, both = (LENGTH * seconds for seconds in seconds_a_token(model, tokens))
    measured = f"measured, {BATCH} facts of {LENGTH} tokens"
    yield "seconds a fact", f"{forward:.3g} forward, {both:.3g} forward and back ({measured})"


def _memory(model: "HookedModel") -> Iterator[tuple[str, str]]:
    from mechunlearn.patching.scores import editable

    weights = sum(weight.numel() * weight.element_size() for weight in model.hf.parameters())
    signature, (_, total) = model.signature, editable(model)
    stream = BATCH * LENGTH * signature.d_model * 4
    inside = BATCH * LENGTH * signature.layers * (12 * signature.d_model + 4 * signature.d_mlp) * 4
    inside += BATCH * model.hf.get_output_embeddings().weight.shape[0] * 4 * 3
    rows = SHARE * total
    adapters = RANK * signature.layers * 7 * (signature.d_model + signature.d_mlp)
    needed = {
        "a localizer": inside,
        "masked_gradient": inside + stream + rows * 5 * 4,
        "fisher_lora": inside + stream + adapters * 4 * 4 + rows * 3 * 4,
        "memit, washing": inside + signature.d_mlp**2 * 3 * 8 + signature.d_model * signature.d_mlp * 2 * 8,
    }
    yield "memory", f"{weights / GIB:.2f} GiB for the weights; estimates for a mask of {SHARE:.0%}, beside the weights:"
    for name, more in needed.items():
        yield f"  {name}", f"{more / GIB:.2f} GiB"
    yield "", "(selected rows in float32 with gradient and Adam's two moments, cached inputs, one batch of activations)"


def _relations(model: str) -> list[str]:
    """The shipped relations: of real facts, or of the shipped world for its own models."""
    from mechunlearn.facts.shipped import shipped_sets
    from mechunlearn.model.load import SHIPPED

    if model in SHIPPED:
        return [f"factworld/{name}" for name in ("sport", "city", "country")]
    sets = shipped_sets()
    return [f"{name}/{relation}" for name, relations in sets.items() for relation in relations]


def _known(model: "HookedModel", relation: str) -> str:
    from mechunlearn.facts.load import load_facts
    from mechunlearn.metrics.answers import answered

    try:
        prompts = load_facts(relation).prompts(model)
    except MechunlearnError as error:
        return f"   cannot be asked: {error}"
    right = answered(model, prompts)
    row = int(right.float().argmax())
    query = prompts.queries[row]
    says = model.generate(query.prompt, max_new_tokens=4)
    shown = f"such as '{query.prompt}' -> '{query.answer}'" if right[row] else f"it says {says!r}"
    return f"{int(right.sum()):>4} of {len(prompts)}, {shown}"
