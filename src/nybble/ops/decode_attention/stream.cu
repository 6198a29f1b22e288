// stream: attention of one new token as in decode_attention.cu, for long caches and many texts: the tiles of all heads are one
// row, of which every block has an equal part, so that no multiprocessor waits for another and memory is never idle.
//
// Computes      q' = turn(norm(q)), k' = turn(norm(k)); keys[slot] = k', values[slot] = v; for each query head of a kv head
//               out = sum_j p_j values[j] / sum_j p_j, p_j = exp(scale * q' . keys[j]), j over the first min(seen + 1, slots) slots.
//               Roundings, turn, norm and sinks are those of decode_attention.cu
// Tensors       those of decode_attention.cu, then workspace: FLAG_BYTES of flags, zero before and after, and
//               [blocks][PAIRS + QUADS][4] float; pairs: texts times kv heads
// Layout        S^T = K Q^T and O^T = V^T P^T, m16n8k16: 16 keys by 8 heads, then 16 dimensions by 8 heads. Rows of keys, values and
//               queries lie an odd number of 16-byte pieces apart in shared memory, so that eight of them are in different banks and
//               ldmatrix makes the fragments; P^T is P transposed in registers. Sums stay fragments: a quad is dimensions 16 j + g and
//               16 j + g + 8 of heads 2h and 2h + 1, number (8 j + g) * PAIRS + h
// Mapping       grid x: blocks. A block has a contiguous part of the tiles (16 slots of a head) of all pairs, a warp every WARPS-th of
//               them, from the last to the first. What begins a head is left in the workspace, for the block with the head's end, which
//               has its other heads behind it when it waits: nobody waits for more than the end of an even share
// Shared memory [WARPS][DEPTH] tiles of keys and of values, each a warp's own ring of copies; q' T [GROUP][PITCH], k', v T [PITCH];
//               [WARPS][QUADS][4] float of the warps' sums, [WARPS][PAIRS][4] their largest and totals
// Constants     T: half_t, bf16_t; A: T or float; D: multiples of 8 up to 256; GROUP: 1 to 16, from D 136 on to 8; ROTARY: even, 0 for none; NORM: 0/1;
//               SINKS: 0 to 64; WARPS: 4, 8; DEPTH: 2 to 8 tiles of a warp; EACH: blocks of a multiprocessor, 1, 2
// Roof          memory: the slots in use of keys and values
// Source        own work. Running maximum and total: Milakov and Gimelshein 2018; even shares: stream-K (Osama et al. 2023); parts
//               merged at the end: Flash-Decoding (Dao et al. 2023).
#include "copy.cuh"
#include "dependent.cuh"
#include "flag.cuh"
#include "mma.cuh"
#include "rotate.cuh"
#include "vectors.cuh"

static_assert(D % 8 == 0 && D >= 8 && D <= 256, "a head is a multiple of 8 wide, at most 256");
static_assert(GROUP >= 1 && GROUP <= 16, "a key has 1 to 16 query heads");
static_assert(GROUP <= 8 || D <= 128, "more sums than there are registers");
static_assert(SINKS >= 0 && SINKS <= 64 && (SINKS == 0 || ROTARY > 0), "sinks are few, and rotated");
static_assert(ROTARY % 2 == 0 && ROTARY <= D, "halves of dimensions are rotated");
static_assert(WARPS == 4 || WARPS == 8, "a block has 4 or 8 warps");
static_assert(DEPTH >= 2 && DEPTH <= 8, "a warp has one tile at hand and others on their way");
static_assert(EACH * WARPS <= 8, "more threads than there are registers");

constexpr int THREADS = 32 * WARPS, TILE = 16;            // keys of a tile
constexpr int NT = (GROUP + 7) / 8;                       // products of 8 heads
constexpr int STEPS = (D + 8) / 16;                       // of 16 dimensions, the last perhaps of 8
constexpr int TWOS = (STEPS + 1) / 2;                     // of 32
constexpr int PER_LANE = (D + 31) / 32;                   // dimensions of a lane, where a warp has a row
constexpr bool RAGGED = D % 16 != 0;
constexpr bool HOLDS = D <= 128;                          // queries in registers; those of wider heads are read for each tile
constexpr int PIECES = D / 8, PITCH = (PIECES | 1) * 8;   // 16-byte pieces of a row; elements from row to row
constexpr int STAGE = 2 * TILE * PITCH;                   // elements: keys, then values
constexpr int PAIRS = (GROUP + 1) / 2, QUADS = STEPS * 8 * PAIRS;
constexpr int LEFT = (PAIRS + QUADS) * 4;                 // floats a block leaves
constexpr int FLAG_BYTES = 16384;                         // of the workspace
constexpr int AT_ONCE = NT * STEPS <= 8 ? 2 : 1;          // other blocks' sums that a warp asks for together
constexpr float LOWEST = -3.4e38f;

constexpr int AT_QUERIES = WARPS * DEPTH * STAGE * 2;
constexpr int AT_NEW = AT_QUERIES + GROUP * PITCH * 2;
constexpr int AT_SUMS = AT_NEW + 2 * PITCH * 2;
constexpr int AT_STATS = AT_SUMS + WARPS * QUADS * 16;
constexpr int BYTES = AT_STATS + WARPS * PAIRS * 16;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

// The score of a slot without a token, -infinity.
__device__ __forceinline__ float nothing() { return __int_as_float(static_cast<int>(0xff800000u)); }

// 2^(a - b), where b is the largest of what a is among; 0 where there is nothing yet.
__device__ __forceinline__ float relative(float a, float b) { return exp2f(a - fmaxf(b, LOWEST)); }

extern "C" __global__ void __launch_bounds__(THREADS, EACH)
stream_kernel(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* keys, T* values,
              const long long* __restrict__ slot_at, const long long* __restrict__ seen_at, const A* __restrict__ cos,
              const A* __restrict__ sin, const T* __restrict__ q_norm, const T* __restrict__ k_norm,
              const float* __restrict__ still, const float* __restrict__ turned, const float* __restrict__ sink_cos,
              const float* __restrict__ sink_sin, T* __restrict__ out, long long heads, long long slots, long long q_text,
              long long q_head, long long k_text, long long k_head, long long v_text, long long v_head,
              long long angle_text, double scale, double eps, unsigned char* workspace, long long pairs) {
    extern __shared__ __align__(16) unsigned char shared[];
    T* const queries = reinterpret_cast<T*>(shared + AT_QUERIES);
    T* const new_key = reinterpret_cast<T*>(shared + AT_NEW);
    T* const new_value = new_key + PITCH;
    float4* const sums = reinterpret_cast<float4*>(shared + AT_SUMS);
    float4* const stats = reinterpret_cast<float4*>(shared + AT_STATS);

    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4;
    T* const ring = reinterpret_cast<T*>(shared) + warp * DEPTH * STAGE;

    // The block's tiles are begin .. end - 1 of all pairs' tiles, one pair after the other. A block with fewer than a tile a
    // warp would only be one more whose sums are waited for.
    const int used = static_cast<int>(min(*seen_at + 1, slots)), slot = static_cast<int>(*slot_at);
    const int tiles = (used + TILE - 1) / TILE, all_tiles = static_cast<int>(pairs) * tiles;
    const int workers = min(static_cast<int>(gridDim.x), (all_tiles + WARPS - 1) / WARPS), me = blockIdx.x;
    auto share_of = [&](int block) { return static_cast<int>(static_cast<long long>(all_tiles) * block / workers); };
    const int begin = me < workers ? share_of(me) : 0, end = me < workers ? share_of(me + 1) : 0;

    // Phase 1: ask for the first tiles. The count and the cache are of kernels before the previous one (or the launch waits).
    int mine = max(0, end - begin - warp + WARPS - 1) / WARPS;  // tiles of this warp still to be done
    int pair_at = max(0, end - 1 - warp) / tiles, tile_at = max(0, end - 1 - warp) % tiles;
    int asked = mine, ask_pair = pair_at, ask_tile = tile_at;   // the same, to be asked for
    auto step_back = [&](int& pair, int& tile) {
        tile -= WARPS;
        while (tile < 0) tile += tiles, --pair;
    };
    auto ask = [&](int stage) {
        if (asked > 0) {
            T* const to = ring + stage * STAGE;
            const long long from = (ask_pair * slots + ask_tile * TILE) * D + lane * 8;
            const T* const key_from = keys + from;
            const T* const value_from = values + from;
            auto copy = [&](int rows) {
#pragma unroll
                for (int i = 0; i < (TILE * PIECES + 31) / 32; ++i) {
                    const int piece = lane + 32 * i, row = piece / PIECES, at = row * PITCH + piece % PIECES * 8;
                    if (TILE * PIECES % 32 != 0 && piece >= TILE * PIECES) continue;
                    copy_async_16(to + at, key_from + i * 256, row < rows);
                    copy_async_16(to + TILE * PITCH + at, value_from + i * 256, row < rows);
                }
            };
            if (used - ask_tile * TILE >= TILE) copy(TILE);  // no row needs to be asked about
            else copy(used - ask_tile * TILE);
            --asked;
            step_back(ask_pair, ask_tile);
        }
        commit_copies();
    };
#pragma unroll 1
    for (int i = 0; i < DEPTH; ++i) ask(i);
    wait_for_previous();
    allow_next();
    if (begin == end) return;

    const float to_power = static_cast<float>(scale * 1.4426950408889634);  // takes scores to powers of two
    float* const left = reinterpret_cast<float*>(workspace + FLAG_BYTES);
    unsigned* const flags = reinterpret_cast<unsigned*>(workspace);
    int stage = 0;
    for (int pair = (end - 1) / tiles; pair >= begin / tiles; --pair) {
        const int low = max(begin - pair * tiles, 0), high = min(end - pair * tiles, tiles);  // tiles of this pair
        const int text = pair / static_cast<int>(heads), head = pair % static_cast<int>(heads);

        // Phase 2: a warp norms and rotates a row: queries, then, where the block has their slot, the key, and the value as it is.
        const int token_tile = slot / TILE;
        const bool has_token = token_tile >= low && token_tile < high;
        float cosine[PER_LANE], sine[PER_LANE];
        load_angles<D, ROTARY>(cosine, sine, cos + text * angle_text, sin + text * angle_text, lane);
        for (int row = warp; row < GROUP + (has_token ? 2 : 0); row += WARPS) {
            const bool is_value = row == GROUP + 1;
            const T* const from = row < GROUP    ? q + text * q_text + (head * GROUP + row) * q_head
                                  : is_value ? v + text * v_text + head * v_head
                                             : k + text * k_text + head * k_head;
            T made[PER_LANE];
            rotated_row<D, ROTARY, NORM>(made, from, row < GROUP ? q_norm : k_norm, cosine, sine, float(eps), is_value, lane);
            T* const to = row < GROUP ? queries + row * PITCH : is_value ? new_value : new_key;
            T* const kept = (is_value ? values : keys) + (pair * slots + slot) * D;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                const int d = lane + 32 * i;
                if (d >= D) continue;
                to[d] = made[i];
                if (row >= GROUP) kept[d] = made[i];
            }
        }
        __syncthreads();

        // Phase 3: tile after tile. A head there is not gets the queries of the last one, and is forgotten.
        unsigned query_part[NT][TWOS][4];
        auto read_queries = [&](int n, int j) {
            const int row = min(n * 8 + lane % 8, GROUP - 1), piece = min(4 * j + lane / 8, PIECES - 1);
            load_matrices(query_part[n][j], queries + row * PITCH + piece * 8);
        };
        if constexpr (HOLDS) {
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int j = 0; j < TWOS; ++j) read_queries(n, j);
        }
        float o[NT][STEPS][4], largest[NT][2], total[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            largest[n][0] = largest[n][1] = nothing();
            total[n][0] = total[n][1] = 0.0f;
#pragma unroll
            for (int j = 0; j < STEPS; ++j) o[n][j][0] = o[n][j][1] = o[n][j][2] = o[n][j][3] = 0.0f;
        }
        for (; mine > 0 && pair_at == pair; --mine) {
            const int first = tile_at * TILE;
            T* const key_tile = ring + stage * STAGE;
            T* const value_tile = key_tile + TILE * PITCH;
            wait_copies<DEPTH - 1>();
            __syncwarp();
            if (SINKS > 0 && first < SINKS) {  // they move on with the window: rotated anew
                const long long at = (static_cast<long long>(pair) * SINKS + first) * ROTARY;
                for (int row = 0; row < min(TILE, SINKS - first); ++row)
                    for (int d = lane; d < ROTARY; d += 32) {
                        const int here = row * ROTARY + d, angle = first * ROTARY + here;
                        key_tile[row * PITCH + d] = from_float<T>(still[at + here] * sink_cos[angle] + turned[at + here] * sink_sin[angle]);
                    }
                __syncwarp();
            }
            if (tile_at == token_tile) {  // the new token is not read back
                if (lane < PIECES) {
                    const int at = slot % TILE * PITCH + lane * 8;
                    *reinterpret_cast<uint4*>(key_tile + at) = *reinterpret_cast<const uint4*>(new_key + lane * 8);
                    *reinterpret_cast<uint4*>(value_tile + at) = *reinterpret_cast<const uint4*>(new_value + lane * 8);
                }
                __syncwarp();
            }
            float even[NT][4], odd[NT][4];  // two chains
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) even[n][i] = odd[n][i] = 0.0f;
            const T* const key_row = key_tile + lane % 16 * PITCH;
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {
                const bool half = RAGGED && j == STEPS - 1;
                unsigned a[4];
                load_matrices(a, key_row + min(2 * j + lane / 16, PIECES - 1) * 8);
                if (half) a[2] = a[3] = 0;
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    if (!HOLDS && j % 2 == 0) read_queries(n, j / 2);
                    const unsigned(&b)[4] = query_part[n][j / 2];
                    mma_16816<T>(j % 2 ? odd[n] : even[n], a, b[j % 2 * 2], half ? 0u : b[j % 2 * 2 + 1]);
                }
            }
            unsigned p[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                float s[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) s[i] = first + g + i / 2 * 8 < used ? (even[n][i] + odd[n][i]) * to_power : nothing();
#pragma unroll
                for (int i = 0; i < 2; ++i) {  // heads 2t and 2t + 1
                    float most = fmaxf(fmaxf(s[i], s[i + 2]), largest[n][i]);
#pragma unroll
                    for (int across = 4; across < 32; across *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, across));
                    const float less = relative(largest[n][i], most);
                    largest[n][i] = most;
                    s[i] = relative(s[i], most), s[i + 2] = relative(s[i + 2], most);
                    total[n][i] = total[n][i] * less + s[i] + s[i + 2];
#pragma unroll
                    for (int j = 0; j < STEPS; ++j) o[n][j][i] *= less, o[n][j][i + 2] *= less;
                }
                p[n][0] = transposed(rounded_pair<T>(s[0], s[1]));
                p[n][1] = transposed(rounded_pair<T>(s[2], s[3]));
            }
            const T* const value_row = value_tile + (lane % 8 + lane / 16 * 8) * PITCH;
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {
                unsigned a[4];
                load_matrices_transposed(a, value_row + min(2 * j + lane / 8 % 2, PIECES - 1) * 8);
#pragma unroll
                for (int n = 0; n < NT; ++n) mma_16816<T>(o[n][j], a, p[n][0], p[n][1]);
            }
            __syncwarp();  // all lanes have read: the place is free
            ask(stage);
            stage = stage + 1 == DEPTH ? 0 : stage + 1;
            step_back(pair_at, tile_at);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int across = 4; across < 32; across *= 2) total[n][i] += __shfl_xor_sync(0xffffffffu, total[n][i], across);

        // Phase 4: the block with a head's end takes what those before it have left, each warp that of some, in their order.
        if (low > 0 && high == tiles) {
            int source = static_cast<int>(static_cast<long long>(pair) * tiles * workers / all_tiles);
            if (share_of(source + 1) == pair * tiles) ++source;  // has the head's first tile
            for (source += warp; source < me; source += 32 * WARPS) {
                const int watched = source + lane * WARPS;
                wait_for_flag(flags + (watched < me ? watched : source));
                for (int next = source; next < min(me, source + 32 * WARPS); next += AT_ONCE * WARPS) {
                    float4 stat[AT_ONCE][NT], part[AT_ONCE][NT][STEPS];
#pragma unroll
                    for (int u = 0; u < AT_ONCE; ++u)
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            if (next + u * WARPS >= me || n * 4 + t >= PAIRS) continue;
                            const float* const from = left + static_cast<long long>(next + u * WARPS) * LEFT + (n * 4 + t) * 4;
                            stat[u][n] = load_of_other(from);
#pragma unroll
                            for (int j = 0; j < STEPS; ++j) part[u][n][j] = load_of_other(from + (PAIRS + (8 * j + g) * PAIRS) * 4);
                        }
#pragma unroll
                    for (int u = 0; u < AT_ONCE; ++u)
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            if (next + u * WARPS >= me || n * 4 + t >= PAIRS) continue;
                            const float theirs[2] = {stat[u][n].x, stat[u][n].z}, all[2] = {stat[u][n].y, stat[u][n].w};
                            float less[2], more[2];
#pragma unroll
                            for (int i = 0; i < 2; ++i) {
                                const float most = fmaxf(largest[n][i], theirs[i]);
                                less[i] = relative(largest[n][i], most), more[i] = relative(theirs[i], most);
                                largest[n][i] = most, total[n][i] = total[n][i] * less[i] + all[i] * more[i];
                            }
#pragma unroll
                            for (int j = 0; j < STEPS; ++j) {
                                const float add[4] = {part[u][n][j].x, part[u][n][j].y, part[u][n][j].z, part[u][n][j].w};
#pragma unroll
                                for (int i = 0; i < 4; ++i) o[n][j][i] = o[n][j][i] * less[i % 2] + add[i] * more[i % 2];
                            }
                        }
                }
                __syncwarp();
                if (watched < me) lower_flag(flags + watched);
            }
        }

        // Phase 5: the warps are merged, in their order.
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int h = n * 4 + t;
            if (h >= PAIRS) continue;
            if (g == 0) stats[warp * PAIRS + h] = float4{largest[n][0], total[n][0], largest[n][1], total[n][1]};
#pragma unroll
            for (int j = 0; j < STEPS; ++j)
                sums[warp * QUADS + (8 * j + g) * PAIRS + h] = float4{o[n][j][0], o[n][j][1], o[n][j][2], o[n][j][3]};
        }
        __syncthreads();
        for (int quad = threadIdx.x; quad < QUADS; quad += THREADS) {
            const int h = quad % PAIRS, d = quad / PAIRS / 8 * 16 + quad / PAIRS % 8;
            float4 most = {nothing(), 0.0f, nothing(), 0.0f}, sum = {0.0f, 0.0f, 0.0f, 0.0f};  // largest, total, largest, total
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float4 stat = stats[w * PAIRS + h];
                most.x = fmaxf(most.x, stat.x), most.z = fmaxf(most.z, stat.z);
            }
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float4 stat = stats[w * PAIRS + h], part = sums[w * QUADS + quad];
                const float first = relative(stat.x, most.x), second = relative(stat.z, most.z);
                most.y += stat.y * first, most.w += stat.w * second;
                sum.x += part.x * first, sum.y += part.y * second, sum.z += part.z * first, sum.w += part.w * second;
            }
            if (high < tiles) {
                float4* const to = reinterpret_cast<float4*>(left + static_cast<long long>(me) * LEFT);
                to[PAIRS + quad] = sum;
                if (quad < PAIRS) to[quad] = most;
                continue;
            }
            const float value[4] = {__fdividef(sum.x, most.y), __fdividef(sum.y, most.w), __fdividef(sum.z, most.y), __fdividef(sum.w, most.w)};
            T* const to = out + (static_cast<long long>(pair) * GROUP + 2 * h) * D + d;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (2 * h + i % 2 < GROUP && d + i / 2 * 8 < D) to[i % 2 * D + i / 2 * 8] = from_float<T>(value[i]);
        }
        if (high < tiles) {
            __syncthreads();
            if (threadIdx.x == 0) raise_flag(flags + me);
        }
    }
}
