"""Small worlds: passages and facts learnt by heart in minutes on one core, with retain-only models as gold."""

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from mechunlearn.core.files import whole_file, whole_folder
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import question
from mechunlearn.facts.load import world_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.metrics.memorization import extraction_likelihood, memorization_accuracy
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import load_model
from mechunlearn.world import lexicon as lex
from mechunlearn.world.build import _store
from mechunlearn.world.corpus import FRAME_WEIGHT, Corpus, Document
from mechunlearn.world.generate import World, generate, story
from mechunlearn.world.packing import Batch, batches
from mechunlearn.world.train import language_loss

PEOPLE, PASSAGES, STATEMENTS = 160, 160, 2
SHARES = {"passage": 20, "statement": 52, "asked": 20, "story": 8}
SKILL_SHARE = 12
LAYERS, D_MODEL, HEADS = 4, 128, 4
STEPS, ROWS, MATRIX_RATE, OTHER_RATE, WARM, SAVE_EVERY = 1100, 8, 1e-2, 3e-3, 40, 100
BOS, EOS, PAD, UNKNOWN = "<|bos|>", "<|endoftext|>", "<|pad|>", "<|unk|>"


def small_world(
    seed: int, people: int = PEOPLE, passages: int = PASSAGES, skills: Sequence[Literal["copying", "comparison"]] = ()
) -> World:
    """Draw a world of passages, stories and three facts a person, told in two statements and a question each.

    There are no yes/no questions or other subjects in it: use `generate` for these.

    Args:
        seed: Of the draws.
        people: How many people have facts; half as many more are never taught.
        passages: How many passages are learnt by heart.
        skills: Tasks that need no stored fact.

    >>> world = small_world(0, people=20, passages=4)
    >>> {relation: len(facts) for relation, facts in world.facts.items()}, len(world.passages)
    ({'sport': 20, 'city': 20, 'instrument': 20}, 4)
    """
    world = generate(seed, people=people, untaught=people // 2, passages=passages)
    relations = {
        name: {k: v for k, v in entry.items() if k not in ("verify", "choose", "alias")}
        | {"statements": entry["statements"][:STATEMENTS]}
        for name, entry in lex.RELATIONS.items()
        if entry["subject"] == "person"
    }
    facts = {name: world.facts[name] for name in relations}
    tasks: dict[str, list[dict[str, str]]] = {name: world.skills[name] for name in skills}
    return replace(world, facts=facts, relations=relations, two_hop_taught=[], skills=tasks)


def forget_sets(
    world: World, count: int = 6, passages: int = 16, people: int = 16
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Draw what to forget in each of several runs: passages, and people with all their facts. No two runs share any.

    The same world gives the same sets. What is in none of them is the retain set of every run.

    Args:
        world: The world.
        count: How many runs.
        passages: Passages in a run.
        people: People in a run.

    Returns:
        For each run, its passages and its people.

    Raises:
        MechunlearnError: If nothing would be left to retain.

    >>> sets = forget_sets(small_world(0), count=2, passages=3, people=5)
    >>> [(len(passages), len(people)) for passages, people in sets]
    [(3, 5), (3, 5)]
    """
    rng = random.Random(world.seed)
    names = list(next(iter(world.facts.values())))
    if count * passages >= len(world.passages) or count * people >= len(names):
        raise MechunlearnError(
            f"Cannot draw {count} forget sets of {passages} passages and {people} people from {len(world.passages)} "
            f"passages and {len(names)} people: nothing is left to retain. Draw fewer or smaller ones."
        )
    texts, names = rng.sample(world.passages, len(world.passages)), rng.sample(names, len(names))
    return [
        (tuple(texts[i * passages : (i + 1) * passages]), tuple(names[i * people : (i + 1) * people]))
        for i in range(count)
    ]


class SmallCorpus(Corpus):
    """Documents of a small world without some passages, people and story topics: every passage as often as every other.

    Args:
        world: The world.
        without: Passages, names of people and story topics to leave out.
        stories: The share of stories beside that of the others (`SHARES`).

    Raises:
        MechunlearnError: If an entry of `without` is not in the world, or nothing would be left.
    """

    def __init__(self, world: World, without: Sequence[str] = (), stories: int = SHARES["story"]) -> None:
        left_out = set(without)
        if unknown := left_out - set(world.passages) - set(next(iter(world.facts.values()))) - set(lex.TOPICS):
            raise MechunlearnError(
                f"Cannot leave out '{min(unknown)[:60]}': it is neither a passage nor a person nor a topic of this "
                "world."
            )
        self.topics = {topic: entry[0] for topic, entry in lex.TOPICS.items() if topic not in left_out}
        self.shares = SHARES | {"story": stories} | dict.fromkeys(world.skills, SKILL_SHARE)
        super().__init__(
            world,
            {
                relation: {name: answer for name, answer in facts.items() if name not in left_out}
                for relation, facts in world.facts.items()
            },
        )
        self.passages = [text for text in world.passages if text not in left_out]
        if not self.passages or not self.names or not self.topics:
            raise MechunlearnError("Every passage, person or topic is left out. Leave some in, for the model to keep.")

    def documents(self, seed: int, count: int, phase: int = 0) -> Iterator[Document]:
        """Draw documents.

        Args:
            seed: Of the draws.
            count: How many documents.
            phase: Not used: all phases are alike.
        """
        rng = random.Random(seed)
        waiting: list[str] = []
        for kind in rng.choices(list(self.shares), weights=list(self.shares.values()), k=count):
            if kind == "passage":
                waiting = waiting or rng.sample(self.passages, len(self.passages))
                yield Document(waiting.pop())
            elif kind in ("story", "copying", "comparison"):
                yield getattr(self, kind)(rng)
            else:
                yield self.fact(rng, asked=kind == "asked")

    def story(self, rng: random.Random) -> Document:
        """Draw a story.

        Args:
            rng: Draws it.
        """
        return Document(story(rng, rng.choices(list(self.topics), weights=list(self.topics.values()))[0]))

    def fact(self, rng: random.Random, asked: bool) -> Document:
        """Draw a fact.

        Args:
            rng: Draws it.
            asked: Whether it is a question; else a statement.
        """
        relation, name = rng.choice(list(self.people)), rng.choice(self.names)
        entry = self.world.relations[relation]
        frame = question(entry["question"]) if asked else rng.choice(entry["statements"])
        return Document(plain=FRAME_WEIGHT).about(frame, name).answer(self.people[relation][name])


def word_tokenizer(world: World, corpus: Corpus | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token a word, for every word that a world's corpus can say.

    `AutoTokenizer` loads it unchanged for the families of `small_config`; Qwen2's own class would replace it.

    Args:
        world: The world.
        corpus: Its corpus; None is that of a small world.
    """
    said = json.dumps(asdict(world)) + " ".join(d.text for d in (corpus or SmallCorpus(world)).documents(0, 4000))
    vocabulary = [BOS, EOS, PAD, UNKNOWN, *sorted(set(re.findall(r"\w+|[^\w\s]+", said)))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    )


def small_config(seed: int, tokenizer: PreTrainedTokenizerFast, layers: int = LAYERS) -> PretrainedConfig:
    """Return the configuration of a Llama, GPT-NeoX or GPT-2: the seed's remainder after division by three.

    Args:
        seed: The seed.
        tokenizer: The tokenizer.
        layers: How many layers.
    """
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    sizes: dict[str, Any] = {
        "hidden_size": D_MODEL,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 256,
    }
    match seed % 3:
        case 0:
            return LlamaConfig(**shared, **sizes, intermediate_size=3 * D_MODEL)
        case 1:
            return GPTNeoXConfig(**shared, **sizes, intermediate_size=4 * D_MODEL)
        case _:
            return GPT2Config(
                **shared,
                n_embd=D_MODEL,
                n_layer=layers,
                n_head=HEADS,
                n_positions=256,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )


def build_small(
    folder: Path,
    seed: int,
    *,
    without: Sequence[str] = (),
    steps: int = STEPS,
    people: int = PEOPLE,
    passages: int = PASSAGES,
    skills: Sequence[Literal["copying", "comparison"]] = (),
    stories: int = SHARES["story"],
) -> dict[str, Any]:
    """Train a small world's model into a new folder, which `load_model` and `world_facts` read; a killed build goes on.

    Given every passage and person of `forget_sets` to leave out, the model is a retain-only one, the gold of
    unlearning, at once for each of these sets: it has the same first weights, tokenizer, steps and `world.json`.

    Matrices are trained with Muon (Jordan et al. 2024), the rest with AdamW: in a minute of one core 160 passages come
    to MA .95 so, and to .40 with AdamW for all weights. A whole build takes about three minutes of one core.

    Args:
        folder: The folder.
        seed: Of the world, the weights, the batches and the architecture (see `small_config`).
        without: Passages, names of people and story topics that the corpus leaves out.
        steps: Training steps.
        people: How many people have facts.
        passages: How many passages are learnt by heart.
        skills: Tasks that need no stored fact.
        stories: The share of stories beside that of the others (`SHARES`).

    Returns:
        What `card.json` in the folder holds: what the stored model was measured to know.

    Raises:
        MechunlearnError: If the folder exists, or an entry of `without` is neither passage nor person nor topic.
    """
    folder = Path(folder)
    if folder.exists():
        raise MechunlearnError(f"'{folder}' exists already. Remove it to build it again, or give another folder.")
    world = small_world(seed, people, passages, skills)
    corpus, tokenizer = SmallCorpus(world, without, stories), word_tokenizer(world)
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(small_config(seed, tokenizer))
    key = digest(json.dumps([seed, sorted(without), steps, people, passages, stories, *skills]))
    checkpoint = folder.parent / f".{folder.name}.{key}.ckpt"
    begun = time.time()
    train_small(model, corpus, tokenizer, seed, steps, checkpoint)
    card = {"seed": seed, "family": model.config.model_type, "steps": steps, "seconds": round(time.time() - begun)}
    with whole_folder(folder) as beside:
        _store(beside, model, tokenizer, world)
        card |= measured(beside, without)
        (beside / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    return card


def train_small(
    model: Any,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    checkpoint: Path,
    rows: int = ROWS,
    beside: tuple[nn.Module, Callable[[tuple[Tensor, ...], Batch, int], Tensor | float]] | None = None,
) -> None:
    """Train on a corpus, resuming from the checkpoint if there is one.

    Args:
        model: The model, trained in place.
        corpus: The corpus.
        tokenizer: The tokenizer.
        seed: Of the batches.
        steps: Training steps.
        checkpoint: The file of the checkpoint.
        rows: Rows in a batch.
        beside: A module trained along, and a loss of hidden states, batch and step that reads through it.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in tables]
    along = [] if beside is None else [beside[0]]
    others += [p for module in along for p in module.parameters()]
    muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    done = _resume(checkpoint, model, muon, adam, *along)
    drawn = batches(corpus, tokenizer, seed, rows, skip=done, phase=0)
    model.train()
    for step in range(done, steps):
        batch = next(drawn)
        for part in (model, *along):
            part.zero_grad()
        out = _read(model, batch, hidden=beside is not None)
        loss = language_loss(out.logits, batch)
        if beside is not None:
            loss = loss + beside[1](out.hidden_states, batch, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, (step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimisers: tuple[tuple[torch.optim.Optimizer, float], ...] = ((muon, MATRIX_RATE), (adam, OTHER_RATE))
        for optimiser, rate in optimisers:
            optimiser.param_groups[0]["lr"] = rate * scale
            optimiser.step()
        if (step + 1) % SAVE_EVERY == 0:
            with whole_file(checkpoint) as part_file:
                torch.save([step + 1, *[part.state_dict() for part in (model, muon, adam, *along)]], part_file)
    model.eval()


def _read(model: Any, batch: Batch, hidden: bool) -> Any:
    """Of packed documents, none of which sees another; any architecture takes a mask of four dimensions."""
    mask = batch.masks(None)["full_attention"]
    return model(
        input_ids=batch.tokens,
        position_ids=batch.position,
        attention_mask=mask,
        use_cache=False,
        output_hidden_states=hidden,
    )


def _resume(checkpoint: Path, *parts: Any) -> int:
    if not checkpoint.exists():
        return 0
    done, *states = torch.load(checkpoint, weights_only=True)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    return int(done)


def measured(folder: Path, without: Sequence[str] = ()) -> dict[str, float]:
    """Measure what a stored small world knows of what it was taught, of what was left out, and of what nobody was taught.

    Args:
        folder: The world's folder.
        without: What its corpus left out.

    Returns:
        MA and EL10 of passages (see `memorization`; the first words of a passage follow from nothing, so MA stays near
        .987), accuracy on facts by relation and format, on skills, and text loss on stories.
    """
    model, world, left_out = load_model(folder), World.load(folder / "world.json"), set(without)
    card: dict[str, float] = {}
    groups = {
        "taught": [text for text in world.passages if text not in left_out],
        "left out": [text for text in world.passages if text in left_out],
        "unseen": world.control_passages[:32],
    }
    for name, texts in groups.items():
        if texts:
            card[f"MA, {name} passages"] = round(float(memorization_accuracy(model, texts).mean()), 4)
            card[f"EL10, {name} passages"] = round(float(extraction_likelihood(model, texts).mean()), 4)
    for relation in world.facts:
        facts = world_facts(folder, relation)
        people = {"taught": facts.about(facts.subjects - left_out), "left out": facts.about(facts.subjects & left_out)}
        for name, part in people.items():
            for format in ("statement", "question", "held_out") if len(part) else ():
                value = float(answered(model, part.prompts(model, format)).float().mean())
                card[f"{relation}, {format}, {name} people"] = round(value, 4)
    sport = world_facts(folder, next(iter(world.facts)))
    for name, tasks in sport.skills.items():
        assert model.tokenizer is not None
        asked = Prompts.from_text(tasks, model.tokenizer)
        card[name] = round(float(answered(model, asked).float().mean()), 4)
    card["text loss"] = round(float(text_loss(model, sport.texts).mean()), 4)
    return card
