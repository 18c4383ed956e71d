"""What `explore` shows is what a plain pass over all activations says, on every kind of dictionary and model."""

import re
import weakref

import pandas as pd
import pytest
import torch
import transformers
from torch.nn import functional

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.explore.widget import explore
from mechunlearn.features import dashboard as module
from mechunlearn.features.dictionaries import Codebook, load_dictionary
from mechunlearn.features.firing import tokenized
from mechunlearn.features.training import train_sae
from mechunlearn.model.hooked import load_model
from mechunlearn.world.dictionaries import dictionary_texts, topic_stories
from tests.models import random_hf

TEXTS = [*dictionary_texts(70, seed=41), *topic_stories("war", 5, seed=3), "The cook baked the soup."]


@pytest.fixture(scope="module")
def sae():
    return load_dictionary("factworld-sae")


@pytest.fixture(scope="module")
def codebook():
    return load_dictionary("factworld-codebook")


def random_codebook(groups: int, hook_name: str = "L1.mlp_out", width: int = 128) -> Codebook:
    torch.manual_seed(3)
    return Codebook(width, 24, 2, hook_name=hook_name, groups=groups)


@torch.no_grad()
def by_hand(model, dictionary, texts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, which count, and every unit's activation at every token; not active: 0."""
    tokens, counted = tokenized(model, texts)
    h = model.cache(tokens, [dictionary.hook_name])[1][dictionary.hook_name]
    z = dictionary.encode(h)
    if isinstance(dictionary, Codebook):
        entering = dictionary.entering(h)
        each, part = dictionary.size // dictionary.groups, entering.shape[-1] // dictionary.groups
        for unit in range(dictionary.size):
            group = unit // each
            looked_up = entering[..., group * part : (group + 1) * part]
            cosine = functional.cosine_similarity(looked_up, dictionary.codes[unit], dim=-1)
            z[..., unit] = torch.where(z[..., unit] > 0, cosine, 0)
    return tokens, counted, z * counted[..., None]


@pytest.mark.parametrize("which", ["sae", "codebook", "grouped"])
def test_rates_and_strongest_texts_are_those_of_a_plain_pass(world, sae, codebook, which):
    dictionary = {"sae": sae, "codebook": codebook, "grouped": random_codebook(2)}[which]
    units = [5, 23, 0, 11]
    found = explore(world, dictionary, TEXTS, units, examples=3, words=1)
    assert len(TEXTS) > module.BATCH
    tokens, counted, z = by_hand(world, dictionary, TEXTS)
    assert list(found.rates) == units
    active = []
    for unit in units:
        rows = found.table[found.table.unit == unit]
        mine = z[..., unit]
        assert found.rates[unit] == pytest.approx(float((mine != 0).sum() / counted.sum()), abs=1e-7)
        strongest = mine.amax(1).sort(descending=True).values[:3]
        expected = strongest[strongest > 0]
        active.append(len(expected))
        assert len(rows) == len(expected)
        torch.testing.assert_close(torch.tensor(list(rows.activation)), expected, atol=1e-4, rtol=1e-4)
        assert rows.text.is_unique and set(rows.rate) <= {found.rates[unit]}
        for row in rows.to_dict("records"):
            assert float(mine[row["text"], row["position"]]) == pytest.approx(row["activation"], abs=1e-3)
            shown = world.tokenizer.decode([int(tokens[row["text"], row["position"]])])
            assert row["token"] == shown and f"«{shown.strip()}»" in row["context"]
    assert sum(active) >= 6
    assert found.to_frame() is found.table and list(found.table.unit.unique()) == [
        unit for unit, count in zip(units, active) if count
    ]


@pytest.mark.parametrize("which", ["sae", "codebook"])
def test_without_units_the_ten_most_frequently_active(world, sae, codebook, which):
    dictionary = {"sae": sae, "codebook": codebook}[which]
    found = explore(world, dictionary, TEXTS[:20], examples=1, words=1)
    _, counted, z = by_hand(world, dictionary, TEXTS[:20])
    rates = (z > 0).sum((0, 1)) / counted.sum()
    torch.testing.assert_close(torch.tensor(list(found.rates.values())), rates.sort(descending=True).values[:10])
    few = explore(world, dictionary, ["The"], examples=1)
    assert 0 < len(few.rates) <= 10 and min(few.rates.values()) > 0 and len(few.table) == len(few.rates)


def test_contexts_are_the_text_around_the_token(world, sae):
    texts = ["The knight fought the army with the sword.", "One day\nthe general\tsaw a flag."]
    found = explore(world, sae, texts, examples=2, window=3)
    _, counted, z = by_hand(world, sae, texts)
    assert len(found.table) > 10
    for (before, after), row in zip(found.contexts, found.table.to_dict("records")):
        text = texts[row["text"]].replace("\n", "↵").replace("\t", "␉")
        plain = "".join(piece for piece, _ in before + after)
        assert plain.strip() in text and "<|bos|>" not in plain
        assert row["context"].replace("«", "").replace("»", "") == plain.strip()
        assert row["context"].index("«") == len("".join(p for p, _ in before).lstrip()) + after[0][0].startswith(" ")
        length = int(counted[row["text"]].sum())  # the first position, the beginning of text, does not count
        assert len(before) == min(3, row["position"] - 1)
        assert len(after) == min(4, length + 1 - row["position"])
        start = row["position"] - len(before)
        expected = z[row["text"], start : start + len(before + after), row["unit"]]
        shown = torch.tensor([value for _, value in before + after])
        torch.testing.assert_close(shown, expected, atol=1e-3, rtol=1e-3)
    assert any("↵" in context for context in found.table.context)
    assert any("␉" in context for context in found.table.context)


def test_results_do_not_depend_on_the_batch_and_no_batch_is_kept(world, codebook, monkeypatch):
    once = explore(world, codebook, TEXTS, examples=4, words=2)
    seen: list[weakref.ref] = []
    alive: list[int] = []
    observed = module.observed

    def watched(model, dictionary, tokens, see, counted):
        alive.append(sum(ref() is not None for ref in seen))

        def kept(h):
            seen.append(weakref.ref(h))
            return see(h)

        observed(model, dictionary, tokens, kept, counted)

    monkeypatch.setattr(module, "BATCH", 5)
    monkeypatch.setattr(module, "observed", watched)
    again = explore(world, codebook, TEXTS, examples=4, words=2)
    assert len(seen) == -(-len(TEXTS) // 5) and max(alive) == 0
    assert again.rates == once.rates
    pd.testing.assert_frame_equal(again.effects, once.effects)
    pd.testing.assert_series_equal(again.table.activation, once.table.activation, atol=1e-5)


def direct(model, dictionary, unit: int) -> torch.Tensor:
    """By adding the unit at its hook point: what changes in the residual stream behind it, times the unembedding."""
    one = torch.zeros(1, 1, dictionary.size)
    with torch.no_grad():
        written = dictionary.decode(one.index_fill(-1, torch.tensor([unit]), 1)) - dictionary.decode(one)
        tokens = torch.tensor([[3, 5]])
        layer, kind = dictionary.hook_name.split(".", 1)
        after = f"{layer}.resid_mid" if kind == "attn.o" else f"{layer}.resid_post"

        def add(h):
            return h + written.view(-1, *h.shape[2:]) if kind == "attn.o" else h + written

        def resid() -> torch.Tensor:
            return model.cache(tokens, [after])[1][after][0, -1]

        plain = resid()
        with model.hooks({dictionary.hook_name: add}):
            changed = resid()
        return model.hf.get_output_embeddings().weight @ (changed - plain)


@pytest.mark.parametrize("which", ["sae", "codebook", "grouped", "mlp_out", "mlp.out", "attn.o"])
def test_effects_are_the_direct_path(world, sae, codebook, which):
    kinds = {"sae": sae, "codebook": codebook, "grouped": random_codebook(2, "L7.resid_post")}
    widths = {"mlp_out": 128, "mlp.out": 384, "attn.o": 128}
    dictionary = kinds.get(which) or random_codebook(1, f"L7.{which}", widths[which])
    found = explore(world, dictionary, TEXTS[:3], [7, 23], words=6).effects
    assert list(found.columns) == ["unit", "change", "token", "effect"] and len(found) == 24
    for unit in (7, 23):
        effects = direct(world, dictionary, unit)
        for change, sign in (("raised", 1), ("lowered", -1)):
            rows = found[(found.unit == unit) & (found.change == change)]
            values, ids = (sign * effects).topk(6)
            torch.testing.assert_close(torch.tensor(list(rows.effect)), sign * values, atol=1e-3, rtol=1e-3)
            assert [world.tokenizer.decode([i]) for i in ids[:2].tolist()] == list(rows.token[:2])


def test_units_may_be_a_mask_and_unused_ones_are_told(world, codebook):
    never = min(set(range(codebook.size)) - set(explore_all(world, codebook, TEXTS[:2])))
    chosen = torch.zeros(codebook.size, dtype=torch.bool)
    chosen[[never, 328, 9]] = True
    mask = ComponentMask({codebook.site: chosen}, world.signature)
    found = explore(world, codebook, TEXTS[:2], mask, examples=2)
    assert list(found.rates) == sorted([never, 328, 9]) and found.rates[never] == 0
    listed = explore(world, codebook, TEXTS[:2], [9, 9, 328, never], examples=2)
    assert list(listed.rates) == [9, 328, never]
    for unit in found.rates:
        pd.testing.assert_frame_equal(
            found.table[found.table.unit == unit].reset_index(drop=True),
            listed.table[listed.table.unit == unit].reset_index(drop=True),
        )
    assert never not in set(found.table.unit) and never in set(found.effects.unit)
    assert f"{never} <span" in found._repr_html_()


def explore_all(model, dictionary, texts) -> list[int]:
    return by_hand(model, dictionary, texts)[2].sum((0, 1)).nonzero().flatten().tolist()


def test_the_view_escapes_text_marks_tokens_and_stands_alone(world, sae, tmp_path):
    texts = ["The <b>cook</b> & the <script>soup</script>.", "A general marched.", *TEXTS[:9]]
    found = explore(world, sae, texts, range(512), examples=4, window=30)
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and found._repr_html_() in page
    assert "<script" not in page and "cook</b>" not in page and "&amp;" in page
    assert not re.search(r"https?:|src=|<link", page)
    assert page.count('class="line"') == len(found.table)
    assert page.count('class="token peak"') == len(found.table)
    assert page.count('class="word ') == len(found.effects)
    peaks = re.findall(r'class="token peak" title="([^"]+)" style="background:rgba\(255,150,0,([\d.]+)\)"', page)
    assert len(peaks) == len(found.table)
    assert len({alpha for _, alpha in peaks}) > 10
    for (_, alpha), row in zip(peaks, found.table.to_dict("records")):
        strongest = found.table[found.table.unit == row["unit"]].activation.max()
        assert float(alpha) == pytest.approx(0.1 + 0.5 * row["activation"] / strongest, abs=0.006)
    shaded = sum(value > 0 for before, after in found.contexts for _, value in before + after)
    assert page.count("background:rgba(255,150,0,") == shaded < sum(len(b + a) for b, a in found.contexts)


def test_tokens_of_a_model_without_a_tokenizer():
    model = load_model((random_hf("gpt2"), None))
    torch.manual_seed(0)
    tokens, lengths = torch.randint(2, 97, (6, 9)), torch.tensor([9, 4, 6, 2, 7, 9])
    dictionary = random_codebook(1, "L1.resid_mid", 32)
    found = explore(model, dictionary, (tokens, lengths), examples=2, window=2, words=200)
    assert all(row["position"] < lengths[row["text"]] for row in found.table.to_dict("records"))
    for (before, after), row in zip(found.contexts, found.table.to_dict("records")):
        start = row["position"] - len(before)
        ids = tokens[row["text"], start : min(int(lengths[row["text"]]), row["position"] + 3)].tolist()
        assert [int(piece) for piece, _ in before + after] == ids
    assert set(found.effects.groupby(["unit", "change"]).size()) == {97}


def test_an_encoder_is_explored_without_effects():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    dictionary = random_codebook(1, "encoder.block.1", 16)
    tokens, lengths = torch.randint(2, 50, (3, 6)), torch.tensor([6, 4, 6])
    found = explore(model, dictionary, (tokens, lengths), range(24), examples=3)
    alone = explore(model, dictionary, (tokens[1:2, :4], lengths[1:2]), range(24), examples=1).table
    padded = found.table[found.table.text == 1].reset_index(drop=True)  # an encoder sees what follows, but no padding
    assert list(padded.unit) == list(alone.unit) and list(padded.position) == list(alone.position)
    torch.testing.assert_close(torch.tensor(list(padded.activation)), torch.tensor(list(alone.activation)))
    assert len(found.rates) == 24 and len(alone) > 3 and found.effects.empty
    assert list(found.effects.columns) == ["unit", "change", "token", "effect"] and "raised<" not in found._repr_html_()
    model_ = load_model((random_hf("gpt2"), None))
    reads = explore(model_, random_codebook(1, "L1.attn.q", 32), (torch.randint(2, 97, (3, 6)), torch.tensor([6] * 3)))
    assert len(reads.table) and reads.effects.empty


def test_no_trace_is_left(world, codebook):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in world.hf.modules())
    before, state = world.fingerprint, torch.get_rng_state()
    found = explore(world, codebook, TEXTS[:3])
    assert world.fingerprint == before and torch.equal(torch.get_rng_state(), state)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in world.hf.modules()) == hooks
    assert all(p.grad is None for p in codebook.parameters()) and len(found.table)


@pytest.mark.parametrize(
    ("units", "told"),
    [
        ([3, 512], "Unit 512 is out of range.*0 to 511"),
        ([-1], "Unit -1 is out of range"),
        ([], "No units were given"),
    ],
)
def test_units_that_do_not_exist(world, codebook, units, told):
    with pytest.raises(MechunlearnError, match=told):
        explore(world, codebook, TEXTS[:2], units)


def test_bad_input_is_told_in_one_line(world, sae, codebook):
    chosen = ComponentMask({sae.site: torch.ones(512, dtype=torch.bool)}, world.signature)
    other = load_model((random_hf("gpt2"), None))
    tried = [
        (lambda: explore(world, codebook, [" ", ""]), "text is empty"),
        (lambda: explore(world, codebook, []), "text is empty"),
        (lambda: explore(world, codebook, TEXTS[:2], chosen), "Expected a mask of this dictionary"),
        (lambda: explore(other, codebook, (torch.ones(1, 3, dtype=torch.long), torch.tensor([3]))), "was made for"),
        (lambda: explore(world, random_codebook(1, "L1.mlp_out", 32), TEXTS[:2]), "width 32"),
        (lambda: explore(world, codebook, TEXTS[:2], examples=0), "Expected at least one"),
        (lambda: explore(world, codebook, TEXTS[:2], words=0), "Expected at least one"),
        (lambda: explore(world, codebook, TEXTS[:2], window=-1), "-1 tokens"),
    ]
    for attempt, told in tried:
        with pytest.raises(MechunlearnError, match=told) as raised:
            attempt()
        assert "\n" not in str(raised.value)


@pytest.mark.training
def test_an_sae_trained_a_moment_ago_can_be_explored(world, seed):
    made = train_sae(world, "L2.mlp_out", TEXTS[:12], size=32, used=2, steps=5, seed=seed)
    found = explore(world, made, TEXTS[:12], examples=2)
    assert len(found.rates) == 10 and (found.table.activation > 0).all()


def test_an_exploration_tells_itself_in_one_line(world, codebook):
    seen = explore(world, codebook, TEXTS[-3:], [1, 2], examples=1)
    assert repr(seen) == f"Exploration(2 units, {len(seen.table)} examples, {codebook})"
