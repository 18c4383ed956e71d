"""The hub: asked only for names that cannot be files here, once, and not for long."""

import re
from pathlib import Path
from typing import Literal

from mechunlearn.core.progress import is_watched
from mechunlearn.errors import MechunlearnError

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
FILE = re.compile(
    r"\.(bin|csv|gguf|gz|json|jsonl|npz|parquet|pkl|pt|pth|safetensors|tsv|txt|xlsx?|ya?ml|zip)", re.IGNORECASE
)
TIMEOUT = 10  # seconds for one answer


def is_hub_name(source: str) -> bool:
    """Return whether a name can be the hub's: `owner/name` or `name`, which is no path, no file here, and not called like one.

    Args:
        source: The name.

    >>> [is_hub_name(name) for name in ("owner/Model-0.5B", "../facts", "my_facts.CSV", "a/b/c")]
    [True, False, False, False]
    """
    return bool(NAME.fullmatch(source)) and not FILE.fullmatch(Path(source).suffix) and not Path(source).is_file()


def look_up(name: str, kind: Literal["model", "dataset"]) -> None:
    """Raise an error if the hub does not have a name, or does not answer in ten seconds. What is cached is not asked for.

    Args:
        name: The name.
        kind: What it names.

    Raises:
        MechunlearnError: There is no such name, or no answer.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    if constants.HF_HUB_OFFLINE or cached.is_dir():
        return
    if is_watched():
        from rich.console import Console

        Console(stderr=True).print(f"Looking for the {kind} '{name}' on the hub ...", markup=False)
    api = HfApi()
    try:
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=TIMEOUT)
    except Exception as error:  # of the library or of the one that it sends requests with
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MechunlearnError(f"no {kind} '{name}' was found on the hub ({reason})") from None
