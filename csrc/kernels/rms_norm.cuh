// Residual add and RMSNorm in one pass: sum = in + residual (rounded), normed = sum / rms(sum) * weight.
//
// Shapes: in, residual, sum, normed and their gradients (rows, columns); weight (columns); inverse_rms (rows) FP32;
// weight_partials (blocks, columns) FP32, which the caller adds up. Row-major, packed. Without a residual (null) `in`
// itself is normed and no sum is written; without grad_sum (null) no gradient is added.
// Bytes moved per element: forward 2 reads and 2 writes (1 and 1 without a residual), backward 3 reads and 1 write (2
// and 1): a row stays in registers between its sum of squares and its output. The weight stays in cache.
// Alignment: 16-byte accesses where `columns` and every pointer allow, else one element at a time.
// Order of sums: fixed by the number of threads and blocks, so the same bits in every run.
#pragma once

#include "device.cuh"

namespace megatron_mm {

constexpr int kNormThreads = 512;
// Groups of a row that a thread keeps in registers: 128 registers at 512 threads hold them and their gradients.
template <int WIDTH>
constexpr int kNormKeep = WIDTH == 1 ? 16 : 4;

template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_forward_kernel(int columns, float epsilon, const scalar_t* in, const scalar_t* residual,
                            const scalar_t* weight, scalar_t* sum, scalar_t* normed, float* inverse_rms) {
  constexpr int KEEP = kNormKeep<WIDTH>;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * columns;
  Group<scalar_t, WIDTH> kept[KEEP];
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < KEEP; ++k) {
    const int column = (threadIdx.x + k * blockDim.x) * WIDTH;
    if (column >= columns) continue;
    kept[k] = load<WIDTH>(in + start + column);
    if (residual != nullptr) {
      const auto other = load<WIDTH>(residual + start + column);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) kept[k].set(i, kept[k][i] + other[i]);
      store<WIDTH>(kept[k], sum + start + column);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) squares += kept[k][i] * kept[k][i];
  }
  const float inverse = rsqrtf(block_sum(squares) / columns + epsilon);
  if (threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;
#pragma unroll
  for (int k = 0; k < KEEP; ++k) {
    const int column = (threadIdx.x + k * blockDim.x) * WIDTH;
    if (column >= columns) continue;
    const auto scale = load<WIDTH>(weight + column);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) kept[k].set(i, kept[k][i] * inverse * scale[i]);
    store<WIDTH>(kept[k], normed + start + column);
  }
}

template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_backward_kernel(int rows, int columns, const scalar_t* grad_normed, const scalar_t* grad_sum,
                             const scalar_t* sum, const scalar_t* weight, const float* inverse_rms, scalar_t* grad_in,
                             float* weight_partials) {
  constexpr int KEEP = kNormKeep<WIDTH>;
  float grad_weight[KEEP][WIDTH] = {};
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t start = static_cast<int64_t>(row) * columns;
    const float inverse = inverse_rms[row];
    Group<scalar_t, WIDTH> gradient[KEEP], input[KEEP];
    float product = 0.0f;
#pragma unroll
    for (int k = 0; k < KEEP; ++k) {
      const int column = (threadIdx.x + k * blockDim.x) * WIDTH;
      if (column >= columns) continue;
      gradient[k] = load<WIDTH>(grad_normed + start + column);
      input[k] = load<WIDTH>(sum + start + column);
      const auto scale = load<WIDTH>(weight + column);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float direction = input[k][i] * inverse;
        product += gradient[k][i] * scale[i] * direction;
        grad_weight[k][i] += gradient[k][i] * direction;
      }
    }
    const float mean = block_sum(product) / columns;
#pragma unroll
    for (int k = 0; k < KEEP; ++k) {
      const int column = (threadIdx.x + k * blockDim.x) * WIDTH;
      if (column >= columns) continue;
      const auto scale = load<WIDTH>(weight + column);
      float result[WIDTH];
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        result[i] = inverse * (gradient[k][i] * scale[i] - input[k][i] * inverse * mean);
      }
      if (grad_sum != nullptr) {
        const auto passed = load<WIDTH>(grad_sum + start + column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) result[i] += passed[i];
      }
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) gradient[k].set(i, result[i]);
      store<WIDTH>(gradient[k], grad_in + start + column);
    }
  }
#pragma unroll
  for (int k = 0; k < KEEP; ++k) {
    const int column = (threadIdx.x + k * blockDim.x) * WIDTH;
    if (column >= columns) continue;
    Group<float, WIDTH> partial;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) partial.value[i] = grad_weight[k][i];
    store<WIDTH>(partial, weight_partials + static_cast<int64_t>(blockIdx.x) * columns + column);
  }
}

template <int WIDTH>
int norm_threads(int64_t columns) {
  return threads_for(ceil_div(columns, WIDTH * kNormKeep<WIDTH>), kNormThreads);
}

// Columns that a block can hold; the caller refuses more.
template <int WIDTH>
constexpr int64_t kNormColumns = static_cast<int64_t>(WIDTH) * kNormKeep<WIDTH> * kNormThreads;

template <typename scalar_t>
bool launch_rms_norm_forward(int64_t rows, int64_t columns, float epsilon, const scalar_t* in, const scalar_t* residual,
                             const scalar_t* weight, scalar_t* sum, scalar_t* normed, float* inverse_rms,
                             void* stream) {
  constexpr int W = kWide<scalar_t>;
  const bool wide = moves_wide<scalar_t>(columns, in, residual, weight, sum, normed);
  if (columns > (wide ? kNormColumns<W> : kNormColumns<1>)) return false;
  if (rows == 0 || columns == 0) return true;
  if (wide) {
    MM_LAUNCH((rms_norm_forward_kernel<scalar_t, W>), rows, norm_threads<W>(columns), stream, columns, epsilon, in,
              residual, weight, sum, normed, inverse_rms);
  } else {
    MM_LAUNCH((rms_norm_forward_kernel<scalar_t, 1>), rows, norm_threads<1>(columns), stream, columns, epsilon, in,
              residual, weight, sum, normed, inverse_rms);
  }
  return true;
}

template <typename scalar_t>
bool launch_rms_norm_backward(int64_t rows, int64_t columns, int64_t blocks, const scalar_t* grad_normed,
                              const scalar_t* grad_sum, const scalar_t* sum, const scalar_t* weight,
                              const float* inverse_rms, scalar_t* grad_in, float* weight_partials, void* stream) {
  constexpr int W = kWide<scalar_t>;
  const bool wide = moves_wide<scalar_t>(columns, grad_normed, grad_sum, sum, weight, grad_in, weight_partials);
  if (columns > (wide ? kNormColumns<W> : kNormColumns<1>)) return false;
  if (blocks == 0 || columns == 0) return true;
  if (wide) {
    MM_LAUNCH((rms_norm_backward_kernel<scalar_t, W>), blocks, norm_threads<W>(columns), stream, rows, columns,
              grad_normed, grad_sum, sum, weight, inverse_rms, grad_in, weight_partials);
  } else {
    MM_LAUNCH((rms_norm_backward_kernel<scalar_t, 1>), blocks, norm_threads<1>(columns), stream, rows, columns,
              grad_normed, grad_sum, sum, weight, inverse_rms, grad_in, weight_partials);
  }
  return true;
}

}  // namespace megatron_mm
