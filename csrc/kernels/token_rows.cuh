// The rows of a vocabulary-parallel embedding table, and the gradient of the table by sums over sorted ids.
//
// Shapes: table, grad_table (vocab/tp, columns); ids (rows) int64, first_id of table row 0; out, grad_out (rows, columns).
// For the gradient: sorted_ids (rows) ascending and order (rows) int64, where each stood before the (stable) sort;
// carries (2, tiles, columns) FP32 scratch, tiles = rows / 32 rounded up; grad_table starts as zeros.
// Bytes moved per element: forward 1 read and 1 write (0 reads of ids of other ranks); backward 1 read of grad_out, 1
// write of each table row that has tokens, and 2 reads and writes of FP32 for each of the rows/32 tile borders.
// No atomics: a run of equal ids is added up in its order by one thread a column, run by run inside a tile of 32, then
// across tiles by a second launch.
#pragma once

#include "device.cuh"

namespace megatron_mm {

constexpr int kRowThreads = 256;
constexpr int kTile = 32;

template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kRowThreads)
    token_rows_kernel(int64_t columns, int64_t vocab, int64_t first_id, const scalar_t* table, const int64_t* ids,
                      scalar_t* out) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
  if (column >= columns) return;
  const int64_t id = ids[blockIdx.x] - first_id;
  Group<scalar_t, WIDTH> group;
  if (id >= 0 && id < vocab) {
    group = load<WIDTH>(table + id * columns + column);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) group.set(i, 0.0f);
  }
  store<WIDTH>(group, out + blockIdx.x * columns + column);
}

template <typename scalar_t, int WIDTH>
__device__ __forceinline__ void store_rounded(const Group<float, WIDTH>& total, scalar_t* to) {
  Group<scalar_t, WIDTH> rounded;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) rounded.set(i, total.value[i]);
  store<WIDTH>(rounded, to);
}

// Runs that begin and end in the tile are written; the part of a run that came from the tile before goes to carries[0],
// the part of a run that goes on in the next tile to carries[1].
template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kRowThreads)
    token_rows_tiles_kernel(int64_t rows, int64_t columns, int64_t vocab, int64_t first_id, const scalar_t* grad_out,
                            const int64_t* sorted_ids, const int64_t* order, scalar_t* grad_table, float* carries) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
  if (column >= columns) return;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t stop = start + kTile < rows ? start + kTile : rows;
  bool from_before = start > 0 && sorted_ids[start - 1] == sorted_ids[start];
  Group<float, WIDTH> total = {};
  for (int64_t place = start; place < stop; ++place) {
    const int64_t global_id = sorted_ids[place], id = global_id - first_id;
    const bool ends = place + 1 == rows || sorted_ids[place + 1] != global_id;
    const bool here = id >= 0 && id < vocab;
    if (here) {
      const auto group = load<WIDTH>(grad_out + order[place] * columns + column);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) total.value[i] += group[i];
    }
    if (here && (ends || place + 1 == stop)) {
      if (from_before) {
        store<WIDTH>(total, carries + blockIdx.x * columns + column);
      } else if (ends) {
        store_rounded<scalar_t, WIDTH>(total, grad_table + id * columns + column);
      } else {
        store<WIDTH>(total, carries + (gridDim.x + blockIdx.x) * columns + column);
      }
    }
    if (ends) {
      from_before = false;
      total = {};
    }
  }
}

// A run that begins in this tile and goes on: its first part, then the carries of the tiles that it reaches.
template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kRowThreads)
    token_rows_carries_kernel(int64_t rows, int64_t columns, int64_t vocab, int64_t first_id, const int64_t* sorted_ids,
                              const float* carries, scalar_t* grad_table) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kTile, last = start + kTile - 1;
  if (column >= columns || last + 1 >= rows) return;
  const int64_t global_id = sorted_ids[last], id = global_id - first_id;
  const bool goes_on = sorted_ids[last + 1] == global_id;
  const bool began_before = start > 0 && sorted_ids[start - 1] == global_id;
  if (!goes_on || began_before || id < 0 || id >= vocab) return;
  auto total = load<WIDTH>(carries + (gridDim.x + blockIdx.x) * columns + column);
  for (int64_t tile = blockIdx.x + 1; tile < gridDim.x && sorted_ids[tile * kTile] == global_id; ++tile) {
    const auto part = load<WIDTH>(carries + tile * columns + column);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) total.value[i] += part.value[i];
  }
  store_rounded<scalar_t, WIDTH>(total, grad_table + id * columns + column);
}

template <typename scalar_t, int WIDTH>
void token_rows_forward(int64_t rows, int64_t columns, int64_t vocab, int64_t first_id, const scalar_t* table,
                        const int64_t* ids, scalar_t* out, void* stream) {
  const int threads = threads_for(ceil_div(columns, WIDTH), kRowThreads);
  const dim3 grid(rows, ceil_div(columns, static_cast<int64_t>(threads) * WIDTH));
  MM_LAUNCH((token_rows_kernel<scalar_t, WIDTH>), grid, threads, stream, columns, vocab, first_id, table, ids, out);
}

template <typename scalar_t>
void launch_token_rows_forward(int64_t rows, int64_t columns, int64_t vocab, int64_t first_id, const scalar_t* table,
                               const int64_t* ids, scalar_t* out, void* stream) {
  if (rows == 0 || columns == 0) return;
  auto* launch = moves_wide<scalar_t>(columns, table, out) ? token_rows_forward<scalar_t, kWide<scalar_t>>
                                                           : token_rows_forward<scalar_t, 1>;
  launch(rows, columns, vocab, first_id, table, ids, out, stream);
}

template <typename scalar_t, int WIDTH>
void token_rows_backward(int64_t rows, int64_t columns, int64_t vocab, int64_t first_id, const scalar_t* grad_out,
                         const int64_t* sorted_ids, const int64_t* order, scalar_t* grad_table, float* carries,
                         void* stream) {
  const int threads = threads_for(ceil_div(columns, WIDTH), kRowThreads);
  const dim3 grid(ceil_div(rows, kTile), ceil_div(columns, static_cast<int64_t>(threads) * WIDTH));
  MM_LAUNCH((token_rows_tiles_kernel<scalar_t, WIDTH>), grid, threads, stream, rows, columns, vocab, first_id, grad_out,
            sorted_ids, order, grad_table, carries);
  MM_LAUNCH((token_rows_carries_kernel<scalar_t, WIDTH>), grid, threads, stream, rows, columns, vocab, first_id,
            sorted_ids, carries, grad_table);
}

template <typename scalar_t>
void launch_token_rows_backward(int64_t rows, int64_t columns, int64_t vocab, int64_t first_id,
                                const scalar_t* grad_out, const int64_t* sorted_ids, const int64_t* order,
                                scalar_t* grad_table, float* carries, void* stream) {
  if (rows == 0 || columns == 0) return;
  auto* launch = moves_wide<scalar_t>(columns, grad_out, grad_table, carries)
                     ? token_rows_backward<scalar_t, kWide<scalar_t>>
                     : token_rows_backward<scalar_t, 1>;
  launch(rows, columns, vocab, first_id, grad_out, sorted_ids, order, grad_table, carries, stream);
}

}  // namespace megatron_mm
