"""Export a feature edit: a Hugging Face folder that runs the edit, with a small loader of plain torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mechunlearn.core.files import whole_folder
from mechunlearn.errors import MechunlearnError
from mechunlearn.features import interventions
from mechunlearn.features.dictionaries import SAE, Codebook
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.features.interventions import FeatureClamp
from mechunlearn.features.places import Model, module_of, place
from mechunlearn.model.hooked import HookedModel

LOADER = "modeling_mechunlearn.py"
TAIL = '''

from transformers import {config} as _Config, {model} as _Model


class EditedConfig(_Config):
    model_type = "mechunlearn-{family}"


class Edited(_Model):
    """{model} with features edited at run time."""

    config_class = EditedConfig

    def __init__(self, config):
        super().__init__(config)
        self.interventions = nn.ModuleList([build(part) for part in config.mechunlearn])
        for part, intervention in zip(config.mechunlearn, self.interventions):
            attach(self.get_submodule(part["module"]), part["side"], intervention)
'''


def export_features(edit: FeatureEdit, model: Model, folder: str | Path) -> None:
    """Write a model with a feature edit as a Hugging Face folder (see `FeatureEdit.export`, which checks the model).

    Every name and line of code in the folder comes from this package or from the classes of the model.

    Args:
        edit: The edit.
        model: The model that the edit is for.
        folder: A new or empty folder.

    Raises:
        MechunlearnError: As `FeatureEdit.export`.
    """
    module = module_of(model)
    described: list[dict[str, Any]] = []
    state: dict[str, Tensor] = {}
    for i, part in enumerate(edit.parts):
        name, side = _exported_place(model, part.dictionary.hook_name)
        common = {"module": name, "side": side}
        if isinstance(part.dictionary, Codebook):
            made = part.intervention(next(module.parameters()).device)
            described.append(
                {**common, "kind": "delete", "about": part.dictionary.about, "reselect": part.how == "reselect"}
            )
        else:
            if not isinstance(part.dictionary, SAE):
                raise MechunlearnError(f"{part.dictionary} cannot be exported. Expected a Codebook or an SAE.")
            plain, about = part.dictionary.plain()
            made = FeatureClamp(plain, part.units, part.values, part.error, part.gate, part.share)
            clamp = {"units": len(part.units), "error": part.error, "gate": part.gate, "share": part.share}
            described.append({**common, "kind": "clamp", "about": about, **clamp})
        state |= {f"interventions.{i}.{name}": t.detach().cpu() for name, t in made.state_dict().items()}
    names = {
        "config": type(module.config).__name__,
        "model": type(module).__name__,
        "family": type(module.config).model_type,  # the class's own: a configuration on disk may claim anything
    }
    with whole_folder(folder) as beside:
        # under the names that the module has now: those of older checkpoints are not translated for a loader of ours
        module.save_pretrained(beside, save_original_format=False)
        _add_tensors(beside, state)
        config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
        stem, auto = LOADER.removesuffix(".py"), _auto_class(module)
        config |= {
            "model_type": f"mechunlearn-{names['family']}",
            "architectures": ["Edited"],
            "auto_map": {"AutoConfig": f"{stem}.EditedConfig", auto: f"{stem}.Edited"},
            "mechunlearn": described,
        }
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if any(part.gate == "sequence" for part in edit.parts):
            _generate_without_cache(beside / "generation_config.json")
        source = Path(interventions.__file__).read_text(encoding="utf-8")
        (beside / LOADER).write_text(source + TAIL.format(**names), encoding="utf-8")
        (beside / "mechunlearn.json").write_text(edit.card.to_json() + "\n", encoding="utf-8")
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


def _exported_place(model: Model, hook_name: str) -> tuple[str, str]:
    """The module of a hook point by name, and whether it enters or leaves it."""
    name = place(model, hook_name)
    if not isinstance(model, HookedModel):
        return name, "out"
    kind = name.split(".", 1)[1]
    if kind == "resid_mid" or kind in ("attn.q", "attn.k", "attn.v"):
        raise MechunlearnError(
            f"An edit at '{name}' cannot be exported: no module of the model gives or takes just that. Use another "
            "hook "
            "point, such as the block's resid_post, or save the edit and apply it with mechunlearn."
        )
    module, side = model.decoder.place(name)
    return next(path for path, other in model.hf.named_modules() if other is module), side


def _generate_without_cache(path: Path) -> None:
    """Let generation see whole sequences: with a cache a gate on the sequence would see its last token alone."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**settings, "use_cache": False}, indent=2) + "\n", encoding="utf-8")


def _auto_class(module: Any) -> str:
    return "AutoModelForSeq2SeqLM" if module.config.is_encoder_decoder else "AutoModelForCausalLM"


def _add_tensors(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Add tensors to a checkpoint: in its file, or as a further shard."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        whole = load_file(folder / "model.safetensors")
        save_file(
            {**whole, **{n: t.contiguous() for n, t in state.items()}}, folder / "model.safetensors", {"format": "pt"}
        )
        return
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "interventions.safetensors", {"format": "pt"})
    listed = json.loads(index.read_text(encoding="utf-8"))
    listed["weight_map"] |= dict.fromkeys(state, "interventions.safetensors")
    index.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
