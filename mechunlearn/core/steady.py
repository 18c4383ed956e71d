"""Numbers that do not depend on what a notebook has switched on: autocast, default types and devices, inference mode."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICES = ("cpu", "cuda", "mps")


@contextmanager
def steady() -> Iterator[None]:
    """Within the block (or the function that it decorates) torch is in its usual state; afterwards as it was.

    Off: inference mode and autocast. Default: float32, and the processor for new tensors. Gradients stay as they are.

    >>> torch.set_default_dtype(torch.float64)
    >>> with steady():
    ...     print(torch.zeros(1).dtype)
    torch.float32
    >>> torch.zeros(1).dtype
    torch.float64
    >>> torch.set_default_dtype(torch.float32)
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
