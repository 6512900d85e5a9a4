// Cross-entropy over a vocabulary cut into parts: what a rank computes of its own part, and the gradient in place.
//
// Shapes: logits (rows, columns), columns = vocab/tp; labels (rows) int64 ids of the whole vocabulary; first_id, the id
// of column 0; mask (rows) FP32 or null for all ones: a row with mask 0 is never read and has no gradient.
//   statistics (3, rows) FP32: the greatest logit, sum exp(logit - greatest), the label's logit (0 on other ranks)
//   all_statistics (parts, 3, rows): those of every rank, one all-gather of three numbers a token
//   losses (2, rows) FP32: cross-entropy and z_loss log(Z)^2; log_z (rows) FP32
// Bytes moved per logit: forward 1 read, backward 1 read and 1 write over the same place: the least possible.
// Alignment: 16-byte accesses where `columns` and the pointer allow, else one element at a time.
#pragma once

#include "device.cuh"

namespace megatron_mm {

constexpr int kLossThreads = 256;

// A running maximum and sum of exp(value - maximum) (Milakov and Gimelshein 2018).
struct OnlineSum {
  float maximum = -INFINITY;
  float sum = 0.0f;

  __device__ __forceinline__ void add(float other_maximum, float other_sum) {
    const float highest = fmaxf(maximum, other_maximum);
    // Equal maxima are not subtracted: both may be -inf, of a thread that has no column.
    sum = (maximum == highest ? sum : sum * expf(maximum - highest)) +
          (other_maximum == highest ? other_sum : other_sum * expf(other_maximum - highest));
    maximum = highest;
  }
};

__device__ __forceinline__ OnlineSum block_online_sum(OnlineSum own) {
  MM_SHARED(float, maxima, kWarp);
  MM_SHARED(float, sums, kWarp);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float maximum = __shfl_xor_sync(kAllLanes, own.maximum, distance);
    const float sum = __shfl_xor_sync(kAllLanes, own.sum, distance);
    own.add(maximum, sum);
  }
  if (threadIdx.x % kWarp == 0) {
    maxima[threadIdx.x / kWarp] = own.maximum;
    sums[threadIdx.x / kWarp] = own.sum;
  }
  __syncthreads();
  OnlineSum total;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total.add(maxima[warp], sums[warp]);
  return total;
}

template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kLossThreads)
    cross_entropy_statistics_kernel(int64_t rows, int columns, int64_t first_id, const scalar_t* logits,
                                    const int64_t* labels, const float* mask, float* statistics) {
  const int64_t row = blockIdx.x;
  if (mask != nullptr && mask[row] == 0.0f) {  // the whole block leaves
    if (threadIdx.x < 3) statistics[threadIdx.x * rows + row] = threadIdx.x == 1 ? 1.0f : 0.0f;
    return;
  }
  const scalar_t* own = logits + row * columns;
  OnlineSum online;
  for (int column = threadIdx.x * WIDTH; column < columns; column += blockDim.x * WIDTH) {
    const auto group = load<WIDTH>(own + column);
    float highest = group[0];
#pragma unroll
    for (int i = 1; i < WIDTH; ++i) highest = fmaxf(highest, group[i]);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum += expf(group[i] - highest);
    online.add(highest, sum);
  }
  online = block_online_sum(online);
  if (threadIdx.x == 0) {
    const int64_t label = labels[row] - first_id;
    statistics[row] = online.maximum;
    statistics[rows + row] = online.sum;
    statistics[2 * rows + row] = label >= 0 && label < columns ? to_float(own[label]) : 0.0f;
  }
}

__global__ void __launch_bounds__(kLossThreads)
    cross_entropy_combine_kernel(int64_t rows, int parts, float z_loss, const float* all_statistics, const float* mask,
                                 float* losses, float* log_z) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  OnlineSum online;
  float label_logit = 0.0f;
  for (int part = 0; part < parts; ++part) {
    const float* own = all_statistics + part * 3 * rows + row;
    online.add(own[0], own[rows]);
    label_logit += own[2 * rows];
  }
  const bool counts = mask == nullptr || mask[row] != 0.0f;
  const float log_sum = logf(online.sum), z = log_sum + online.maximum;
  losses[row] = counts ? log_sum - (label_logit - online.maximum) : 0.0f;
  losses[rows + row] = counts ? z_loss * z * z : 0.0f;
  log_z[row] = z;
}

// d(loss) = (softmax - onehot) d(cross_entropy) + 2 z_loss log(Z) softmax d(z), written over the logits.
template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kLossThreads)
    cross_entropy_backward_kernel(int64_t rows, int columns, int64_t first_id, float z_loss, const float* grad_losses,
                                  const int64_t* labels, const float* mask, const float* log_z, scalar_t* logits) {
  const int64_t row = blockIdx.x;
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
  if (column >= columns) return;
  scalar_t* own = logits + row * columns + column;
  Group<scalar_t, WIDTH> group;
  if (mask != nullptr && mask[row] == 0.0f) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) group.set(i, 0.0f);
  } else {
    const float gradient = grad_losses[row], z = log_z[row];
    const float scale = gradient + grad_losses[rows + row] * 2.0f * z_loss * z;
    const int64_t label = labels[row] - first_id - column;
    group = load<WIDTH>(own);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) group.set(i, expf(group[i] - z) * scale - (label == i ? gradient : 0.0f));
  }
  store<WIDTH>(group, own);
}

template <typename scalar_t>
void launch_cross_entropy_statistics(int64_t rows, int64_t columns, int64_t first_id, const scalar_t* logits,
                                     const int64_t* labels, const float* mask, float* statistics, void* stream) {
  constexpr int W = kWide<scalar_t>;
  if (rows == 0) return;
  if (moves_wide<scalar_t>(columns, logits)) {
    MM_LAUNCH((cross_entropy_statistics_kernel<scalar_t, W>), rows, threads_for(ceil_div(columns, W), kLossThreads),
              stream, rows, columns, first_id, logits, labels, mask, statistics);
  } else {
    MM_LAUNCH((cross_entropy_statistics_kernel<scalar_t, 1>), rows, threads_for(columns, kLossThreads), stream, rows,
              columns, first_id, logits, labels, mask, statistics);
  }
}

inline void launch_combine(int64_t rows, int64_t parts, float z_loss, const float* all_statistics, const float* mask,
                           float* losses, float* log_z, void* stream) {
  if (rows == 0) return;
  const int threads = threads_for(rows, kLossThreads);
  MM_LAUNCH(cross_entropy_combine_kernel, ceil_div(rows, threads), threads, stream, rows, parts, z_loss, all_statistics,
            mask, losses, log_z);
}

template <typename scalar_t, int WIDTH>
void cross_entropy_backward(int64_t rows, int64_t columns, int64_t first_id, float z_loss, const float* grad_losses,
                            const int64_t* labels, const float* mask, const float* log_z, scalar_t* logits,
                            void* stream) {
  const int threads = threads_for(ceil_div(columns, WIDTH), kLossThreads);
  const dim3 grid(rows, ceil_div(columns, static_cast<int64_t>(threads) * WIDTH));
  MM_LAUNCH((cross_entropy_backward_kernel<scalar_t, WIDTH>), grid, threads, stream, rows, columns, first_id, z_loss,
            grad_losses, labels, mask, log_z, logits);
}

template <typename scalar_t>
void launch_cross_entropy_backward(int64_t rows, int64_t columns, int64_t first_id, float z_loss,
                                   const float* grad_losses, const int64_t* labels, const float* mask,
                                   const float* log_z, scalar_t* logits, void* stream) {
  if (rows == 0 || columns == 0) return;
  if (moves_wide<scalar_t>(columns, logits)) {
    cross_entropy_backward<scalar_t, kWide<scalar_t>>(rows, columns, first_id, z_loss, grad_losses, labels, mask, log_z,
                                                      logits, stream);
  } else {
    cross_entropy_backward<scalar_t, 1>(rows, columns, first_id, z_loss, grad_losses, labels, mask, log_z, logits,
                                        stream);
  }
}

}  // namespace megatron_mm
