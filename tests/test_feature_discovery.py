"""Discovery: codes of a language with known states, and every rule against a slow computation."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import false_discovery_control, fisher_exact

from mechunlearn import Localization, MechunlearnError
from mechunlearn.artifacts.overlap import auroc, overlap, rank_correlation
from mechunlearn.edit import codebook_delete
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dictionaries import load_dictionary, spliced
from mechunlearn.features.firing import FiringStatistics, matched_units, swapped
from mechunlearn.features.places import installed, signature_of
from mechunlearn.features.training import train_codebook
from mechunlearn.localize import feature_discovery
from mechunlearn.metrics.answers import logit_diff
from mechunlearn.model.hooked import load_model
from mechunlearn.world.toy import STATES, finite_states
from tests.handmade import axes, entering, random_codebook, random_sae, rows_of_tokens
from tests.models import random_hf, token_prompts


@pytest.fixture(scope="module")
def model():
    return load_model((random_hf("llama"), None))


@pytest.fixture(scope="module")
def language(seed):
    return finite_states(seed)


@pytest.fixture(scope="module")
def codebooks(language, seed):
    """Three, of one code a token, trained on the frozen model: another processor trains another one from the same seed."""
    tokens, _ = language.sequences(256, seed=1)
    texts, settings = (tokens, torch.full((256,), 20)), {"size": 64, "used": 1, "steps": 300, "spliced_steps": 50}
    return [
        train_codebook(language.model, "L1.resid_post", texts, restart=50, seed=seed + i, **settings) for i in range(3)
    ]


def by_token(language, codebook, seed: int) -> tuple[FiringStatistics, torch.Tensor]:
    """What is active at each token of some texts, a row each, and the token's state; first tokens are in none."""
    tokens, states = language.sequences(256, seed=seed)
    z = codebook.encode(entering(language.model, tokens, codebook.hook_name)[:, 1:]).flatten(0, 1)
    return FiringStatistics((z > 0).float(), z.square(), z, torch.ones(len(z))), states[:, 1:].flatten()


def discovered(language, codebook, seen: FiringStatistics, states, **settings) -> list[Localization]:
    """For each state the codes of its tokens, against those of the others."""
    parts = [[(states == state).nonzero().flatten(), (states != state).nonzero().flatten()] for state in range(STATES)]
    return [
        feature_discovery(
            language.model, seen.select(mine), dictionary=codebook, against=seen.select(others), **settings
        )
        for mine, others in parts
    ]


def detection(seen: FiringStatistics, states, state: int, codes) -> tuple[float, float]:
    """Precision and recall of "one of the codes is active" for "the token is in the state"."""
    hit, true = seen.fire_count[:, codes].any(1), states == state
    return float((hit & true).sum() / hit.sum().clamp(min=1)), float((hit & true).sum() / true.sum())


@pytest.mark.training
class TestStates:
    def test_the_language_is_what_it_says_and_the_model_speaks_it(self, language):
        tokens, states = language.sequences(64, seed=2)
        for row, of in zip(tokens[:8].tolist(), states[:8].tolist()):
            assert of[0] == -1
            for pos in range(1, len(row)):
                assert of[pos] == language.state_of[row[pos - 1], row[pos]]
                assert pos + 1 == len(row) or language.allowed[of[pos], row[pos + 1]]
        assert set(states[:, 1:].unique().tolist()) == set(range(STATES)), "every state occurs"
        with torch.no_grad():
            chances = language.model.forward(tokens)[:, 1:].softmax(-1)
        allowed = (chances * language.allowed[states[:, 1:]]).sum(-1)
        assert allowed.mean() > 0.95 and language.allowed.sum(1).tolist() == [3] * STATES
        assert torch.equal(language.sequences(64, seed=2)[0], tokens)
        assert not torch.equal(language.sequences(64, seed=3)[0], tokens)

    def test_it_is_drawn_by_its_seed_and_leaves_the_random_state(self):
        state = torch.get_rng_state()
        one, again, other = finite_states(3, steps=2), finite_states(3, steps=2), finite_states(4, steps=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert one.model.fingerprint == again.model.fingerprint != other.model.fingerprint
        assert torch.equal(one.state_of, again.state_of) and not torch.equal(one.state_of, other.state_of)
        assert all(p.grad is None for p in one.model.hf.parameters())

    def test_discovered_codes_are_the_states(self, language, codebooks):
        """Found on some texts, they tell the states of others; as many random codes that are used as often do not.

        Of 20 codebooks on 5 languages the mean over states of precision and of recall was .949 to .996, that of the
        worst state .787 to .988, and of any random codes at most .03.
        """
        rows, chance = [], []
        for codebook in codebooks:
            (seen, states), (held_out, truth) = (by_token(language, codebook, seed=seed) for seed in (1, 2))
            rows.append([])
            for state, found in enumerate(discovered(language, codebook, seen, states)):
                codes = found.above(1).sites[codebook.site].nonzero().flatten()
                rows[-1].append(detection(held_out, truth, state, codes))
                random_codes = (matched_units(seen, codes, seed=seed, among=20) for seed in range(3))
                chance += [detection(held_out, truth, state, codes) for codes in random_codes]
        assert np.mean(rows, axis=1).min() >= 0.9, f"precision and recall by codebook and state: {rows}"
        assert np.median(np.mean(rows, axis=1), axis=0).min() >= 0.94, f"precision and recall: {rows}"
        assert np.median(np.min(rows, axis=1), axis=0).min() >= 0.8, f"of the worst state: {rows}"
        assert np.max(chance) < 0.1, f"of random codes: {chance}"

    def test_deleting_a_states_codes_takes_this_state_and_leaves_others(self, language, codebooks):
        """Allowed tokens of the state lose probability, those of other states do not.

        Of 18 codebooks on 6 languages the loss of the state itself was .27 to .51 in the mean over states, and .01 to .64 in
        the least of them (its tokens may be allowed in the state of the next nearest code too); of the median of three
        codebooks at least .09. Other states lost at most .013.
        """
        tokens, truth = language.sequences(64, seed=2)

        def allowed() -> torch.Tensor:
            with torch.no_grad():
                chances = language.model.forward(tokens)[:, 1:].softmax(-1)
            mass = (chances * language.allowed[truth[:, 1:]]).sum(-1)
            return torch.stack([mass[truth[:, 1:] == state].mean() for state in range(STATES)])

        own, others = [], []
        for codebook in codebooks:
            seen, states = by_token(language, codebook, seed=1)
            with spliced(language.model, codebook):
                before = allowed()
            assert before.mean() > 0.9
            lost = []
            for found in discovered(language, codebook, seen, states):
                with codebook_delete(language.model, found.above(1), dictionary=codebook).applied(language.model):
                    lost.append(before - allowed())
            own.append(torch.stack(lost).diagonal().tolist())
            others.append(torch.stack(lost).fill_diagonal_(0).max().item())
        assert np.mean(own, axis=1).min() > 0.2, f"by codebook and state: {own}"
        assert np.median(own, axis=0).min() > 0.05 > max(others), f"by codebook and state: {own}, of others: {others}"


def activity(*fired, tokens=100.0) -> FiringStatistics:
    """One text of so many tokens, with each unit active at some of them."""
    counts = torch.tensor([[float(n) for n in fired]])
    return FiringStatistics(counts, counts * 2, counts.clamp(max=1), torch.tensor([float(tokens)]))


def discover(model, here, there, dictionary, **settings):
    found = feature_discovery(model, here, dictionary=dictionary, against=there, **settings)
    return found.scores[dictionary.site]


class TestFrequency:
    @pytest.mark.parametrize("rate", [0.01, 0.05, 0.5])
    def test_against_fishers_exact_test_and_benjamini_hochberg(self, model, rate):
        dictionary = random_codebook(model, "L1.resid_post", size=60)
        draw = np.random.default_rng(0)
        n, m = 300, 700
        mine, theirs = draw.binomial(n, draw.uniform(0, 0.1, 60)), draw.binomial(m, draw.uniform(0, 0.1, 60))
        mine[:3], theirs[:3], mine[3], theirs[4] = 0, 0, 0, 0
        scores = discover(
            model, activity(*mine, tokens=n), activity(*theirs, tokens=m), dictionary, false_discoveries=rate
        )
        seen = [i for i in range(60) if mine[i] + theirs[i]]
        chance = [
            fisher_exact([[mine[i], n - mine[i]], [theirs[i], m - theirs[i]]], alternative="greater").pvalue
            for i in seen
        ]
        adjusted = dict(zip(seen, false_discovery_control(chance)))
        wanted = [
            max(0, np.log2(((mine[i] + 0.5) / n) / ((theirs[i] + 0.5) / m)))
            if adjusted.get(i, 1) < rate and mine[i] >= 0.002 * n
            else 0
            for i in range(60)
        ]
        assert 2 < sum(score > 0 for score in wanted) < 55
        np.testing.assert_allclose(scores.numpy(), wanted, atol=1e-5)

    @pytest.mark.parametrize("by", ["frequency", "squared"])
    def test_a_unit_counts_from_the_least_share_on(self, model, by):
        dictionary = random_codebook(model, "L1.resid_post", size=4, used=1)
        here, there = activity(20, 30, 200, 0, tokens=1000), activity(0, 0, 0, 0, tokens=1000)
        for least, found in ((0.0, 3), (0.02, 3), (0.021, 2), (0.03, 2), (0.05, 1), (0.3, 0)):
            assert (discover(model, here, there, dictionary, least=least, by=by) > 0).sum() == found, least

    def test_what_tokens_are_active_is_what_is_counted(self, model):
        """From texts themselves: counts of a loop over single unpadded texts, whatever stands behind their ends."""
        dictionary = random_codebook(model, "L1.resid_post")
        tokens, lengths = rows_of_tokens(texts=30, seed=1)
        other, others = rows_of_tokens(texts=30, seed=2)
        other[:, :3] = 7  # something to find
        counts = []
        for rows, ends in ((tokens, lengths), (other, others)):
            counts.append(
                torch.stack(
                    [
                        dictionary.encode(entering(model, row[None, :end], dictionary.hook_name))[0].sum(0)
                        for row, end in zip(rows, ends)
                    ]
                ).sum(0)
            )
        by_hand = discover(
            model,
            activity(*counts[1], tokens=int(others.sum())),
            activity(*counts[0], tokens=int(lengths.sum())),
            dictionary,
        )
        assert torch.equal(discover(model, (other, others), (tokens, lengths), dictionary), by_hand)
        assert (by_hand > 0).any()
        garbage = torch.where(torch.arange(8) < others[:, None], other, 96)
        assert not torch.equal(garbage, other)
        assert torch.equal(discover(model, (garbage, others), (tokens, lengths), dictionary), by_hand)

    def test_the_nearest_codes_are_counted(self, model):
        """S' codes a token: those that a sort of all cosines puts first, not only those that are used."""
        dictionary = random_codebook(model, "L1.resid_post", linear=0)
        here, there = rows_of_tokens(texts=20, seed=1), rows_of_tokens(texts=20, seed=2)
        here[0][:, :3] = 7
        sums = []
        for tokens, lengths in (here, there):
            h = torch.cat(
                [entering(model, row[None, :end], dictionary.hook_name)[0] for row, end in zip(tokens, lengths)]
            )
            cosines = torch.cosine_similarity(h[:, None], dictionary.codes.detach()[None], dim=-1)
            ids = cosines.argsort(1, descending=True)[:, :7]
            sums.append(torch.bincount(ids.flatten(), minlength=24))
        by_hand = discover(
            model,
            activity(*sums[0].tolist(), tokens=int(here[1].sum())),
            activity(*sums[1].tolist(), tokens=int(there[1].sum())),
            dictionary,
        )
        found = feature_discovery(model, here, dictionary=dictionary, against=there, nearest=7)
        assert torch.equal(found.scores[dictionary.site], by_hand) and (by_hand > 0).any()
        assert not torch.equal(discover(model, here, there, dictionary), by_hand)
        assert found.card.settings["nearest"] == 7
        for nearest, of in ((25, dictionary), (0, dictionary), (3, random_sae(model, "L1.resid_post"))):
            with pytest.raises(MechunlearnError, match=f"Cannot count the {nearest} nearest of|got nearest=0"):
                feature_discovery(model, here, dictionary=of, against=there, nearest=nearest)


class TestSquared:
    def test_against_a_slow_loop(self, model):
        dictionary = random_sae(model, "L1.resid_post")
        here, there = rows_of_tokens(texts=12, seed=1), rows_of_tokens(texts=12, seed=2)
        here[0][:, :3] = 7
        z = []
        for tokens, lengths in (here, there):
            rows = [entering(model, row[None, :end], dictionary.hook_name)[0] for row, end in zip(tokens, lengths)]
            z.append(dictionary.encode(torch.cat(rows)).detach().double())
        squares = [of.square().mean(0) for of in z]
        floor = 1e-3 * (squares[0] + squares[1]).mean()
        ratio = ((squares[0] + floor) / (squares[1] + floor)).log2().clamp(min=0)
        for least in (0.0, 0.2):
            wanted = torch.where((z[0] > 0).double().mean(0) >= least, ratio, 0.0)
            scores = discover(model, here, there, dictionary, by="squared", least=least)
            torch.testing.assert_close(scores.double(), wanted, atol=1e-4, rtol=1e-4)
            assert (scores > 0).any() and (scores == 0).any()


class TestAttribution:
    def test_it_is_zero_ablation_where_the_metric_is_linear(self, model):
        """What the last MLP writes is added to the stream: any weighted sum of that is linear in features."""
        weights = torch.randn(32, generator=torch.Generator().manual_seed(0))
        prompts, held = token_prompts(facts=6), {}

        def linear(logits, prompts):
            del logits, prompts
            return (held["stream"] * torch.linspace(0, 1, 7)[:, None] * weights).sum((1, 2))

        for dictionary in (random_sae(model, "L2.mlp_out"), random_codebook(model, "L2.mlp_out", linear=0)):
            with model.hooks({"L2.resid_post": lambda stream: held.__setitem__("stream", stream)}):
                found = feature_discovery(model, prompts, dictionary=dictionary, by="attribution", metric=linear)
                z = dictionary.encode(entering(model, prompts.tokens, "L2.mlp_out")).detach()
                for unit in z.sum((0, 1)).topk(4).indices.tolist():
                    effect = []
                    for less in (torch.ones(z.shape[-1]), torch.arange(z.shape[-1]) != unit):
                        gone = dictionary.decode(z) - dictionary.decode(z * less)
                        with torch.no_grad(), installed(model, "L2.mlp_out", lambda h, gone=gone: h - gone):
                            effect.append(linear(model.forward(prompts.tokens), prompts).mean())
                    score = found.scores[dictionary.site][unit]
                    torch.testing.assert_close(score, effect[1] - effect[0], atol=1e-4, rtol=1e-3)
                    assert score.abs() > 1e-3

    @pytest.mark.parametrize("kind", ["sae", "codebook"])
    @pytest.mark.parametrize("of", ["prompts", "texts"])
    def test_it_is_a_finite_difference_to_first_order(self, kind, of):
        """z * (1 - step) at all tokens that count, over the step; an SAE keeps what it misses."""
        model = load_model((random_hf("llama").double(), None))
        dictionary = (random_sae if kind == "sae" else random_codebook)(model, "L1.resid_post")
        (dictionary.sae if kind == "sae" else dictionary).double()
        if kind == "sae":
            dictionary.sae.dtype = torch.float64
        prompts, (tokens, lengths) = token_prompts(facts=5), rows_of_tokens(texts=5)
        data = prompts if of == "prompts" else (tokens, lengths)
        tokens, lengths = (prompts.tokens, prompts.lengths) if of == "prompts" else (tokens, lengths)
        found = feature_discovery(model, data, dictionary=dictionary, by="attribution")
        counted = (torch.arange(tokens.shape[1]) < lengths[:, None]).double()

        def value() -> float:
            with torch.no_grad():
                logits = model.forward(tokens)
            if of == "prompts":
                return logit_diff(logits, prompts).mean()
            next_one = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            return (next_one * counted[:, 1:]).sum() / len(tokens)

        def scaled(unit: int, step: float):
            def hook(h):
                z = dictionary.encode(h).double()
                new = dictionary.decode(z)
                less = z.clone()
                less[..., unit] *= 1 - step * counted
                return dictionary.decode(less) + (h - new if kind == "sae" else 0)

            with installed(model, "L1.resid_post", hook):
                return value()

        z = dictionary.encode(entering(model, tokens, "L1.resid_post"))
        for unit in (z * counted[..., None]).sum((0, 1)).topk(4).indices.tolist():
            slope = (scaled(unit, 0.01) - scaled(unit, -0.01)) / 0.02  # norms compute in single precision
            torch.testing.assert_close(found.scores[dictionary.site][unit].double(), slope, atol=5e-5, rtol=5e-3)
            assert slope.abs() > 1e-3

    def test_more_texts_than_a_batch_give_the_mean(self, model):
        dictionary = random_sae(model, "L1.resid_post")
        tokens, lengths = rows_of_tokens(texts=70)
        parts = [
            discover(model, (tokens[rows], lengths[rows]), None, dictionary, by="attribution") * len(rows)
            for rows in torch.arange(70).split(30)
        ]
        whole = discover(model, (tokens, lengths), None, dictionary, by="attribution")
        torch.testing.assert_close(whole, sum(parts) / 70, atol=1e-5, rtol=1e-3)

    def test_a_padded_batch_gives_the_mean_of_single_texts(self, model):
        dictionary = random_codebook(model, "L1.resid_post")
        tokens, lengths = rows_of_tokens(texts=5)
        single = [
            discover(model, (row[None, :end], end[None]), None, dictionary, by="attribution")
            for row, end in zip(tokens, lengths)
        ]
        whole = discover(model, (tokens, lengths), None, dictionary, by="attribution")
        torch.testing.assert_close(whole, torch.stack(single).mean(0), atol=1e-5, rtol=1e-4)

    def test_it_leaves_the_dictionary_as_it_was(self, model):
        dictionary = random_codebook(model, "L1.resid_post")
        dictionary.codes.requires_grad_(False)
        discover(model, rows_of_tokens(), None, dictionary, by="attribution")
        flags = {name: p.requires_grad for name, p in dictionary.named_parameters()}
        assert not flags.pop("codes") and all(flags.values())
        assert all(p.grad is None for p in dictionary.parameters())

    def test_the_beginning_of_the_text_does_not_count(self, world):
        """Attribution by hand at a dimension for each feature, where -z dm/dz is minus the activation times its slope."""
        texts, sae = ["The knight fought the army."] * 2, axes(world, "L3.resid_post")
        tokens = world.tokenizer(texts, return_tensors="pt").input_ids
        if tokens[0, 0] != world.tokenizer.bos_token_id:
            tokens = torch.cat([torch.full((2, 1), world.tokenizer.bos_token_id), tokens], 1)
        logits, kept = world.cache(tokens, ["L3.resid_post"], grad=True)
        chances = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        special = torch.isin(tokens, torch.tensor(world.tokenizer.all_special_ids))
        h = kept["L3.resid_post"]
        (slope,) = torch.autograd.grad((chances * ~special[:, 1:]).sum(), h)
        effect = -(h.clamp(min=0) * slope).detach()
        wanted = (effect * ~special[..., None]).sum((0, 1)) / 2
        scores = discover(world, (tokens, torch.tensor([tokens.shape[1]] * 2)), None, sae, by="attribution")
        torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(effect.sum((0, 1)) / 2, wanted, atol=1e-3), "it would have counted"

    def test_the_metric_is_on_the_card(self, model):
        dictionary = random_sae(model, "L1.resid_post")
        told = {
            of: feature_discovery(model, data, dictionary=dictionary, by="attribution").card.settings["metric"]
            for of, data in (("prompts", token_prompts()), ("texts", rows_of_tokens()))
        }
        assert told == {"prompts": "logit_diff", "texts": "log-probability of the text"}


@pytest.mark.parametrize("by", ["frequency", "squared"])
class TestAgainst:
    @pytest.mark.parametrize("kind", ["sae", "codebook"])
    def test_nothing_is_found_where_there_is_no_difference(self, model, by, kind):
        dictionary = (random_sae if kind == "sae" else random_codebook)(model, "L1.resid_post")
        prompts, text = token_prompts(), rows_of_tokens()
        same = Prompts.from_tokens(prompts.tokens, prompts.tokens, prompts.answers[:, 0], prompts.foils[:, 0])
        for here, there in ((text, text), (same, None)):
            found = feature_discovery(model, here, dictionary=dictionary, against=there, by=by)
            assert not found.scores[dictionary.site].any() and len(found.above(0)) == 0
            assert f"no unit of {dictionary} is enriched" in found.note
        if kind == "codebook":
            with pytest.raises(MechunlearnError, match="selects nothing of Codebook.*look at the localization's note"):
                codebook_delete(model, found.above(1), dictionary=dictionary)

    def test_prompts_have_their_corrupt_partners(self, model, by):
        dictionary, prompts = random_codebook(model, "L1.resid_post", size=200), token_prompts(facts=60)
        corrupt = prompts.corrupt.clone()
        corrupt[:, 2:4] = 5
        prompts = Prompts.from_tokens(prompts.tokens, corrupt, prompts.answers[:, 0], prompts.foils[:, 0])
        alone = discover(model, prompts, None, dictionary, by=by)
        told = discover(model, prompts, (prompts.corrupt, prompts.lengths), dictionary, by=by)
        assert torch.equal(alone, told) and (alone > 0).any()
        backwards = discover(
            model, (prompts.corrupt, prompts.lengths), (prompts.tokens, prompts.lengths), dictionary, by=by
        )
        assert (backwards > 0).any() and not ((backwards > 0) & (alone > 0)).any(), "no unit is of both"

    def test_what_was_seen_costs_no_forward_pass(self, model, by):
        dictionary, here, there = random_sae(model, "L1.resid_post"), rows_of_tokens(), rows_of_tokens(seed=1)
        passes: list[int] = []
        handle = model.hf.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
        try:
            told = discover(model, here, there, dictionary, by=by)
            assert len(passes) == 2
            seen = [FiringStatistics.of(model, dictionary, text) for text in (here, there)]
            passes.clear()
            assert torch.equal(discover(model, *seen, dictionary, by=by), told) and not passes
            assert torch.equal(discover(model, seen[0], there, dictionary, by=by), told) and len(passes) == 1
        finally:
            handle.remove()


class TestWhatComesBack:
    def test_a_localization_of_the_dictionarys_units(self, model, tmp_path):
        dictionary = random_codebook(model, "L1.resid_post")
        here, there = rows_of_tokens(texts=20, seed=1), rows_of_tokens(texts=20, seed=2)
        here[0][:, :3] = 7
        found = feature_discovery(model, here, dictionary=dictionary, against=there, seed=3)
        assert list(found.scores) == [dictionary.site] and found.signature == model.signature and not found.note
        assert found.card.seed == 3 and found.card.model == model.fingerprint
        assert found.evidence == {"tokens": [float(here[1].sum()), float(there[1].sum())]}
        assert len(found.top(weights=0.25)) == 6 == len(found.top(units=6)), "a share of the units"
        assert found.share(found.top(units=6)) == 0.25
        assert 0 < len(found.above(1)) < 24
        for name in ("found.json", "found.safetensors"):
            found.save(tmp_path / name)
            again = Localization.load(tmp_path / name)
            assert torch.equal(again.scores[dictionary.site], found.scores[dictionary.site])
            assert again.card == found.card and again.evidence == found.evidence
            assert again.above(1) == found.above(1) and again.unit_weights == found.unit_weights
        assert json.loads((tmp_path / "found.json").read_text())["about"]["card"]["settings"]["by"] == "frequency"

    @pytest.mark.training
    def test_agreement_between_the_rules_is_a_table(self, language, codebooks):
        """On the language two rules find the same codes of a state, which attribution ranks above others.

        Of 18 codebooks on 6 languages the area under attribution's ROC curve was .67 to .75 in the mean over states, with no
        more in common at the top than chance would have; the mean rank correlation of the other rules was .91 to .99, and
        at their top they had 80 % or more in common.
        """
        areas, ranks, tokens, of = [], [], *language.sequences(128, seed=5)
        for codebook in codebooks:
            seen, states = by_token(language, codebook, seed=1)
            rules = {by: discovered(language, codebook, seen, states, by=by) for by in ("frequency", "squared")}
            areas.append([])
            ranks.append(np.mean([rank_correlation(*both) for both in zip(*rules.values())]))
            for state in range(STATES):
                found = {by: each[state] for by, each in rules.items()}
                ends = [(row, pos + 1) for row, pos in (of == state).nonzero().tolist() if 2 <= pos < 18]
                prefixes = torch.stack([tokens[row, end - 3 : end + 1] for row, end in ends])
                text = prefixes, torch.full((len(ends),), 4)
                found["attribution"] = feature_discovery(language.model, text, dictionary=codebook, by="attribution")
                mine = found["frequency"].above(1)
                table = overlap(found, weights=len(mine) / codebook.size)
                assert isinstance(table, pd.DataFrame) and list(table.index) == list(table.columns) == list(found)
                assert table.loc["frequency", "squared"] >= 0.6 and (np.diag(table) == 1).all()
                areas[-1].append(auroc(found["attribution"], mine))
        assert np.mean(areas, axis=1).min() > 0.6, f"by codebook and state: {areas}"
        assert min(ranks) > 0.8

    def test_an_encoder_decoder_model(self):
        import transformers

        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=97, d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8, decoder_start_token_id=0
        )
        t5 = transformers.T5ForConditionalGeneration(config).eval()
        dictionary = random_codebook(t5, "encoder.block.1")
        here, there = rows_of_tokens(texts=20, seed=1), rows_of_tokens(texts=20, seed=2)
        here[0][:, :3] = 7
        found = feature_discovery(t5, here, dictionary=dictionary, against=there)
        assert found.signature == signature_of(t5) and len(found.above(1))
        assert len(found.top(weights=0.25)) == 6
        codebook_delete(t5, found.above(1), dictionary=dictionary)
        with pytest.raises(MechunlearnError, match="Attribution needs gradients: give a hooked model"):
            feature_discovery(t5, here, dictionary=dictionary, by="attribution")


class TestTheShippedWorld:
    def test_texts_and_their_swapped_partners(self, world):
        """Discovery on a topic's sentences against the same sentences with the topic's words swapped."""
        codebook = random_codebook(world, "L3.resid_post", size=256, used=8)
        words, others = ["knight", "army", "fought"], {"knight": ["cook"], "army": ["soup"], "fought": ["baked"]}
        topic = ["The knight fought the army.", "The army fought a knight."] * 8
        swap = swapped(topic, words, others)
        found = feature_discovery(world, topic, dictionary=codebook, against=swap)
        mine = found.above(1)
        assert 0 < len(mine) < 80
        seen = [FiringStatistics.of(world, codebook, text).rates() for text in (topic, swap)]
        chosen = mine.sites[codebook.site]
        assert (seen[0][chosen] > 2 * seen[1][chosen]).all()
        assert not feature_discovery(world, swap, dictionary=codebook, against=swap).scores[codebook.site].any()

    def test_an_empty_topic(self, world):
        codebook = random_codebook(world, "L3.resid_post")
        for empty in ([], [""], ["  ", "\n"]):
            for by in ("frequency", "squared", "attribution"):
                with pytest.raises(MechunlearnError, match="The text is empty, so no feature can be told from it"):
                    feature_discovery(world, empty, dictionary=codebook, against=["The cook."], by=by)
        with pytest.raises(MechunlearnError, match="The text is empty"):
            feature_discovery(world, ["The cook."], dictionary=codebook, against=[" "])


def test_bad_input(model):
    dictionary, text = random_codebook(model, "L1.resid_post"), rows_of_tokens()
    seen = FiringStatistics.of(model, dictionary, text)
    smaller = FiringStatistics.of(model, random_codebook(model, "L1.resid_post", size=8), text)
    other = load_model((random_hf("gpt2"), None))
    cases = [
        (model, text, {}, "There is nothing to compare the topic with. Give against="),
        (model, seen, {}, "There is nothing to compare the topic with. Give against="),
        (model, smaller, {"against": text}, "The activity is of 8 and 24 units"),
        (model, seen, {"against": smaller}, "The activity is of 24 and 8 units"),
        (model, seen, {"by": "attribution"}, "Attribution needs gradients"),
        (model, text, {"by": "chance", "against": text}, "'chance'. Expected one of frequency, squared, attribution"),
        (model, seen.select([]), {"against": seen}, "There is text without a token that counts"),
        (model, ["The cook."], {"against": ["A."]}, "This model has no tokenizer: give tokens and their lengths"),
        (other, text, {"against": text}, r"was made for \(llama.*the model is \(gpt2"),
    ]
    for of, data, settings, line in cases:
        with pytest.raises(MechunlearnError, match=line) as error:
            feature_discovery(of, data, dictionary=dictionary, **settings)
        assert "\n" not in str(error.value)


def test_dimensions_as_features_say_which_tokens_they_are_of(toy):
    """Planted: of the facts with one answer, the look-up's direction of that answer and their subjects' own are found."""
    sae = axes(toy.model, "L0.resid_post")
    mine, others = ([i for i in range(24) if (i % 4 == 1) == of] for of in (True, False))
    found = feature_discovery(
        toy.model, toy.prompts(mine), dictionary=sae, against=toy.prompts(others), false_discoveries=0.01
    )
    assert [component.unit for component in found.above(0)] == [25]


def test_a_dictionary_of_a_model_with_other_weights_is_named_in_the_note(world):
    codebook = load_dictionary("factworld-codebook")
    texts = {"prompts": ["The knight fought the army."] * 16, "against": ["The cook baked the soup."] * 16}
    assert feature_discovery(world, **texts, dictionary=codebook).note == ""
    twin = load_model("factworld-twin")
    assert "fitted on a model with other weights" in feature_discovery(twin, **texts, dictionary=codebook).note
