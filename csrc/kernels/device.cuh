// What the kernels share: rows moved 16 bytes at a time, sums over a warp and a block, and the launch itself.
//
// MM_LAUNCH and MM_SHARED are CUDA's own syntax here; tests/kernels/simt defines them first to run the very same
// kernels and launchers on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#ifndef MM_LAUNCH
#define MM_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel)<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define MM_SHARED(type, name, size) __shared__ type name[size]
#endif

namespace megatron_mm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void round_to(float value, float& out) { out = value; }
__device__ __forceinline__ void round_to(float value, __nv_bfloat16& out) { out = __float2bfloat16(value); }

// WIDTH elements of a row, moved 16 bytes at a time where they are that many.
template <typename scalar_t, int WIDTH>
struct alignas(sizeof(scalar_t) * WIDTH < 16 ? sizeof(scalar_t) * WIDTH : 16) Group {
  scalar_t value[WIDTH];

  __device__ __forceinline__ float operator[](int i) const { return to_float(value[i]); }
  __device__ __forceinline__ void set(int i, float to) { round_to(to, value[i]); }
};

template <int WIDTH, typename scalar_t>
__device__ __forceinline__ Group<scalar_t, WIDTH> load(const scalar_t* from) {
  return *reinterpret_cast<const Group<scalar_t, WIDTH>*>(from);
}

template <int WIDTH, typename scalar_t>
__device__ __forceinline__ void store(const Group<scalar_t, WIDTH>& group, scalar_t* to) {
  *reinterpret_cast<Group<scalar_t, WIDTH>*>(to) = group;
}

// Elements of a 16-byte access.
template <typename scalar_t>
constexpr int kWide = 16 / sizeof(scalar_t);

// Whether rows of `columns` elements at these addresses can be moved 16 bytes at a time. A null pointer is no obstacle.
template <typename scalar_t, typename... Pointers>
bool moves_wide(int64_t columns, Pointers... pointers) {
  const uintptr_t all = (reinterpret_cast<uintptr_t>(pointers) | ...);
  return columns % kWide<scalar_t> == 0 && all % 16 == 0;
}

// Threads for `items` pieces of work of a block: whole warps, `most` of them at most.
inline int threads_for(int64_t items, int most) {
  const int64_t whole = ceil_div(items < 1 ? 1 : items, kWarp) * kWarp;
  return static_cast<int>(whole < most ? whole : most);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// The sum over the block, the same bits in every thread: warps are added in their order.
__device__ __forceinline__ float block_sum(float value) {
  MM_SHARED(float, partial, kWarp);
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += partial[warp];
  __syncthreads();  // the next call writes `partial` again
  return total;
}

}  // namespace megatron_mm
