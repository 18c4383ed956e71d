"""One file format for every artefact: named tensors and a JSON description, with a hash that notices any change."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechunlearn.core.files import whole_file
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError

Made = TypeVar("Made")
Maker = Callable[[dict[str, Tensor], dict[str, Any]], Made]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
MOST = 2**28  # bools of a tensor in JSON, of which a short file can claim any number
DAMAGED = "its content hash is missing or wrong: it was changed or damaged after it was written"


def save(path: str | Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write an artefact as one whole file: `.safetensors` is compact, `.json` readable, and both are complete.

    Args:
        path: The file, which is replaced if it exists.
        kind: What the artefact is called in messages, such as `mask`.
        tensors: Its tensors by name, of any dtype and shape.
        about: Everything else, as JSON can hold it; dataclasses become objects.

    Raises:
        MechunlearnError: If the name ends in something else, or the disk refuses; nothing is left half-written.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     save(f"{folder}/it.json", "example", {"x": torch.tensor([1.5])}, {"note": "by hand"})
    ...     load(f"{folder}/it.json", {"example": lambda tensors, about: (tensors["x"].item(), about["note"])})
    (1.5, 'by hand')
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".json"):
        raise MechunlearnError(f"A {kind} is not written as '{path.name}'. Expected .json or .safetensors.")
    dense = torch.contiguous_format
    held = {name: t.detach().to("cpu", copy=True, memory_format=dense) for name, t in tensors.items()}
    with whole_file(path) as beside:
        if path.suffix == ".json":
            beside.write_text(_sealed_text(kind, held, about), encoding="utf-8")
            return
        metadata = {"kind": kind, "about": json.dumps(about, default=_plain)}
        try:
            save_file(held, beside, metadata={**metadata, "hash": _hash(held, metadata)})
        except SafetensorError as error:  # what it makes of an OSError
            raise OSError(str(error)) from None


def load(path: str | Path, makers: Mapping[str, Maker[Made]], advice: str = "") -> Made:
    """Read a file of `save` and make what it holds, or refuse it in one line.

    Args:
        path: The file; a name in `.safetensors` is read as such, any other as JSON.
        makers: For each kind of artefact that is welcome, a function of its tensors and its description.
        advice: The last sentence of a refusal: what to do instead.

    Returns:
        What the maker of the file's kind makes.

    Raises:
        MechunlearnError: If the file is missing, is not of these kinds, has changed by as little as a bit since it was
            written, or holds something that its maker refuses, whatever it raises.
    """
    path, expected = Path(path), " or ".join(makers)
    advice = advice or f"Expected a {expected} that `save` wrote: take an undamaged copy, or make it again."
    with reading(path, f"{expected} file", advice):
        kind, tensors, about = _tensor_file(path) if path.suffix == ".safetensors" else _json_file(path)
        if kind in makers:
            return makers[kind](tensors, about)
    raise MechunlearnError(f"'{path}' holds a {one_line(kind)}, not a {expected}. {advice}")


@contextmanager
def reading(path: str | Path, what: str, advice: str) -> Iterator[None]:
    """Turn anything that goes wrong while a file is read, and its content made, into one `MechunlearnError` of one line.

    Args:
        path: The file or folder, to name.
        what: What it should hold, such as `mask file`.
        advice: The last sentence: what to do instead.

    Yields:
        Nothing: the block reads.

    Raises:
        MechunlearnError: For any exception of the block.
    """
    try:
        yield
    except OSError as error:
        problem = error.strerror or one_line(error)
        raise MechunlearnError(f"Could not read the {what} '{error.filename or path}': {problem}. {advice}") from None
    except Exception as error:  # files come from strangers: no parser's error may pass as a traceback
        name = "" if isinstance(error, MechunlearnError) else f"{type(error).__name__}: "
        raise MechunlearnError(f"'{path}' is not a whole {what} ({name}{one_line(error)}). {advice}") from None


def text_hash(text: str, told: str = "") -> str:
    """Hash what a JSON text says: every name, word and digit in it, but not its white space.

    Args:
        text: The JSON, in which the hash itself is left empty.
        told: The hash that stands in it, if it is there already.

    Returns:
        16 hexadecimal digits.

    Raises:
        ValueError: If it is not JSON.
    """
    digits: dict[str, Any] = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), repr)  # 1e-5 is not 1E-5
    return digest(json.dumps(json.loads(text.replace(f'"{told}"', '""', 1), **digits), sort_keys=True))


def checked(about: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a JSON object that type hints name, if they are what the hints say.

    Args:
        about: The object, which may hold more.
        hints: For each name a type: str, int, float, bool, dicts and lists of these, dataclasses of these, or one of
            them or None. A bool is no number, an int is a float too.

    Returns:
        The named entries in the order of the hints, with dataclasses made.

    Raises:
        MechunlearnError: If a value has another type.
        KeyError: If a name is missing.
        TypeError: If a dataclass lacks a field.

    >>> checked({"seed": 1, "lr": 2}, {"lr": float})
    {'lr': 2}
    """
    return {name: _typed(name, about[name], hint) for name, hint in hints.items()}


def grouped(held: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Sort tensors named `part/rest` into their parts.

    Args:
        held: Tensors by name.
        parts: All parts that there may be.

    Returns:
        For each part its tensors, by the rest of their names.

    Raises:
        KeyError: If a name begins with something else.

    >>> grouped({"units/L0.mlp.out": torch.tensor([3])}, ("units", "rows"))
    {'units': {'L0.mlp.out': tensor([3])}, 'rows': {}}
    """
    found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for name, tensor in held.items():
        part, _, rest = name.partition("/")
        found[part][rest] = tensor
    return found


def _typed(name: str, value: Any, hint: Any) -> Any:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        return None if value is None else _typed(name, value, inner[0])
    if is_dataclass(hint) and type(value) is dict:
        hints = get_type_hints(kind)
        return kind(**checked(value, {field: hints[field] for field in value}))
    if kind is not Any and type(value) is not kind and not (kind is float and type(value) is int):
        raise MechunlearnError(f"{name} is {one_line(repr(value))}, not of type {kind.__name__}")
    for one in value.values() if kind is dict else value if kind is list else ():
        _typed(f"an entry of {name}", one, inner[-1] if inner else Any)
    return value


def _plain(value: Any) -> Any:
    """What JSON does not know, as something that it does."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else dict(value)


def one_line(of: object) -> str:
    """Return the first line of a text or an error, cut to a length that a line can hold.

    Args:
        of: The text or the error; one without words gives its type.
    """
    first = next(iter(str(of).strip().splitlines()), "") or type(of).__name__
    return first if len(first) <= 300 else f"{first[:297]}..."


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A hash of metadata, and of the name, dtype, shape and bytes of every tensor."""
    shapes = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)]
    whole = (tensors[name].flatten().view(torch.uint8).numpy().data for name, _, _ in shapes)
    return digest(json.dumps([sorted(metadata.items()), shapes]), *whole)


def _tensor_file(path: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if not metadata.keys() & {"kind", "hash"}:
            return "foreign file", {}, {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.pop("hash", "") != _hash(tensors, metadata):
        raise MechunlearnError(DAMAGED)
    return metadata["kind"], tensors, json.loads(metadata["about"])


def _json_file(path: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    entry = json.loads(text)
    if not isinstance(entry, dict):
        raise MechunlearnError(f"it holds a {type(entry).__name__}, not an object")
    if not entry.keys() & {"kind", "hash"}:
        return "foreign file", {}, {}
    if entry.get("hash") != text_hash(text, entry.get("hash", "")):
        raise MechunlearnError(DAMAGED)
    return entry["kind"], {name: _tensor(name, one) for name, one in entry["tensors"].items()}, entry["about"]


def _sealed_text(kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """The JSON file: a line a tensor, the hash near the top."""
    head = json.dumps({"kind": kind, "hash": "", "about": about}, indent=1, default=_plain).removesuffix("\n}")
    lines = ",".join(f"\n  {json.dumps(name)}: {json.dumps(_listed(one))}" for name, one in tensors.items())
    text = f'{head},\n "tensors": {{{lines}}}\n}}\n'
    return text.replace('"hash": ""', f'"hash": "{text_hash(text)}"', 1)


def _listed(tensor: Tensor) -> dict[str, Any]:
    """A tensor as JSON: of bools the places of what is true, in row-major order, of numbers all of them."""
    about = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if tensor.dtype == torch.bool:
        return {**about, "true": tensor.flatten().nonzero().flatten().tolist()}
    return {**about, "values": tensor.tolist()}


def _tensor(name: str, entry: dict[str, Any]) -> Tensor:
    """A listed tensor again; refused if it does not list as it was, as with an index of -1 or a unit of 1.7."""
    if "true" in entry:
        if math.prod(entry["shape"]) > MOST:
            raise MechunlearnError(f"'{name}' claims a shape of {one_line(entry['shape'])}")
        tensor = torch.zeros(entry["shape"], dtype=torch.bool)
        tensor.view(-1)[torch.tensor(entry["true"], dtype=torch.long)] = True
    else:
        tensor = torch.tensor(entry["values"], dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
    if json.dumps(_listed(tensor), sort_keys=True) != json.dumps(entry, sort_keys=True):
        raise MechunlearnError(f"'{name}' lists what a tensor of {entry['dtype']} does not hold")
    return tensor
