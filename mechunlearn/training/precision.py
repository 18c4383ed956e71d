"""The arithmetic of training: bfloat16 products of float32 numbers, where the processor has instructions for them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mechunlearn.model.hooked import HookedModel

WIDE = 512
"""Width of the residual stream from which bfloat16 is used. Small worlds are narrower, and the same on every processor."""
Arithmetic = Callable[[], AbstractContextManager[Any]]


def products(model: HookedModel) -> torch.dtype:
    """Return the type in which a gradient method multiplies activations by weights.

    bfloat16 for a float32 model of a width of 512 or more on a processor with instructions for it (AVX512-BF16, AMX),
    forward and backward, with float32 sums. Weights, what leaves every module, attention, norms and gradients are kept
    in float32. All else has the model's own type, and so has every measurement: only what is trained on is less exact.

    Args:
        model: The model.

    >>> from mechunlearn import load_model
    >>> products(load_model("factworld"))  # a narrow model
    torch.float32
    """
    own = model.hf.dtype
    wide = model.signature.d_model >= WIDE
    return torch.bfloat16 if own == torch.float32 and wide and model.device.type == "cpu" and _in_hardware() else own


def products_named(model: HookedModel) -> str:
    """Return the name of that type, for run cards.

    Args:
        model: The model.

    >>> from mechunlearn import load_model
    >>> products_named(load_model("factworld"))
    'float32'
    """
    return str(products(model)).removeprefix("torch.")


def arithmetic(model: HookedModel) -> Arithmetic:
    """Return what makes the context in which to compute what is trained: products in the type of `products`.

    Backward passes may be outside it. It keeps bfloat16 copies of the weights, half of their memory.

    Args:
        model: The model.
    """
    if products(model) == model.hf.dtype:
        return nullcontext
    half = Half()
    return lambda: half


class Half(TorchFunctionMode):
    """Within the block linear maps multiply in bfloat16, forward and backward."""

    current: "Half | None" = None

    def __init__(self) -> None:
        super().__init__()
        self._before: list[Half | None] = []
        self._kept: dict[Tensor, tuple[int, Tensor]] = {}

    def __enter__(self) -> Any:
        self._before.append(Half.current)
        Half.current, mode = self, cast("Any", super())
        return mode.__enter__()

    def __exit__(self, *given: object) -> None:
        Half.current, mode = self._before.pop(), cast("Any", super())
        mode.__exit__(*given)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs:
            x, weight, bias = (*args, None)[:3]
        elif func is torch.addmm and not kwargs and isinstance(args[2], nn.Parameter):  # a Conv1D of transformers
            bias, x, weight = args[0], args[1], args[2].T
        else:
            return func(*args, **(kwargs or {}))
        apply: Callable[..., Tensor] = _Linear.apply
        made = apply(x, weight, self)
        return made if bias is None else made + bias

    def of(self, number: Tensor) -> Tensor:
        """Return a tensor in bfloat16: weights are cast once until they are written.

        Args:
            number: The tensor.
        """
        base = number._base
        if isinstance(base, nn.Parameter) and number.ndim == 2 and number.T.is_set_to(base):
            return self.of(base).T
        if not isinstance(number, nn.Parameter):
            return number.bfloat16()
        version, half = self._kept.get(number, (-1, number))
        if version != number._version:
            version, half = self._kept[number] = number._version, number.detach().bfloat16()
        return half

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply two matrices.

        Args:
            left: The first.
            right: The second.
        """
        return (self.of(left) @ self.of(right)).to(left.dtype)


def times(half: Half | None, left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices in the arithmetic of a forward pass.

    Args:
        half: `Half.current` of the forward pass.
        left: The first.
        right: The second.
    """
    return left @ right if half is None else half.times(left, right)


class _Linear(torch.autograd.Function):
    """x @ weight.T in bfloat16, and its two gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, half: Half) -> Tensor:
        ctx.half = half
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        with torch._C.DisableTorchFunction():
            return F.linear(half.of(x), half.of(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        before = ctx.half.times(gradient, weight) if ctx.needs_input_grad[0] else None
        of_weight = ctx.half.times(gradient.flatten(0, -2).T, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return before, of_weight, None


def _in_hardware() -> bool:
    """Whether the processor multiplies bfloat16 numbers itself, and torch may use its widest instructions."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 has none
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
