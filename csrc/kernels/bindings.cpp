// Python's door to the CUDA launchers. Pointers travel as integers (Tensor.data_ptr()), streams likewise.
#include <pybind11/pybind11.h>

#include "launch.h"

namespace {

using Address = uintptr_t;
void* at(Address address) { return reinterpret_cast<void*>(address); }

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of megatron_mm; megatron_mm.kernels.ops calls them.";
  module.def("assemble_forward",
             [](bool bf16, int64_t num_tokens, int64_t hidden, Address tokens, Address text_type, Address features,
                Address media_row, Address out, Address stream) {
               return megatron_mm::launch_assemble_forward(bf16, num_tokens, hidden, at(tokens), at(text_type),
                                                           at(features), at(media_row), at(out), at(stream));
             });
  module.def("assemble_backward",
             [](bool bf16, int64_t num_tokens, int64_t hidden, Address grad_out, Address media_row,
                Address grad_tokens, Address grad_features, Address stream) {
               return megatron_mm::launch_assemble_backward(bf16, num_tokens, hidden, at(grad_out), at(media_row),
                                                            at(grad_tokens), at(grad_features), at(stream));
             });
}
