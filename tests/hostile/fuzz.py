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

Readers = dict[str, tuple[str, Callable[[Path], object]]]
FACTS = ("csv", "tsv", "json", "jsonl", "parquet")


def readers() -> Readers:
    """A file's name and what reads it, by reader. What is read with is imported here, instrumented: lazy imports would come too late."""
    import atheris  # not a dependency: see above

    with atheris.instrument_imports(include=["mechunlearn"]):
        import mechunlearn as mu
        from mechunlearn.artifacts import localization, mask, weight_edit  # noqa: F401
        from mechunlearn.artifacts.circuit import Circuit
        from mechunlearn.core import tensors  # noqa: F401
        from mechunlearn.facts import dataset, formats, load, odd, readers  # noqa: F401
        from mechunlearn.facts.tables import read_texts
    return {
        **{f"facts.{ending}": (f"f.{ending}", mu.load_facts) for ending in FACTS},
        "texts": ("t.txt", read_texts),
        "mask": ("m.mask.json", mu.ComponentMask.load),
        "localization": ("l.safetensors", mu.Localization.load),
        "circuit": ("c.json", Circuit.load),
        "edit": ("e.edit.safetensors", mu.load_edit),
    }


def examples(reader: str, name: str, folder: Path) -> None:
    """Good files to begin with."""
    import pandas as pd

    import mechunlearn as mu
    from mechunlearn.world.toy import planted_facts
    from tests.hostile.test_facts_files import ROWS, TEXTS

    if reader.startswith("facts."):
        ending = reader.removeprefix("facts")
        for example, text in TEXTS.items():
            if example.endswith(ending) and text:
                (folder / example).write_text(text, encoding="utf-8")
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
            made[reader](folder / name)


def main() -> None:
    import atheris

    from mechunlearn.errors import MechunlearnError

    known = readers()
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.exit(f"Expected a reader: {', '.join(known)}.")
    name, read = known[reader := sys.argv.pop(1)]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as good:
        path = Path(folder) / name
        examples(reader, name, Path(good))

        def one(data: bytes) -> None:
            path.write_bytes(data)
            with suppress(MechunlearnError):
                read(path)

        atheris.Setup([*sys.argv, good], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
