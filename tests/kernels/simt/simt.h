// Runs CUDA kernels on the host: one fiber per thread, blocks one after another, in an order that a seed chooses.
//
// Include it before any kernel header. What a GPU would do silently is a fault here, which ends the process with a line on
// stderr:
//   - __syncthreads that some threads of the block do not reach: they wait elsewhere, or have exited;
//   - a warp operation whose mask names lanes that are not there, or that its own lane is not in, or a shuffle from a
//     lane outside the mask;
//   - shared memory read before it was written, out of its bounds, or by two threads with no barrier between them where
//     one writes (checked access by access: no order of threads is needed to expose it).
// Everything else, global memory above all, is left to the sanitizers that the kernels are compiled with. simt.cpp is
// compiled without them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>

#include "call.h"

namespace simt {

// The block and the thread that run now.
extern dim3 grid_size, block_size;
extern uint3 block_index, thread_index;

// Which mutant runs, of a program that mutate.py has made; 0 is none.
extern const int mutant;

[[noreturn]] void fail(const char* format, ...);
void run(dim3 grid, dim3 block, void (*kernel)(void*), void* closure);
void wait_at_barrier(unsigned line);
// Gives `value` to the other lanes of `mask` and returns what each of them gave.
const uint64_t* exchange(unsigned mask, uint64_t value, unsigned line);
uint64_t from_lane(unsigned mask, uint64_t value, unsigned lane, unsigned line);
unsigned own_lane();

template <typename Kernel>
void launch(dim3 grid, dim3 block, Kernel kernel) {
  run(grid, block, [](void* closure) { (*static_cast<Kernel*>(closure))(); }, &kernel);
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

// Shared memory, whose every access is checked.
struct Shared;
Shared* shared(const void* declaration, const char* name, int64_t size);
uint64_t read(Shared* array, int64_t place);
void write(Shared* array, int64_t place, uint64_t bits);

template <typename T>
struct SharedArray {
  struct Reference {
    Shared* array;
    int64_t place;
    operator T() const { return from_bits<T>(read(array, place)); }
    void operator=(T value) { write(array, place, to_bits(value)); }
    void operator=(const Reference& other) { *this = static_cast<T>(other); }
    void operator+=(T value) { *this = static_cast<T>(*this) + value; }
  };

  Shared* array;
  Reference operator[](int64_t place) { return {array, place}; }
};

// Answers the calls of simt/__init__.py until there are no more.
[[noreturn]] void serve(const megatron_mm::Entry* entries, int count);
template <int count>
[[noreturn]] void serve(const megatron_mm::Entry (&entries)[count]) {
  serve(entries, count);
}

}  // namespace simt

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, unsigned line = __builtin_LINE()) {
  const unsigned own = simt::own_lane(), from = own ^ lanes;
  return simt::from_bits<T>(
      simt::from_lane(mask, simt::to_bits(value), from / width == own / width ? from : own, line));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, unsigned line = __builtin_LINE()) {
  const unsigned from = simt::own_lane() / width * width + lane % width;
  return simt::from_bits<T>(simt::from_lane(mask, simt::to_bits(value), from, line));
}
inline unsigned __ballot_sync(unsigned mask, bool vote, unsigned line = __builtin_LINE()) {
  const uint64_t* votes = simt::exchange(mask, vote, line);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(votes[lane] != 0) << lane;
  return result;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, unsigned line = __builtin_LINE()) { simt::exchange(mask, 0, line); }
inline void __syncthreads(unsigned line = __builtin_LINE()) { simt::wait_at_barrier(line); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (simt::thread_index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
#define MM_LAUNCH(kernel, grid, block, stream, ...) simt::launch(dim3(grid), dim3(block), [=] { (kernel)(__VA_ARGS__); })
#define MM_SHARED(type, name, size) \
  static char name##_declared;      \
  simt::SharedArray<type> name{simt::shared(&name##_declared, #name, size)}
