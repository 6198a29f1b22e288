// FlatQuant on Hopper: what mma.cu computes, for many tokens: both products are wgmma's, and chained in registers.
//
// Computes      Y = L^T x R of each token's x as [M, N]; for each clip ratio c: scale = max(c * max|Y| / 7, 2^-126), or 1 where
//               all of Y is 0; q = clamp(round_half_even(Y / scale), -8, 7). A row with a NaN or an infinite Y: scale NaN, q 0.
//               Sums fp32. U = L^T x is rounded once to X; of fp16, when the largest of a warp's U is not in [2^-8, 65504],
//               after multiplication by 2^+-16 or 2^+-32 (a warp's rows have their own factor), so that nothing overflows. The
//               quotient is Y * (1 / scale)
// Tensors       x: X [tokens, M * N], rows row_stride elements apart; left: X [M, M]; right: X [N, N], contiguous; q: int8
//               [CLIPS, tokens, F], or PACKED uint32 [CLIPS, tokens, F / 8], F = M * N; scales: float [CLIPS, tokens]; all but
//               scales 16-byte aligned, rows of x too. clip0 .. clip3: the ratios, in (0, 1]
// Layout        packed: element i of a row in bits 4 (i % 8) of word i / 8, two's complement, or with OFFSET as q + 8. Of 128
//               columns (64, 32 and 16 of what is left of N) a thread has a quarter, neighbours, of rows g and g + 8 of its
//               warp's 16: the columns of R lie permuted in shared memory, so that packing needs no shuffle, and a warp
//               writes 8 whole rows
// Mapping       a token belongs to a group of TILES = ceil(M / 64) warpgroups, each with 64 rows and all columns. First
//               U = L^T x: its accumulators, rounded to X, are A of Y = U R as they are. Only the maximum is exchanged. GROUPS
//               groups a block; a group takes token after token, the grid apart, each at its own pace: while one multiplies,
//               others pack
// Shared memory R: [N / 64][N][64] X, swizzled; BUFFERS x a group: [N / 64][MK][64] X, swizzled, MK = M rounded up to 16, zero
//               from M on; L: [MK][64 TILES + 8] X; a float a warp. B is x and R as they are, columns being neighbours
// Constants     X: half_t, bf16_t; M: 1..128; N: 64, 80, 128, 224; GROUPS; BUFFERS: 1 (x is fetched when the first product is done) or 2
//               (one is filled while the other is used); PACKED, OFFSET: 0/1; CLIPS: 1..4; CLAMP: whether a ratio is below 1; BLOCKS:
//               of an SM; SHARED: bytes
// Roof          memory: (2 + 1/2 or 1) * tokens * F bytes; tensor cores 2 * tokens * 64 TILES * N * (MK + N) flops
// Source        own work; the formula: FlatQuant (Sun et al. 2024). Two products chained in registers: as FlashAttention-3 does
#include "copy.cuh"
#include "dependent.cuh"
#include "mma.cuh"
#include "quantise.cuh"
#include "reduce.cuh"
#include "vectors.cuh"
#include "wgmma.cuh"

static_assert(M >= 1 && M <= 128, "one or two warpgroups of 64 rows");
static_assert(N == 64 || N == 80 || N == 128 || N == 224, "columns for which wgmma_add_columns is there");
static_assert(CLIPS >= 1 && CLIPS <= 4, "one to four clip ratios");
static_assert(BUFFERS == 1 || BUFFERS == 2, "one x is used, and one may be filled");
constexpr int F = M * N, TILES = (M + 63) / 64, MK = (M + 15) / 16 * 16, ATOMS = (N + 63) / 64;
constexpr int GROUP_WARPS = 4 * TILES, GROUP_THREADS = 32 * GROUP_WARPS, THREADS = GROUPS * GROUP_THREADS;
static_assert(THREADS <= 1024 && GROUPS <= 15, "a block is at most 32 warps, and has 16 barriers");
constexpr int LS = 64 * TILES + 8;  // elements between rows of L: eight of them lie in different banks
constexpr int APART_X = MK * 128, APART_R = N * 128, X_BYTES = ATOMS * APART_X, R_BYTES = ATOMS * APART_R, L_BYTES = MK * LS * 2;
constexpr int BYTES = R_BYTES + GROUPS * BUFFERS * X_BYTES + L_BYTES + GROUPS * GROUP_WARPS * 4;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

// Columns are shared out among the threads in parts of 128, 64, 32 and 16, as N has them in binary: words and stores stay aligned.
static_assert(N < 256 && N % 16 == 0, "parts of different widths, the widest first");
// The width of the part that `column` is in.
__device__ __forceinline__ int width_at(int column) {
    int width = 128;
    while (!(N & width) || column >= N / width * width) width /= 2;
    return width;
}

// Where element (k, n) of a swizzled operand lies whose rows are `apart` / 128 a tile of 64 columns, in bytes.
__device__ __forceinline__ int place_of(int k, int n, int apart) {
    return n / 64 * apart + k * 128 + (n % 64 / 8 ^ k % 8) * 16 + n % 8 * 2;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wgmma_kernel(const X* __restrict__ x, const X* __restrict__ left, const X* __restrict__ right, unsigned char* __restrict__ q,
             float* __restrict__ scales, long long tokens, long long row_stride, double clip0, double clip1, double clip2,
             double clip3) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = uniform(threadIdx.x / 32), group = warp / GROUP_WARPS, w = warp % GROUP_WARPS;
    unsigned char* const room = shared + R_BYTES + group * BUFFERS * X_BYTES;
    X* const shared_left = reinterpret_cast<X*>(shared + R_BYTES + GROUPS * BUFFERS * X_BYTES);
    float* const largest_of = reinterpret_cast<float*>(shared_left + MK * LS) + group * GROUP_WARPS;
    const int of_group = w * 32 + lane;
    // Neighbouring tokens are in different blocks, so that few of them are on as many multiprocessors as can be.
    const int first = blockIdx.x + gridDim.x * group, step = gridDim.x * GROUPS, count = static_cast<int>(tokens);

    auto sync_group = [&] { sync_part(1 + group, GROUP_THREADS); };
    auto fetch = [&](int token, int buffer) {
        if (token >= count) return;
        constexpr int OF_ROW = N / 8, PIECES = M * OF_ROW, EACH = (PIECES + GROUP_THREADS - 1) / GROUP_THREADS;
        constexpr bool STRAIGHT = GROUP_THREADS % (8 * OF_ROW) == 0;  // the next piece of a thread is whole eights of rows below
        const X* from = x + token * row_stride + of_group * 8;
        unsigned char* const to = room + buffer * X_BYTES;
        unsigned place = place_of(of_group / OF_ROW, of_group % OF_ROW * 8, APART_X);
        pin(from), pin(place);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int c = i * GROUP_THREADS + of_group;
            if (PIECES % GROUP_THREADS == 0 || c < PIECES)
                copy_async_16(to + (STRAIGHT ? place + i * GROUP_THREADS / OF_ROW * 128 : place_of(c / OF_ROW, c % OF_ROW * 8, APART_X)),
                              from + i * GROUP_THREADS * 8, true);
        }
        commit_copies();
    };

    // Padding is zero, and stays so. The transforms and the first tokens come into L2 while the previous kernel still runs.
    for (int i = threadIdx.x * 16; i < L_BYTES; i += THREADS * 16) *reinterpret_cast<uint4*>(shared_left + i / 2) = uint4{0, 0, 0, 0};
    if constexpr (MK != M)
        for (int i = threadIdx.x * 16; i < GROUPS * BUFFERS * X_BYTES; i += THREADS * 16)
            *reinterpret_cast<uint4*>(shared + R_BYTES + i) = uint4{0, 0, 0, 0};
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
        if (N % 64 != 0 && n >= N) continue;
        const int width = width_at(n), r = n % width, run = width / 4;  // parts begin at multiples of their width
        const int column = n - r + r % run / 2 * 8 + r / run * 2;
#pragma unroll 4
        for (int k = warp; k < N; k += WARPS) copy_async<4>(shared + place_of(k, column, APART_R), right + k * N + n);
    }
    if constexpr (M % 2 == 0) {
#pragma unroll
        for (int i = 0; i < M; i += 64) {
            const int m = i + lane * 2;
            if (M % 64 != 0 && m >= M) continue;
#pragma unroll 4
            for (int k = warp; k < M; k += WARPS) copy_async<4>(shared_left + k * LS + m, left + k * M + m);
        }
    } else {
        for (int i = threadIdx.x; i < M * M; i += THREADS) shared_left[i / M * LS + i % M] = left[i];
    }
    commit_copies();
    wait_copies<0>();
    fence_async();
    __syncthreads();

    const unsigned of_x = wgmma_columns(room, APART_X), of_r = wgmma_columns(shared, APART_R);
    const X* const of_left = shared_left + (lane / 16 * 8 + lane % 8) * LS + w * 16 + lane / 8 % 2 * 8;
    const float ratio[4] = {static_cast<float>(clip0), static_cast<float>(clip1), static_cast<float>(clip2), static_cast<float>(clip3)};
    const bool padding = w * 16 >= M;  // this warp has none of the rows
    int buffer = 0;
    for (int token = first; token < count; token += step) {
        wait_copies<0>();
        fence_async();
        sync_group();  // this token is there, and the group has done with the one before
        const int here = buffer * (X_BYTES / 16);
        if constexpr (BUFFERS == 2) fetch(token + step, buffer ^= 1);

        // U = L^T x, of this warp's rows.
        float d[N / 2], back = 1.0f;
        {
            unsigned a[MK / 16][4];
#pragma unroll
            for (int k = 0; k < MK / 16; ++k) load_matrices_transposed(a[k], of_left + k * 16 * LS);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < MK / 16; ++k) wgmma_add_columns<X>(d, a[k], of_x + here + k * 128, k > 0);
            wgmma_commit();
            wgmma_wait<0>();
            arrived(d);
        }
        if constexpr (BUFFERS == 1) {
            sync_group();  // all have multiplied this one
            fetch(token + step, 0);
        }

        // Rounded, and Y = U R.
        unsigned u[N / 16][4];
        for (int attempt = 0;; ++attempt) {
            unsigned largest = 0;
#pragma unroll
            for (int i = 0; i < N / 4; ++i) {
                u[i / 4][i % 4] = rounded_pair<X>(d[2 * i], d[2 * i + 1]);
                if constexpr (same<X, half_t>) largest = larger_magnitude(largest, u[i / 4][i % 4]);
            }
            if constexpr (!same<X, half_t>) break;
            float factor;
            if (in_range(largest, attempt, back, factor)) break;
#pragma unroll
            for (int i = 0; i < N / 2; ++i) d[i] *= factor;
        }
#pragma unroll
        for (int i = 0; i < N / 4; ++i) pin(u[i / 4][i % 4]);  // none is rounded later, from a copy of what Y takes the place of
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < N / 16; ++k) wgmma_add_columns<X>(d, u[k], of_r + k * 128, k > 0);
        wgmma_commit();
        wgmma_wait<0>();
        arrived(d);

        // The row's largest magnitude; a NaN stays one.
        float row_max = 0.0f;
        if (!padding) {
            float most[4] = {};
#pragma unroll
            for (int i = 0; i < N / 2; ++i) most[i % 4] = max_or_nan(most[i % 4], fabsf(d[i]));
            row_max = warp_max(max_or_nan(max_or_nan(most[0], most[1]), max_or_nan(most[2], most[3]))) * back;
        }
        if (lane == 0) largest_of[w] = row_max;
        sync_group();
        row_max = 0.0f;
#pragma unroll
        for (int i = 0; i < GROUP_WARPS; ++i) row_max = max_or_nan(row_max, largest_of[i]);
        if (padding) continue;
        if (!(row_max < __int_as_float(0x7f800000)))
#pragma unroll
            for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;

#pragma unroll 1
        for (int c = 0; c < CLIPS; ++c) {
            float clip = ratio[0];
            if constexpr (CLIPS > 1) clip = c == 0 ? ratio[0] : c == 1 ? ratio[1] : c == 2 ? ratio[2] : ratio[3];
            const Quantiser<PACKED, CLAMP> row(row_max, back, clip);
            if (of_group == 0) scales[c * tokens + token] = row.scale;
            unsigned char* const to = q + (c * tokens + token) * (PACKED ? F / 2 : F);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int m = w * 16 + half * 8 + g;
                if (M % 16 != 0 && m >= M) continue;
#pragma unroll
                for (int width = 128; width >= 16; width /= 2) {
                    if (!(N & width)) continue;
                    const int begin = N / width * width - width, run = width / 4;
                    auto value = [&](int i) { return d[begin / 2 + i / 2 * 4 + half * 2 + i % 2]; };
                    const int at = m * N + begin + t * run;
                    if constexpr (PACKED) {
                        constexpr unsigned SIGN = OFFSET ? 0u : 0x88888888u;
                        unsigned word[4];
#pragma unroll
                        for (int v = 0; v < 4; ++v)
                            if (v * 8 < run) word[v] = row.nibbles<8>([&](int i) { return value(v * 8 + i); }) ^ SIGN;
                        if (run == 32) *reinterpret_cast<uint4*>(to + at / 2) = uint4{word[0], word[1], word[2], word[3]};
                        else if (run == 16) *reinterpret_cast<Vector<unsigned, 2>*>(to + at / 2) = {word[0], word[1]};
                        else if (run == 8) *reinterpret_cast<unsigned*>(to + at / 2) = word[0];
                        else *reinterpret_cast<unsigned short*>(to + at / 2) = (row.nibbles<4>(value) ^ SIGN) & 0xffffu;
                    } else {
#pragma unroll
                        for (int v = 0; v < run; v += 16) {
                            unsigned word[4];
#pragma unroll
                            for (int i = 0; i < 4; ++i)
                                if (v + i * 4 < run) word[i] = row.bytes([&](int e) { return value(v + i * 4 + e); });
                            if (run >= 16) *reinterpret_cast<uint4*>(to + at + v) = uint4{word[0], word[1], word[2], word[3]};
                            else if (run == 8) *reinterpret_cast<Vector<unsigned, 2>*>(to + at) = {word[0], word[1]};
                            else *reinterpret_cast<unsigned*>(to + at) = word[0];
                        }
                    }
                }
            }
        }
    }
}
