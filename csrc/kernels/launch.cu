// The entries of launch.h: from addresses to types.
#include "launch.h"

#include <type_traits>

#include "assemble_embeddings.cuh"
#include "cross_entropy.cuh"
#include "mqa_rope.cuh"
#include "rms_norm.cuh"
#include "swiglu.cuh"
#include "token_rows.cuh"

namespace megatron_mm::entry {
namespace {

// Converts to whichever pointer the launcher of the chosen type takes.
struct Address {
  const void* address;

  template <typename Pointed>
  operator Pointed*() const {
    return static_cast<Pointed*>(const_cast<void*>(address));
  }
};

// Calls launch(scalar_t{}) and returns the error. A launcher that can refuse returns bool.
template <typename Launch>
int with_type(bool bf16, Launch launch) {
  bool fits = true;
  const auto run = [&](auto kind) {
    if constexpr (std::is_void_v<decltype(launch(kind))>) {
      launch(kind);
    } else {
      fits = launch(kind);
    }
  };
  if (bf16) {
    run(__nv_bfloat16{});
  } else {
    run(float{});
  }
  return fits ? static_cast<int>(cudaGetLastError()) : kUnsupported;
}

}  // namespace

int assemble_forward(bool bf16, int64_t rows, int64_t columns, const scalar* tokens, const scalar* text_type,
                     const scalar* features, const void* media_row, scalar* out, void* stream) {
  return with_type(bf16, [&](auto kind) {
    launch_assemble_forward<decltype(kind)>(rows, columns, Address{tokens}, Address{text_type}, Address{features},
                                            Address{media_row}, Address{out}, stream);
  });
}

int assemble_backward(bool bf16, int64_t rows, int64_t columns, int64_t blocks, const scalar* grad_out,
                      const void* media_row, scalar* grad_tokens, scalar* grad_features, void* type_partials,
                      void* stream) {
  return with_type(bf16, [&](auto kind) {
    launch_assemble_backward<decltype(kind)>(rows, columns, blocks, Address{grad_out}, Address{media_row},
                                             Address{grad_tokens}, Address{grad_features}, Address{type_partials},
                                             stream);
  });
}

int token_rows_forward(bool bf16, int64_t rows, int64_t columns, int64_t vocab, int64_t first_id, const scalar* table,
                       const void* ids, scalar* out, void* stream) {
  return with_type(bf16, [&](auto kind) {
    launch_token_rows_forward<decltype(kind)>(rows, columns, vocab, first_id, Address{table}, Address{ids},
                                              Address{out}, stream);
  });
}

int token_rows_backward(bool bf16, int64_t rows, int64_t columns, int64_t vocab, int64_t first_id,
                        const scalar* grad_out, const void* sorted_ids, const void* order, scalar* grad_table,
                        void* carries, void* stream) {
  return with_type(bf16, [&](auto kind) {
    launch_token_rows_backward<decltype(kind)>(rows, columns, vocab, first_id, Address{grad_out}, Address{sorted_ids},
                                               Address{order}, Address{grad_table}, Address{carries}, stream);
  });
}

int swiglu(bool bf16, int64_t rows, int64_t columns, const scalar* grad_out, const scalar* gate_and_up, scalar* result,
           void* stream) {
  return with_type(bf16, [&](auto kind) {
    launch_swiglu<decltype(kind)>(rows, columns, Address{grad_out}, Address{gate_and_up}, Address{result}, stream);
  });
}

int rms_norm_forward(bool bf16, int64_t rows, int64_t columns, double epsilon, const scalar* in, const scalar* residual,
                     const scalar* weight, scalar* sum, scalar* normed, void* inverse_rms, void* stream) {
  return with_type(bf16, [&](auto kind) {
    return launch_rms_norm_forward<decltype(kind)>(rows, columns, epsilon, Address{in}, Address{residual},
                                                   Address{weight}, Address{sum}, Address{normed},
                                                   Address{inverse_rms}, stream);
  });
}

int rms_norm_backward(bool bf16, int64_t rows, int64_t columns, int64_t blocks, const scalar* grad_normed,
                      const scalar* grad_sum, const scalar* sum, const scalar* weight, const void* inverse_rms,
                      scalar* grad_in, void* weight_partials, void* stream) {
  return with_type(bf16, [&](auto kind) {
    return launch_rms_norm_backward<decltype(kind)>(rows, columns, blocks, Address{grad_normed}, Address{grad_sum},
                                                    Address{sum}, Address{weight}, Address{inverse_rms},
                                                    Address{grad_in}, Address{weight_partials}, stream);
  });
}

int mqa_rope_forward(bool bf16, int64_t tokens, int64_t heads, int64_t groups, int64_t head_dim, int64_t stride,
                     double epsilon, const scalar* query, const scalar* key_value, const void* cos, const void* sin,
                     const scalar* query_weight, const scalar* key_weight, scalar* new_query, scalar* new_key,
                     scalar* new_value, void* stream) {
  return with_type(bf16, [&](auto kind) {
    const RopeTensors<decltype(kind)> at{Address{query},        Address{key_value},  Address{cos},
                                         Address{sin},          Address{query_weight}, Address{key_weight},
                                         Address{new_query},    Address{new_key},    Address{new_value}};
    return launch_mqa_rope_forward<decltype(kind)>(tokens, heads, groups, head_dim, stride, epsilon, at, stream);
  });
}

int mqa_rope_backward(bool bf16, int64_t tokens, int64_t heads, int64_t groups, int64_t head_dim, int64_t stride,
                      int64_t blocks, double epsilon, const scalar* query, const scalar* key_value, const void* cos,
                      const void* sin, const scalar* query_weight, const scalar* key_weight, const scalar* grad_new_query,
                      const scalar* grad_new_key, const scalar* grad_new_value, scalar* grad_query,
                      scalar* grad_key_value, void* weight_partials, void* stream) {
  return with_type(bf16, [&](auto kind) {
    const RopeTensors<decltype(kind)> at{Address{query},          Address{key_value},    Address{cos},
                                         Address{sin},            Address{query_weight}, Address{key_weight},
                                         Address{grad_new_query}, Address{grad_new_key}, Address{grad_new_value}};
    return launch_mqa_rope_backward<decltype(kind)>(tokens, heads, groups, head_dim, stride, blocks, epsilon, at,
                                                    Address{grad_query}, Address{grad_key_value},
                                                    Address{weight_partials}, stream);
  });
}

int cross_entropy_statistics(bool bf16, int64_t rows, int64_t columns, int64_t first_id, const scalar* logits,
                             const void* labels, const void* mask, void* statistics, void* stream) {
  return with_type(bf16, [&](auto kind) {
    launch_cross_entropy_statistics<decltype(kind)>(rows, columns, first_id, Address{logits}, Address{labels},
                                                    Address{mask}, Address{statistics}, stream);
  });
}

int cross_entropy_combine(int64_t rows, int64_t parts, double z_loss, const void* all_statistics, const void* mask,
                          void* losses, void* log_z, void* stream) {
  launch_combine(rows, parts, z_loss, Address{all_statistics}, Address{mask}, Address{losses}, Address{log_z}, stream);
  return static_cast<int>(cudaGetLastError());
}

int cross_entropy_backward(bool bf16, int64_t rows, int64_t columns, int64_t first_id, double z_loss,
                           const void* grad_losses, const void* labels, const void* mask, const void* log_z,
                           scalar* logits, void* stream) {
  return with_type(bf16, [&](auto kind) {
    launch_cross_entropy_backward<decltype(kind)>(rows, columns, first_id, z_loss, Address{grad_losses},
                                                  Address{labels}, Address{mask}, Address{log_z}, Address{logits},
                                                  stream);
  });
}

}  // namespace megatron_mm::entry
