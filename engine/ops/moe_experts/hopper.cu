// Experts at 4 bits with more rows than triton_few.py is for, on Hopper: the same values, but weights become FP8 in the registers that
// its matrix units read, and one warpgroup of a block of threads does nothing but load.
//
// triton_few.py describes tiles and words of weights, and how codes become FP8. A block of threads works on 2 x 128 channels (gate and up,
// or two tiles of the second product) of BLOCK_M slots, and goes on to the next as long as there are any. The loading warpgroup fetches
// weights in one piece a step, and rows of x as the matrix units want them: 128 bytes each, 16-byte parts in XOR order. Two warpgroups
// multiply, 64 channels of each tile each. Products of 128 channels, as many as their FP8 sums are exact for, are added up in fp32.
//
// Macros: BLOCK_M, 64 or 128 slots; ROOMS, 1 for rows in rooms (few.py), without routing weights, and of which `listed` blocks exist.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned u32;
typedef unsigned long long u64;

namespace {

constexpr int TILE = 128;
constexpr int CODES = TILE * TILE / 2, WORDS = TILE * 4;  // bytes of a tile
constexpr int LOADERS = 128, MULTIPLIERS = 256;
constexpr int SUMS = BLOCK_M / 2;              // of a thread: 64 channels x BLOCK_M over 128 threads
constexpr bool BOTH = BLOCK_M == 64;           // tiles at a time, which registers have room for
constexpr int STAGES = BLOCK_M == 64 ? 8 : 5;  // as many as shared memory has room for
constexpr int GROUP_BLOCKS = 8;                // that go through an expert's tiles together, so that a tile is read once

struct alignas(1024) Stage {
  u8 x[BLOCK_M * TILE];
  u8 codes[2][CODES];
  u32 words[2][TILE];
  float scale[BLOCK_M];
};

struct Shared {
  Stage stages[STAGES];
  u8 results[BLOCK_M * TILE];
  float most[8][BLOCK_M];
  u64 full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES);

__device__ u32 address_of(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

__device__ void wait(u64& barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
      ::"r"(address_of(&barrier)), "r"(phase) : "memory");
}

__device__ void bulk_copy(void* to, const void* from, u32 bytes, u64& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(address_of(to)), "l"(from), "r"(bytes), "r"(address_of(&barrier)) : "memory");
}

// What a block of threads does in turns: so many slots, and a tile of 128 channels or a pair of them.
struct Turns {
  int turn, blocks, tiles, block, tile;
  __device__ Turns(int blocks, int tiles) : turn(blockIdx.x), blocks(blocks), tiles(tiles) {}
  __device__ bool find() {
    if (turn >= blocks * tiles) return false;
    const int group = turn / (GROUP_BLOCKS * tiles), rest = turn % (GROUP_BLOCKS * tiles);
    const int size = min(GROUP_BLOCKS, blocks - group * GROUP_BLOCKS);
    block = group * GROUP_BLOCKS + rest % size, tile = rest / size;
    return true;
  }
  __device__ void next() { turn += gridDim.x; }
};

// 64 channels x 128 of a tile as e4m3: for each 32 of the 128 what the matrix units want of a thread, and the scales of its rows r, r + 8.
struct Weights {
  u32 a[4][4];
  float scale[2];
};

// The e4m3 bytes of magnitudes 0, 0.5, 1, 1.5 and 2, 3, 4, 6 at a group's exponent.
struct Table {
  u32 low, high;
  __device__ Table(u32 words, int group) {
    const u32 exponent = words >> (4 * group) & 15;
    low = exponent * 0x08080800u + 0x03FFF800u, high = exponent * 0x08080808u + 0x14100C08u;
  }
};

// `row`: the first of a warp's 16 rows.
__device__ Weights decode(const u8* codes, const u32* words, int row) {
  const int lane = threadIdx.x % 32;
  const u32 word[2] = {words[row + lane / 4], words[row + lane / 4 + 8]};
  const u32 from = address_of(codes) + (row + lane % 16) * 32 + lane / 16 * 16;
  Weights out;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 packed[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(packed[0]), "=r"(packed[1]), "=r"(packed[2]), "=r"(packed[3]) : "r"(from + half * TILE * 32) : "memory");
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const Table first(word[i], 2 * half), second(word[i], 2 * half + 1);
#pragma unroll
      for (int j = i; j < 4; j += 2) {
        const u32 magnitudes = packed[j] & 0x77777777u;
        out.a[2 * half][j] = __byte_perm(first.low, first.high, magnitudes) | (packed[j] << 4 & 0x80808080u);
        out.a[2 * half + 1][j] = __byte_perm(second.low, second.high, magnitudes >> 16) | (packed[j] & 0x80808080u);
      }
    }
  }
  out.scale[0] = __uint_as_float((word[0] >> 16 & 255) << 23);
  out.scale[1] = __uint_as_float((word[1] >> 16 & 255) << 23);
  return out;
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
// d = a * x, or more of it: 64 channels x BLOCK_M of 32 channels of x, whose descriptor is b.
__device__ void multiply_32(float (&d)[SUMS], const u32 (&a)[4], u64 b, bool adds) {
#if BLOCK_M == 64
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
      "%28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1;\n}"
      : D16(0), D16(16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));
#elif BLOCK_M == 128
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
      "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, "
      "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1;\n}"
      : D16(0), D16(16), D16(32), D16(48) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));
#endif
}

// d = weights * x, to be waited for.
__device__ void multiply(float (&d)[SUMS], const Weights& weights, const u8* x) {
  // A matrix descriptor: address, 1,024 bytes between 8 rows, rows of 128 bytes in XOR order.
  const u64 b = u64{1} << 62 | u64{1024 >> 4} << 32 | u64{1} << 16 | (address_of(x) >> 4 & 0x3FFF);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int group = 0; group < 4; group++) multiply_32(d, weights.a[group], b + 2 * group, group > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until no more than `LEFT` products run, of which d is none: the compiler must neither read it before nor move it.
template <int LEFT>
__device__ void wait_for(float (&d)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(d[i])::"memory");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#pragma unroll
  for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Scales of the columns whose sums a thread has: slots 8 j + 2 (its number modulo 4), and the next.
struct Columns {
  float2 scale[BLOCK_M / 8];
  __device__ Columns(const float* scales) {
#pragma unroll
    for (int j = 0; j < BLOCK_M / 8; j++) scale[j] = reinterpret_cast<const float2*>(scales)[4 * j + threadIdx.x % 4];
  }
};

__device__ void add_scaled(float (&sums)[SUMS], const float (&d)[SUMS], const float (&row_scale)[2], const Columns& columns) {
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    const float2 column = columns.scale[i / 4];
    sums[i] += d[i] * (row_scale[i / 2 % 2] * (i % 2 ? column.y : column.x));
  }
}

struct Rows {
  const u8* codes;  // e4m3
  const float* scales;
  const int *pairs, *expert;  // of slots, null if rows lie as slots do; of blocks
  int top_k, scale_row_stride, scale_group_stride, scale_expert_gap;

  __device__ int of(int slot) const { return pairs ? max(pairs[slot], 0) / top_k : slot; }
};

struct Matrices {  // of all experts
  const u8* codes;
  const u32* words;
  int num_tiles, k_tiles;
};

template <bool PLACES>  // whether two tiles lie side by side, w1's and w3's; else they follow each other
__device__ void load(Shared& shared, Turns turns, Rows rows, Matrices weights) {
  const int thread = threadIdx.x, k_tiles = weights.k_tiles;
  int stage = 0;
  u32 phase = 1;
  for (; turns.find(); turns.next()) {
    const int expert = rows.expert[turns.block];
    if (expert < 0) continue;
    u32 from[BLOCK_M / 16];  // in 16 bytes
#pragma unroll
    for (int i = 0; i < BLOCK_M / 16; i++) from[i] = rows.of(turns.block * BLOCK_M + i * 16 + thread / 8) * (k_tiles * 8) + thread % 8;
    const int row = rows.of(turns.block * BLOCK_M + thread % BLOCK_M);
    const float* scale = rows.scales + row * rows.scale_row_stride + expert * rows.scale_expert_gap;
    const u64 first = u64{static_cast<u32>(expert * weights.num_tiles + (PLACES ? 1 : 2) * turns.tile)} * k_tiles;
    for (int k = 0; k < k_tiles; k++) {
      Stage& to = shared.stages[stage];
      u64& full = shared.full[stage];
      wait(shared.empty[stage], phase);
      if (thread == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     ::"r"(address_of(&full)), "r"(2 * (CODES + WORDS)) : "memory");
#pragma unroll
        for (int place = 0; place < (PLACES ? 1 : 2); place++) {
          const u64 tile = PLACES ? 2 * (first + k) : first + place * k_tiles + k;
          bulk_copy(to.codes[place], weights.codes + tile * CODES, (PLACES ? 2 : 1) * CODES, full);
          bulk_copy(to.words[place], weights.words + tile * TILE, (PLACES ? 2 : 1) * WORDS, full);
        }
      }
#pragma unroll
      for (int i = 0; i < BLOCK_M / 16; i++) {
        const int to_row = i * 16 + thread / 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                     ::"r"(address_of(to.x) + to_row * TILE + (thread % 8 ^ to_row % 8) * 16), "l"(rows.codes + u64{from[i]} * 16 + k * TILE)
                     : "memory");
      }
      if (thread < BLOCK_M)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                     ::"r"(address_of(to.scale + thread)), "l"(scale + k * rows.scale_group_stride) : "memory");
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address_of(&full)) : "memory");
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// `finish(turns, row, first, second)`: what to do with the sums of both tiles' 16 rows from `row` on.
template <class Finish>
__device__ void multiply_all(Shared& shared, Turns turns, Rows rows, int k_tiles, Finish finish) {
  const int row = (threadIdx.x - LOADERS) / 32 * 16;
  int stage = 0;
  u32 phase = 0;
  for (; turns.find(); turns.next()) {
    if (rows.expert[turns.block] < 0) continue;
    float first_sums[SUMS] = {}, second_sums[SUMS] = {}, first_product[SUMS], second_product[SUMS];
    for (int k = 0; k < k_tiles; k++) {
      const Stage& now = shared.stages[stage];
      wait(shared.full[stage], phase);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // x did not come the way that the matrix units read it
      const Weights first = decode(now.codes[0], now.words[0], row);
      if constexpr (BOTH) {
        const Weights second = decode(now.codes[1], now.words[1], row);
        multiply(first_product, first, now.x);
        multiply(second_product, second, now.x);
        const Columns columns(now.scale);
        wait_for<1>(first_product);
        add_scaled(first_sums, first_product, first.scale, columns);
        wait_for<0>(second_product);
        add_scaled(second_sums, second_product, second.scale, columns);
      } else {
        multiply(first_product, first, now.x);
        const Weights second = decode(now.codes[1], now.words[1], row);
        wait_for<0>(first_product);
        add_scaled(first_sums, first_product, first.scale, Columns(now.scale));
        multiply(first_product, second, now.x);
        wait_for<0>(first_product);
        add_scaled(second_sums, first_product, second.scale, Columns(now.scale));
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(&shared.empty[stage])) : "memory");
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    finish(turns, row, first_sums, second_sums);
  }
}

template <bool PLACES, class Finish>
__device__ void run(Shared& shared, Turns turns, Rows rows, Matrices weights, Finish finish) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(&shared.full[stage])), "r"(LOADERS + 1));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(&shared.empty[stage])), "r"(MULTIPLIERS / 32));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < LOADERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    load<PLACES>(shared, turns, rows, weights);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    multiply_all(shared, turns, rows, weights.k_tiles, finish);
  }
}

__device__ float round_bf16(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return __uint_as_float(u32{bits} << 16);
}

__device__ u32 two_bf16(float low, float high) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// With the exponential function and the division that Triton has.
__device__ float swiglu(float gate, float up, float limit) {
  gate = fminf(round_bf16(gate), limit);
  up = fminf(fmaxf(round_bf16(up), -limit), limit);
  float power, out;
  asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(-gate * 1.4426950408889634f));
  asm("div.full.f32 %0, %1, %2;" : "=f"(out) : "f"(gate), "f"(1.0f + power));
  return out * up;
}

__device__ void multipliers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory"); }

}  // namespace

extern __shared__ __align__(1024) u8 memory[];

// As triton_few.py's moe_hidden_kernel: clamped SwiGLU of w1 x and w3 x, times the weights of slots' pairs, as FP8 of 128 channels.
extern "C" __global__ void __launch_bounds__(LOADERS + MULTIPLIERS, 1)
moe_hidden(const u8* codes, const float* scales, const u8* tiles, const u32* words, const int* pairs, const int* block_expert,
           const int* listed, const float* weights, u8* hidden, float* hidden_scales, int num_blocks, int num_tiles, int k_tiles, int top_k,
           int scale_row_stride, int scale_group_stride, int scale_expert_gap, float limit) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Rows rows = {codes, scales, pairs, block_expert, top_k, scale_row_stride, scale_group_stride, scale_expert_gap};
  const auto finish = [=, &shared](const Turns& turns, int row, float (&gate)[SUMS], float (&up)[SUMS]) {
    const int thread = threadIdx.x - LOADERS, lane = thread % 32, slot = turns.block * BLOCK_M;
#pragma unroll
    for (int j = 0; j < SUMS / 4; j++) {
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const int column = 8 * j + lane % 4 * 2 + odd;
        float most = 0.0f;
#pragma unroll
        for (int i = 4 * j + odd; i < 4 * j + 4; i += 2) {
          float value = swiglu(gate[i], up[i], limit);
          if (!ROOMS) value *= weights[max(pairs[slot + column], 0)];
          gate[i] = round_bf16(value);
          most = fmaxf(most, fabsf(gate[i]));
        }
#pragma unroll
        for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        if (lane < 4) shared.most[thread / 32][column] = most;
      }
    }
    multipliers_meet();
#pragma unroll
    for (int j = 0; j < SUMS / 4; j++) {
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const int column = 8 * j + lane % 4 * 2 + odd, i = 4 * j + odd;
        float most = 1e-4f;
#pragma unroll
        for (int warp = 0; warp < 8; warp++) most = fmaxf(most, shared.most[warp][column]);
        const int bits = __float_as_int(most), exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000);
        const float inverse = __int_as_float((254 - exponent) << 23);
        u16 two;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(gate[i + 2] * inverse), "f"(gate[i] * inverse));
        u8* result = shared.results + column * TILE + row + lane / 4;
        result[0] = two & 255, result[8] = two >> 8;
        if (thread < 4 && pairs[slot + column] >= 0)
          hidden_scales[(slot + column) * num_tiles + turns.tile] = __int_as_float(exponent << 23);
      }
    }
    multipliers_meet();
    for (int part = thread; part < BLOCK_M * 8; part += MULTIPLIERS) {
      const int column = part / 8;
      if (pairs[slot + column] >= 0)
        *reinterpret_cast<uint4*>(hidden + (u64{static_cast<u32>(slot + column)} * num_tiles + turns.tile) * TILE + part % 8 * 16) =
            *reinterpret_cast<const uint4*>(shared.results + part * 16);
    }
  };
  run<true>(shared, Turns(ROOMS ? *listed : num_blocks, num_tiles), rows, {tiles, words, num_tiles, k_tiles}, finish);
}

// As triton_few.py's moe_out_kernel: w2 hidden in bf16, in the rows of the slots' pairs. num_tiles is even.
extern "C" __global__ void __launch_bounds__(LOADERS + MULTIPLIERS, 1)
moe_out(const u8* hidden, const float* hidden_scales, const u8* tiles, const u32* words, const int* pairs, const int* block_expert,
        const int* listed, u16* out, int num_blocks, int num_tiles, int k_tiles, int width, int out_stride) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Rows rows = {hidden, hidden_scales, nullptr, block_expert, 1, k_tiles, 1, 0};
  const auto finish = [=](const Turns& turns, int row, float (&first)[SUMS], float (&second)[SUMS]) {
    const int lane = threadIdx.x % 32, is_odd = lane / 4 % 2;
#pragma unroll
    for (int j = 0; j < SUMS / 4; j++) {
      // Neighbouring rows, which are channels, swap columns: each then has two channels of one column, which lie side by side.
      const int pair = pairs[turns.block * BLOCK_M + 8 * j + lane % 4 * 2 + is_odd];
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; i += 2) {
#pragma unroll
        for (int place = 0; place < 2; place++) {
          float(&sums)[SUMS] = place ? second : first;
          const float own = is_odd ? sums[i + 1] : sums[i], other = __shfl_xor_sync(~0u, is_odd ? sums[i] : sums[i + 1], 4);
          const int channel = (2 * turns.tile + place) * TILE + row + (i - 4 * j) * 4 + lane / 8 * 2;
          if (pair >= 0 && channel < width)
            *reinterpret_cast<u32*>(out + u64{static_cast<u32>(pair)} * out_stride + channel) =
                is_odd ? two_bf16(other, own) : two_bf16(own, other);
        }
      }
    }
  };
  run<false>(shared, Turns(ROOMS ? *listed : num_blocks, num_tiles / 2), rows, {tiles, words, num_tiles, k_tiles}, finish);
}
