// Kernels with one planted fault each, which simt.h or a sanitizer must catch, and their correct twins.
#include "simt.h"

#include "device.cuh"

namespace {

// Reverses each block of 64 through shared memory.
__global__ void reverse(bool barrier, float* in, float* out) {
  MM_SHARED(float, kept, 64);
  const int64_t start = blockIdx.x * 64;
  kept[threadIdx.x] = in[start + threadIdx.x];
  if (barrier) __syncthreads();
  out[start + threadIdx.x] = kept[63 - threadIdx.x];
}
int correct(int64_t blocks, float* in, float* out) {
  MM_LAUNCH(reverse, blocks, 64, nullptr, true, in, out);
  return 0;
}
int missing_barrier(int64_t blocks, float* in, float* out) {
  MM_LAUNCH(reverse, blocks, 64, nullptr, false, in, out);
  return 0;
}

// Every thread adds to the same element.
__global__ void racing_sum(float* in, float* out) {
  MM_SHARED(float, total, 1);
  if (threadIdx.x == 0) total[0] = 0.0f;
  __syncthreads();
  total[0] += in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) out[0] = total[0];
}
int race(int64_t, float* in, float* out) {
  MM_LAUNCH(racing_sum, 1, 64, nullptr, in, out);
  return 0;
}

// Writes the sums of two rows through the same shared element, with no barrier before the second write.
__global__ void reusing(float* in, float* out) {
  MM_SHARED(float, kept, 1);
  for (int row = 0; row < 2; ++row) {
    if (threadIdx.x == 0) kept[0] = in[row];
    __syncthreads();
    out[row * 64 + threadIdx.x] = kept[0];
  }
}
int stale_reuse(int64_t, float* in, float* out) {
  MM_LAUNCH(reusing, 1, 64, nullptr, in, out);
  return 0;
}

// Blocks write a sum that they must not share: the last one wins, whichever it is.
__global__ void last_writer(float* in, float* out) {
  if (threadIdx.x == 0) out[0] = in[blockIdx.x];
}
int order_dependent(int64_t blocks, float* in, float* out) {
  MM_LAUNCH(last_writer, blocks, 32, nullptr, in, out);
  return 0;
}

__global__ void copy_until(int64_t count, float* in, float* out) {
  const int64_t place = blockIdx.x * 64 + threadIdx.x;
  if (place <= count) out[place] = in[place];
}
int out_of_bounds(int64_t blocks, float* in, float* out) {
  MM_LAUNCH(copy_until, blocks + 1, 64, nullptr, blocks * 64, in, out);
  return 0;
}

__global__ void shared_too_small(float* in, float* out) {
  MM_SHARED(float, kept, 63);
  kept[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = kept[threadIdx.x];
}
int shared_out_of_bounds(int64_t, float* in, float* out) {
  MM_LAUNCH(shared_too_small, 1, 64, nullptr, in, out);
  return 0;
}

__global__ void unset_shared(float*, float* out) {
  MM_SHARED(float, kept, 64);
  if (threadIdx.x != 5) kept[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = kept[threadIdx.x];
}
int uninitialised_shared(int64_t, float* in, float* out) {
  MM_LAUNCH(unset_shared, 1, 64, nullptr, in, out);
  return 0;
}

__global__ void barrier_in_branch(float* in, float* out) {
  if (in[threadIdx.x] > 0.0f) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}
int divergent_barrier(int64_t, float* in, float* out) {
  MM_LAUNCH(barrier_in_branch, 1, 64, nullptr, in, out);
  return 0;
}

__global__ void early_exit(float* in, float* out) {
  if (threadIdx.x >= 60) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}
int exit_before_barrier(int64_t, float* in, float* out) {
  MM_LAUNCH(early_exit, 1, 64, nullptr, in, out);
  return 0;
}

__global__ void sum_of_some(unsigned mask, int active, float* in, float* out) {
  if (static_cast<int>(threadIdx.x) >= active) return;
  out[threadIdx.x] = in[threadIdx.x] + __shfl_xor_sync(mask, in[threadIdx.x], 16);
}
int exited_lane(int64_t, float* in, float* out) {
  MM_LAUNCH(sum_of_some, 1, 32, nullptr, 0xffffffffu, 31, in, out);
  return 0;
}
__global__ void sync_of_some(float* in, float* out) {
  __syncwarp(0x7fffffffu);
  out[threadIdx.x] = in[threadIdx.x];
}
int mask_without_own_lane(int64_t, float* in, float* out) {
  MM_LAUNCH(sync_of_some, 1, 32, nullptr, in, out);
  return 0;
}
int lane_outside_mask(int64_t, float* in, float* out) {
  MM_LAUNCH(sum_of_some, 1, 32, nullptr, 0x0000ffffu, 16, in, out);
  return 0;
}
int absent_lane(int64_t, float* in, float* out) {
  MM_LAUNCH(sum_of_some, 1, 24, nullptr, 0xffffffffu, 24, in, out);
  return 0;
}

__global__ void shuffle_in_branch(float* in, float* out) {
  float value = in[threadIdx.x];
  if (threadIdx.x < 16) value += __shfl_xor_sync(0xffffffffu, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}
int divergent_shuffle(int64_t, float* in, float* out) {
  MM_LAUNCH(shuffle_in_branch, 1, 32, nullptr, in, out);
  return 0;
}

__global__ void count_votes(float* in, float* out) {
  out[threadIdx.x] = static_cast<float>(__ballot_sync(0xffffffffu, in[threadIdx.x] > 0.0f) & 0xffffffu);
}
int ballot(int64_t, float* in, float* out) {
  MM_LAUNCH(count_votes, 1, 32, nullptr, in, out);
  return 0;
}

__global__ void wide_copy(float* in, float* out) {
  megatron_mm::store<4>(megatron_mm::load<4>(in + 1), out);
}
int misaligned(int64_t, float* in, float* out) {
  MM_LAUNCH(wide_copy, 1, 1, nullptr, in, out);
  return 0;
}

}  // namespace

#define FAULT(name) MM_ENTRY(name, name)

int main() {
  const megatron_mm::Entry entries[] = {
      FAULT(correct) FAULT(missing_barrier) FAULT(race) FAULT(stale_reuse) FAULT(order_dependent)
      FAULT(out_of_bounds) FAULT(shared_out_of_bounds) FAULT(uninitialised_shared) FAULT(divergent_barrier)
      FAULT(exit_before_barrier) FAULT(exited_lane) FAULT(mask_without_own_lane) FAULT(lane_outside_mask)
      FAULT(absent_lane) FAULT(divergent_shuffle) FAULT(ballot) FAULT(misaligned)
  };
  simt::serve(entries);
}
