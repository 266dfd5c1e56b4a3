# SPDX-License-Identifier: Apache-2.0
"""The chunked cross-entropy against PyTorch's own, its gradients, and what it refuses."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lrc_kernels.testing import assert_close
from lrc_model.losses import chunked_cross_entropy


def sample(dtype, rows=23, width=12, words=31):
    random = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(words, width, generator=random).to(dtype).requires_grad_()
    targets = torch.randint(0, words, (rows,), generator=random)
    targets[torch.rand(rows, generator=random) < 0.4] = -100
    return hidden, weight, targets, torch.rand(rows, generator=random)


def plain(hidden, weight, targets, loss_weight):
    entropy = cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="none")
    return (entropy * loss_weight.to(entropy.dtype)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("chunk", [4, 64])
def test_loss_and_gradients(dtype, chunk):
    inputs = sample(dtype)
    exact = [t.detach().double().requires_grad_(i < 2) if i != 2 else t for i, t in enumerate(inputs)]
    same = [t.detach().clone().requires_grad_(i < 2) for i, t in enumerate(inputs)]
    loss = chunked_cross_entropy(*inputs, chunk=chunk)
    results = [(loss, inputs), (plain(*exact), exact), (plain(*same), same)]
    for value, _ in results:
        value.backward()
    (_, ours), (wanted, reference), (eager, torch_form) = results
    assert_close(loss.to(eager.dtype), wanted.detach().double(), eager.detach())
    for index in range(2):
        assert_close(ours[index].grad, reference[index].grad, torch_form[index].grad)


def test_gradcheck_and_no_rows():
    hidden, weight, targets, loss_weight = sample(torch.float64, rows=7)
    torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, targets, loss_weight, chunk=3), (hidden, weight))
    torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, loss_weight, num_targets=int((targets != -100).sum())),
        (hidden, weight),
    )
    with pytest.raises(ValueError, match="num_targets must be the rows with a target"):
        chunked_cross_entropy(hidden, weight, targets, loss_weight, num_targets=7)
    empty = chunked_cross_entropy(hidden[:0], weight, targets[:0], loss_weight[:0])
    assert empty.item() == 0.0
    nothing = chunked_cross_entropy(hidden, weight, torch.full_like(targets, -100), loss_weight)
    nothing.backward()
    assert nothing.item() == 0.0 and not hidden.grad.any()


def test_a_row_without_a_target_poisons_nothing():
    hidden, weight, targets, loss_weight = sample(torch.float32)
    at = int((targets == -100).nonzero()[0])
    with torch.no_grad():
        hidden[at] = torch.nan
    loss = chunked_cross_entropy(hidden, weight, targets, loss_weight)
    loss.backward()
    assert (
        loss.isfinite()
        and hidden.grad[at].abs().sum() == 0
        and hidden.grad.isfinite().all()
        and weight.grad.isfinite().all()
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({1: torch.zeros(31, 11)}, ValueError, "weight must have shape \\[V, 12\\], got \\[31, 11\\]"),
        ({2: torch.zeros(22, dtype=torch.int64)}, ValueError, "targets must hold one value per token \\(23\\)"),
        ({2: torch.zeros(23)}, TypeError, "targets must be one of int64"),
        ({3: torch.zeros(5)}, ValueError, "loss_weight must hold one value per token"),
    ],
)
def test_bad_input(change, error, message):
    inputs = [change.get(index, tensor) for index, tensor in enumerate(sample(torch.float32))]
    with pytest.raises(error, match=message):
        chunked_cross_entropy(*inputs)
