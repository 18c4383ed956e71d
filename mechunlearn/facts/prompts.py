"""Facts as paired token tensors: what methods see.

Text becomes tokens once, here. A row is the prompt followed by its answer (all tokens but the last), padded on the
right; the same prompt with another subject of equal token length is its corrupt partner.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    from mechunlearn.facts.dataset import FactDataset

ROLES = ("prefix", "subject first", "subject middle", "subject last", "relation", "last", "padding")
PAD = -1


@dataclass(frozen=True)
class Asked:
    """One prompt as text, ready to be tokenized. An empty subject means there is none (skills)."""

    prompt: str
    answer: str
    foil: str
    target: str
    subject: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Prompts:
    """Paired clean and corrupt tokens with all that is known of them.

    `tokens` and `corrupt` are `[fact pos]`. `answers`, `foils` and `targets` are `[fact answer]`, padded with -1.
    `start` is the position that predicts the first answer token; `read` the one that predicts the first token at which
    answer and foil differ, where `logit_diff` is taken. `spans` holds [first, last] position of the subject's last
    occurrence, -1 if there is none. `options` lists, per fact, the tokens of the answers to choose among.
    `random_corruptions` counts facts whose subject had no partner of equal length and got random tokens.
    """

    tokens: Int[Tensor, "fact pos"]
    corrupt: Int[Tensor, "fact pos"]
    lengths: Int[Tensor, " fact"]
    start: Int[Tensor, " fact"]
    read: Int[Tensor, " fact"]
    answers: Int[Tensor, "fact answer"]
    foils: Int[Tensor, "fact foil"]
    targets: Int[Tensor, "fact target"]
    spans: Int[Tensor, "fact 2"]
    roles: Int[Tensor, "fact pos"]
    asked: tuple[Asked, ...] = ()
    options: tuple[tuple[tuple[int, ...], ...], ...] = ()
    random_corruptions: int = 0
    facts: "FactDataset | None" = None
    format: str = "statement"

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        what = self.facts.name if self.facts is not None else "tokens"
        first = f"; '{self.asked[0].prompt}' -> '{self.asked[0].answer}'" if self.asked else ""
        random = f", {self.random_corruptions} corrupted at random" if self.random_corruptions else ""
        return (
            f"Prompts({what}, {len(self)} facts, format {self.format}, {self.tokens.shape[1]} positions{random}{first})"
        )

    @property
    def answer_at_read(self) -> Int[Tensor, " fact"]:
        """The answer's token where `logit_diff` is taken."""
        return self._at_read(self.answers)

    @property
    def foil_at_read(self) -> Int[Tensor, " fact"]:
        return self._at_read(self.foils)

    def _at_read(self, choices: Tensor) -> Tensor:
        return choices.gather(1, (self.read - self.start)[:, None])[:, 0]

    @property
    def fingerprint(self) -> str:
        return digest(self.tokens.numpy().tobytes(), self.answers.numpy().tobytes(), self.targets.numpy().tobytes())

    def select(self, rows: Sequence[int] | Tensor) -> "Prompts":
        """The prompts of these rows, in this order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        changed: dict = {
            field.name: value[index] for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)
        }
        for name in ("asked", "options"):
            if getattr(self, name):
                changed[name] = tuple(getattr(self, name)[i] for i in index.tolist())
        if self.facts is not None:
            changed["facts"] = self.facts.select(index.tolist())
        return replace(self, **changed)

    def tiled(self, copies: int, at_answers: bool = False) -> "Prompts":
        """The facts `copies` times over, as tensors only; with `at_answers` positions count from `start`."""
        changed: dict = {
            field.name: value.repeat(copies, *[1] * (value.ndim - 1))
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if at_answers:
            changed |= {"read": changed["read"] - changed["start"], "start": torch.zeros_like(changed["start"])}
        return replace(self, **changed, asked=(), options=(), facts=None)

    def split(self, forget: int, retain: int | None = None, seed: int = 0) -> tuple["Prompts", "Prompts"]:
        """A random forget set, and a retain set disjoint from it.

        The retain set is half of the rest unless given; what is left serves `evaluate` as neighbours that no edit saw.
        """
        if not 0 < forget < len(self):
            raise MechunlearnError(f"Cannot forget {forget} of {len(self)} facts. Expected 1 to {len(self) - 1}.")
        rest = len(self) - forget
        kept = max(1, rest // 2) if retain is None else retain
        if not 0 < kept <= rest:
            raise MechunlearnError(f"Cannot retain {kept} facts: {rest} are left beside the {forget} to forget.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order[:forget]), self.select(order[forget : forget + kept])

    @classmethod
    def from_text(
        cls,
        asked: Sequence[Asked],
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
        facts: "FactDataset | None" = None,
        format: str = "statement",
    ) -> "Prompts":
        """Tokenize, find subjects, and pair each prompt with a corrupt one.

        Raises `MechunlearnError` if a subject is not in its prompt, or an answer and its foil are the same tokens.
        """
        rows = _tokenized(asked, tokenizer)
        rng = random.Random(seed)
        partners = _Partners(rows, asked, rng)
        corrupted, fallbacks = [], 0
        for i, row in enumerate(rows):
            partner = partners.of(i) if row.span else None
            if row.span and partner is None:
                fallbacks += 1
                partner = [rng.randrange(len(tokenizer)) for _ in row.subject_ids]
            corrupted.append(row.with_subject(partner) if partner else list(row.ids))
        return _build(rows, corrupted, asked, fallbacks, facts, format)

    @classmethod
    def from_tokens(
        cls,
        clean: Int[Tensor, "fact pos"],
        corrupt: Int[Tensor, "fact pos"],
        answer: Int[Tensor, " fact"],
        foil: Int[Tensor, " fact"],
        spans: Int[Tensor, "fact 2"] | None = None,
    ) -> "Prompts":
        """For those who bring tokens: unpadded prompts of one length, one-token answers. The target is the foil."""
        if clean.shape != corrupt.shape:
            raise MechunlearnError(f"Clean and corrupt tokens differ in shape: {clean.shape} and {corrupt.shape}.")
        if (answer == foil).any():
            raise MechunlearnError("Answer and foil are the same token for some fact: they cannot be told apart.")
        facts, length = clean.shape
        spans = torch.full((facts, 2), PAD) if spans is None else spans
        last = torch.full((facts,), length - 1)
        roles = torch.stack([_roles(length, length, length - 1, s.tolist()) for s in spans])
        return cls(
            tokens=clean,
            corrupt=corrupt,
            lengths=last + 1,
            start=last,
            read=last,
            answers=answer[:, None],
            foils=foil[:, None],
            targets=foil[:, None],
            spans=spans,
            roles=roles,
        )


@dataclass(frozen=True)
class _Row:
    """One prompt in tokens: ids of prompt and answer (without its last token), span of the subject."""

    ids: tuple[int, ...]
    prompt_length: int
    answer: tuple[int, ...]
    foil: tuple[int, ...]
    target: tuple[int, ...]
    span: tuple[int, int] | None
    options: tuple[tuple[int, ...], ...]

    @property
    def subject_ids(self) -> list[int]:
        return list(self.ids[self.span[0] : self.span[1] + 1]) if self.span else []

    def with_subject(self, other: Sequence[int]) -> list[int]:
        """The row with another subject in place of this one, wherever it occurs."""
        mine, changed, i = self.subject_ids, list(self.ids), 0
        while i <= self.prompt_length - len(mine):
            if changed[i : i + len(mine)] == mine:
                changed[i : i + len(mine)] = other
                i += len(mine)
            else:
                i += 1
        return changed

    @property
    def differs_at(self) -> int:
        return next(i for i, (a, b) in enumerate(zip(self.answer, self.foil, strict=False)) if a != b)


def _tokenized(asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase) -> list[_Row]:
    """Every prompt in one call of the tokenizer, and every different answer, foil, target and option in another."""
    encoded = tokenizer([entry.prompt for entry in asked], return_offsets_mapping=True)
    words = list(dict.fromkeys(word for entry in asked for word in _words(entry)))
    ids = dict(zip(words, map(tuple, tokenizer(words, add_special_tokens=False)["input_ids"])))
    rows = []
    for entry, prompt, offsets in zip(asked, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        answer, foil, target, *options = (ids[word] for word in _words(entry))
        if not answer:
            raise MechunlearnError(f"The answer of '{entry.prompt}' is empty. Expected at least one token.")
        if answer[: len(foil)] == foil[: len(answer)]:
            raise MechunlearnError(
                f"Answer '{entry.answer}' and foil '{entry.foil}' of '{entry.prompt}' are the same tokens "
                "(or one begins with the other): give a foil that differs."
            )
        span = _find(entry, offsets) if entry.subject else None
        rows.append(_Row((*prompt, *answer[:-1]), len(prompt), answer, foil, target, span, tuple(options)))
    return rows


def _words(asked: Asked) -> list[str]:
    """Answer, foil, target and options as they stand after the prompt: with a space unless it ends in one."""
    texts = (asked.answer, asked.foil, asked.target, *asked.options)
    return list(texts) if asked.prompt.endswith((" ", "\n")) else [" " + text.lstrip() for text in texts]


def _find(asked: Asked, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    start = asked.prompt.rfind(asked.subject)
    if start < 0:
        raise MechunlearnError(
            f"The subject '{asked.subject}' is not in its prompt '{asked.prompt}'. "
            "Expected the prompt to contain the subject as it is written, or '{}' in its place."
        )
    stop = start + len(asked.subject)
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < stop and b > a]
    return inside[0], inside[-1]


class _Partners:
    """Other facts' subjects by token length and answer."""

    def __init__(self, rows: Sequence[_Row], asked: Sequence[Asked], rng: random.Random) -> None:
        self.rows, self.asked, self.rng = rows, asked, rng
        self.by_answer: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for j, row in enumerate(rows):
            if row.span:
                self.by_answer.setdefault((len(row.subject_ids), row.answer), []).append(j)

    def of(self, i: int) -> list[int] | None:
        """A subject of the same token length whose answer is this fact's foil, or at least not its answer."""
        row, length = self.rows[i], len(self.rows[i].subject_ids)
        best = [key for key in self.by_answer if key == (length, row.foil)]
        others = [key for key in self.by_answer if key[0] == length and key[1] != row.answer]
        for keys in (best, others):
            fitting = [j for key in keys for j in self.by_answer[key] if self.asked[j].subject != self.asked[i].subject]
            if fitting:
                return self.rows[self.rng.choice(fitting)].subject_ids
        return None


def _build(
    rows: Sequence[_Row],
    corrupted: Sequence[Sequence[int]],
    asked: Sequence[Asked],
    fallbacks: int,
    facts: "FactDataset | None",
    format: str,
) -> Prompts:
    width = max(len(row.ids) for row in rows)
    start = torch.tensor([row.prompt_length - 1 for row in rows])
    read = start + torch.tensor([row.differs_at for row in rows])
    spans = [list(row.span) if row.span else [PAD, PAD] for row in rows]
    return Prompts(
        tokens=_padded([row.ids for row in rows], 0),
        corrupt=_padded(corrupted, 0),
        lengths=torch.tensor([len(row.ids) for row in rows]),
        start=start,
        read=read,
        answers=_padded([row.answer for row in rows], PAD),
        foils=_padded([row.foil for row in rows], PAD),
        targets=_padded([row.target for row in rows], PAD),
        spans=torch.tensor(spans),
        roles=torch.stack(
            [_roles(width, len(row.ids), int(r), s) for row, r, s in zip(rows, read, spans, strict=True)]
        ),
        asked=tuple(asked),
        options=tuple(row.options for row in rows),
        random_corruptions=fallbacks,
        facts=facts,
        format=format,
    )


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    made = torch.full((len(rows), max(len(row) for row in rows)), value)
    for i, row in enumerate(rows):
        made[i, : len(row)] = torch.tensor(row)
    return made


def _roles(width: int, length: int, last: int, span: Sequence[int]) -> Tensor:
    """Roles are disjoint: last > subject last > subject first > subject middle > relation > prefix."""
    roles = torch.full((width,), ROLES.index("padding"))
    roles[:length] = ROLES.index("relation")
    first, final = span
    if first >= 0:
        roles[:first] = ROLES.index("prefix")
        roles[first : final + 1] = ROLES.index("subject middle")
        roles[first] = ROLES.index("subject first")
        roles[final] = ROLES.index("subject last")
    roles[last] = ROLES.index("last")
    return roles
