# SPDX-License-Identifier: Apache-2.0
"""What the tests of the C++ CPU kernels share: each instruction set of this machine, and tokens in any form."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lrc_kernels import _C
from lrc_kernels.tome import TokenLayout, reference

ISAS = _C.cpu_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROPERTY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


def tokens_in_any_form(form, batch, n, width, dtype, generator):
    """(x, layout): dense, a slice without its first token, every second token, transposed, packed, or a ViT output."""
    if form == "vit":
        layout = TokenLayout(clip_frames=2, grid=(4, 2 * n), shuffle=2, prefix=1)
        return torch.randn(2 * batch, layout.rows_per_frame, width, generator=generator).to(dtype), layout
    if form == "packed":
        return torch.randn(n, width, generator=generator).to(dtype), None
    if form == "every second":
        return torch.randn(batch, 2 * n, width, generator=generator).to(dtype)[:, ::2], None
    if form == "transposed":
        return torch.randn(width, batch, n, generator=generator).to(dtype).permute(1, 2, 0), None
    return torch.randn(batch, n + 1, width, generator=generator).to(dtype)[:, 1:], None


FORMS = st.sampled_from(["dense", "every second", "transposed", "packed", "vit"])


def random_plan(num_tokens, num_out, weights, generator):
    """A plan with any assignment, so that groups of 0, 1 and many tokens occur."""
    hub = torch.rand(num_tokens, generator=generator) < 0.5
    assign = torch.where(hub, 0, torch.randint(num_out, (num_tokens,), generator=generator)).int()
    weight = None
    if weights != "none":
        high = 1.0 if weights == "binary" else 3.0
        weight = (torch.rand(num_tokens, generator=generator) * (1 + high)).floor()
        weight = weight if weights == "binary" else weight * torch.rand(num_tokens, generator=generator)
    ones = torch.ones(num_tokens) if weight is None else weight
    return assign, torch.zeros(num_out).index_add(0, assign.long(), ones), weight


def spoil_rows(x, ints, tokens):
    """x with NaN in these tokens: a token of weight 0 must not be read into any sum."""
    mark = torch.zeros(reference.tokens_of(x, ints).flatten(0, -2).shape)
    mark[tokens] = 1.0
    where = reference.rows_of(mark, ints).reshape(x.shape) if ints else mark.reshape(x.shape)
    return torch.where(where > 0, torch.nan, x.float()).to(x.dtype)
