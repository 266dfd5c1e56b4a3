// SPDX-License-Identifier: Apache-2.0
// The only C++ file that knows Python: addresses of tensors in, nothing out. Use lrc_kernels, which checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/packing.h"
#include "cpu/select_tokens.h"
#include "cpu/token_dropout.h"
#include "cpu/tome.h"
#ifdef LRC_WITH_CUDA
#include "lrc/attention.h"
#include "lrc/device.h"
#include "lrc/token_dropout.h"
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

/// The fields of lrc::cpu::PlanArgs in their order, from num_tokens to valid; the options are named.
lrc::cpu::PlanArgs plan_args(const std::array<uint64_t, 10>& in, int64_t num_out, std::optional<float> threshold,
                             bool position_order, bool round_to_bf16, bool isolate, const std::array<uint64_t, 5>& out,
                             int threads) {
  lrc::cpu::PlanArgs args;
  args.metric = nullptr;
  args.num_tokens = static_cast<int64_t>(in[0]);
  args.num_channels = static_cast<int64_t>(in[1]);
  args.cu_seqlens_in = pointer<int64_t>(in[2]);
  args.cu_seqlens_out = pointer<int64_t>(in[3]);
  args.num_segments = static_cast<int64_t>(in[4]);
  args.r = pointer<int32_t>(in[5]);
  args.num_iterations = static_cast<int64_t>(in[6]);
  args.size = pointer<float>(in[7]);
  args.is_protected = pointer<uint8_t>(in[8]);
  args.destination = pointer<uint8_t>(in[9]);
  args.num_out = num_out;
  args.has_threshold = threshold.has_value();
  args.threshold = threshold.value_or(0.f);
  args.position_order = position_order;
  args.round_to_bf16 = round_to_bf16;
  args.isolate = isolate;
  args.assign = pointer<int32_t>(out[0]);
  args.size_out = pointer<float>(out[1]);
  args.weight = pointer<float>(out[2]);
  args.anchor = pointer<int32_t>(out[3]);
  args.valid = pointer<uint8_t>(out[4]);
  args.threads = threads;
  return args;
}

void tome_plan(uintptr_t metric, const std::array<uint64_t, 10>& in, int64_t num_out, std::optional<float> threshold,
               bool position_order, bool round_to_bf16, bool isolate, const std::array<uint64_t, 5>& out, int threads) {
  lrc::cpu::PlanArgs args = plan_args(in, num_out, threshold, position_order, round_to_bf16, isolate, out, threads);
  args.metric = pointer<float>(metric);
  lrc::cpu::tome_plan(args);
}

void tome_compress(uintptr_t x, int dtype, const std::array<int64_t, 7>& rows, int64_t num_heads,
                   const std::array<uint64_t, 10>& in, int64_t num_out, bool round_to_bf16,
                   const std::array<uint64_t, 5>& out, uintptr_t y, int threads) {
  lrc::cpu::tome_compress({pointer<void>(x), static_cast<lrc::DType>(dtype), token_rows(rows), num_heads,
                           plan_args(in, num_out, std::nullopt, false, round_to_bf16, true, out, threads),
                           pointer<void>(y)});
}

void tome_merge(uintptr_t x, int dtype, const std::array<int64_t, 7>& rows, int64_t num_tokens, uintptr_t assign,
                uintptr_t size, uintptr_t weight, int reduction, int64_t num_out, uintptr_t y, int threads) {
  lrc::cpu::tome_merge({pointer<void>(x), static_cast<lrc::DType>(dtype), token_rows(rows), num_tokens,
                        pointer<int32_t>(assign), pointer<float>(size), pointer<float>(weight),
                        static_cast<lrc::Reduction>(reduction), num_out, pointer<void>(y), threads});
}

void tome_max_backward(uintptr_t grad, uintptr_t x, int dtype, const std::array<int64_t, 7>& rows, int64_t num_tokens,
                       uintptr_t y, uintptr_t assign, uintptr_t weight, int64_t num_out, uintptr_t dx,
                       const std::array<int64_t, 7>& dx_rows, int threads) {
  lrc::cpu::tome_max_backward({pointer<void>(grad), pointer<void>(x), static_cast<lrc::DType>(dtype), token_rows(rows),
                               num_tokens, pointer<void>(y), pointer<int32_t>(assign), pointer<float>(weight), num_out,
                               pointer<void>(dx), token_rows(dx_rows), threads});
}

void tome_gather(uintptr_t y, int dtype, int64_t num_rows, uintptr_t assign, uintptr_t size, uintptr_t weight,
                 const std::array<int64_t, 7>& rows, int64_t num_tokens, uintptr_t x, int threads) {
  lrc::cpu::tome_gather({pointer<void>(y), static_cast<lrc::DType>(dtype), num_rows, pointer<int32_t>(assign),
                         pointer<float>(size), pointer<float>(weight), token_rows(rows), num_tokens, pointer<void>(x),
                         threads});
}

void select_tokens(int mode, uintptr_t droppable, uintptr_t cu_seqlens_in, uintptr_t cu_seqlens_out, uintptr_t keep,
                   uintptr_t scores, int64_t seed, uint32_t layer, uintptr_t sequence_ids, uintptr_t positions,
                   int64_t num_sequences, uintptr_t indices, uintptr_t inverse, int threads) {
  lrc::cpu::select_tokens({static_cast<lrc::cpu::SelectMode>(mode),
                           pointer<uint8_t>(droppable),
                           pointer<int32_t>(cu_seqlens_in),
                           pointer<int32_t>(cu_seqlens_out),
                           pointer<int32_t>(keep),
                           pointer<float>(scores),
                           {seed, layer, pointer<int64_t>(sequence_ids), pointer<int64_t>(positions)},
                           num_sequences,
                           pointer<int32_t>(indices),
                           pointer<int32_t>(inverse),
                           threads});
}

void select_tokens_bernoulli(uintptr_t droppable, uintptr_t cu_seqlens, int64_t seed, uint32_t layer,
                             uintptr_t sequence_ids, uintptr_t positions, int64_t num_sequences, int64_t capacity,
                             int64_t threshold, uintptr_t indices, uintptr_t inverse, uintptr_t cu_seqlens_out,
                             uintptr_t num_wanted, int threads) {
  lrc::cpu::select_tokens_bernoulli({pointer<uint8_t>(droppable),
                                     pointer<int32_t>(cu_seqlens),
                                     {seed, layer, pointer<int64_t>(sequence_ids), pointer<int64_t>(positions)},
                                     num_sequences,
                                     capacity,
                                     threshold,
                                     pointer<int32_t>(indices),
                                     pointer<int32_t>(inverse),
                                     pointer<int32_t>(cu_seqlens_out),
                                     pointer<int32_t>(num_wanted),
                                     threads});
}

void attention_scores(uintptr_t q, int64_t num_rows, int64_t num_heads, uintptr_t k, int dtype, int64_t num_kv_heads,
                      int64_t head_dim, const std::array<int64_t, 3>& strides, uintptr_t block_table,
                      const std::array<int64_t, 4>& sizes, uintptr_t cu_seqlens, int64_t num_sequences,
                      uintptr_t row_sequence, uintptr_t row_position, uintptr_t lse, bool max_over_heads,
                      float head_scale, float softmax_scale, uintptr_t scores, int64_t num_scores, int threads,
                      uintptr_t statistics, uintptr_t factor) {
  lrc::cpu::ScoreKeys keys;
  keys.k = pointer<void>(k);
  keys.dtype = static_cast<lrc::DType>(dtype);
  keys.num_kv_heads = num_kv_heads;
  keys.head_dim = head_dim;
  std::tie(keys.block_stride, keys.token_stride, keys.head_stride) = std::tuple_cat(strides);
  std::tie(keys.num_blocks, keys.block_size, keys.max_blocks, keys.num_tokens) = std::tuple_cat(sizes);
  keys.block_table = pointer<int32_t>(block_table);
  lrc::cpu::attention_scores({pointer<float>(q), num_rows, num_heads, keys, pointer<int64_t>(cu_seqlens), num_sequences,
                              pointer<int32_t>(row_sequence), pointer<int32_t>(row_position), pointer<float>(lse),
                              max_over_heads, head_scale, softmax_scale, pointer<float>(scores), num_scores, threads,
                              pointer<float>(statistics), pointer<float>(factor)});
}

void attention_score_factors(uintptr_t maximum, uintptr_t sum, uintptr_t seen, int64_t num_sequences, int64_t num_heads,
                             int64_t num_blocks, uintptr_t factor) {
  lrc::cpu::attention_score_factors({pointer<float>(maximum), pointer<float>(sum), pointer<int64_t>(seen),
                                     num_sequences, num_heads, num_blocks, pointer<float>(factor)});
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

void cuda_tome_plan(uintptr_t metric, int64_t num_tokens, int64_t num_channels, uintptr_t cu_seqlens_in,
                    uintptr_t cu_seqlens_out, int64_t num_segments, int64_t max_seqlen, uintptr_t r,
                    int64_t num_iterations, uintptr_t size, uintptr_t is_protected, uintptr_t destination,
                    std::optional<float> threshold, bool bf16, bool position_order, bool isolate, int64_t team,
                    uintptr_t workspace, int64_t workspace_bytes, uintptr_t assign, uintptr_t weight,
                    uintptr_t size_out, uintptr_t anchor, uintptr_t valid, uintptr_t stream) {
  lrc::PlanArgs args = {};
  args.metric = pointer<float>(metric);
  args.num_tokens = num_tokens;
  args.num_channels = num_channels;
  args.cu_seqlens_in = pointer<int32_t>(cu_seqlens_in);
  args.cu_seqlens_out = pointer<int32_t>(cu_seqlens_out);
  args.num_segments = num_segments;
  args.max_seqlen = max_seqlen;
  args.r = pointer<int32_t>(r);
  args.num_iterations = num_iterations;
  args.size = pointer<float>(size);
  args.is_protected = pointer<uint8_t>(is_protected);
  args.destination = pointer<uint8_t>(destination);
  args.has_threshold = threshold.has_value();
  args.threshold = threshold.value_or(0.0f);
  args.bf16 = bf16;
  args.position_order = position_order;
  args.isolate = isolate;
  args.team = team;
  args.workspace = pointer<void>(workspace);
  args.workspace_bytes = workspace_bytes;
  args.assign = pointer<int32_t>(assign);
  args.weight = pointer<float>(weight);
  args.size_out = pointer<float>(size_out);
  args.anchor = pointer<int32_t>(anchor);
  args.valid = pointer<uint8_t>(valid);
  lrc::plan_merge(args, reinterpret_cast<cudaStream_t>(stream));
}

void cuda_tome_merge(uintptr_t x, int dtype, const std::array<int64_t, 7>& rows, int64_t num_tokens, uintptr_t assign,
                     uintptr_t size, uintptr_t weight, uintptr_t cu_seqlens_in, uintptr_t cu_seqlens_out,
                     int64_t num_segments, int64_t num_out, int reduction, uintptr_t y, uintptr_t stream) {
  lrc::merge_rows(
      {pointer<void>(x), static_cast<lrc::DType>(dtype), token_rows(rows), num_tokens, pointer<int32_t>(assign),
       pointer<float>(size), pointer<float>(weight), pointer<int32_t>(cu_seqlens_in), pointer<int32_t>(cu_seqlens_out),
       num_segments, num_out, static_cast<lrc::Reduction>(reduction), pointer<void>(y)},
      reinterpret_cast<cudaStream_t>(stream));
}

void cuda_tome_first_tokens(uintptr_t x, int dtype, const std::array<int64_t, 7>& rows, int64_t num_tokens, uintptr_t y,
                            int64_t num_out, uintptr_t assign, uintptr_t weight, uintptr_t first_token,
                            uintptr_t stream) {
  lrc::first_tokens(pointer<void>(x), static_cast<lrc::DType>(dtype), token_rows(rows), num_tokens, pointer<void>(y),
                    num_out, pointer<int32_t>(assign), pointer<float>(weight), pointer<uint32_t>(first_token),
                    reinterpret_cast<cudaStream_t>(stream));
}

void cuda_tome_gather(uintptr_t y, int dtype, uintptr_t assign, uintptr_t size, uintptr_t weight, uintptr_t first_token,
                      const std::array<int64_t, 7>& rows, int64_t num_tokens, uintptr_t x, uintptr_t stream) {
  lrc::gather_rows(pointer<void>(y), static_cast<lrc::DType>(dtype), pointer<int32_t>(assign), pointer<float>(size),
                   pointer<float>(weight), pointer<uint32_t>(first_token), token_rows(rows), num_tokens,
                   pointer<void>(x), reinterpret_cast<cudaStream_t>(stream));
}

/// The fields of lrc::PartialAttention in their order.
lrc::PartialAttention partial_attention(const std::array<int64_t, 7>& v) {
  return {pointer<void>(v[0]), static_cast<lrc::DType>(v[1]), v[2], v[3], pointer<float>(v[4]), v[5], v[6]};
}

void cuda_attention_merge_partials(const std::array<int64_t, 7>& first, const std::array<int64_t, 7>& second,
                                   int64_t num_rows, int64_t num_heads, int64_t num_channels, uintptr_t merged,
                                   uintptr_t merged_lse, uintptr_t stream) {
  lrc::merge_partials(partial_attention(first), partial_attention(second), num_rows, num_heads, num_channels,
                      pointer<float>(merged), pointer<float>(merged_lse), reinterpret_cast<cudaStream_t>(stream));
}

void cuda_move_rows(const std::vector<std::array<uint64_t, 7>>& moves, uintptr_t index, int64_t num_rows,
                    uintptr_t stream) {
  std::vector<lrc::RowMove> table;
  for (const auto& v : moves) {
    table.push_back({pointer<void>(v[0]), pointer<void>(v[1]), static_cast<int64_t>(v[2]), static_cast<int64_t>(v[3]),
                     static_cast<int64_t>(v[4]), static_cast<int64_t>(v[5]), v[6]});
  }
  lrc::move_rows(table.data(), static_cast<int64_t>(table.size()), pointer<int32_t>(index), num_rows,
                 reinterpret_cast<cudaStream_t>(stream));
}

void cuda_drop_tokens_rmsnorm(uintptr_t residual, int dtype, int64_t row_stride, uintptr_t weight, float eps,
                              uintptr_t indices, int64_t num_rows, int64_t width, uintptr_t dropped, uintptr_t normed,
                              uintptr_t rstd, uintptr_t stream) {
  lrc::drop_tokens_rmsnorm(pointer<void>(residual), static_cast<lrc::DType>(dtype), row_stride, pointer<void>(weight),
                           eps, pointer<int32_t>(indices), num_rows, width, pointer<void>(dropped),
                           pointer<void>(normed), pointer<float>(rstd), reinterpret_cast<cudaStream_t>(stream));
}

void cuda_select_tokens(int mode, uintptr_t droppable, uintptr_t cu_seqlens_in, uintptr_t cu_seqlens_out,
                        uintptr_t keep, uintptr_t scores, uintptr_t seed, uint32_t layer, uintptr_t sequence_ids,
                        uintptr_t positions, bool positions_are_64_bit, int64_t num_sequences, int64_t max_seqlen,
                        uintptr_t indices, uintptr_t inverse, uintptr_t stream) {
  lrc::select_tokens(
      {static_cast<lrc::SelectMode>(mode), pointer<uint8_t>(droppable), pointer<int32_t>(cu_seqlens_in),
       pointer<int32_t>(cu_seqlens_out), pointer<int32_t>(keep), pointer<float>(scores), pointer<int64_t>(seed), layer,
       pointer<int64_t>(sequence_ids), pointer<void>(positions), positions_are_64_bit, num_sequences, max_seqlen,
       pointer<int32_t>(indices), pointer<int32_t>(inverse)},
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
        using lrc::cpu::Isa;
        for (const auto isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
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
  m.def("tome_plan", &tome_plan, NoGil(), py::arg("metric"), py::arg("inputs"), py::arg("num_out"),
        py::arg("threshold"), py::arg("position_order"), py::arg("round_to_bf16"), py::arg("isolate"),
        py::arg("outputs"), py::arg("threads") = 1);
  m.def("tome_compress", &tome_compress, NoGil(), py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("num_heads"),
        py::arg("inputs"), py::arg("num_out"), py::arg("round_to_bf16"), py::arg("outputs"), py::arg("y"),
        py::arg("threads") = 1);
  m.def("tome_merge", &tome_merge, NoGil(), py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("num_tokens"),
        py::arg("assign"), py::arg("size"), py::arg("weight"), py::arg("reduction"), py::arg("num_out"), py::arg("y"),
        py::arg("threads") = 1);
  m.def("tome_max_backward", &tome_max_backward, NoGil(), py::arg("grad"), py::arg("x"), py::arg("dtype"),
        py::arg("rows"), py::arg("num_tokens"), py::arg("y"), py::arg("assign"), py::arg("weight"), py::arg("num_out"),
        py::arg("dx"), py::arg("dx_rows"), py::arg("threads") = 1);
  m.def("tome_gather", &tome_gather, NoGil(), py::arg("y"), py::arg("dtype"), py::arg("num_rows"), py::arg("assign"),
        py::arg("size"), py::arg("weight"), py::arg("rows"), py::arg("num_tokens"), py::arg("x"),
        py::arg("threads") = 1);
  m.def("select_tokens", &select_tokens, NoGil(), py::arg("mode"), py::arg("droppable"), py::arg("cu_seqlens_in"),
        py::arg("cu_seqlens_out"), py::arg("keep"), py::arg("scores"), py::arg("seed"), py::arg("layer"),
        py::arg("sequence_ids"), py::arg("positions"), py::arg("num_sequences"), py::arg("indices"), py::arg("inverse"),
        py::arg("threads") = 1);
  m.def("select_tokens_bernoulli", &select_tokens_bernoulli, NoGil(), py::arg("droppable"), py::arg("cu_seqlens"),
        py::arg("seed"), py::arg("layer"), py::arg("sequence_ids"), py::arg("positions"), py::arg("num_sequences"),
        py::arg("capacity"), py::arg("threshold"), py::arg("indices"), py::arg("inverse"), py::arg("cu_seqlens_out"),
        py::arg("num_wanted"), py::arg("threads") = 1);
  m.def("attention_scores", &attention_scores, NoGil(), py::arg("q"), py::arg("num_rows"), py::arg("num_heads"),
        py::arg("k"), py::arg("dtype"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("strides"),
        py::arg("block_table"), py::arg("sizes"), py::arg("cu_seqlens"), py::arg("num_sequences"),
        py::arg("row_sequence"), py::arg("row_position"), py::arg("lse"), py::arg("max_over_heads"),
        py::arg("head_scale"), py::arg("softmax_scale"), py::arg("scores"), py::arg("num_scores"),
        py::arg("threads") = 1, py::arg("statistics") = 0, py::arg("factor") = 0);
  m.def("attention_score_factors", &attention_score_factors, NoGil(), py::arg("maximum"), py::arg("sum"),
        py::arg("seen"), py::arg("num_sequences"), py::arg("num_heads"), py::arg("num_blocks"), py::arg("factor"));
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
  m.def("cuda_ptx_version", &lrc::device_ptx_version,
        "The compute capability (90 for 9.0) that the code on the current device was compiled for.");
  m.def("cuda_tome_head_mean", &cuda_tome_head_mean, NoGil(), py::arg("x"), py::arg("dtype"), py::arg("rows"),
        py::arg("num_tokens"), py::arg("num_heads"), py::arg("metric"), py::arg("stream"));
  m.def("cuda_tome_plan_workspace_bytes", &lrc::plan_workspace_bytes, py::arg("num_tokens"), py::arg("num_channels"));
  m.def("cuda_tome_plan", &cuda_tome_plan, NoGil(), py::arg("metric"), py::arg("num_tokens"), py::arg("num_channels"),
        py::arg("cu_seqlens_in"), py::arg("cu_seqlens_out"), py::arg("num_segments"), py::arg("max_seqlen"),
        py::arg("r"), py::arg("num_iterations"), py::arg("size"), py::arg("is_protected"), py::arg("destination"),
        py::arg("threshold"), py::arg("bf16"), py::arg("position_order"), py::arg("isolate"), py::arg("team"),
        py::arg("workspace"), py::arg("workspace_bytes"), py::arg("assign"), py::arg("weight"), py::arg("size_out"),
        py::arg("anchor"), py::arg("valid"), py::arg("stream"));
  m.def("cuda_tome_merge", &cuda_tome_merge, NoGil(), py::arg("x"), py::arg("dtype"), py::arg("rows"),
        py::arg("num_tokens"), py::arg("assign"), py::arg("size"), py::arg("weight"), py::arg("cu_seqlens_in"),
        py::arg("cu_seqlens_out"), py::arg("num_segments"), py::arg("num_out"), py::arg("reduction"), py::arg("y"),
        py::arg("stream"));
  m.def("cuda_tome_first_tokens", &cuda_tome_first_tokens, NoGil(), py::arg("x"), py::arg("dtype"), py::arg("rows"),
        py::arg("num_tokens"), py::arg("y"), py::arg("num_out"), py::arg("assign"), py::arg("weight"),
        py::arg("first_token"), py::arg("stream"));
  m.def("cuda_tome_gather", &cuda_tome_gather, NoGil(), py::arg("y"), py::arg("dtype"), py::arg("assign"),
        py::arg("size"), py::arg("weight"), py::arg("first_token"), py::arg("rows"), py::arg("num_tokens"),
        py::arg("x"), py::arg("stream"));
  m.def("cuda_attention_merge_partials", &cuda_attention_merge_partials, NoGil(), py::arg("first"), py::arg("second"),
        py::arg("num_rows"), py::arg("num_heads"), py::arg("num_channels"), py::arg("merged"), py::arg("merged_lse"),
        py::arg("stream"));
  m.def("cuda_move_rows", &cuda_move_rows, NoGil(), py::arg("moves"), py::arg("index"), py::arg("num_rows"),
        py::arg("stream"));
  m.def("cuda_drop_tokens_rmsnorm", &cuda_drop_tokens_rmsnorm, NoGil(), py::arg("residual"), py::arg("dtype"),
        py::arg("row_stride"), py::arg("weight"), py::arg("eps"), py::arg("indices"), py::arg("num_rows"),
        py::arg("width"), py::arg("dropped"), py::arg("normed"), py::arg("rstd"), py::arg("stream"));
  m.def("cuda_select_tokens", &cuda_select_tokens, NoGil(), py::arg("mode"), py::arg("droppable"),
        py::arg("cu_seqlens_in"), py::arg("cu_seqlens_out"), py::arg("keep"), py::arg("scores"), py::arg("seed"),
        py::arg("layer"), py::arg("sequence_ids"), py::arg("positions"), py::arg("positions_are_64_bit"),
        py::arg("num_sequences"), py::arg("max_seqlen"), py::arg("indices"), py::arg("inverse"), py::arg("stream"));
#else
  m.attr("has_cuda") = false;
#endif
}
