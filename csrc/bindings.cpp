// SPDX-License-Identifier: Apache-2.0
// The only C++ file that knows Python: addresses of tensors in, nothing out. Use lrc_kernels, which checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "cpu/isa.h"
#include "cpu/packing.h"
#include "cpu/tome.h"
#ifdef LRC_WITH_CUDA
#include "lrc/device.h"
#include "lrc/tome.h"
#endif

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

lrc::TokenRows token_rows(const std::array<int64_t, 7>& v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6]};
}

void tome_head_mean(uintptr_t x, int dtype, const std::array<int64_t, 7>& rows, int64_t num_tokens, int64_t num_heads,
                    uintptr_t metric, int threads) {
  lrc::cpu::tome_head_mean({pointer<void>(x), static_cast<lrc::DType>(dtype), token_rows(rows), num_tokens, num_heads,
                            pointer<float>(metric), threads});
}

void tome_plan(uintptr_t metric, int64_t num_tokens, int64_t num_channels, uintptr_t cu_seqlens_in,
               uintptr_t cu_seqlens_out, int64_t num_segments, uintptr_t r, int64_t num_iterations, uintptr_t size,
               uintptr_t is_protected, uintptr_t destination, int64_t num_out, std::optional<float> threshold,
               bool position_order, uintptr_t assign, uintptr_t size_out, uintptr_t weight, uintptr_t anchor,
               uintptr_t valid, int threads) {
  lrc::cpu::PlanArgs args;
  args.metric = pointer<float>(metric);
  args.num_tokens = num_tokens;
  args.num_channels = num_channels;
  args.cu_seqlens_in = pointer<int64_t>(cu_seqlens_in);
  args.cu_seqlens_out = pointer<int64_t>(cu_seqlens_out);
  args.num_segments = num_segments;
  args.r = pointer<int32_t>(r);
  args.num_iterations = num_iterations;
  args.size = pointer<float>(size);
  args.is_protected = pointer<uint8_t>(is_protected);
  args.destination = pointer<uint8_t>(destination);
  args.num_out = num_out;
  args.has_threshold = threshold.has_value();
  args.threshold = threshold.value_or(0.f);
  args.position_order = position_order;
  args.assign = pointer<int32_t>(assign);
  args.size_out = pointer<float>(size_out);
  args.weight = pointer<float>(weight);
  args.anchor = pointer<int32_t>(anchor);
  args.valid = pointer<uint8_t>(valid);
  args.threads = threads;
  lrc::cpu::tome_plan(args);
}

void tome_merge(uintptr_t x, int dtype, const std::array<int64_t, 7>& rows, int64_t num_tokens, uintptr_t assign,
                uintptr_t size, uintptr_t weight, int64_t num_out, uintptr_t y, int threads) {
  lrc::cpu::tome_merge({pointer<void>(x), static_cast<lrc::DType>(dtype), token_rows(rows), num_tokens,
                        pointer<int32_t>(assign), pointer<float>(size), pointer<float>(weight), num_out,
                        pointer<void>(y), threads});
}

void tome_gather(uintptr_t y, int dtype, int64_t num_rows, uintptr_t assign, uintptr_t size, uintptr_t weight,
                 const std::array<int64_t, 7>& rows, int64_t num_tokens, uintptr_t x, int threads) {
  lrc::cpu::tome_gather({pointer<void>(y), static_cast<lrc::DType>(dtype), num_rows, pointer<int32_t>(assign),
                         pointer<float>(size), pointer<float>(weight), token_rows(rows), num_tokens, pointer<void>(x),
                         threads});
}

int64_t pack_samples(uintptr_t num_tokens, uintptr_t num_frames, uintptr_t cost, uintptr_t keep, int64_t num_samples,
                     int64_t num_kept, uint64_t seed, uint64_t epoch, int strategy, int64_t max_tokens,
                     int64_t max_frames, double max_cost, int64_t open_packs, int64_t window, uintptr_t sample_index,
                     uintptr_t pack_ptr, uintptr_t pack_tokens, uintptr_t pack_frames, uintptr_t pack_cost) {
  return lrc::cpu::pack_samples(
      {pointer<int64_t>(num_tokens), pointer<int64_t>(num_frames), pointer<double>(cost), pointer<uint8_t>(keep),
       num_samples, num_kept, seed, epoch, static_cast<lrc::cpu::PackStrategy>(strategy), max_tokens, max_frames,
       max_cost, open_packs, window, pointer<int64_t>(sample_index), pointer<int64_t>(pack_ptr),
       pointer<int64_t>(pack_tokens), pointer<int64_t>(pack_frames), pointer<double>(pack_cost)});
}

void pack_permutation(int64_t n, uint64_t seed, uint64_t epoch, uint64_t stream, uintptr_t permutation) {
  lrc::cpu::pack_permutation(n, seed, epoch, stream, pointer<int64_t>(permutation));
}

#ifdef LRC_WITH_CUDA
void cuda_tome_head_mean(uintptr_t x, int dtype, const std::array<int64_t, 7>& rows, int64_t num_tokens,
                         int64_t num_heads, uintptr_t metric, uintptr_t stream) {
  lrc::head_mean(pointer<void>(x), static_cast<lrc::DType>(dtype), token_rows(rows), num_tokens, num_heads,
                 pointer<float>(metric), reinterpret_cast<cudaStream_t>(stream));
}

void cuda_tome_gather(uintptr_t y, int dtype, uintptr_t assign, uintptr_t size, uintptr_t weight,
                      const std::array<int64_t, 7>& rows, int64_t num_tokens, uintptr_t x, uintptr_t stream) {
  lrc::gather_rows(pointer<void>(y), static_cast<lrc::DType>(dtype), pointer<int32_t>(assign), pointer<float>(size),
                   pointer<float>(weight), token_rows(rows), num_tokens, pointer<void>(x),
                   reinterpret_cast<cudaStream_t>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "lrc_kernels native code: addresses in, nothing out. Call lrc_kernels instead, which checks its arguments.";
  m.def("cpu_isa", [] { return lrc::cpu::isa_name(lrc::cpu::active_isa()); }, "The instruction set in use.");
  m.def(
      "cpu_isas",
      [] {
        py::list names;
        for (const auto isa : {lrc::cpu::Isa::kBaseline, lrc::cpu::Isa::kAvx2, lrc::cpu::Isa::kAvx512}) {
          if (lrc::cpu::isa_supported(isa)) names.append(lrc::cpu::isa_name(isa));
        }
        return names;
      },
      "The instruction sets that this machine and build support.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { lrc::cpu::set_isa(name.c_str()); }, py::arg("name"),
      "Force an instruction set for every CPU kernel of this process.");

  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("tome_head_mean", &tome_head_mean, NoGil(), py::arg("x"), py::arg("dtype"), py::arg("rows"),
        py::arg("num_tokens"), py::arg("num_heads"), py::arg("metric"), py::arg("threads") = 1);
  m.def("tome_plan", &tome_plan, NoGil(), py::arg("metric"), py::arg("num_tokens"), py::arg("num_channels"),
        py::arg("cu_seqlens_in"), py::arg("cu_seqlens_out"), py::arg("num_segments"), py::arg("r"),
        py::arg("num_iterations"), py::arg("size"), py::arg("is_protected"), py::arg("destination"), py::arg("num_out"),
        py::arg("threshold"), py::arg("position_order"), py::arg("assign"), py::arg("size_out"), py::arg("weight"),
        py::arg("anchor"), py::arg("valid"), py::arg("threads") = 1);
  m.def("tome_merge", &tome_merge, NoGil(), py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("num_tokens"),
        py::arg("assign"), py::arg("size"), py::arg("weight"), py::arg("num_out"), py::arg("y"),
        py::arg("threads") = 1);
  m.def("tome_gather", &tome_gather, NoGil(), py::arg("y"), py::arg("dtype"), py::arg("num_rows"), py::arg("assign"),
        py::arg("size"), py::arg("weight"), py::arg("rows"), py::arg("num_tokens"), py::arg("x"),
        py::arg("threads") = 1);
  m.def("pack_samples", &pack_samples, NoGil(), py::arg("num_tokens"), py::arg("num_frames"), py::arg("cost"),
        py::arg("keep"), py::arg("num_samples"), py::arg("num_kept"), py::arg("seed"), py::arg("epoch"),
        py::arg("strategy"), py::arg("max_tokens"), py::arg("max_frames"), py::arg("max_cost"), py::arg("open_packs"),
        py::arg("window"), py::arg("sample_index"), py::arg("pack_ptr"), py::arg("pack_tokens"), py::arg("pack_frames"),
        py::arg("pack_cost"));
  m.def("pack_permutation", &pack_permutation, NoGil(), py::arg("n"), py::arg("seed"), py::arg("epoch"),
        py::arg("stream"), py::arg("permutation"));
#ifdef LRC_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_device_status", &lrc::device_status,
        "None where the kernels run on the current device, else the reason.");
  m.def("cuda_tome_head_mean", &cuda_tome_head_mean, NoGil(), py::arg("x"), py::arg("dtype"), py::arg("rows"),
        py::arg("num_tokens"), py::arg("num_heads"), py::arg("metric"), py::arg("stream"));
  m.def("cuda_tome_gather", &cuda_tome_gather, NoGil(), py::arg("y"), py::arg("dtype"), py::arg("assign"),
        py::arg("size"), py::arg("weight"), py::arg("rows"), py::arg("num_tokens"), py::arg("x"), py::arg("stream"));
#else
  m.attr("has_cuda") = false;
#endif
}
