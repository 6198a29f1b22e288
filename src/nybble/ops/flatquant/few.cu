// FlatQuant of few tokens: what mma.cu computes, a token shared out among the blocks of a cluster.
//
// Computes      Y = L^T x R of each token's x as [M, N]; for each clip ratio c: scale = max(c * max|Y| / 7, 2^-126), or 1 where
//               all of Y is 0; q = clamp(round_half_even(Y / scale), -8, 7). A row with a NaN or an infinite Y: scale NaN, q 0.
//               Sums fp32. T = x R is rounded once to X; of fp16, when the largest of a block's T is not in [2^-8, 65504], after
//               multiplication by 2^+-16 or 2^+-32 (a block's columns have their own factor), so that nothing overflows. The
//               quotient is Y * (1 / scale)
// Tensors       x: X [tokens, M * N], rows row_stride elements apart; left: X [M, M]; right: X [N, N], contiguous; q: int8
//               [CLIPS, tokens, F], or PACKED uint32 [CLIPS, tokens, F / 8], F = M * N; scales: float [CLIPS, tokens]; all but
//               scales 16-byte aligned, rows of x too. clip0 .. clip3: the ratios, in (0, 1]
// Layout        packed: element i of a row in bits 4 (i % 8) of word i / 8, two's complement, or with OFFSET as q + 8. Of its
//               block's NW columns a thread has RUN neighbours, of rows g and g + 8 of its warp's 16: the columns of R lie
//               permuted in shared memory, so that packing needs no shuffle
// Mapping       grid x: tokens, a cluster of N / NW blocks each; a block has NW columns of Y, a warp of it 16 rows. First
//               T^T = R^T x^T: warp i has rows m = 16 i .. of x; all of the block's T meets in shared memory, in fp32 and as fragments,
//               and every warp rounds all of it; then Y = L^T T, of the warp's rows. The maxima of all warps go to all blocks
// Shared memory x: [MP][N + 8] X, L: [MP][MP + 8] X, both zero from M on; R: [N][NW + 8] X; T: [NW / 16][MP / 8][32] float4; a float4 for
//               each warp of the cluster; a barrier
// Constants     X: half_t, bf16_t; M: even, to 128; N: a multiple of NW, to 8 NW; NW: 16, 32; PACKED, OFFSET: 0/1; CLIPS: 1..4; CLAMP:
//               whether a ratio is below 1; SHARED: bytes
// Roof          the latency of a launch, of a read, and of two chains of products
// Source        own work; the formula: FlatQuant (Sun et al. 2024)
#include "barrier.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "mma.cuh"
#include "quantise.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

static_assert(M >= 2 && M <= 128 && M % 2 == 0, "rows of L go by pairs, and a warp has 16 of them");
static_assert(NW == 16 || NW == 32, "a block has 16 or 32 columns");
static_assert(N % NW == 0 && N / NW <= 8, "a cluster is up to eight blocks");
static_assert(CLIPS >= 1 && CLIPS <= 4, "one to four clip ratios");
constexpr int F = M * N, MP = (M + 15) / 16 * 16, STRIPS = MP / 16, CLUSTER = N / NW, PAIRS = NW / 16, TILES = NW / 8, RUN = NW / 4;
constexpr int WARPS = STRIPS, THREADS = 32 * WARPS;
constexpr int XS = N + 8, LS = MP + 8, RS = NW + 8;  // elements between rows: eight of them lie in different banks
constexpr int X_BYTES = MP * XS * 2, L_BYTES = MP * LS * 2, R_BYTES = N * RS * 2, T_BYTES = PAIRS * MP / 8 * 512;
constexpr int BYTES = X_BYTES + L_BYTES + R_BYTES + T_BYTES + CLUSTER * WARPS * 16 + 8;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
few_kernel(const X* __restrict__ x, const X* __restrict__ left, const X* __restrict__ right, unsigned char* __restrict__ q,
           float* __restrict__ scales, long long tokens, long long row_stride, double clip0, double clip1, double clip2, double clip3) {
    extern __shared__ __align__(128) unsigned char shared[];
    X* const shared_x = reinterpret_cast<X*>(shared);
    X* const shared_left = shared_x + MP * XS;
    X* const shared_right = shared_left + MP * LS;
    float4* const shared_t = reinterpret_cast<float4*>(shared_right + N * RS);
    float4* const maxima = shared_t + T_BYTES / 16;
    Barrier* const all_there = reinterpret_cast<Barrier*>(maxima + CLUSTER * WARPS);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, w = uniform(threadIdx.x / 32);
    const int rank = cluster_rank(), first_column = rank * NW;
    const long long token = blockIdx.x / CLUSTER;

    // Padding is zero. What will be read comes into L2 while the previous kernel still runs.
    if (threadIdx.x == 0) {
        barrier_init(all_there, 1);
        barrier_init_done();
    }
    const X* const mine = x + token * row_stride;
    for (int i = (rank * THREADS + threadIdx.x) * 128; i < F * 2; i += CLUSTER * THREADS * 128) prefetch_l2(reinterpret_cast<const unsigned char*>(mine) + i);
    for (int i = (rank * THREADS + threadIdx.x) * 128; i < N * N * 2; i += CLUSTER * THREADS * 128)
        prefetch_l2(reinterpret_cast<const unsigned char*>(right) + i);
    for (int i = (rank * THREADS + threadIdx.x) * 128; i < M * M * 2; i += CLUSTER * THREADS * 128)
        prefetch_l2(reinterpret_cast<const unsigned char*>(left) + i);
    if constexpr (MP != M) {
        for (int i = threadIdx.x * 8; i < (MP - M) * XS; i += THREADS * 8) *reinterpret_cast<uint4*>(shared_x + M * XS + i) = uint4{0, 0, 0, 0};
        for (int i = threadIdx.x * 8; i < MP * LS; i += THREADS * 8) *reinterpret_cast<uint4*>(shared_left + i) = uint4{0, 0, 0, 0};
    }
    __syncthreads();
    if (threadIdx.x == 0) barrier_expect(all_there, CLUSTER * WARPS * 16);
    cluster_arrive();  // this block's barrier is there
    wait_for_previous();
    allow_next();

    constexpr int OF_ROW = N / 8;
#pragma unroll 8
    for (int i = threadIdx.x; i < M * OF_ROW; i += THREADS) copy_async_16(shared_x + i / OF_ROW * XS + i % OF_ROW * 8, mine + i * 8, true);
#pragma unroll 4
    for (int i = threadIdx.x; i < N * NW / 2; i += THREADS) {
        const int k = i / (NW / 2), n = i % (NW / 2) * 2;
        copy_async<4>(shared_right + k * RS + n % RUN / 2 * 8 + n / RUN * 2, right + k * N + first_column + n);
    }
    commit_copies();
#pragma unroll 4
    for (int k = w; k < M; k += WARPS)
#pragma unroll
        for (int i = 0; i < M; i += 64)
            if (M % 64 == 0 || i + lane * 2 < M) copy_async<4>(shared_left + k * LS + i + lane * 2, left + k * M + i + lane * 2);
    commit_copies();
    wait_copies<1>();
    __syncthreads();

    // T^T = R^T x^T, [n][m], of this block's columns and this warp's 16 rows of x; in two sums, which take half as long.
    float sums[2][PAIRS][2][4] = {};
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        unsigned rows[4];
        load_matrices(rows, shared_x + (w * 16 + lane / 16 * 8 + lane % 8) * XS + k * 16 + lane / 8 % 2 * 8);
#pragma unroll
        for (int s = 0; s < PAIRS; ++s) {
            unsigned a[4];
            load_matrices_transposed(a, shared_right + (k * 16 + lane / 16 * 8 + lane % 8) * RS + s * 16 + lane / 8 % 2 * 8);
#pragma unroll
            for (int m = 0; m < 2; ++m) mma_16816<X>(sums[k % 2][s][m], a, rows[m * 2], rows[m * 2 + 1]);
        }
    }
#pragma unroll
    for (int s = 0; s < PAIRS; ++s)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            auto sum = [&](int e) { return sums[0][s][m][e] + sums[1][s][m][e]; };
            shared_t[(s * MP / 8 + w * 2 + m) * 32 + lane] = float4{sum(0), sum(1), sum(2), sum(3)};
        }
    wait_copies<0>();
    __syncthreads();

    float part[PAIRS][MP / 8][4];
#pragma unroll
    for (int s = 0; s < PAIRS; ++s)
#pragma unroll
        for (int m = 0; m < MP / 8; ++m) {
            const float4 four = shared_t[(s * MP / 8 + m) * 32 + lane];
            part[s][m][0] = four.x, part[s][m][1] = four.y, part[s][m][2] = four.z, part[s][m][3] = four.w;
        }
    unsigned a[STRIPS][4];
#pragma unroll
    for (int k = 0; k < STRIPS; ++k)
        load_matrices_transposed(a[k], shared_left + (k * 16 + lane / 16 * 8 + lane % 8) * LS + w * 16 + lane / 8 % 2 * 8);

    // Rounded: fragments of B as they are.
    unsigned b[TILES][STRIPS][2];
    float back = 1.0f;
    for (int attempt = 0;; ++attempt) {
        unsigned largest = 0;
#pragma unroll
        for (int j = 0; j < TILES; ++j)
#pragma unroll
            for (int m = 0; m < MP / 8; ++m) {
                b[j][m / 2][m % 2] = rounded_pair<X>(part[j / 2][m][j % 2 * 2], part[j / 2][m][j % 2 * 2 + 1]);
                if constexpr (same<X, half_t>) largest = larger_magnitude(largest, b[j][m / 2][m % 2]);
            }
        if constexpr (!same<X, half_t>) break;
        float factor;
        if (in_range(largest, attempt, back, factor)) break;
#pragma unroll
        for (int s = 0; s < PAIRS; ++s)
#pragma unroll
            for (int m = 0; m < MP / 8; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) part[s][m][e] *= factor;
    }
    float two[2][TILES][4] = {}, y[TILES][4];
#pragma unroll
    for (int k = 0; k < STRIPS; ++k)
#pragma unroll
        for (int j = 0; j < TILES; ++j) mma_16816<X>(two[k % 2][j], a[k], b[j][k][0], b[j][k][1]);

    // The row's largest magnitude, from every warp of the cluster to every block; a NaN stays one.
    float row_max = 0.0f;
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            y[j][e] = two[0][j][e] + two[1][j][e];
            row_max = max_or_nan(row_max, fabsf(y[j][e]));
        }
    row_max = warp_max(row_max) * back;
    cluster_wait();
    if (lane < CLUSTER) send(&maxima[rank * WARPS + w].x, row_max, row_max, row_max, row_max, all_there, lane);
    barrier_wait(all_there, 0);
    row_max = 0.0f;
#pragma unroll
    for (int i = 0; i < CLUSTER * WARPS; i += 32)
        if (i + lane < CLUSTER * WARPS) row_max = max_or_nan(row_max, maxima[i + lane].x);
    row_max = warp_max(row_max);
    if (!(row_max < __int_as_float(0x7f800000)))
#pragma unroll
        for (int j = 0; j < TILES; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) y[j][e] = 0.0f;

    const float ratio[4] = {static_cast<float>(clip0), static_cast<float>(clip1), static_cast<float>(clip2), static_cast<float>(clip3)};
#pragma unroll
    for (int c = 0; c < CLIPS; ++c) {
        const Quantiser<PACKED, CLAMP> row(row_max, back, ratio[c]);
        if (rank == 0 && threadIdx.x == 0) scales[c * tokens + token] = row.scale;
        unsigned char* const to = q + (c * tokens + token) * (PACKED ? F / 2 : F);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int m = w * 16 + half * 8 + g, at = m * N + first_column + t * RUN;
            if (M != MP && m >= M) continue;
            auto value = [&](int i) { return y[i / 2][half * 2 + i % 2]; };
            if constexpr (PACKED) {
                const unsigned word = row.nibbles<RUN>(value) ^ (OFFSET ? 0u : 0x88888888u);
                if constexpr (RUN == 8) *reinterpret_cast<unsigned*>(to + at / 2) = word;
                else *reinterpret_cast<unsigned short*>(to + at / 2) = word & 0xffffu;
            } else {
                Vector<unsigned, RUN / 4> words;
#pragma unroll
                for (int v = 0; v < RUN / 4; ++v) words.lane[v] = row.bytes([&](int e) { return value(v * 4 + e); });
                *reinterpret_cast<Vector<unsigned, RUN / 4>*>(to + at) = words;
            }
        }
    }
}
