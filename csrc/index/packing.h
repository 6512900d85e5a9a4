// Best-fit packing of pieces into bins (Ding et al. 2024, "Fewer truncations improve language modeling"), window after
// window of documents, so that memory is bounded and a window can be packed again alone. megatron_mm/data/packing.py
// holds the reference and says what it does.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace megatron_mm {

// The open bins by the room they have left, as a linked list for each room; a 64-ary bitset finds the smallest room
// that is large enough.
class OpenBins {
 public:
  explicit OpenBins(int capacity)
      : capacity_(capacity), words_((capacity >> 6) + 1), summary_((words_.size() >> 6) + 1), top_(capacity + 1, -1) {}

  void add(int room, int64_t bin) {
    if (static_cast<size_t>(bin) >= below_.size()) below_.resize(2 * bin + 64);
    below_[bin] = top_[room];
    top_[room] = bin;
    words_[room >> 6] |= 1ULL << (room & 63);
    summary_[room >> 12] |= 1ULL << ((room >> 6) & 63);
  }

  // Takes out the bin that was added last among those with this room.
  int64_t take(int room) {
    const int64_t bin = top_[room];
    top_[room] = below_[bin];
    if (top_[room] < 0) {
      words_[room >> 6] &= ~(1ULL << (room & 63));
      if (!words_[room >> 6]) summary_[room >> 12] &= ~(1ULL << ((room >> 6) & 63));
    }
    return bin;
  }

  // Returns the smallest room >= wanted that a bin has, or -1.
  int smallest(int wanted) const {
    if (wanted > capacity_) return -1;
    size_t word = wanted >> 6;
    uint64_t found = words_[word] & (~0ULL << (wanted & 63));
    if (found) return static_cast<int>(word << 6) + __builtin_ctzll(found);
    size_t block = (word + 1) >> 6;
    if (block >= summary_.size()) return -1;
    found = summary_[block] & (~0ULL << ((word + 1) & 63));
    while (!found) {
      if (++block >= summary_.size()) return -1;
      found = summary_[block];
    }
    word = (block << 6) + __builtin_ctzll(found);
    return static_cast<int>(word << 6) + __builtin_ctzll(words_[word]);
  }

 private:
  int capacity_;
  std::vector<uint64_t> words_, summary_;
  std::vector<int64_t> top_, below_;  // last bin of each room, and the one before each bin
};

// Writes the bin of each piece, the longest first, and returns the number of bins. Lengths are in 1..capacity.
inline int64_t pack_best_fit(const int32_t* lengths, int64_t count, int capacity, int64_t* bin_of_piece) {
  OpenBins open(capacity);
  int64_t num_bins = 0;
  // A counting sort, longest first and in order among equals.
  std::vector<int64_t> place(capacity + 2), order(count);
  for (int64_t piece = 0; piece < count; ++piece) ++place[capacity - lengths[piece] + 1];
  for (int length = 0; length <= capacity; ++length) place[length + 1] += place[length];
  for (int64_t piece = 0; piece < count; ++piece) order[place[capacity - lengths[piece]]++] = piece;
  for (const int64_t piece : order) {
    int room = open.smallest(lengths[piece]);
    int64_t bin;
    if (room < 0) {
      bin = num_bins++;
      room = capacity;
    } else {
      bin = open.take(room);
    }
    bin_of_piece[piece] = bin;
    room -= lengths[piece];
    if (room > 0) open.add(room, bin);
  }
  return num_bins;
}

// Documents that are cut elsewhere than at every `capacity` inputs: document i of `documents`, which ascend, has the
// pieces [first[i], first[i + 1]) of `lengths`.
struct Cuts {
  const int64_t *documents, *first;
  const int32_t* lengths;
  int64_t count;
};

struct Pieces {
  std::vector<int64_t> documents;
  std::vector<int32_t> starts, lengths;

  void add(int64_t document, int64_t start, int64_t length) {
    documents.push_back(document);
    starts.push_back(static_cast<int32_t>(start));
    lengths.push_back(static_cast<int32_t>(length));
  }
};

// Cuts documents [begin, end) into pieces of at most `capacity` inputs; a document of n tokens has n - 1 inputs.
inline void cut_documents(const int32_t* tokens, int64_t begin, int64_t end, int capacity, const Cuts& cuts,
                          Pieces& pieces) {
  int64_t next = std::lower_bound(cuts.documents, cuts.documents + cuts.count, begin) - cuts.documents;
  for (int64_t document = begin; document < end; ++document) {
    const int64_t inputs = static_cast<int64_t>(tokens[document]) - 1;
    int64_t start = 0;
    if (next < cuts.count && cuts.documents[next] == document) {
      for (int64_t piece = cuts.first[next]; piece < cuts.first[next + 1]; start += cuts.lengths[piece++]) {
        pieces.add(document, start, cuts.lengths[piece]);
      }
      ++next;
      continue;
    }
    for (; start < inputs; start += capacity) pieces.add(document, start, std::min<int64_t>(capacity, inputs - start));
  }
}

// Cuts documents into windows of at least `window_inputs` inputs and writes where each ends; the rest is a window only
// if `is_last`.
inline std::vector<int64_t> window_ends(const int32_t* tokens, int64_t count, int64_t window_inputs, bool is_last) {
  std::vector<int64_t> ends;
  int64_t inputs = 0;
  for (int64_t document = 0; document < count; ++document) {
    inputs += std::max<int64_t>(0, static_cast<int64_t>(tokens[document]) - 1);
    if (inputs >= window_inputs) {
      ends.push_back(document + 1);
      inputs = 0;
    }
  }
  if (is_last && count && (ends.empty() || ends.back() != count)) ends.push_back(count);
  return ends;
}

// Returns the bins of each window, packed by `threads` threads.
inline std::vector<int64_t> count_bins(const int32_t* tokens, const std::vector<int64_t>& ends, int capacity,
                                       const Cuts& cuts, int threads) {
  std::vector<int64_t> bins(ends.size());
  std::atomic<size_t> next{0};
  const auto work = [&] {
    Pieces pieces;
    std::vector<int64_t> bin_of_piece;
    for (size_t window; (window = next++) < ends.size();) {
      pieces = {};
      cut_documents(tokens, window ? ends[window - 1] : 0, ends[window], capacity, cuts, pieces);
      bin_of_piece.resize(pieces.lengths.size());
      bins[window] = pack_best_fit(pieces.lengths.data(), pieces.lengths.size(), capacity, bin_of_piece.data());
    }
  };
  std::vector<std::thread> others;
  for (int number = 1; number < threads; ++number) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  return bins;
}

}  // namespace megatron_mm
