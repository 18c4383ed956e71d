"""A mask holds in anybody's training loop: Trainer, accelerate, any optimiser, before or after; and as LoRA targets."""

import copy
import gc
import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch.optim import optimizer as torch_optimizer

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.artifacts.restrict import Restriction
from mechunlearn.model.families import FAMILIES
from mechunlearn.model.layout import Layout, Signature
from tests.models import CONFIGS, random_hf

TOKENS = torch.randint(2, 97, (80, 10), generator=torch.Generator().manual_seed(2))
PARTLY = ["L0.attn.q[1]", "L1.attn.v[0]", "L1.attn.o[2]", "L2.mlp.in[3]", "L2.mlp.out[5]", "L0.mlp.out"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Equal bits are what is claimed; -0.0 == 0.0 is not enough."""
    return tensor.detach().clone().view(torch.uint8)


def mask_for(hf, addresses=PARTLY) -> ComponentMask:
    return ComponentMask.of(addresses, Layout.of(hf.config).signature)


def everything(hf) -> ComponentMask:
    layout = Layout.of(hf.config)
    return mask_for(hf, [f"L{layer}.{kind}" for layer in range(layout.signature.layers) for kind in layout.kinds])


def weights(hf) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in hf.named_parameters()}


def moved(hf, mask, before) -> tuple[set[str], set[str]]:
    """The parameters of which some frozen entry differs, and those of which some selected entry does."""
    masks = mask.parameter_masks(hf)
    frozen, selected = set(), set()
    for name, parameter in hf.named_parameters():
        chosen = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
        if not torch.equal(bits(parameter[~chosen]), bits(before[name][~chosen])):
            frozen.add(name)
        if not torch.equal(parameter[chosen], before[name][chosen]):
            selected.add(name)
    return frozen, selected


def assert_kept(hf, mask, before):
    frozen, selected = moved(hf, mask, before)
    assert not frozen, f"frozen entries moved: {sorted(frozen)}"
    assert selected == set(mask.parameter_masks(hf)), "some selected parameter did not move"


def loss_of(hf, batch: int = 0) -> torch.Tensor:
    tokens = TOKENS[4 * batch : 4 * batch + 4]
    return hf(input_ids=tokens, labels=tokens).loss


def steps(hf, optimiser, count: int = 4) -> None:
    for batch in range(count):
        loss_of(hf, batch).backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()


def train(hf, folder, **settings) -> None:
    """Twenty steps of the ordinary Trainer: AdamW (fused) with weight decay and gradient clipping."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        **settings,
    )
    transformers.Trainer(hf, arguments, train_dataset=[{"input_ids": t, "labels": t} for t in TOKENS]).train()


@pytest.fixture
def without_restoration(monkeypatch):
    """What masks of gradients alone can do."""
    monkeypatch.setattr(Restriction, "restore", lambda self: None)


@pytest.fixture(autouse=True)
def no_hook_stays():
    before = len(torch_optimizer._global_optimizer_post_hooks)
    yield
    assert len(torch_optimizer._global_optimizer_post_hooks) == before


@pytest.mark.parametrize("family", list(FAMILIES))
def test_trainer_moves_the_selected_units_only(family, tmp_path):
    hf = random_hf(family)
    mask, before = mask_for(hf), weights(hf)
    with mask.restrict_(hf) as restriction:
        train(hf, tmp_path)
        masks = mask.parameter_masks(hf)
        assert restriction.trainable == sum(int(m.sum()) for m in masks.values())
        assert {n for n, p in hf.named_parameters() if p.requires_grad} == set(masks)
    assert_kept(hf, mask, before)


def test_trainer_without_a_restriction_moves_everything(tmp_path):
    hf = random_hf("llama")
    before = weights(hf)
    train(hf, tmp_path)
    frozen, _ = moved(hf, mask_for(hf), before)
    assert set(mask_for(hf).parameter_masks(hf)) - {"model.layers.0.mlp.down_proj.weight"} <= frozen
    assert "model.embed_tokens.weight" in frozen


def test_gradient_hooks_alone_let_weight_decay_move_what_is_frozen(tmp_path, without_restoration):
    hf = random_hf("llama")
    mask, before = mask_for(hf), weights(hf)
    with mask.restrict_(hf):
        train(hf, tmp_path)
    frozen, _ = moved(hf, mask, before)
    assert frozen == set(mask.parameter_masks(hf)) - {"model.layers.0.mlp.down_proj.weight"}


def test_trainer_in_bfloat16_with_checkpointing_and_accumulation(tmp_path):
    hf = random_hf("phi3").to(torch.bfloat16)
    mask, before = mask_for(hf), weights(hf)
    with mask.restrict_(hf):
        train(hf, tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2, optim="adafactor")
    assert_kept(hf, mask, before)


OPTIMISERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "sgd nesterov fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_stale_momentum_of_an_older_optimiser_moves_nothing_frozen(name, family):
    """The optimiser holds every parameter, with momentum and with gradients that nobody cleared."""
    hf = random_hf(family)
    optimiser = OPTIMISERS[name](hf.parameters())
    steps(hf, optimiser)
    loss_of(hf).backward()
    mask, before = mask_for(hf), weights(hf)
    with mask.restrict_(hf):
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)
        steps(hf, optimiser)
    assert_kept(hf, mask, before)


@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_stale_momentum_would_move_what_is_frozen(name, without_restoration):
    hf = random_hf("gpt2")
    optimiser = OPTIMISERS[name](hf.parameters())
    steps(hf, optimiser)
    mask, before = mask_for(hf), weights(hf)
    with mask.restrict_(hf):
        steps(hf, optimiser)
    frozen, _ = moved(hf, mask, before)
    assert frozen == {n for n, m in mask.parameter_masks(hf).items() if not m.all()}


def test_lbfgs_and_muon_keep_what_is_frozen():
    """Optimisers that mix the gradients of entries: curvature over all of them, orthogonal updates."""
    for build in (
        lambda p: torch.optim.LBFGS(p, lr=1e-1, max_iter=3),
        lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=1e-2, weight_decay=0.1),
    ):
        hf = random_hf("llama")
        mask, before = mask_for(hf), weights(hf)
        with mask.restrict_(hf):
            optimiser = build([p for p in hf.parameters() if p.requires_grad])

            def closure(hf=hf, optimiser=optimiser):
                optimiser.zero_grad()
                loss = loss_of(hf)
                loss.backward()
                return loss

            for _ in range(3):
                optimiser.step(closure)
        assert_kept(hf, mask, before)


def test_clipping_sees_the_gradients_of_selected_weights_only():
    hf = random_hf("gpt_neox")
    mask = mask_for(hf)
    masks = mask.parameter_masks(hf)
    loss_of(hf).backward()
    norm = sum(float((p.grad[masks[n]] ** 2).sum()) for n, p in hf.named_parameters() if n in masks) ** 0.5
    with mask.restrict_(hf):
        stale = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1e9)
        hf.zero_grad()
        loss_of(hf).backward()
        clipped = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1e9)
    assert float(stale) == pytest.approx(norm, rel=1e-5)
    assert float(clipped) == pytest.approx(norm, rel=1e-5)


def test_a_frozen_gradient_that_is_not_finite_does_no_harm():
    layer = torch.nn.Linear(2, 1, bias=False)
    with Restriction(layer, {"weight": torch.tensor([[True, False]])}):
        layer(torch.tensor([[1.0, float("inf")]])).backward()
    assert layer.weight.grad.tolist() == [[1.0, 0.0]]


def test_accelerate_moves_the_selected_units_only():
    hf = random_hf("phi3")
    mask, before = mask_for(hf), weights(hf)
    accelerator = accelerate.Accelerator(cpu=True)
    optimiser = torch.optim.AdamW(hf.parameters(), lr=1e-2, weight_decay=0.1)
    with mask.restrict_(hf):
        prepared, optimiser = accelerator.prepare(hf, optimiser)
        for batch in range(5):
            accelerator.backward(loss_of(prepared, batch))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    assert_kept(accelerator.unwrap_model(prepared), mask, before)


def test_the_restriction_follows_a_cast_of_the_model():
    hf = random_hf("gpt2")
    mask = mask_for(hf)
    with mask.restrict_(hf):
        steps(hf, torch.optim.AdamW(hf.parameters(), lr=1e-2, weight_decay=0.1), 1)
        hf.to(torch.bfloat16)
        before = weights(hf)
        steps(hf, torch.optim.AdamW(hf.parameters(), lr=1e-1, weight_decay=0.1))
    assert_kept(hf, mask, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; runs with `pytest -m gpu` where there is one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_restriction_follows_the_model_to_cuda(dtype):
    hf = random_hf("gpt_neox").to(dtype)
    mask = mask_for(hf)
    with mask.restrict_(hf):
        hf.to("cuda")
        before = weights(hf)
        optimiser = torch.optim.AdamW(hf.parameters(), lr=1e-1, weight_decay=0.1, fused=True)
        for _ in range(3):
            hf(input_ids=TOKENS[:4].cuda(), labels=TOKENS[:4].cuda()).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert_kept(hf, mask, before)


def test_remove_gives_back_what_trained_before():
    hf = random_hf("gpt2")
    hf.transformer.wpe.weight.requires_grad_(False)
    hf.transformer.h[0].mlp.c_proj.weight.requires_grad_(False)  # selected, so it trains for a while
    flags = {name: parameter.requires_grad for name, parameter in hf.named_parameters()}
    mask = mask_for(hf)
    restriction = mask.restrict_(hf)
    assert hf.transformer.h[0].mlp.c_proj.weight.requires_grad
    hooks = len(torch_optimizer._global_optimizer_post_hooks)
    restriction.remove()
    restriction.remove()
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks - 1
    assert {name: parameter.requires_grad for name, parameter in hf.named_parameters()} == flags
    before, twin = weights(hf), random_hf("gpt2")
    trainable = [name for name, trains in flags.items() if trains]
    gradients = [torch.autograd.grad(loss_of(of), [of.get_parameter(name) for name in trainable]) for of in (hf, twin)]
    assert all(torch.equal(ours, plain) for ours, plain in zip(*gradients, strict=True))
    steps(hf, torch.optim.AdamW([p for p in hf.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1))
    frozen, _ = moved(hf, mask, before)
    held = {"transformer.wpe.weight", "transformer.h.0.mlp.c_proj.weight"}
    assert frozen == set(flags) - held
    with mask.restrict_(hf):  # and it can be restricted again
        pass
    restriction.remove()
    assert {name: parameter.requires_grad for name, parameter in hf.named_parameters()} == flags


class Interrupted(torch.optim.SGD):
    """Runs out of memory after it has written."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.add_(1)
        raise MemoryError


def test_an_error_within_the_block_leaves_frozen_weights_and_flags_as_they_were():
    hf = random_hf("llama")
    mask, before = mask_for(hf), weights(hf)
    flags = {name: parameter.requires_grad for name, parameter in hf.named_parameters()}
    optimiser = Interrupted(hf.parameters(), lr=1e-2, weight_decay=0.1)
    with pytest.raises(MemoryError), mask.restrict_(hf):
        steps(hf, optimiser)
    assert_kept(hf, mask, before)
    assert {name: parameter.requires_grad for name, parameter in hf.named_parameters()} == flags


def test_only_partly_selected_matrices_are_kept_twice():
    hf = random_hf("llama")
    with mask_for(hf, ["L0.mlp.out", "L1.mlp.out[0]"]).restrict_(hf) as restriction:
        kept = [part.backup.numel() for part in restriction._partly]
    assert kept == [hf.model.layers[1].mlp.down_proj.weight.numel()]


def test_it_holds_when_the_restriction_is_thrown_away_and_ends_with_the_model():
    hf = random_hf("gpt2")
    hooks = len(torch_optimizer._global_optimizer_post_hooks)
    mask, before = mask_for(hf), weights(hf)
    mask.restrict_(hf)
    gc.collect()
    steps(hf, torch.optim.AdamW(hf.parameters(), lr=1e-2, weight_decay=0.1))
    assert_kept(hf, mask, before)
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks + 1
    del hf, before
    gc.collect()
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks


def test_other_models_train_as_they_would():
    hf, other = random_hf("gpt2"), random_hf("gpt2")
    twin = copy.deepcopy(other)
    with mask_for(hf).restrict_(hf):
        steps(other, torch.optim.AdamW(other.parameters(), lr=1e-2))
    steps(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), twin.parameters(), strict=True))


def test_frozen_entries_come_back_on_demand():
    """For loops whose steps are not those of a torch optimiser."""
    hf = random_hf("gpt_neox")
    mask, before = mask_for(hf), weights(hf)
    with mask.restrict_(hf) as restriction:
        with torch.no_grad():
            for parameter in hf.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.1)
        restriction.restore()
        assert_kept(hf, mask, before)


def test_a_hooked_model_is_restricted_through_its_hugging_face_model(toy):
    mask = ComponentMask.of(["L0.mlp.out[3]", "L1.attn.q[0]"], toy.model.signature)
    with mask.restrict_(toy.model) as restriction:
        assert restriction.trainable == mask.weights(toy.model)
        assert sum(p.requires_grad for p in toy.model.hf.parameters()) == 2
    assert all(p.requires_grad for p in toy.model.hf.parameters())


def wrapped(hf, config) -> set[str]:
    adapted = peft.get_peft_model(hf, config)
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("family", list(CONFIGS))
def test_lora_wraps_exactly_the_modules_of_the_selected_sites(family):
    hf = random_hf(family)
    layout = Layout.of(hf.config)
    for mask in (everything(hf), mask_for(hf, ["L0.mlp.out", "L1.attn.o"])):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            config = mask.to_lora_config(r=4)
            found = wrapped(copy.deepcopy(hf), config)
        sites = {(unit.layer, unit.kind) for unit in mask}
        assert found == {layout.module_name(layer, kind) for layer, kind in sites}
        assert {f"{name}.weight" for name in found} == {n for n in mask.parameter_masks(hf) if "bias" not in n}
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (4, 8, family == "gpt2")


@pytest.mark.parametrize(
    ("family", "addresses", "cost"),
    [
        ("llama", ["L0.attn.o", "L1.attn.q[0]"], "5 of 8 units in 2 matrices, so 1.60 times"),
        ("llama", ["L0.mlp.out[0]"], "1 of 48 units in 1 matrix, so 48.00 times"),
        ("gpt2", ["L0.attn.q"], "4 of 12 units in 1 matrix, so 3.00 times"),
        ("gpt_neox", ["L0.attn.k", "L0.attn.v[1]", "L2.attn.o"], "9 of 16 units in 2 matrices, so 1.78 times"),
        ("phi3", ["L0.attn.q", "L0.attn.k"], "6 of 8 units in 1 matrix, so 1.33 times"),
        ("phi3", ["L1.mlp.gate"], "48 of 96 units in 1 matrix, so 2.00 times"),
    ],
)
def test_lora_says_what_whole_matrices_cost(family, addresses, cost):
    mask = mask_for(random_hf(family), addresses)
    with pytest.warns(UserWarning) as caught:
        mask.to_lora_config(r=2)
    assert [str(w.message) for w in caught] == [
        (
            f"LoRA trains whole matrices: the mask selects {cost} as many can move. "
            "Use restrict_ or fisher_lora to keep to the mask."
        )
    ]


def test_lora_settings_pass_through():
    config = everything(random_hf("llama")).to_lora_config(r=3, alpha=5, lora_dropout=0.1, task_type=None)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (3, 5, 0.1, None)


TINY = Signature("llama", layers=3, heads=4, kv_heads=2, d_mlp=48, d_model=32)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (ComponentMask({}, TINY), "selects nothing"),
        (ComponentMask({"L0.mlp.out": torch.zeros(48, dtype=torch.bool)}, TINY), "selects nothing"),
        (ComponentMask({"L1.sae:res": torch.ones(9, dtype=torch.bool)}, TINY), "feature_clamp.*a FeatureEdit"),
        (ComponentMask({"L1.codebook:a": torch.ones(9, dtype=torch.bool)}, TINY), "codebook_delete.*a FeatureEdit"),
    ],
)
def test_masks_that_can_train_nothing_are_refused(mask, message):
    with pytest.raises(MechunlearnError, match=message):
        mask.restrict_(random_hf("llama"))
    with pytest.raises(MechunlearnError, match=message):
        mask.to_lora_config()


def test_features_and_missing_kinds_have_no_parameter_masks():
    hf = random_hf("gpt2")
    features = ComponentMask({"L1.sae:res": torch.ones(9, dtype=torch.bool)}, Layout.of(hf.config).signature)
    with pytest.raises(MechunlearnError, match="'L1.sae:res' holds features, which live in activations"):
        features.parameter_masks(hf)
    gates = mask_for(hf, ["L0.mlp.gate[1]"])
    for use in (gates.parameter_masks, gates.restrict_, lambda _: gates.to_lora_config()):
        with pytest.raises(MechunlearnError, match="no weights of kind 'mlp.gate'"):
            use(hf)


def test_a_refused_restriction_leaves_no_trace():
    hf = random_hf("llama")
    loss_of(hf).backward()
    with pytest.raises(MechunlearnError, match="The mask is for .gpt2"):
        mask_for(random_hf("gpt2")).restrict_(hf)
    with pytest.raises(MechunlearnError, match="'model.nothing', but the model has no such parameter"):
        Restriction(hf, {"model.nothing": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(MechunlearnError, match="'model.norm.weight', but the model has shape \\[32\\]"):
        Restriction(hf, {"model.norm.weight": torch.ones(1, dtype=torch.bool)})
    assert all(p.requires_grad and p.grad is not None for p in hf.parameters())


def test_a_second_restriction_is_refused_and_the_first_stays():
    hf = random_hf("llama")
    mask, before = mask_for(hf), weights(hf)
    with mask.restrict_(hf):
        with pytest.raises(MechunlearnError, match="restricted already. Call `remove"):
            mask_for(hf, ["L1.mlp.out"]).restrict_(hf)
        steps(hf, torch.optim.AdamW(hf.parameters(), lr=1e-2, weight_decay=0.1))
    assert_kept(hf, mask, before)


def test_a_wrapped_model_is_refused():
    hf = random_hf("llama")
    mask = mask_for(hf)
    adapted = peft.get_peft_model(copy.deepcopy(hf), everything(hf).to_lora_config())
    for wrapper in (torch.compile(hf), adapted):
        with pytest.raises(MechunlearnError, match="Expected the Hugging Face model itself"):
            mask.restrict_(wrapper)


@pytest.mark.parametrize(("address", "limit"), [("L0.mlp.out", 48), ("L0.attn.q", 64)])
def test_a_rank_larger_than_the_matrices_is_refused(address, limit):
    narrow = Signature("llama", layers=1, heads=4, kv_heads=4, d_mlp=48, d_model=64)
    mask = ComponentMask.of([address], narrow)
    assert mask.to_lora_config(r=limit).r == limit
    for rank in (0, limit + 1):
        with pytest.raises(MechunlearnError, match=f"rank {rank} does not fit.*between 1 and {limit}"):
            mask.to_lora_config(r=rank)
