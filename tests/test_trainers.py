"""Objectives in trainers of others: their losses by hand from plain passes, row by row; and nothing outside the mask moves."""

import copy
import math
import re
import sys
import types
from functools import partial
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.edit import losses
from mechunlearn.edit.trainers import UnlearningTrainer, batch_loss, collate, loss_function, paired
from tests.models import random_hf, token_prompts
from tests.test_portability import assert_kept, mask_for, weights

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "trainers.md"


def ragged(seed: int, vocabulary: int = 97) -> dict:
    """Four to eight random tokens, of which the last one to three are scored."""
    draw = torch.Generator().manual_seed(seed)
    length, answer = (int(torch.randint(low, high, (1,), generator=draw)) for low, high in ((4, 9), (1, 4)))
    ids = torch.randint(2, vocabulary, (length,), generator=draw).tolist()
    return {"input_ids": ids, "labels": [-100] * (length - answer) + ids[-answer:]}


def pairs(count: int = 4, vocabulary: int = 97) -> list[dict]:
    parts = ("forget", "retain", "target")
    return [{part: ragged(3 * i + j, vocabulary) for j, part in enumerate(parts)} for i in range(count)]


ROWS = pairs()


def settings(folder, kind=transformers.TrainingArguments, **changed) -> transformers.TrainingArguments:
    given = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True,
        "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2, "seed": 1,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return kind(**{**given, **changed})


SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}


def reported(trainer) -> list[float]:
    """The losses that a Trainer logs while it trains."""
    trainer.log = types.MethodType(lambda self, logs, *_: self.state.log_history.append(logs), trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# The objectives by hand: one row a pass, no padding, formulas of the papers.


def answers(hf, rows, part) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities [token d_vocab] where a row's answer is predicted, and its tokens, row by row."""
    found = []
    for row in rows:
        ids, count = torch.tensor([row[part]["input_ids"]]), sum(label != -100 for label in row[part]["labels"])
        found.append((hf(ids).logits[0, -1 - count : -1].float().log_softmax(-1), ids[0, -count:]))
    return found


def of_labels(found) -> list[torch.Tensor]:
    return [log_p[torch.arange(len(labels)), labels] for log_p, labels in found]


def ce(hf, rows, part) -> torch.Tensor:
    return -torch.cat(of_labels(answers(hf, rows, part))).mean()


def total(hf, rows, part) -> torch.Tensor:
    return torch.stack([log_p.sum() for log_p in of_labels(answers(hf, rows, part))])


def npo(hf, before, rows):
    return -20 * logsigmoid(-0.1 * (total(hf, rows, "forget") - total(before, rows, "forget"))).mean()


def simnpo(hf, before, rows):
    mean = torch.stack([log_p.mean() for log_p in of_labels(answers(hf, rows, "forget"))])
    return -0.8 * logsigmoid(-2.5 * mean).mean()


def preference(hf, before, rows):
    target, truth = (total(hf, rows, part) - total(before, rows, part) for part in ("target", "forget"))
    return -logsigmoid(0.1 * (target - truth)).mean()


def hinge(hf, before, rows):
    found = []
    for log_p, labels in answers(hf, rows, "forget"):
        for p, label in zip(log_p.exp(), labels, strict=True):
            found.append(1 + p[label] - torch.cat([p[:label], p[label + 1 :]]).max())
    return torch.stack(found).mean()


def kl(hf, before, rows):
    now, was = (torch.cat([log_p for log_p, _ in answers(of, rows, "retain")]) for of in (hf, before))
    return (was.exp() * (was - now)).sum(1).mean()


def stream(hf, rows, part) -> torch.Tensor:
    """What leaves block 1, at every token."""
    found = []
    hook = hf.model.layers[1].register_forward_hook(
        lambda module, args, out: found.append((out[0] if isinstance(out, tuple) else out)[0])
    )
    for row in rows:
        hf(torch.tensor([row[part]["input_ids"]]))
    hook.remove()
    return torch.cat(found)


def rmu(hf, before, rows):
    u = torch.rand(32, generator=torch.Generator().manual_seed(0))
    held = (stream(hf, rows, "retain") - stream(before, rows, "retain")).pow(2).mean()
    return (stream(hf, rows, "forget") - 6.5 * u / u.norm()).pow(2).mean() + 3 * held


BY_HAND = {
    "npo": ({"loss": losses.npo}, lambda *of: npo(*of) + ce(of[0], of[2], "retain")),
    "npo alone": ({"loss": losses.npo, "retain_weight": 0}, npo),
    "npo kl": ({"loss": losses.npo, "retain_loss": losses.kl_retain, "retain_weight": 2}, lambda *of: npo(*of) + 2 * kl(*of)),
    "simnpo": ({"loss": losses.simnpo}, lambda *of: simnpo(*of) + ce(of[0], of[2], "retain")),
    "preference": ({"loss": losses.preference}, lambda *of: preference(*of) + ce(of[0], of[2], "retain")),
    "hinge": ({"loss": losses.inverted_hinge}, lambda *of: hinge(*of) + ce(of[0], of[2], "retain")),
    "gradient difference": ({"loss": losses.gradient_difference}, lambda hf, _, rows: ce(hf, rows, "retain") - ce(hf, rows, "forget")),
    "rmu": (
        {"loss": partial(losses.rmu, layer=1), "retain_loss": partial(losses.rmu_retain, layer=1), "retain_weight": 3},
        rmu,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_the_trainer_reports_and_descends_what_a_plain_loop_does(name, tmp_path):
    """Three steps of masked gradient descent by hand: the same losses, the same weights."""
    given, by_hand = BY_HAND[name]
    hf, plain, before = (random_hf("llama") for _ in range(3))
    mask = mask_for(hf, ["L0.attn.q[1]", "L1.attn.v[0]", "L0.mlp.in[3]", "L1.mlp.out[5]"])
    trainer = UnlearningTrainer(hf, settings(tmp_path, **SGD), mask=mask, train_dataset=ROWS, **given)
    found = reported(trainer)
    masks, expected = mask.parameter_masks(plain), []
    for _ in range(3):
        loss = by_hand(plain, before, ROWS)
        expected.append(loss.item())
        gradients = torch.autograd.grad(loss, [plain.get_parameter(each) for each in masks])
        with torch.no_grad():
            for (each, chosen), gradient in zip(masks.items(), gradients, strict=True):
                plain.get_parameter(each).sub_(0.1 * gradient * chosen)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected[0] != pytest.approx(expected[2], rel=1e-3), "nothing was trained"
    for each, weight in hf.named_parameters():
        assert torch.allclose(weight, plain.get_parameter(each), rtol=1e-4, atol=1e-5), each


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_nothing_outside_the_mask_moves(family, tmp_path):
    """AdamW with weight decay, clipping and accumulation; afterwards everything may train again."""
    hf = random_hf(family)
    mask, before = mask_for(hf), weights(hf)
    arguments = settings(tmp_path, weight_decay=0.1, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    UnlearningTrainer(hf, arguments, loss=losses.npo, mask=mask, train_dataset=ROWS).train()
    assert_kept(hf, mask, before)
    assert all(parameter.requires_grad for parameter in hf.parameters())


def test_the_same_seed_gives_the_same_weights(tmp_path):
    def trained(seed):
        hf = random_hf("llama")
        arguments = settings(tmp_path, seed=seed, per_device_train_batch_size=2)
        UnlearningTrainer(hf, arguments, loss=losses.npo, mask=mask_for(hf), train_dataset=pairs(10)).train()
        return weights(hf)

    first, again, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert any(not torch.equal(other[name], weight) for name, weight in first.items())


@pytest.mark.parametrize("way", ["trainer", "function"])
def test_accumulated_batches_weigh_as_one(way, tmp_path):
    """The Trainer divides means by the number of batches; a loss function is given the token count of all batches."""
    hf = random_hf("llama")
    arguments = settings(tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4, **SGD)
    single = [simnpo(hf, hf, [row]).item() for row in ROWS]
    if way == "trainer":
        trainer = UnlearningTrainer(hf, arguments, loss=losses.simnpo, retain_weight=0, train_dataset=ROWS)
        expected = sum(single) / 4
    else:
        rows, function = [row["forget"] for row in ROWS], loss_function(losses.simnpo)

        def collator(rows):
            return collate([{"forget": row} for row in rows])["forget"]

        trainer = transformers.Trainer(hf, arguments, collator, rows, compute_loss_func=function)
        tokens = [sum(label != -100 for label in row["labels"]) for row in rows]
        expected = sum(one * count for one, count in zip(single, tokens, strict=True)) / sum(tokens)
        assert expected != pytest.approx(sum(single) / 4, rel=1e-3)
    assert reported(trainer) == pytest.approx([expected], rel=1e-4)


def test_a_row_without_an_answer_counts_for_nothing():
    hf, silent = random_hf("llama"), {"forget": {"input_ids": [3, 4, 5], "labels": [-100] * 3}}
    rows = [{"forget": row["forget"]} for row in ROWS]
    given = {"reference": random_hf("gpt2"), "retain_weight": 0}
    with_it, without = (
        batch_loss(hf, collate(of), losses.npo, **given) for of in ([*rows[:2], silent, *rows[2:]], rows)
    )
    assert with_it.item() == pytest.approx(without.item(), rel=1e-5)


def test_the_evaluation_set_is_measured_by_the_objective(tmp_path):
    hf = random_hf("llama")
    trainer = UnlearningTrainer(
        hf, settings(tmp_path), loss=losses.inverted_hinge, train_dataset=ROWS, eval_dataset=ROWS[:3]
    )
    trainer.log = lambda *_: None
    expected = hinge(hf, hf, ROWS[:3]) + ce(hf, ROWS[:3], "retain")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_rows_are_the_prompts_with_their_answers(world, sport):
    forget, retain = (prompts.select(range(count)) for prompts, count in zip(sport, (2, 5), strict=True))
    rows = paired(forget, retain)
    assert len(rows) == 5 and rows[0]["forget"] == rows[2]["forget"] != rows[1]["forget"]
    asked = (("forget", forget, "answer"), ("retain", retain, "answer"), ("target", forget, "target"))
    for part, prompts, word in asked:
        for row, query in zip(rows, prompts.queries, strict=False):
            text, scored = (world.tokenizer.decode([i for i in row[part][name] if i != -100]) for name in row[part])
            assert text.endswith(f"{query.prompt} {getattr(query, word)}") and scored.strip() == getattr(query, word)
    batch = collate(rows)
    assert batch["forget"]["attention_mask"].sum(1).tolist() == [len(row["forget"]["input_ids"]) for row in rows]


def test_a_datasets_table_keeps_its_parts(tmp_path):
    """Trainer drops columns that the model does not know."""
    hf = random_hf("llama")
    table = datasets.Dataset.from_list(ROWS)
    trainer = UnlearningTrainer(hf, settings(tmp_path, max_steps=1), loss=losses.npo, train_dataset=table)
    assert len(reported(trainer)) == 1


def test_adapters_of_the_masked_matrices_move_and_no_other_weight(tmp_path):
    hf = random_hf("llama")
    before = weights(hf)
    mask = mask_for(hf, ["L1.mlp.out", "L2.attn.o"])
    torch.manual_seed(0)
    adapted = peft.get_peft_model(hf, mask.to_lora_config(r=2))
    adapters = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    arguments = settings(tmp_path, weight_decay=0.1)
    found = reported(UnlearningTrainer(adapted, arguments, loss=losses.npo, train_dataset=ROWS))
    expected = 20 * math.log(2) + ce(random_hf("llama"), ROWS, "retain").item()  # a new adapter changes nothing
    assert found[0] == pytest.approx(expected, rel=1e-4) and found[2] < found[0]
    matrices = {re.search(r"layers\.(\d+\.\w+\.\w+)", name)[1] for name in adapters}
    assert matrices == {"1.mlp.down_proj", "2.self_attn.o_proj"}
    for name, parameter in adapted.named_parameters():
        if name in adapters:
            assert not torch.equal(parameter, adapters[name]), name
        else:
            plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
            assert torch.equal(parameter, before[plain]), name


def test_the_unedited_model_is_a_copy_of_a_model_with_a_forward_of_its_own(tmp_path):
    """TRL puts one on the model, which calls the original's: a deep copy of it would train with the model."""
    hf = random_hf("llama")
    original = hf.forward
    hf.forward = types.MethodType(lambda self, *args, **given: original(*args, **given), hf)
    given = {"loss": losses.npo, "retain_weight": 0, "train_dataset": ROWS}
    patched = reported(UnlearningTrainer(hf, settings(tmp_path, **SGD), **given))
    plain = reported(UnlearningTrainer(random_hf("llama"), settings(tmp_path, **SGD), **given))
    assert patched == plain and plain[2] < plain[0]


@pytest.fixture
def trl():
    return pytest.importorskip("trl")


def test_trl_minimises_the_same(trl, world, tmp_path):
    class Mine(UnlearningTrainer, trl.SFTTrainer):
        pass

    hf, plain, rows = copy.deepcopy(world.hf), world.hf, pairs(4, 90)
    mask, before = ComponentMask.of(["L1.mlp.out[3]", "L2.attn.q[0]"], world.signature), weights(hf)
    trainer = Mine(
        hf,
        settings(tmp_path, trl.SFTConfig, weight_decay=0.1, bf16=False, dataset_kwargs={"skip_prepare_dataset": True}),
        loss=losses.npo,
        mask=mask,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=world.tokenizer,
    )
    found = reported(trainer)
    assert found[0] == pytest.approx((npo(plain, plain, rows) + ce(plain, rows, "retain")).item(), rel=1e-4)
    assert found[2] != pytest.approx(found[0], rel=1e-4)
    assert_kept(hf, mask, before)


def block(heading: str) -> str:
    """The Python under a heading of the page."""
    under = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"^```python[^\n]*\n(.*?)^```$", under, re.MULTILINE | re.DOTALL)[1]


def test_the_example_for_trl_runs(trl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block("TRL"), {"__name__": "example"})


def test_the_handler_for_open_unlearning_keeps_to_the_mask(tmp_path, monkeypatch):
    """Their package is not on the index: a stand-in has the documented layout, a Trainer with `method_args` as keywords."""

    class NPO(transformers.Trainer):
        def __init__(
            self, beta=1.0, alpha=1.0, gamma=1.0, retain_loss_type="NLL", evaluators=None, template_args=None, **kwargs
        ):
            super().__init__(**kwargs)
            self.beta, self.reference = beta, copy.deepcopy(self.model)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return batch_loss(model, inputs, partial(losses.npo, beta=self.beta), reference=self.reference)

    for name in ("trainer", "trainer.unlearn", "trainer.unlearn.npo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["trainer.unlearn.npo"].NPO = NPO
    exec(block("open-unlearning"), theirs := {"__name__": "masked_npo"})

    hf = random_hf("llama")
    mask, before = mask_for(hf), weights(hf)
    mask.save(tmp_path / "mask.json")
    arguments = settings(tmp_path, weight_decay=0.1, remove_unused_columns=False)
    method = {"mask": str(tmp_path / "mask.json"), "beta": 0.1, "alpha": 1.0}
    trainer = theirs["MaskedNPO"](
        model=hf,
        args=arguments,
        train_dataset=ROWS,
        data_collator=collate,
        evaluators=None,
        template_args=None,
        **method,
    )
    assert trainer.beta == 0.1
    trainer.train()
    assert_kept(hf, mask, before)
    trainer.restriction.remove()


def test_mistakes_are_told():
    hf, forget = random_hf("llama"), [{"forget": row["forget"]} for row in ROWS]
    cases = {
        "reads retain rows, and the batch has parts forget only": (collate(forget), losses.inverted_hinge, {}),
        "reads the unedited model": (collate(ROWS), losses.npo, {}),
        "Cannot read what leaves layer 2: transformers gives it for layers 0 to 1": (
            collate(ROWS), partial(losses.rmu, layer=2), {"retain_weight": 0},
        ),
        "all labels are -100": (
            collate([{"forget": {"input_ids": [3, 4], "labels": [-100, -100]}}]), losses.simnpo, {"retain_weight": 0},
        ),
    }  # fmt: skip
    for words, (batch, loss, given) in cases.items():
        with pytest.raises(MechunlearnError, match=words):
            batch_loss(hf, batch, loss, **given)
    with pytest.raises(
        MechunlearnError, match="'npo' asks for reference, and compute_loss_func is given outputs and labels"
    ):
        loss_function(losses.npo)
    some = token_prompts()
    with pytest.raises(MechunlearnError, match="The retain set is empty"):
        paired(some, some.select([]))


@pytest.mark.real
def test_smollm2_reports_the_objective_and_keeps_what_is_not_masked(smollm2, tmp_path):
    hf = copy.deepcopy(smollm2.hf)
    mask = ComponentMask.of(["L15.mlp.out[7]", "L15.attn.q[0]"], smollm2.signature)
    ask = (("The capital of France is", " Paris"), ("The capital of Japan is", " Tokyo"), ("Two and two is", " four"))
    rows = []
    for question, answer in ask:
        prompt, said = smollm2.tokenizer(question)["input_ids"], smollm2.tokenizer(answer)["input_ids"]
        rows.append({"input_ids": prompt + said, "labels": [-100] * len(prompt) + said})
    data = [{"forget": rows[0], "retain": rows[1]}, {"forget": rows[2], "retain": rows[1]}]
    expected = (hinge(hf, hf, data) + ce(hf, data, "retain")).item()
    arguments = settings(tmp_path, max_steps=2, weight_decay=0.1, per_device_train_batch_size=2)
    found = reported(UnlearningTrainer(hf, arguments, loss=losses.inverted_hinge, mask=mask, train_dataset=data))
    assert found[0] == pytest.approx(expected, rel=1e-4) and found[1] < found[0]
    assert_kept(hf, mask, dict(smollm2.hf.named_parameters()))
