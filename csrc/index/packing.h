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

// Which of the numbers 0..size-1 are in a set, as a 64-ary tree of bits in which the next one is found in a few steps.
class Bits {
 public:
  explicit Bits(int size) : words_((size >> 6) + 1), summary_((words_.size() >> 6) + 1) {}

  void add(int number) {
    words_[number >> 6] |= 1ULL << (number & 63);
    summary_[number >> 12] |= 1ULL << ((number >> 6) & 63);
  }

  void remove(int number) {
    words_[number >> 6] &= ~(1ULL << (number & 63));
    if (!words_[number >> 6]) summary_[number >> 12] &= ~(1ULL << ((number >> 6) & 63));
  }

  // Returns the smallest number >= wanted, or -1; wanted is below the size.
  int smallest(int wanted) const {
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
  std::vector<uint64_t> words_, summary_;
};

// Writes the bin of each piece, the longest first, and returns the number of bins. Lengths are in 1..capacity.
inline int32_t pack_best_fit(const int32_t* lengths, int64_t count, int capacity, int32_t* bin_of_piece) {
  // The pieces by their length: the first one of each, and the one after each piece.
  Bits present(capacity + 1), rooms(capacity + 1);
  std::vector<int32_t> first(capacity + 1, -1), next(count);
  for (int64_t piece = count - 1; piece >= 0; --piece) {
    const int length = lengths[piece];
    next[piece] = first[length];
    first[length] = static_cast<int32_t>(piece);
    present.add(capacity - length);  // reversed, so that the longest comes first
  }
  // The open bins by the room they have left: the last one of each room, and the one before each bin.
  std::vector<int32_t> top(capacity + 1, -1), below(count);
  int32_t num_bins = 0;
  for (int reversed = present.smallest(0); reversed >= 0;
       reversed = reversed < capacity ? present.smallest(reversed + 1) : -1) {
    const int length = capacity - reversed;
    for (int32_t piece = first[length]; piece >= 0;) {
      int room = rooms.smallest(length);
      int32_t bin;
      if (room < 0) {
        bin = num_bins++;
        room = capacity;
      } else {
        bin = top[room];
        top[room] = below[bin];
        if (top[room] < 0) rooms.remove(room);
      }
      // The next piece of this length goes into the bin that just took one, as long as it fits there.
      for (; piece >= 0 && room >= length; piece = next[piece], room -= length) bin_of_piece[piece] = bin;
      if (room > 0) {
        below[bin] = top[room];
        top[room] = bin;
        rooms.add(room);
      }
    }
  }
  return num_bins;
}

// Counts the bins that pack_best_fit makes of any pieces, without saying which piece goes where: pieces of one length,
// and bins of one room, are told apart by nothing, so they are taken together.
class BinCounter {
 public:
  explicit BinCounter(int capacity)
      : capacity_(capacity), lengths_(capacity + 1), rooms_(capacity + 1), pieces_(capacity + 1), open_(capacity + 1) {}

  void add(int length) {
    if (!pieces_[length]) lengths_.add(capacity_ - length);  // reversed, so that the longest comes first
    ++pieces_[length];
  }

  // Returns the bins of all pieces that were added, and forgets them.
  int64_t finish() {
    int64_t bins = 0;
    for (int next = lengths_.smallest(0); next >= 0; next = lengths_.smallest(next)) {
      const int length = capacity_ - next;
      int32_t count = pieces_[length];
      pieces_[length] = 0;
      lengths_.remove(next);
      while (count) {
        int room = rooms_.smallest(length);
        const bool is_new = room < 0;
        if (is_new) room = capacity_;
        const int32_t each = room / length, available = is_new ? count : open_[room];
        const int32_t full = std::min(available, count / each);
        const int32_t rest = full < available ? count - full * each : 0;  // into one bin that stays unfilled
        const int32_t used = full + (rest ? 1 : 0);
        if (is_new) {
          bins += used;
        } else if (!(open_[room] -= used)) {
          rooms_.remove(room);
        }
        open(room - each * length, full);
        if (rest) open(room - rest * length, 1);
        count -= full * each + rest;
      }
    }
    for (int room = rooms_.smallest(0); room >= 0; room = rooms_.smallest(room)) {
      open_[room] = 0;
      rooms_.remove(room);
    }
    return bins;
  }

 private:
  void open(int room, int32_t times) {
    if (!room || !times) return;
    if (!open_[room]) rooms_.add(room);
    open_[room] += times;
  }

  int capacity_;
  Bits lengths_, rooms_;
  std::vector<int32_t> pieces_, open_;
};

// Documents that are cut elsewhere than at every `capacity` inputs: document i of `documents`, which ascend, has the
// pieces [first[i], first[i + 1]) of `lengths`.
struct Cuts {
  const int64_t *documents, *first;
  const int32_t* lengths;
  int64_t count;
};

// Calls `take(document, start, length)` for each piece of documents [begin, end), in their order; a document of n
// tokens has n - 1 inputs.
template <typename Take>
inline void cut_documents(const int32_t* tokens, int64_t begin, int64_t end, int capacity, const Cuts& cuts,
                          Take take) {
  int64_t next = std::lower_bound(cuts.documents, cuts.documents + cuts.count, begin) - cuts.documents;
  for (int64_t document = begin; document < end; ++document) {
    const int32_t inputs = tokens[document] - 1;
    if (next < cuts.count && cuts.documents[next] == document) {
      int32_t start = 0;
      for (int64_t piece = cuts.first[next]; piece < cuts.first[next + 1]; start += cuts.lengths[piece++]) {
        take(document, start, cuts.lengths[piece]);
      }
      ++next;
      continue;
    }
    if (inputs > 0 && inputs <= capacity) {
      take(document, 0, inputs);
      continue;
    }
    for (int64_t start = 0; start < inputs; start += capacity) {
      take(document, static_cast<int32_t>(start), static_cast<int32_t>(std::min<int64_t>(capacity, inputs - start)));
    }
  }
}

// What there is in the documents that whole windows were made of.
struct Windows {
  std::vector<int64_t> ends, bins;  // the document behind each window, and the bins of it
  int64_t tokens = 0, long_documents = 0;
};

// Cuts documents into windows of at least `window_inputs` inputs; the rest is a window only if `is_last`.
inline Windows cut_windows(const int32_t* tokens, int64_t count, int capacity, int64_t window_inputs, bool is_last) {
  Windows windows;
  int64_t inputs = 0, all = 0, longs = 0;
  for (int64_t document = 0; document < count; ++document) {
    const int32_t length = tokens[document];
    inputs += std::max(0, length - 1);
    all += length;
    longs += length - 1 > capacity;
    if (inputs >= window_inputs || (is_last && document + 1 == count)) {
      windows.ends.push_back(document + 1);
      windows.tokens = all;
      windows.long_documents = longs;
      inputs = 0;
    }
  }
  return windows;
}

// Fills in the bins of each window, by `threads` threads.
inline void count_bins(const int32_t* tokens, int capacity, const Cuts& cuts, int threads, Windows& windows) {
  const std::vector<int64_t>& ends = windows.ends;
  windows.bins.resize(ends.size());
  std::atomic<size_t> next{0};
  const auto work = [&] {
    BinCounter counter(capacity);
    for (size_t window; (window = next++) < ends.size();) {
      cut_documents(tokens, window ? ends[window - 1] : 0, ends[window], capacity, cuts,
                    [&](int64_t, int32_t, int32_t length) { counter.add(length); });
      windows.bins[window] = counter.finish();
    }
  };
  std::vector<std::thread> others;
  for (int number = 1; number < threads; ++number) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
}

}  // namespace megatron_mm
