// The k largest of each row, exactly, lowest index first among equals, written in ascending order of index.
//
// One cluster of blocks a row. A row is cut into groups of 32 consecutive scores. Every block of the cluster streams its share
// of the row and leaves the groups' maxima in the first block's shared memory. The k groups with the largest maxima (the earlier
// one among equals) hold the k best scores: a score in any other group has k maxima before it. So the first block
//   1. finds those k groups: radix select over at most 8,192 maxima, 11 bits a pass, keys in registers;
//   2. reads them again (k * 128 bytes) and radix-selects among their scores.
// Rows of at most 8,192 scores skip the groups. The work does not depend on the values but for an early end of a radix pass.

namespace {

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int GROUP = 32;
constexpr int KEYS = 8;                      // maxima, or scores of a short row, a thread
constexpr int MAX_GROUPS = THREADS * KEYS;   // and the longest row without groups
constexpr int BINS = 2048;
#ifndef MAX_K
#define MAX_K 1024                           // 512 or 1024; k may be less
#endif

struct alignas(16) Shared {
  unsigned maxima[MAX_GROUPS];
  int histogram[BINS];
  int chosen[MAX_K];
  int sums[2][WARPS];
  int bin, above, inside;
};

// Order of floats as that of unsigned integers; -0 equals +0. 0 is no score's key.
__device__ unsigned key_of(float x) {
  x += 0.0f;
  unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sum of `value` over the threads before this one. `turn` alternates between calls, so that one barrier is enough.
__device__ int sum_before(int value, int (&sums)[2][WARPS], int turn) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) sums[turn][warp] = sum;
  __syncthreads();
  int warps = sums[turn][lane];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(~0u, warps, step);
    if (lane >= step) warps += other;
  }
  int before = __shfl_sync(~0u, warps, warp == 0 ? 0 : warp - 1);
  return sum - value + (warp == 0 ? 0 : before);
}

struct Cut {
  unsigned key;  // keys above it are taken,
  int ties;      // and so many of those equal to it, the first ones
};

// The cut that takes k of the block's keys (there are at least k that are not 0). The histogram is zero before and after.
template <int N>
__device__ Cut find_cut(const unsigned (&keys)[N], int k, Shared& shared) {
  unsigned prefix = 0, mask = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const unsigned digits = pass == 2 ? 1023 : 2047;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (keys[i] != 0 && (keys[i] & mask) == prefix) atomicAdd(&shared.histogram[(keys[i] >> shift) & digits], 1);
    __syncthreads();
    // Bins from the highest down, two a thread.
    const int low = BINS - 2 - 2 * threadIdx.x;
    int2* mine = reinterpret_cast<int2*>(&shared.histogram[low]);
    const int2 counts = *mine;
    *mine = make_int2(0, 0);
    const int before = sum_before(counts.x + counts.y, shared.sums, pass & 1);
    if (before < k && k <= before + counts.x + counts.y) {
      const bool upper = k <= before + counts.y;
      shared.bin = upper ? low + 1 : low;
      shared.above = upper ? before : before + counts.y;
      shared.inside = upper ? counts.y : counts.x;
    }
    __syncthreads();
    prefix |= static_cast<unsigned>(shared.bin) << shift;
    mask |= digits << shift;
    k -= shared.above;
    if (shared.inside == k) return {prefix == 0 ? 0 : prefix - 1, 0};
  }
  return {prefix, k};
}

// Give each taken key its place, in the order of (thread, i), and call put(place, i).
template <int N, typename Put>
__device__ void take(const unsigned (&keys)[N], Cut cut, Shared& shared, Put put) {
  int above = 0, equal = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    above += keys[i] > cut.key;
    equal += keys[i] == cut.key;
  }
  // Both counts in one word: a block holds at most 32,768 keys.
  const int before = sum_before(above << 16 | equal, shared.sums, 1);
  above = static_cast<unsigned>(before) >> 16;
  equal = before & 0xffff;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool ties = keys[i] == cut.key;
    if (keys[i] > cut.key || (ties && equal < cut.ties)) put(above + min(equal, cut.ties), i);
    above += keys[i] > cut.key;
    equal += ties;
  }
}

struct Row {
  const float* scores;
  int count;
  bool aligned;  // to 16 bytes

  // Four scores from `first` on; those past the end are replaced.
  __device__ float4 load(int first, float past) const {
    if (aligned && first + 4 <= count) return *reinterpret_cast<const float4*>(scores + first);
    float4 four;
    four.x = first + 0 < count ? scores[first + 0] : past;
    four.y = first + 1 < count ? scores[first + 1] : past;
    four.z = first + 2 < count ? scores[first + 2] : past;
    four.w = first + 3 < count ? scores[first + 3] : past;
    return four;
  }

  // N scores' keys from `first` on; 0 past the end and for those below `least`.
  template <int N>
  __device__ void keys(int first, unsigned least, unsigned (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 four = load(first + i, 0.0f);
      const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const unsigned key = key_of(values[j]);
        out[i + j] = first + i + j < count && key >= least ? key : 0;
      }
    }
  }
};

__device__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ void store_in_first_block(unsigned* address, unsigned value) {
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(address));
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"(here));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
}

// Maxima of the row's groups, this block's share of them. A warp takes 32 groups at a time: 8 loads of 16 bytes a thread.
__device__ void find_maxima(const Row& row, int num_groups, Shared& shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int stride = cluster_size() * WARPS;
  bool started = false;
  for (int tile = warp * cluster_size() + cluster_rank(); tile * 32 < num_groups; tile += stride) {
    float best[8];
    float4 four[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) four[j] = row.load(tile * 1024 + j * 128 + lane * 4, -__int_as_float(0x7f800000));
#pragma unroll
    for (int j = 0; j < 8; ++j) best[j] = fmaxf(fmaxf(four[j].x, four[j].y), fmaxf(four[j].z, four[j].w));
    // Eight lanes hold one group of each load: transpose and reduce, so that lane l ends with load l % 8.
#pragma unroll
    for (int half = 4; half >= 1; half /= 2) {
      const bool upper = lane & half;
#pragma unroll
      for (int j = 0; j < half; ++j) {
        const float other = __shfl_xor_sync(~0u, upper ? best[j] : best[j + half], half);
        best[j] = fmaxf(upper ? best[j + half] : best[j], other);
      }
    }
    if (!started) cluster_wait();  // the first block runs: its memory may be written to
    started = true;
    const int group = tile * 32 + (lane & 7) * 4 + (lane >> 3);
    if (group < num_groups) store_in_first_block(&shared.maxima[group], key_of(best[0]));
  }
  if (!started) cluster_wait();
}

// Scores of the chosen groups; PER_THREAD of a group's 32 a thread, in order.
template <int PER_THREAD>
__device__ void select_in_groups(const Row& row, int k, unsigned least, int* out, Shared& shared) {
  constexpr int SHARE = GROUP / PER_THREAD;
  unsigned keys[PER_THREAD];
  const int place = threadIdx.x / SHARE;
  int first = row.count;
  if (place < k) first = shared.chosen[place] * GROUP + threadIdx.x % SHARE * PER_THREAD;
  row.keys(first, least, keys);
  const Cut cut = find_cut(keys, k, shared);
  take(keys, cut, shared, [&](int at, int i) { out[at] = first + i; });
}

}  // namespace

// scores: [rows, row_stride]; num_visible: [rows]; chosen: [rows, k]. Grid: cluster size * rows blocks of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024, 1) index_topk(
    const float* scores, const long long* num_visible, int* chosen, long long row_stride, int num_scores, int k) {
  __shared__ Shared shared;
  const long long row_number = blockIdx.x / cluster_size();
  const bool is_first = cluster_rank() == 0;
  int* out = chosen + row_number * k;
  const long long visible = num_visible[row_number];
  const int count = static_cast<int>(visible < num_scores ? visible : num_scores);
  if (count <= k) {
    if (is_first)
      for (int i = threadIdx.x; i < k; i += THREADS) out[i] = i < count ? i : -1;
    return;
  }
  const float* start = scores + row_number * row_stride;
  const Row row = {start, count, reinterpret_cast<unsigned long long>(start) % 16 == 0};
  const bool in_groups = count > MAX_GROUPS;
  if (!in_groups && !is_first) return;
  if (is_first)
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.histogram[i] = 0;
  unsigned keys[KEYS];
  if (!in_groups) {
    row.keys(threadIdx.x * KEYS, 0u, keys);
    __syncthreads();
    const Cut cut = find_cut(keys, k, shared);
    take(keys, cut, shared, [&](int at, int i) { out[at] = threadIdx.x * KEYS + i; });
    return;
  }
  const int num_groups = (count + GROUP - 1) / GROUP;
  __syncwarp();
  cluster_arrive();
  find_maxima(row, num_groups, shared);
  __syncwarp();
  cluster_arrive();
  if (!is_first) return;
  cluster_wait();
#pragma unroll
  for (int i = 0; i < KEYS; i += 4) {
    const int group = threadIdx.x * KEYS + i;
    const uint4 four = *reinterpret_cast<const uint4*>(&shared.maxima[group]);
    keys[i + 0] = group + 0 < num_groups ? four.x : 0;
    keys[i + 1] = group + 1 < num_groups ? four.y : 0;
    keys[i + 2] = group + 2 < num_groups ? four.z : 0;
    keys[i + 3] = group + 3 < num_groups ? four.w : 0;
  }
  if (num_groups <= k) {  // fewer groups than k: all of them
    for (int i = threadIdx.x; i < num_groups; i += THREADS) shared.chosen[i] = i;
    for (int i = threadIdx.x; i < MAX_K; i += THREADS)
      if (i >= num_groups) shared.chosen[i] = MAX_GROUPS;
    __syncthreads();
    select_in_groups<MAX_K * GROUP / THREADS>(row, k, 0u, out, shared);
    return;
  }
  const Cut cut = find_cut(keys, k, shared);
  take(keys, cut, shared, [&](int at, int i) { shared.chosen[at] = threadIdx.x * KEYS + i; });
  __syncthreads();
  const unsigned least = cut.ties > 0 ? cut.key : cut.key + 1;
  select_in_groups<MAX_K * GROUP / THREADS>(row, k, least, out, shared);
}
