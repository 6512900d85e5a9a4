// Best-fit packing of pieces into bins (Ding et al. 2024, "Fewer truncations improve language modeling"), window after
// window of documents, so that memory is bounded and a window can be packed again alone. megatron_mm/data/packing.py
// holds the reference and says what it does.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace megatron_mm {

// Numbers of 1..largest, taken in descending order; what is added meanwhile is below the one that was taken last.
class Descending {
 public:
  explicit Descending(int largest) : words_((largest >> 6) + 1), word_(words_.size() - 1) {}

  void add(int number) { words_[number >> 6] |= 1ULL << (number & 63); }

  // Returns the largest number and takes it out; 0 if there is none.
  int take() {
    while (!words_[word_]) {
      if (!word_) return restart();
      --word_;
    }
    const int bit = 63 - __builtin_clzll(words_[word_]);
    words_[word_] &= ~(1ULL << bit);
    return static_cast<int>(word_ << 6) + bit;
  }

 private:
  int restart() {
    word_ = words_.size() - 1;
    return 0;
  }

  std::vector<uint64_t> words_;
  size_t word_;
};

// Writes the bin of each piece, the longest first, and returns the number of bins. Lengths are in 1..capacity. Stops
// once bin `wanted` is full, if there is one to stop at: pieces that have no bin by then keep what stood there.
//
// No bin is searched for: bins with room for the pieces at hand form a stack, the fullest on top, since a bin that was
// just filled is fuller than all others of the stack, and so is one for which the pieces have only now become short
// enough. Until then a bin waits with the others of its room.
//
// number_t holds the number of a piece: what is kept of a window of 256 samples then fits into a core's nearest cache.
template <typename number_t>
int32_t pack_best_fit_by(const int32_t* lengths, int64_t count, int capacity, int32_t* bin_of_piece, int64_t wanted) {
  struct Bin {
    int32_t number, room;
  };
  Descending sizes(capacity);  // lengths of pieces, and rooms of bins that wait
  // The pieces by their length: the first one of each, and the one after each piece. They are counted from 1, as bins
  // are, so that 0 is none.
  std::vector<number_t> first(capacity + 1), next(count + 1);
  for (int64_t piece = count; piece > 0; --piece) {
    const int length = lengths[piece - 1];
    next[piece] = first[length];
    first[length] = static_cast<number_t>(piece);
    sizes.add(length);
  }
  // The bins that wait by their room: the last one of each, and the one before each bin.
  std::vector<number_t> last(capacity + 1), before(count + 1);
  std::vector<Bin> fitting(count);
  Bin* top = fitting.data();  // behind the last one
  int32_t num_bins = 0;
  while (const int size = sizes.take()) {
    Bin* larger = top;
    for (int32_t bin = last[size]; bin; bin = before[bin]) *top++ = {bin, size};
    if (top - larger > 1) std::reverse(larger, top);
    for (int32_t piece = first[size]; piece;) {
      Bin bin = top == fitting.data() ? Bin{++num_bins, capacity} : *--top;
      do {
        bin_of_piece[piece - 1] = bin.number - 1;
        bin.room -= size;
        piece = next[piece];
      } while (piece && bin.room >= size);
      if (bin.room >= size) {
        *top++ = bin;
      } else if (bin.room) {
        before[bin.number] = last[bin.room];
        last[bin.room] = static_cast<number_t>(bin.number);
        sizes.add(bin.room);
      } else if (bin.number - 1 == wanted) {
        return num_bins;
      }
    }
  }
  return num_bins;
}

inline int32_t pack_best_fit(const int32_t* lengths, int64_t count, int capacity, int32_t* bin_of_piece,
                             int64_t wanted = -1) {
  const auto pack = count < 65536 ? &pack_best_fit_by<uint16_t> : &pack_best_fit_by<int32_t>;
  return pack(lengths, count, capacity, bin_of_piece, wanted);
}

// Counts the bins that pack_best_fit makes of any pieces, without saying which piece goes where: pieces of one length,
// and bins of one room, are told apart by nothing, so they are taken together.
class BinCounter {
 public:
  explicit BinCounter(int capacity)
      : capacity_(capacity), sizes_(capacity), pieces_(capacity + 1), waiting_(capacity + 1) {}

  void add(int length) {
    ++pieces_[length];
    sizes_.add(length);
  }

  // Returns the bins of all pieces that were added, and forgets them.
  int64_t finish() {
    int64_t num_bins = 0;
    while (const int size = sizes_.take()) {
      if (waiting_[size]) fitting_.push_back({size, std::exchange(waiting_[size], 0)});
      int32_t count = std::exchange(pieces_[size], 0);
      while (count) {
        const bool is_new = fitting_.empty();
        const int room = is_new ? capacity_ : fitting_.back().room;
        const int32_t each = room < 2 * size ? 1 : room / size, available = is_new ? count : fitting_.back().count;
        const int32_t full = std::min(available, each == 1 ? count : count / each);
        const int32_t rest = full < available ? count - full * each : 0;  // into one bin that stays unfilled
        const int32_t used = full + (rest ? 1 : 0);
        if (is_new) {
          num_bins += used;
        } else if (!(fitting_.back().count -= used)) {
          fitting_.pop_back();
        }
        if (const int left = room - each * size; left && full) {
          waiting_[left] += full;
          sizes_.add(left);
        }
        if (rest) fitting_.push_back({room - rest * size, 1});
        count -= full * each + rest;
      }
    }
    fitting_.clear();
    return num_bins;
  }

 private:
  struct Bins {
    int32_t room, count;
  };

  int capacity_;
  Descending sizes_;
  std::vector<int32_t> pieces_, waiting_;
  std::vector<Bins> fitting_;  // as in pack_best_fit
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

// Packs documents of `tokens` tokens and calls `take(document, start, length)` for each piece of bin `sample`.
template <typename Take>
inline void pack_sample(const std::vector<int32_t>& tokens, int capacity, const Cuts& cuts, int64_t sample, Take take) {
  const int64_t count = tokens.size();
  std::vector<int32_t> lengths;
  lengths.reserve(count);
  cut_documents(tokens.data(), 0, count, capacity, cuts,
                [&](int64_t, int32_t, int32_t length) { lengths.push_back(length); });
  std::vector<int32_t> bins(lengths.size(), -1);
  pack_best_fit(lengths.data(), bins.size(), capacity, bins.data(), sample);
  auto bin = bins.begin();
  cut_documents(tokens.data(), 0, count, capacity, cuts, [&](int64_t document, int32_t start, int32_t length) {
    if (*bin++ == sample) take(document, start, length);
  });
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
