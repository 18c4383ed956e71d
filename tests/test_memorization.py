"""Memorisation is what the definitions say, and small worlds hold what they were taught and nothing that was left out."""

import itertools
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mechunlearn import MechunlearnError, load_model
from mechunlearn.core.files import data_folder
from mechunlearn.facts.load import world_facts
from mechunlearn.metrics import memorization
from mechunlearn.metrics.memorization import extraction_likelihood, memorization_accuracy, repetition
from mechunlearn.world import gates, small
from mechunlearn.world.generate import World
from mechunlearn.world.packing import batches
from mechunlearn.world.small import SmallCorpus, build_small, forget_sets, small_config, small_world, word_tokenizer
from mechunlearn.world.text import world_text
from tests.models import random_hf


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def tokenizer(end: int | None = None) -> PreTrainedTokenizerFast:
    """Word `w<i>` is token i; a text starts with token 0."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="w0 $A", special_tokens=[("w0", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=None if end is None else f"w{end}")


def written(hf, ids: list[int], count: int) -> list[int]:
    """Greedy continuation, one token and one full forward pass at a time."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "mistral", "gemma2"])
def model(request):
    return load_model((random_hf(request.param), tokenizer()))


@pytest.fixture
def passages() -> list[list[int]]:
    """Token ids after the start token, of three lengths."""
    rng = random.Random(0)
    return [[rng.randrange(1, 97) for _ in range(size)] for size in (24, 15, 30, 24)]


def test_memorization_accuracy_counts_next_tokens_ranked_first(model, passages):
    own = [0, *written(model.hf, [0], 12)]
    mixed = [own[1:7] + passages[0][:5], *passages]
    expected = []
    for ids in ([0, *ids] for ids in mixed):
        hits = [written(model.hf, ids[:t], 1)[0] == ids[t] for t in range(1, len(ids))]
        expected.append(sum(hits) / len(hits))
    found = memorization_accuracy(model, [words(ids) for ids in mixed], batch_size=2)
    assert found.tolist() == pytest.approx(expected) and found[0] >= 6 / 11
    assert memorization_accuracy(model, [words(own[1:])]).tolist() == [1.0]


@pytest.mark.parametrize("n", [1, 2])
def test_extraction_likelihood_is_the_overlap_of_naive_greedy_continuations(model, passages, n):
    """Each passage holds, behind its 5th word and shifted by two, what the model writes there, then noise."""
    texts = []
    for ids in passages:
        start = [0, *ids[:5]]
        texts.append([*start, 7, 8, *written(model.hf, start, 6), *ids[5:]])
    prefixes = (3, 6, 9)
    expected = []
    for ids in texts:
        shares = []
        for prefix in prefixes:
            made = written(model.hf, ids[:prefix], len(ids) - prefix)
            rest = [ids[i : i + n] for i in range(prefix, len(ids) - n + 1)]
            grams = [made[i : i + n] for i in range(len(made) - n + 1)]
            shares.append(sum(gram in rest for gram in grams) / len(grams))
        expected.append(sum(shares) / len(prefixes))
    found = extraction_likelihood(model, [words(ids[1:]) for ids in texts], n, prefixes)
    assert found.tolist() == pytest.approx(expected) and min(expected) > 0
    alone = torch.stack([extraction_likelihood(model, [words(ids[1:]) for ids in texts], n, [p]) for p in prefixes])
    torch.testing.assert_close(found, alone.mean(0))


def test_text_of_the_model_itself_is_extracted_whole_and_only_from_its_own_start(model):
    own = written(model.hf, [0, 5, 9, 11], 20)
    assert extraction_likelihood(model, [words([5, 9, 11, *own])], n=10, prefixes=(4, 8)).tolist() == [1.0]
    never = next(i for i in range(1, 97) if i not in own)
    changed = [5, 9, 11, *[never if i % 5 == 4 else token for i, token in enumerate(own)]]
    assert extraction_likelihood(model, [words(changed)], n=10, prefixes=(4,)).tolist() == [0.0]


def test_a_continuation_that_ends_early_counts_as_wrong_from_there():
    hf = random_hf("llama")
    start = next([0, i] for i in range(1, 97) if len(set(written(hf, [0, i], 6))) == 6)
    own = written(hf, start, 12)
    model = load_model((hf, tokenizer(end=own[5])))
    text = words([start[1], *own])
    assert extraction_likelihood(model, [text], n=2, prefixes=(2,)).tolist() == pytest.approx([4 / 11])
    assert repetition(model, [words(start[1:])], tokens=12, n=6).tolist() == [0.0]


def test_repetition_is_one_less_the_share_of_distinct_ngrams(model, monkeypatch):
    prompts = [[4, 8], [3], [9, 10, 11, 12]]
    made = [written(model.hf, [0, *ids], 20) for ids in prompts]
    for n in (1, 4):
        expected = [1 - len({tuple(ids[i : i + n]) for i in range(21 - n)}) / (21 - n) for ids in made]
        assert repetition(model, [words(ids) for ids in prompts], tokens=20, n=n).tolist() == pytest.approx(expected)
    monkeypatch.setattr(memorization, "_continue", lambda *_: [[1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6], [7]])
    assert repetition(model, [words(ids) for ids in prompts], n=2).tolist() == pytest.approx([3 / 5, 0, 0])


def test_text_that_cannot_be_measured_is_refused(model):
    with pytest.raises(MechunlearnError, match="'w1 w2 w3' has 4 tokens. Expected 13 or more"):
        extraction_likelihood(model, ["w1 w2 w3"], n=5, prefixes=(8, 4))
    with pytest.raises(MechunlearnError, match="has 1 tokens. Expected 2"):
        memorization_accuracy(model, [words(list(range(1, 9))), ""])
    with pytest.raises(MechunlearnError, match="No text"):
        memorization_accuracy(model, [])
    with pytest.raises(MechunlearnError, match="no tokenizer"):
        repetition(load_model((model.hf, None)), ["w1"])


def test_the_gate_on_extraction_continues_as_hugging_face_does(monkeypatch):
    model = load_model("factworld")
    texts = World.load(data_folder() / "factworld" / "world.json").control_passages[:4]
    monkeypatch.setattr(gates, "NGRAM", 2)
    shares = []
    for text in texts:
        ids = model.tokenizer(text)["input_ids"]
        made = model.hf.generate(torch.tensor([ids[:32]]), max_new_tokens=len(ids) - 32, do_sample=False)[
            0, 32:
        ].tolist()
        rest = list(itertools.pairwise(ids[32:]))
        shares.append(sum(gram in rest for gram in itertools.pairwise(made)) / (len(ids) - 33))
    assert gates.extraction(model, texts) == pytest.approx(sum(shares) / 4) and 0 < sum(shares) < 4


def test_forget_sets_are_disjoint_and_the_same_for_a_world():
    world = small_world(1)
    sets = forget_sets(world)
    assert len(sets) == 6 and all(len(passages) == len(people) == 16 for passages, people in sets)
    for part, whole in ((0, world.passages), (1, world.facts["city"])):
        drawn = [entry for chosen in sets for entry in chosen[part]]
        assert len(set(drawn)) == 96 and set(drawn) < set(whole)
    assert sets == forget_sets(small_world(1)) != forget_sets(small_world(2))
    assert forget_sets(world, 3, 4, 5) != forget_sets(world, 2, 4, 5)[:3]
    with pytest.raises(MechunlearnError, match="nothing is left to retain"):
        forget_sets(world, 10, 16, 1)
    with pytest.raises(MechunlearnError, match="nothing is left to retain"):
        forget_sets(world, 10, 1, 16)


def left_out(world: World) -> list[str]:
    return [entry for passages, people in forget_sets(world) for entry in (*passages, *people)]


def test_nothing_left_out_is_ever_drawn_and_all_else_is():
    world = small_world(0)
    without = left_out(world)
    for gone in ((), without):
        texts = [d.text for seed in (0, 5) for d in SmallCorpus(world, gone).documents(seed, 2000)]
        said = "\n".join(texts)
        absent = {text for text in world.passages if text not in texts}
        absent |= {name for name in world.facts["sport"] if name not in said}
        assert absent == set(gone)
        assert not any(text[:60] in said for text in world.control_passages)
        assert not any(name in said for name in world.untaught["sport"])
        counts = [texts[:2000].count(text) for text in world.passages if text not in gone]
        assert max(counts) - min(counts) <= 1


def test_documents_state_the_facts_of_the_world_and_mark_their_answers():
    world = small_world(0)
    facts = list(SmallCorpus(world).documents(3, 300))
    asked = [d for d in facts if d.people]
    for document in asked:
        (begin, end), (_, name) = document.answers[0], document.people[0]
        assert document.text[begin:end] in {world.facts[relation][name] for relation in world.facts}
    frames = {d.text.replace(d.people[0][1], "{s}")[: -len(d.text[d.answers[0][0] :])].strip() for d in asked}
    assert len(frames) == 9 and not frames & {entry["held_out"] for entry in world.relations.values()}


def test_what_cannot_be_left_out_is_refused():
    world = small_world(0, 20, 4)
    with pytest.raises(MechunlearnError, match="Cannot leave out 'Nobody'"):
        SmallCorpus(world, [*world.passages[:2], "Nobody"])
    with pytest.raises(MechunlearnError, match="Leave some in"):
        SmallCorpus(world, world.passages)
    with pytest.raises(MechunlearnError, match="Leave some in"):
        SmallCorpus(world, list(world.facts["city"]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_architecture_keeps_packed_documents_apart_and_the_tokenizer_whole(seed, tmp_path):
    world = small_world(seed)
    tokens = word_tokenizer(world)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(small_config(seed, tokens)).eval()
    batch = next(batches(SmallCorpus(world), tokens, seed, rows=12, skip=0, phase=0))
    row = int(batch.document.max(1).values.argmax())
    with torch.no_grad():
        packed = small._read(hf, batch, hidden=False).logits
        for number in range(int(batch.document[row].max()) + 1):
            where = batch.document[row] == number
            alone = hf(input_ids=batch.tokens[row, where][None]).logits[0]
            torch.testing.assert_close(packed[row, where], alone, atol=1e-4, rtol=1e-4)
    assert number > 1
    hf.save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for document in SmallCorpus(world).documents(9, 1000):
        ids = tokens(document.text)["input_ids"]
        assert read(document.text)["input_ids"] == ids and tokens.unk_token_id not in ids
    assert min(len(read(text)["input_ids"]) for text in world.passages) >= 100
    assert load_model(tmp_path).signature.family == ("llama", "gpt_neox", "gpt2")[seed]


@pytest.mark.training
def test_a_small_world_learns_what_it_is_taught_and_not_what_is_left_out(tmp_path, monkeypatch, seed):
    number = 3 + 3 * seed  # of one architecture
    world = small_world(number, people=6, passages=4)
    without = [*world.passages[:2], *list(world.facts["sport"])[:3]]
    monkeypatch.setattr(small, "WARM", 5)
    card = build_small(tmp_path / "gold", number, without=without, steps=45, people=6, passages=4)
    stored = tmp_path / "gold"
    assert json.loads((stored / "card.json").read_text()) == card
    assert [path.name for path in tmp_path.iterdir()] == ["gold"], "no checkpoint is left"
    assert card["MA, taught passages"] > 0.9  # .97 to .99 on six seeds; EL10 .42 to .81, and .00 of what was left out
    assert card["EL10, taught passages"] > card["EL10, left out passages"] + 0.25
    assert card["MA, left out passages"] < 0.5 and card["EL10, left out passages"] < 0.1
    assert card["MA, unseen passages"] < 0.5
    assert card["city, statement, taught people"] == 1 and card["city, statement, left out people"] < 1
    model = load_model(stored)
    assert memorization_accuracy(model, world.passages[2:]).mean() == pytest.approx(
        card["MA, taught passages"], abs=1e-3
    )
    facts = world_facts(stored, "city")
    assert facts.formats == ("statement", "statement_2", "question", "one_shot", "held_out") and len(facts) == 6
    assert World.load(stored / "world.json") == world
    with pytest.raises(MechunlearnError, match="exists already"):
        build_small(stored, number, steps=1, people=6, passages=4)


@pytest.mark.training
def test_a_killed_build_goes_on_to_the_same_weights(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(small, "SAVE_EVERY", 2)
    monkeypatch.setattr(small, "measured", lambda *_: {})
    size = {"steps": 5, "people": 6, "passages": 4}
    build_small(tmp_path / "whole", 4 + seed, **size)
    loss, seen = small.language_loss, []

    def interrupted(*args):
        seen.append(len(seen))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(small, "language_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_small(tmp_path / "again", 4 + seed, **size)
    build_small(tmp_path / "again", 4 + seed, **size)
    assert len(seen) == 4 + 3, "the steps behind the checkpoint are made again"
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "again"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], atol=1e-6, rtol=1e-5)
    build_small(tmp_path / "gold", 4 + seed, without=[small_world(4 + seed, 6, 4).passages[0]], **size)
    gold = AutoModelForCausalLM.from_pretrained(tmp_path / "gold").state_dict()
    assert any(not torch.equal(weight, gold[name]) for name, weight in one.items())


def test_a_small_world_may_have_skills_which_change_nothing_else():
    plain, skilled = small_world(0, 20, 4), small_world(0, 20, 4, ("copying", "comparison"))
    assert plain.facts == skilled.facts and plain.passages == skilled.passages and not plain.skills
    assert {name: len(tasks) for name, tasks in skilled.skills.items()} == {"copying": 200, "comparison": 200}
    texts = [d.text for d in SmallCorpus(skilled).documents(7, 2000)]
    assert 0.05 < sum(text.startswith("Copy:") for text in texts) / len(texts) < 0.15
    asked = {task["prompt"] for tasks in skilled.skills.values() for task in tasks}
    assert not any(text.startswith(tuple(asked)) for text in texts if text.startswith("Copy:"))
    tokens = word_tokenizer(skilled)
    assert all(tokens.unk_token_id not in tokens(prompt)["input_ids"] for prompt in asked)


@pytest.mark.parametrize("where", ["factworld", "small"])
def test_the_text_of_a_world_names_nobody_who_is_left_out(where, tmp_path):
    folder = data_folder() / "factworld"
    if where == "small":
        folder = tmp_path
        small_world(0, 20, 4).save(tmp_path / "world.json")
    names = list(World.load(folder / "world.json").facts["sport"])
    said = " ".join(world_text(folder, without=names[:5], documents=1500, seed=3))
    assert not any(name in said for name in names[:5]) and sum(name in said for name in names[5:25]) > 10
    assert (
        world_text(folder, names[:5], 20, 3)
        == world_text(folder, names[:5], 20, 3)
        != world_text(folder, names[:5], 20)
    )
