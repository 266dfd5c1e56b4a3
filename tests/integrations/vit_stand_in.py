# SPDX-License-Identifier: Apache-2.0
"""The interface of timm's VisionTransformer (names, signatures, a Sequential of blocks): timm itself needs torchvision,
whose wheels do not load beside a CPU build of torch."""

import torch
from torch import nn

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    """timm.layers.attention.Attention as far as a ViT uses it."""

    def __init__(self, dim, num_heads, qk_norm, attn_drop):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """timm.models.vision_transformer.Block."""

    def __init__(self, dim, num_heads, qk_norm=False, init_values=None, attn_drop=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm, attn_drop)
        self.ls1 = LayerScale(dim) if init_values else nn.Identity()
        self.drop_path1 = nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.ls2 = LayerScale(dim) if init_values else nn.Identity()
        self.drop_path2 = nn.Identity()

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class StandIn(nn.Module):
    """timm's VisionTransformer on tokens that are embedded already: x [B, num_tokens, D] -> logits."""

    def __init__(self, depth=24, num_prefix_tokens=1, dim=WIDTH, **block):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.blocks = nn.Sequential(*[Block(dim, HEADS, **block) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward_features(self, x):
        return self.norm(self.blocks(x))

    def forward(self, x):
        x = self.forward_features(x)
        return self.head(x[:, 0] if self.num_prefix_tokens else x.mean(1))
