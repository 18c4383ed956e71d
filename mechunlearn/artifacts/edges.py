"""Which edges an architecture has, and their names, as in the MIB benchmark.

`a0.h1->m2`, `input->a0.h0<q>`, `m1->logits`.
"""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from mechunlearn.model.layout import Signature


def writers(signature: Signature) -> list[str]:
    """Name what writes to the residual stream, in order: the input, then every layer's query heads and its MLP.

    Args:
        signature: The architecture.

    >>> writers(Signature("gpt2", layers=1, heads=2, kv_heads=2, d_mlp=3, d_model=4))
    ['input', 'a0.h0', 'a0.h1', 'm0']
    """
    heads = [f"h{head}" for head in range(signature.heads)]
    return ["input"] + [
        name for layer in range(signature.layers) for name in [*(f"a{layer}.{head}" for head in heads), f"m{layer}"]
    ]


def readers(signature: Signature) -> list[str]:
    """Name what reads the residual stream, in order: every layer's queries, keys, values and MLP, then the logits.

    Under grouped-query attention there is one key and one value reader per KV head: the head of `<k>` and `<v>` is
    then the index of a *KV head*, that of `<q>` the index of a query head.

    Args:
        signature: The architecture.

    >>> readers(Signature("llama", layers=1, heads=2, kv_heads=1, d_mlp=3, d_model=4))
    ['a0.h0<q>', 'a0.h1<q>', 'a0.h0<k>', 'a0.h0<v>', 'm0', 'logits']
    """
    units = {"q": signature.heads, "k": signature.kv_heads, "v": signature.kv_heads}
    heads = [f"h{head}<{one}>" for one, count in units.items() for head in range(count)]
    return [
        name for layer in range(signature.layers) for name in [*(f"a{layer}.{head}" for head in heads), f"m{layer}"]
    ] + ["logits"]


def by_reader(heads: Tensor, groups: Tensor, mlp: Tensor, logits: Tensor) -> Shaped[Tensor, " _reader"]:
    """Lay values out in the order of `readers`.

    Args:
        heads: `[layer head]`, the values of the queries.
        groups: `[layer kv_head]`, the values of the keys, and of the values.
        mlp: `[layer 1]`, the values of the MLPs.
        logits: The value of the logits.

    Returns:
        One value a reader.
    """
    return torch.cat([torch.cat([heads, groups, groups, mlp], 1).flatten(), logits])


def edges(signature: Signature, parallel: bool) -> Bool[Tensor, "writer reader"]:
    """Return which writer feeds which reader.

    Args:
        signature: The architecture.
        parallel: Whether the MLP of a layer reads what its attention reads.

    Returns:
        True where there is an edge.

    >>> one = Signature("gpt2", layers=1, heads=2, kv_heads=2, d_mlp=3, d_model=4)
    >>> int(edges(one, parallel=False).sum()), int(edges(one, parallel=True).sum())
    (13, 11)
    """
    attention = 2 * torch.arange(signature.layers)[:, None] + 1  # how deep, the input being 0
    mlp, logits = attention + 1, torch.tensor([2 * signature.layers + 1])
    heads, groups = attention.expand(-1, signature.heads), attention.expand(-1, signature.kv_heads)
    written = torch.cat([torch.tensor([0]), torch.cat([heads, mlp], 1).flatten()])
    read = by_reader(heads, groups, attention if parallel else mlp, logits)
    return written[:, None] < read


def shared(signature: Signature) -> Int[Tensor, " _reader"]:
    """Return, for every reader if each query head had its own key and value, the place of the one that its group shares.

    Args:
        signature: The architecture.
    """
    query, width = torch.arange(signature.heads), signature.heads + 2 * signature.kv_heads + 1
    group = signature.heads + query // (signature.heads // signature.kv_heads)
    block = torch.cat([query, group, group + signature.kv_heads, torch.tensor([width - 1])])
    places = width * torch.arange(signature.layers)[:, None] + block
    return torch.cat([places.flatten(), torch.tensor([width * signature.layers])])


def edge_names(signature: Signature, chosen: Bool[Tensor, "writer reader"]) -> list[str]:
    """Name edges, row by row.

    Args:
        signature: The architecture.
        chosen: True where an edge is named.
    """
    source, target = writers(signature), readers(signature)
    return [f"{source[row]}->{target[column]}" for row, column in chosen.nonzero().tolist()]


def described(signature: Signature, parallel: bool) -> str:
    """Describe an architecture and how its MLPs read, for messages.

    Args:
        signature: The architecture.
        parallel: Whether the MLP of a layer reads what its attention reads.
    """
    return f"{signature}, {'parallel' if parallel else 'sequential'} MLP"
