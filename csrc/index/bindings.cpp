// Python's door to the index kernels: sample order and packing. References are in megatron_mm/data.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "packing.h"
#include "permutation.h"

namespace py = pybind11;

namespace {

template <typename scalar_t>
using Array = py::array_t<scalar_t, py::array::c_style | py::array::forcecast>;

py::array_t<int64_t> permute(uint64_t size, uint64_t key, const Array<int64_t>& elements) {
  py::array_t<int64_t> permuted(elements.size());
  const int64_t* in = elements.data();
  int64_t* out = permuted.mutable_data();
  for (py::ssize_t i = 0; i < elements.size(); ++i) {
    if (in[i] < 0 || static_cast<uint64_t>(in[i]) >= size) throw std::out_of_range("element outside [0, size)");
  }
  const py::ssize_t count = elements.size();
  py::gil_scoped_release unlocked;
  const megatron_mm::Permutation permutation(size, key);
  for (py::ssize_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(permutation(in[i]));
  return permuted;
}

py::tuple pack_best_fit(const Array<int32_t>& lengths, int capacity, int64_t window, int64_t max_open) {
  if (capacity < 1 || window < 1 || max_open < 0) throw std::invalid_argument("capacity and window start at 1");
  const int32_t* length = lengths.data();
  const py::ssize_t count = lengths.size();
  for (py::ssize_t i = 0; i < count; ++i) {
    if (length[i] < 1 || length[i] > capacity) throw std::invalid_argument("a length is outside 1..capacity");
  }
  py::array_t<int64_t> bin_of_piece(count);
  int64_t* bins = bin_of_piece.mutable_data();
  int64_t num_bins;
  {
    py::gil_scoped_release unlocked;
    num_bins = megatron_mm::pack_best_fit(length, count, capacity, window, max_open, bins);
  }
  return py::make_tuple(bin_of_piece, num_bins);
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.doc() = "Sample order and packing in C++; megatron_mm.data.order and .packing call them.";
  module.def("permute", &permute, py::arg("size"), py::arg("key"), py::arg("elements"),
             "Return the image of each element of [0, size) under the permutation of this key.");
  module.def("pack_best_fit", &pack_best_fit, py::arg("lengths"), py::arg("capacity"), py::arg("window"),
             py::arg("max_open"), "Return (bin of each piece, number of bins).");
}
