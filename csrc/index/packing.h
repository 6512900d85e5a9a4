// Best-fit packing of pieces into bins in one pass and bounded memory (Ding et al. 2024, "Fewer truncations improve
// language modeling"). megatron_mm/data/packing.py holds the reference and says what it does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace megatron_mm {

// The open bins by the room they have left; a 64-ary bitset finds the smallest room that is large enough.
class OpenBins {
 public:
  explicit OpenBins(int capacity)
      : capacity_(capacity), words_((capacity >> 6) + 1), summary_((words_.size() >> 6) + 1), bins_(capacity + 1) {}

  void add(int room, int64_t bin) {
    bins_[room].push_back(bin);
    words_[room >> 6] |= 1ULL << (room & 63);
    summary_[room >> 12] |= 1ULL << ((room >> 6) & 63);
  }

  // Takes out the bin that was added last among those with this room.
  int64_t take(int room) {
    const int64_t bin = bins_[room].back();
    bins_[room].pop_back();
    if (bins_[room].empty()) {
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
  std::vector<std::vector<int64_t>> bins_;
};

// Writes the bin of each piece; returns the number of bins. Lengths are in 1..capacity.
inline int64_t pack_best_fit(const int32_t* lengths, int64_t count, int capacity, int64_t window, int64_t max_open,
                             int64_t* bin_of_piece) {
  OpenBins open(capacity);
  int64_t num_bins = 0, num_open = 0;
  std::vector<int64_t> order;
  for (int64_t start = 0; start < count; start += window) {
    order.clear();
    for (int64_t piece = start; piece < std::min(count, start + window); ++piece) order.push_back(piece);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    for (const int64_t piece : order) {
      int room = open.smallest(lengths[piece]);
      int64_t bin;
      if (room < 0) {
        bin = num_bins++;
        room = capacity;
        ++num_open;
      } else {
        bin = open.take(room);
      }
      bin_of_piece[piece] = bin;
      room -= lengths[piece];
      if (room > 0) {
        open.add(room, bin);
      } else {
        --num_open;
      }
    }
    for (; num_open > max_open; --num_open) open.take(open.smallest(1));  // the fullest bins are closed first
  }
  return num_bins;
}

}  // namespace megatron_mm
