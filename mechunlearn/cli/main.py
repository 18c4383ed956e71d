"""The command line: one command a file, one clear line and exit code 2 on bad input."""

import os
import sys
import warnings
from collections.abc import Callable

import typer

from mechunlearn.cli.benchmark import app as benchmark_app
from mechunlearn.cli.compare import compare
from mechunlearn.cli.dictionary import app as dictionary_app
from mechunlearn.cli.doctor import doctor
from mechunlearn.cli.edit import edit
from mechunlearn.cli.evaluate import evaluate
from mechunlearn.cli.explore import explore
from mechunlearn.cli.localize import localize
from mechunlearn.cli.reproduce import app as reproduce_app
from mechunlearn.cli.run import demo, run
from mechunlearn.cli.wash import wash
from mechunlearn.cli.world import app as world_app
from mechunlearn.errors import MechunlearnError

EXAMPLES: dict[Callable[..., None], str] = {
    doctor: "doctor smollm2",
    run: "run factworld factworld/sport -o result",
    demo: "demo -o demo",
    localize: "localize factworld factworld/sport --weights 0.05 -o sport.mask.json",
    edit: "edit factworld factworld/sport sport.mask.json -o sport.edit.safetensors",
    wash: "wash factworld factworld/sport sport.mask.json --covariance-weight 400 --overshoot 1.5 -o washed.safetensors",
    evaluate: "evaluate factworld factworld/sport sport.edit.safetensors --attacks all -o report.html",
    explore: "explore factworld factworld/sport --forget 32",
    compare: "compare factworld factworld/sport --objectives injection,npo --seeds 3 -o sport-grid",
}
app = typer.Typer(
    help="Find where a language model keeps a fact, change it there and nowhere else, and prove that it is gone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(world_app, name="world")
app.add_typer(reproduce_app, name="reproduce")
app.add_typer(dictionary_app, name="dictionary")
app.add_typer(benchmark_app, name="benchmark")
for command, example in EXAMPLES.items():
    app.command(epilog=f"Example: mechunlearn {example}")(command)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except MechunlearnError as error:
        print(f"mechunlearn: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except OSError as error:
        print(f"mechunlearn: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
