// Embedding assembly: token rows plus the text type embedding, media features over the placeholders.
//
//   out[i, :]        = media_row[i] < 0 ? tokens[i, :] + text_type[:] : features[media_row[i], :]
//
// Shapes: tokens, out (num_tokens, hidden); text_type (hidden); features (num_media, hidden); media_row (num_tokens).
// Layout: row-major, rows packed. Bytes moved an element of out: one read, one write (text_type stays in cache).
// Alignment: 16-byte accesses where every pointer and row is 16-byte aligned, else one element at a time.
//
// The bodies are plain functions of (row, group) so that the host can run the very same code; see
// tests/kernels/test_assemble_embeddings.py.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

#ifdef __CUDACC__
#define MM_DEVICE __host__ __device__ __forceinline__
#else
#define MM_DEVICE inline
#endif

namespace megatron_mm {

// WIDTH elements that are moved with one access.
template <typename scalar_t, int WIDTH>
struct alignas(sizeof(scalar_t) * WIDTH) Group {
  scalar_t value[WIDTH];
};

MM_DEVICE float add(float a, float b) { return a + b; }
MM_DEVICE __nv_bfloat16 add(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __float2bfloat16(__bfloat162float(a) + __bfloat162float(b));
}

template <typename scalar_t, int WIDTH>
MM_DEVICE void assemble_forward(int64_t row, int64_t group, int64_t hidden, const scalar_t* tokens,
                                const scalar_t* text_type, const scalar_t* features, const int32_t* media_row,
                                scalar_t* out) {
  using Vector = Group<scalar_t, WIDTH>;
  const int64_t column = group * WIDTH;
  const int32_t media = media_row[row];
  Vector result;
  if (media >= 0) {
    result = *reinterpret_cast<const Vector*>(features + media * hidden + column);
  } else {
    const Vector token = *reinterpret_cast<const Vector*>(tokens + row * hidden + column);
    const Vector type = *reinterpret_cast<const Vector*>(text_type + column);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) result.value[i] = add(token.value[i], type.value[i]);
  }
  *reinterpret_cast<Vector*>(out + row * hidden + column) = result;
}

// grad_tokens[i] = grad_out[i] of a text row, 0 of a media row; grad_features[media_row[i]] = grad_out[i].
template <typename scalar_t, int WIDTH>
MM_DEVICE void assemble_backward(int64_t row, int64_t group, int64_t hidden, const scalar_t* grad_out,
                                 const int32_t* media_row, scalar_t* grad_tokens, scalar_t* grad_features) {
  using Vector = Group<scalar_t, WIDTH>;
  const int64_t column = group * WIDTH;
  const int32_t media = media_row[row];
  const Vector gradient = *reinterpret_cast<const Vector*>(grad_out + row * hidden + column);
  Vector token = gradient;
  if (media >= 0) {
    *reinterpret_cast<Vector*>(grad_features + media * hidden + column) = gradient;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) token.value[i] = scalar_t(0.0f);
  }
  *reinterpret_cast<Vector*>(grad_tokens + row * hidden + column) = token;
}

}  // namespace megatron_mm
