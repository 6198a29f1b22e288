// digits: the 4-bit linear for one row, by integers: x is cut into four int8 digits, which are columns of one int8 product. A nibble
// is an operand of that as it is, so that unpacking a weight takes a quarter of an instruction and not one and a half.
//
// Computes      y[n] = f(sum_k h[k] * scale[k / GROUP, n] * (q[k, n] - zero[k / GROUP, n]) (+ bias[n])) (+ residual[n])
//               h = x, or LayerNorm or RMSNorm of x over k, rounded to X. f: identity, gelu, gelu by tanh, or
//               silu(first half of n) * second half. h is taken as an integer of 31 bits times a power of two that 128
//               neighbours along k share: exact, but for what is below 2^-18 of their largest, which is off by up to 2^-30 of
//               that. Sums of a group, or of 128 of its features, are exact, sums of those fp32
// Tensors       as wgmma.cu: x: X [K]; qweight: uint4 [N64, K64, 4, 32]; scales: S [N64, GROUPS, 64]; qzeros: uint8
//               [N64, GROUPS, 32]; perm: int32 [K]; bias: X [N]; residual: X [N or N / 2]; norm_weight, norm_bias: X [K];
//               y: Y [N], or [N / 2] for silu_mul; of one row, planes (SPLIT1, SPLIT2) are one behind the other anyway.
//               Unused ones are null. N64 = ceil(N / 64), K64 = ceil(K / 64); all 16-byte aligned
// Layout        a word of a lane (g = lane / 4, t = lane % 4) is, by formats/tiles.py, of 16 input features: its bytes are columns 2t, 2t + 8,
//               2t + 1, 2t + 9, the low nibbles of row g, the high ones of row g + 8. So word & 0x0f0f0f0f and word & 0xf0f0f0f0
//               are registers of an int8 A as they are, the second 16 times too large, and x has that order:
//                 [chunk of 16 features][digit, the smallest first][16: 0 8 1 9 2 10 3 11 | 4 12 5 13 6 14 7 15] int8
//               with 16 bytes between chunks, without swizzle. A product reads eight columns; the last four are what comes next,
//               and nobody looks at their sums
// Mapping       grid x: workers of CLUSTER blocks. A worker takes every (gridDim.x / CLUSTER)-th tile of 64 * TEAMS output
//               features; its blocks split K. In a block a warpgroup has 64 of the tile's features and every SLICES-th PER units
//               of 128 input features of the block's range; one more warp asks for the weights
// Shared memory the block's range of x: digits, [unit] float what they are multiplied by, [unit][group][8] int their
//               sums; the ring: AHEAD stages of PER units for every warpgroup, with their scales and zero points; sums:
//               [BUFFERS][SOURCES][OWNED][8 features g][g, g + 8] float; for the norm [2][warps] float2; with act-order [K] X; barriers
// Constants     X: half_t, bf16_t; Y: X or float; S: half_t, bf16_t, float; N, K: multiples of 8; GROUP: 32, 64, a multiple of 128 or >= K;
//               TEAMS, SLICES: together up to 4; PER: 1, 2; CLUSTER: 2, 4, 8, dividing 4 * TEAMS; AHEAD: stages; BUFFERS: 1..2;
//               BLOCKS: on an SM; ZEROS, PERM, BIAS, NORM_BIAS, RESIDUAL: 0/1; NORM: 0, 1 LayerNorm, 2 RMSNorm; ACT: 0,
//               1 gelu, 2 gelu by tanh, 3 silu_mul (N a multiple of 128, TEAMS even: every other warpgroup has features of up)
// Roof          N * K / 2 bytes of weights
// Source        own work. Numbers of many digits as several small products: Ozaki et al., 2012.
#include "arrive.cuh"
#include "barrier.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "epilogue.cuh"
#include "mma.cuh"
#include "moments.cuh"
#include "packed.cuh"
#include "reduce.cuh"
#include "s8.cuh"
#include "vectors.cuh"
#include "wgmma.cuh"

static_assert(ACT != SILU_MUL || (N % 128 == 0 && TEAMS % 2 == 0), "silu_mul pairs 64 features of the two halves");
static_assert(SPLIT1 % 8 == 0 && SPLIT2 % 8 == 0 && SPLIT1 <= SPLIT2 && SPLIT2 <= N, "planes are multiples of 8 wide");
static_assert(GROUP >= 32, "a product has 32 input features of one group");

using Weights = Packed<S, N, K, GROUP, ZEROS, 4>;
constexpr int K64 = Weights::K64, PARTS = Weights::PARTS;
constexpr int THREADS = 128 * TEAMS * SLICES, WARPS = THREADS / 32;  // that compute; one more warp asks for the weights
constexpr int BLOCK_N = 64 * TEAMS, BLOCK_OUT = ACT == SILU_MUL ? BLOCK_N / 2 : BLOCK_N;
constexpr int N_OUT = ACT == SILU_MUL ? N / 2 : N;
constexpr int TILES = (N_OUT + BLOCK_OUT - 1) / BLOCK_OUT;
constexpr int UNITS = (K64 + 2 * CLUSTER - 1) / (2 * CLUSTER), RANGE = 2 * UNITS;  // of a block: units, chunks of 64 features
constexpr int OWNED = 4 * TEAMS / CLUSTER, SOURCES = CLUSTER * SLICES;  // strips of 16 features that a block adds up and stores
static_assert(OWNED * CLUSTER == 4 * TEAMS && (ACT != SILU_MUL || OWNED % 2 == 0), "a block owns whole strips, with silu_mul pairs");

constexpr int DIGITS = 4, PITCH = DIGITS * 16 + 16;  // bytes of a chunk of 16 features, neighbours in other banks
constexpr int DIGIT_BYTES = UNITS * 8 * PITCH + 128;
constexpr int FACTORS = (UNITS + 3) / 4 * 4, COUNTS = UNITS * PARTS * 8;  // floats; ints
constexpr int WEIGHT_BYTES = Weights::WEIGHT_BYTES, SCALE_BYTES = Weights::SCALE_BYTES, ZERO_BYTES = Weights::ZERO_BYTES;  // of a unit
constexpr int STAGE_UNITS = SLICES * PER;
using Stages = Stage<Weights, TEAMS, STAGE_UNITS, ACT == SILU_MUL>;
constexpr int STAGE = Stages::BYTES;
constexpr int SUMS = SOURCES * OWNED * 16, MOMENTS = NORM ? 4 * WARPS : 0;  // floats
constexpr int WHOLE_BYTES = PERM ? K * 2 : 0;
constexpr int AT_FACTORS = (DIGIT_BYTES + AHEAD * STAGE + 15) / 16 * 16, AT_SUMS = AT_FACTORS + (FACTORS + COUNTS) * 4;
constexpr int AT_WHOLE = AT_SUMS + (BUFFERS * SUMS + MOMENTS) * 4, AT_BARRIERS = AT_WHOLE + WHOLE_BYTES;
constexpr int BYTES = AT_BARRIERS + (2 * AHEAD + 2 * BUFFERS) * 8;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

extern "C" __global__ void __launch_bounds__(THREADS + 32, BLOCKS)
digits_kernel(const X* __restrict__ x, const uint4* __restrict__ qweight, const S* __restrict__ scales,
              const unsigned char* __restrict__ qzeros, const int* __restrict__ perm, const X* __restrict__ bias,
              const X* __restrict__ residual, const X* __restrict__ norm_weight, const X* __restrict__ norm_bias,
              Y* __restrict__ y, long long rows, double eps) {
    extern __shared__ __align__(128) unsigned char shared[];
    unsigned char* const digits = shared;
    unsigned char* const ring = shared + DIGIT_BYTES;
    float* const factors = reinterpret_cast<float*>(shared + AT_FACTORS);
    int* const counts = reinterpret_cast<int*>(factors + FACTORS);
    float* const all_sums = reinterpret_cast<float*>(shared + AT_SUMS);
    float2* const moments = reinterpret_cast<float2*>(all_sums + BUFFERS * SUMS);
    X* const whole = reinterpret_cast<X*>(shared + AT_WHOLE);  // x before it is gathered
    Barrier* const filled = reinterpret_cast<Barrier*>(shared + AT_BARRIERS);  // a stage of the ring
    Barrier* const used = filled + AHEAD;
    Barrier* const summed = used + AHEAD;  // a tile's sums
    Barrier* const stored = summed + BUFFERS;

    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), row8 = lane / 4, t = lane % 4;
    const int warp_n = warp % (4 * TEAMS), slice = warp / (4 * TEAMS), team = warp_n / 4;
    const int rank = cluster_rank();
    const int worker = blockIdx.x / CLUSTER, workers = gridDim.x / CLUSTER;
    const int begin = rank * RANGE, end = min(begin + RANGE, K64);
    const int units = max((end - begin + 1) / 2, 0), stages = (units + STAGE_UNITS - 1) / STAGE_UNITS;  // a tile's

    // Phase 1: one warp asks for all weights, AHEAD stages of them before anything is waited for: no kernel writes them. Before
    // that for the few bytes that everybody will wait for, which would else queue behind the weights of all blocks.
    if (warp == WARPS) {
        for (int i = lane; i < K64; i += 32) {
            if constexpr (NORM > 0) prefetch_l2(norm_weight + i * 64);
            if constexpr (NORM_BIAS) prefetch_l2(norm_bias + i * 64);
            if (NORM || PERM || (i >= begin && i < end)) prefetch_l2(x + i * 64);
        }
        int tile_asked = worker, stage = 0, slot = 0, turn = 0;
        auto ask = [&] {
            const int chunk = begin + stage * STAGE_UNITS * 2, chunks = min(STAGE_UNITS * 2, end - chunk);
            Stages::ask(ring + slot * STAGE, qweight, scales, qzeros, tile_asked, chunk, chunks, filled + slot);
            if (++slot == AHEAD) slot = 0, ++turn;
            if (++stage == stages) stage = 0, tile_asked += workers;
        };
        const bool asks = elected();
        if (asks) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) barrier_init(filled + i, 1), barrier_init(used + i, WARPS * ARRIVALS);
#pragma unroll
            for (int b = 0; b < BUFFERS; ++b) barrier_init(summed + b, 1), barrier_init(stored + b, CLUSTER * WARPS * ARRIVALS);
            barrier_init_done();
            while (turn == 0 && tile_asked < TILES && units > 0) ask();
        }
        __syncthreads();
        cluster_arrive();
        cluster_wait();
        if (asks && units > 0)
            while (tile_asked < TILES) {
                barrier_wait(used + slot, (turn - 1) % 2);
                ask();
            }
        return;
    }

    // A piece is eight features in the order of their digits: four neighbours, and the four that are eight further. A block has
    // OWN pieces; a thread of those HERE, and of all that there are PIECES.
    constexpr int OWN = UNITS * 16, HERE = (OWN + THREADS - 1) / THREADS, PIECES = (CLUSTER * OWN + THREADS - 1) / THREADS;
    const int thread = threadIdx.x;
    auto feature_of = [](int piece) { return piece / 2 * 16 + piece % 2 * 4; };
    int order[HERE][8];  // act-order: which features of x this thread's pieces have
    if constexpr (PERM) {
#pragma unroll
        for (int i = 0; i < HERE; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int k = begin * 64 + feature_of(i * THREADS + thread) + half * 8;
                const int4 four = i * THREADS + thread < OWN && k < K ? *reinterpret_cast<const int4*>(perm + k) : int4{};
                order[i][half * 4] = four.x, order[i][half * 4 + 1] = four.y, order[i][half * 4 + 2] = four.z, order[i][half * 4 + 3] = four.w;
            }
    }
    __syncthreads();
    cluster_arrive();  // this block's barriers are there
    wait_for_previous();
    allow_next();

    // Phase 2: a piece in digits. The 16 lanes that have a unit share a factor: its largest value becomes one of 30 bits. All lanes
    // of a warp take part, also those without a piece.
    auto write_digits = [&](bool there, int piece, const float (&value)[2][4]) {
        unsigned largest = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) largest = max(largest, as_bits(value[e / 4][e % 4]) & 0x7fffffffu);
#pragma unroll
        for (int apart = 8; apart > 0; apart /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
        const unsigned exponent = max(largest >> 23, 30u);
        const float larger = as_float((283 - exponent) << 23);  // 2^(29 - its exponent), at most 2^126
        // The bytes of a word become its digits, of all but the largest 128 too many.
        uint2 digit[DIGITS];
        int of_two[2] = {};  // sums of digits 0 and 1, 2 and 3, within 16 bits each
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            auto word = [&](int e) { return static_cast<unsigned>(__float2int_rn(value[e % 2][half * 2 + e / 2] * larger)) + 0x00808080u; };
            const unsigned w[4] = {word(0), word(1), word(2), word(3)};
            const unsigned a = pick_bytes<0x5140>(w[0], w[1]), b = pick_bytes<0x5140>(w[2], w[3]);
            const unsigned c = pick_bytes<0x7362>(w[0], w[1]), d = pick_bytes<0x7362>(w[2], w[3]);
            const unsigned of[DIGITS] = {pick_bytes<0x5410>(a, b) ^ 0x80808080u, pick_bytes<0x7632>(a, b) ^ 0x80808080u,
                                         pick_bytes<0x5410>(c, d) ^ 0x80808080u, pick_bytes<0x7632>(c, d)};
#pragma unroll
            for (int s = 0; s < DIGITS; ++s) {
                (half == 0 ? digit[s].x : digit[s].y) = of[s];
                of_two[s / 2] += __dp4a(static_cast<int>(of[s]), 0x01010101, 0) * (s % 2 == 0 ? 1 : 65536);
            }
        }
#pragma unroll
        for (int apart = 8 / PARTS; apart > 0; apart /= 2)
#pragma unroll
            for (int i = 0; i < 2; ++i) of_two[i] += __shfl_xor_sync(0xffffffffu, of_two[i], apart);
        if (!there) return;
#pragma unroll
        for (int s = 0; s < DIGITS; ++s) *reinterpret_cast<uint2*>(digits + piece / 2 * PITCH + s * 16 + piece % 2 * 8) = digit[s];
        if (piece % (16 / PARTS) == 0) {
            auto first = [](int two) { return static_cast<int>(static_cast<short>(two)); };
            *reinterpret_cast<int4*>(counts + piece / (16 / PARTS) * 8) =
                int4{first(of_two[0]), (of_two[0] - first(of_two[0])) >> 16, first(of_two[1]), (of_two[1] - first(of_two[1])) >> 16};
        }
        // NaN or infinity anywhere is NaN everywhere.
        if (piece % 16 == 0) factors[piece / 16] = exponent == 255 ? as_float(0x7fc00000u) : as_float((exponent - 29) << 23);
    };
    if constexpr (NORM > 0 || PERM) {
        // Every block has all of x in registers, so that the norm waits for no other block.
        Vector<X, 4> value[PIECES][2], by[PIECES][2], plus[PIECES][2];
        auto owned = [&](int piece) { return PERM || (piece >= rank * OWN && piece < (rank + 1) * OWN); };
        auto each = [&](auto take) {  // four features of x, where there are
#pragma unroll
            for (int i = 0; i < PIECES; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (const int k = feature_of(i * THREADS + thread) + half * 8; k < K) take(i, half, k);
        };
#pragma unroll
        for (int i = 0; i < PIECES; ++i) value[i][0] = value[i][1] = {};
        each([&](int i, int half, int k) {
            value[i][half] = *reinterpret_cast<const Vector<X, 4>*>(x + k);
            if (NORM == 0 || !owned(i * THREADS + thread)) return;
            by[i][half] = *reinterpret_cast<const Vector<X, 4>*>(norm_weight + k);
            if constexpr (NORM_BIAS) plus[i][half] = *reinterpret_cast<const Vector<X, 4>*>(norm_bias + k);
        });
        Normal normal;
        if constexpr (NORM > 0) {
            // Two sums over x, by all threads and in the same order everywhere.
            auto add_up = [&](float first, float second, int pass) {
                float2* const parts = moments + pass * WARPS;
                const float2 of_warp = {warp_sum(first), warp_sum(second)};
                if (lane == 0) parts[warp] = of_warp;
                sync_part(1, THREADS);
                float2 sums = {0.0f, 0.0f};
#pragma unroll
                for (int i = 0; i < WARPS; ++i) sums.x += parts[i].x, sums.y += parts[i].y;
                return sums;
            };
            // Both by one product of x with itself: of the four values a lane has at a time, row g of A and column g of B, the squares
            // are its diagonal; rows g + 8 of A are ones. Sums of scalars took 220 instructions a thread, for 4096 features.
            constexpr unsigned ONES = same<X, half_t> ? 0x3c003c00u : 0x3f803f80u;
            float product[4] = {};
#pragma unroll
            for (int i = 0; i < PIECES; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint2 two = *reinterpret_cast<const uint2*>(&value[i][half]);
                    const unsigned rows[4] = {two.x, ONES, two.y, ONES};
                    mma_16816<X>(product, rows, two.x, two.y);
                }
            const float squares = row8 / 2 != t ? 0.0f : row8 % 2 == 0 ? product[0] : product[1];
            const float2 sums = add_up(row8 == 0 ? product[2] + product[3] : 0.0f, squares, 0);
            const float mean = NORM == 1 ? sums.x / K : 0.0f, square = sums.y / K;
            normal = {mean, 0.0f, rsqrtf(square - mean * mean + static_cast<float>(eps))};
            // Where the mean is most of the squares, their difference would say little: then from the mean on.
            if (NORM == 1 && !(square <= 4.0f * (square - mean * mean))) {
                float first = 0.0f, second = 0.0f;
                each([&](int i, int half, int) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float v = to_float(value[i][half].lane[e]) - mean;
                        first += v, second += v * v;
                    }
                });
                const float2 apart = add_up(first, second, 1);
                normal = combine<true>(1, K, static_cast<float>(eps), [](int) { return K; }, [&](int) { return Moments{mean, apart.x, apart.y}; });
            }
        }
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int piece = i * THREADS + thread, k = feature_of(piece);
            const bool mine = owned(piece);
            if (!warp_any(mine)) continue;
            float of[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float v = to_float(value[i][half].lane[e]);
                    if constexpr (NORM > 0) {
                        v = normal(v) * to_float(by[i][half].lane[e]) + (NORM_BIAS ? to_float(plus[i][half].lane[e]) : 0.0f);
                        v = to_float(from_float<X>(v));
                    }
                    of[half][e] = k + half * 8 < K ? v : 0.0f;
                }
            if constexpr (PERM) {
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (k + half * 8 < K) store_vector(whole + k + half * 8, of[half]);
            } else {
                write_digits(mine, piece - rank * OWN, of);
            }
        }
        if constexpr (PERM) sync_part(1, THREADS);
    }
    if constexpr (PERM || NORM == 0) {
        float value[HERE][2][4];
#pragma unroll
        for (int i = 0; i < HERE; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int piece = i * THREADS + thread, k = begin * 64 + feature_of(piece) + half * 8;
#pragma unroll
                for (int e = 0; e < 4; ++e) value[i][half][e] = 0.0f;
                if (piece >= OWN || k >= K) continue;
                if constexpr (PERM) {
                    // The packed weights are sorted by group, so x is gathered instead, from shared memory: every 2-byte load
                    // from global memory would take a cycle of the SM's own.
#pragma unroll
                    for (int e = 0; e < 4; ++e) value[i][half][e] = to_float(whole[order[i][half * 4 + e]]);
                } else {
                    load_vector(x + k, value[i][half]);
                }
            }
#pragma unroll
        for (int i = 0; i < HERE; ++i)
            if (const int piece = i * THREADS + thread; i * THREADS + warp * 32 < OWN) write_digits(piece < OWN, piece, value[i]);
    }
    cluster_wait();

    // Phase 5, of a tile: when all its sums are there, they are added up in order, so that the result never depends on timing,
    // and stored. Four features a thread.
    const int steps = (TILES - worker + workers - 1) / workers;  // tiles of this worker; it has at least one
    auto expect = [&](int step) {
        if (threadIdx.x == 0 && step < steps) barrier_expect(summed + step % BUFFERS, SOURCES * OWNED * 64);
    };
    auto finish = [&](int step, int n_tile) {
        const float* const sums = all_sums + step % BUFFERS * SUMS;
        barrier_wait(summed + step % BUFFERS, step / BUFFERS % 2);
        expect(step + BUFFERS);
        constexpr int STRIPS_OUT = ACT == SILU_MUL ? OWNED / 2 : OWNED;
        static_assert(STRIPS_OUT * 4 <= THREADS, "a thread has four features");
        const int column = thread % 4 * 4, strip = thread / 4, feature = n_tile * BLOCK_OUT + (rank * STRIPS_OUT + strip) * 16 + column;
        if (strip < STRIPS_OUT && feature < N_OUT) {
            // Of one row, planes that follow each other are one.
            finish_at<ACT, BIAS, RESIDUAL, N>(bias, residual + feature, y + feature, feature, [&](int which, float (&value)[4]) {
                const float* const at = sums + (ACT == SILU_MUL ? strip * 2 + which : strip) * 16 + column % 8 * 2 + column / 8;
#pragma unroll
                for (int e = 0; e < 4; ++e) value[e] = 0.0f;
#pragma unroll
                for (int source = 0; source < SOURCES; ++source)
#pragma unroll
                    for (int e = 0; e < 4; ++e) value[e] += at[source * (OWNED * 16) + e * 2];
            });
        }
        __syncwarp();
        // Not after the last steps: nobody waits for it, and the other block might be gone.
        if (step + BUFFERS < steps) warp_arrive_at<CLUSTER>(stored + step % BUFFERS, lane);
    };

    // Phase 3: the product, tile after tile.
    const unsigned columns = wgmma_pieces(digits, PITCH);
    const unsigned char* const my_weights = ring + (team * STAGE_UNITS + slice * PER) * WEIGHT_BYTES + warp_n % 4 * 512 + lane * 16;
    const unsigned char* const my_scales =
        ring + Stages::SCALES + (team * STAGE_UNITS + slice * PER) * SCALE_BYTES + (warp_n % 4 * 16 + row8 * 2) * sizeof(S);
    const unsigned char* const my_zeros = ring + Stages::ZEROS + (team * STAGE_UNITS + slice * PER) * ZERO_BYTES + warp_n % 4 * 8 + row8;
    // This lane's sums are of digits 0 and 1, or 2 and 3.
    const float worth[2] = {t % 2 == 0 ? 1.0f : 65536.0f, t % 2 == 0 ? 256.0f : 16777216.0f};
    int slot = 0, turn = 0, step = 0, unfinished = worker;
#pragma unroll
    for (int b = 0; b < BUFFERS; ++b) expect(b);
    fence_async();
    sync_part(1, THREADS);
    for (int n_tile = worker; n_tile < TILES; n_tile += workers, ++step) {
        float total[4] = {};  // of feature g two digits, and of g + 8
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
            const int first = stage * STAGE_UNITS + slice * PER, at = slot * STAGE;
            barrier_wait(filled + slot, turn);
            if (first < units) {
                unsigned a[PER][4][4];
                float scale[PER][PARTS][2];  // of features g and g + 8
                int part[PER][PARTS][4];
#pragma unroll
                for (int u = 0; u < PER; ++u) {
                    const auto words = Weights::template load<2>(my_weights + (at + u * WEIGHT_BYTES));
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        a[u][i / 2][i % 2 * 2] = words.word[i] & 0x0f0f0f0fu, a[u][i / 2][i % 2 * 2 + 1] = words.word[i] & 0xf0f0f0f0u;
                    const int unit = min(first + u, units - 1);
#pragma unroll
                    for (int p = 0; p < PARTS; ++p) {
                        const Vector<S, 2> pair = *reinterpret_cast<const Vector<S, 2>*>(my_scales + (at + u * SCALE_BYTES + p * 64 * static_cast<int>(sizeof(S))));
                        // Where there is no unit, or no other half of one, there is only what was in the ring before.
                        bool there = PER == 1 || first + u < units;
                        if (K64 % 2 != 0 && PARTS > 1 && p >= PARTS / 2) there = there && begin + unit * 2 + 1 < K64;
                        scale[u][p][0] = there ? to_float(pair.lane[0]) : 0.0f, scale[u][p][1] = there ? to_float(pair.lane[1]) * 0.0625f : 0.0f;
                        unsigned zeros = Weights::MIDDLE;
                        if constexpr (ZEROS) zeros = Weights::zeros_of(my_zeros + (at + u * ZERO_BYTES + p * Weights::ZERO_ROW));
                        const int low = zeros & 15, high = zeros & 0xf0;
                        // A sum begins as a float that the integers are added to, less what zero points add to it.
                        const int2 count = *reinterpret_cast<const int2*>(counts + (unit * PARTS + p) * 8 + t * 2);
                        part[u][p][0] = static_cast<int>(SEED_BITS) - low * count.x, part[u][p][1] = static_cast<int>(SEED_BITS) - low * count.y;
                        part[u][p][2] = static_cast<int>(SEED_BITS) - high * count.x, part[u][p][3] = static_cast<int>(SEED_BITS) - high * count.y;
                    }
                }
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int u = 0; u < PER; ++u)
                        wgmma_add_pieces(part[u][i * PARTS / 4], a[u][i], columns + (min(first + u, units - 1) * 8 + i * 2) * (PITCH / 16));
                wgmma_commit();
                warp_arrive(used + slot, lane);  // this warp has read the stage
                float factor[PER];
#pragma unroll
                for (int u = 0; u < PER; ++u) factor[u] = factors[min(first + u, units - 1)];
                wgmma_wait<0>();
#pragma unroll
                for (int u = 0; u < PER; ++u)
#pragma unroll
                    for (int p = 0; p < PARTS; ++p) {
                        arrived(part[u][p]);
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            total[i] += scale[u][p][i / 2] * factor[u] * (as_float(static_cast<unsigned>(part[u][p][i])) - SEED);
                    }
            } else {
                warp_arrive(used + slot, lane);
            }
            if (++slot == AHEAD) slot = 0, turn ^= 1;
        }

        // Phase 4: every warp sends its sums to the block that owns their features, and goes on; those of the tile before
        // are added up meanwhile. With silu_mul the strips of two warpgroups belong together in pairs.
        const int to_strip = ACT == SILU_MUL ? (team / 2 * 4 + warp_n % 4) * 2 + team % 2 : warp_n;
        if (BUFFERS == 1 && step > 0) finish(step - 1, unfinished);
        if (step >= BUFFERS) barrier_wait(stored + step % BUFFERS, (step / BUFFERS - 1) % 2);
        float of[2];  // features g and g + 8
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            of[i] = total[i * 2] * worth[0] + total[i * 2 + 1] * worth[1];
            of[i] += __shfl_xor_sync(0xffffffffu, of[i], 1);
        }
        float* const to = all_sums + step % BUFFERS * SUMS + ((rank * SLICES + slice) * OWNED + to_strip % OWNED) * 16 + row8 * 2;
        if (t == 0) send(to, of[0], of[1], summed + step % BUFFERS, to_strip / OWNED);
        if (BUFFERS == 2 && step > 0) finish(step - 1, unfinished);
        unfinished = n_tile;
    }
    finish(step - 1, unfinished);
}
