// A shard's tokens and where its documents begin, read and compared with their checksums, and laid into rows.
// References are in megatron_mm/data/token_row.py and packing.py.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <vector>

#include "checksums.h"

namespace megatron_mm {

constexpr int64_t INDEX_HEADER_BYTES = 34;  // shards/format.py, TOKEN_HEADER; so nothing behind it is aligned
constexpr int64_t DOCUMENT_BYTES = 16, FIRST_SOURCE = 40;  // DOCUMENT, and its first `source` behind MEDIA_HEADER

// A PIECE record of megatron_mm/data/packing.py.
struct Piece {
  int64_t shard, document, start, length;
};

// Whether `num_bytes` at `offset` could be read; a signal or a limit of the system may cut a read in pieces.
inline bool read_whole(int file, char* target, size_t num_bytes, int64_t offset) {
  while (num_bytes) {
    const ssize_t got = pread(file, target, num_bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    target += got, offset += got, num_bytes -= got;
  }
  return true;
}

// The index holds lengths (int32), then pointers (int64), behind its header.
struct TokenIndex {
  int file, index_file, token_bytes;
  int64_t num_tokens, num_documents;
  PageSums pages;  // of the tokens; none in shards whose tokens are checked before they are asked for
  CheckedFile index, media_index;

  // Writes the byte at which a document begins, or the end of all; returns whether the index is what was written.
  bool begin(int64_t document, int64_t* offset) const {
    *offset = num_tokens * token_bytes;
    if (document == num_documents) return true;
    return index.read(offset, INDEX_HEADER_BYTES + 4 * num_documents + 8 * document, 8);
  }

  // Writes the byte at which a document begins and its tokens. Returns false if the index disagrees about where it
  // ends, or is not what was written.
  bool find(int64_t document, int64_t* first, int32_t* length) const {
    int64_t stop;
    if (document < 0 || document >= num_documents) return false;
    if (!begin(document, first) || !begin(document + 1, &stop)) return false;
    if (!index.read(length, INDEX_HEADER_BYTES + 4 * document, 4)) return false;
    return *length > 0 && stop - *first == static_cast<int64_t>(*length) * token_bytes;
  }

  // Writes the tokens of documents [begin, stop); returns whether they are what was written. They are read, not mapped:
  // what is mapped counts as a process's memory.
  bool lengths(int64_t begin, int64_t stop, std::vector<int32_t>& target) const {
    if (begin < 0 || stop < begin || stop > num_documents) return false;
    const int64_t offset = INDEX_HEADER_BYTES + 4 * begin, num_bytes = 4 * (stop - begin);
    target.resize(stop - begin);
    return index.match(offset, num_bytes) &&
           read_whole(index_file, reinterpret_cast<char*>(target.data()), num_bytes, offset);
  }

  // Writes what kind of file a document came from; returns whether its record is what was written.
  bool source(int64_t document, uint8_t* source) const {
    return media_index.read(source, FIRST_SOURCE + DOCUMENT_BYTES * document, 1);
  }

  // Returns the byte at which tokens [start, start + count) of a document begin; -1 if it is shorter, or not found.
  int64_t locate(int64_t document, int64_t start, int64_t count) const {
    int64_t first;
    int32_t length;
    if (start < 0 || !find(document, &first, &length) || start + count > length) return -1;
    return first + start * token_bytes;
  }

  // Appends the pieces, as of `shard`, of inputs [position, stop) of all documents end to end; a document of n tokens
  // has n - 1. Returns false if one is not found.
  bool lay_end_to_end(int64_t position, int64_t stop, int64_t shard, std::vector<Piece>& pieces) const {
    int64_t low = 0, high = num_documents, first;  // documents before `low` begin at or before `position`
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (!begin(middle, &first)) return false;
      if (first / token_bytes - middle <= position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    for (int64_t document = low - 1; position < stop; ++document) {
      int32_t tokens;
      if (!find(document, &first, &tokens)) return false;
      const int64_t start = position - (first / token_bytes - document);
      const int64_t length = std::min<int64_t>(tokens - 1 - start, stop - position);
      if (length > 0) pieces.push_back({shard, document, start, length});
      position += length;
    }
    return true;
  }
};

// Tokens that were read of a shard: bytes [first, last), whole pages of them where pages have checksums.
template <typename token_t>
class TokenBuffer {
 public:
  explicit TokenBuffer(const TokenIndex& index) : index_(index) {}

  // Takes in a run of bytes that touches what is to be read, or is the first. Returns whether it does.
  bool extend(int64_t start, int64_t stop) {
    if (index_.pages.num_pages) {
      const int64_t page = index_.pages.page_bytes;
      start = start / page * page;
      stop = std::min((stop + page - 1) / page * page, index_.num_tokens * index_.token_bytes);
    }
    if (first_ == last_) {
      first_ = start, last_ = stop;
    } else if (start < first_ || start > last_) {
      return false;
    }
    last_ = std::max(last_, stop);
    return true;
  }

  // Reads what was taken in; returns whether it is what was written.
  bool read() {
    const int64_t size = last_ - first_;
    if (size > capacity_) {
      capacity_ = size;
      tokens_.reset(new token_t[size / sizeof(token_t)]);  // not std::vector, which would set it to zero
    }
    auto* bytes = reinterpret_cast<uint8_t*>(tokens_.get());
    if (!read_whole(index_.file, reinterpret_cast<char*>(bytes), size, first_)) return false;
    return !index_.pages.num_pages || index_.pages.match(bytes, size, first_ / index_.pages.page_bytes);
  }

  const token_t* at(int64_t offset) const { return tokens_.get() + (offset - first_) / sizeof(token_t); }

  void clear() { first_ = last_ = 0; }

 private:
  const TokenIndex& index_;
  std::unique_ptr<token_t[]> tokens_;
  int64_t capacity_ = 0, first_ = 0, last_ = 0;
};

struct Rows {
  int64_t *tokens, *labels, *positions, *origins;
  float* loss_mask;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEGATRON_MM_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MEGATRON_MM_WIDE
#endif

// Fills rows with the inputs of a piece, each with the token behind it as its label.
template <typename token_t>
MEGATRON_MM_WIDE void fill(const token_t* ids, int64_t length, int64_t origin, Rows rows) {
  for (int64_t i = 0; i < length; ++i) rows.tokens[i] = ids[i];
  for (int64_t i = 0; i < length; ++i) rows.labels[i] = ids[i + 1];
  for (int64_t i = 0; i < length; ++i) rows.positions[i] = i;
  for (int64_t i = 0; i < length; ++i) rows.origins[i] = origin;
  for (int64_t i = 0; i < length; ++i) rows.loss_mask[i] = 1.0f;
}

// Returns how many ids are `wanted`.
template <typename token_t>
MEGATRON_MM_WIDE int64_t count_id(const token_t* ids, int64_t length, int64_t wanted) {
  const auto id = static_cast<token_t>(wanted);
  if (id != wanted) return 0;
  int32_t count = 0;
  for (int64_t i = 0; i < length; ++i) count += ids[i] == id;
  return count;
}

// Lays pieces end to end. Those that lie side by side in the file are read at once. A document's origin is its source,
// counted from `first_origin`. Returns how many inputs are one of `placeholders`; -1 if not all could be read and are
// what was written: then rows are filled in part.
template <typename token_t>
int64_t lay(const TokenIndex& index, const Piece* pieces, int64_t count, int64_t first_origin,
            const std::vector<int64_t>& placeholders, Rows rows) {
  std::vector<int64_t> offsets(count);
  int64_t num_placeholders = 0;
  for (int64_t piece = 0; piece < count; ++piece) {
    offsets[piece] = index.locate(pieces[piece].document, pieces[piece].start, pieces[piece].length + 1);
    if (offsets[piece] < 0) return -1;
  }
  const auto end = [&](int64_t piece) { return offsets[piece] + (pieces[piece].length + 1) * index.token_bytes; };
  TokenBuffer<token_t> buffer(index);
  for (int64_t piece = 0, stop = 0; piece < count;) {
    buffer.clear();
    while (stop < count && buffer.extend(offsets[stop], end(stop))) ++stop;
    if (!buffer.read()) return -1;
    for (; piece < stop; ++piece) {
      uint8_t source;
      if (!index.source(pieces[piece].document, &source)) return -1;
      const int64_t length = pieces[piece].length;
      const token_t* ids = buffer.at(offsets[piece]);
      fill(ids, length, first_origin + source, rows);
      for (const int64_t id : placeholders) num_placeholders += count_id(ids, length, id);
      rows.tokens += length, rows.labels += length, rows.positions += length;
      rows.origins += length, rows.loss_mask += length;
    }
  }
  return num_placeholders;
}

}  // namespace megatron_mm
