// Python's door to the index kernels: sample order and packing. References are in megatron_mm/data.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

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

template <typename scalar_t>
py::array_t<scalar_t> to_array(const std::vector<scalar_t>& values) {
  return py::array_t<scalar_t>(values.size(), values.data());
}

py::tuple pack_best_fit(const Array<int32_t>& lengths, int capacity) {
  if (capacity < 1) throw std::invalid_argument("capacity starts at 1");
  const int32_t* length = lengths.data();
  const py::ssize_t count = lengths.size();
  for (py::ssize_t i = 0; i < count; ++i) {
    if (length[i] < 1 || length[i] > capacity) throw std::invalid_argument("a length is outside 1..capacity");
  }
  py::array_t<int64_t> bin_of_piece(count);
  const int64_t num_bins = megatron_mm::pack_best_fit(length, count, capacity, bin_of_piece.mutable_data());
  return py::make_tuple(bin_of_piece, num_bins);
}

megatron_mm::Cuts view_cuts(const Array<int64_t>& documents, const Array<int64_t>& first,
                            const Array<int32_t>& lengths, int capacity) {
  if (first.size() != documents.size() + 1 || first.at(documents.size()) != lengths.size()) {
    throw std::invalid_argument("cuts do not fit together");
  }
  for (py::ssize_t i = 0; i < lengths.size(); ++i) {
    if (lengths.at(i) < 1 || lengths.at(i) > capacity) throw std::invalid_argument("a piece is outside 1..capacity");
  }
  return {documents.data(), first.data(), lengths.data(), documents.size()};
}

py::tuple count_samples(const Array<int32_t>& tokens, int capacity, int64_t window_inputs, bool is_last,
                        const Array<int64_t>& cut_documents, const Array<int64_t>& cut_first,
                        const Array<int32_t>& cut_lengths, int threads) {
  if (capacity < 1 || window_inputs < 1) throw std::invalid_argument("capacity and window start at 1");
  const megatron_mm::Cuts cuts = view_cuts(cut_documents, cut_first, cut_lengths, capacity);
  const int32_t* data = tokens.data();
  const int64_t count = tokens.size();
  std::vector<int64_t> ends, bins;
  {
    py::gil_scoped_release unlocked;
    ends = megatron_mm::window_ends(data, count, window_inputs, is_last);
    bins = megatron_mm::count_bins(data, ends, capacity, cuts, threads);
  }
  return py::make_tuple(to_array(ends), to_array(bins));
}

py::tuple pack_window(const Array<int32_t>& tokens, int capacity, const Array<int64_t>& cut_documents,
                      const Array<int64_t>& cut_first, const Array<int32_t>& cut_lengths) {
  if (capacity < 1) throw std::invalid_argument("capacity starts at 1");
  const megatron_mm::Cuts cuts = view_cuts(cut_documents, cut_first, cut_lengths, capacity);
  megatron_mm::Pieces pieces;
  megatron_mm::cut_documents(tokens.data(), 0, tokens.size(), capacity, cuts, pieces);
  std::vector<int64_t> bins(pieces.lengths.size());
  megatron_mm::pack_best_fit(pieces.lengths.data(), bins.size(), capacity, bins.data());
  return py::make_tuple(to_array(pieces.documents), to_array(pieces.starts), to_array(pieces.lengths), to_array(bins));
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.doc() = "Sample order and packing in C++; megatron_mm.data.order and .packing call them.";
  module.def("permute", &permute, py::arg("size"), py::arg("key"), py::arg("elements"),
             "Return the image of each element of [0, size) under the permutation of this key.");
  module.def("pack_best_fit", &pack_best_fit, py::arg("lengths"), py::arg("capacity"),
             "Return (bin of each piece, number of bins).");
  module.def("count_samples", &count_samples, py::arg("tokens"), py::arg("capacity"), py::arg("window_inputs"),
             py::arg("is_last"), py::arg("cut_documents"), py::arg("cut_first"), py::arg("cut_lengths"),
             py::arg("threads"), "Cut documents into windows; return (end of each window, its samples).");
  module.def("pack_window", &pack_window, py::arg("tokens"), py::arg("capacity"), py::arg("cut_documents"),
             py::arg("cut_first"), py::arg("cut_lengths"),
             "Pack the documents of one window; return (document, start, length, sample) of each piece.");
}
