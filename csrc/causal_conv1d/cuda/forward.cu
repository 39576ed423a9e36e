// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d/cuda/channels.cuh"

namespace mambablock {
namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(kConvThreads, kConvBlocks<T>)
    forward_kernel(const CausalConv1dForward p, const ConvCudaPlan plan) {
  using A = Accumulator<T>;
  const Channels<T, kWidth> channels(p, plan);
  if (!channels.exists) return;
  const ChannelsInput<T> x(p.x, channels.batch, channels.channel, channels.count);
  const ChannelsOutput<T> y(p.y, channels.batch, channels.channel, channels.count);
  const int64_t width = channels.width();
  const Values<A> bias = channels.load_row(p.bias, 0);
  constexpr int kept = kWidth > 0 ? kWidth : 1;
  Values<A> weight[kept];
  Window<A, kept> window{};
  if constexpr (kWidth > 0) {
    for (int tap = 0; tap < kWidth; ++tap) weight[tap] = channels.load_tap(p.weight, 0, tap);
  }

  // The inputs before `time`.
  const auto look_back = [&](int64_t s, int64_t time) {
    if constexpr (kWidth > 0) {
#pragma unroll
      for (int i = 1; i < kWidth; ++i) {
        window.packs[i] = channels.input_at(x, s, time - kWidth + i);
      }
    }
  };
  const auto store_final_state = [&](int64_t s) {
    const int64_t end = channels.sequences.begin(s + 1);
    for (int64_t row = 0; row < width - 1; ++row) {
      channels.store_row(p.final_state, channels.state_row(s, row),
                         channels.input_at(x, s, end - (width - 1) + row));
    }
  };
  const auto start = [&](int64_t s, int64_t time) {
    return start_sequences(
        channels.sequences, s, time, [&](int64_t s) { look_back(s, time); }, store_final_state);
  };

  SequenceCursor cursor{};
  const int64_t boundary = channels.sequences.first_from(channels.begin);
  if (boundary < p.sequences && channels.sequences.begin(boundary) == channels.begin) {
    cursor = start(boundary, channels.begin);
  } else {
    cursor = {boundary - 1, channels.sequences.begin(boundary)};
    if (channels.begin < channels.end) look_back(cursor.sequence, channels.begin);
  }
  with_flag(goes_along_time<T, kWidth>(p.x), [&](auto along_time) {
    [[maybe_unused]] constexpr int unrolled = kUnrolledSteps<decltype(along_time)::value>;
    StepsInOrder<T, along_time.value> inputs(x, channels.begin);
    for (int64_t time = channels.begin; time < channels.end;) {
      const int64_t stop = cursor.end < channels.end ? cursor.end : channels.end;
#pragma unroll unrolled
      for (; time < stop; ++time) {
        Values<A> sum = bias;
        if constexpr (kWidth > 0) {
          window.push(channels.widened(inputs.at(time)));
#pragma unroll
          for (int tap = 0; tap < kWidth; ++tap) add_product(sum, weight[tap], window.packs[tap]);
        } else {
          for (int64_t tap = 0; tap < width; ++tap) {
            add_product(sum, channels.load_tap(p.weight, 0, tap),
                        channels.input_at(x, cursor.sequence, time - (width - 1) + tap));
          }
        }
        if (p.silu) {
#pragma unroll
          for (A& value : sum.at) value = silu(value);
        }
        y.store(time, narrowed<T>(sum.at));
      }
      if (time == cursor.end) {
        store_final_state(cursor.sequence);
        if (time < channels.end || time == p.length) cursor = start(cursor.sequence + 1, time);
      }
    }
  });
}

}  // namespace

void cuda_forward(const char* op, const CausalConv1dForward& p, const ConvCudaPlan& plan,
                  cudaStream_t stream) {
  const int64_t blocks = (conv_threads(p) + kConvThreads - 1) / kConvThreads;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, p.width == 4 ? forward_kernel<T, 4> : forward_kernel<T, 0>, blocks, kConvThreads, 0,
           stream, p, plan);
  });
}

}  // namespace mambablock
