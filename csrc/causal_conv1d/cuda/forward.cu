// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d/cuda/channels.cuh"

namespace mambablock {
namespace {

// A thread's way through its chunk.
template <class T, int kTaps>
class Forward {
  static constexpr int kept = kTaps > 0 ? kTaps : 1;

 public:
  __device__ Forward(const CausalConv1dForward& p, const Channels<T, kTaps>& channels)
      : p(p),
        channels(channels),
        x(p.x, channels.batch, channels.channel, channels.count),
        y(p.y, channels.batch, channels.channel, channels.count),
        bias(channels.load_bias()) {
    channels.load_taps(weight);
  }

  __device__ __forceinline__ void run() {
    enter_chunk();
    for (int64_t time = channels.begin; time < channels.end;) {
      const int64_t stop = cursor.end < channels.end ? cursor.end : channels.end;
      if constexpr (kTaps > 0) {
        with_flag(x.aligned && y.aligned,
                  [&](auto aligned) { time = groups<aligned.value>(time, stop); });
      }
      for (; time < stop; ++time) step(time);
      if (time == cursor.end) {
        store_final_state(cursor.sequence);
        if (time < channels.end || time == p.length) cursor = start(cursor.sequence + 1, time);
      }
    }
  }

 private:
  __device__ __forceinline__ void enter_chunk() {
    const int64_t boundary = channels.sequences.first_from(channels.begin);
    if (boundary < p.sequences && channels.sequences.begin(boundary) == channels.begin) {
      cursor = start(boundary, channels.begin);
    } else {
      cursor = {boundary - 1, channels.sequences.begin(boundary)};
      if (channels.begin < channels.end) look_back(cursor.sequence, channels.begin);
    }
  }

  __device__ __forceinline__ SequenceCursor start(int64_t s, int64_t time) {
    return start_sequences(
        channels.sequences, s, time, [&](int64_t s) { look_back(s, time); },
        [&](int64_t s) { store_final_state(s); });
  }

  // The inputs before `time`.
  __device__ __forceinline__ void look_back(int64_t s, int64_t time) {
#pragma unroll
    for (int i = 1; i < kTaps; ++i) {
      window.values[i] = channels.input_at(x, s, time - kTaps + i);
    }
  }

  __device__ __forceinline__ void store_final_state(int64_t s) {
    const int64_t end = channels.sequences.begin(s + 1), rows = channels.width() - 1;
    for (int64_t row = 0; row < rows; ++row) {
      channels.store_row(p.final_state, channels.state_row(s, row),
                         channels.input_at(x, s, end - rows + row));
    }
  }

  // Whole groups of steps before `stop`; returns where they end. A group's loads are in flight
  // while the group before is computed and stored.
  template <bool kAligned>
  __device__ __forceinline__ int64_t groups(int64_t time, int64_t stop) {
    if (time + kConvGroup > stop) return time;
    ConvPack<T> next[kConvGroup], now[kConvGroup];
    x.template load_group<kAligned>(time, next);
#pragma unroll 1
    for (; time + kConvGroup <= stop; time += kConvGroup) {
#pragma unroll
      for (int i = 0; i < kConvGroup; ++i) now[i] = next[i];
      if (time + 2 * kConvGroup <= stop) {
        x.template load_group<kAligned>(time + kConvGroup, next);
      }
#pragma unroll
      for (int i = 0; i < kConvGroup; ++i) now[i] = output(now[i]);
      y.template store_group<kAligned>(time, now);
    }
    return time;
  }

  __device__ __forceinline__ ConvPack<T> output(const ConvPack<T>& input) {
    window.push(channels.widened(input));
    Values<T> sum = bias;
    add_products(sum, weight, window, channels.unused_taps());
    return activated(sum);
  }

  __device__ __forceinline__ ConvPack<T> activated(Values<T>& sum) const {
    if (p.silu) {
#pragma unroll
      for (auto& value : sum.at) value = silu(value);
    }
    return narrowed<T>(sum.at);
  }

  __device__ __forceinline__ void step(int64_t time) {
    if constexpr (kTaps > 0) {
      y.store(time, output(x.load(time)));
    } else {
      Values<T> sum = bias;
      for (int64_t tap = 0; tap < channels.width(); ++tap) {
        add_product(sum, channels.load_tap(tap),
                    channels.input_at(x, cursor.sequence, time - (channels.width() - 1) + tap));
      }
      y.store(time, activated(sum));
    }
  }

  const CausalConv1dForward& p;
  const Channels<T, kTaps>& channels;
  ChannelsInput<T> x;
  ChannelsOutput<T> y;
  Values<T> bias, weight[kept];
  Window<T, kept> window{};
  SequenceCursor cursor{};
};

template <class T, int kTaps>
__global__ void __launch_bounds__(kConvThreads, 2)
    forward_kernel(const CausalConv1dForward p, const ConvCudaPlan plan) {
  const Channels<T, kTaps> channels(p, plan);
  if (channels.exists) Forward<T, kTaps>(p, channels).run();
}

}  // namespace

void cuda_forward(const char* op, const CausalConv1dForward& p, const ConvCudaPlan& plan,
                  cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, p.width <= kCudaConvTaps ? forward_kernel<T, kCudaConvTaps> : forward_kernel<T, 0>,
           conv_blocks(p, plan, kConvPack<T>), kConvThreads, 0, stream, p, plan);
  });
}

}  // namespace mambablock
