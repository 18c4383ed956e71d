"""Facts as the paired token tensors that methods see.

Text becomes tokens once, here. A row is the prompt followed by its answer (all tokens but the last), padded on the
right; the same prompt with another subject of equal token length is its corrupt partner.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mechunlearn.core.runcard import digest
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query
from mechunlearn.facts.odd import line
from mechunlearn.facts.pairs import paired

if TYPE_CHECKING:
    from mechunlearn.facts.dataset import FactDataset

ROLES = ("prefix", "subject first", "subject middle", "subject last", "relation", "last", "padding")
PAD = -1


@dataclass(frozen=True, eq=False)
class Prompts:
    """Paired clean and corrupt tokens with all that is known of them.

    Args:
        tokens: The clean prompts, each followed by its answer without the last token; padded on the right with 0.
        corrupt: The same with another subject.
        lengths: Tokens of each row, without padding.
        start: The position that predicts the first token of the answer.
        read: The position that predicts the first token at which answer and foil differ: `logit_diff` is taken there.
        answers: Tokens of the true answers, padded with -1 like the next two.
        foils: Tokens of the answers that the truth is compared with: those of the corrupt partners. None where every
            fact of a relation has the same answer.
        targets: Tokens of the answers that an edit injects.
        spans: First and last position of each subject's last occurrence, -1 where there is none.
        roles: The role of each token: an index into `ROLES`.
        queries: The prompts as text, with their foils; empty where tokens were given.
        options: For each fact, the tokens of the answers to choose among.
        random_corruptions: How many facts have no partner of equal length: random tokens stand for their subjects.
        facts: The data set they were made from.
        format: The format they were made in.
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
    queries: tuple[Query, ...] = ()
    options: tuple[tuple[tuple[int, ...], ...], ...] = ()
    random_corruptions: int = 0
    facts: "FactDataset | None" = None
    format: str = "statement"

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        what = self.facts.name if self.facts is not None else "tokens"
        first = f"; '{self.queries[0].prompt}' -> '{self.queries[0].answer}'" if self.queries else ""
        if self.queries and (joined := self.queries[0].joined_by) != " ":
            first += f", joined by {joined!r}"
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
        """The foil's token where `logit_diff` is taken. Raises `MechunlearnError` if a fact has no foil."""
        found = self._at_read(self.foils)
        if (found == PAD).any():
            raise MechunlearnError(
                f"{int((found == PAD).sum())} of {len(self)} facts have no foil to compare the truth with: no other "
                "fact of "
                "their relation has a different answer. Add facts with other answers, give each query a foil, or use a "
                "metric "
                "that needs none, such as answer_logprob."
            )
        return found

    @property
    def every_target(self) -> Int[Tensor, "fact target"]:
        """The targets, where every fact has one. Raises `MechunlearnError` if some have none."""
        without = (self.targets == PAD).all(1).nonzero().flatten().tolist()
        if without:
            names = (
                [self.queries[i].subject or self.queries[i].prompt for i in without[:3]] if self.queries else without
            )
            more = f" and {len(without) - 3} more" if len(without) > 3 else ""
            raise MechunlearnError(
                f"{len(without)} of {len(self)} facts have no target to inject, because no other fact of their relation "
                f"has a different answer: {', '.join(map(repr, names[:3]))}{more}. Give them a target (a column "
                "'target' in a file), or erase instead: a loss without a target, such as losses.npo."
            )
        return self.targets

    def _at_read(self, choices: Tensor) -> Tensor:
        return choices.gather(1, (self.read - self.start)[:, None])[:, 0]

    @property
    def fingerprint(self) -> str:
        """A hash of clean tokens, answers and targets."""
        return digest(self.tokens.numpy().tobytes(), self.answers.numpy().tobytes(), self.targets.numpy().tobytes())

    @property
    def pairs(self) -> set[tuple[tuple[int, ...], ...]]:
        """The facts as tokens of prompt and answer."""
        rows = zip(self.tokens.tolist(), self.lengths.tolist(), self.answers.tolist())
        return {(tuple(ids[:length]), tuple(one for one in answer if one != PAD)) for ids, length, answer in rows}

    def check_apart(self, retain: "Prompts") -> None:
        """Raise `MechunlearnError` if these facts and those to retain share one: the same prompt with the same answer.

        Args:
            retain: The facts to retain.
        """
        if both := self.pairs & retain.pairs:
            raise MechunlearnError(
                f"{len(both)} of {len(self)} forget facts are in the retain set too. Expected sets that share no fact: "
                "see Prompts.split."
            )

    @steady()
    def select(self, rows: Sequence[int] | Tensor) -> "Prompts":
        """Return the prompts of these rows, in this order, no wider than the longest of them.

        Args:
            rows: Indices of facts.
        """
        index = torch.as_tensor(rows, dtype=torch.long)
        changed: dict[str, Any] = {name: tensor[index] for name, tensor in self._tensors().items()}
        width = int(changed["lengths"].max()) if len(index) else 0
        changed |= {name: changed[name][:, :width] for name in ("tokens", "corrupt", "roles")}
        for name in ("queries", "options"):
            if getattr(self, name):
                changed[name] = tuple(getattr(self, name)[i] for i in index.tolist())
        if self.facts is not None:
            changed["facts"] = self.facts.select(index.tolist())
        return replace(self, **changed)

    def tiled(self, copies: int, at_answers: bool = False) -> "Prompts":
        """Return the facts several times over, as tensors only.

        Args:
            copies: How many times.
            at_answers: Whether positions count from `start`, as they do in logits of the answer alone.
        """
        changed: dict[str, Any] = {
            name: tensor.repeat(copies, *[1] * (tensor.ndim - 1)) for name, tensor in self._tensors().items()
        }
        if at_answers:
            changed |= {"read": changed["read"] - changed["start"], "start": torch.zeros_like(changed["start"])}
        return replace(self, **changed, queries=(), options=(), facts=None)

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @steady()
    def split(self, forget: int, retain: int | None = None, seed: int = 0) -> tuple["Prompts", "Prompts"]:
        """Draw a forget set, and a retain set disjoint from it.

        No subject of the one is in the other. What is left is in neither: `evaluate` measures it as unseen facts, and
        those of it whose subject shares a word with a forgotten subject as neighbours too.

        Args:
            forget: How many facts to forget.
            retain: How many facts to retain. None: half of those about other subjects.
            seed: Draws both.

        Raises:
            MechunlearnError: If there are not that many facts.
        """
        if not 0 < forget < len(self):
            odd = line(self.facts.odd) if self.facts is not None else ""
            expected = f"Expected 1 to {len(self) - 1}" if len(self) > 1 else "Expected two facts or more"
            raise MechunlearnError(
                f"Cannot forget {forget} of {len(self)} facts. {expected}: at least one is left to retain.{odd and f' {odd}.'}"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen, rest = order[:forget], order[forget:]
        about = ""
        if self.facts is not None:
            subjects = {self.facts[i].subject for i in chosen} - {""}
            rest = [i for i in rest if self.facts[i].subject not in subjects]
            about = " about other subjects"
        kept = max(1, len(rest) // 2) if retain is None else retain
        if not 0 < kept <= len(rest):
            raise MechunlearnError(
                f"Cannot retain {kept} facts: {len(rest)}{about} are left beside the {forget} to forget."
            )
        return self.select(chosen), self.select(rest[:kept])

    @classmethod
    @steady()
    def from_text(
        cls,
        queries: Sequence[Query],
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
        facts: "FactDataset | None" = None,
        format: str = "statement",
    ) -> "Prompts":
        """Tokenize queries, find their subjects, and give each a corrupt partner and a foil.

        The partner is drawn first: another subject of as many tokens, whose answer is neither the truth nor the
        beginning of one of the two. Its answer is the foil: what the model should say on the corrupt prompt. Where
        there is no such subject, random tokens stand for it, and the foil is another fact's answer. A query that
        brings a foil keeps it; its partner is one with that answer, if there is one. A query without a subject has no
        corrupt prompt. Of facts, only those of one relation are partners.

        Args:
            queries: What is asked, as text.
            tokenizer: A fast tokenizer: it says which characters each token covers.
            seed: Draws the partners.
            facts: The data set the queries come from, kept with the prompts.
            format: The format they are in. In `yes_no` and `multiple_choice` the answer of a partner depends on the
                prompt (`formats.answer_of`).

        Raises:
            MechunlearnError: If a subject is not in its prompt, an answer is empty, or an answer and its foil are the
                same tokens.
        """
        rows = paired(queries, tokenizer, seed, None if facts is None else facts.facts, format)
        numbers = [(len(row.ids), row.prompt_length - 1, row.differs_at, *(row.span or (PAD, PAD))) for row in rows]
        lengths, start, differs, *spans = torch.tensor(numbers).T
        made = {"lengths": lengths, "start": start, "read": start + differs, "spans": torch.stack(spans, 1)}
        return cls(
            tokens=_padded([row.ids for row in rows], 0),
            corrupt=_padded([row.corrupt for row in rows], 0),
            answers=_padded([row.answer for row in rows], PAD),
            foils=_padded([row.foil for row in rows], PAD),
            targets=_padded([row.target for row in rows], PAD),
            roles=_roles(lengths, made["read"], made["spans"]),
            queries=tuple(row.query for row in rows),
            options=tuple(row.options for row in rows),
            random_corruptions=sum(row.at_random for row in rows),
            facts=facts,
            format=format,
            **made,
        )

    @classmethod
    @steady()
    def from_tokens(
        cls,
        clean: Int[Tensor, "fact pos"],
        corrupt: Int[Tensor, "fact pos"],
        answer: Int[Tensor, " fact"],
        foil: Int[Tensor, " fact"],
        spans: Int[Tensor, "fact 2"] | None = None,
        targets: Int[Tensor, " fact"] | None = None,
    ) -> "Prompts":
        """Make prompts from tokens of your own: unpadded prompts of one length, with answers of one token.

        Args:
            clean: The clean prompts.
            corrupt: The corrupt prompts.
            answer: The true answers.
            foil: What the model says on the corrupt prompts.
            spans: First and last position of each subject. None: no subject is named.
            targets: The answers that an edit injects. None: the foils.

        Raises:
            MechunlearnError: If the shapes differ, or an answer is its own foil.
        """
        if clean.shape != corrupt.shape:
            raise MechunlearnError(f"Clean and corrupt tokens differ in shape: {clean.shape} and {corrupt.shape}.")
        if (answer == foil).any():
            raise MechunlearnError("Answer and foil are the same token for some fact: they cannot be told apart.")
        facts, length = clean.shape
        spans = torch.full((facts, 2), PAD) if spans is None else spans
        last = torch.full((facts,), length - 1)
        return cls(
            tokens=clean,
            corrupt=corrupt,
            lengths=last + 1,
            start=last,
            read=last,
            answers=answer[:, None],
            foils=foil[:, None],
            targets=(foil if targets is None else targets)[:, None],
            spans=spans,
            roles=_roles(last + 1, last, spans),
        )


def _padded(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "row _token"]:
    return pad_sequence([torch.tensor(row or [PAD]) for row in rows], batch_first=True, padding_value=value)


def _roles(lengths: Tensor, read: Tensor, spans: Tensor) -> Int[Tensor, "fact pos"]:
    """Roles are disjoint: last > subject last > subject first > subject middle > prefix > relation."""
    at, first, final = torch.arange(int(lengths.max())), spans[:, :1], spans[:, 1:]
    roles = torch.full((len(lengths), len(at)), ROLES.index("padding"))
    for role, where in {
        "relation": at < lengths[:, None],
        "prefix": at < first,
        "subject middle": (at >= first) & (at <= final),
        "subject first": at == first,
        "subject last": at == final,
        "last": at == read[:, None],
    }.items():
        roles[where] = ROLES.index(role)
    return roles
