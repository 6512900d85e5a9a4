// Launches of assemble_embeddings.cuh: a block a row, a thread a group of columns.
#include "assemble_embeddings.cuh"
#include "launch.h"

namespace megatron_mm {
namespace {

constexpr int kThreads = 256;

template <typename scalar_t, int WIDTH>
__global__ void forward_kernel(int64_t hidden, const scalar_t* tokens, const scalar_t* text_type,
                               const scalar_t* features, const int32_t* media_row, scalar_t* out) {
  for (int64_t group = threadIdx.x; group < hidden / WIDTH; group += blockDim.x) {
    assemble_forward<scalar_t, WIDTH>(blockIdx.x, group, hidden, tokens, text_type, features, media_row, out);
  }
}

template <typename scalar_t, int WIDTH>
__global__ void backward_kernel(int64_t hidden, const scalar_t* grad_out, const int32_t* media_row,
                                scalar_t* grad_tokens, scalar_t* grad_features) {
  for (int64_t group = threadIdx.x; group < hidden / WIDTH; group += blockDim.x) {
    assemble_backward<scalar_t, WIDTH>(blockIdx.x, group, hidden, grad_out, media_row, grad_tokens, grad_features);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename scalar_t>
int forward(int64_t num_tokens, int64_t hidden, const void* tokens, const void* text_type, const void* features,
            const int32_t* media_row, void* out, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(scalar_t);
  const auto* t = static_cast<const scalar_t*>(tokens);
  const auto* e = static_cast<const scalar_t*>(text_type);
  const auto* f = static_cast<const scalar_t*>(features);
  auto* o = static_cast<scalar_t*>(out);
  if (hidden % kWide == 0 && aligned(t) && aligned(e) && aligned(f) && aligned(o)) {
    forward_kernel<scalar_t, kWide><<<num_tokens, kThreads, 0, stream>>>(hidden, t, e, f, media_row, o);
  } else {
    forward_kernel<scalar_t, 1><<<num_tokens, kThreads, 0, stream>>>(hidden, t, e, f, media_row, o);
  }
  return static_cast<int>(cudaGetLastError());
}

template <typename scalar_t>
int backward(int64_t num_tokens, int64_t hidden, const void* grad_out, const int32_t* media_row, void* grad_tokens,
             void* grad_features, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(scalar_t);
  const auto* g = static_cast<const scalar_t*>(grad_out);
  auto* t = static_cast<scalar_t*>(grad_tokens);
  auto* f = static_cast<scalar_t*>(grad_features);
  if (hidden % kWide == 0 && aligned(g) && aligned(t) && aligned(f)) {
    backward_kernel<scalar_t, kWide><<<num_tokens, kThreads, 0, stream>>>(hidden, g, media_row, t, f);
  } else {
    backward_kernel<scalar_t, 1><<<num_tokens, kThreads, 0, stream>>>(hidden, g, media_row, t, f);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int launch_assemble_forward(bool bf16, int64_t num_tokens, int64_t hidden, const void* tokens, const void* text_type,
                            const void* features, const void* media_row, void* out, void* stream) {
  if (num_tokens == 0 || hidden == 0) return 0;
  const auto* rows = static_cast<const int32_t*>(media_row);
  const auto s = static_cast<cudaStream_t>(stream);
  return bf16 ? forward<__nv_bfloat16>(num_tokens, hidden, tokens, text_type, features, rows, out, s)
              : forward<float>(num_tokens, hidden, tokens, text_type, features, rows, out, s);
}

int launch_assemble_backward(bool bf16, int64_t num_tokens, int64_t hidden, const void* grad_out,
                             const void* media_row, void* grad_tokens, void* grad_features, void* stream) {
  if (num_tokens == 0 || hidden == 0) return 0;
  const auto* rows = static_cast<const int32_t*>(media_row);
  const auto s = static_cast<cudaStream_t>(stream);
  return bf16 ? backward<__nv_bfloat16>(num_tokens, hidden, grad_out, rows, grad_tokens, grad_features, s)
              : backward<float>(num_tokens, hidden, grad_out, rows, grad_tokens, grad_features, s);
}

}  // namespace megatron_mm
