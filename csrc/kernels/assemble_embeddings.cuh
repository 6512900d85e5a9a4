// Embedding assembly: token rows plus the text type embedding, media features over the placeholders.
//
//   out[i, :] = media_row[i] < 0 ? tokens[i, :] + text_type[:] : features[media_row[i], :]
//
// Shapes: tokens, out (rows, columns); text_type (columns); features (num_media, columns); media_row (rows) int32;
// type_partials (blocks, columns) FP32, which the caller adds up. Row-major, packed.
// Bytes moved per element of out: forward 1 read and 1 write, backward 1 read and 1 write (2 of a media row: its feature
// and the zero of its token): the least possible. text_type stays in cache.
// Alignment: 16-byte accesses where `columns` and every pointer allow, else one element at a time.
#pragma once

#include "device.cuh"

namespace megatron_mm {

constexpr int kAssembleThreads = 256;

template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kAssembleThreads)
    assemble_forward_kernel(int64_t columns, const scalar_t* tokens, const scalar_t* text_type, const scalar_t* features,
                            const int32_t* media_row, scalar_t* out) {
  const int64_t row = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
  if (column >= columns) return;
  const int64_t media = media_row[row];
  const scalar_t* from = media >= 0 ? features + media * columns : tokens + row * columns;
  auto group = load<WIDTH>(from + column);
  if (media < 0) {
    const auto type = load<WIDTH>(text_type + column);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) group.set(i, group[i] + type[i]);
  }
  store<WIDTH>(group, out + row * columns + column);
}

// grad_tokens[i] = grad_out[i] of a text row, 0 of a media row; grad_features[media_row[i]] = grad_out[i]. A block takes
// every gridDim.x-th row and adds up the text rows of its columns.
template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kAssembleThreads)
    assemble_backward_kernel(int64_t rows, int64_t columns, const scalar_t* grad_out, const int32_t* media_row,
                             scalar_t* grad_tokens, scalar_t* grad_features, float* type_partials) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
  if (column >= columns) return;
  Group<float, WIDTH> type = {};
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t media = media_row[row];
    auto group = load<WIDTH>(grad_out + row * columns + column);
    if (media >= 0) store<WIDTH>(group, grad_features + media * columns + column);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if (media >= 0) group.set(i, 0.0f);
      type.value[i] += group[i];
    }
    store<WIDTH>(group, grad_tokens + row * columns + column);
  }
  store<WIDTH>(type, type_partials + blockIdx.x * columns + column);
}

template <typename scalar_t, int WIDTH>
void assemble_forward(int64_t rows, int64_t columns, const scalar_t* tokens, const scalar_t* text_type,
                      const scalar_t* features, const int32_t* media_row, scalar_t* out, void* stream) {
  const int threads = threads_for(ceil_div(columns, WIDTH), kAssembleThreads);
  const dim3 grid(rows, ceil_div(columns, static_cast<int64_t>(threads) * WIDTH));
  MM_LAUNCH((assemble_forward_kernel<scalar_t, WIDTH>), grid, threads, stream, columns, tokens, text_type, features,
            media_row, out);
}

template <typename scalar_t>
void launch_assemble_forward(int64_t rows, int64_t columns, const scalar_t* tokens, const scalar_t* text_type,
                             const scalar_t* features, const int32_t* media_row, scalar_t* out, void* stream) {
  if (rows == 0 || columns == 0) return;
  auto* launch = moves_wide<scalar_t>(columns, tokens, text_type, features, out)
                     ? assemble_forward<scalar_t, kWide<scalar_t>>
                     : assemble_forward<scalar_t, 1>;
  launch(rows, columns, tokens, text_type, features, media_row, out, stream);
}

template <typename scalar_t, int WIDTH>
void assemble_backward(int64_t rows, int64_t columns, int64_t blocks, const scalar_t* grad_out,
                       const int32_t* media_row, scalar_t* grad_tokens, scalar_t* grad_features, float* type_partials,
                       void* stream) {
  const int threads = threads_for(ceil_div(columns, WIDTH), kAssembleThreads);
  const dim3 grid(blocks, ceil_div(columns, static_cast<int64_t>(threads) * WIDTH));
  MM_LAUNCH((assemble_backward_kernel<scalar_t, WIDTH>), grid, threads, stream, rows, columns, grad_out, media_row,
            grad_tokens, grad_features, type_partials);
}

template <typename scalar_t>
void launch_assemble_backward(int64_t rows, int64_t columns, int64_t blocks, const scalar_t* grad_out,
                              const int32_t* media_row, scalar_t* grad_tokens, scalar_t* grad_features,
                              float* type_partials, void* stream) {
  if (blocks == 0 || columns == 0) return;
  auto* launch = moves_wide<scalar_t>(columns, grad_out, grad_tokens, grad_features, type_partials)
                     ? assemble_backward<scalar_t, kWide<scalar_t>>
                     : assemble_backward<scalar_t, 1>;
  launch(rows, columns, blocks, grad_out, media_row, grad_tokens, grad_features, type_partials, stream);
}

}  // namespace megatron_mm
