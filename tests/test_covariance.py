"""The second moment of W_out's inputs equals the plain sum over tokens, and a cached or resumed one is the same bits."""

import errno
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from mechunlearn import MechunlearnError, load_facts, load_model
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core import tensors
from mechunlearn.model.decoder import Decoder
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training import covariance as moments
from mechunlearn.training import solve
from mechunlearn.training.covariance import Covariance
from tests.models import random_hf

SITES = ("L0.mlp.out", "L1.mlp.out")
LATER = ("L2.mlp.out", "L5.mlp.out")
LENGTHS = torch.tensor([9, 4, 7, 1, 5])


def batch() -> torch.Tensor:
    return torch.randint(2, 97, (len(LENGTHS), int(LENGTHS.max())), generator=torch.Generator().manual_seed(3))


def by_loop(model: HookedModel, site: str, first: int = 0) -> torch.Tensor:
    """One row without its padding and one token at a time, from a whole forward pass."""
    total, count = 0, 0
    for row, length in zip(batch(), LENGTHS.tolist()):
        _, kept = model.cache(row[None, :length], [site])
        for k in kept[site][0, first:].double():
            total, count = total + torch.outer(k, k), count + 1
    return total / count


@pytest.fixture(scope="module", params=["gpt2", "gptj", "gpt_neox", "llama", "gemma2"])
def small(request) -> HookedModel:
    return load_model((random_hf(request.param), None))


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return load_model((random_hf("llama"), None))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(load_facts("factworld/sport").texts[:40])


@pytest.fixture(scope="module")
def collected(world, texts) -> Covariance:
    """Uninterrupted and uncached, six batches."""
    return Covariance.of_text(world, LATER, texts, batch_size=7)


@pytest.fixture
def passes(monkeypatch) -> list[tuple[str, ...]]:
    """The sites of each forward pass."""
    seen: list[tuple[str, ...]] = []
    observe = Decoder.observe

    def noted(self, tokens, hooks):
        seen.append(tuple(hooks))
        observe(self, tokens, hooks)

    monkeypatch.setattr(Decoder, "observe", noted)
    return seen


def by_word(texts: list[str]) -> dict[str, list[list[int]]]:
    """A tokenizer that gives nothing for an empty text."""
    return {"input_ids": [[ord(word[0]) for word in text.split()] for text in texts]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def same(moment: Covariance, other: Covariance) -> bool:
    return moment.count == other.count and all(torch.equal(moment.matrix(s), other.matrix(s)) for s in moment.sites)


@pytest.mark.parametrize("first", [False, True])
def test_it_is_the_mean_over_tokens_of_outer_products(small, first):
    moment = Covariance(small, SITES, skip_first=first).update(batch(), LENGTHS)
    assert moment.count == (21 if first else 26)
    for site in SITES:
        truth, found = by_loop(small, site, int(first)), moment.matrix(site)
        assert found.dtype == torch.float64 and torch.equal(found, found.T)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-6 * truth.max().item())
        assert truth.max() > 1e-3


def test_a_float64_model_adds_up_in_float64():
    model = load_model((random_hf("llama").double(), None))
    truth, found = by_loop(model, SITES[1]), Covariance(model, SITES).update(batch(), LENGTHS).matrix(SITES[1])
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-14 * truth.max().item())


def test_a_bfloat16_model_adds_up_in_float32_or_more():
    """In bfloat16 a sum of equal numbers stops growing at 256 of them."""
    model = load_model("factworld", dtype="bfloat16")
    tokens, lengths = torch.arange(20, 28)[None], torch.tensor([8])
    once = Covariance(model, ["L0.mlp.out"]).update(tokens, lengths).matrix("L0.mlp.out")
    often = Covariance(model, ["L0.mlp.out"]).update(tokens.repeat(600, 1), lengths.repeat(600)).matrix("L0.mlp.out")
    torch.testing.assert_close(often, once, rtol=0, atol=1e-5 * once.max().item())


def test_padding_does_not_count(small):
    tokens = batch()
    other = torch.where(torch.arange(9) < LENGTHS[:, None], tokens, 50)
    assert (other != tokens).any()
    moment, again = (Covariance(small, SITES).update(given, LENGTHS) for given in (tokens, other))
    for site in SITES:
        torch.testing.assert_close(moment.matrix(site), again.matrix(site), rtol=0, atol=1e-12)


def test_one_pass_gives_what_a_pass_for_each_site_gives(small):
    together = Covariance(small, [*reversed(SITES), SITES[0]]).update(batch(), LENGTHS)
    assert together.sites == SITES
    for site in SITES:
        assert torch.equal(together.matrix(site), Covariance(small, [site]).update(batch(), LENGTHS).matrix(site))


def test_the_forward_pass_ends_at_the_last_site(small):
    def late(*args: object) -> None:
        raise AssertionError("a block above the last site was called")

    handle = small.decoder.blocks[2].register_forward_pre_hook(late)
    try:
        Covariance(small, SITES).update(batch(), LENGTHS)
        with pytest.raises(AssertionError):
            Covariance(small, ["L2.mlp.out"]).update(batch(), LENGTHS)
    finally:
        handle.remove()


@pytest.mark.parametrize("units, small", [(48, 512), (512, 512), (1100, 512), (301, 16)])
def test_strips_give_the_whole_product(units, small, monkeypatch):
    monkeypatch.setattr(solve, "TOKENS", 30)
    monkeypatch.setattr(solve, "SMALL", small)
    k = torch.randn(70, units, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(units, units, dtype=torch.float64)
    solve.add_products(total, k)
    torch.testing.assert_close(total.triu(), (k.double().T @ k.double()).triu(), rtol=0, atol=1e-4)
    strips = 1 if units <= small else min(8, -(-units // small))
    last = units - (strips - 1) * max(small, -(-units // 8))
    assert (total[-last:, :-last] == 0).all(), "what is below the diagonal strips is not computed"
    assert strips == 1 or (total[-1, -last:] != 0).all()


def test_texts_give_what_single_texts_give(world, texts, collected):
    singly = Covariance(world, LATER)
    for text in texts:
        ids = torch.tensor([world.tokenizer(text)["input_ids"]])
        singly.update(ids, torch.tensor([ids.shape[1]]))
    assert collected.count == singly.count and collected.sites == LATER
    assert collected.fingerprint == world.fingerprint and not collected.skip_first
    for site in LATER:
        truth = singly.matrix(site)
        torch.testing.assert_close(collected.matrix(site), truth, rtol=0, atol=1e-6 * truth.max().item())
    assert Covariance.of_text(world, LATER[:1], texts, skip_first=True).count == singly.count - len(texts)


def test_further_sites_are_collected_once_and_only_where_the_texts_are_known(world, texts, collected, passes):
    first = Covariance.of_text(world, LATER[:1], texts, batch_size=7)
    passes.clear()
    assert first.at(world, LATER[:1]) is first and not passes, "nothing is missing"
    more = first.at(world, LATER)
    assert set(passes) == {LATER[1:]} and first.sites == LATER[:1] and more.count == collected.count
    for site in LATER:
        truth = collected.matrix(site)
        torch.testing.assert_close(more.matrix(site), truth, rtol=0, atol=1e-6 * truth.max().item())
    singly = Covariance(world, LATER[:1])
    singly.update(torch.tensor([world.tokenizer(texts[0])["input_ids"]]), torch.tensor([3]))
    assert singly.at(world, LATER) is singly, "its texts are not known"


def test_short_texts_come_first_and_an_empty_one_is_none(world, monkeypatch):
    widths: list[int] = []
    monkeypatch.setattr(world, "tokenizer", by_word)
    monkeypatch.setattr(Decoder, "observe", lambda self, tokens, hooks: widths.append(tokens.shape[1]))
    moment = Covariance.of_text(world, LATER, ["a b c d", "", "a", "a b c", "a b"], batch_size=2)
    assert widths == [2, 4] and moment.count == 10
    with pytest.raises(MechunlearnError, match="2 texts have 0 tokens"):
        Covariance.of_text(world, LATER, ["a", "b"], skip_first=True)
    with pytest.raises(MechunlearnError, match="600 tokens, the model's context is 512"):
        Covariance.of_text(world, LATER, ["a", "the " * 600])


def test_what_is_cached_is_not_computed_again(world, texts, collected, passes, tmp_path):
    first = Covariance.of_text(world, LATER[:1], texts, batch_size=7, cache=tmp_path / "cache")
    assert passes == [LATER[:1]] * 6 and len(names(tmp_path / "cache")) == 1
    passes.clear()
    both = Covariance.of_text(world, LATER, texts, batch_size=7, cache=tmp_path / "cache")
    assert passes == [LATER[1:]] * 6 and len(names(tmp_path / "cache")) == 2
    passes.clear()
    again = Covariance.of_text(world, LATER, texts, batch_size=13, cache=tmp_path / "cache")
    assert not passes
    assert same(first, both) and same(both, collected) and same(again, collected)


def test_another_text_or_first_token_is_another_file(world, passes, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "tokenizer", by_word)
    Covariance.of_text(world, LATER[:1], ["a b c", "d e"], cache=tmp_path)
    for others, skip in ((["a b c", "e d"], False), (["a b c"], False), (["a b c", "d e"], True)):
        passes.clear()
        Covariance.of_text(world, LATER[:1], others, skip_first=skip, cache=tmp_path)
        assert passes
    assert len(names(tmp_path)) == 4


def killed(world, texts, folder: Path, monkeypatch, owner: object, name: str, calls: int) -> None:
    """Collect, saving after each batch, until some function is called once too often."""
    with monkeypatch.context() as patch:
        real, made = getattr(owner, name), []

        def dying(*args, **settings):
            made.append(0)
            if len(made) > calls:
                raise KeyboardInterrupt
            return real(*args, **settings)

        patch.setattr(owner, name, dying)
        patch.setattr(moments, "SAVE_EVERY", -1)
        with pytest.raises(KeyboardInterrupt):
            Covariance.of_text(world, LATER, texts, batch_size=7, cache=folder)


@pytest.mark.parametrize(
    "owner, name, calls, left",
    [
        (Decoder, "observe", 0, [LATER] * 6),
        (Decoder, "observe", 3, [LATER] * 3),
        (tensors, "save", 5, [LATER[1:]] + [LATER] * 3),
        (tensors, "save", 11, [LATER[1:]]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    world, texts, collected, passes, tmp_path, monkeypatch, owner, name, calls, left
):
    killed(world, texts, tmp_path, monkeypatch, owner, name, calls)
    passes.clear()
    assert same(Covariance.of_text(world, LATER, texts, batch_size=7, cache=tmp_path), collected)
    assert passes == left
    assert len(names(tmp_path)) == 2 and not any(".part" in name for name in names(tmp_path))


def test_a_partial_file_of_another_batch_size_is_refused(world, texts, tmp_path, monkeypatch):
    killed(world, texts, tmp_path, monkeypatch, Decoder, "observe", 3)
    with pytest.raises(MechunlearnError, match=r"\.partial\.safetensors' has batch_size 7 \(expected 8\)\. Delete it"):
        Covariance.of_text(world, LATER, texts, batch_size=8, cache=tmp_path)


def test_nothing_is_saved_between_times(world, texts, tmp_path, monkeypatch):
    written: list[str] = []
    save = tensors.save
    monkeypatch.setattr(tensors, "save", lambda path, *rest: (written.append(path.name), save(path, *rest)))
    Covariance.of_text(world, LATER, texts, batch_size=7, cache=tmp_path)
    assert sorted(written) == names(tmp_path) and len(written) == 2


def test_a_file_that_is_not_what_its_name_says_is_refused(world, texts, collected, tmp_path):
    twin = load_model("factworld-twin")
    for model, some in ((world, texts), (twin, texts), (world, texts[:39])):
        Covariance.of_text(model, LATER[:1], some, cache=tmp_path)
    own = next(p for p in tmp_path.iterdir() if world.fingerprint in p.name and f"-{collected.count}-" in p.name)
    theirs = next(path for path in tmp_path.iterdir() if twin.fingerprint in path.name)
    shorter = next(path for path in tmp_path.iterdir() if path not in (own, theirs))
    sited = own.with_name(own.name.replace(*LATER))
    shutil.copy(own, sited)
    with pytest.raises(MechunlearnError, match=f"{LATER[1]}.* has site {LATER[0]} .expected {LATER[1]}.* Delete it"):
        Covariance.of_text(world, LATER, texts, cache=tmp_path)
    shutil.copy(shorter, own)
    with pytest.raises(MechunlearnError, match=f"has text .*, tokens .* .expected {collected.count}"):
        Covariance.of_text(world, LATER[:1], texts, cache=tmp_path)
    shutil.copy(theirs, own)
    wanted = f"'{re.escape(str(own))}' has model {twin.fingerprint} .expected {world.fingerprint}.*Delete it"
    with pytest.raises(MechunlearnError, match=wanted):
        Covariance.of_text(world, LATER[:1], texts, cache=tmp_path)


def test_a_damaged_file_is_refused(world, texts, tmp_path):
    Covariance.of_text(world, LATER[:1], texts, cache=tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MechunlearnError, match=f"'{re.escape(str(path))}' is not a whole .* Delete it, and it is"):
        Covariance.of_text(world, LATER[:1], texts, cache=tmp_path)
    ComponentMask.of(["L0.mlp.out[0]"], world.signature).save(path)
    with pytest.raises(MechunlearnError, match="holds a mask, not a covariance. Delete it"):
        Covariance.of_text(world, LATER[:1], texts, cache=tmp_path)


@pytest.mark.parametrize("every", [-1.0, 30.0])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_leaves_nothing(world, texts, tmp_path, monkeypatch, error, every):
    def full(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(tensors, "save_file", full)
    monkeypatch.setattr(moments, "SAVE_EVERY", every)
    with pytest.raises(MechunlearnError, match="Could not write '.*No space left on device. Nothing was left"):
        Covariance.of_text(world, LATER, texts, batch_size=7, cache=tmp_path)
    assert names(tmp_path) == []


def test_statistics_that_do_not_serve_are_refused(world, texts, collected, llama):
    collected.check(world, LATER)
    with pytest.raises(MechunlearnError, match=f"model {world.fingerprint}, the given one is {llama.fingerprint}"):
        collected.check(llama, LATER)
    with pytest.raises(MechunlearnError, match="No second moment of 'L3.mlp.out'. Expected one of L2.mlp.out, L5"):
        collected.check(world, [*LATER, "L3.mlp.out"])
    few = Covariance.of_text(world, LATER, texts[:4])
    units = world.signature.d_mlp
    with pytest.raises(MechunlearnError, match=f"'L2.mlp.out' is singular: {few.count} tokens .* at least {units}"):
        few.check(world, LATER)
    enough = Covariance(llama, SITES)
    enough.update(batch().repeat(6, 1)[:6, :8], torch.tensor([8, 8, 8, 8, 8, 7]))
    with pytest.raises(MechunlearnError, match="'L0.mlp.out' is singular: 47 tokens .* at least 48"):
        enough.check(llama, SITES)
    enough.update(batch()[:1], torch.tensor([1])).check(llama, SITES)
    assert enough.count == llama.signature.d_mlp == 48


@pytest.mark.parametrize(
    "sites, words",
    [
        (["L3.mlp.out"], "'L3.mlp.out' is not .* llama: .* with a layer below 3"),
        (["L0.mlp.out", "L0.mlp.in"], "'L0.mlp.in' is not what enters a W_out"),
        (["L0.attn.o"], "'L0.attn.o' is not"),
        (["L0.mlp.out[4]"], r"'L0.mlp.out\[4\]' is not .* no \[unit\]"),
        (["mlp.out"], "malformed"),
        ([], "No site was given"),
    ],
)
def test_sites_that_are_none_are_refused(llama, sites, words):
    with pytest.raises(MechunlearnError, match=words):
        Covariance(llama, sites)


def test_mistakes_are_named(llama, world, texts):
    moment = Covariance(llama, SITES)
    with pytest.raises(MechunlearnError, match="after 0 tokens"):
        moment.matrix(SITES[0])
    with pytest.raises(MechunlearnError, match="No second moment of 'L2.mlp.out'"):
        moment.update(batch(), LENGTHS).matrix("L2.mlp.out")
    with pytest.raises(MechunlearnError, match="no tokenizer"):
        Covariance.of_text(llama, SITES, texts)
    with pytest.raises(MechunlearnError, match="0 texts have 0 tokens"):
        Covariance.of_text(world, LATER, [])
    with pytest.raises(MechunlearnError, match="batch_size=0"):
        Covariance.of_text(world, LATER, texts, batch_size=0)


def test_a_model_that_changes_on_the_way_is_refused():
    model = load_model((random_hf("llama"), None))
    moment = Covariance(model, SITES).update(batch(), LENGTHS)
    model.hf.train()
    with pytest.raises(MechunlearnError, match="is in training mode"):
        moment.update(batch(), LENGTHS)
    model.hf.eval()
    with torch.no_grad():
        model.hf.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(
        MechunlearnError, match=f"fingerprint {model.fingerprint} .* at the start .{moment.fingerprint}"
    ):
        moment.update(batch(), LENGTHS)
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(MechunlearnError, match="'L1.mlp.out' are not finite in torch.float32"):
        Covariance(model, SITES).update(batch(), LENGTHS)
