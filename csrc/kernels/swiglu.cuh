// SwiGLU: out = silu(gate) * up, computed in FP32 and rounded once.
//
// Shapes: gate_and_up, grad_in (rows, 2 columns), the gate first; out, grad_out (rows, columns). Row-major, packed.
// Bytes moved per element of out: forward 2 reads and 1 write, backward 3 reads and 2 writes, each the least possible.
// Alignment: 16-byte accesses where `columns` and every pointer allow, else one element at a time.
#pragma once

#include "device.cuh"

namespace megatron_mm {

constexpr int kSwigluThreads = 256;

template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_forward_kernel(int64_t columns, const scalar_t* gate_and_up, scalar_t* out) {
  const int64_t row = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
  if (column >= columns) return;
  const auto gate = load<WIDTH>(gate_and_up + 2 * row * columns + column);
  const auto up = load<WIDTH>(gate_and_up + (2 * row + 1) * columns + column);
  Group<scalar_t, WIDTH> result;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) result.set(i, gate[i] / (1.0f + expf(-gate[i])) * up[i]);
  store<WIDTH>(result, out + row * columns + column);
}

template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_backward_kernel(int64_t columns, const scalar_t* grad_out, const scalar_t* gate_and_up, scalar_t* grad_in) {
  const int64_t row = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
  if (column >= columns) return;
  const auto gradient = load<WIDTH>(grad_out + row * columns + column);
  const auto gate = load<WIDTH>(gate_and_up + 2 * row * columns + column);
  const auto up = load<WIDTH>(gate_and_up + (2 * row + 1) * columns + column);
  Group<scalar_t, WIDTH> grad_gate, grad_up;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    const float sigmoid = 1.0f / (1.0f + expf(-gate[i]));
    const float silu = gate[i] * sigmoid;
    grad_gate.set(i, gradient[i] * up[i] * (sigmoid + silu * (1.0f - sigmoid)));
    grad_up.set(i, gradient[i] * silu);
  }
  store<WIDTH>(grad_gate, grad_in + 2 * row * columns + column);
  store<WIDTH>(grad_up, grad_in + (2 * row + 1) * columns + column);
}

template <typename scalar_t, int WIDTH>
void swiglu(int64_t rows, int64_t columns, const scalar_t* grad_out, const scalar_t* gate_and_up, scalar_t* result,
            void* stream) {
  const int threads = threads_for(ceil_div(columns, WIDTH), kSwigluThreads);
  const dim3 grid(rows, ceil_div(columns, static_cast<int64_t>(threads) * WIDTH));
  if (grad_out == nullptr) {
    MM_LAUNCH((swiglu_forward_kernel<scalar_t, WIDTH>), grid, threads, stream, columns, gate_and_up, result);
  } else {
    MM_LAUNCH((swiglu_backward_kernel<scalar_t, WIDTH>), grid, threads, stream, columns, grad_out, gate_and_up, result);
  }
}

// Writes the output, or with a gradient the gradient of the input, to `result`.
template <typename scalar_t>
void launch_swiglu(int64_t rows, int64_t columns, const scalar_t* grad_out, const scalar_t* gate_and_up,
                   scalar_t* result, void* stream) {
  if (rows == 0 || columns == 0) return;
  if (moves_wide<scalar_t>(columns, grad_out, gate_and_up, result)) {
    swiglu<scalar_t, kWide<scalar_t>>(rows, columns, grad_out, gate_and_up, result, stream);
  } else {
    swiglu<scalar_t, 1>(rows, columns, grad_out, gate_and_up, result, stream);
  }
}

}  // namespace megatron_mm
