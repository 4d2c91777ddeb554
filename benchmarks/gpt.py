"""A GPT of 124 million parameters, the size of GPT-2's smallest, written plainly."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to what came in."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        # In bf16 on a GPU this is flash attention.
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder without dropout whose head shares its weights with the embedding.

    Args:
        vocabulary: Number of tokens.
        width: Of the residual stream.
        num_layers: Blocks.
        num_heads: Of each block's attention.
        max_length: Tokens of a sequence.
    """

    def __init__(
        self,
        vocabulary: int = 50304,
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        max_length: int = 1024,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits

    def flops(self, num_sequences: int, length: int) -> float:
        """Floating-point operations of forward and backward: six for each weight of a matrix product and token, and
        twelve for each pair of positions, layer and unit of width in the attention. A causal mask's empty half counts
        too, as it does in what others publish.
        """
        width, num_layers = self.tokens.embedding_dim, len(self.blocks)
        weights = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and "positions" not in name)
        return num_sequences * length * (6.0 * weights + 12.0 * num_layers * width * length)
