// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d/cuda/channels.cuh"

namespace mambablock {
namespace {

// A chunk's part of the gradients, for one thread's channels.
template <class T, int kWidth>
struct Backward {
  using A = Accumulator<T>;

  __device__ Backward(const CausalConv1dBackward& p, const ConvCudaPlan& plan)
      : p(p),
        channels(p, plan),
        x(p.x, channels.batch, channels.channel, channels.count),
        dy(p.dy, channels.batch, channels.channel, channels.count),
        dx(p.dx, channels.batch, channels.channel, channels.count),
        bias(channels.load_row(p.bias, 0)) {}

  // The gradient before the SiLU, given the sum that the SiLU had.
  __device__ __forceinline__ Values<A> before_silu(const Pack<T>& dy, const Values<A>& sum) const {
    Values<A> gradient = channels.widened(dy);
    if (p.silu) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        gradient.at[j] *= silu_derivative(sum.at[j], sigmoid(sum.at[j]));
      }
    }
    return gradient;
  }

  // What the gradient of sequence s's final state adds to the gradient of the input at `time`.
  __device__ __forceinline__ Values<A> from_final_state(int64_t s, int64_t end,
                                                        int64_t time) const {
    const int64_t row = time - (end - (channels.width() - 1));
    return channels.load_row(row < 0 ? nullptr : p.dfinal_state,
                             row < 0 ? 0 : channels.state_row(s, row));
  }

  // Gives the gradient of the input at `time`, which may be one of the initial state's.
  __device__ __forceinline__ void store(int64_t s, int64_t begin, int64_t time,
                                        const Values<A>& gradient) const {
    if (time >= begin) {
      dx.store(time, narrowed<T>(gradient.at));
    } else if (p.dinitial_state != nullptr) {
      channels.store_row(p.dinitial_state,
                         channels.state_row(s, time - begin + channels.width() - 1), gradient);
    }
  }

  const CausalConv1dBackward& p;
  Channels<T, kWidth> channels;
  ChannelsInput<T> x, dy;
  ChannelsOutput<T> dx;
  Values<A> bias;
};

// Steps [first, last) of sequence s: dx_t = sum_w weight_w dpre_{t+W-1-w}, which takes the W-1
// steps after them too, and adds to dweight_w = sum_t dpre_t x_{t-W+1+w} and dbias = sum_t dpre_t.
// If the sequence begins with them, so do the gradients of the W-1 inputs before.
template <bool kXAlongTime, bool kDyAlongTime, class T, int kWidth>
__device__ void segment(const Backward<T, kWidth>& backward, int64_t s, int64_t first, int64_t last,
                        const Values<Accumulator<T>> (&weight)[kWidth],
                        Values<Accumulator<T>> (&dweight)[kWidth], Values<Accumulator<T>>& dbias) {
  using A = Accumulator<T>;
  const auto& channels = backward.channels;
  const int64_t begin = channels.sequences.begin(s), end = channels.sequences.begin(s + 1);
  [[maybe_unused]] constexpr int unrolled = kUnrolledSteps<(kXAlongTime || kDyAlongTime)>;
  Window<A, kWidth> inputs{}, gradients{};
  StepsInOrder<T, kXAlongTime> x(backward.x, first);
  StepsInOrder<T, kDyAlongTime> dy(backward.dy, first);
#pragma unroll
  for (int i = 1; i < kWidth; ++i) {
    inputs.packs[i] = channels.input_at(backward.x, s, first - kWidth + i);
  }
#pragma unroll unrolled
  for (int64_t time = first; time < last + kWidth - 1; ++time) {
    Values<A> gradient{};
    if (time < end) {
      inputs.push(channels.widened(x.at(time)));
      Values<A> sum = backward.bias;
#pragma unroll
      for (int tap = 0; tap < kWidth; ++tap) add_product(sum, weight[tap], inputs.packs[tap]);
      gradient = backward.before_silu(dy.at(time), sum);
    }
    gradients.push(gradient);
    if (time < last) {
#pragma unroll
      for (int tap = 0; tap < kWidth; ++tap) {
        add_product(dweight[tap], gradient, inputs.packs[tap]);
      }
#pragma unroll
      for (int j = 0; j < kPack; ++j) dbias.at[j] += gradient.at[j];
    }
    const int64_t target = time - (kWidth - 1);
    if (target < first && first != begin) continue;
    Values<A> sum = backward.from_final_state(s, end, target);
#pragma unroll
    for (int tap = 0; tap < kWidth; ++tap) {
      add_product(sum, weight[tap], gradients.packs[kWidth - 1 - tap]);
    }
    backward.store(s, begin, target, sum);
  }
}

// The same for any d_conv, one tap of dweight at a time.
template <class T>
__device__ void segment_of_any_width(const Backward<T, 0>& backward, int64_t s, int64_t first,
                                     int64_t last, bool add) {
  using A = Accumulator<T>;
  const auto& channels = backward.channels;
  const CausalConv1dBackward& p = backward.p;
  const int64_t begin = channels.sequences.begin(s), end = channels.sequences.begin(s + 1);
  const int64_t width = p.width;
  const auto gradient_at = [&](int64_t time) {
    Values<A> sum = backward.bias;
    for (int64_t tap = 0; tap < width; ++tap) {
      add_product(sum, channels.load_tap(p.weight, 0, tap),
                  channels.input_at(backward.x, s, time - (width - 1) + tap));
    }
    return backward.before_silu(backward.dy.load(time), sum);
  };
  for (int64_t target = first == begin ? first - (width - 1) : first; target < last; ++target) {
    Values<A> sum = backward.from_final_state(s, end, target);
    for (int64_t tap = 0; tap < width; ++tap) {
      const int64_t time = target + width - 1 - tap;
      if (time >= begin && time < end) {
        add_product(sum, channels.load_tap(p.weight, 0, tap), gradient_at(time));
      }
    }
    backward.store(s, begin, target, sum);
  }
  for (int64_t tap = 0; tap < width; ++tap) {
    Values<A> sum = channels.load_tap(add ? p.dweight_partial : nullptr, channels.partial, tap);
    for (int64_t time = first; time < last; ++time) {
      add_product(sum, gradient_at(time),
                  channels.input_at(backward.x, s, time - (width - 1) + tap));
    }
    channels.store_tap(p.dweight_partial, channels.partial, tap, sum);
  }
  Values<A> dbias = channels.load_row(add ? p.dbias_partial : nullptr, channels.partial);
  for (int64_t time = first; time < last; ++time) {
    const Values<A> gradient = gradient_at(time);
    for (int j = 0; j < kPack; ++j) dbias.at[j] += gradient.at[j];
  }
  channels.store_row(p.dbias_partial, channels.partial, dbias);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kConvThreads, kConvBlocks<T>)
    backward_kernel(const CausalConv1dBackward p, const ConvCudaPlan plan) {
  using A = Accumulator<T>;
  const Backward<T, kWidth> backward(p, plan);
  const auto& channels = backward.channels;
  if (!channels.exists) return;
  const Sequences& sequences = channels.sequences;

  // A sequence of no steps hands the gradient of its final state to its initial one.
  for (int64_t s = sequences.first_from(channels.begin); s < p.sequences; ++s) {
    const int64_t begin = sequences.begin(s);
    if (begin >= channels.end && channels.end < p.length) break;
    if (begin != sequences.begin(s + 1) || p.dinitial_state == nullptr) continue;
    for (int64_t row = 0; row < channels.width() - 1; ++row) {
      const int64_t state_row = channels.state_row(s, row);
      channels.store_row(p.dinitial_state, state_row, channels.load_row(p.dfinal_state, state_row));
    }
  }

  constexpr int kept = kWidth > 0 ? kWidth : 1;
  Values<A> weight[kept], dweight[kept] = {}, dbias{};
  if constexpr (kWidth > 0) {
    for (int tap = 0; tap < kWidth; ++tap) weight[tap] = channels.load_tap(p.weight, 0, tap);
  } else if (channels.begin == channels.end) {
    for (int64_t tap = 0; tap < p.width; ++tap) {
      channels.store_tap(p.dweight_partial, channels.partial, tap, {});
    }
    channels.store_row(p.dbias_partial, channels.partial, {});
  }
  with_flag(goes_along_time<T, kWidth>(p.x), [&](auto x_along_time) {
    // Registers have room for both in 16-bit types.
    constexpr bool room = sizeof(T) == 2 || !decltype(x_along_time)::value;
    with_flag(room && goes_along_time<T, kWidth>(p.dy), [&](auto dy_along_time) {
      for (int64_t first = channels.begin; first < channels.end;) {
        const int64_t next = sequences.first_from(first + 1);
        const int64_t last =
            sequences.begin(next) < channels.end ? sequences.begin(next) : channels.end;
        if constexpr (kWidth > 0) {
          segment<x_along_time.value, dy_along_time.value>(backward, next - 1, first, last, weight,
                                                           dweight, dbias);
        } else {
          segment_of_any_width<T>(backward, next - 1, first, last, first > channels.begin);
        }
        first = last;
      }
    });
  });
  if constexpr (kWidth > 0) {
    for (int tap = 0; tap < kWidth; ++tap) {
      channels.store_tap(p.dweight_partial, channels.partial, tap, dweight[tap]);
    }
    channels.store_row(p.dbias_partial, channels.partial, dbias);
  }
}

}  // namespace

void cuda_backward(const char* op, const CausalConv1dBackward& p, const ConvCudaPlan& plan,
                   cudaStream_t stream) {
  const int64_t blocks = (conv_threads(p) + kConvThreads - 1) / kConvThreads;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, p.width == 4 ? backward_kernel<T, 4> : backward_kernel<T, 0>, blocks, kConvThreads,
           0, stream, p, plan);
  });
}

}  // namespace mambablock
