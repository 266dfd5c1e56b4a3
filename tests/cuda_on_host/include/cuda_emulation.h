// SPDX-License-Identifier: Apache-2.0
// Runs CUDA C++ on the host: .cu files compiled by a C++ compiler as they are, against this header instead of the CUDA
// toolkit's. One block or cluster at a time, its threads as fibers on one OS thread, switched only where a thread
// waits, so every run is deterministic. The order of threads can be reversed: a race between two barriers changes the
// result. For tests only: streams and textures are not here. What device code calls is in cuda_device_emulation.h and
// cuda_matrix_emulation.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Blocks run one after the other, so one static object is the shared memory of each in turn (not of a cluster's
// blocks).
#define __shared__ static
#define LRC_DYNAMIC_SHARED(TYPE, NAME) TYPE* const NAME = reinterpret_cast<TYPE*>(emulation::dynamic_shared())

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kMaxSharedBytes = 232448;
constexpr unsigned kMaxThreads = 1024;

/// True: the last thread and the last block run first.
inline bool reverse_order = false;
inline std::string last_error;
/// Dynamic shared memory that a kernel asked for; without that it may have 48 KiB.
inline std::map<const void*, size_t> shared_limits;

/// A wait of some lanes of a warp for each other: a shuffle, a vote or __syncwarp.
struct WarpExchange {
  const char* operation = nullptr;
  uint32_t arrived = 0;
  uint64_t generation = 0;
  uint64_t incoming[32] = {};
  uint64_t values[32] = {};
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = true;
  const char* waits_for = nullptr;
  /// The counter that has to move on before this thread can.
  const uint64_t* awaited = nullptr;
  uint64_t seen = 0;
  void* fake_stack = nullptr;
  /// Copies in flight, by group; the last group is still open.
  std::vector<std::vector<std::pair<void*, const void*>>> copies;
};

struct Barrier {
  unsigned waiting = 0, alive = 0;
  int count = 0, result = 0;
  uint64_t generation = 0;
};

/// A block, or the blocks of a cluster: the threads that run at the same time.
struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> body;
  std::map<std::pair<unsigned, uint32_t>, WarpExchange> exchanges;
  std::vector<uint64_t> shared;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::exception_ptr error;
  unsigned current = 0, alive = 0, threads_of_block = 0;
  uint64_t progress = 0;
  uint3 first_index;
  /// One for each block, and one for the cluster.
  std::vector<Barrier> barriers;
  Barrier cluster_barrier;

  unsigned rank() const { return current / threads_of_block; }
};
inline Block block;

inline void* dynamic_shared() {
  return block.shared.data() + block.rank() * (block.shared.size() / block.barriers.size());
}

inline void start_switch(void** save, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, bytes);
#else
  (void)save, (void)stack, (void)bytes;
#endif
}

inline void finish_switch(void* saved, const void** stack, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, stack, bytes);
#else
  (void)saved, (void)stack, (void)bytes;
#endif
}

inline void yield() {
  Fiber& fiber = block.fibers[block.current];
  start_switch(&fiber.fake_stack, block.scheduler_stack, block.scheduler_stack_bytes);
  swapcontext(&fiber.context, &block.scheduler);
  finish_switch(fiber.fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
}

/// Switches to other threads until `counter` moves on from `seen`.
inline void wait(const char* what, const uint64_t& counter, uint64_t seen) {
  Fiber& fiber = block.fibers[block.current];
  fiber.waits_for = what;
  fiber.awaited = &counter;
  fiber.seen = seen;
  while (counter == seen) yield();
  fiber.waits_for = nullptr;
  fiber.awaited = nullptr;
}

inline void release_if_complete(Barrier& barrier) {
  if (barrier.waiting > 0 && barrier.waiting == barrier.alive) {
    barrier.waiting = 0;
    barrier.result = barrier.count;
    barrier.count = 0;
    ++barrier.generation;
    ++block.progress;
  }
}

inline void fiber_main() {
  finish_switch(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
  try {
    block.body();
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  Fiber& fiber = block.fibers[block.current];
  fiber.done = true;
  --block.alive;
  ++block.progress;
  for (Barrier* barrier : {&block.barriers[block.rank()], &block.cluster_barrier}) {
    --barrier->alive;
    release_if_complete(*barrier);
  }
  start_switch(nullptr, block.scheduler_stack, block.scheduler_stack_bytes);
  swapcontext(&fiber.context, &block.scheduler);
}

/// Waits for every thread of the block (or cluster) that has not returned; how many of their predicates hold.
inline int arrive(const char* operation, Barrier& barrier, int predicate) {
  const uint64_t generation = barrier.generation;
  ++barrier.waiting;
  ++block.progress;
  barrier.count += predicate != 0;
  release_if_complete(barrier);
  wait(operation, barrier.generation, generation);
  return barrier.result;
}

inline int barrier(int predicate) {
  return arrive("__syncthreads", block.barriers[block.rank()], predicate);
}

/// Gives `value` to the other lanes of `mask` and waits for theirs; the array of all lanes' values.
inline const uint64_t* exchange(const char* operation, uint32_t mask, uint64_t value) {
  const unsigned lane = block.current % warpSize;
  const unsigned warp = block.current / warpSize;
  if (!(mask >> lane & 1)) {
    throw std::runtime_error(std::string(operation) + ": lane " + std::to_string(lane) + " is not in its own mask");
  }
  const unsigned in_warp = std::min<unsigned>(warpSize, static_cast<unsigned>(block.fibers.size()) - warp * warpSize);
  if (in_warp < warpSize) mask &= (1u << in_warp) - 1;
  WarpExchange& slot = block.exchanges[{warp, mask}];
  if (slot.arrived != 0 && std::strcmp(slot.operation, operation) != 0) {
    throw std::runtime_error(std::string("lanes of one warp disagree: ") + slot.operation + " and " + operation);
  }
  const uint64_t generation = slot.generation;
  slot.operation = operation;
  slot.incoming[lane] = value;
  slot.arrived |= 1u << lane;
  ++block.progress;
  if (slot.arrived == mask) {
    std::memcpy(slot.values, slot.incoming, sizeof(slot.values));
    slot.arrived = 0;
    ++slot.generation;
  }
  wait(operation, slot.generation, generation);
  return slot.values;
}

inline void resume(unsigned index) {
  block.current = index;
  const unsigned plane = blockDim.x * blockDim.y, thread = index % block.threads_of_block;
  threadIdx = {thread % blockDim.x, thread % plane / blockDim.x, thread / plane};
  blockIdx = {block.first_index.x + block.rank(), block.first_index.y, block.first_index.z};
  Fiber& fiber = block.fibers[index];
  start_switch(&block.scheduler_fake_stack, fiber.stack.data(), fiber.stack.size());
  swapcontext(&block.scheduler, &fiber.context);
  finish_switch(block.scheduler_fake_stack, nullptr, nullptr);
}

inline std::string describe_waits() {
  std::map<std::string, int> counts;
  for (const Fiber& fiber : block.fibers) {
    if (!fiber.done) ++counts[fiber.waits_for ? fiber.waits_for : "nothing"];
  }
  std::string text;
  for (const auto& [what, count] : counts) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads wait at " + what;
  }
  return text;
}

/// Runs block.body once for each thread of `cluster` blocks from block.first_index on.
inline void run_block(unsigned cluster) {
  block.threads_of_block = blockDim.x * blockDim.y * blockDim.z;
  const unsigned threads = cluster * block.threads_of_block;
  block.fibers.resize(threads);
  block.exchanges.clear();
  block.error = nullptr;
  block.alive = threads;
  block.barriers.assign(cluster, Barrier{});
  for (Barrier& barrier : block.barriers) barrier.alive = block.threads_of_block;
  block.cluster_barrier = Barrier{};
  block.cluster_barrier.alive = threads;
  // 0xFF bytes are NaN in every floating type: memory that no thread of this block wrote shows in the result.
  std::memset(block.shared.data(), 0xFF, block.shared.size() * sizeof(uint64_t));
  for (Fiber& fiber : block.fibers) {
    fiber.stack.resize(kStackBytes);
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.awaited = nullptr;
    fiber.copies.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  while (block.alive > 0) {
    const uint64_t before = block.progress;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned index = reverse_order ? threads - 1 - i : i;
      const Fiber& fiber = block.fibers[index];
      if (!fiber.done && !(fiber.awaited && *fiber.awaited == fiber.seen)) resume(index);
      if (block.error) std::rethrow_exception(block.error);
    }
    if (block.progress == before) throw std::runtime_error("deadlock: " + describe_waits());
  }
}

inline void run_grid(const cudaLaunchConfig_t& config) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const unsigned cluster = config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 1;
  block.shared.resize(cluster * ((config.dynamicSmemBytes + 15) / 16 * 2));
  const uint64_t steps = uint64_t{gridDim.x} * gridDim.y * gridDim.z / cluster;
  for (uint64_t i = 0; i < steps; ++i) {
    const uint64_t index = (reverse_order ? steps - 1 - i : i) * cluster;
    block.first_index = {static_cast<unsigned>(index % gridDim.x), static_cast<unsigned>(index / gridDim.x % gridDim.y),
                         static_cast<unsigned>(index / gridDim.x / gridDim.y)};
    try {
      run_block(cluster);
    } catch (const std::exception& error) {
      throw std::runtime_error("block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                               std::to_string(blockIdx.z) + "): " + error.what());
    }
  }
}

/// Clusters along x of at most 8 blocks of whole warps, which fill the grid.
inline bool clusters_fit(const cudaLaunchConfig_t& config) {
  if (config.numAttrs == 0) return true;
  const auto& size = config.attrs[0].val.clusterDim;
  return config.numAttrs == 1 && size.y == 1 && size.z == 1 && size.x >= 1 && size.x <= 8 &&
         config.gridDim.x % size.x == 0 && config.blockDim.x * config.blockDim.y * config.blockDim.z % warpSize == 0;
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "warp operations move at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

/// What __shfl*_sync returns: the value of lane `source`, or the lane's own where that lies outside its group.
template <typename T>
T shuffle(const char* operation, unsigned mask, T value, int source, int width, bool inside) {
  const uint64_t* values = exchange(operation, mask, to_bits(value));
  const int lane = static_cast<int>(block.current % warpSize);
  const int target = inside ? lane / width * width + source : lane;
  if (!(mask >> target & 1)) {
    throw std::runtime_error(std::string(operation) + ": lane " + std::to_string(target) + " is not in the mask");
  }
  return from_bits<T>(values[target]);
}

}  // namespace emulation

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3 grid = config->gridDim, threads = config->blockDim;
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  const auto asked = emulation::shared_limits.find(reinterpret_cast<const void*>(kernel));
  const size_t limit = asked == emulation::shared_limits.end() ? 48 * 1024 : std::max<size_t>(asked->second, 48 * 1024);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535 ||
      count == 0 || count > emulation::kMaxThreads || config->dynamicSmemBytes > limit ||
      !emulation::clusters_fit(*config)) {
    emulation::last_error = "invalid configuration argument";
    return cudaErrorInvalidConfiguration;
  }
  std::tuple<Params...> values(std::forward<Args>(args)...);
  emulation::block.body = [&] { std::apply(kernel, values); };
  try {
    emulation::run_grid(*config);
  } catch (const std::exception& error) {
    emulation::last_error = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : emulation::last_error.c_str();
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int value) {
  if (value >= 0 && static_cast<size_t>(value) <= emulation::kMaxSharedBytes) {
    emulation::shared_limits[reinterpret_cast<const void*>(kernel)] = value;
    return cudaSuccess;
  }
  emulation::last_error = "invalid argument";
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
