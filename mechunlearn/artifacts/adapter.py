"""A low-rank change of weights as a PEFT adapter folder."""

from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mechunlearn.core.files import whole_folder
from mechunlearn.core.runcard import RunCard
from mechunlearn.model.hooked import HookedModel


def save_low_rank(
    model: HookedModel,
    factors: Mapping[str, tuple[Float[Tensor, "_row _rank"], Float[Tensor, "_rank _column"]]],
    folder: str | Path,
    card: RunCard,
) -> None:
    """Write factors as an adapter that `PeftModel.from_pretrained(hf, folder)` loads.

    Args:
        model: The model that the adapter is for.
        factors: `{parameter: (left, right)}`; left @ right has the parameter's shape.
        folder: A new or empty folder.
        card: How they were made.

    Raises:
        MechunlearnError: If the folder holds something or the disk refuses.
    """
    from peft import LoraConfig  # seconds to import

    held, ranks, conv = {}, {}, False
    for name, (left, right) in factors.items():
        module = name.removesuffix(".weight")
        conv = isinstance(model.hf.get_submodule(module), Conv1D)
        down, up = (left.T, right.T) if conv else (right, left)
        ranks[module] = len(down)
        held[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
        held[f"base_model.model.{module}.lora_B.weight"] = up.contiguous()
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(ranks),
        fan_in_fan_out=conv,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with whole_folder(folder) as beside:
        config.save_pretrained(str(beside))
        save_file(held, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        (beside / "mechunlearn.json").write_text(card.to_json() + "\n", encoding="utf-8")
