// A keyed permutation of [0, n) that is evaluated one element at a time: O(1) memory at any n.
//
// Alternating-width Feistel network over ceil(log2 n) bits with cycle walking (Black and Rogaway 2002, "Ciphers with
// arbitrary finite domains"): under two walks expected. megatron_mm/data/order.py holds the reference.
#pragma once

#include <cstdint>

namespace megatron_mm {

// The finalizer of MurmurHash3 (Appleby, public domain): every bit of the input reaches every bit of the output.
inline uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

class Permutation {
 public:
  Permutation(uint64_t size, uint64_t key) : size_(size) {
    int bits = 2;
    while (bits < 63 && (1ULL << bits) < size) ++bits;
    right_bits_ = bits - bits / 2;
    left_mask_ = (1ULL << (bits / 2)) - 1;
    right_mask_ = (1ULL << right_bits_) - 1;
    for (auto& round_key : round_keys_) {
      key += 0x9e3779b97f4a7c15ULL;
      round_key = mix(key);
    }
  }

  uint64_t operator()(uint64_t element) const {
    do {
      element = encipher(element);
    } while (element >= size_);
    return element;
  }

 private:
  uint64_t encipher(uint64_t element) const {
    uint64_t left = element >> right_bits_, right = element & right_mask_;
    for (int round = 0; round < 6; round += 2) {
      left ^= mix(right ^ round_keys_[round]) & left_mask_;
      right ^= mix(left ^ round_keys_[round + 1]) & right_mask_;
    }
    return (left << right_bits_) | right;
  }

  uint64_t size_, left_mask_, right_mask_, round_keys_[6];
  int right_bits_;
};

}  // namespace megatron_mm
