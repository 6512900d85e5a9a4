// What the bindings call: plain pointers and a stream, so that neither side needs torch's headers.
#pragma once

#include <cstdint>

namespace megatron_mm {

// Each returns a cudaError_t as int. Pointers are device memory; media_row is int32, the rest FP32 or BF16.
int launch_assemble_forward(bool bf16, int64_t num_tokens, int64_t hidden, const void* tokens, const void* text_type,
                            const void* features, const void* media_row, void* out, void* stream);
int launch_assemble_backward(bool bf16, int64_t num_tokens, int64_t hidden, const void* grad_out,
                             const void* media_row, void* grad_tokens, void* grad_features, void* stream);

}  // namespace megatron_mm
