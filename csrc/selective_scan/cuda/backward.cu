// SPDX-License-Identifier: Apache-2.0
//
// Tiles are visited from the last to the first. The states of each are recomputed from the saved
// one, then the gradient of the state goes back through them.
#include "selective_scan/cuda/backward_steps.cuh"

namespace mambablock {
namespace {

// A block's way through its chunk. kOneSlice: its registers have room for all states.
template <class T, bool kOneSlice>
class Backward {
  using A = Accumulator<T>;
  using Block = BackwardBlock<T>;
  using Memory = BackwardMemory<T>;
  using Saved = SavedStates<T, Block>;
  static constexpr int tile = kCudaSavedSteps;

 public:
  __device__ Backward(const SelectiveScanBackward& p, const ScanCudaPlan& plan, const Block& block)
      : p(p),
        plan(plan),
        block(block),
        sequences(block.sequences),
        memory(*reinterpret_cast<Memory*>(shared_memory())),
        last(block.begin +
             (block.end > block.begin ? (block.end - block.begin - 1) / tile * tile : 0)),
        u_input(block, p.u, last),
        delta_input(block, p.delta, last),
        dy_input(block, p.dy, last),
        z_input(block, p.z, last),
        B_C_input(block, p.B, p.C, last),
        du_output(block, p.du, last),
        ddelta_output(block, p.ddelta, last),
        dz_output(block, p.dz, last),
        saved(block, p.saved_states, last),
        gradient_sums(block, p, last),
        steps_back(block, memory),
        gated(p.z.data != nullptr),
        regular(kOneSlice && block.is_full() && u_input.in_packs() && delta_input.in_packs() &&
                dy_input.in_packs() && p.B.packs && p.C.packs && p.du.packs && p.ddelta.packs &&
                (!gated || (z_input.in_packs() && p.dz.packs))) {}

  __device__ __forceinline__ void run() {
    enter_chunk();
    if (threadIdx.x < block.channels_at_once) {
      memory.delta_bias[threadIdx.x] = block.parameter(p.delta_bias, threadIdx.x);
      memory.D[threadIdx.x] = block.parameter(p.D, threadIdx.x);
    }
    __syncthreads();
    if (block.begin < block.end) load(block.steps_from(last));
    for (int64_t begin = last; begin >= block.begin && begin < block.end; begin -= tile) {
      const int steps = block.steps_from(begin);
      put();
      reverse_tile(begin, steps);
      with_flag(regular && steps == tile, [&](auto regular) {
        if (kOneSlice) gradient_sums.template store<regular.value>(block, memory, steps, 0);
        finish<regular.value>(steps);
      });
      gradient_sums.move(-tile);
      __syncthreads();  // all are done with the tile
    }
    store_channel_sums();
  }

 private:
  // The sequence that the step before some time belongs to, and where it begins.
  struct Cursor {
    int64_t sequence, begin;
  };

  __device__ __forceinline__ A* carry_row() const {
    if (plan.carry == nullptr) return nullptr;
    return block.channel_row(plan.carry, block.chunk_row(), p.d_state);
  }
  __device__ __forceinline__ A* dA_row() const {
    return block.channel_row(p.dA_partial, block.chunk_row(), p.d_state);
  }

  // The gradient that enters the chunk at its end, of each slice.
  __device__ __forceinline__ void enter_chunk() {
    each_slice<kOneSlice, A>(p.d_state, [&](int64_t first) {
      if (block.end == p.length) {
        for (int64_t s = sequences.first_from(p.length); s < p.sequences; ++s) {
          pass_through(s, first);
        }
      }
      load_A_log2e(block, first, steps_back.A_log2e);
      steps_back.a_g.load(block, carry_row(), first);
      steps_back.dA.load(block, nullptr, first);
      if (block.begin < block.end) cursor = enter(block.end, first);
      if (!kOneSlice) {
        steps_back.a_g.store(block, carry_row(), first);
        steps_back.dA.store(block, dA_row(), first);
      }
    });
  }

  // A sequence of no steps hands the gradient of its final state to its initial one.
  __device__ __forceinline__ void pass_through(int64_t s, int64_t first) {
    if (p.dinitial_state == nullptr) return;
    States<A> gradient;
    gradient.load(block, sequence_row(block, p.dfinal_state, s), first);
    gradient.store(block, sequence_row(block, p.dinitial_state, s), first);
  }

  // Where a sequence ends at `time`, the gradient begins with that of its final state.
  __device__ __forceinline__ Cursor enter(int64_t time, int64_t first) {
    const int64_t boundary = sequences.first_from(time), s = boundary - 1;
    if (sequences.begin(boundary) == time) {
      steps_back.a_g.load(block, sequence_row(block, p.dfinal_state, s), first);
    }
    return {s, sequences.begin(s)};
  }

  // A tile's inputs, into registers.
  __device__ __forceinline__ void load(int steps) {
    with_flag(regular && steps == tile, [&](auto regular) {
      u_input.template load<regular.value>(steps, next_u);
      delta_input.template load<regular.value>(steps, delta);
      dy_input.template load<regular.value>(steps, dy);
      if (gated) z_input.template load<regular.value>(steps, z);
      if (!kOneSlice) return;
      B_or_C = B_C_input.template load<regular.value>(steps, 0);
      if constexpr (regular.value) {
        saved.load(entering);
      } else {
        saved.load(0, entering);
      }
    });
    u_input.move(-tile);
    delta_input.move(-tile);
    dy_input.move(-tile);
    z_input.move(-tile);
    if (kOneSlice) {
      B_C_input.move(-tile);
      saved.move(-1);
    }
  }

  // What was loaded, into shared memory.
  __device__ __forceinline__ void put() {
    with_flag(p.delta_softplus, [&](auto delta_softplus) {
      with_flag(gated, [&](auto gated) {
        A u_values[kPack], dt[kPack], dtu[kPack], dy_values[kPack], z_values[kPack], bias[kPack];
        u[0] = next_u[0];
        widen(u[0], u_values);
        widen(delta[0], dt);
        widen(dy[0], dy_values);
        if constexpr (gated.value) widen(z[0], z_values);
        load_vectors(&memory.delta_bias[block.column], bias);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const Softplus<A> at = time_step(dt[j], bias[j], delta_softplus.value);
          derivative[j] = at.derivative;
          dt[j] = at.value;
          dtu[j] = at.value * u_values[j];
          if constexpr (gated.value) {
            const A gate = sigmoid(z_values[j]);
            dz_by_y[j] = dy_values[j] * silu_derivative(z_values[j], gate);
            dy_values[j] *= z_values[j] * gate;
          }
          dD[j] += dy_values[j] * u_values[j];
        }
        store_vectors(dy_values, &memory.dy[block.row][block.column]);
        memory.dt_and_dtu.store(block.row, block.column, dt, dtu);
      });
    });
    if (kOneSlice) B_C_input.put(B_or_C, &memory.B[0][0]);
  }

  // The states through the tile and the gradient back, each slice of them; then loads the next
  // tile.
  __device__ __forceinline__ void reverse_tile(int64_t begin, int steps) {
    const Cursor at_end = cursor;
    const bool inside = steps == tile && cursor.begin < begin;
    const auto load_next = [&] {
      if (begin > block.begin) load(tile);
    };
    each_slice<kOneSlice, A>(p.d_state, [&](int64_t first) {
      if (!kOneSlice) load_slice(steps, first, at_end);
      States<A> h;
      Saved::widen(entering, h);
      __syncthreads();
      with_flag(gated, [&](auto gated) {
        if (kOneSlice && inside) {
          steps_back.template recompute<true, gated.value, false>(h, 0, tile);
          steps_back.template reverse<true, false>(0, tile, load_next);
        } else {
          with_flag(first > 0, [&](auto add) {
            reverse_through_sequences<gated.value, add.value>(begin, steps, first, h);
          });
          if (kOneSlice) load_next();
        }
      });
      __syncthreads();
      if (!kOneSlice) {
        steps_back.a_g.store(block, carry_row(), first);
        steps_back.dA.store(block, dA_row(), first);
        gradient_sums.template store<false>(block, memory, steps, first);
        __syncthreads();  // all are done with the states
      }
    });
    if (!kOneSlice) {
      B_C_input.move(-tile);
      saved.move(-1);
      load_next();
    }
  }

  __device__ __forceinline__ void load_slice(int steps, int64_t first, const Cursor& at_end) {
    load_A_log2e(block, first, steps_back.A_log2e);
    steps_back.a_g.load(block, carry_row(), first);
    steps_back.dA.load(block, dA_row(), first);
    cursor = at_end;
    B_or_C = B_C_input.template load<false>(steps, first);
    saved.load(first, entering);
    B_C_input.put(B_or_C, &memory.B[0][0]);
  }

  // The same where sequences begin and end within the tile.
  template <bool kGated, bool kAdd>
  __device__ __forceinline__ void reverse_through_sequences(int64_t begin, int steps, int64_t first,
                                                            const States<A>& entering) {
    for (int64_t time = begin + steps; time > begin;) {
      const int64_t s = cursor.sequence, stop = max(cursor.begin, begin);
      States<A> h = entering;
      if (cursor.begin >= begin) h.load(block, sequence_row(block, p.initial_state, s), first);
      const int low = int(stop - begin), high = int(time - begin);
      steps_back.template recompute<false, kGated, kAdd>(h, low, high);
      steps_back.template reverse<false, kAdd>(low, high, [] {});
      time = stop;
      if (time > cursor.begin) break;
      if (p.dinitial_state != nullptr) {
        steps_back.a_g.store(block, sequence_row(block, p.dinitial_state, s), first);
      }
      for (int64_t empty = s - 1; empty >= 0 && sequences.begin(empty) == time; --empty) {
        pass_through(empty, first);
      }
      // What ends where the chunk begins is the chunk before's.
      if (time > block.begin) cursor = enter(time, first);
    }
  }

  // The gradients of the activations, from the sums over the states.
  template <bool kRegular>
  __device__ __forceinline__ void finish(int steps) {
    Pack<T> du[1] = {}, ddelta[1] = {}, dz[1] = {};
    if (kRegular || block.row < steps) {
      constexpr A ln2 = A(0.69314718055994531);
      A u_values[kPack], dt[kPack], dtu[kPack], g_B[kPack], g_A[kPack], dy[kPack], D[kPack];
      widen(u[0], u_values);
      memory.dt_and_dtu.load(block.row, block.column, dt, dtu);
      load_vectors(&memory.dy[block.row][block.column], dy);
      load_vectors(&memory.D[block.column], D);
      memory.sums.parts[0].tile.load(block.row, block.column, g_B, g_A);
#pragma unroll
      for (int i = 1; i < kParts; ++i) {
        A more_B[kPack], more_A[kPack];
        memory.sums.parts[i].tile.load(block.row, block.column, more_B, more_A);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          g_B[j] += more_B[j];
          g_A[j] += more_A[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        dt[j] = g_B[j] * dt[j] + D[j] * dy[j];
        g_A[j] = (g_B[j] * u_values[j] + g_A[j] * ln2) * derivative[j];
        ddelta_bias[j] += g_A[j];
      }
      du[0] = narrowed<T>(dt);
      ddelta[0] = narrowed<T>(g_A);
      if (gated) dz[0] = finish_dz(u_values, D);
    }
    du_output.template store<kRegular>(steps, du);
    ddelta_output.template store<kRegular>(steps, ddelta);
    if (gated) dz_output.template store<kRegular>(steps, dz);
    du_output.move(-tile);
    ddelta_output.move(-tile);
    dz_output.move(-tile);
  }

  __device__ __forceinline__ Pack<T> finish_dz(const A (&u_values)[kPack], const A (&D)[kPack]) {
    A y[kPack];
    load_vectors(&memory.y.parts[0].at[block.row][block.column], y);
#pragma unroll
    for (int i = 1; i < kParts; ++i) {
      add_vectors(&memory.y.parts[i].at[block.row][block.column], y);
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) y[j] = dz_by_y[j] * (y[j] + D[j] * u_values[j]);
    return narrowed<T>(y);
  }

  // The channels' sums over the chunk's time, by way of the memory of the tiles.
  __device__ __forceinline__ void store_channel_sums() {
    if (kOneSlice) steps_back.dA.store(block, dA_row(), 0);
    A(&dD_rows)[tile][Block::channels_at_once] = memory.dy;
    A(&ddelta_bias_rows)[tile][Block::channels_at_once] = memory.y.parts[0].at;
    store_vectors(dD, &dD_rows[block.row][block.column]);
    store_vectors(ddelta_bias, &ddelta_bias_rows[block.row][block.column]);
    __syncthreads();
    const int channel = threadIdx.x;
    if (channel >= block.channels) return;
    A dD_sum = 0, ddelta_bias_sum = 0;
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      dD_sum += dD_rows[i][channel];
      ddelta_bias_sum += ddelta_bias_rows[i][channel];
    }
    block.channel_row(p.dD_partial, block.chunk_row())[channel] = dD_sum;
    block.channel_row(p.ddelta_bias_partial, block.chunk_row())[channel] = ddelta_bias_sum;
  }

  const SelectiveScanBackward& p;
  const ScanCudaPlan& plan;
  const Block& block;
  const Sequences& sequences;
  Memory& memory;
  const int64_t last;  // where the last tile begins
  TileInput<T, Block> u_input, delta_input, dy_input, z_input;
  StatesInput<T, Block, 2> B_C_input;
  TileOutput<T, Block> du_output, ddelta_output, dz_output;
  Saved saved;
  GradientSums<T> gradient_sums;
  BackwardSteps<T> steps_back;
  const bool gated, regular;
  Cursor cursor{};
  A derivative[kPack] = {}, dz_by_y[kPack] = {};  // of dt by delta; of z by y
  A dD[kPack] = {}, ddelta_bias[kPack] = {};
  Pack<T> u[1] = {}, next_u[1] = {}, delta[1] = {}, dy[1] = {}, z[1] = {}, B_or_C{};
  typename Saved::Pair entering[Saved::count] = {};
};

template <class T, bool kOneSlice>
__global__ void __launch_bounds__(BackwardBlock<T>::threads, 1)
    backward_kernel(const SelectiveScanBackward p, const ScanCudaPlan plan) {
  const BackwardBlock<T> block(p, plan);
  Backward<T, kOneSlice>(p, plan, block).run();
}

}  // namespace

void cuda_backward(const char* op, const SelectiveScanBackward& p, const ScanCudaPlan& plan,
                   cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    using Block = BackwardBlock<T>;
    const bool one_slice = p.d_state <= kStatesAtOnce<Accumulator<T>>;
    launch(op, one_slice ? backward_kernel<T, true> : backward_kernel<T, false>,
           cuda_blocks(p, plan, Block::channels_at_once), Block::threads, sizeof(BackwardMemory<T>),
           stream, p, plan);
  });
}

}  // namespace mambablock
