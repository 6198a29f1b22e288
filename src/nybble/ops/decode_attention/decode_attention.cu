// decode_attention: one new token a text: queries and keys are normed and rotated, key and value go into the cache, and the
// token attends to all slots in use. K and V go from memory straight into the tensor cores' registers.
//
// Computes      q' = turn(norm(q)), k' = turn(norm(k)); keys[slot] = k', values[slot] = v; for each query head of a kv head
//               out = sum_j p_j values[j] / sum_j p_j, p_j = exp(scale * q' . keys[j]), j over the first min(seen + 1, slots) slots.
//               turn: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) of the halves of the first ROTARY dimensions; norm: RMSNorm
//               with a weight, or none. q', k' are rounded once to T, and so are the p_j (relative to the largest so far) that
//               multiply values; sums are fp32. The keys of the first SINKS slots are still * sink_cos + turned * sink_sin, rounded once
// Tensors       q: T [B, HEADS * GROUP, D], k, v: T [B, HEADS, D], with strides of texts and heads; keys, values: T [B, HEADS, slots, D],
//               16-byte aligned; slot, seen: int64 [1]; cos, sin: A [B, ROTARY] with a stride of texts (0 for one row); q_norm,
//               k_norm: T [D]; still, turned: float [B, HEADS, SINKS, ROTARY]; sink_cos, sink_sin: float [SINKS, ROTARY]; out: T
//               [B, HEADS * GROUP, D]; unused ones are null
// Layout        S^T = K Q^T and O^T = V^T P^T, m16n8k16: 16 keys by 8 heads, then 16 dimensions by 8 heads. Which dimension is which
//               k of a product is free, so a lane (g = lane / 4, t = lane % 4) reads 8 neighbours of a row at once:
//                 K: of keys g and g + 8 dimensions 32 j + 8 t ...   V: of keys 2t, 2t + 1, 2t + 8, 2t + 9 dimensions 64 j + 8 g ...
//               Where D is no multiple of 32 or 64, the rest in accesses of half the width, and so on. P^T is P transposed in registers
// Mapping       grid x: (text, kv head), SPLITS blocks of a cluster each. A block has a contiguous part of the tiles of 16 slots,
//               a warp every WARPS-th of them; the next tile is asked for as soon as registers are free
// Shared memory q' T [GROUP][D + 8], k', v T [D] each, sinks T [SINKS][D + 8]; [WARPS][GROUP][D + 8] float of the warps' sums, [WARPS][GROUP][2] their largest and
//               totals; received: [SPLITS][SHARE][4] float, [SPLITS][GROUP][4]
// Constants     T: half_t, bf16_t; A: T or float; D: multiples of 8 up to 256; GROUP: 1 to 16, from D 136 on to 8; ROTARY: even, 0 for none; NORM: 0/1;
//               SINKS: 0 to 64; SPLITS: 1, 2, 4, 8; WARPS: 4, 8
// Roof          memory: the slots in use of keys and values
// Source        own work. Running maximum and total: Milakov and Gimelshein 2018; parts of the keys merged at the end: Flash-Decoding
//               (Dao et al. 2023).
#include "barrier.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "mma.cuh"
#include "rotate.cuh"
#include "vectors.cuh"

static_assert(D % 8 == 0 && D >= 8 && D <= 256, "a head is a multiple of 8 wide, at most 256");
static_assert(GROUP >= 1 && GROUP <= 16, "a key has 1 to 16 query heads");
static_assert(GROUP <= 8 || D <= 128, "more sums than there are registers");
static_assert(SINKS >= 0 && SINKS <= 64 && (SINKS == 0 || ROTARY > 0), "sinks are few, and rotated");
static_assert(ROTARY % 2 == 0 && ROTARY <= D, "halves of dimensions are rotated");
static_assert(SPLITS == 1 || SPLITS == 2 || SPLITS == 4 || SPLITS == 8, "a cluster has up to 8 blocks");
static_assert(WARPS == 4 || WARPS == 8, "a block has 4 or 8 warps");

constexpr int THREADS = 32 * WARPS, TILE = 16;            // keys of a tile
constexpr int NT = (GROUP + 7) / 8;                       // products of 8 heads
constexpr int K_REGISTERS = D / 8, V_REGISTERS = (D + 8) / 16;  // of one row in one lane
constexpr int PER_LANE = (D + 31) / 32;                   // dimensions of a lane, where a warp has a row
constexpr int STEPS = (D + 8) / 16;                       // of 16 dimensions, the last perhaps of 8
constexpr bool RAGGED = D % 16 != 0;
constexpr bool HOLDS = D <= 128;                          // queries in registers; those of wider heads are read for each tile
constexpr int Q_PITCH = D + 8, PITCH = D + 8;             // the rows of a fragment's lanes lie in different banks
constexpr int QUADS = GROUP * D / 4, SHARE = (QUADS + SPLITS - 1) / SPLITS;  // float4 of a result, and those a block of the cluster finishes
constexpr float LOWEST = -3.4e38f;

constexpr int AT_NEW = GROUP * Q_PITCH * 2;
constexpr int AT_SUMS = (AT_NEW + 2 * D * 2 + SINKS * Q_PITCH * 2 + 15) / 16 * 16;
constexpr int AT_STATS = AT_SUMS + WARPS * GROUP * PITCH * 4;
constexpr int AT_RECEIVED = (AT_STATS + WARPS * GROUP * 8 + 15) / 16 * 16;
constexpr int AT_TOTALS = AT_RECEIVED + (SPLITS > 1 ? SPLITS * SHARE * 16 : 0);
constexpr int AT_BARRIER = AT_TOTALS + (SPLITS > 1 ? SPLITS * GROUP * 16 : 0);
constexpr int BYTES = AT_BARRIER + 16;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

// A lane's part of a row of keys, or of queries in shared memory: neighbours are dimensions 2 s, 2 s + 1 of k-step s / 2.
template <bool NOW> __device__ __forceinline__ void read_for_k(unsigned (&r)[K_REGISTERS], const T* row, int t) {
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
        const uint4* const from = reinterpret_cast<const uint4*>(row + 32 * j + 8 * t);
        const uint4 v = NOW ? load_streaming(from) : *from;
        r[4 * j] = v.x, r[4 * j + 1] = v.y, r[4 * j + 2] = v.z, r[4 * j + 3] = v.w;
    }
    if constexpr (D % 32 >= 16) {
        const uint2* const from = reinterpret_cast<const uint2*>(row + D / 32 * 32 + 4 * t);
        const uint2 v = NOW ? load_streaming(from) : *from;
        r[D / 32 * 4] = v.x, r[D / 32 * 4 + 1] = v.y;
    }
    if constexpr (RAGGED) {
        const unsigned* const from = reinterpret_cast<const unsigned*>(row + D - 8 + 2 * t);
        r[K_REGISTERS - 1] = NOW ? load_streaming(from) : *from;
    }
}

// A lane's part of a row of values: register j has the dimensions of rows g and g + 8 of product j.
template <bool NOW> __device__ __forceinline__ void read_for_v(unsigned (&r)[V_REGISTERS], const T* row, int g) {
#pragma unroll
    for (int j = 0; j < D / 64; ++j) {
        const uint4* const from = reinterpret_cast<const uint4*>(row + 64 * j + 8 * g);
        const uint4 v = NOW ? load_streaming(from) : *from;
        r[4 * j] = v.x, r[4 * j + 1] = v.y, r[4 * j + 2] = v.z, r[4 * j + 3] = v.w;
    }
    if constexpr (D % 64 >= 32) {
        const uint2* const from = reinterpret_cast<const uint2*>(row + D / 64 * 64 + 4 * g);
        const uint2 v = NOW ? load_streaming(from) : *from;
        r[D / 64 * 4] = v.x, r[D / 64 * 4 + 1] = v.y;
    }
    if constexpr (D % 32 >= 16) {
        const unsigned* const from = reinterpret_cast<const unsigned*>(row + D / 32 * 32 + 2 * g);
        r[D / 32 * 2] = NOW ? load_streaming(from) : *from;
    }
    if constexpr (RAGGED) {
        const unsigned short* const from = reinterpret_cast<const unsigned short*>(row + D - 8 + g);
        r[V_REGISTERS - 1] = NOW ? load_streaming(from) : *from;
    }
}

// The dimension of row g of product j; that of row g + 8 is the next.
__device__ __forceinline__ int dimension_for_v(int j, int g) {
    if (j < D / 64 * 4) return j / 4 * 64 + 8 * g + j % 4 * 2;
    if (D % 64 >= 32 && j < D / 64 * 4 + 2) return D / 64 * 64 + 4 * g + j % 2 * 2;
    if (D % 32 >= 16 && j < D / 32 * 2 + 1) return D / 32 * 32 + 2 * g;
    return D - 8 + g;
}

// The score of a slot without a token, -infinity.
__device__ __forceinline__ float nothing() { return __int_as_float(static_cast<int>(0xff800000u)); }

// 2^(a - b), where b is the largest of what a is among; 0 where there is nothing yet.
__device__ __forceinline__ float relative(float a, float b) { return exp2f(a - fmaxf(b, LOWEST)); }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_attention_kernel(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* keys, T* values,
                        const long long* __restrict__ slot_at, const long long* __restrict__ seen_at,
                        const A* __restrict__ cos, const A* __restrict__ sin, const T* __restrict__ q_norm,
                        const T* __restrict__ k_norm, const float* __restrict__ still, const float* __restrict__ turned,
                        const float* __restrict__ sink_cos, const float* __restrict__ sink_sin, T* __restrict__ out,
                        long long heads, long long slots, long long q_text, long long q_head,
                        long long k_text, long long k_head, long long v_text, long long v_head, long long angle_text,
                        double scale, double eps) {
    extern __shared__ __align__(16) unsigned char shared[];
    T* const queries = reinterpret_cast<T*>(shared);
    T* const new_key = reinterpret_cast<T*>(shared + AT_NEW);
    T* const new_value = new_key + D;
    T* const sunk = new_value + D;
    float* const sums = reinterpret_cast<float*>(shared + AT_SUMS);
    float* const stats = reinterpret_cast<float*>(shared + AT_STATS);
    float* const received = reinterpret_cast<float*>(shared + AT_RECEIVED);
    float* const totals = reinterpret_cast<float*>(shared + AT_TOTALS);
    Barrier* const arrived = reinterpret_cast<Barrier*>(shared + AT_BARRIER);

    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4;
    const int rank = SPLITS > 1 ? cluster_rank() : 0;
    const long long pair = blockIdx.x / SPLITS, text = pair / heads, head = pair % heads;
    const int quads = min(SHARE, QUADS - rank * SHARE);  // float4 of the result that this block finishes, or fewer than 1

    if constexpr (SPLITS > 1) {
        if (threadIdx.x == 0) {
            barrier_init(arrived, 1);
            barrier_init_done();
            barrier_expect(arrived, SPLITS * 16 * (max(quads, 0) + GROUP));
        }
        __syncwarp();
        cluster_arrive();
    }

    // Phase 1: ask for the first tile. The count and the cache are of kernels before the previous one (or the launch waits).
    const int used = static_cast<int>(min(*seen_at + 1, slots)), slot = static_cast<int>(*slot_at);
    const int tiles = (used + TILE - 1) / TILE;
    const int first = tiles * rank / SPLITS, last = tiles * (rank + 1) / SPLITS;
    const T* const my_keys = keys + pair * slots * D;
    const T* const my_values = values + pair * slots * D;
    unsigned key_part[2][K_REGISTERS], value_part[4][V_REGISTERS];
    auto ask_keys = [&](int tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = tile * TILE + g + 8 * i;
#pragma unroll
            for (int r = 0; r < K_REGISTERS; ++r) key_part[i][r] = 0;
            if (row < used) read_for_k<true>(key_part[i], my_keys + static_cast<long long>(row) * D, t);
        }
    };
    auto ask_values = [&](int tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = tile * TILE + 2 * t + i % 2 + i / 2 * 8;
#pragma unroll
            for (int r = 0; r < V_REGISTERS; ++r) value_part[i][r] = 0;
            if (row < used) read_for_v<true>(value_part[i], my_values + static_cast<long long>(row) * D, g);
        }
    };
    int tile = first + warp;
    if (tile < last) ask_keys(tile), ask_values(tile);
    if constexpr (SINKS > 0) {  // they move on with the window: rotated anew
        const int here = first < last && first * TILE < SINKS ? SINKS : 0;
        for (int row = warp; row < here; row += WARPS) {
            const long long at = (pair * SINKS + row) * ROTARY;
            for (int d = lane; d < D; d += 32) {
                T kept;
                if (d < ROTARY) kept = from_float<T>(still[at + d] * sink_cos[row * ROTARY + d] + turned[at + d] * sink_sin[row * ROTARY + d]);
                else kept = my_keys[row * D + d];
                sunk[row * Q_PITCH + d] = kept;
            }
        }
    }
    float cosine[PER_LANE], sine[PER_LANE];
    load_angles<D, ROTARY>(cosine, sine, cos + text * angle_text, sin + text * angle_text, lane);
    wait_for_previous();
    allow_next();

    // Phase 2: a warp norms and rotates a row: queries, then the key, then the value as it is.
    for (int row = warp; row < GROUP + 2; row += WARPS) {
        const bool is_value = row == GROUP + 1;
        const T* const from = row < GROUP    ? q + text * q_text + (head * GROUP + row) * q_head
                              : is_value ? v + text * v_text + head * v_head
                                         : k + text * k_text + head * k_head;
        T made[PER_LANE];
        rotated_row<D, ROTARY, NORM>(made, from, row < GROUP ? q_norm : k_norm, cosine, sine, float(eps), is_value, lane);
        T* const to = row < GROUP ? queries + row * Q_PITCH : is_value ? new_value : new_key;
        T* const kept = (is_value ? values : keys) + (pair * slots + slot) * D;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const int d = lane + 32 * i;
            if (d >= D) continue;
            to[d] = made[i];
            if (row >= GROUP && rank == 0) kept[d] = made[i];
        }
    }
    __syncthreads();

    // Phase 3: tile after tile. The scale takes scores to powers of two.
    const float to_power = static_cast<float>(scale * 1.4426950408889634);
    unsigned query_part[NT][K_REGISTERS];
    auto read_queries = [&] {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int r = 0; r < K_REGISTERS; ++r) query_part[n][r] = 0;
            if (n * 8 + g < GROUP) read_for_k<false>(query_part[n], queries + (n * 8 + g) * Q_PITCH, t);
        }
    };
    if constexpr (HOLDS) read_queries();
    float o[NT][STEPS][4], largest[NT][2], total[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        largest[n][0] = largest[n][1] = nothing();
        total[n][0] = total[n][1] = 0.0f;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) o[n][j][0] = o[n][j][1] = o[n][j][2] = o[n][j][3] = 0.0f;
    }
    for (; tile < last; tile += WARPS) {
        const int begin = tile * TILE;
        if constexpr (!HOLDS) read_queries(), __syncwarp();
        if (SINKS > 0 && begin < SINKS) {
            if (begin + g < SINKS) read_for_k<false>(key_part[0], sunk + (begin + g) * Q_PITCH, t);
            if (begin + g + 8 < SINKS) read_for_k<false>(key_part[1], sunk + (begin + g + 8) * Q_PITCH, t);
        }
        if (slot >= begin && slot < begin + TILE) {  // the new token is not read back
            if (begin + g == slot) read_for_k<false>(key_part[0], new_key, t);
            if (begin + g + 8 == slot) read_for_k<false>(key_part[1], new_key, t);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (begin + 2 * t + i % 2 + i / 2 * 8 == slot) read_for_v<false>(value_part[i], new_value, g);
        }
        float s[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // two chains
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {
                const bool half = RAGGED && j == STEPS - 1;
                const unsigned a[4] = {key_part[0][2 * j], key_part[1][2 * j], half ? 0u : key_part[0][half ? 0 : 2 * j + 1],
                                       half ? 0u : key_part[1][half ? 0 : 2 * j + 1]};
                mma_16816<T>(j % 2 ? odd : even, a, query_part[n][2 * j], half ? 0u : query_part[n][half ? 0 : 2 * j + 1]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = even[i] + odd[i];
        }
        if (tile + WARPS < last) ask_keys(tile + WARPS);
        unsigned p[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = begin + g + i / 2 * 8 < used ? s[n][i] * to_power : nothing();
#pragma unroll
            for (int i = 0; i < 2; ++i) {  // heads 2t and 2t + 1
                float most = fmaxf(fmaxf(s[n][i], s[n][i + 2]), largest[n][i]);
#pragma unroll
                for (int across = 4; across < 32; across *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, across));
                const float less = relative(largest[n][i], most);
                largest[n][i] = most;
                s[n][i] = relative(s[n][i], most);
                s[n][i + 2] = relative(s[n][i + 2], most);
                total[n][i] = total[n][i] * less + s[n][i] + s[n][i + 2];
#pragma unroll
                for (int j = 0; j < STEPS; ++j) o[n][j][i] *= less, o[n][j][i + 2] *= less;
            }
            p[n][0] = transposed(rounded_pair<T>(s[n][0], s[n][1]));
            p[n][1] = transposed(rounded_pair<T>(s[n][2], s[n][3]));
        }
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            const unsigned a[4] = {__byte_perm(value_part[0][j], value_part[1][j], 0x5410), __byte_perm(value_part[0][j], value_part[1][j], 0x7632),
                                   __byte_perm(value_part[2][j], value_part[3][j], 0x5410), __byte_perm(value_part[2][j], value_part[3][j], 0x7632)};
#pragma unroll
            for (int n = 0; n < NT; ++n) mma_16816<T>(o[n][j], a, p[n][0], p[n][1]);
        }
        if (tile + WARPS < last) ask_values(tile + WARPS);
    }

    // Phase 4: the warps that had a tile are merged, in their order.
    const int busy = min(WARPS, last - first);
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int h = n * 8 + 2 * t + i;
            float all = total[n][i];
#pragma unroll
            for (int across = 4; across < 32; across *= 2) all += __shfl_xor_sync(0xffffffffu, all, across);
            if (h >= GROUP) continue;
            if (g == 0) *reinterpret_cast<float2*>(stats + (warp * GROUP + h) * 2) = float2{largest[n][i], all};
            if (warp >= busy) continue;
            float* const to = sums + (warp * GROUP + h) * PITCH;
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {
                const int d = dimension_for_v(j, g);
                if (RAGGED && j == STEPS - 1) to[d] = o[n][j][i];
                else *reinterpret_cast<float2*>(to + d) = float2{o[n][j][i], o[n][j][i + 2]};
            }
        }
    __syncthreads();
    float less[WARPS];  // what each warp's sums of a head are multiplied by
    auto of_block = [&](int h, float& most) {  // the total of a head, and its largest score
        float2 stat[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) stat[w] = *reinterpret_cast<const float2*>(stats + (w * GROUP + h) * 2);
        most = nothing();
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, stat[w].x);
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) less[w] = relative(stat[w].x, most), all += stat[w].y * less[w];
        return all;
    };
    auto store = [&](int quad, const float4& sum, float all) {
        const float value[4] = {__fdividef(sum.x, all), __fdividef(sum.y, all), __fdividef(sum.z, all), __fdividef(sum.w, all)};
        store_vector<T, 4>(out + pair * GROUP * D + quad * 4, value);
    };
    if constexpr (SPLITS > 1) cluster_wait();  // the others' barriers are there
    for (int quad = threadIdx.x; quad < QUADS; quad += THREADS) {
        const int h = quad * 4 / D, d = quad * 4 % D;
        float most;
        const float all = of_block(h, most);
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float4 part = *reinterpret_cast<const float4*>(sums + (w * GROUP + h) * PITCH + d);
            if (w < busy) sum.x += part.x * less[w], sum.y += part.y * less[w], sum.z += part.z * less[w], sum.w += part.w * less[w];
        }
        if constexpr (SPLITS == 1) store(quad, sum, all);
        else send(received + (rank * SHARE + quad % SHARE) * 4, sum.x, sum.y, sum.z, sum.w, arrived, quad / SHARE);
    }
    if constexpr (SPLITS > 1) {
        for (int i = THREADS - 1 - threadIdx.x; i < GROUP * SPLITS; i += THREADS) {  // threads that had less to do
            float most;
            const float all = of_block(i % GROUP, most);
            send(totals + (rank * GROUP + i % GROUP) * 4, most, all, 0.0f, 0.0f, arrived, i / GROUP);
        }
        // Phase 5: each block finishes its share of the result from what all blocks have sent, in their order. Whoever has
        // received everything may leave: nothing more comes.
        barrier_wait(arrived, 0);
        for (int i = threadIdx.x; i < quads; i += THREADS) {
            const int quad = rank * SHARE + i, h = quad * 4 / D;
            float most = nothing(), all = 0.0f;
#pragma unroll
            for (int r = 0; r < SPLITS; ++r) most = fmaxf(most, totals[(r * GROUP + h) * 4]);
            float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int r = 0; r < SPLITS; ++r) {
                const float less = relative(totals[(r * GROUP + h) * 4], most);
                const float4 part = *reinterpret_cast<const float4*>(received + (r * SHARE + i) * 4);
                all += totals[(r * GROUP + h) * 4 + 1] * less;
                sum.x += part.x * less, sum.y += part.y * less, sum.z += part.z * less, sum.w += part.w * less;
            }
            store(quad, sum, all);
        }
    }
}
