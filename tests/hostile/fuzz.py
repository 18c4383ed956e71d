"""Coverage-guided fuzzing of everything that reads a file: `pip install atheris && python -m tests.hostile.fuzz facts.csv [-max_total_time=60 ...]`.

The first argument is a reader: the ending of a facts file, or `mask`, `edit`, `localization`, `circuit`, `texts`. What follows are
libFuzzer's own options. Whatever bytes a file has, it is read or refused with `MechunlearnError`: anything else is a crash, and the bytes are kept.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris
import pandas as pd

with atheris.instrument_imports(include=["mechunlearn"]):
    import mechunlearn as mu
    from mechunlearn.artifacts import localization, mask, weight_edit
    from mechunlearn.artifacts.circuit import Circuit
    from mechunlearn.core import tensors
    from mechunlearn.facts import dataset, formats, load, odd, readers
    from mechunlearn.facts.tables import read_texts
    from mechunlearn.world.toy import planted_facts

    LOADED = (
        localization,
        mask,
        weight_edit,
        tensors,
        dataset,
        formats,
        load,
        odd,
        readers,
    )  # lazy imports come too late

from tests.hostile.test_facts_files import ROWS, TEXTS

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"facts.{ending}": (f"f.{ending}", mu.load_facts) for ending in ("csv", "tsv", "json", "jsonl", "parquet")},
    "texts": ("t.txt", read_texts),
    "mask": ("m.mask.json", mu.ComponentMask.load),
    "localization": ("l.safetensors", mu.Localization.load),
    "circuit": ("c.json", Circuit.load),
    "edit": ("e.edit.safetensors", mu.load_edit),
}


def examples(reader: str, folder: Path) -> None:
    """Good files to begin with."""
    if reader.startswith("facts."):
        ending = reader.removeprefix("facts")
        for name, text in TEXTS.items():
            if name.endswith(ending) and text:
                (folder / name).write_text(text, encoding="utf-8")
        if ending == ".parquet":
            pd.DataFrame(ROWS).to_parquet(folder / "plain.parquet")
    elif reader == "texts":
        (folder / "t.txt").write_text("Anna plays golf.\n\nBen plays chess.\n", encoding="utf-8")
    else:
        toy = planted_facts()
        chosen = mu.ComponentMask.of([toy.neuron(0)], toy.model.signature)
        forget, retain = toy.prompts([0, 1]), toy.prompts([2, 3])
        made = {
            "mask": chosen.save,
            "edit": mu.edit.masked_gradient(toy.model, chosen, forget, retain, steps=1).save,
            "localization": mu.localize.attribution_patching(toy.model, forget).save,
        }
        if reader in made:
            made[reader](folder / READERS[reader][0])


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"Expected a reader: {', '.join(READERS)}.")
    name, read = READERS[reader := sys.argv.pop(1)]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as good:
        path = Path(folder) / name
        examples(reader, Path(good))

        def one(data: bytes) -> None:
            path.write_bytes(data)
            with suppress(mu.MechunlearnError):
                read(path)

        atheris.Setup([*sys.argv, good], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
