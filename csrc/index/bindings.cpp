// Python's door to the index kernels: sample order and packing. References are in megatron_mm/data.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string_view>
#include <vector>

#include "checksums.h"
#include "packing.h"
#include "permutation.h"
#include "token_index.h"

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
  py::array_t<int32_t> bin_of_piece(count);
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
  megatron_mm::Windows windows;
  {
    py::gil_scoped_release unlocked;
    windows = megatron_mm::cut_windows(data, count, capacity, window_inputs, is_last);
    megatron_mm::count_bins(data, capacity, cuts, threads, windows);
  }
  return py::make_tuple(to_array(windows.ends), to_array(windows.bins), windows.tokens, windows.long_documents);
}

uint32_t crc32(const py::bytes& data) {
  const auto view = static_cast<std::string_view>(data);
  return megatron_mm::crc32(reinterpret_cast<const uint8_t*>(view.data()), static_cast<int64_t>(view.size()));
}

template <typename scalar_t>
using InPlace = py::array_t<scalar_t, py::array::c_style>;

template <typename scalar_t>
InPlace<scalar_t> in_place(const py::handle& array) {
  if (!InPlace<scalar_t>::check_(array)) throw py::type_error("an index has an array of another type");
  return py::reinterpret_borrow<InPlace<scalar_t>>(array);
}

megatron_mm::CheckedFile view_file(const py::handle& bytes, const py::handle& sums, const py::handle& passed,
                                   int64_t page_bytes) {
  const auto content = in_place<uint8_t>(bytes);
  const auto expected = in_place<uint32_t>(sums);
  auto seen = in_place<uint8_t>(passed);
  if (expected.size() != seen.size()) throw std::invalid_argument("checksums and pages do not fit together");
  return {content.data(), content.size(), {expected.data(), expected.size(), page_bytes}, seen.mutable_data()};
}

// Views what ShardReader.token_index returns, which must outlive it.
megatron_mm::TokenIndex view_index(const py::tuple& index) {
  if (index.size() != 13) throw std::invalid_argument("an index has thirteen parts");
  const auto token_bytes = index[2].cast<int>();
  const auto page_bytes = index[5].cast<int64_t>();
  const bool is_known = token_bytes == 2 || token_bytes == 4 || token_bytes == 8;
  if (page_bytes < 1 || page_bytes % 8 != 0 || !is_known) {
    throw std::invalid_argument("tokens do not fit into pages");
  }
  const auto token_sums = in_place<uint32_t>(index[6]);
  return {index[0].cast<int>(),
          index[1].cast<int>(),
          token_bytes,
          index[3].cast<int64_t>(),
          index[4].cast<int64_t>(),
          {token_sums.data(), token_sums.size(), page_bytes},
          view_file(index[7], index[8], index[9], page_bytes),
          view_file(index[10], index[11], index[12], page_bytes)};
}

py::array_t<int64_t> to_array(const std::vector<megatron_mm::Piece>& pieces) {
  const auto* numbers = reinterpret_cast<const int64_t*>(pieces.data());
  return py::array_t<int64_t>({static_cast<py::ssize_t>(pieces.size()), py::ssize_t{4}}, numbers);
}

py::object pack_sample(const py::tuple& parts, int64_t begin, int64_t stop, int capacity,
                       const Array<int64_t>& cut_documents, const Array<int64_t>& cut_first,
                       const Array<int32_t>& cut_lengths, int64_t sample, int64_t shard) {
  if (capacity < 1 || sample < 0) throw std::invalid_argument("capacity starts at 1, and samples at 0");
  const megatron_mm::Cuts cuts = view_cuts(cut_documents, cut_first, cut_lengths, capacity);
  const auto index = view_index(parts);
  std::vector<megatron_mm::Piece> pieces;
  bool found;
  {
    py::gil_scoped_release unlocked;
    std::vector<int32_t> tokens;
    found = index.lengths(begin, stop, tokens);
    if (found) {
      megatron_mm::pack_sample(tokens, capacity, cuts, sample, [&](int64_t document, int32_t start, int32_t length) {
        pieces.push_back({shard, begin + document, start, length});
      });
    }
  }
  if (!found) return py::none();
  return to_array(pieces);
}

py::object lay_end_to_end(const py::tuple& parts, int64_t position, int64_t stop, int64_t shard) {
  if (position < 0) throw std::invalid_argument("positions start at 0");
  const auto index = view_index(parts);
  std::vector<megatron_mm::Piece> pieces;
  bool found;
  {
    py::gil_scoped_release unlocked;
    found = index.lay_end_to_end(position, stop, shard, pieces);
  }
  if (!found) return py::none();
  return to_array(pieces);
}

int64_t lay_pieces(const py::tuple& parts, const InPlace<int64_t>& pieces, int64_t first_origin,
                   const std::vector<int64_t>& placeholders, InPlace<int64_t>& tokens, InPlace<int64_t>& labels,
                   InPlace<int64_t>& positions, InPlace<int64_t>& origins, InPlace<float>& loss_mask) {
  if (pieces.ndim() != 2 || pieces.shape(1) != 4) throw std::invalid_argument("a piece is four numbers");
  const auto* records = reinterpret_cast<const megatron_mm::Piece*>(pieces.data());
  const int64_t count = pieces.shape(0);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (records[i].length < 0) throw std::invalid_argument("a length is negative");
    total += records[i].length;
  }
  bool fits = loss_mask.size() == total;
  for (const auto* row : {&tokens, &labels, &positions, &origins}) fits = fits && row->size() == total;
  if (!fits) throw std::invalid_argument("pieces and rows do not fit together");
  const auto index = view_index(parts);
  const megatron_mm::Rows rows{tokens.mutable_data(), labels.mutable_data(), positions.mutable_data(),
                               origins.mutable_data(), loss_mask.mutable_data()};
  const auto work = index.token_bytes == 2   ? &megatron_mm::lay<uint16_t>
                    : index.token_bytes == 4 ? &megatron_mm::lay<int32_t>
                                             : &megatron_mm::lay<int64_t>;
  py::gil_scoped_release unlocked;
  return work(index, records, count, first_origin, placeholders, rows);
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.doc() = "Sample order and packing in C++; megatron_mm.data.order and .packing call them.";
  module.attr("VERSION") = 5;  // megatron_mm/data/native.py refuses any other: count up when a function changes
  module.def("permute", &permute, py::arg("size"), py::arg("key"), py::arg("elements"),
             "Return the image of each element of [0, size) under the permutation of this key.");
  module.def("pack_best_fit", &pack_best_fit, py::arg("lengths"), py::arg("capacity"),
             "Return (bin of each piece, number of bins).");
  module.def("count_samples", &count_samples, py::arg("tokens"), py::arg("capacity"), py::arg("window_inputs"),
             py::arg("is_last"), py::arg("cut_documents"), py::arg("cut_first"), py::arg("cut_lengths"),
             py::arg("threads"),
             "Cut documents into windows; return (end of each, samples of each, tokens of all, long documents of all).");
  module.def("pack_sample", &pack_sample, py::arg("index"), py::arg("begin"), py::arg("stop"), py::arg("capacity"),
             py::arg("cut_documents"), py::arg("cut_first"), py::arg("cut_lengths"), py::arg("sample"),
             py::arg("shard"),
             "Pack documents [begin, stop); return (shard, document, start, length) of each piece of one sample; None "
             "if the index is not as written.");
  module.def("crc32", &crc32, py::arg("data"), "Return the checksum of bytes, as zlib.crc32 does.");
  module.def("lay_end_to_end", &lay_end_to_end, py::arg("index"), py::arg("position"), py::arg("stop"),
             py::arg("shard"),
             "Return (shard, document, start, length) of the pieces of inputs [position, stop) of all documents end to "
             "end; None if the index is not as written, or disagrees with itself.");
  // noconvert: a copy of a row would be filled instead of the row.
  module.def("lay_pieces", &lay_pieces, py::arg("index"), py::arg("pieces").noconvert(), py::arg("first_origin"),
             py::arg("placeholders"), py::arg("tokens").noconvert(), py::arg("labels").noconvert(),
             py::arg("positions").noconvert(), py::arg("origins").noconvert(), py::arg("loss_mask").noconvert(),
             "Read (shard, document, start, length) pieces end to end into rows; return how many tokens are "
             "placeholders, -1 if not all are as written.");
}
