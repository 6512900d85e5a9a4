// What the bindings call: plain pointers and a stream, so that neither side needs torch's headers.
//
// Shapes and meaning stand in the .cuh of each kernel. Pointers are device memory: of type `scalar` BF16 or FP32 as
// `bf16` says, the rest as their .cuh says; those that may be null say so there. `stream` is a cudaStream_t.
// Each returns a cudaError_t, or kUnsupported where a row or head is wider than the kernel holds.
#pragma once

#include "call.h"

namespace megatron_mm::entry {

constexpr int kUnsupported = -1;
using scalar = void;

int assemble_forward(bool bf16, int64_t rows, int64_t columns, const scalar* tokens, const scalar* text_type,
                     const scalar* features, const void* media_row, scalar* out, void* stream);
int assemble_backward(bool bf16, int64_t rows, int64_t columns, int64_t blocks, const scalar* grad_out,
                      const void* media_row, scalar* grad_tokens, scalar* grad_features, void* type_partials,
                      void* stream);
int token_rows_forward(bool bf16, int64_t rows, int64_t columns, int64_t vocab, int64_t first_id, const scalar* table,
                       const void* ids, scalar* out, void* stream);
int token_rows_backward(bool bf16, int64_t rows, int64_t columns, int64_t vocab, int64_t first_id,
                        const scalar* grad_out, const void* sorted_ids, const void* order, scalar* grad_table,
                        void* carries, void* stream);
int swiglu(bool bf16, int64_t rows, int64_t columns, const scalar* grad_out, const scalar* gate_and_up, scalar* result,
           void* stream);
int rms_norm_forward(bool bf16, int64_t rows, int64_t columns, double epsilon, const scalar* in, const scalar* residual,
                     const scalar* weight, scalar* sum, scalar* normed, void* inverse_rms, void* stream);
int rms_norm_backward(bool bf16, int64_t rows, int64_t columns, int64_t blocks, const scalar* grad_normed,
                      const scalar* grad_sum, const scalar* sum, const scalar* weight, const void* inverse_rms,
                      scalar* grad_in, void* weight_partials, void* stream);
int mqa_rope_forward(bool bf16, int64_t tokens, int64_t heads, int64_t groups, int64_t head_dim, int64_t stride,
                     double epsilon, const scalar* query, const scalar* key_value, const void* cos, const void* sin,
                     const scalar* query_weight, const scalar* key_weight, scalar* new_query, scalar* new_key,
                     scalar* new_value, void* stream);
int mqa_rope_backward(bool bf16, int64_t tokens, int64_t heads, int64_t groups, int64_t head_dim, int64_t stride,
                      int64_t blocks, double epsilon, const scalar* query, const scalar* key_value, const void* cos,
                      const void* sin, const scalar* query_weight, const scalar* key_weight, const scalar* grad_new_query,
                      const scalar* grad_new_key, const scalar* grad_new_value, scalar* grad_query,
                      scalar* grad_key_value, void* weight_partials, void* stream);
int cross_entropy_statistics(bool bf16, int64_t rows, int64_t columns, int64_t first_id, const scalar* logits,
                             const void* labels, const void* mask, void* statistics, void* stream);
int cross_entropy_combine(int64_t rows, int64_t parts, double z_loss, const void* all_statistics, const void* mask,
                          void* losses, void* log_z, void* stream);
int cross_entropy_backward(bool bf16, int64_t rows, int64_t columns, int64_t first_id, double z_loss,
                           const void* grad_losses, const void* labels, const void* mask, const void* log_z,
                           scalar* logits, void* stream);

}  // namespace megatron_mm::entry

// Every entry, for the bindings and for the tests that run them on the host.
#define MM_KERNEL(name) MM_ENTRY(megatron_mm::entry::name, name)
namespace megatron_mm {
inline constexpr Entry kEntries[] = {
    MM_KERNEL(assemble_forward) MM_KERNEL(assemble_backward) MM_KERNEL(token_rows_forward)
    MM_KERNEL(token_rows_backward) MM_KERNEL(swiglu) MM_KERNEL(rms_norm_forward) MM_KERNEL(rms_norm_backward)
    MM_KERNEL(mqa_rope_forward) MM_KERNEL(mqa_rope_backward) MM_KERNEL(cross_entropy_statistics)
    MM_KERNEL(cross_entropy_combine) MM_KERNEL(cross_entropy_backward)
};
}  // namespace megatron_mm
#undef MM_KERNEL
