# SPDX-License-Identifier: Apache-2.0
"""The adapters to other people's CUDA kernels, which cannot run here: each call is checked against the real schema (on
meta tensors) or the documented signature, answered by the specification in the kernel's own conventions (+inf for an
empty row), and the adapter must give back what the specification gives."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lrc_kernels.attention import aten, flash_attn, reference, vendors

TQ, TK = 12, 15
OFFSETS_Q, OFFSETS_K = [0, 4, 4, 7, 12], [0, 6, 8, 9, 15]


def draw(random, rows, heads, dtype=torch.bfloat16):
    return torch.randn(rows, heads, 16, generator=random).to(dtype)


@pytest.fixture
def problem(random):
    q, k, v, dout = (draw(random, *shape) for shape in ((TQ, 4), (TK, 2), (TK, 2), (TQ, 4)))
    offsets = (torch.tensor(OFFSETS_Q, dtype=torch.int32), torch.tensor(OFFSETS_K, dtype=torch.int32))
    return SimpleNamespace(q=q, k=k, v=v, dout=dout, pack=(*offsets, None, 5, 6, True, 0.3, -1, -1))


@pytest.fixture
def device(monkeypatch):
    """device(8, 6): the adapters see a CUDA device of compute capability 8.6; 9.0 to begin with."""

    def set_capability(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_capability(9, 0)
    return set_capability


def to_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


class FakeAten:
    """torch.ops.aten whose CUDA attention runs on CPU: the real op checks the call on meta tensors and gives the
    shapes, the specification gives the numbers."""

    def __init__(self, empty_lse):
        self.calls, self.empty_lse = [], empty_lse

    def _real(self, name, args, kwargs):
        self.calls.append(name)
        for x in args:
            assert not isinstance(x, torch.Tensor) or x.dim() == 0 or x.numel() == 0 or x.stride(-1) == 1
        result = getattr(torch.ops.aten, name)(*map(to_meta, args), **{k: to_meta(v) for k, v in kwargs.items()})
        schema = getattr(torch.ops.aten, name).default._schema
        named = dict(zip([argument.name for argument in schema.arguments], args, strict=False))
        return result, {**named, **kwargs}

    def _pack(self, a, causal):
        sides = (a["window_size_left"], a["window_size_right"])
        return (a["cum_seq_q"], a["cum_seq_k"], None, a["max_q"], a["max_k"], causal, a["scale"], *sides)

    def _flash_attention_forward(self, *args, **kwargs):
        result, a = self._real("_flash_attention_forward", args, kwargs)
        assert a["dropout_p"] == 0 and a["return_debug_mask"] is False
        out, lse = reference.forward(a["query"], a["key"], a["value"], *self._pack(a, a["is_causal"]))
        lse = torch.where(lse.isinf() | lse.isnan(), self.empty_lse, lse)
        assert out.shape == result[0].shape and lse.shape == result[1].shape and lse.dtype == result[1].dtype
        return out, lse, *result[2:]

    def _flash_attention_backward(self, *args, **kwargs):
        result, a = self._real("_flash_attention_backward", args, kwargs)
        assert a["dropout_p"] == 0 and (a["logsumexp"] > -torch.inf).all()
        assert a["out"].dtype == a["grad_out"].dtype == a["query"].dtype and a["rng_state"].dtype == torch.uint64
        rows = (a["grad_out"], a["query"], a["key"], a["value"], a["out"], a["logsumexp"], None)
        gradients = reference.backward(*rows, *self._pack(a, a["is_causal"]))
        assert [x.shape for x in gradients] == [x.shape for x in result]
        return gradients

    def _dense_pack(self, a, num_sequences):
        length_q, length_k = a["query"].shape[2], a["key"].shape[2]
        offsets = (torch.arange(num_sequences + 1) * length for length in (length_q, length_k))
        return (*offsets, None, length_q, length_k, a["is_causal"], a["scale"], -1, -1)

    def _scaled_dot_product_cudnn_attention(self, *args, **kwargs):
        result, a = self._real("_scaled_dot_product_cudnn_attention", args, kwargs)
        assert a["compute_log_sumexp"] is True and a["attn_bias"] is None and a["dropout_p"] == 0
        num_sequences = a["query"].shape[0]
        packed = [a[name].transpose(1, 2).flatten(0, 1) for name in ("query", "key", "value")]
        out, lse = reference.forward(*packed, *self._dense_pack(a, num_sequences))
        out = out.unflatten(0, (num_sequences, -1)).transpose(1, 2)
        lse = lse.unflatten(1, (num_sequences, -1)).transpose(0, 1)[..., None]
        assert out.shape == result[0].shape and lse.shape == result[1].shape
        return out, lse, *result[2:]

    def _scaled_dot_product_cudnn_attention_backward(self, *args, **kwargs):
        result, a = self._real("_scaled_dot_product_cudnn_attention_backward", args, kwargs)
        num_sequences, _, length, _ = a["query"].shape
        assert a["logsumexp"].shape == (*a["query"].shape[:3], 1) and a["logsumexp"].is_contiguous()
        assert (a["max_q"], a["max_k"], a["dropout_p"]) == (length, a["key"].shape[2], 0)
        names = ("grad_out", "query", "key", "value", "out")
        packed = [a[name].transpose(1, 2).flatten(0, 1) for name in names]
        lse = a["logsumexp"][..., 0].transpose(0, 1).flatten(1)
        gradients = reference.backward(*packed, lse, None, *self._dense_pack(a, num_sequences))
        gradients = [x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in gradients]
        assert [x.shape for x in gradients] == [x.shape for x in result]
        return gradients


def assert_same(got, wanted):
    for index, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert mine.is_contiguous() and mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=index: f"{i}: {m}")


PACKS = {
    "causal": (True, -1, -1),
    "dense": (False, -1, -1),
    "window": (False, 2, 1),
    "causal window": (True, 3, -1),
}


@pytest.mark.parametrize("empty_lse", [torch.inf, -torch.inf])
@pytest.mark.parametrize("options", PACKS)
def test_aten_is_called_as_its_schema_says(monkeypatch, problem, device, options, empty_lse):
    fake = FakeAten(empty_lse)
    monkeypatch.setattr(aten, "ATEN", fake)
    causal, left, right = PACKS[options]
    pack = (*problem.pack[:5], causal, 0.3, left, right)
    q = problem.q.clone()
    q[2] = torch.nan
    arguments = (q, problem.k.mT.contiguous().mT, problem.v, *pack)
    assert aten.supports_forward(*arguments) is None
    out, lse = aten.forward(*arguments)
    wanted, wanted_lse = reference.forward(*arguments)
    assert_same((out, lse), (wanted, wanted_lse))
    assert lse[:, 2].isnan().all() and (options == "dense" or (lse == -torch.inf).any())
    backward = (
        problem.dout,
        problem.q,
        problem.k,
        problem.v,
        *reference.forward(problem.q, problem.k, problem.v, *pack),
    )
    assert aten.supports_backward(*backward, None, *pack) is None
    assert_same(aten.backward(*backward, None, *pack), reference.backward(*backward, None, *pack))
    assert fake.calls == ["_flash_attention_forward", "_flash_attention_backward"]


def test_aten_takes_the_fp32_out_of_a_ring(monkeypatch, problem, device):
    monkeypatch.setattr(aten, "ATEN", FakeAten(torch.inf))
    out, lse = reference.forward(problem.q, problem.k, problem.v, *problem.pack)
    rows = (problem.q, problem.k, problem.v)
    wide = aten.backward(problem.dout.float(), *rows, out.float(), lse, None, *problem.pack)
    assert_same(wide, reference.backward(problem.dout, *rows, out, lse, None, *problem.pack))


def uniform(random, heads=4, causal=True):
    q, k, v, dout = (draw(random, 15, heads) for _ in range(4))
    offsets = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    return q, k, v, dout, (offsets, offsets, None, 5, 5, causal, 0.3, -1, -1)


@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_is_called_as_its_schema_says(monkeypatch, random, device, causal):
    fake = FakeAten(torch.inf)
    monkeypatch.setattr(aten, "ATEN", fake)
    q, k, v, dout, pack = uniform(random, causal=causal)
    assert aten.cudnn_supports_forward(q, k, v, *pack) is None
    out, lse = aten.cudnn_forward(q, k, v, *pack)
    assert_same((out, lse), reference.forward(q, k, v, *pack))
    backward = (dout, q, k, v, out, lse, None, *pack)
    assert torch.are_deterministic_algorithms_enabled()
    assert "not deterministic" in aten.cudnn_supports_backward(*backward)
    torch.use_deterministic_algorithms(False)
    assert aten.cudnn_supports_backward(*backward) is None
    assert_same(aten.cudnn_backward(*backward), reference.backward(*backward))
    assert len(fake.calls) == 2


def test_what_aten_and_cudnn_decline(random, problem, device):
    q, k, v, pack = problem.q, problem.k, problem.v, problem.pack
    bias = (*pack[:2], torch.zeros(TK), *pack[3:])
    lse = torch.zeros(4, TQ)
    for reason, call in {
        "q must be bf16 or fp16, got float32": lambda: aten.supports_forward(q.float(), k, v, *pack),
        "multiple of 8 up to 256, got 12": lambda: aten.supports_forward(q[..., :12], k, v, *pack),
        "takes no key_bias": lambda: aten.supports_forward(q, k, v, *bias),
        "no gradient of the lse": lambda: aten.supports_backward(problem.dout, q, k, v, q, lse, lse, *pack),
        "all sequences must have the same length": lambda: aten.cudnn_supports_forward(q, k, v, *pack),
    }.items():
        assert reason in call()
    q, k, v, dout, pack = uniform(random)
    window = (*pack[:7], 3, -1)
    wide = (draw(random, 15, 4).repeat(1, 1, 10),) * 3
    longer = (*pack[:4], 6, *pack[5:])
    empty = (q[:0], k[:0], v[:0], torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), None, 0, 0)
    for reason, call in {
        "as many heads, got 4 and 2": lambda: aten.cudnn_supports_forward(q, k[:, :2], v[:, :2], *pack),
        "takes no window": lambda: aten.cudnn_supports_forward(q, k, v, *window),
        "multiple of 8 up to 128, got 160": lambda: aten.cudnn_supports_forward(*wide, *pack),
        "same length": lambda: aten.cudnn_supports_forward(q, k, v, *longer),
        "equally long": lambda: aten.cudnn_supports_forward(q, draw(random, 18, 4), v, *longer),
        "no empty": lambda: aten.cudnn_supports_forward(*empty, True, 0.3, -1, -1),
        "no gradient": lambda: aten.cudnn_supports_backward(dout, q, k, v, q, lse, lse, *pack),
    }.items():
        assert reason in call()
    device(7, 5)
    assert "compute capability 8.0 or newer, got 7.5" in aten.supports_forward(q, k, v, *pack)


def test_no_key_or_no_query_never_reaches_a_kernel(monkeypatch, random, device):
    monkeypatch.setattr(aten, "ATEN", None)
    monkeypatch.setattr(flash_attn, "_functions", None)
    zeros = torch.zeros(3, dtype=torch.int32)
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    for rows, keys, pack in ((3, 0, (offsets, zeros)), (0, 3, (zeros, offsets))):
        q, k, v = draw(random, rows, 4), draw(random, keys, 2), draw(random, keys, 2)
        arguments = (q, k, v, *pack, None, 2, 2, True, 0.3, -1, -1)
        wanted = reference.forward(*arguments)
        for room in (aten, flash_attn):
            assert_same(room.forward(*arguments), wanted)
            backward = (q, *arguments[:3], *wanted, None, *arguments[3:])
            assert_same(room.backward(*backward), reference.backward(*backward))


LENGTHS = "cu_seqlens_q{0}, cu_seqlens_k{0}, max_seqlen_q{0}, max_seqlen_k{0}"
NONE = LENGTHS.format("=None")
# Generation: the parameters of its forward and backward, as flash-attn documents them (as far as they matter here).
DOCUMENTED = {
    4: (
        f"q, k, v, {NONE}, softmax_scale=None, causal=False, window_size=(None, None), return_lse=False",
        f"q, k, v, out, dout, lse, softmax_scale=None, causal=False, {NONE}, deterministic=False, dlse=None",
    ),
    3: (
        f"q, k, v, k_new=None, {NONE}, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1",
        f"dout, q, k, v, out, lse, {NONE}, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, "
        "window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False",
    ),
    2: (
        f"q, k, v, {LENGTHS.format('')}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1",
        f"dout, q, k, v, out, lse, dq, dk, dv, {LENGTHS.format('')}, dropout_p, softmax_scale, causal, "
        "window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None",
    ),
}


def fake_package(generation, calls):
    """A module whose two functions have that generation's documented signature and conventions."""
    bind_forward, bind_backward = (eval(f"lambda {parameters}: locals()") for parameters in DOCUMENTED[generation])

    def pack_of(a):
        sides = (a.get("window_size_left", -1), a.get("window_size_right", -1))
        causal = a["is_causal"] if "is_causal" in a else a["causal"]
        lengths = (a["max_seqlen_q"], a["max_seqlen_k"], causal, a["softmax_scale"], *sides)
        return (a["cu_seqlens_q"], a["cu_seqlens_k"], None, *lengths)

    def forward(*args, **kwargs):
        a = bind_forward(*args, **kwargs)
        calls.append((generation, "forward"))
        assert a.get("dropout_p", 0) == 0 and a.get("return_lse", True)
        out, lse = reference.forward(a["q"], a["k"], a["v"], *pack_of(a))
        return out, torch.where(lse.isinf() | lse.isnan(), torch.inf if generation == 2 else -torch.inf, lse), None

    def backward(*args, **kwargs):
        a = bind_backward(*args, **kwargs)
        calls.append((generation, "backward"))
        assert (a["lse"] > -torch.inf).all() and isinstance(a["deterministic"], bool)
        assert not any(a.get(name) for name in ("dropout_p", "softcap", "alibi_slopes"))
        gradients = reference.backward(*(a[x] for x in ("dout", "q", "k", "v", "out", "lse")), None, *pack_of(a))
        if generation == 4:
            return gradients
        for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
            a[name].copy_(gradient)
        return None

    # As torch.library.custom_op does: what it wraps is found under this name only.
    forward._init_fn, backward._init_fn = bind_forward, bind_backward
    package = flash_attn.PACKAGES[4 - generation]
    module = ModuleType(package.module)
    setattr(module, package.forward, forward)
    setattr(module, package.backward, backward)
    return module


@pytest.fixture
def install(monkeypatch, device):
    """install(4, 2): the process can import these generations of flash-attn; returns the list of their calls."""

    def install_packages(*generations):
        calls = []
        for package, generation in zip(flash_attn.PACKAGES, (4, 3, 2), strict=True):
            module = fake_package(generation, calls) if generation in generations else None
            monkeypatch.setitem(sys.modules, package.module, module)
            if generation in generations:
                parent = package.module.rpartition(".")[0]
                while parent:
                    monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
                    parent = parent.rpartition(".")[0]
        flash_attn._functions.cache_clear()
        return calls

    yield install_packages
    flash_attn._functions.cache_clear()


@pytest.mark.parametrize("generation", [4, 3, 2])
@pytest.mark.parametrize("options", PACKS)
def test_each_flash_attn_gives_the_specification(problem, install, device, generation, options):
    calls = install(generation)
    if generation == 4:
        device(10, 0)
    causal, left, right = PACKS[options]
    pack = (*problem.pack[:5], causal, 0.3, left, right)
    arguments = (problem.q, problem.k, problem.v, *pack)
    if generation == 4 and left >= 0:
        assert "a window is left to the other backends" in flash_attn.supports_forward(*arguments)
        return
    assert flash_attn.unavailable() is None and flash_attn.supports_forward(*arguments) is None
    out, lse = flash_attn.forward(*arguments)
    assert_same((out, lse), reference.forward(*arguments))
    backward = (problem.dout.float(), *arguments[:3], out.float(), lse, None, *pack)
    assert flash_attn.supports_backward(*backward) is None
    wanted = reference.backward(problem.dout, *arguments[:3], out, lse, None, *pack)
    assert_same(flash_attn.backward(*backward), wanted)
    assert calls == [(generation, "forward"), (generation, "backward")]


def test_the_newest_that_takes_the_call_runs(problem, install, device):
    arguments = (problem.q, problem.k, problem.v, *problem.pack)
    window = (*arguments[:-2], 3, -1)

    def generation_of(call, generations, *capability):
        calls = install(*generations)
        device(*capability)
        flash_attn.forward(*call)
        return calls[0][0]

    assert generation_of(arguments, (4, 3, 2), 9, 0) == 4
    assert generation_of(window, (4, 3, 2), 9, 0) == 3
    assert generation_of(arguments, (3, 2), 9, 0) == 3
    assert generation_of(arguments, (4, 3, 2), 8, 0) == 2
    assert generation_of(window, (4, 3, 2), 10, 0) == 2
    install(4, 3)
    device(8, 6)
    reason = flash_attn.supports_forward(*arguments)
    assert "flash-attn 4: the device must have compute capability 9.0 or newer, got 8.6" in reason
    assert "flash-attn 2 cannot be imported" in reason


def test_the_backward_of_flash_attn_4_is_left_to_another_on_hopper(problem, install, device):
    out, lse = reference.forward(problem.q, problem.k, problem.v, *problem.pack)
    backward = (problem.dout, problem.q, problem.k, problem.v, out, lse, None, *problem.pack)
    calls = install(4, 3)
    assert_same(flash_attn.forward(*backward[1:4], *problem.pack), (out, lse))
    assert_same(flash_attn.backward(*backward), reference.backward(*backward))
    assert calls == [(4, "forward"), (3, "backward")]
    install(4)
    assert "its varlen backward needs compute capability 10.0" in flash_attn.supports_backward(*backward)
    device(10, 0)
    assert flash_attn.supports_backward(*backward) is None
    assert "no gradient of the lse" in flash_attn.supports_backward(*backward[:6], lse, *problem.pack)


def test_a_package_with_another_interface_counts_as_missing(monkeypatch, install):
    install(2)
    module = sys.modules["flash_attn.flash_attn_interface"]
    monkeypatch.setattr(module, "_flash_attn_varlen_forward", lambda q, k, v, window_size=(-1, -1): None)
    flash_attn._functions.cache_clear()
    reason = flash_attn.unavailable()
    assert "flash-attn 2 has an interface that lacks cu_seqlens_q" in reason and "flash-attn 4 cannot be" in reason


def test_without_a_gpu_the_vendors_say_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for unavailable in (aten.unavailable, aten.cudnn_unavailable, flash_attn.unavailable):
        assert unavailable() == "torch sees no CUDA device"


def test_lse_in_both_conventions():
    out = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]], [[torch.nan, torch.nan]]])
    for infinite in (torch.inf, -torch.inf):
        _, lse = vendors.normalised(out, torch.tensor([[0.5, infinite, infinite]]))
        assert lse[0, 0] == 0.5 and lse[0, 1] == -torch.inf and lse[0, 2].isnan()
    assert vendors.lse_for_backward(torch.tensor([[0.5, -torch.inf]])).tolist() == [[0.5, torch.inf]]
