"""PyTorch peers on the same weights and data. `evaluation.py` imports this module.

Each peer maps chains `[P, L]` to their losses `[P]`. All of them compute loss and accuracy as
jchain does.
"""

# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F

import jchain as jc

# `torch.func.vmap` takes this many chains at a time: larger layers would not fit with more.
VMAP_CHUNK = 64


def make_peers(
    problem: jc.Problem, *, with_compile: bool
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Make an eager loop, a loop of compiled layers, and `torch.func.vmap` over stacked weights."""
    group, heads = problem.bank.layers[0], problem.bank.heads[0]
    layer_fn, convert, stack_x = _port(group.module)
    layers = [_params(group, i, convert) for i in range(len(group.tokens))]
    head = _params(
        heads, 0, lambda params: [params["Dense_0"]["kernel"].T, params["Dense_0"]["bias"]]
    )
    x = stack_x(torch.tensor(np.asarray(problem.data.x)))
    y = torch.tensor(np.asarray(problem.data.y)).long()
    num_layers = problem.bank.num_layers

    def finish(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.ndim == 4:
            hidden = hidden.permute(0, 2, 3, 1)
        logits = F.linear(hidden.flatten(1), *head)
        return torch.stack([F.cross_entropy(logits, y), (logits.argmax(-1) == y).float().mean()])

    def loop(call: Callable) -> Callable[[np.ndarray], np.ndarray]:
        @torch.inference_mode()
        def run(chains: np.ndarray) -> np.ndarray:
            losses = []
            for chain in chains.tolist():
                hidden = x
                for token in chain:
                    if 0 <= token < num_layers:
                        hidden = call(layers[token], hidden)
                losses.append(finish(hidden)[0].item())
            return np.array(losses)

        return run

    stacked = [torch.stack(leaves) for leaves in zip(*layers, strict=True)]

    @torch.inference_mode()
    def vmapped(chains: np.ndarray) -> np.ndarray:
        def one(*gathered: torch.Tensor) -> torch.Tensor:
            hidden = x
            for slot in range(chains.shape[1] - 1):
                hidden = layer_fn([leaf[slot] for leaf in gathered], hidden)
            return finish(hidden)

        losses = []
        for part in np.array_split(chains, -(-len(chains) // VMAP_CHUNK)):
            tokens = torch.tensor(part[:, :-1]).long()
            losses.append(torch.func.vmap(one)(*[leaf[tokens] for leaf in stacked])[:, 0].numpy())
        return np.concatenate(losses)

    peers = {"torch_loop": loop(layer_fn), "torch_vmap": vmapped}
    if with_compile:
        peers["torch_compile"] = loop(torch.compile(layer_fn, dynamic=False))
    return peers


def _params(group: jc.LayerGroup, index: int, convert: Callable) -> list[torch.Tensor]:
    member = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf[index])), group.params)
    return [leaf.contiguous() for leaf in convert(member)]


def _port(module: Any) -> tuple[Callable, Callable, Callable]:
    """Return the layer in PyTorch.

    This is the layer as a function of its params, a function that converts the params of Flax, and
    one that changes the layout of the input.
    """
    if isinstance(module, jc.layers.ResidualMLP):
        names = ("Dense_0", "Dense_1")
        return (
            lambda p, x: x + F.linear(torch.relu(F.linear(x, p[0], p[1])), p[2], p[3]),
            lambda params: [
                leaf for name in names for leaf in (params[name]["kernel"].T, params[name]["bias"])
            ],
            lambda x: x,
        )
    if isinstance(module, jc.layers.ConvBlock):
        assert module.depth == 1
        return (
            lambda p, x: x + F.conv2d(torch.relu(x), p[0], p[1], padding=1),
            lambda params: [
                params["Conv_0"]["kernel"].permute(3, 2, 0, 1),
                params["Conv_0"]["bias"],
            ],
            # Channels last: faster on CPU than PyTorch's default layout.
            lambda x: x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last),
        )
    return _transformer_block(module), _convert_transformer_block, lambda x: x


def _transformer_block(module: jc.layers.TransformerBlock) -> Callable:
    num_heads, size = module.num_heads, module.features // module.num_heads

    def call(p: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        batch, length, features = x.shape
        normed = F.layer_norm(x, (features,), p[0], p[1], eps=1e-5)
        qkv = (
            F.linear(normed, p[2], p[3])
            .reshape(batch, length, 3, num_heads, size)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = (
            F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(x.shape)
        )
        x = x + F.linear(mixed, p[4], p[5])
        hidden = F.linear(F.layer_norm(x, (features,), p[6], p[7], eps=1e-5), p[8], p[9])
        return x + F.linear(F.gelu(hidden, approximate="tanh"), p[10], p[11])

    return call


def _convert_transformer_block(params: Any) -> list[torch.Tensor]:
    features = params["LayerNorm_0"]["scale"].shape[0]
    qkv, out = params["qkv"], params["out"]
    return [
        params["LayerNorm_0"]["scale"],
        params["LayerNorm_0"]["bias"],
        qkv["kernel"].reshape(features, -1).T,
        qkv["bias"].reshape(-1),
        out["kernel"].reshape(-1, features).T,
        out["bias"],
        params["LayerNorm_1"]["scale"],
        params["LayerNorm_1"]["bias"],
        *(
            leaf
            for name in ("Dense_0", "Dense_1")
            for leaf in (params[name]["kernel"].T, params[name]["bias"])
        ),
    ]
