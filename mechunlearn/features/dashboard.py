"""Looking at a dictionary: which tokens and contexts activate a feature or code, and which words it raises and lowers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.batches import in_batches
from mechunlearn.core.files import whole_file
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.dictionaries import SAE, Codebook, Dictionary, check
from mechunlearn.features.feature_edit import feature_units
from mechunlearn.features.firing import Texts, observed, tokenized
from mechunlearn.features.places import Model
from mechunlearn.model.hook_points import layer_of
from mechunlearn.model.hooked import HookedModel

BATCH, SHOWN = 32, 10
WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "attn_projected", "mlp_out")
CONTROLS = {i: 0x2400 + i for i in range(32)} | {ord("\n"): "↵"}  # as pictures
COLUMNS = ["unit", "rate", "activation", "text", "position", "token", "context"]


@dataclass(frozen=True, eq=False)
class Exploration:
    """What `explore_dictionary` found in a dictionary, and in a notebook a view of it.

    Attributes:
        table: One row for each unit and example (see `explore_dictionary`).
        effects: The words that each unit raises and lowers.
        rates: The share of tokens at which each unit that was looked at is active, if ever.
        contexts: For each row of `table` the tokens before its own, and those from its own on, each with the unit's
            activation there.
        dictionary: The dictionary, in words.
    """

    table: pd.DataFrame
    effects: pd.DataFrame
    rates: dict[int, float]
    contexts: list[tuple[list[tuple[str, float]], list[tuple[str, float]]]]
    dictionary: str

    def to_frame(self) -> pd.DataFrame:
        """Return the table: one row for each unit and example."""
        return self.table

    def to_html(self, path: str | Path) -> None:
        """Write the view as one file that needs no network.

        Args:
            path: The file.
        """
        with whole_file(path) as beside:
            beside.write_text(_PAGE.render(view=self._repr_html_(), title=self.dictionary), encoding="utf-8")

    def __repr__(self) -> str:
        return f"Exploration({len(self.rates)} units, {len(self.table)} examples, {self.dictionary})"

    def _repr_html_(self) -> str:
        cards = []
        for unit, rate in self.rates.items():
            rows = self.table[self.table.unit == unit]
            examples = [
                (value, text, at, *self.contexts[i])
                for i, value, text, at in zip(rows.index, rows.activation, rows.text, rows.position)
            ]
            mine = self.effects[self.effects.unit == unit]
            words = {
                change: list(zip(found.token, found.effect))
                for change in ("raised", "lowered")
                if len(found := mine[mine.change == change])
            }
            cards.append({"unit": unit, "rate": rate, "words": words, "examples": examples})
        return _VIEW.render(cards=cards, about=self.dictionary)


@torch.no_grad()
def explore_dictionary(
    model: Model,
    dictionary: Dictionary,
    texts: Texts,
    units: ComponentMask | Sequence[int] | None = None,
    *,
    examples: int = 5,
    window: int = 8,
    words: int = 8,
) -> Exploration:
    """Find the texts in which features or codes are most active, and the words that they raise and lower.

    Memory: one batch of activations, and a window for each unit and example. Examples show what a unit is active on,
    not what it does: delete it and measure (`edit.codebook_delete`).

    Args:
        model: The model.
        dictionary: A dictionary of this model.
        texts: Texts, prompts, or tokens `[text pos]` and lengths `[text]`.
        units: Numbers or a mask (`feature_discovery(...).above(1)`); None is the 10 most frequently active.
        examples: How many texts to show for each unit, those in which it is most active.
        window: How many tokens to show on either side of the most active one.
        words: How many tokens to name that a unit raises most, and as many that it lowers.

    Returns:
        `table`: unit, rate (share of tokens at which it is active), and for each example the activation, number of the
        text, position of the token, the token, and its context with this one marked, `The «cook» baked`. A code is used
        or not: its activation is its cosine where it is used. Units in the order given, strongest example first; a unit
        that is never active has no row. `effects`: the tokens whose logits one unit of activation (a code, used once)
        moves most: what it writes into the residual stream times the unembedding. This is the direct path, without
        norms and later layers. Empty where nothing is written (`attn.q`, `mlp_in`, a plain module).

    Raises:
        MechunlearnError: If dictionary or mask are of another model, units are out of range, or the text is empty.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.features.dictionaries import load_dictionary
    >>> model, codebook = load_model("factworld"), load_dictionary("factworld-codebook")
    >>> seen = explore_dictionary(model, codebook, ["The cook baked the soup.", "The knight fought the army."], examples=1)
    >>> list(seen.table.columns[:4]), len(seen.table)
    (['unit', 'rate', 'activation', 'text'], 10)
    """
    if min(examples, words) < 1 or window < 0:
        raise MechunlearnError(
            f"Cannot show {examples} examples with {window} tokens around them and {words} words. Expected at least "
            "one each."
        )
    check(dictionary, model)
    wanted = _asked(model, dictionary, units)
    tokens, counted = tokenized(model, texts)
    starts, ends = counted.long().argmax(1), counted.long().cumsum(1).argmax(1) + 1
    seen = torch.arange(dictionary.size) if wanted is None else wanted
    fired, here = torch.zeros(len(seen), dtype=torch.float64), torch.arange(len(seen))
    beside = torch.arange(-window, window + 1)
    best: list[Tensor] = [torch.zeros(0, len(seen))] + [torch.zeros(0, len(seen), dtype=torch.long)] * 2
    best += [torch.zeros(0, len(seen), len(beside))]

    def part(rows: Tensor) -> None:
        found: list[Tensor] = []
        cut = int(ends[rows].max())
        observed(model, dictionary, tokens[rows, :cut], found.append, counted[rows, :cut])
        kept = counted[rows, :cut].to(found[0].device)[..., None]
        active, strength = _activations(dictionary, found[0], seen.to(found[0].device))
        strength = strength.masked_fill(~(active & kept), -torch.inf)
        most, at = strength.max(1)
        near = at[..., None] + beside.to(at.device)
        outside = (near < 0) | (near >= cut)
        around = strength.transpose(1, 2).gather(-1, near.clamp(0, cut - 1)).masked_fill(outside, -torch.inf)
        new = (most, rows[:, None].expand_as(most), at, around)
        both = [torch.cat([old, its.to(old)]) for old, its in zip(best, new)]
        order = both[0].sort(dim=0, descending=True, stable=True).indices[:examples]
        best[:] = [values[order, here] for values in both]
        fired.add_((active & kept).sum((0, 1)).cpu())

    by_length = ends.argsort(stable=True)
    in_batches(len(tokens), BATCH, lambda rows: part(by_length[rows]))
    if wanted is None:
        here = fired.sort(descending=True, stable=True).indices[:SHOWN]
        here = here[fired[here] > 0]
    rates = dict(zip(seen[here].tolist(), (fired[here] / counted.sum()).tolist()))
    rows, contexts = [], []
    for unit, column in zip(rates, here.tolist()):
        for most, text, at, around in zip(*(values[:, column].tolist() for values in best)):
            if most == -torch.inf:
                break
            before = min(window, at - int(starts[text]))
            told = pieces(model, tokens[text, at - before : min(int(ends[text]), at + window + 1)].tolist())
            shown = [(piece, max(0.0, value)) for piece, value in zip(told, around[window - before :])]
            contexts.append((shown[:before], shown[before:]))
            word = told[before].lstrip() or told[before]
            marked = [*told[:before], told[before].removesuffix(word), f"«{word}»", *told[before + 1 :]]
            rows.append((unit, rates[unit], most, text, at, told[before], "".join(marked).strip()))
    effects = _effects(model, dictionary, list(rates), words)
    return Exploration(pd.DataFrame(rows, columns=COLUMNS), effects, rates, contexts, str(dictionary))


def _asked(
    model: Model, dictionary: Dictionary, units: ComponentMask | Sequence[int] | None
) -> Int[Tensor, " unit"] | None:
    if units is None:
        return None
    if isinstance(units, ComponentMask):
        return feature_units(units, dictionary, model)
    asked = list(dict.fromkeys(int(unit) for unit in units))
    wrong = [unit for unit in asked if not 0 <= unit < dictionary.size]
    if wrong or not asked:
        told = f"Unit {wrong[0]} is out of range" if wrong else "No units were given"
        raise MechunlearnError(f"{told}: {dictionary}. Expected numbers from 0 to {dictionary.size - 1}, or a mask.")
    return torch.tensor(asked)


def _activations(
    dictionary: Dictionary, h: Float[Tensor, "text pos d_model"], units: Int[Tensor, " unit"]
) -> tuple[Bool[Tensor, "text pos unit"], Float[Tensor, "text pos unit"]]:
    """Where units are active, and how much: of a code, its cosine."""
    if not isinstance(dictionary, Codebook):
        z = dictionary.encode(h)[..., units].float()
        return z > 0, z
    entering = dictionary.entering(h)
    active = dictionary.counted(dictionary.nearest(entering))[..., units] > 0
    parts = normalize(entering.unflatten(-1, (dictionary.groups, -1)), dim=-1)
    group = units // (dictionary.size // dictionary.groups)
    codes = normalize(dictionary.codes[units], dim=-1)
    cosines = torch.einsum("...gd,ud->...gu", parts, codes)[..., group, torch.arange(len(units))].float()
    return active, cosines


def _effects(model: Model, dictionary: Dictionary, units: list[int], words: int) -> pd.DataFrame:
    rows: list[tuple[Any, ...]] = []
    kind = dictionary.hook_name.split(".", 1)[-1]
    if isinstance(model, HookedModel) and units and kind in (*WRITTEN, "attn.o", "mlp.out"):
        if isinstance(dictionary, SAE):
            written = dictionary.directions[units]
        else:
            one = one_hot(torch.tensor(units), dictionary.size).float().to(model.device)
            written = dictionary.decode(one) - dictionary.decode(torch.zeros_like(one))
        if kind not in WRITTEN:
            project = model.decoder.projection(layer_of(dictionary.hook_name), kind)
            written = project(written.to(model.hf.dtype)) - project(torch.zeros_like(written, dtype=model.hf.dtype))
        for unit, direction in zip(units, written):
            moved = words_moved(model, direction, words)
            rows += [(unit, change, token, value) for change, found in moved.items() for token, value in found]
    return pd.DataFrame(rows, columns=["unit", "change", "token", "effect"])


def words_moved(
    model: HookedModel, direction: Float[Tensor, " d_model"], words: int
) -> dict[str, list[tuple[str, float]]]:
    """Name the tokens whose logits a direction in the residual stream moves most, by the direct path and without norms.

    Args:
        model: The model.
        direction: The direction.
        words: How many tokens to name of either kind.

    Returns:
        Tokens with their effect on the logit, under `raised` and `lowered`, largest effect first.
    """
    known = None if model.tokenizer is None else len(model.tokenizer)  # the matrix may have more rows
    unembedding: Tensor = model.decoder.unembedding.weight[:known]  # type: ignore[index]
    effects = (unembedding @ direction.to(unembedding)).float()
    moved = {}
    for change, sign in (("raised", 1), ("lowered", -1)):
        values, ids = (sign * effects).topk(min(words, len(effects)))
        named = (pieces(model, [i])[0] for i in ids.tolist())
        moved[change] = [(token, sign * value) for token, value in zip(named, values.tolist())]
    return moved


def pieces(model: Model, ids: list[int]) -> list[str]:
    """Return the text of each token in its place: what it adds to the text before it.

    Args:
        model: The model; without a tokenizer, a piece is the number.
        ids: Token ids.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [f" {i}" for i in ids]
    texts = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(len(ids) + 1)]
    return [after[len(before) :].translate(CONTROLS) for before, after in pairwise(texts)]


_JINJA = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_VIEW = _JINJA.from_string("""<style>
.mu-explore { font: 13px/1.5 system-ui, sans-serif; color: inherit; max-width: 76rem; }
.mu-explore .unit { border-top: 1px solid rgba(128,128,128,.35); padding: .6rem 0 .7rem; }
.mu-explore .head { font-weight: 600; font-size: 15px; } .mu-explore .soft { font-weight: 400; font-size: 12px; opacity: .65; }
.mu-explore .words { display: flex; flex-wrap: wrap; gap: .25rem .35rem; align-items: baseline; margin: .2rem 0; }
.mu-explore .words > .soft { width: 4rem; }
.mu-explore .word { white-space: pre; font-family: ui-monospace, monospace; font-size: 12px; padding: 0 .4rem; border-radius: .3rem; }
.mu-explore .raised { background: rgba(30,140,255,.2); } .mu-explore .lowered { background: rgba(255,70,70,.2); }
.mu-explore .line { display: grid; grid-template-columns: 4rem minmax(0,1fr) minmax(0,1.2fr); align-items: baseline; }
.mu-explore .line div { white-space: pre; overflow: hidden; } .mu-explore .before { display: flex; justify-content: flex-end; }
.mu-explore .number { font-variant-numeric: tabular-nums; opacity: .65; font-size: 12px; }
.mu-explore .token { border-radius: .2rem; } .mu-explore .peak { font-weight: 700; box-shadow: inset 0 -2px rgba(255,140,0,.9); }
</style>
{% macro token(piece, value, most, peak) %}<span class="token{{ ' peak' if peak }}" title="{{ '%.3g'|format(value) }}"
{%- if value > 0 %} style="background:rgba(255,150,0,{{ '%.2f'|format(0.1 + 0.5 * value / most) }})"{% endif %}>
{{- piece }}</span>{% endmacro %}
<div class="mu-explore"><p><b>{{ about }}</b><br><span class="soft">The texts in which each is most active, with
the activation at the marked token (of a code: its cosine). Raised and lowered: the logits it moves most by the direct path alone.</span></p>
{% for card in cards %}
<div class="unit"><div class="head">{{ card.unit }} <span class="soft">active at {{ '%.3g'|format(100 * card.rate) }} % of tokens</span></div>
{% for change, words in card.words.items() %}
<div class="words"><span class="soft">{{ change }}</span>{% for word, effect in words %}
<span class="word {{ change }}" title="{{ '%+.3g'|format(effect) }}">{{ word.replace(' ', '␣') }}</span>{% endfor %}</div>
{% endfor %}
{% for value, text, position, before, after in card.examples %}{% set most = card.examples[0][0] %}
<div class="line" title="text {{ text }}, token {{ position }}"><span class="number">{{ '%#.3g'|format(value) }}</span>
<div class="before"><span>{% for piece, v in before %}{{ token(piece, v, most) }}{% endfor %}</span></div>
<div>{% for piece, v in after %}{{ token(piece, v, most, loop.first) }}{% endfor %}</div></div>
{% endfor %}</div>
{% endfor %}</div>
""")
_PAGE = _JINJA.from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>:root { color-scheme: light dark; } body { margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; }</style>
</head><body>{{ view|safe }}</body></html>
""")
