"""When the units of a dictionary are active: the statistic that discovery, controls and quality are functions of."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.batches import in_batches
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dictionaries import Codebook, Dictionary, check
from mechunlearn.features.places import Model, installed, place
from mechunlearn.metrics.text import encode, padded, text_loss
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.taps import tapped

Texts = Prompts | Sequence[str] | tuple[Tensor, Tensor]
BATCH = 64


def tokenized(model: Model, data: Texts) -> tuple[Int[Tensor, "text pos"], Bool[Tensor, "text pos"]]:
    """Tokenize texts, and say which tokens count: no padding, no beginning or end of text.

    Args:
        model: The model; texts need its tokenizer.
        data: Prompts, texts, or tokens `[text pos]` and lengths `[text]`.

    Returns:
        The tokens, padded on the right, and which of them count.

    Raises:
        MechunlearnError: If there is no text, nothing in it, or no tokenizer for it.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if isinstance(data, Prompts):
        tokens, lengths = data.tokens, data.lengths
    elif isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        tokens, lengths = data
    else:
        texts = (data,) if isinstance(data, str) else tuple(str(text) for text in data)
        if not any(text.strip() for text in texts):
            raise MechunlearnError(
                "The text is empty, so no feature can be told from it. Expected passages on the topic."
            )
        if tokenizer is None or not isinstance(model, HookedModel):
            raise MechunlearnError("This model has no tokenizer: give tokens and their lengths, as two tensors.")
        encoded = encode(model, texts)
        tokens, lengths = padded(encoded)[0], torch.tensor([len(ids) for ids in encoded])
    special = torch.tensor(getattr(tokenizer, "all_special_ids", []), dtype=tokens.dtype)
    counted = (torch.arange(tokens.shape[1]) < lengths[:, None]) & ~torch.isin(tokens, special)
    if not counted.any():
        raise MechunlearnError(
            "The text has no tokens that count, so no feature can be told from it. Expected passages."
        )
    return tokens, counted


def observed(
    model: Model,
    dictionary: Dictionary,
    tokens: Int[Tensor, "text pos"],
    see: Any,
    counted: Bool[Tensor, "text pos"] | None = None,
) -> None:
    """Run a forward pass that ends once the dictionary's hook point has been seen.

    Args:
        model: The model.
        dictionary: The dictionary, of which only the hook point is used.
        tokens: Tokens, padded on the right.
        see: What is called with the activations `[text pos width]`, heads side by side.
        counted: Which tokens count. A module without a layout may look both ways: given this, it attends to no padding.

    Raises:
        MechunlearnError: If the hook point is outside the encoder of an encoder-decoder model.
    """
    name = place(model, dictionary.hook_name)
    if isinstance(model, HookedModel):
        flat = (lambda z: see(z.flatten(-2))) if ".attn." in name else see
        model.decoder.observe(tokens, {name: flat})
        return
    part: Any = model
    module, device = model.get_submodule(name), next(model.parameters()).device
    if getattr(part.config, "is_encoder_decoder", False):
        part = part.get_encoder()
        if module not in part.modules():
            raise MechunlearnError(f"'{name}' is not in the encoder. Expected a hook point such as 'encoder.block.2'.")
    mask = None if counted is None else counted.long().to(device)
    with torch.no_grad(), tapped([(module, "out", see)]):
        part(input_ids=tokens.to(device), attention_mask=mask)


@dataclass(frozen=True, eq=False)
class FiringStatistics:
    """By text and unit: at how many tokens it is active, its summed squares, and its largest activation.

    One pass over any texts; a topic is then a selection of rows, so that discovery on what has been seen costs no
    forward pass. Memory: three numbers for each text and unit.

    Attributes:
        fire_count: The number of tokens at which the unit is active.
        squared: The sum of its squared activations.
        max_activation: Its largest activation.
        tokens: The number of tokens that count.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.features.dictionaries import load_dictionary
    >>> model, codebook = load_model("factworld"), load_dictionary("factworld-codebook")
    >>> seen = FiringStatistics.of(model, codebook, ["The cook baked the soup.", "The knight fought the army."])
    >>> seen.fire_count.shape, seen.select([0]).rates().sum().item()
    (torch.Size([2, 512]), 2.0)
    """

    fire_count: Float[Tensor, "text feature"]
    squared: Float[Tensor, "text feature"]
    max_activation: Float[Tensor, "text feature"]
    tokens: Float[Tensor, " text"]

    @classmethod
    def of(cls, model: Model, dictionary: Dictionary, data: Texts, nearest: int | None = None) -> "FiringStatistics":
        """Collect the statistics in one pass over texts.

        Args:
            model: The model.
            dictionary: A dictionary of this model.
            data: Texts, prompts, or tokens `[text pos]` and lengths `[text]`.
            nearest: How many nearest codes of each group a codebook counts (S'); None counts those it uses.

        Raises:
            MechunlearnError: If the dictionary is of another model, the text is empty, or there are fewer codes than
                asked for.
        """
        check(dictionary, model)
        if nearest is not None and not (
            isinstance(dictionary, Codebook) and 0 < nearest <= dictionary.size // dictionary.groups
        ):
            raise MechunlearnError(
                f"Cannot count the {nearest} nearest of {dictionary}. Expected a codebook and at most its number of "
                "codes "
                "(of one group)."
            )
        tokens, counted = tokenized(model, data)
        widths = counted.long().cumsum(1).argmax(1) + 1

        def part(rows: Tensor) -> tuple[Tensor, ...]:
            found: list[tuple[Tensor, ...]] = []
            cut = int(widths[rows].max())

            def see(h: Tensor) -> None:
                kept = counted[rows, :cut].to(h.device)
                if nearest is not None:
                    assert isinstance(dictionary, Codebook)
                    z = dictionary.counted(dictionary.nearest(dictionary.entering(h), nearest))
                else:
                    z = dictionary.encode(h)
                z = z.detach().float() * kept[..., None]
                found.append(((z > 0).sum(1).float().cpu(), z.square().sum(1).cpu(), z.amax(1).cpu()))

            observed(model, dictionary, tokens[rows, :cut], see, counted[rows, :cut])
            return (rows, *found[0])

        order = widths.argsort()
        parts = in_batches(len(tokens), BATCH, lambda rows: part(order[rows]))
        back = torch.cat([rows for rows, *_ in parts]).argsort()
        with torch.no_grad():
            fire_count, squared, max_activation = (torch.cat([p[i] for p in parts])[back] for i in (1, 2, 3))
        return cls(fire_count, squared, max_activation, counted.sum(1).float())

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Sequence[int] | Tensor) -> "FiringStatistics":
        """Return the statistics of some texts.

        Args:
            rows: Numbers of texts.
        """
        chosen = torch.as_tensor(rows, dtype=torch.long)
        return FiringStatistics(
            *(getattr(self, name)[chosen] for name in ("fire_count", "squared", "max_activation", "tokens"))
        )

    def rates(self) -> Float[Tensor, " feature"]:
        """Return the share of tokens at which each unit is active."""
        return self.fire_count.sum(0) / self.tokens.sum()


def matched_units(
    statistics: FiringStatistics, chosen: Int[Tensor, " unit"], seed: int = 0, among: int = 5
) -> Int[Tensor, " unit"]:
    """Draw as many other units that are active nearly as often: the random control.

    Often used units are taken first, as few others come near them.

    Args:
        statistics: When units are active.
        chosen: The units to match.
        seed: Of the draws.
        among: From how many of the nearest free units each one is drawn.

    Returns:
        The units, in ascending order.

    Raises:
        MechunlearnError: If there are not enough others.

    >>> seen = FiringStatistics(torch.tensor([[9.0, 8.0, 1.0, 1.0]]), *[torch.zeros(1, 4)] * 2, torch.tensor([10.0]))
    >>> matched_units(seen, torch.tensor([0, 2]), among=1)
    tensor([1, 3])
    """
    used = (statistics.fire_count.sum(0) + 1).log()
    free = torch.ones(len(used), dtype=torch.bool)
    free[chosen] = False
    if int(free.sum()) < len(chosen):
        raise MechunlearnError(f"{len(chosen)} of {len(used)} units have no {len(chosen)} others to be matched with.")
    rng, drawn = random.Random(seed), []
    for unit in sorted(chosen.tolist(), key=lambda u: -float(used[u])):
        candidates = free.nonzero().flatten()
        near = candidates[(used[candidates] - used[unit]).abs().argsort(stable=True)[:among]]
        drawn.append(int(near[rng.randrange(len(near))]))
        free[drawn[-1]] = False
    return torch.tensor(sorted(drawn), dtype=torch.long)


def matched_mask(
    statistics: FiringStatistics, mask: ComponentMask, dictionary: Dictionary, seed: int = 0
) -> ComponentMask:
    """Draw a mask of random features or codes that are active as often as those of another mask, by `matched_units`.

    Args:
        statistics: When units of the dictionary are active.
        mask: The mask to match.
        dictionary: The dictionary that it selects from.
        seed: Of the draws.

    Raises:
        MechunlearnError: If the mask is not of this dictionary, or there are not enough others.
    """
    if dictionary.site not in mask.sites:
        raise MechunlearnError(
            f"The mask selects units of {', '.join(mask.sites)}; the dictionary is '{dictionary.site}'."
        )
    chosen = matched_units(statistics, mask.sites[dictionary.site].nonzero().flatten(), seed)
    selected = torch.zeros(dictionary.size, dtype=torch.bool)
    selected[chosen] = True
    return replace(mask, sites={dictionary.site: selected})


def quality(model: HookedModel, dictionary: Dictionary, texts: Sequence[str]) -> dict[str, float]:
    """Measure what a dictionary costs and says, on texts it was not trained on.

    Args:
        model: The model.
        dictionary: A dictionary of this model.
        texts: The texts.

    Returns:
        `tokens`, their number; `explained variance` of the activations by the reconstruction; `loss` of the texts in
        nats a token, and `loss increase` when the reconstruction takes the activation's place (no error term); `L0`,
        units active at a token; `dead share`, units active at none of these tokens.
    """
    check(dictionary, model)
    tokens, counted = tokenized(model, texts)
    n, total, squares, missed = 0, torch.zeros(dictionary.d_model), 0.0, 0.0

    def see(h: Tensor) -> None:
        nonlocal n, total, squares, missed
        kept = h.detach()[mask.to(h.device)]
        gone = kept - dictionary.decode(dictionary.encode(kept)).detach()
        n, total = n + len(kept), total + kept.float().sum(0).cpu()
        squares, missed = squares + float(kept.float().square().sum()), missed + float(gone.float().square().sum())

    for rows in torch.arange(len(tokens)).split(BATCH):
        mask = counted[rows]
        observed(model, dictionary, tokens[rows], see)
    active = FiringStatistics.of(model, dictionary, texts)
    plain = text_loss(model, tuple(texts))
    with (
        torch.no_grad(),
        installed(model, dictionary.hook_name, lambda h: dictionary.decode(dictionary.encode(h)).to(h.dtype)),
    ):
        spliced = text_loss(model, tuple(texts))
    variance = squares - float(total.square().sum()) / n
    return {
        "tokens": float(n),
        "explained variance": round(1 - missed / variance, 4),
        "loss": round(float(plain.mean()), 4),
        "loss increase": round(float((spliced - plain).mean()), 4),
        "L0": round(float(active.rates().sum()), 3),
        "dead share": round(float((active.fire_count.sum(0) == 0).float().mean()), 4),
    }


def swapped(
    texts: Sequence[str], words: Sequence[str], others: Mapping[str, Sequence[str]] | Sequence[str], seed: int = 0
) -> list[str]:
    """Replace a topic's words by unrelated ones in the same sentences: the text to tell a topic's units from.

    A replacement begins with a capital letter where the word did.

    Args:
        texts: The sentences.
        words: The topic's words, replaced wherever they stand as whole words in any case.
        others: The words to draw replacements from, or for each word its own (a noun for a noun).
        seed: Of the draws.

    Raises:
        MechunlearnError: If no text holds any of the words, or a word has no replacement.

    >>> swapped(["The cook baked soup."], ["cook", "baked", "soup"], {"cook": ["knight"], "baked": ["fought"], "soup": ["army"]})
    ['The knight fought army.']
    """
    rng = random.Random(seed)
    if not words:
        raise MechunlearnError("No topic words were given, so nothing can be swapped. Expected words of the topic.")
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})\b", re.IGNORECASE)
    pool = others if isinstance(others, Mapping) else {word.lower(): others for word in words}
    known = {word.lower(): [new for new in replacements if new] for word, replacements in pool.items()}
    bare = [word for word in words if not known.get(word.lower())]
    if bare:
        raise MechunlearnError(f"Nothing is given to take the place of {', '.join(bare[:5])}. Expected words for each.")

    def replaced(found: "re.Match[str]") -> str:
        new = rng.choice(known[found[0].lower()])
        return new[0].upper() + new[1:] if found[0][0].isupper() else new

    made = [pattern.sub(replaced, text) for text in texts]
    if made == list(texts):
        raise MechunlearnError(
            f"None of the words {', '.join(list(words)[:5])} is in the text. Expected words of the topic."
        )
    return made
