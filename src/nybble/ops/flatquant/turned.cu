// FlatQuant on Hopper, turned: what wgmma.cu computes, with the columns of Y in the tensor cores' rows. For an M that is far
// from a multiple of 64, which is then a width of products instead of their height.
//
// Computes      Y^T = (x R)^T L of each token's x as [M, N]; for each clip ratio c: scale = max(c * max|Y| / 7, 2^-126), or 1
//               where all of Y is 0; q = clamp(round_half_even(Y / scale), -8, 7). A row with a NaN or an infinite Y: scale NaN,
//               q 0. Sums fp32. T = x R is rounded once to X; of fp16, when the largest of a warp's T is not in [2^-8, 65504],
//               after multiplication by 2^+-16 or 2^+-32 (a warp's columns have their own factor), so that nothing overflows.
//               The quotient is Y * (1 / scale)
// Tensors       x: X [tokens, M * N], rows row_stride elements apart; left: X [M, M]; right: X [N, N], contiguous; q: int8
//               [CLIPS, tokens, F], or PACKED uint32 [CLIPS, tokens, F / 8], F = M * N; scales: float [CLIPS, tokens]; all but
//               scales 16-byte aligned, rows of x too. clip0 .. clip3: the ratios, in (0, 1]
// Layout        packed: element i of a row in bits 4 (i % 8) of word i / 8, two's complement, or with OFFSET as q + 8. The columns
//               of R lie permuted in shared memory, so that a thread's rows g and g + 8 of Y^T are neighbours 2 g and 2 g + 1 of
//               Y: a byte, or two. They meet in shared memory and leave as whole rows
// Mapping       a token belongs to a group of N / 64 warpgroups, each with 64 columns of Y and all its rows. First T^T = R^T x^T: its
//               accumulators, rounded to X, are A of Y^T = T^T L as they are. Only the maximum is exchanged, and the results.
//               GROUPS groups a block; a group takes token after token, the grid apart, each at its own pace
// Shared memory x of a group, BUFFERS times: [N / 64][MC][64] X, swizzled, zero from M on; L: [MC / 64][MK][64] X, swizzled, zero from M
//               on; R: [N][N + 8] X; of a group: results [MC][N / 2 + 8 bytes, or N + 16], a float a warp. MK is M rounded up to
//               16, and MC to what wgmma is there for
// Constants     X: half_t, bf16_t; MC: 64, 88, 112, 128; M: to MC; N: 64, 128; GROUPS; BUFFERS: 1 (x is fetched when the first product is
//               done) or 2 (one is filled while the other is used); PACKED, OFFSET: 0/1; CLIPS: 1..4; CLAMP: whether a ratio is
//               below 1; BLOCKS: of an SM; SHARED: bytes
// Roof          memory: (2 + 1/2 or 1) * tokens * F bytes; tensor cores 2 * tokens * N * MC * (N + MK) flops
// Source        own work; the formula: FlatQuant (Sun et al. 2024). Two products chained in registers: as FlashAttention-3 does
#include "copy.cuh"
#include "dependent.cuh"
#include "mma.cuh"
#include "quantise.cuh"
#include "reduce.cuh"
#include "vectors.cuh"
#include "wgmma.cuh"

static_assert(M >= 1 && M <= MC, "all rows of Y are in one product");
static_assert(MC == 64 || MC == 88 || MC == 112 || MC == 128, "columns for which wgmma_add and wgmma_add_columns are there");
static_assert(N == 64 || N == 128, "one or two warpgroups of 64 columns");
static_assert(CLIPS >= 1 && CLIPS <= 4, "one to four clip ratios");
static_assert(BUFFERS == 1 || BUFFERS == 2, "one x is used, and one may be filled");
constexpr int F = M * N, TILES = N / 64, MK = (M + 15) / 16 * 16;
constexpr int GROUP_WARPS = 4 * TILES, GROUP_THREADS = 32 * GROUP_WARPS, THREADS = GROUPS * GROUP_THREADS;
static_assert(THREADS <= 1024 && GROUPS <= 15, "a block is at most 32 warps, and has 16 barriers");
constexpr int RS = N + 8, PITCH = PACKED ? N / 2 + 8 : N + 16;  // elements, bytes between rows: eight of them in different banks
constexpr int APART_X = MC * 128, APART_L = MK * 128, X_BYTES = TILES * APART_X, L_BYTES = (MC + 63) / 64 * APART_L;
constexpr int R_BYTES = N * RS * 2, RESULTS = MC * PITCH;
constexpr int BYTES = GROUPS * BUFFERS * X_BYTES + L_BYTES + R_BYTES + GROUPS * (RESULTS + GROUP_WARPS * 4);
static_assert(X_BYTES % 1024 == 0, "swizzled tiles begin at multiples of 1024 bytes");
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

// Where element (row, column) of a swizzled tile lies, tiles of 64 columns being `apart` bytes from each other.
__device__ __forceinline__ int place_of(int row, int column, int apart) {
    return column / 64 * apart + row * 128 + (column % 64 / 8 ^ row % 8) * 16 + column % 8 * 2;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
turned_kernel(const X* __restrict__ x, const X* __restrict__ left, const X* __restrict__ right, unsigned char* __restrict__ q,
              float* __restrict__ scales, long long tokens, long long row_stride, double clip0, double clip1, double clip2,
              double clip3) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = uniform(threadIdx.x / 32), group = warp / GROUP_WARPS, w = warp % GROUP_WARPS;
    unsigned char* const room = shared + group * BUFFERS * X_BYTES;
    unsigned char* const shared_left = shared + GROUPS * BUFFERS * X_BYTES;
    X* const shared_right = reinterpret_cast<X*>(shared_left + L_BYTES);
    unsigned char* const results = shared_left + L_BYTES + R_BYTES + group * RESULTS;
    float* const largest_of = reinterpret_cast<float*>(shared_left + L_BYTES + R_BYTES + GROUPS * RESULTS) + group * GROUP_WARPS;
    const int of_group = w * 32 + lane;
    // Neighbouring tokens are in different blocks, so that few of them are on as many multiprocessors as can be.
    const int first = blockIdx.x + gridDim.x * group, step = gridDim.x * GROUPS, count = static_cast<int>(tokens);

    auto sync_group = [&] { sync_part(1 + group, GROUP_THREADS); };
    auto fetch = [&](int token, int buffer) {
        if (token >= count) return;
        constexpr int OF_ROW = N / 8, PIECES = M * OF_ROW, EACH = (PIECES + GROUP_THREADS - 1) / GROUP_THREADS;
        static_assert(GROUP_THREADS % (8 * OF_ROW) == 0, "the next piece of a thread is whole eights of rows below");
        const X* from = x + token * row_stride + of_group * 8;
        unsigned char* const to = room + buffer * X_BYTES;
        unsigned place = place_of(of_group / OF_ROW, of_group % OF_ROW * 8, APART_X);
        pin(from), pin(place);
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (PIECES % GROUP_THREADS == 0 || i * GROUP_THREADS + of_group < PIECES)
                copy_async_16(to + place + i * GROUP_THREADS / OF_ROW * 128, from + i * GROUP_THREADS * 8, true);
        commit_copies();
    };

    // Padding is zero, and stays so. The transforms and the first tokens come into L2 while the previous kernel still runs.
    for (int i = threadIdx.x * 16; i < GROUPS * BUFFERS * X_BYTES + L_BYTES; i += THREADS * 16)
        *reinterpret_cast<uint4*>(shared + i) = uint4{0, 0, 0, 0};
    for (int i = threadIdx.x * 128; i < N * N * 2; i += THREADS * 128) prefetch_l2(reinterpret_cast<const unsigned char*>(right) + i);
    for (int i = threadIdx.x * 128; i < M * M * 2; i += THREADS * 128) prefetch_l2(reinterpret_cast<const unsigned char*>(left) + i);
    if (first < count)
        for (int i = of_group * 128; i < F * 2; i += GROUP_THREADS * 128)
            prefetch_l2(reinterpret_cast<const unsigned char*>(x + first * row_stride) + i);
    __syncthreads();
    wait_for_previous();
    allow_next();
    fetch(first, 0);
    // A warp brings row after row, a lane of it the same columns of each.
    constexpr int WARPS = THREADS / 32;
#pragma unroll
    for (int i = 0; i < N; i += 64) {
        const int n = i + lane * 2;
#pragma unroll 8
        for (int k = warp; k < N; k += WARPS) {
            const Vector<X, 2> two = *reinterpret_cast<const Vector<X, 2>*>(right + k * N + n);
            X* const to = shared_right + k * RS + n / 16 * 16 + n % 16 / 2;
            to[0] = two.lane[0], to[8] = two.lane[1];
        }
    }
    if constexpr (M % 2 == 0) {
#pragma unroll
        for (int i = 0; i < M; i += 64) {
            const int m = i + lane * 2;
            if (M % 64 != 0 && m >= M) continue;
#pragma unroll 4
            for (int k = warp; k < M; k += WARPS) copy_async<4>(shared_left + place_of(k, m, APART_L), left + k * M + m);
        }
        commit_copies();
    } else {
        for (int i = threadIdx.x; i < M * M; i += THREADS) *reinterpret_cast<X*>(shared_left + place_of(i / M, i % M, APART_L)) = left[i];
    }
    wait_copies<0>();
    fence_async();
    __syncthreads();

    const unsigned of_x = wgmma_rows(room), of_l = wgmma_columns(shared_left, APART_L);
    const X* const of_right = shared_right + (lane / 16 * 8 + lane % 8) * RS + w * 16 + lane / 8 % 2 * 8;
    const float ratio[4] = {static_cast<float>(clip0), static_cast<float>(clip1), static_cast<float>(clip2), static_cast<float>(clip3)};
    int buffer = 0;
    for (int token = first; token < count; token += step) {
        wait_copies<0>();
        fence_async();
        sync_group();  // this token is there, and the group has done with the one before
        const int here = buffer * (X_BYTES / 16);
        if constexpr (BUFFERS == 2) fetch(token + step, buffer ^= 1);

        // T^T = R^T x^T, of this warp's columns of T.
        float d[MC / 2], back = 1.0f;
        {
            unsigned a[N / 16][4];
#pragma unroll
            for (int k = 0; k < N / 16; ++k) load_matrices_transposed(a[k], of_right + k * 16 * RS);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < N / 16; ++k) wgmma_add<X>(d, a[k], of_x + here + k / 4 * (APART_X / 16) + k % 4 * 2, k > 0);
            wgmma_commit();
            wgmma_wait<0>();
            arrived(d);
        }
        if constexpr (BUFFERS == 1) {
            sync_group();  // all have multiplied this one
            fetch(token + step, 0);
        }

        // Rounded, and Y^T = T^T L.
        unsigned u[MK / 16][4];
        for (int attempt = 0;; ++attempt) {
            unsigned largest = 0;
#pragma unroll
            for (int i = 0; i < MK / 4; ++i) {
                u[i / 4][i % 4] = 2 * i < MC / 2 ? rounded_pair<X>(d[2 * i], d[2 * i + 1]) : 0u;
                if constexpr (same<X, half_t>) largest = larger_magnitude(largest, u[i / 4][i % 4]);
            }
            if constexpr (!same<X, half_t>) break;
            float factor;
            if (in_range(largest, attempt, back, factor)) break;
#pragma unroll
            for (int i = 0; i < MC / 2; ++i) d[i] *= factor;
        }
#pragma unroll
        for (int i = 0; i < MK / 4; ++i) pin(u[i / 4][i % 4]);  // none is rounded later, from a copy of what Y takes the place of
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < MK / 16; ++k) wgmma_add_columns<X>(d, u[k], of_l + k * 128, k > 0);
        wgmma_commit();
        wgmma_wait<0>();
        arrived(d);

        // The row's largest magnitude; a NaN stays one.
        float most[4] = {};
#pragma unroll
        for (int i = 0; i < MC / 2; ++i) most[i % 4] = max_or_nan(most[i % 4], fabsf(d[i]));
        float row_max = warp_max(max_or_nan(max_or_nan(most[0], most[1]), max_or_nan(most[2], most[3]))) * back;
        if (lane == 0) largest_of[w] = row_max;
        sync_group();
        row_max = 0.0f;
#pragma unroll
        for (int i = 0; i < GROUP_WARPS; ++i) row_max = max_or_nan(row_max, largest_of[i]);
        if (!(row_max < __int_as_float(0x7f800000)))
#pragma unroll
            for (int i = 0; i < MC / 2; ++i) d[i] = 0.0f;

#pragma unroll 1
        for (int c = 0; c < CLIPS; ++c) {
            float clip = ratio[0];
            if constexpr (CLIPS > 1) clip = c == 0 ? ratio[0] : c == 1 ? ratio[1] : c == 2 ? ratio[2] : ratio[3];
            const Quantiser<PACKED, CLAMP> row(row_max, back, clip);
            if (of_group == 0) scales[c * tokens + token] = row.scale;
            constexpr int VALUE = PACKED ? 1 : 2;  // bytes of two values
            unsigned char* const mine = results + 2 * t * PITCH + (w * 8 + g) * VALUE;
#pragma unroll
            for (int i = 0; i < MC / 4; ++i) {
                const int at = i / 2 * 4 + i % 2;  // of row 8 (i / 2) + 2 t + i % 2 of Y
                unsigned char* const to = mine + (i / 2 * 8 + i % 2) * PITCH;
                if constexpr (PACKED) *to = (row.nibbles<2>([&](int e) { return d[at + 2 * e]; }) ^ (OFFSET ? 0u : 0x88u)) & 0xffu;
                else *reinterpret_cast<unsigned short*>(to) = __byte_perm(row.bits(d[at]), row.bits(d[at + 2]), 0x0040) & 0xffffu;
            }
            sync_group();
            unsigned char* const out = q + (c * tokens + token) * (PACKED ? F / 2 : F);
            constexpr int OF_ROW = N * VALUE / 16;  // eight bytes at a time
#pragma unroll 4
            for (int i = of_group; i < M * OF_ROW; i += GROUP_THREADS)
                *reinterpret_cast<Vector<unsigned, 2>*>(out + i * 8) =
                    *reinterpret_cast<const Vector<unsigned, 2>*>(results + i / OF_ROW * PITCH + i % OF_ROW * 8);
            if constexpr (CLIPS > 1) sync_group();
        }
    }
}
