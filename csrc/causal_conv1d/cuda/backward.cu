// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d/cuda/channels.cuh"

namespace mambablock {
namespace {

// A thread's way through its chunk: dx_t = sum_w weight_w dpre_{t+W-1-w}, which takes the W-1 steps
// after the chunk too, and what the chunk adds to dweight_w = sum_t dpre_t x_{t-W+1+w} and
// dbias = sum_t dpre_t, where dpre is the gradient before the SiLU. It goes through one sequence
// after the other, and where one begins it gives the gradients of the W-1 inputs before it.
template <class T, int kTaps>
class Backward {
  using A = Accumulator<T>;
  static constexpr int kept = kTaps > 0 ? kTaps : 1;

 public:
  __device__ Backward(const CausalConv1dBackward& p, const Channels<T, kTaps>& channels)
      : p(p),
        channels(channels),
        sequences(channels.sequences),
        x(p.x, channels.batch, channels.channel, channels.count),
        dy(p.dy, channels.batch, channels.channel, channels.count),
        dx(p.dx, channels.batch, channels.channel, channels.count),
        bias(channels.load_bias()) {
    channels.load_taps(weight);
  }

  __device__ __forceinline__ void run() {
    pass_through();
    if (kTaps == 0) store_partials();  // zeros, to which it adds
    for (int64_t time = channels.begin; time < channels.end; time = last) {
      const int64_t next = sequences.first_from(time + 1);
      s = next - 1;
      first = time;
      last = sequences.begin(next) < channels.end ? sequences.begin(next) : channels.end;
      sequence_begin = sequences.begin(s);
      sequence_end = sequences.begin(next);
      if constexpr (kTaps > 0) {
        segment();
      } else {
        segment_of_any_width();
      }
    }
    if (kTaps > 0) store_partials();
  }

 private:
  // A sequence of no steps hands the gradient of its final state to its initial one.
  __device__ __forceinline__ void pass_through() {
    if (p.dinitial_state == nullptr) return;
    for (int64_t s = sequences.first_from(channels.begin); s < p.sequences; ++s) {
      const int64_t begin = sequences.begin(s);
      if (begin >= channels.end && channels.end < p.length) break;
      if (begin != sequences.begin(s + 1)) continue;
      for (int64_t row = 0; row < channels.width() - 1; ++row) {
        const int64_t state_row = channels.state_row(s, row);
        channels.store_row(p.dinitial_state, state_row,
                           channels.load_row(p.dfinal_state, state_row));
      }
    }
  }

  // Steps [first, last) of sequence s, and kTaps-1 after them.
  __device__ __forceinline__ void segment() {
    window = {};
    gradients = {};
#pragma unroll
    for (int i = 1; i < kTaps; ++i) {
      window.values[i] = channels.input_at(x, s, first - kTaps + i);
    }
    int64_t time = first;
    const int64_t after = last + kTaps - 1;
    // Until the gradients of the inputs from `first` on are next.
    for (; time < after && time < first + kTaps - 1; ++time) step(time);
    with_flag(x.aligned && dy.aligned && dx.aligned,
              [&](auto aligned) { time = groups<aligned.value>(time); });
    for (; time < after; ++time) step(time);
  }

  // Whole groups of steps before `last`; returns where they end.
  template <bool kAligned>
  __device__ __forceinline__ int64_t groups(int64_t time) {
#pragma unroll 1
    for (; time + kConvGroup <= last; time += kConvGroup) {
      ConvPack<T> inputs[kConvGroup], outputs[kConvGroup];
      x.template load_group<kAligned>(time, inputs);
      dy.template load_group<kAligned>(time, outputs);
#pragma unroll
      for (int i = 0; i < kConvGroup; ++i) {
        push(inputs[i], outputs[i]);
        add_to_sums();
        outputs[i] = narrowed<T>(input_gradient(Values<T>{}).at);
      }
      dx.template store_group<kAligned>(time - (kTaps - 1), outputs);
    }
    return time;
  }

  // The gradient before the SiLU of a step, into the window of such.
  __device__ __forceinline__ void push(const ConvPack<T>& input, const ConvPack<T>& output) {
    window.push(channels.widened(input));
    Values<T> sum = bias;
    add_products(sum, weight, window, channels.unused_taps());
    gradients.push(before_silu(output, sum));
  }

  __device__ __forceinline__ Values<T> before_silu(const ConvPack<T>& dy,
                                                   const Values<T>& sum) const {
    Values<T> gradient = channels.widened(dy);
    if (p.silu) {
#pragma unroll
      for (int j = 0; j < kConvPack<T>; ++j) {
        gradient.at[j] *= silu_derivative(sum.at[j], sigmoid(sum.at[j]));
      }
    }
    return gradient;
  }

  __device__ __forceinline__ void add_to_sums() {
    const Values<T>& gradient = gradients.values[kept - 1];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      if (tap >= channels.unused_taps()) add_product(dweight[tap], gradient, window.values[tap]);
    }
#pragma unroll
    for (int j = 0; j < kConvPack<T>; ++j) dbias.at[j] += gradient.at[j];
  }

  // The gradient of the input kTaps-1 steps before the last gradient, added to `sum`.
  __device__ __forceinline__ Values<T> input_gradient(Values<T> sum) const {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      if (tap >= channels.unused_taps()) {
        add_product(sum, weight[tap], gradients.values[kTaps - 1 - tap]);
      }
    }
    return sum;
  }

  __device__ __forceinline__ void step(int64_t time) {
    if (time < sequence_end) {
      push(x.load(time), dy.load(time));
    } else {
      gradients.push({});
    }
    if (time < last) add_to_sums();
    const int64_t target = time - (kTaps - 1);
    if (target >= first || first == sequence_begin) {
      store(target, input_gradient(from_final_state(target)));
    }
  }

  // What the gradient of the final state adds to the gradient of the input at `time`.
  __device__ __forceinline__ Values<T> from_final_state(int64_t time) const {
    const int64_t row = time - (sequence_end - (channels.width() - 1));
    if (row < 0) return {};
    return channels.load_row(p.dfinal_state, channels.state_row(s, row));
  }

  // Gives the gradient of the input at `time`, which may be one of the initial state's.
  __device__ __forceinline__ void store(int64_t time, const Values<T>& gradient) const {
    if (time >= sequence_begin) {
      dx.store(time, narrowed<T>(gradient.at));
    } else if (p.dinitial_state != nullptr) {
      const int64_t row = time - sequence_begin + channels.width() - 1;
      if (row >= 0) channels.store_row(p.dinitial_state, channels.state_row(s, row), gradient);
    }
  }

  // The same for any d_conv: the gradients before the SiLU are left in the thread's own part of the
  // plan's memory, so that each is computed once.
  __device__ __forceinline__ void segment_of_any_width() {
    const int64_t width = channels.width(), own_rows = channels.plan.chunk_steps + width - 1,
                  own_row = channels.partial * own_rows - channels.begin;
    void* const memory = channels.plan.gradients;
    const int64_t after = min(last + width - 1, sequence_end);
    for (int64_t time = first; time < after; ++time) {
      Values<T> sum = bias;
      for (int64_t tap = 0; tap < width; ++tap) {
        add_product(sum, channels.load_tap(tap), channels.input_at(x, s, time - (width - 1) + tap));
      }
      channels.store_row(memory, own_row + time, before_silu(dy.load(time), sum));
    }
    for (int64_t target = first == sequence_begin ? first - (width - 1) : first; target < last;
         ++target) {
      Values<T> sum = from_final_state(target);
      for (int64_t tap = 0; tap < width; ++tap) {
        const int64_t time = target + width - 1 - tap;
        if (time >= first && time < after) {
          add_product(sum, channels.load_tap(tap), channels.load_row(memory, own_row + time));
        }
      }
      store(target, sum);
    }
    for (int64_t tap = 0; tap < width; ++tap) {
      Values<T> sum = channels.load_tap(p.dweight_partial, channels.partial, tap);
      for (int64_t time = first; time < last; ++time) {
        add_product(sum, channels.load_row(memory, own_row + time),
                    channels.input_at(x, s, time - (width - 1) + tap));
      }
      channels.store_tap(p.dweight_partial, channels.partial, tap, sum);
    }
    Values<T> sum = channels.load_row(p.dbias_partial, channels.partial);
    for (int64_t time = first; time < last; ++time) {
      const Values<T> gradient = channels.load_row(memory, own_row + time);
      for (int j = 0; j < kConvPack<T>; ++j) sum.at[j] += gradient.at[j];
    }
    channels.store_row(p.dbias_partial, channels.partial, sum);
  }

  __device__ __forceinline__ void store_partials() const {
    if constexpr (kTaps > 0) {
      const int unused = channels.unused_taps();
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        if (tap >= unused) {
          channels.store_tap(p.dweight_partial, channels.partial, tap - unused, dweight[tap]);
        }
      }
    } else {
      for (int64_t tap = 0; tap < channels.width(); ++tap) {
        channels.store_tap(p.dweight_partial, channels.partial, tap, {});
      }
    }
    channels.store_row(p.dbias_partial, channels.partial, dbias);
  }

  const CausalConv1dBackward& p;
  const Channels<T, kTaps>& channels;
  const Sequences& sequences;
  ChannelsInput<T> x, dy;
  ChannelsOutput<T> dx;
  Values<T> bias, weight[kept], dweight[kept] = {}, dbias{};
  Window<T, kept> window{}, gradients{};
  // The segment: steps [first, last) of sequence s.
  int64_t s, first, last, sequence_begin, sequence_end;
};

template <class T, int kTaps>
__global__ void __launch_bounds__(kConvThreads, 2)
    backward_kernel(const CausalConv1dBackward p, const ConvCudaPlan plan) {
  const Channels<T, kTaps> channels(p, plan);
  if (channels.exists) Backward<T, kTaps>(p, channels).run();
}

}  // namespace

void cuda_backward(const char* op, const CausalConv1dBackward& p, const ConvCudaPlan& plan,
                   cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, p.width <= kCudaConvTaps ? backward_kernel<T, kCudaConvTaps> : backward_kernel<T, 0>,
           conv_blocks(p, plan, kConvPack<T>), kConvThreads, 0, stream, p, plan);
  });
}

}  // namespace mambablock
