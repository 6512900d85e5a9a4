// Python's door to the index kernels: sample order and packing. References are in megatron_mm/data.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "checksums.h"
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

py::array_t<int64_t> pack_sample(const Array<int32_t>& tokens, int capacity, const Array<int64_t>& cut_documents,
                      const Array<int64_t>& cut_first, const Array<int32_t>& cut_lengths, int64_t sample) {
  if (capacity < 1) throw std::invalid_argument("capacity starts at 1");
  const megatron_mm::Cuts cuts = view_cuts(cut_documents, cut_first, cut_lengths, capacity);
  const int32_t* data = tokens.data();
  const int64_t count = tokens.size();
  std::vector<int32_t> lengths;
  lengths.reserve(count + cut_lengths.size());
  megatron_mm::cut_documents(data, 0, count, capacity, cuts,
                             [&](int64_t, int32_t, int32_t length) { lengths.push_back(length); });
  std::vector<int32_t> bins(lengths.size());
  megatron_mm::pack_best_fit(lengths.data(), bins.size(), capacity, bins.data());
  std::vector<int64_t> records;  // shard, document, start, length of each piece
  auto bin = bins.begin();
  megatron_mm::cut_documents(data, 0, count, capacity, cuts, [&](int64_t document, int32_t start, int32_t length) {
    if (*bin++ == sample) records.insert(records.end(), {0, document, start, length});
  });
  return to_array(records).reshape({-1, 4});
}

// Whether `num_bytes` at `offset` could be read; a signal or a limit of the system may cut a read in pieces.
bool read_whole(int file, char* target, size_t num_bytes, int64_t offset) {
  while (num_bytes) {
    const ssize_t got = pread(file, target, num_bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    target += got, offset += got, num_bytes -= got;
  }
  return true;
}

constexpr int64_t INDEX_HEADER_BYTES = 34;  // shards/format.py, TOKEN_HEADER; so nothing behind it is aligned

// A shard's tokens and where its documents begin: lengths (int32), then pointers (int64), behind the index's header.
struct TokenIndex {
  int file, token_bytes;
  int64_t num_tokens, num_documents;
  megatron_mm::PageSums pages;  // of the tokens; none in shards whose tokens are checked before they are asked for
  megatron_mm::CheckedFile index;

  // Returns the byte at which tokens [start, start + count) of a document begin; -1 if the index disagrees about where
  // it ends, is not what was written, or the document is shorter.
  int64_t locate(int64_t document, int64_t start, int64_t count) const {
    if (document < 0 || document >= num_documents || start < 0) return -1;
    const int64_t pointers = INDEX_HEADER_BYTES + 4 * num_documents;
    int64_t first, stop = num_tokens * token_bytes;
    int32_t length;
    if (!index.read(&length, INDEX_HEADER_BYTES + 4 * document, 4)) return -1;
    if (!index.read(&first, pointers + 8 * document, 8)) return -1;
    if (document + 1 < num_documents && !index.read(&stop, pointers + 8 * (document + 1), 8)) return -1;
    if (stop - first != static_cast<int64_t>(length) * token_bytes || start + count > length) return -1;
    return first + start * token_bytes;
  }

  // Returns where in `buffer` tokens lie once the pages that hold them have been read into it; null if they are not
  // what was written.
  template <typename token_t>
  const token_t* read(std::vector<token_t>& buffer, int64_t offset, int64_t count) const {
    const int64_t stop = offset + count * token_bytes;
    int64_t first = offset, last = stop;
    if (pages.num_pages) {
      first = offset / pages.page_bytes * pages.page_bytes;
      last = (stop + pages.page_bytes - 1) / pages.page_bytes * pages.page_bytes;
      last = std::min(last, num_tokens * token_bytes);
    }
    buffer.resize((last - first) / token_bytes);
    auto* bytes = reinterpret_cast<char*>(buffer.data());
    if (!read_whole(file, bytes, last - first, first)) return nullptr;
    if (pages.num_pages && !pages.match(reinterpret_cast<uint8_t*>(bytes), last - first, first / pages.page_bytes)) {
      return nullptr;
    }
    return buffer.data() + (offset - first) / token_bytes;
  }
};

struct Rows {
  int64_t *tokens, *labels, *positions, *source;
};

template <typename token_t>
int64_t lay(const TokenIndex& index, const int64_t* documents, const int64_t* starts, const int64_t* lengths,
            const uint8_t* sources, int64_t count, Rows rows) {
  std::vector<token_t> buffer;
  for (int64_t piece = 0; piece < count; ++piece) {
    const int64_t length = lengths[piece], offset = index.locate(documents[piece], starts[piece], length + 1);
    if (offset < 0) return piece;
    const token_t* ids = index.read(buffer, offset, length + 1);
    if (!ids) return piece;
    for (int64_t i = 0; i < length; ++i) rows.tokens[i] = ids[i];
    for (int64_t i = 0; i < length; ++i) rows.labels[i] = ids[i + 1];
    for (int64_t i = 0; i < length; ++i) rows.positions[i] = i;
    std::fill_n(rows.source, length, sources[piece]);
    rows.tokens += length, rows.labels += length, rows.positions += length, rows.source += length;
  }
  return count;
}

uint32_t crc32(const py::bytes& data) {
  const auto view = static_cast<std::string_view>(data);
  return megatron_mm::crc32(reinterpret_cast<const uint8_t*>(view.data()), static_cast<int64_t>(view.size()));
}

template <typename scalar_t>
using InPlace = py::array_t<scalar_t, py::array::c_style>;

int64_t lay_pieces(int file, int token_bytes, int64_t num_tokens, const InPlace<uint32_t>& token_sums,
                   int64_t num_documents, const InPlace<uint8_t>& index_bytes, const InPlace<uint32_t>& index_sums,
                   InPlace<uint8_t>& index_passed, int64_t page_bytes, const Array<int64_t>& documents,
                   const Array<int64_t>& starts, const Array<int64_t>& lengths, const Array<uint8_t>& sources,
                   InPlace<int64_t>& tokens, InPlace<int64_t>& labels, InPlace<int64_t>& positions,
                   InPlace<int64_t>& source) {
  const py::ssize_t count = lengths.size();
  int64_t total = 0;
  for (py::ssize_t i = 0; i < count; ++i) {
    if (lengths.at(i) < 0) throw std::invalid_argument("a length is negative");
    total += lengths.at(i);
  }
  bool fits = documents.size() == count && starts.size() == count && sources.size() == count;
  for (const auto* row : {&tokens, &labels, &positions, &source}) fits = fits && row->size() == total;
  fits = fits && index_sums.size() == index_passed.size() && page_bytes > 0 && page_bytes % 4 == 0;
  if (!fits || (token_bytes != 2 && token_bytes != 4)) {
    throw std::invalid_argument("pieces and rows do not fit together");
  }
  const megatron_mm::PageSums index_pages{index_sums.data(), index_sums.size(), page_bytes};
  const megatron_mm::CheckedFile checked{index_bytes.data(), index_bytes.size(), index_pages,
                                         index_passed.mutable_data()};
  const megatron_mm::PageSums token_pages{token_sums.data(), token_sums.size(), page_bytes};
  const TokenIndex index{file, token_bytes, num_tokens, num_documents, token_pages, checked};
  const Rows rows{tokens.mutable_data(), labels.mutable_data(), positions.mutable_data(), source.mutable_data()};
  const auto work = token_bytes == 2 ? &lay<uint16_t> : &lay<int32_t>;
  const auto *which = documents.data(), *from = starts.data(), *sizes = lengths.data();
  const uint8_t* kinds = sources.data();
  py::gil_scoped_release unlocked;
  return work(index, which, from, sizes, kinds, count, rows);
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.doc() = "Sample order and packing in C++; megatron_mm.data.order and .packing call them.";
  module.attr("VERSION") = 3;  // megatron_mm/data/native.py refuses any other: count up when a function changes
  module.def("permute", &permute, py::arg("size"), py::arg("key"), py::arg("elements"),
             "Return the image of each element of [0, size) under the permutation of this key.");
  module.def("pack_best_fit", &pack_best_fit, py::arg("lengths"), py::arg("capacity"),
             "Return (bin of each piece, number of bins).");
  module.def("count_samples", &count_samples, py::arg("tokens"), py::arg("capacity"), py::arg("window_inputs"),
             py::arg("is_last"), py::arg("cut_documents"), py::arg("cut_first"), py::arg("cut_lengths"),
             py::arg("threads"),
             "Cut documents into windows; return (end of each, samples of each, tokens of all, long documents of all).");
  module.def("pack_sample", &pack_sample, py::arg("tokens"), py::arg("capacity"), py::arg("cut_documents"),
             py::arg("cut_first"), py::arg("cut_lengths"), py::arg("sample"),
             "Pack the documents of one window; return (0, document, start, length) of each piece of one sample.");
  module.def("crc32", &crc32, py::arg("data"), "Return the checksum of bytes, as zlib.crc32 does.");
  // noconvert: a copy of a row would be filled instead of the row, and a copy of the index is large.
  module.def("lay_pieces", &lay_pieces, py::arg("file"), py::arg("token_bytes"), py::arg("num_tokens"),
             py::arg("token_sums").noconvert(), py::arg("num_documents"), py::arg("index_bytes").noconvert(),
             py::arg("index_sums").noconvert(), py::arg("index_passed").noconvert(), py::arg("page_bytes"),
             py::arg("documents"),
             py::arg("starts"), py::arg("lengths"), py::arg("sources"), py::arg("tokens").noconvert(),
             py::arg("labels").noconvert(), py::arg("positions").noconvert(), py::arg("source").noconvert(),
             "Read pieces of documents end to end into rows; return how many were as written before one was not.");
}
