"""The invariants on language models that others trained: SmolLM2 and Gemma 3, from the GGUF files of Python packages."""

import inspect
from dataclasses import replace

import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechunlearn import Circuit, ComponentMask, Localization, load_facts
from mechunlearn.core.methods import methods
from mechunlearn.edit import masked_gradient
from mechunlearn.edit.closed_form.edit_prompts import EditPrompts
from mechunlearn.edit.closed_form.target_values import changes_what_is_said
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.model.gguf import packaged
from mechunlearn.model.hooked import export, load_model
from mechunlearn.training.covariance import Covariance
from tests.handmade import mask_of, random_codebook, random_sae
from tests.test_invariants import CLOSED_FORM, EDITORS, FEATURE, WALKED, content, moved_by, named, takes

pytestmark = pytest.mark.real

COUNTRIES = {"France": "Paris", "Norway": "Oslo", "Japan": "Tokyo", "New Zealand": "Wellington"}
COUNTRIES |= {"Saudi Arabia": "Riyadh", "Sri Lanka": "Colombo", "Cuba": "Havana", "Peru": "Lima"}
TEXTS = [
    "The capital of France is",
    "Столица Норвегии —",
    "日本の首都は",
    "2 + 2 = 4, and 1234567.89",
    "Zürich 🙂  two spaces\n\tand a tab",
]
CONTINENTS = {
    "Europe": "France, Norway, Italy, Poland, Spain, Austria, Greece, Sweden",
    "Asia": "Japan, China, India, Thailand, Vietnam, Nepal, Mongolia, Pakistan",
    "Africa": "Kenya, Egypt, Nigeria, Ghana, Morocco, Angola, Mali, Chad",
}
SITE = "L3.resid_post"
CHEAP = {
    "activation_patching": {"kinds": ("mlp_out",)},
    "causal_tracing": {"kinds": ("mlp_out",)},
    "fact_lookup": {"rule": "paths"},
    "path_patching": {"receivers": ("logits",)},
    "edge_patching": {"names": ["m0->m3", "a1.h1->logits", "m0->a3.h0<v>"]},
}
SHORT = {
    "steps": 2,
    "rank": 1,
    "covariance_weight": 20_000,
    "energy": 0.6,
    "eliminate": False,
    "prefixes": 0,
    "texts": ["The bus was late again, so we walked.", "She put the letter on the table."],
    "progress": False,
}
ATTACKS = {"steps": 1, "eval_every": 1, "lrs": (1e-4,), "min_retention": 0.0, "bits": (8,), "tokens": 2, "size": 0.1}


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def prompts(real, tmp_path_factory):
    """Eight capitals, of several lengths in tokens."""
    path = tmp_path_factory.mktemp("facts") / "capitals.csv"
    rows = [f"{country},The capital of {country} is,{city}" for country, city in COUNTRIES.items()]
    path.write_text("\n".join(["subject,prompt,answer", *rows]), encoding="utf-8")
    found = load_facts(path).prompts(real)
    assert len(set(found.lengths.tolist())) > 1, "padding is tested"
    return found


@pytest.fixture(scope="module")
def plain(real):
    """The same checkpoint as transformers alone reads it."""
    folder = packaged(real.name)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def weights(model) -> dict[str, str]:
    """A hash of every parameter."""
    return {n: xxhash.xxh3_128_hexdigest(p.detach().numpy().data) for n, p in model.hf.named_parameters()}


def trace(model) -> dict:
    """All that a method could leave behind."""
    modules = dict(model.hf.named_modules())
    return {
        "weights": weights(model),
        "gradients": {n: p.grad is not None and p.grad.sum().item() for n, p in model.hf.named_parameters()},
        "flags": [p.requires_grad for p in model.hf.parameters()],
        "training": [name for name, module in modules.items() if module.training],
        "hooks": [n for n, m in modules.items() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks],
        "forwards": [name for name, module in modules.items() if "forward" in vars(module)],
        "kernel": model.hf.config._attn_implementation,
        "random": torch.get_rng_state().tolist(),
    }


@pytest.fixture
def untouched(real):
    """Nothing is left behind: weights, gradients, flags, modes, hooks, random state."""
    weight = next(p for p in real.hf.parameters() if p.ndim == 1)
    weight.grad = torch.ones_like(weight)
    before = trace(real)
    yield
    after = trace(real)
    weight.grad = None
    assert [name for name in before if before[name] != after[name]] == []


class TestForward:
    @pytest.fixture(autouse=True)
    def without_gradients(self):
        with torch.no_grad():
            yield

    def test_tokens_logits_and_hidden_states_are_those_of_plain_transformers(self, real, plain, untouched):
        hf, tokenizer = plain
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            assert torch.equal(real.to_tokens(text), ids)
            out = hf(ids, output_hidden_states=True, use_cache=False)
            logits, cache = real.run_with_cache(text, [f"L{i}.resid_pre" for i in range(real.signature.layers)])
            assert torch.equal(logits, out.logits) and torch.equal(real(text), out.logits)
            assert all(torch.equal(cache[f"L{i}.resid_pre"], out.hidden_states[i]) for i in range(len(cache)))
            assert torch.equal(cache["blocks.2.hook_resid_pre"], out.hidden_states[2])
            _, cache = real.run_with_cache(text, "L1.resid_post")
            assert torch.equal(cache["L1.resid_post"], out.hidden_states[2])

    def test_a_padded_batch_is_each_text_alone(self, real):
        logits = real(TEXTS)
        for row, text in zip(logits, TEXTS, strict=True):
            alone = real(text)[0]
            torch.testing.assert_close(row[: len(alone)], alone, atol=2e-3, rtol=1e-4)
            assert torch.equal(row[: len(alone)].argmax(-1), alone.argmax(-1))

    def test_text_goes_on_as_transformers_continues_it(self, real, plain, untouched):
        hf, tokenizer = plain
        for text in TEXTS[:3]:
            made = hf.generate(
                **tokenizer(text, return_tensors="pt"), do_sample=False, max_new_tokens=6, pad_token_id=0
            )
            assert real.generate(text, max_new_tokens=6) == tokenizer.decode(made[0], skip_special_tokens=True)
        assert real.generate(TEXTS[:3], max_new_tokens=4) == [real.generate(t, max_new_tokens=4) for t in TEXTS[:3]]

    def test_a_run_that_restarts_in_the_middle_is_the_whole_run(self, real):
        layer = real.signature.layers // 2
        logits, cache = real.cache(real.to_tokens(TEXTS[0]), [f"L{layer}.resid_pre"])
        torch.testing.assert_close(real.run_from(layer, cache[f"L{layer}.resid_pre"]), logits, atol=1e-3, rtol=1e-4)

    def test_the_bridge_says_the_same(self, real):
        tokens = real.to_tokens(TEXTS[0])
        torch.testing.assert_close(real.bridge(tokens), real(tokens), atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("localizer", WALKED, ids=named)
def test_a_localizer_leaves_no_trace_and_can_be_stored(localizer, real, prompts, untouched, tmp_path):
    settings = dict(CHEAP.get(localizer.__name__, {}))
    if takes(localizer, "dictionary"):
        settings["dictionary"] = random_sae(real, SITE)
    found = localizer(real, prompts.select(range(2)), **settings)
    scores = found if isinstance(found, Localization) else found.nodes()
    assert isinstance(found, Localization | Circuit) and scores.card.model == real.fingerprint
    assert all(s.isfinite().all() for s in scores.scores.values())
    assert localizer.__name__.startswith("feature") or max(s.abs().max() for s in scores.scores.values()) > 0
    scores.save(tmp_path / "found.safetensors")
    again = Localization.load(tmp_path / "found.safetensors")
    assert all(torch.equal(again.scores[site], scores.scores[site]) for site in scores.scores)


@pytest.fixture(scope="module")
def covariance(real):
    """Of more tokens than the layer has neurons; the pass ends at the layer."""
    rows = torch.randint(5, 40_000, (44, 50), generator=torch.Generator().manual_seed(0))
    return Covariance(real, ["L3.mlp.out"]).update(rows, torch.full((len(rows),), rows.shape[1]))


@pytest.mark.parametrize("editor", EDITORS, ids=named)
def test_an_edit_moves_its_mask_alone_can_be_undone_stored_and_exported(
    editor, real, prompts, covariance, untouched, tmp_path
):
    settings = dict(SHORT)
    if editor in FEATURE:
        dictionary = (random_codebook if editor.__name__ == "codebook_delete" else random_sae)(real, SITE)
        settings["dictionary"], mask = dictionary, mask_of(real, dictionary, range(0, 24, 2))
    else:
        mask = ComponentMask.of(["L3.mlp.out", "L2.mlp.in[5]", "L4.attn.v[0]"], real.signature)
    if editor in CLOSED_FORM:
        settings["covariance"] = covariance
    taken = inspect.signature(editor).parameters
    forget, retain = prompts.select(range(2)), prompts.select(range(2, 5))
    edit = editor(real, mask, forget, retain, **{name: value for name, value in settings.items() if name in taken})

    tokens = prompts.tokens[:2]
    before, logits = weights(real), real(tokens)
    moving = moved_by(editor, mask, edit)
    inside = {} if moving is None else moving.parameter_masks(real)
    kept = {name: real.hf.get_parameter(name).detach().clone() for name in inside}
    with edit.applied(real):
        edited, after = real(tokens), weights(real)
        assert {name for name in before if after[name] != before[name]} <= set(inside)
        for name, chosen in inside.items():
            assert torch.equal(real.hf.get_parameter(name)[~chosen], kept[name][~chosen])
        assert torch.equal(real.hf(tokens, use_cache=False).logits, edited), "hooked and plain model agree"
    assert not torch.equal(edited, logits), "the edit does something"
    assert weights(real) == before and torch.equal(real(tokens), logits), "undo is bit-identical"

    edit.save(tmp_path / "edit.safetensors")
    again = type(edit).load(tmp_path / "edit.safetensors")
    assert again.card == edit.card
    one, other = content(edit, real), content(again, real)
    assert one and all(torch.equal(one[name], other[name]) for name in one)
    with again.applied(real):
        assert torch.equal(real(tokens), edited)


@torch.no_grad()
def naive_logprob(hf, asked: list[int], answer: list[int]) -> tuple[float, bool]:
    """One text, plain transformers: the answer's log-probability, and whether greedy decoding gives it."""
    logits = hf(torch.tensor([[*asked, *answer]]), use_cache=False).logits[0, len(asked) - 1 : -1].float()
    labels = torch.tensor(answer)
    return float(logits.log_softmax(-1).gather(1, labels[:, None]).sum()), bool((logits.argmax(-1) == labels).all())


def test_truth_targets_and_options_are_what_plain_transformers_says(real, plain):
    """Targets and options of one token and of several, side by side."""
    options, targets = ("Paris", "Ouagadougou", "Oslo", "Port Louis"), ("Antananarivo", "Rome")
    facts = Prompts.from_text(
        [
            Query(f"The capital of {country} is", city, target, country, country, options)
            for (country, city), target in zip(list(COUNTRIES.items())[:2], targets, strict=True)
        ],
        real.tokenizer,
    )
    assert min((facts.targets >= 0).sum(1).tolist()) == 1 < facts.targets.shape[1]
    found, without = measure(real, facts), measure(real, facts, targets=False)
    assert set(found) - set(without) == {"target_accuracy", "target_probability"}
    assert all(torch.equal(found[name], without[name]) for name in without)
    for i in range(len(facts)):
        asked = facts.tokens[i, : int(facts.start[i]) + 1].tolist()
        truth, target = ([t for t in row[i].tolist() if t >= 0] for row in (facts.answers, facts.targets))
        (logprob, right), (aimed, hit) = naive_logprob(plain[0], asked, truth), naive_logprob(plain[0], asked, target)
        assert found["accuracy"][i] == right and found["target_accuracy"][i] == hit
        assert found["probability"][i].log().item() == pytest.approx(logprob, abs=1e-3)
        assert found["target_probability"][i].log().item() == pytest.approx(aimed, abs=1e-3)
        choices = torch.tensor([naive_logprob(plain[0], asked, list(option))[0] for option in facts.options[i]])
        assert len({len(option) for option in facts.options[i]}) > 1
        share = choices.softmax(0)[list(facts.options[i]).index(tuple(truth))]
        assert found["option_probability"][i].item() == pytest.approx(float(share), abs=1e-4)


@torch.no_grad()
def test_which_target_values_change_what_is_said(real, plain, prompts):
    layer, hf = real.signature.layers - 2, plain[0]
    asked = EditPrompts.of(real, prompts, "last")
    elsewhere = torch.randn(len(prompts), real.signature.d_model, generator=torch.Generator().manual_seed(0))
    found = changes_what_is_said(real, layer, asked, values := 40 * elsewhere)
    block = hf.get_decoder().layers[layer]
    for i in range(len(prompts)):
        ids = torch.tensor([prompts.tokens[i, : int(prompts.start[i]) + 1].tolist()])
        before = hf(ids, use_cache=False).logits[0, -1].argmax()

        def put(module, args, out, value=values[i]):
            hidden = out[0] if isinstance(out, tuple) else out
            hidden[0, -1] = value

        handle = block.register_forward_hook(put)
        after = hf(ids, use_cache=False).logits[0, -1].argmax()
        handle.remove()
        assert bool(found[i]) == bool(before != after)
    assert found.any()


@pytest.fixture(scope="module")
def small_edit(real, prompts):
    mask = ComponentMask.of(["L3.mlp.out[1]", "L3.mlp.out[7]"], real.signature)
    return masked_gradient(
        real, mask, prompts.select(range(2)), prompts.select(range(2, 5)), steps=2, lr=0.05, texts=TEXTS
    )


@torch.no_grad()
def test_an_exported_edit_is_an_ordinary_checkpoint_with_the_same_logits(real, small_edit, tmp_path):
    edit = small_edit
    edit.export(real, tmp_path / "edited")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
    assert not hasattr(hf.config, "quantization_config") and hf.dtype == torch.float32
    with edit.applied(real):
        for text in TEXTS[:3]:
            assert torch.equal(hf(**tokenizer(text, return_tensors="pt"), use_cache=False).logits, real(text))
        assert torch.equal(load_model(hf, tokenizer=tokenizer)(TEXTS[0]), real(TEXTS[0]))
        fingerprint = real.fingerprint
    again = load_model(tmp_path / "edited")
    assert again.fingerprint == fingerprint != real.fingerprint
    export(again, tmp_path / "copy")
    assert load_model(tmp_path / "copy").fingerprint == fingerprint


@pytest.fixture(scope="module")
def continents(real, tmp_path_factory):
    """Facts with shared answers, as probes need them."""
    path = tmp_path_factory.mktemp("facts") / "continents.csv"
    rows = [
        f"{name},{name} is a country in,{where}" for where, names in CONTINENTS.items() for name in names.split(", ")
    ]
    path.write_text("\n".join(["subject,prompt,answer", *rows]), encoding="utf-8")
    return load_facts(path).prompts(real)


@pytest.mark.parametrize("attack", list(methods("attack").values()), ids=lambda attack: attack.name)
def test_an_attack_leaves_no_trace(attack, real, prompts, small_edit, continents, untouched):
    settings, facts = dict(ATTACKS), prompts.select(range(4))
    if attack.name == "relearning":
        settings["lrs"] = {"lora": (1e-4,)}
    if attack.name == "probing":
        facts = continents
    if attack.name == "membership_inference":  # it needs facts that were never taught
        facts = replace(facts, facts=replace(facts.facts, untaught=prompts.facts))
    sets = facts.select(range(0, len(facts), 2)), facts.select(range(1, len(facts), 2))
    rows = attack(real, small_edit, *sets, **settings, progress=False)
    assert len(rows) and {"edited", "unedited"} <= set(rows["state"])
