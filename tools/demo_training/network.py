"""The training forward pass of a Llama model: the weights of ``LlamaForCausalLM``, fewer and compiled steps.

One block is compiled once for each batch shape and used for every layer, which keeps compilation to seconds.
``tests/unit/demo/test_network.py`` holds it to Transformers' own forward pass.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

Tensor = torch.Tensor


def build_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Return fresh weights in fp32: normal 0.02, the projections into the residual stream scaled down."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    std = 0.02 / (2 * config.num_hidden_layers) ** 0.5
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=std)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=std)
    return model


def rotary_tables(config: LlamaConfig, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin [tokens, head_dim] fp32 of positions 0 to ``tokens``."""
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    theta = config.rope_parameters["rope_theta"]
    angles = torch.outer(torch.arange(tokens, device=device, dtype=torch.float32), theta**-half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def _heads(x: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    return functional.linear(x, weight).view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def block(x: Tensor, cos: Tensor, sin: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """One decoder layer: x [rows, tokens, hidden]; causal attention, no mask for right padding."""
    norm_1, query, key, value, out, norm_2, gate, up, down = weights
    y = _norm(x, norm_1)
    q = _rotate(_heads(y, query, cos.shape[-1]), cos, sin)
    k = _rotate(_heads(y, key, cos.shape[-1]), cos, sin)
    v = _heads(y, value, cos.shape[-1])
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + functional.linear(attended.transpose(1, 2).flatten(2), out)
    y = _norm(x, norm_2)
    return x + functional.linear(functional.silu(functional.linear(y, gate)) * functional.linear(y, up), down)


def head(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each position [rows, tokens] fp32 and whether its likeliest token is the target."""
    logits = functional.linear(_norm(x, norm), embedding).float()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )
    return loss, logits.argmax(-1) == targets


def _weights(layer: Any) -> tuple[Tensor, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    modules = (
        layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    )  # fmt: skip
    return tuple(module.weight for module in modules)


class Network:
    """Runs the forward pass of ``model``; ``compiled`` picks torch.compile for the block and the head."""

    def __init__(self, model: LlamaForCausalLM, compiled: bool) -> None:
        self.model = model
        self._block = torch.compile(block, dynamic=False) if compiled else block
        self._head = torch.compile(head, dynamic=False) if compiled else head
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and rightness [rows, tokens] of predicting each next token (after the last: id 0)."""
        inner = self.model.model
        targets = functional.pad(ids[:, 1:], (0, 1))
        cos, sin = self._rotary(ids.shape[1], ids.device)
        x = inner.embed_tokens(ids)
        for layer in inner.layers:
            x = self._block(x, cos, sin, _weights(layer))
        return self._head(x, inner.norm.weight, inner.embed_tokens.weight, targets)

    def _rotary(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if tokens not in self._tables:
            self._tables[tokens] = rotary_tables(self.model.config, tokens, device)
        return self._tables[tokens]
