// digits: the 4-bit linear for one to four rows, by integers: x is cut into four int8 digits, which are columns of one int8
// product. A nibble is an operand of that as it is, so that unpacking a weight takes a quarter of an instruction and not one and a half.
//
// Computes      y[m, n] = f(sum_k h[m, k] * scale[k / GROUP, n] * (q[k, n] - zero[k / GROUP, n]) (+ bias[n])) (+ residual[m, n])
//               h = x, or LayerNorm or RMSNorm of x over k, rounded to X. f: identity, gelu, gelu by tanh, or
//               silu(first half of n) * second half. h is taken as an integer of 31 bits times a power of two that 128
//               neighbours along k share: exact, but for what is below 2^-20 of their largest, which is off by up to 2^-31 of
//               that. Sums of a group are exact, sums of groups fp32
// Tensors       as wgmma.cu: x: X [M, K]; qweight: uint4 [N64, K64, 4, 32]; scales: S [N64, GROUPS, 64]; qzeros: uint8
//               [N64, GROUPS, 32]; perm: int32 [K]; bias: X [N]; residual: X [M, N or N / 2]; norm_weight, norm_bias: X [K];
//               y: Y [M, SPLIT1], [M, SPLIT2 - SPLIT1], [M, N - SPLIT2] after each other, or [M, N / 2] for silu_mul;
//               unused ones are null. N64 = ceil(N / 64), K64 = ceil(K / 64); all 16-byte aligned
// Layout        a word of a lane (g = lane / 4, t = lane % 4) is, by formats/tiles.py, of 16 input features: its bytes are columns 2t, 2t + 8,
//               2t + 1, 2t + 9, the low nibbles of row g, the high ones of row g + 8. So word & 0x0f0f0f0f and word & 0xf0f0f0f0
//               are registers of an int8 A as they are, the second 16 times too large, and x has that order:
//                 [chunk of 16 features][row][digit, the smallest first][16: 0 8 1 9 2 10 3 11 | 4 12 5 13 6 14 7 15] int8
//               with 16 bytes between chunks, without swizzle. A product reads eight columns; with one row the last four are what comes
//               next, and nobody looks at their sums
// Mapping       grid x: workers of CLUSTER blocks. A worker takes every (gridDim.x / CLUSTER)-th tile of 64 * TEAMS output
//               features; its blocks split K. In a block a warpgroup has 64 of the tile's features and every SLICES-th unit
//               of 128 input features of the block's range; one more warp asks for the weights
// Shared memory the block's range of x: digits, [unit][ROWS] float what they are multiplied by, [unit][group][columns] int
//               their sums; the ring: AHEAD stages of a unit for every warpgroup, with its scales and zero points; sums:
//               [BUFFERS][SOURCES][OWNED][ROWS][8 features g][g, g + 8] float; for the norm [2][ROWS][warps] float2; with act-order
//               [ROWS][K] X; barriers
// Constants     X: half_t, bf16_t; Y: X or float; S: half_t, bf16_t, float; N, K: multiples of 8; GROUP: 32, 64, a multiple of 128 or >= K;
//               ROWS: 1, 2, 4; TEAMS, SLICES: together up to 4; CLUSTER: 2, 4, 8, dividing 4 * TEAMS; AHEAD: stages; BUFFERS: 1..2;
//               BLOCKS: on an SM; ZEROS, PERM, BIAS, NORM_BIAS, RESIDUAL: 0/1; NORM: 0, 1 LayerNorm, 2 RMSNorm; ACT: 0,
//               1 gelu, 2 gelu by tanh, 3 silu_mul (N a multiple of 128, TEAMS even: every other warpgroup has features of up)
// Roof          N * K / 2 bytes of weights
// Source        own work. Integers of many digits as several small products: Ozaki et al., 2012.
#include "arrive.cuh"
#include "barrier.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "epilogue.cuh"
#include "moments.cuh"
#include "packed.cuh"
#include "reduce.cuh"
#include "s8.cuh"
#include "vectors.cuh"
#include "wgmma.cuh"

static_assert(ACT != SILU_MUL || (N % 128 == 0 && TEAMS % 2 == 0), "silu_mul pairs 64 features of the two halves");
static_assert(SPLIT1 % 8 == 0 && SPLIT2 % 8 == 0 && SPLIT1 <= SPLIT2 && SPLIT2 <= N, "planes are multiples of 8 wide");
static_assert(ROWS == 1 || ROWS == 2 || ROWS == 4, "columns of one product: digits of up to four rows");
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

constexpr int DIGITS = 4, COLUMNS = ROWS * DIGITS, WIDE = COLUMNS < 8 ? 8 : COLUMNS;  // of x; of the product
constexpr int PITCH = COLUMNS * 16 + 16;                                              // of a chunk of 16 features: no two in the same banks
constexpr int DIGIT_BYTES = (UNITS * 8 * PITCH + 128 + 15) / 16 * 16;
constexpr int FACTORS = (UNITS * ROWS + 3) / 4 * 4, COUNTS = UNITS * PARTS * WIDE;  // floats; ints
constexpr int WEIGHT_BYTES = Weights::WEIGHT_BYTES, SCALE_BYTES = Weights::SCALE_BYTES, ZERO_BYTES = Weights::ZERO_BYTES;  // of a unit
constexpr int STAGE_SCALES = TEAMS * SLICES * WEIGHT_BYTES, STAGE_ZEROS = STAGE_SCALES + TEAMS * SLICES * SCALE_BYTES;
constexpr int STAGE = STAGE_ZEROS + TEAMS * SLICES * ZERO_BYTES;
constexpr int SUMS = SOURCES * OWNED * ROWS * 16, MOMENTS = NORM ? 4 * ROWS * WARPS : 0;  // floats
constexpr int WHOLE_BYTES = PERM ? (ROWS * K * 2 + 15) / 16 * 16 : 0;
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
    X* const whole = reinterpret_cast<X*>(shared + AT_WHOLE);  // rows before they are gathered
    Barrier* const filled = reinterpret_cast<Barrier*>(shared + AT_BARRIERS);  // a stage of the ring
    Barrier* const used = filled + AHEAD;
    Barrier* const summed = used + AHEAD;  // a tile's sums
    Barrier* const stored = summed + BUFFERS;

    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), row8 = lane / 4, t = lane % 4;
    const int warp_n = warp % (4 * TEAMS), slice = warp / (4 * TEAMS), team = warp_n / 4;
    const int rank = cluster_rank();
    const int worker = blockIdx.x / CLUSTER, workers = gridDim.x / CLUSTER;
    const int rows_here = ROWS == 1 ? 1 : static_cast<int>(rows);
    const int begin = rank * RANGE, end = min(begin + RANGE, K64);
    const int units = max((end - begin + 1) / 2, 0), stages = (units + SLICES - 1) / SLICES;  // a tile's

    // Phase 1: one warp asks for all weights, AHEAD stages of them before anything is waited for: no kernel writes them. Before
    // that for the few bytes that everybody will wait for, which would else queue behind the weights of all blocks.
    if (warp == WARPS) {
        for (int i = lane; i < K64; i += 32) {
            if constexpr (NORM > 0) prefetch_l2(norm_weight + i * 64);
            if constexpr (NORM_BIAS) prefetch_l2(norm_bias + i * 64);
            if (NORM || PERM || (i >= begin && i < end))
                for (int row = 0; row < rows_here; ++row) prefetch_l2(x + row * K + i * 64);
        }
        int tile_asked = worker, stage = 0, slot = 0, turn = 0;
        auto ask = [&] {
            const int chunk = begin + stage * SLICES * 2, chunks = min(SLICES * 2, end - chunk);
            Barrier* const at = filled + slot;
            barrier_expect(at, TEAMS * Weights::bytes(chunk, chunks));
            unsigned char* const to = ring + slot * STAGE;
#pragma unroll
            for (int i = 0; i < TEAMS; ++i) {
                int in_n = tile_asked * TEAMS + i;  // which 64 features; with silu_mul of the two halves of N in turn
                if constexpr (ACT == SILU_MUL) in_n = min(in_n / 2, N / 128 - 1) + i % 2 * (N / 128);
                Weights::copy(to + i * SLICES * WEIGHT_BYTES, to + STAGE_SCALES + i * SLICES * SCALE_BYTES,
                              to + STAGE_ZEROS + i * SLICES * ZERO_BYTES, qweight, scales, qzeros, in_n, chunk, chunks, at);
            }
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

    // A piece is eight features of a row in the order of their digits: four neighbours, and the four that are eight further.
    constexpr int OWN_PIECES = UNITS * 16, ALL_PIECES = CLUSTER * OWN_PIECES, PIECES = (ALL_PIECES + THREADS - 1) / THREADS;
    auto feature_of = [](int piece) { return piece / 2 * 16 + piece % 2 * 4; };
    int order[8] = {};  // act-order: the features of x that this thread's next piece has
    auto turn_to = [&](int piece) {
        const int k = begin * 64 + feature_of(piece % OWN_PIECES);
        if (k < K) *reinterpret_cast<int4*>(order) = *reinterpret_cast<const int4*>(perm + k);
        if (k + 8 < K) *reinterpret_cast<int4*>(order + 4) = *reinterpret_cast<const int4*>(perm + k + 8);
    };
    if constexpr (PERM) turn_to(threadIdx.x);
    __syncthreads();
    cluster_arrive();  // this block's barriers are there
    wait_for_previous();
    allow_next();

    // Phase 2: a piece in digits. The 16 lanes that have a unit share a factor: its largest value becomes one of 30 bits.
    auto write_digits = [&](int row, int piece, const float (&low)[4], const float (&high)[4]) {
        unsigned largest = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) largest = max(largest, max(as_bits(low[e]) & 0x7fffffffu, as_bits(high[e]) & 0x7fffffffu));
#pragma unroll
        for (int apart = 8; apart > 0; apart /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
        const unsigned exponent = max(largest >> 23, 30u);
        const float larger = as_float((283 - exponent) << 23);  // 2^(29 - its exponent), at most 2^126
        unsigned word[8];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            word[2 * e] = static_cast<unsigned>(__float2int_rn(low[e] * larger)) + 0x00808080u;
            word[2 * e + 1] = static_cast<unsigned>(__float2int_rn(high[e] * larger)) + 0x00808080u;
        }
        // Now the bytes of a word are its digits, of all but the largest 128 too many.
        uint2 digit[DIGITS];
        int of_two[2] = {};  // sums of digits 0 and 1, 2 and 3, within 16 bits each
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned* w = word + 4 * half;
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
        if (row >= rows_here) return;
        unsigned char* const to = digits + piece / 2 * PITCH + row * (DIGITS * 16) + piece % 2 * 8;
#pragma unroll
        for (int s = 0; s < DIGITS; ++s) *reinterpret_cast<uint2*>(to + s * 16) = digit[s];
        const int unit = piece / 16;
        if (piece % (16 / PARTS) == 0) {
            auto first = [](int two) { return static_cast<int>(static_cast<short>(two)); };
            *reinterpret_cast<int4*>(counts + (unit * PARTS + piece % 16 / (16 / PARTS)) * WIDE + row * DIGITS) =
                int4{first(of_two[0]), (of_two[0] - first(of_two[0])) >> 16, first(of_two[1]), (of_two[1] - first(of_two[1])) >> 16};
        }
        // NaN or infinity anywhere is NaN in all of the row.
        if (piece % 16 == 0) factors[unit * ROWS + row] = exponent == 255 ? as_float(0x7fc00000u) : as_float((exponent - 29) << 23);
    };
    auto load_piece = [&](const X* from, int k, float (&low)[4], float (&high)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) low[e] = high[e] = 0.0f;
        if (k < K) load_vector(from + k, low);
        if (k + 8 < K) load_vector(from + k + 8, high);
    };
    // All lanes of a warp take part in each piece, for the exchange; `row` is rows_here where there is none.
    auto over_pieces = [&](auto take) {
        for (int first = 0; first < rows_here * OWN_PIECES; first += THREADS) {
            const int i = first + static_cast<int>(threadIdx.x);
            if (first + warp * 32 >= rows_here * OWN_PIECES) break;
            take(i / OWN_PIECES, i % OWN_PIECES, i);
        }
    };
    if constexpr (NORM > 0 || PERM) {
        // Every block has whole rows in registers, so that their norms wait for no other block.
        Vector<X, 4> value[ROWS][PIECES][2], by[PIECES][2], plus[PIECES][2];
        auto here = [&](int i) { return i * THREADS + static_cast<int>(threadIdx.x); };  // which piece of a row
        auto owned = [&](int piece) { return PERM || (piece >= rank * OWN_PIECES && piece < (rank + 1) * OWN_PIECES); };
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int k = feature_of(here(i)) + half * 8;
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    value[row][i][half] = {};
                    if (k < K && row < rows_here) value[row][i][half] = *reinterpret_cast<const Vector<X, 4>*>(x + row * K + k);
                }
                if (NORM == 0 || k >= K || !owned(here(i))) continue;
                by[i][half] = *reinterpret_cast<const Vector<X, 4>*>(norm_weight + k);
                if constexpr (NORM_BIAS) plus[i][half] = *reinterpret_cast<const Vector<X, 4>*>(norm_bias + k);
            }
        Normal normal[ROWS];
        if constexpr (NORM > 0) {
            // Two sums over each row, by all threads and in the same order everywhere.
            float2 sums[ROWS];
            auto add_up = [&](int pass) {
                float2* const parts = moments + pass * ROWS * WARPS;
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    const float2 of_warp = {warp_sum(sums[row].x), warp_sum(sums[row].y)};
                    if (lane == 0) parts[row * WARPS + warp] = of_warp;
                }
                sync_part(1, THREADS);
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    sums[row] = float2{0.0f, 0.0f};
#pragma unroll
                    for (int i = 0; i < WARPS; ++i) sums[row].x += parts[row * WARPS + i].x, sums[row].y += parts[row * WARPS + i].y;
                }
            };
            auto over_row = [&](int row, auto add) {
#pragma unroll
                for (int i = 0; i < PIECES; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        if (feature_of(here(i)) + half * 8 < K)
#pragma unroll
                            for (int e = 0; e < 4; ++e) add(to_float(value[row][i][half].lane[e]));
            };
            float mean[ROWS] = {};
            if constexpr (NORM == 1) {
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    sums[row] = float2{0.0f, 0.0f};
                    over_row(row, [&](float v) { sums[row].x += v; });
                }
                add_up(0);
#pragma unroll
                for (int row = 0; row < ROWS; ++row) mean[row] = sums[row].x / K;
            }
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                sums[row] = float2{0.0f, 0.0f};
                over_row(row, [&](float v) { sums[row].x += v - mean[row], sums[row].y += (v - mean[row]) * (v - mean[row]); });
            }
            add_up(1);
#pragma unroll
            for (int row = 0; row < ROWS; ++row)
                normal[row] = combine<NORM == 1>(1, K, static_cast<float>(eps), [](int) { return K; },
                                                 [&](int) { return Moments{mean[row], sums[row].x, sums[row].y}; });
        }
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            // The 32 pieces of a warp belong to one block's range, or with a range of an odd number of units to two.
            const bool mine = owned(here(i));
            if (!warp_any(mine)) continue;
            const int k = feature_of(here(i)), piece = here(i) - rank * OWN_PIECES;
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                float of[2][4];
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float v = to_float(value[row][i][half].lane[e]);
                        if constexpr (NORM > 0) {
                            v = normal[row](v) * to_float(by[i][half].lane[e]) + (NORM_BIAS ? to_float(plus[i][half].lane[e]) : 0.0f);
                            v = k + half * 8 < K ? to_float(from_float<X>(v)) : 0.0f;
                        }
                        of[half][e] = v;
                    }
                if constexpr (PERM) {
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        if (k + half * 8 < K && row < rows_here) store_vector(whole + row * K + k + half * 8, of[half]);
                } else {
                    write_digits(mine ? row : rows_here, piece, of[0], of[1]);
                }
            }
        }
        if constexpr (PERM) {
            // The packed weights are sorted by group, so x is gathered instead, from shared memory: every 2-byte load from
            // global memory would take a cycle of the SM's own.
            sync_part(1, THREADS);
            over_pieces([&](int row, int piece, int i) {
                const int k = begin * 64 + feature_of(piece);
                float of[2][4];
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        of[half][e] = k + half * 8 < K && row < rows_here ? to_float(whole[row * K + order[half * 4 + e]]) : 0.0f;
                turn_to(i + THREADS);
                write_digits(row, piece, of[0], of[1]);
            });
        }
    } else {
        over_pieces([&](int row, int piece, int) {
            float low[4], high[4];
            load_piece(x + min(row, rows_here - 1) * K, begin * 64 + feature_of(piece), low, high);
            write_digits(row, piece, low, high);
        });
    }
    cluster_wait();

    // Phase 5, of a tile: when all its sums are there, they are added up in order, so that the result never depends on timing,
    // and stored. Four features a thread.
    const int steps = (TILES - worker + workers - 1) / workers;  // tiles of this worker; it has at least one
    auto expect = [&](int step) {
        if (threadIdx.x == 0 && step < steps) barrier_expect(summed + step % BUFFERS, SOURCES * OWNED * 64 * rows_here);
    };
    auto finish = [&](int step, int n_tile) {
        const float* const sums = all_sums + step % BUFFERS * SUMS;
        barrier_wait(summed + step % BUFFERS, step / BUFFERS % 2);
        expect(step + BUFFERS);
        constexpr int STRIPS_OUT = ACT == SILU_MUL ? OWNED / 2 : OWNED;
        for (int piece = threadIdx.x; piece < STRIPS_OUT * rows_here * 4; piece += THREADS) {
            const int column = piece % 4 * 4, strip = piece / 4 % STRIPS_OUT, row = piece / (4 * STRIPS_OUT);
            const int feature = n_tile * BLOCK_OUT + (rank * STRIPS_OUT + strip) * 16 + column;
            if (feature >= N_OUT) continue;
            finish_four<ACT, BIAS, RESIDUAL, N, SPLIT1, SPLIT2>(bias, residual, y, rows, row, feature, [&](int which, float (&value)[4]) {
                const float* const at = sums + ((ACT == SILU_MUL ? strip * 2 + which : strip) * ROWS + row) * 16 + column % 8 * 2 + column / 8;
#pragma unroll
                for (int e = 0; e < 4; ++e) value[e] = 0.0f;
#pragma unroll
                for (int source = 0; source < SOURCES; ++source)
#pragma unroll
                    for (int e = 0; e < 4; ++e) value[e] += at[source * (OWNED * ROWS * 16) + e * 2];
            });
        }
        __syncwarp();
        // Not after the last steps: nobody waits for it, and the other block might be gone.
        if (step + BUFFERS < steps) warp_arrive_at<CLUSTER>(stored + step % BUFFERS, lane);
    };

    // Phase 3: the product, tile after tile.
    const unsigned columns = wgmma_pieces(digits, PITCH);
    const unsigned char* const my_weights = ring + (team * SLICES + slice) * WEIGHT_BYTES + warp_n % 4 * 512 + lane * 16;
    const unsigned char* const my_scales =
        ring + STAGE_SCALES + (team * SLICES + slice) * SCALE_BYTES + (warp_n % 4 * 16 + row8 * 2) * sizeof(S);
    const unsigned char* const my_zeros = ring + STAGE_ZEROS + (team * SLICES + slice) * ZERO_BYTES + warp_n % 4 * 8 + row8;
    // This lane's sums are of digits 0 and 1, or 2 and 3, of row t / 2 (and of row 2 + t / 2).
    const float worth[2] = {t % 2 == 0 ? 1.0f : 65536.0f, t % 2 == 0 ? 256.0f : 16777216.0f};
    const float* const my_factors = factors + (ROWS == 1 ? 0 : t / 2);
    const int* const my_counts = counts + t * 2;
    constexpr int FOURS = WIDE / 8;
    int slot = 0, turn = 0, step = 0, unfinished = worker;
#pragma unroll
    for (int b = 0; b < BUFFERS; ++b) expect(b);
    fence_async();
    sync_part(1, THREADS);
    for (int n_tile = worker; n_tile < TILES; n_tile += workers, ++step) {
        float total[FOURS * 4] = {};
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
            const int unit = stage * SLICES + slice, at = slot * STAGE;
            barrier_wait(filled + slot, turn);
            if (unit < units) {
                const auto words = Weights::load<2>(my_weights + at);
                unsigned a[4][4];
#pragma unroll
                for (int i = 0; i < 8; ++i) a[i / 2][i % 2 * 2] = words.word[i] & 0x0f0f0f0fu, a[i / 2][i % 2 * 2 + 1] = words.word[i] & 0xf0f0f0f0u;
                float scale[PARTS][2];  // of features g and g + 8
                int part[PARTS][FOURS * 4];
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    const Vector<S, 2> pair = *reinterpret_cast<const Vector<S, 2>*>(my_scales + at + p * 64 * sizeof(S));
                    scale[p][0] = to_float(pair.lane[0]), scale[p][1] = to_float(pair.lane[1]) * 0.0625f;
                    // Half a unit has no scales for its other half, only what was in the ring before.
                    if (K64 % 2 != 0 && PARTS > 1 && p >= PARTS / 2 && begin + unit * 2 + 1 >= K64) scale[p][0] = scale[p][1] = 0.0f;
                    unsigned zeros = Weights::MIDDLE;
                    if constexpr (ZEROS) zeros = Weights::zeros_of(my_zeros + (at + p * Weights::ZERO_ROW));
                    const int low = zeros & 15, high = zeros & 0xf0;
                    // A sum begins as a float that the integers are added to, less what zero points add to it.
#pragma unroll
                    for (int j = 0; j < FOURS; ++j) {
                        const int2 count = *reinterpret_cast<const int2*>(my_counts + (unit * PARTS + p) * WIDE + j * 8);
                        part[p][j * 4] = static_cast<int>(SEED_BITS) - low * count.x, part[p][j * 4 + 1] = static_cast<int>(SEED_BITS) - low * count.y;
                        part[p][j * 4 + 2] = static_cast<int>(SEED_BITS) - high * count.x, part[p][j * 4 + 3] = static_cast<int>(SEED_BITS) - high * count.y;
                    }
                }
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 4; ++i) wgmma_add_pieces(part[i * PARTS / 4], a[i], columns + (unit * 8 + i * 2) * (PITCH / 16));
                wgmma_commit();
                warp_arrive(used + slot, lane);  // this warp has read the stage
                float factor[FOURS];
#pragma unroll
                for (int j = 0; j < FOURS; ++j) factor[j] = my_factors[unit * ROWS + j * 2];
                wgmma_wait<0>();
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    arrived(part[p]);
#pragma unroll
                    for (int i = 0; i < FOURS * 4; ++i)
                        total[i] += scale[p][i / 2 % 2] * factor[i / 4] * (as_float(static_cast<unsigned>(part[p][i])) - SEED);
                }
            } else {
                warp_arrive(used + slot, lane);
            }
            if (++slot == AHEAD) slot = 0, turn ^= 1;
        }

        // Phase 4: every warp sends its sums to the block that owns their features, and goes on; those of the tile before
        // are added up meanwhile. With silu_mul the strips of two warpgroups belong together in pairs.
        const int strip = ACT == SILU_MUL ? (team / 2 * 4 + warp_n % 4) * 2 + team % 2 : warp_n;
        if (BUFFERS == 1 && step > 0) finish(step - 1, unfinished);
        if (step >= BUFFERS) barrier_wait(stored + step % BUFFERS, (step / BUFFERS - 1) % 2);
        float* const to = all_sums + step % BUFFERS * SUMS + ((rank * SLICES + slice) * OWNED + strip % OWNED) * (ROWS * 16) + row8 * 2;
#pragma unroll
        for (int j = 0; j < FOURS; ++j) {
            float of[2];  // features g and g + 8
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                of[i] = total[j * 4 + i * 2] * worth[0] + total[j * 4 + i * 2 + 1] * worth[1];
                of[i] += __shfl_xor_sync(0xffffffffu, of[i], 1);
            }
            const int row = j * 2 + t / 2;
            if (t % 2 == 0 && row < rows_here) send(to + row * 16, of[0], of[1], summed + step % BUFFERS, strip / OWNED);
        }
        if (BUFFERS == 2 && step > 0) finish(step - 1, unfinished);
        unfinished = n_tile;
    }
    finish(step - 1, unfinished);
}
