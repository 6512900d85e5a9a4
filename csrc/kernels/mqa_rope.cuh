// Multi-query attention's inputs in one launch: split keys from values, RMSNorm of each head, rotary embedding.
//
// Shapes: query (tokens, heads, head_dim) packed; key_value (tokens, groups, 2, head_dim), tokens `stride` elements
// apart; cos, sin (tokens, head_dim/2) FP32, of each token's position in its document; query_weight, key_weight
// (head_dim) or null for no norm; outputs query (tokens, heads, head_dim), key and value (tokens, groups, head_dim)
// packed; weight_partials (2, blocks * 4, head_dim) FP32, query's then key's, which the caller adds up.
// Meaning: x = in / rms(in) * weight; out = (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of a head.
// Bytes moved per element: 1 read and 1 write, backward with norm 2 reads and 1 write; cos and sin add 8 bytes a pair
// and token. The unfused form also reads and writes the norm's output and the halves.
// Eight threads turn one head: 16-byte accesses where head_dim/2, the stride and every pointer allow.
#pragma once

#include "device.cuh"

namespace megatron_mm {

constexpr int kRopeThreads = 256;
constexpr int kRopeLanes = 8;
constexpr int kRopeHeads = kRopeThreads / kRopeLanes;
constexpr int kRopeWarps = kRopeThreads / kWarp;
constexpr int kRopeHeadDim = 256;  // the widest head: its gradients stay in registers

__device__ __forceinline__ float head_sum(float value) {
#pragma unroll
  for (int distance = kRopeLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

template <typename scalar_t>
struct RopeTensors {
  const scalar_t* query;
  const scalar_t* key_value;
  const float* cos;
  const float* sin;
  const scalar_t* query_weight;
  const scalar_t* key_weight;
  // Outputs, or in the backward pass their gradients.
  scalar_t* new_query;
  scalar_t* new_key;
  scalar_t* new_value;
};

// Where head `item` of the (heads + 2 groups) of each token lies: queries first, then keys, then values.
template <typename scalar_t>
struct RopeHead {
  int64_t token;
  bool exists, is_query, is_value;
  int64_t from;  // in query or key_value
  int64_t to;    // in the packed query, key or value

  __device__ __forceinline__ RopeHead(int64_t item, int64_t tokens, int heads, int groups, int head_dim,
                                      int64_t stride) {
    const unsigned per_token = heads + 2 * groups;
    const unsigned flat = static_cast<unsigned>(item);  // the launcher refuses more than fit
    token = flat / per_token;
    const int place = flat % per_token;
    exists = token < tokens;
    is_query = place < heads;
    is_value = place >= heads + groups;
    const int group = is_query ? 0 : (place - heads) % groups;
    from = is_query ? (token * heads + place) * head_dim : token * stride + (2 * group + is_value) * head_dim;
    to = is_query ? from : (token * groups + group) * head_dim;
  }
};

template <typename scalar_t, int WIDTH>
__global__ void __launch_bounds__(kRopeThreads)
    mqa_rope_forward_kernel(int64_t tokens, int heads, int groups, int head_dim, int64_t stride, float epsilon,
                            RopeTensors<scalar_t> at) {
  const int lane = threadIdx.x % kRopeLanes, half = head_dim / 2;
  const RopeHead<scalar_t> head(static_cast<int64_t>(blockIdx.x) * kRopeHeads + threadIdx.x / kRopeLanes, tokens, heads,
                                groups, head_dim, stride);
  const scalar_t* in = (head.is_query ? at.query : at.key_value) + head.from;
  const scalar_t* weight = head.is_query ? at.query_weight : at.key_weight;
  float inverse = 1.0f;
  if (at.query_weight != nullptr) {  // the same for every thread: lanes beyond the last head take part in the sum
    float squares = 0.0f;
    if (head.exists) {
      for (int pair = lane * WIDTH; pair < half; pair += kRopeLanes * WIDTH) {
        const auto first = load<WIDTH>(in + pair), second = load<WIDTH>(in + half + pair);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) squares += first[i] * first[i] + second[i] * second[i];
      }
    }
    inverse = rsqrtf(head_sum(squares) / head_dim + epsilon);
  }
  if (!head.exists) return;
  scalar_t* out = (head.is_query ? at.new_query : head.is_value ? at.new_value : at.new_key) + head.to;
  for (int pair = lane * WIDTH; pair < half; pair += kRopeLanes * WIDTH) {
    auto first = load<WIDTH>(in + pair), second = load<WIDTH>(in + half + pair);
    if (!head.is_value) {
      const auto cos = load<WIDTH>(at.cos + head.token * half + pair);
      const auto sin = load<WIDTH>(at.sin + head.token * half + pair);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        float x = first[i], y = second[i];
        if (weight != nullptr) {
          x *= inverse * to_float(weight[pair + i]);
          y *= inverse * to_float(weight[half + pair + i]);
        }
        first.set(i, x * cos[i] - y * sin[i]);
        second.set(i, y * cos[i] + x * sin[i]);
      }
    }
    store<WIDTH>(first, out + pair);
    store<WIDTH>(second, out + half + pair);
  }
}

// The transpose: turns gradients back, then through the norm. Reads the gradients from at.new_*, writes grad_*.
template <typename scalar_t, int WIDTH, bool NORM>
__global__ void __launch_bounds__(kRopeThreads)
    mqa_rope_backward_kernel(int64_t tokens, int heads, int groups, int head_dim, int64_t stride, int64_t items,
                             float epsilon, RopeTensors<scalar_t> at, scalar_t* grad_query, scalar_t* grad_key_value,
                             float* weight_partials) {
  constexpr int STEPS = NORM ? kRopeHeadDim / 2 / (kRopeLanes * WIDTH) : 1;
  const int lane = threadIdx.x % kRopeLanes, half = head_dim / 2;
  float grad_weight[2][STEPS][2][WIDTH] = {};  // of query and key, first and second half
  for (int64_t first_item = static_cast<int64_t>(blockIdx.x) * kRopeHeads; first_item < items;
       first_item += static_cast<int64_t>(gridDim.x) * kRopeHeads) {
    const int64_t item = first_item + threadIdx.x / kRopeLanes;
    const RopeHead<scalar_t> head(item, tokens, heads, groups, head_dim, stride);
    const scalar_t* gradient = (head.is_query ? at.new_query : head.is_value ? at.new_value : at.new_key) + head.to;
    const scalar_t* in = (head.is_query ? at.query : at.key_value) + head.from;
    const scalar_t* weight = head.is_query ? at.query_weight : at.key_weight;
    const bool turns = head.exists && !head.is_value;
    float inverse = 1.0f, mean = 0.0f;
    if (NORM) {
      float squares = 0.0f, product = 0.0f;
      if (turns) {
        for (int pair = lane * WIDTH; pair < half; pair += kRopeLanes * WIDTH) {
          const auto x = load<WIDTH>(in + pair), y = load<WIDTH>(in + half + pair);
          const auto gx = load<WIDTH>(gradient + pair), gy = load<WIDTH>(gradient + half + pair);
          const auto cos = load<WIDTH>(at.cos + head.token * half + pair);
          const auto sin = load<WIDTH>(at.sin + head.token * half + pair);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) {
            squares += x[i] * x[i] + y[i] * y[i];
            product += (gx[i] * cos[i] + gy[i] * sin[i]) * to_float(weight[pair + i]) * x[i] +
                       (gy[i] * cos[i] - gx[i] * sin[i]) * to_float(weight[half + pair + i]) * y[i];
          }
        }
      }
      inverse = rsqrtf(head_sum(squares) / head_dim + epsilon);
      mean = head_sum(product) * inverse / head_dim;
    }
    if (!head.exists) continue;
    // Gradients are packed, so those of key_value have no stride.
    const int64_t place = head.is_query ? head.to : 2 * (head.to - head.to % head_dim) + head.is_value * head_dim;
    scalar_t* out = (head.is_query ? grad_query : grad_key_value) + place;
#pragma unroll
    for (int step = 0; step < (NORM ? STEPS : 1); ++step) {
      for (int pair = (step * kRopeLanes + lane) * WIDTH; pair < half; pair += NORM ? half : kRopeLanes * WIDTH) {
        auto gx = load<WIDTH>(gradient + pair), gy = load<WIDTH>(gradient + half + pair);
        if (turns) {
          const auto cos = load<WIDTH>(at.cos + head.token * half + pair);
          const auto sin = load<WIDTH>(at.sin + head.token * half + pair);
          Group<scalar_t, WIDTH> x, y;
          if (NORM) x = load<WIDTH>(in + pair), y = load<WIDTH>(in + half + pair);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) {
            float dx = gx[i] * cos[i] + gy[i] * sin[i], dy = gy[i] * cos[i] - gx[i] * sin[i];
            if (NORM) {
              const float direction_x = x[i] * inverse, direction_y = y[i] * inverse;
              grad_weight[0][step][0][i] += head.is_query ? dx * direction_x : 0.0f;
              grad_weight[0][step][1][i] += head.is_query ? dy * direction_y : 0.0f;
              grad_weight[1][step][0][i] += head.is_query ? 0.0f : dx * direction_x;
              grad_weight[1][step][1][i] += head.is_query ? 0.0f : dy * direction_y;
              dx = inverse * (dx * to_float(weight[pair + i]) - direction_x * mean);
              dy = inverse * (dy * to_float(weight[half + pair + i]) - direction_y * mean);
            }
            gx.set(i, dx);
            gy.set(i, dy);
          }
        }
        store<WIDTH>(gx, out + pair);
        store<WIDTH>(gy, out + half + pair);
      }
    }
  }
  if (!NORM) return;
  // Threads 8 and 16 lanes apart hold the same columns: add them, and write a partial of each warp.
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    float* partial = weight_partials + ((static_cast<int64_t>(kind) * gridDim.x + blockIdx.x) * kRopeWarps +
                                        threadIdx.x / kWarp) * head_dim;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          float total = grad_weight[kind][step][side][i];
          total += __shfl_xor_sync(kAllLanes, total, kRopeLanes);
          total += __shfl_xor_sync(kAllLanes, total, 2 * kRopeLanes);
          const int pair = (step * kRopeLanes + lane) * WIDTH + i;
          if (threadIdx.x % kWarp < kRopeLanes && pair < half) partial[side * half + pair] = total;
        }
      }
    }
  }
}

template <typename scalar_t>
bool rope_fits(int64_t tokens, int64_t heads, int64_t groups, int64_t head_dim) {
  return head_dim % 2 == 0 && head_dim <= kRopeHeadDim && tokens * (heads + 2 * groups) < (int64_t{1} << 31);
}

template <typename scalar_t>
bool launch_mqa_rope_forward(int64_t tokens, int64_t heads, int64_t groups, int64_t head_dim, int64_t stride,
                             float epsilon, const RopeTensors<scalar_t>& at, void* stream) {
  if (!rope_fits<scalar_t>(tokens, heads, groups, head_dim)) return false;
  if (tokens == 0) return true;
  const int64_t blocks = ceil_div(tokens * (heads + 2 * groups), kRopeHeads);
  const bool wide = stride % kWide<scalar_t> == 0 && moves_wide<scalar_t>(head_dim / 2, at.query, at.key_value, at.cos,
                                                                           at.sin, at.new_query, at.new_key, at.new_value);
  if (wide) {
    MM_LAUNCH((mqa_rope_forward_kernel<scalar_t, kWide<scalar_t>>), blocks, kRopeThreads, stream, tokens, heads, groups,
              head_dim, stride, epsilon, at);
  } else {
    MM_LAUNCH((mqa_rope_forward_kernel<scalar_t, 1>), blocks, kRopeThreads, stream, tokens, heads, groups, head_dim,
              stride, epsilon, at);
  }
  return true;
}

template <typename scalar_t, int WIDTH, bool NORM>
void mqa_rope_backward(int64_t tokens, int64_t heads, int64_t groups, int64_t head_dim, int64_t stride, int64_t blocks,
                       float epsilon, const RopeTensors<scalar_t>& at, scalar_t* grad_query, scalar_t* grad_key_value,
                       float* weight_partials, void* stream) {
  const int64_t items = tokens * (heads + 2 * groups);
  MM_LAUNCH((mqa_rope_backward_kernel<scalar_t, WIDTH, NORM>), blocks, kRopeThreads, stream, tokens, heads, groups,
            head_dim, stride, items, epsilon, at, grad_query, grad_key_value, weight_partials);
}

// Without a norm query and key_value are not read, and there are no weight_partials. `blocks` share the heads.
template <typename scalar_t>
bool launch_mqa_rope_backward(int64_t tokens, int64_t heads, int64_t groups, int64_t head_dim, int64_t stride,
                              int64_t blocks, float epsilon, const RopeTensors<scalar_t>& at, scalar_t* grad_query,
                              scalar_t* grad_key_value, float* weight_partials, void* stream) {
  if (!rope_fits<scalar_t>(tokens, heads, groups, head_dim)) return false;
  if (blocks == 0) return true;
  constexpr int W = kWide<scalar_t>;
  const bool norm = at.query_weight != nullptr;
  const bool wide = stride % W == 0 &&
                    moves_wide<scalar_t>(head_dim / 2, at.query, at.key_value, at.cos, at.sin, at.new_query, at.new_key,
                                         at.new_value, grad_query, grad_key_value);
  auto* launch = wide ? (norm ? mqa_rope_backward<scalar_t, W, true> : mqa_rope_backward<scalar_t, W, false>)
                      : (norm ? mqa_rope_backward<scalar_t, 1, true> : mqa_rope_backward<scalar_t, 1, false>);
  launch(tokens, heads, groups, head_dim, stride, blocks, epsilon, at, grad_query, grad_key_value, weight_partials,
         stream);
  return true;
}

}  // namespace megatron_mm
