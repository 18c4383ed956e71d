"""Where a prompt ends and its answer begins, in tokens: both are tokenized in one piece."""

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mechunlearn.errors import MechunlearnError

Ids = tuple[int, ...]
Offsets = tuple[tuple[int, int], ...]
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff65]")
"""Letters and marks of scripts that part words by nothing: Thai, Lao, Burmese, Khmer, Chinese, Japanese."""
WIDE = re.compile("[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff65]")
"""Those of them that put nothing before a word of another script either: Chinese and Japanese."""
OPEN = re.compile(r"""[(\[{<“‘«„‚‹¿¡$€£¥#@/\\]$|(?:^|[\s(\[{“«])["'`*]+$""")
"""The end of a prompt that an answer follows at once: an open bracket or quote, the sign of a currency, a slash."""


class Joined(NamedTuple):
    """A prompt and what follows it, in tokens.

    Attributes:
        ids: All tokens; special ones stand at the beginning only, once.
        prompt: How many of them are the prompt: the tokens that end within it.
        offsets: The characters of the text that each token covers.
    """

    ids: Ids
    prompt: int
    offsets: Offsets


def separator(prompt: str, answer: str) -> str:
    r"""Return what stands between a prompt and its answer: a space, or nothing where they follow each other at once.

    Nothing stands behind white space, an open bracket or quote, or a currency sign; within Chinese and Japanese text,
    and between two words of a script that does not part words. White space that an answer brings itself is kept.

    Args:
        prompt: The prompt.
        answer: The answer.

    >>> [separator(prompt, "Paris") for prompt in ("The capital of France is", "Answer:\n", "It is called '", "首都是")]
    [' ', '', '', '']
    >>> separator("The colour is", "\n\nred")
    '\n\n'
    """
    if not prompt or prompt[-1].isspace() or OPEN.search(prompt) or WIDE.match(prompt[-1]):
        return ""
    if given := answer[: len(answer) - len(answer.lstrip())]:
        return given
    return "" if UNSPACED.match(prompt[-1]) and UNSPACED.match(answer) else " "


class Joiner:
    """Tokenizes prompts together with what follows them.

    A space between the two belongs to what follows, as its first token usually holds it.

    Args:
        tokenizer: The model's. One that cannot say which characters a token covers has to give its text back unchanged.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.fast = bool(tokenizer.is_fast)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[Joined]:
        """Tokenize each prompt with its text.

        Args:
            prompts: The prompts, to the character.
            texts: What follows them, with the separator.

        Raises:
            MechunlearnError: If a tokenizer written in Python changes the text, so that no token can be placed in it.
        """
        if not prompts:
            return []
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        wanted = {"return_special_tokens_mask": True, "return_offsets_mapping": self.fast}
        encoded = self.tokenizer(whole, **wanted)
        given = encoded["offset_mapping"] if self.fast else [None] * len(whole)
        rows = zip(prompts, whole, encoded["input_ids"], encoded["special_tokens_mask"], given, strict=True)
        return [self._joined(*row) for row in rows]

    def following(
        self, prompts: Sequence[str], texts: Sequence[str], joined: Sequence[Joined], others: Sequence[tuple[int, str]]
    ) -> list[Ids]:
        """Tokenize prompts with other texts than those that they were joined with.

        Most words are the same tokens behind every prompt. One that begins with a space is tried behind one of them, and
        then taken as it is behind all prompts that keep their own tokens apart from such a word's.

        Args:
            prompts: The prompts.
            texts: The texts that they were joined with.
            joined: What came of that.
            others: Numbers of prompts, each with another text.

        Returns:
            All tokens of each.
        """
        distinct = list(dict.fromkeys((*texts, *(text for _, text in others))))
        alone = dict(zip(distinct, self.tokenizer(distinct, add_special_tokens=False)["input_ids"] if distinct else []))
        apart = [
            text[:1] == " " and prompt[-1:].strip() != "" and each.ids == (*each.ids[: each.prompt], *alone[text])
            for prompt, text, each in zip(prompts, texts, joined, strict=True)
        ]
        tried = {text: i for i, text in reversed(others) if apart[i] and text[:1] == " "}
        found = self([prompts[i] for i in tried.values()], list(tried))
        same = {
            text
            for (text, i), each in zip(tried.items(), found)
            if each.ids == (*joined[i].ids[: joined[i].prompt], *alone[text])
        }
        left = [(i, text) for i, text in others if not (apart[i] and text in same)]
        exact = dict(zip(left, self([prompts[i] for i, _ in left], [text for _, text in left])))
        return [
            exact[each].ids if each in exact else (*joined[each[0]].ids[: joined[each[0]].prompt], *alone[each[1]])
            for each in others
        ]

    def _joined(
        self, prompt: str, whole: str, ids: list[int], special: list[int], offsets: Sequence[tuple[int, int]] | None
    ) -> Joined:
        """The tokens without special ones at the end, or a second beginning of text that the prompt wrote itself."""
        first = len(list(takewhile(bool, special)))
        stop = len(ids) - len(list(takewhile(bool, reversed(special[first:]))))
        twice = first == 1 and ids[1:2] == ids[:1]
        offsets = self._placed(ids[:stop], first, whole) if offsets is None else offsets
        kept = [0, *range(2, stop)] if twice else range(stop)
        places = tuple(tuple(offsets[i]) for i in kept)
        count = next((n for n, (_, end) in enumerate(places) if end > len(prompt)), len(places))
        return Joined(tuple(ids[i] for i in kept), count, places)  # type: ignore[arg-type]

    def _placed(self, ids: list[int], first: int, whole: str) -> list[tuple[int, int]]:
        """The characters of each token, by decoding ever longer beginnings."""
        ends, begin = [0] * first, 0
        said = [self._text(ids[first : first + n + 1]) for n in range(len(ids) - first)]
        if said and not whole.startswith(said[-1].rstrip("\ufffd")) and whole.startswith(said[-1].lstrip()):
            begin = len(said[-1]) - len(said[-1].lstrip())  # a space that the tokenizer puts in front
        if said and whole not in (said[-1][begin:], self._text(ids[first:], skip=True)[begin:]):
            raise MechunlearnError(
                f"The tokenizer ({type(self.tokenizer).__name__}) is written in Python and changes text: {whole!r:.80} "
                f"comes back as {said[-1]!r:.80}. Expected a fast tokenizer, which knows the characters of each token."
            )
        for text in said:
            ends.append(max(ends[-1] if ends else 0, len(text.rstrip("\ufffd")) - begin))
        return list(zip([0, *ends[:-1]], ends))

    def _text(self, ids: list[int], skip: bool = False) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def common(rows: Iterable[Ids], most: int) -> int:
    """Return how many tokens all rows begin with, at most so many, with one left over in each.

    Args:
        rows: Tokens.
        most: The largest number that is returned.
    """
    first, *others = rows
    for other in others:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(first[:most], other[:-1]))
        most = min(most, sum(1 for _ in same))
    return min(most, len(first) - 1)
