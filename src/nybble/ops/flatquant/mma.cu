// FlatQuant: each row of x, as a small matrix, between two transforms on the tensor cores, then its scale and its int4 values.
//
// Computes      Y = L^T x R of each token's x as [M, N]; for each clip ratio c: scale = max(c * max|Y| / 7, 2^-126), or 1 where
//               all of Y is 0; q = clamp(round_half_even(Y / scale), -8, 7). A row with a NaN or an infinite Y: scale NaN, q 0.
//               Sums fp32. T = x R is rounded once to X; of fp16, when the largest of a warp's T is not in [2^-8, 65504], after
//               multiplication by 2^+-16 or 2^+-32 (a warp's columns have their own factor), so that nothing overflows. fp32:
//               products of tf32 pairs (hi + lo, 22 bits of each factor), T not rounded. The quotient is Y * (1 / scale)
// Tensors       x: X [tokens, M * N], rows row_stride elements apart, 16-byte aligned where ALIGNED; left: X [M, M]; right: X
//               [N, N], contiguous, 16-byte aligned; q: int8 [CLIPS, tokens, F], or PACKED uint32 [CLIPS, tokens, F / 8], F = M * N,
//               16-byte aligned; scales: float [CLIPS, tokens]. clip0 .. clip3: the ratios, in (0, 1]
// Layout        packed: element i of a row in bits 4 (i % 8) of word i / 8, two's complement, or with OFFSET as q + 8. Of the NW
//               columns of a warp a thread has RUN neighbours, t * RUN .. t * RUN + RUN - 1 with t = lane % 4, of rows g and g + 8
//               of each strip of 16: the columns of R lie permuted in shared memory, so that neighbours meet in one thread and
//               packing needs no shuffle
// Mapping       a token belongs to a group of WARPS warps, a warp to NW columns of Y. First T^T = R^T x^T, of those columns: its
//               accumulators, rounded to X, are fragments of B as they are; then Y = L^T T. Only the maximum is exchanged. GROUPS
//               groups a block; a group takes token after token, the grid apart. A token too large for the registers of so many
//               warps is computed piece by piece (NW columns, the PARTS-th part of the rows), once for the maximum, once to write
// Shared memory R and L (RESIDENT), BUFFERS x of a group (one is filled while the other is used; with 0 fp32 is read in place), a float a warp, with STAGED a
//               byte an element. Rows are padded by 16 bytes (fp32: so that the lanes of a fragment lie in different banks)
// Constants     X: half_t, bf16_t, float; M, N: 1..256; NW: 16, 32, 64; WARPS, PARTS, GROUPS; BUFFERS: 0..2; PACKED, OFFSET, STAGED, ALIGNED,
//               RESIDENT: 0/1; CLIPS: 1..4; CLAMP: whether a ratio is below 1; BLOCKS: of an SM; SHARED: bytes
// Roof          memory: (sizeof(X) + 1/2 or 1) * tokens * F bytes; tensor cores 2 * tokens * F * (M + N) flops
// Source        own work; the formula: FlatQuant (Sun et al. 2024)
#include "copy.cuh"
#include "dependent.cuh"
#include "mma.cuh"
#include "quantise.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

static_assert(M >= 1 && M <= 256 && N >= 1 && N <= 256, "M and N are at most 256");
static_assert(NW == 16 || NW == 32 || NW == 64, "a warp has 16, 32 or 64 columns");
static_assert(CLIPS >= 1 && CLIPS <= 4, "one to four clip ratios");
static_assert(!ALIGNED || N % 8 == 0, "16-byte copies of x need rows of 16 bytes");
constexpr bool WIDE = same<X, float>;
constexpr int F = M * N, MP = (M + 15) / 16 * 16, NK = (N + 15) / 16 * 16;
constexpr int CHUNKS = (N + NW - 1) / NW, NC = CHUNKS * NW, RUN = NW / 4, TILES = NW / 8, STRIPS = MP / 16, PAIRS = NW / 16;
constexpr int STRIPS_NOW = (STRIPS + PARTS - 1) / PARTS, MC = PARTS * STRIPS_NOW * 16;
constexpr int PIECES = CHUNKS * PARTS, ROUNDS = (PIECES + WARPS - 1) / WARPS;
constexpr int GROUP_THREADS = WARPS * 32, THREADS = GROUPS * GROUP_THREADS;
static_assert(THREADS <= 1024 && GROUPS <= 15, "a block is at most 32 warps");
static_assert(BUFFERS > 0 || (WIDE && !ALIGNED), "only fp32 is read in place");
static_assert(STAGED || N % RUN == 0, "results go out a run at a time");
static_assert(!PACKED || F % 8 == 0, "a word is eight values");
constexpr int PADDING = WIDE ? 4 : 8;
// Elements between rows. fp32 fragments are read element by element: R's lanes are 4 rows by 8 columns, L's every other row.
constexpr int XS = NK + PADDING, RS = WIDE ? NC + (NC % 32 == 0 ? 8 : 24) : NC + PADDING, LS = MC + (WIDE && MC % 32 != 0 ? 20 : PADDING);
constexpr int RIGHT = RESIDENT ? NK * RS : 0, LEFT = RESIDENT ? MP * LS : 0, ROOM = MP * XS;  // elements
constexpr int STAGE = STAGED ? (F + 15) / 16 * 16 : 0;
constexpr int BYTES = (RIGHT + LEFT + GROUPS * BUFFERS * ROOM) * sizeof(X) + GROUPS * STAGE + GROUPS * WARPS * 4;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

// Where column n of R lies in shared memory: in the tile and column whose accumulator the thread of its run has.
__device__ __forceinline__ int place_of(int n) {
    const int r = n % NW;
    return n / NW * NW + r % RUN / 2 * 8 + r / RUN * 2 + n % 2;
}

// A matrix [SIZE, SIZE] to shared memory, rows STRIDE elements apart, its columns moved by `to`; in the background where it can be.
template <int SIZE, int STRIDE, typename To> __device__ __forceinline__ void bring(X* shared, const X* from, To to) {
    if constexpr (SIZE % 2 == 0) {
#pragma unroll 4
        for (int i = threadIdx.x * 2; i < SIZE * SIZE; i += THREADS * 2)
            copy_async<2 * sizeof(X)>(shared + i / SIZE * STRIDE + to(i % SIZE), from + i);
        commit_copies();
    } else {
#pragma unroll 8
        for (int i = threadIdx.x; i < SIZE * SIZE; i += THREADS) shared[i / SIZE * STRIDE + to(i % SIZE)] = from[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
mma_kernel(const X* __restrict__ x, const X* __restrict__ left, const X* __restrict__ right, unsigned char* __restrict__ q,
           float* __restrict__ scales, long long tokens, long long row_stride, double clip0, double clip1, double clip2, double clip3) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = uniform(threadIdx.x / 32), group = warp / WARPS, w = warp % WARPS;
    X* const shared_right = reinterpret_cast<X*>(shared);
    X* const shared_left = shared_right + RIGHT;
    X* const room = shared_left + LEFT + group * BUFFERS * ROOM;
    unsigned char* const staged = reinterpret_cast<unsigned char*>(shared_left + LEFT + GROUPS * BUFFERS * ROOM) + group * STAGE;
    float* const largest_of = reinterpret_cast<float*>(staged + (GROUPS - group) * STAGE) + group * WARPS;
    const int of_group = w * 32 + lane;
    // Neighbouring tokens are in different blocks, so that few of them are on as many multiprocessors as can be.
    const long long first = blockIdx.x + static_cast<long long>(gridDim.x) * group, step = static_cast<long long>(gridDim.x) * GROUPS;

    auto sync_group = [&] {
        if constexpr (WARPS == 1) __syncwarp();
        else if constexpr (GROUPS == 1) __syncthreads();
        else sync_part(1 + group, GROUP_THREADS);
    };
    auto fetch = [&](long long token, int buffer) {
        if (BUFFERS == 0 || token >= tokens) return;
        const X* const from = x + token * row_stride;
        X* const to = room + buffer * ROOM;
        if constexpr (ALIGNED) {
            constexpr int EACH = 16 / sizeof(X), OF_ROW = N / EACH;
#pragma unroll 8
            for (int c = of_group; c < M * OF_ROW; c += GROUP_THREADS)
                copy_async_16(to + c / OF_ROW * XS + c % OF_ROW * EACH, from + c * EACH, true);
            commit_copies();
        } else {
#pragma unroll 4
            for (int i = of_group; i < F; i += GROUP_THREADS) to[i / N * XS + i % N] = from[i];
        }
    };

    // Padding is zero, and stays so. The transforms and the first tokens come into L2 while the previous kernel still runs.
    if constexpr (MC != M || NK != N || NC != N)
        for (int i = threadIdx.x * 16; i < (RIGHT + LEFT + GROUPS * BUFFERS * ROOM) * static_cast<int>(sizeof(X)); i += THREADS * 16)
            *reinterpret_cast<uint4*>(shared + i) = uint4{0, 0, 0, 0};
    for (int i = threadIdx.x * 128; i < N * N * static_cast<int>(sizeof(X)); i += THREADS * 128)
        prefetch_l2(reinterpret_cast<const unsigned char*>(right) + i);
    for (int i = threadIdx.x * 128; i < M * M * static_cast<int>(sizeof(X)); i += THREADS * 128)
        prefetch_l2(reinterpret_cast<const unsigned char*>(left) + i);
    if (first < tokens)
        for (int i = of_group * 128; i < F * static_cast<int>(sizeof(X)); i += GROUP_THREADS * 128)
            prefetch_l2(reinterpret_cast<const unsigned char*>(x + first * row_stride) + i);
    if constexpr (MC != M || NK != N || NC != N) __syncthreads();
    wait_for_previous();
    allow_next();
    fetch(first, 0);
    if constexpr (RESIDENT) {
        bring<N, RS>(shared_right, right, [](int n) { return place_of(n); });
        bring<M, LS>(shared_left, left, [](int m) { return m; });
        wait_copies<0>();
    }
    __syncthreads();

    // Element (k, column) of R as it lies in shared memory, and of L; from global memory where they do not fit.
    auto right_at = [&](int k, int column) {
        if constexpr (RESIDENT) return shared_right[k * RS + column];
        const int r = column % NW, n = column / NW * NW + r % 8 / 2 * RUN + r / 8 * 2 + r % 2;
        return k < N && n < N ? __ldg(right + k * N + n) : from_float<X>(0.0f);
    };
    auto left_at = [&](int k, int column) {
        if constexpr (RESIDENT) return shared_left[k * LS + column];
        return k < M && column < M ? __ldg(left + k * M + column) : from_float<X>(0.0f);
    };
    // Fragments of A = R^T or L^T: rows are columns `column` .. + 15 of the matrix, along k its rows k .. k + 15.
    auto fragment = [&](unsigned (&a)[4], const X* matrix, int stride, auto at, int k, int column) {
        if constexpr (RESIDENT) {
            load_matrices_transposed(a, matrix + (k + lane / 16 * 8 + lane % 8) * stride + column + lane / 8 % 2 * 8);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                Vector<X, 2> pair;
                pair.lane[0] = at(k + i / 2 * 8 + t * 2, column + i % 2 * 8 + g);
                pair.lane[1] = at(k + i / 2 * 8 + t * 2 + 1, column + i % 2 * 8 + g);
                a[i] = reinterpret_cast<const unsigned&>(pair);
            }
        }
    };

    const float ratio[4] = {static_cast<float>(clip0), static_cast<float>(clip1), static_cast<float>(clip2), static_cast<float>(clip3)};
    int buffer = 0;
    for (long long token = first; token < tokens; token += step) {
        if constexpr (ALIGNED) wait_copies<0>();
        sync_group();  // this token is there, and the group has done with the one before
        const X* const mine = room + buffer * ROOM;
        auto x_at = [&](int m, int k) {
            if constexpr (BUFFERS > 0) return to_float(mine[m * XS + k]);
            return m < M && k < N ? to_float(__ldg(x + token * row_stride + m * N + k)) : 0.0f;
        };
        if constexpr (BUFFERS == 2) fetch(token + step, buffer ^= 1);

        float y[STRIPS_NOW][TILES][4], back;
        // A piece of Y, from column and strip of rows `strip` on, divided by `back`.
        auto compute = [&](int piece) {
            const int first_column = piece % CHUNKS * NW, first_row = piece / CHUNKS * STRIPS_NOW * 16;
            back = 1.0f;
            // T^T = R^T x^T: [n][m], of these columns n and all m.
            if constexpr (WIDE) {
                float part[PAIRS][MP / 8][4] = {};
#pragma unroll 1
                for (int k = 0; k < NK; k += 8) {
                    Split a[PAIRS][4];
#pragma unroll
                    for (int s = 0; s < PAIRS; ++s)
#pragma unroll
                        for (int i = 0; i < 4; ++i) a[s][i] = split(to_float(right_at(k + i / 2 * 4 + t, first_column + s * 16 + i % 2 * 8 + g)));
#pragma unroll
                    for (int m = 0; m < MP / 8; ++m) {
                        const Split b0 = split(x_at(m * 8 + g, k + t)), b1 = split(x_at(m * 8 + g, k + t + 4));
#pragma unroll
                        for (int s = 0; s < PAIRS; ++s) mma_split(part[s][m], a[s], b0, b1);
                    }
                }
#pragma unroll
                for (int i = 0; i < STRIPS_NOW; ++i)
#pragma unroll
                    for (int j = 0; j < TILES; ++j)
#pragma unroll
                        for (int e = 0; e < 4; ++e) y[i][j][e] = 0.0f;
                // Along k the order of L's rows is free: 2 t and 2 t + 1 stand for t and t + 4, as the accumulators have them.
#pragma unroll
                for (int k = 0; k < MP / 8; ++k)
#pragma unroll
                    for (int i = 0; i < STRIPS_NOW; ++i) {
                        Split a[4];
#pragma unroll
                        for (int e = 0; e < 4; ++e) a[e] = split(to_float(left_at(k * 8 + t * 2 + e / 2, first_row + i * 16 + e % 2 * 8 + g)));
#pragma unroll
                        for (int j = 0; j < TILES; ++j)
                            mma_split(y[i][j], a, split(part[j / 2][k][j % 2 * 2]), split(part[j / 2][k][j % 2 * 2 + 1]));
                    }
            } else {
                float part[PAIRS][MP / 8][4] = {};
                unsigned b[TILES][STRIPS][2];
#pragma unroll 2
                for (int k = 0; k < NK; k += 16) {
                    unsigned rows[STRIPS][4];
#pragma unroll
                    for (int i = 0; i < STRIPS; ++i)
                        load_matrices(rows[i], mine + (i * 16 + lane / 16 * 8 + lane % 8) * XS + k + lane / 8 % 2 * 8);
#pragma unroll
                    for (int s = 0; s < PAIRS; ++s) {
                        unsigned a[4];
                        fragment(a, shared_right, RS, right_at, k, first_column + s * 16);
#pragma unroll
                        for (int m = 0; m < MP / 8; ++m) mma_16816<X>(part[s][m], a, rows[m / 2][m % 2 * 2], rows[m / 2][m % 2 * 2 + 1]);
                    }
                }
                for (int attempt = 0;; ++attempt) {
                    unsigned largest = 0;
#pragma unroll
                    for (int j = 0; j < TILES; ++j)
#pragma unroll
                        for (int m = 0; m < MP / 8; ++m) {
                            b[j][m / 2][m % 2] = rounded_pair<X>(part[j / 2][m][j % 2 * 2], part[j / 2][m][j % 2 * 2 + 1]);
                            if constexpr (same<X, half_t>) largest = larger_magnitude(largest, b[j][m / 2][m % 2]);
                        }
                    if constexpr (!same<X, half_t>) {
                        // bf16 needs no scaling, but a branch that the compiler can't see through: without one it begins with Y
                        // before all of T is rounded, and keeps both in fp32, 56 bytes of it in memory.
                        unsigned never = 0;
                        pin(never);
                        if (!warp_any(never != 0)) break;
                    }
                    float factor;
                    if (in_range(largest, attempt, back, factor)) break;
#pragma unroll
                    for (int s = 0; s < PAIRS; ++s)
#pragma unroll
                        for (int m = 0; m < MP / 8; ++m)
#pragma unroll
                            for (int e = 0; e < 4; ++e) part[s][m][e] *= factor;
                }
#pragma unroll
            for (int i = 0; i < STRIPS_NOW; ++i)
#pragma unroll
                for (int j = 0; j < TILES; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) y[i][j][e] = 0.0f;
#pragma unroll
                for (int k = 0; k < STRIPS; ++k)
#pragma unroll
                    for (int i = 0; i < STRIPS_NOW; ++i) {
                        unsigned a[4];
                        fragment(a, shared_left, LS, left_at, k * 16, first_row + i * 16);
#pragma unroll
                        for (int j = 0; j < TILES; ++j) mma_16816<X>(y[i][j], a, b[j][k][0], b[j][k][1]);
                    }
            }
        };

        // The row's largest magnitude; a NaN stays one.
        float row_max = 0.0f;
#pragma unroll 1
        for (int piece = w; piece < PIECES; piece += WARPS) {
            compute(piece);
            float most[4] = {};
#pragma unroll
            for (int i = 0; i < STRIPS_NOW; ++i)
#pragma unroll
                for (int j = 0; j < TILES; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) most[e] = max_or_nan(most[e], fabsf(y[i][j][e]));
            const float largest = warp_max(max_or_nan(max_or_nan(most[0], most[1]), max_or_nan(most[2], most[3]))) * back;
            row_max = max_or_nan(row_max, largest);
            if (ROUNDS == 1) break;
        }
        if constexpr (WARPS > 1) {
            if (lane == 0) largest_of[w] = row_max;
            sync_group();
#pragma unroll
            for (int i = 0; i < WARPS; ++i) row_max = max_or_nan(row_max, largest_of[i]);
        }
        if constexpr (BUFFERS == 1 && ROUNDS == 1) {
            if constexpr (WARPS == 1) __syncwarp();
            fetch(token + step, 0);  // all have read this one
        }
        const bool finite = row_max < __int_as_float(0x7f800000);

        auto write = [&](int piece, int c) {
            if (!finite) {
#pragma unroll
                for (int i = 0; i < STRIPS_NOW; ++i)
#pragma unroll
                    for (int j = 0; j < TILES; ++j)
#pragma unroll
                        for (int e = 0; e < 4; ++e) y[i][j][e] = 0.0f;
            }
            float clip = ratio[0];
            if constexpr (CLIPS > 1) clip = c == 0 ? ratio[0] : c == 1 ? ratio[1] : c == 2 ? ratio[2] : ratio[3];
            const Quantiser<PACKED && !STAGED, CLAMP> quantiser(row_max, back, clip);
            if (of_group == 0 && piece == 0) scales[c * tokens + token] = quantiser.scale;
            const long long of_row = c * tokens + token;
            unsigned char* const to = STAGED ? staged : q + of_row * (PACKED ? F / 2 : F);
            const int column = piece % CHUNKS * NW + t * RUN;
            if (NC == N || column < N)
#pragma unroll
                for (int i = 0; i < STRIPS_NOW; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int row = piece / CHUNKS * STRIPS_NOW * 16 + i * 16 + half * 8 + g;
                        if (MC != M && row >= M) continue;
                        if constexpr (STAGED) {
#pragma unroll
                            for (int e = 0; e < RUN; ++e)
                                if (column + e < N) to[row * N + column + e] = quantiser.bits(y[i][e / 2][half * 2 + e % 2]) & 0xffu;
                        } else if constexpr (PACKED) {
                            constexpr int EACH = RUN < 8 ? RUN : 8, WORDS = RUN / EACH;
                            unsigned word[WORDS];
#pragma unroll
                            for (int v = 0; v < WORDS; ++v)
                                word[v] = quantiser.nibbles<EACH>([&](int e) { return y[i][v * 4 + e / 2][half * 2 + e % 2]; }) ^ (OFFSET ? 0u : 0x88888888u);
                            unsigned char* const at = to + (row * N + column) / 2;
                            if constexpr (RUN == 4) *reinterpret_cast<unsigned short*>(at) = word[0] & 0xffffu;
                            else if constexpr (RUN == 8) *reinterpret_cast<unsigned*>(at) = word[0];
                            else *reinterpret_cast<Vector<unsigned, 2>*>(at) = {word[0], word[WORDS - 1]};
                        } else {
                            Vector<unsigned, RUN / 4> words;
#pragma unroll
                            for (int v = 0; v < RUN / 4; ++v)
                                words.lane[v] = quantiser.bytes([&](int e) { return y[i][v * 2 + e / 2][half * 2 + e % 2]; });
                            *reinterpret_cast<Vector<unsigned, RUN / 4>*>(to + row * N + column) = words;
                        }
                    }
        };
#pragma unroll 1
        for (int c = 0; c < CLIPS; ++c) {
            if constexpr (ROUNDS == 1) write(w, c);
            else
#pragma unroll 1
                for (int piece = w; piece < PIECES; piece += WARPS) compute(piece), write(piece, c);
            if constexpr (STAGED) {
                sync_group();
                unsigned char* const out = q + (c * tokens + token) * (PACKED ? F / 2 : F);
                if constexpr (PACKED) {
                    for (int i = of_group; i < F / 8; i += GROUP_THREADS) {
                        unsigned word = 0;
#pragma unroll
                        for (int e = 0; e < 8; ++e) word |= (staged[i * 8 + e] & 15u) << (4 * e);
                        reinterpret_cast<unsigned*>(out)[i] = word ^ (OFFSET ? 0x88888888u : 0u);
                    }
                } else {
                    for (int i = of_group; i < F; i += GROUP_THREADS) out[i] = staged[i];
                }
                if constexpr (CLIPS > 1) sync_group();
            }
        }
        if constexpr (BUFFERS == 1 && ROUNDS > 1) {
            sync_group();
            fetch(token + step, 0);
        }
    }
}
