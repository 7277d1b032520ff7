// The k largest of each row, exactly, of equals the lowest indices; the same row gives the same order of indices every time.
//
// One cluster of blocks a row. A row is cut into groups of 32 consecutive scores. Every block of the cluster streams its share
// of the row and leaves the groups' maxima in the first block's shared memory. The k groups with the largest maxima (the earlier
// one among equals) hold the k best scores: a score in any other group has k maxima before it. So the first block
//   1. finds those k groups: radix select over at most 8,192 maxima, 11 bits a pass, keys in registers;
//   2. reads them again (k * 128 bytes), and radix-selects among their scores that are not below the k-th maximum: as a rule hardly
//      more than k.
// Rows of at most 8,192 scores skip the groups. A radix pass takes the highest bits in which the keys differ; there are three at most.
//
// Compiled with THREADS=256 it is for rows of at most 2,048 scores only, in up to four passes: several such blocks share a
// multiprocessor, and wait at their barriers in turns.

namespace {

#ifndef THREADS
#define THREADS 1024
#endif
constexpr bool HAS_GROUPS = THREADS == 1024;
constexpr int WARPS = THREADS / 32;          // 32 at most: one lane a warp sums over them
constexpr int GROUP = 32;
constexpr int KEYS = 8;                      // maxima, or scores of a short row, a thread
constexpr int MAX_GROUPS = THREADS * KEYS;   // and the longest row without groups
constexpr int BINS = 2 * THREADS;            // two a thread
constexpr int DIGIT_BITS = HAS_GROUPS ? 11 : 9;
static_assert(BINS == 1 << DIGIT_BITS);
#ifndef MAX_K
#define MAX_K 1024                           // 512 or 1024; k may be less
#endif

struct Candidate {
  unsigned key;
  int index;
};

constexpr int MAX_CANDIDATES = MAX_GROUPS / 2;  // in the place of the maxima

struct alignas(16) Shared {
  union {
    unsigned maxima[MAX_GROUPS];
    Candidate candidates[MAX_CANDIDATES];
  };
  int histogram[BINS];
  int chosen[MAX_K];
  int sums[2][WARPS];
  int bin, above, inside;
  unsigned most;
};

// Order of floats as that of unsigned integers; -0 equals +0. 0 is no score's key.
__device__ unsigned key_of(float x) {
  x += 0.0f;
  unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sum of `value` over the warps before this one; every lane of a warp gives the same. `turn` alternates between calls, so that one
// barrier is enough.
__device__ int sum_of_warps_before(int value, int (&sums)[2][WARPS], int turn) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) sums[turn][warp] = value;
  __syncthreads();
  return __reduce_add_sync(~0u, lane < warp ? sums[turn][lane] : 0);
}

// Sum of `value` over the threads before this one.
__device__ int sum_before(int value, int (&sums)[2][WARPS], int turn) {
  const int lane = threadIdx.x & 31;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - value + sum_of_warps_before(__shfl_sync(~0u, sum, 31), sums, turn);
}

struct Range {
  unsigned least, most;
};

struct Cut {
  unsigned key;  // keys above it are taken,
  int ties;      // and so many of those equal to it, the first ones
};

// The cut that takes k of the block's keys (at least k are not 0, and those lie in the range). The histogram is zero before and after.
template <int N>
__device__ Cut find_cut(const unsigned (&keys)[N], Range range, int k, Shared& shared) {
  unsigned prefix = 0;
  int upper = 32 - __clz(range.most - range.least);
#pragma unroll 1
  for (int pass = 0; upper > 0; ++pass) {
    const int shift = max(0, upper - DIGIT_BITS);
    const unsigned digits = (1u << (upper - shift)) - 1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const unsigned value = keys[i] - range.least;
      if (keys[i] != 0 && (pass == 0 || value >> upper == prefix)) atomicAdd(&shared.histogram[(value >> shift) & digits], 1);
    }
    __syncthreads();
    // Bins from the highest down, two a thread.
    const int low = BINS - 2 - 2 * threadIdx.x;
    int2* mine = reinterpret_cast<int2*>(&shared.histogram[low]);
    const int2 counts = *mine;
    *mine = make_int2(0, 0);
    const int before = sum_before(counts.x + counts.y, shared.sums, pass & 1);
    if (before < k && k <= before + counts.x + counts.y) {
      const bool is_upper = k <= before + counts.y;
      shared.bin = is_upper ? low + 1 : low;
      shared.above = is_upper ? before : before + counts.y;
      shared.inside = is_upper ? counts.y : counts.x;
    }
    __syncthreads();
    prefix = prefix << (upper - shift) | static_cast<unsigned>(shared.bin);
    k -= shared.above;
    if (shared.inside == k) return {range.least + (prefix << shift) - 1, 0};
    upper = shift;
  }
  return {range.least + prefix, k};
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
  // Both counts in one word: there are at most 8,192 keys.
  const int before = sum_before(above << 16 | equal, shared.sums, 1);
  above = before >> 16;
  equal = before & 0xffff;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool ties = keys[i] == cut.key;
    if (keys[i] > cut.key || (ties && equal < cut.ties)) put(above + min(equal, cut.ties), i);
    above += keys[i] > cut.key;
    equal += ties;
  }
}

// The same for keys whose order is (warp, i / 4, lane, i % 4). Returns how many there are above the cut; calls nothing if that is more
// than `limit`.
template <int N, typename Put>
__device__ int take_in_lines(const unsigned (&keys)[N], Cut cut, int limit, Shared& shared, Put put) {
  // Counts of four lines in one word: a line of a warp has 128 keys.
  constexpr int WORDS = N / 16;
  unsigned above[WORDS] = {}, equal[WORDS] = {}, all_above[WORDS], all_equal[WORDS];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    above[i / 16] += static_cast<unsigned>(keys[i] > cut.key) << i / 4 % 4 * 8;
    equal[i / 16] += static_cast<unsigned>(keys[i] == cut.key) << i / 4 % 4 * 8;
  }
  int warp_above = 0, warp_equal = 0;
#pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    const unsigned my_above = above[word], my_equal = equal[word];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned other_above = __shfl_up_sync(~0u, above[word], step), other_equal = __shfl_up_sync(~0u, equal[word], step);
      if ((threadIdx.x & 31) >= step) above[word] += other_above, equal[word] += other_equal;
    }
    all_above[word] = __shfl_sync(~0u, above[word], 31);
    all_equal[word] = __shfl_sync(~0u, equal[word], 31);
    above[word] -= my_above;
    equal[word] -= my_equal;
    warp_above = __dp4a(all_above[word], 0x01010101u, static_cast<unsigned>(warp_above));
    warp_equal = __dp4a(all_equal[word], 0x01010101u, static_cast<unsigned>(warp_equal));
  }
  // Both counts in one word: a block holds at most 32,768 keys.
  const unsigned before = sum_of_warps_before(warp_above << 16 | warp_equal, shared.sums, 1);
  const int total = static_cast<unsigned>(__reduce_add_sync(~0u, shared.sums[1][threadIdx.x & 31])) >> 16;
  if (total > limit) return total;
  int line_above = before >> 16, line_equal = before & 0xffff;
#pragma unroll
  for (int line = 0; line < N / 4; ++line) {
    const int word = line / 4, shift = line % 4 * 8;
    int my_above = line_above + (above[word] >> shift & 255), my_equal = line_equal + (equal[word] >> shift & 255);
#pragma unroll
    for (int i = 4 * line; i < 4 * line + 4; ++i) {
      const bool ties = keys[i] == cut.key;
      if (keys[i] > cut.key || (ties && my_equal < cut.ties)) put(my_above + min(my_equal, cut.ties), i);
      my_above += keys[i] > cut.key;
      my_equal += ties;
    }
    line_above += all_above[word] >> shift & 255;
    line_equal += all_equal[word] >> shift & 255;
  }
  return total;
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

  // Keys of four scores; 0 past the row's end.
  __device__ void keys(int first, unsigned* out) const {
    const float4 four = load(first, 0.0f);
    out[0] = first + 0 < count ? key_of(four.x) : 0;
    out[1] = first + 1 < count ? key_of(four.y) : 0;
    out[2] = first + 2 < count ? key_of(four.z) : 0;
    out[3] = first + 3 < count ? key_of(four.w) : 0;
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

// Choose among candidates in shared memory, N a thread.
template <int N>
__device__ void select_candidates(int count, Range range, int k, int* out, Shared& shared) {
  unsigned keys[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int number = threadIdx.x * N + i;
    keys[i] = number < count ? shared.candidates[number].key : 0;
  }
  const Cut cut = find_cut(keys, range, k, shared);
  take(keys, cut, shared, [&](int at, int i) { out[at] = shared.candidates[threadIdx.x * N + i].index; });
}

// Choose among the scores of the chosen groups; none is above `range`, and those below it are not taken. Eight lanes read a group.
__device__ void select_in_groups(const Row& row, int num_groups, int k, Range range, int* out, Shared& shared) {
  constexpr int N = MAX_K / WARPS;
  unsigned keys[N];
  const int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * N + (lane >> 3);
  auto index_of = [&](int i) { return shared.chosen[first + i / 4 * 4] * GROUP + (lane & 7) * 4 + i % 4; };
#pragma unroll
  for (int i = 0; i < N; i += 4) row.keys(first + i < num_groups ? index_of(i) : row.count, &keys[i]);
  // As a rule few of them can be among the best: go on with those, one a thread.
  const int count = take_in_lines(keys, {range.least - 1, 0}, MAX_CANDIDATES, shared, [&](int at, int i) {
    shared.candidates[at] = {keys[i], index_of(i)};
  });
  __syncthreads();
  if (count <= THREADS) return select_candidates<1>(count, range, k, out, shared);
  if (count <= MAX_CANDIDATES) return select_candidates<MAX_CANDIDATES / THREADS>(count, range, k, out, shared);
#pragma unroll
  for (int i = 0; i < N; ++i) keys[i] = keys[i] >= range.least ? keys[i] : 0;
  const Cut cut = find_cut(keys, range, k, shared);
  take_in_lines(keys, cut, k, shared, [&](int at, int i) { out[at] = index_of(i); });
}

}  // namespace

// scores: [rows, row_stride]; num_visible: [rows]; chosen: [rows, k]. Grid: cluster size * rows blocks.
extern "C" __global__ void __launch_bounds__(THREADS, HAS_GROUPS ? 1 : 6) index_topk(
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
  const bool in_groups = HAS_GROUPS && count > MAX_GROUPS;
  if (!in_groups && !is_first) return;
  if (is_first) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.histogram[i] = 0;
    if (threadIdx.x == 0) shared.most = 0;
  }
  unsigned keys[KEYS];
  const int first = threadIdx.x * KEYS;
  const Range any = {1, ~0u};
  if (!in_groups) {
#pragma unroll
    for (int i = 0; i < KEYS; i += 4) row.keys(first + i, &keys[i]);
    __syncthreads();
    const Cut cut = find_cut(keys, any, k, shared);
    take(keys, cut, shared, [&](int at, int i) { out[at] = first + i; });
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
    const uint4 four = *reinterpret_cast<const uint4*>(&shared.maxima[first + i]);
    keys[i + 0] = first + i + 0 < num_groups ? four.x : 0;
    keys[i + 1] = first + i + 1 < num_groups ? four.y : 0;
    keys[i + 2] = first + i + 2 < num_groups ? four.z : 0;
    keys[i + 3] = first + i + 3 < num_groups ? four.w : 0;
  }
  unsigned most = 0;
#pragma unroll
  for (int i = 0; i < KEYS; ++i) most = max(most, keys[i]);
  most = __reduce_max_sync(~0u, most);
  if ((threadIdx.x & 31) == 0) atomicMax(&shared.most, most);
  unsigned least = 1;
  if (num_groups <= k) {  // all of them; scores may be less than any maximum
    for (int i = threadIdx.x; i < num_groups; i += THREADS) shared.chosen[i] = i;
  } else {
    const Cut cut = find_cut(keys, any, k, shared);
    take(keys, cut, shared, [&](int at, int i) { shared.chosen[at] = first + i; });
    least = cut.ties > 0 ? cut.key : cut.key + 1;
  }
  __syncthreads();
  select_in_groups(row, min(num_groups, k), k, {least, shared.most}, out, shared);
}
