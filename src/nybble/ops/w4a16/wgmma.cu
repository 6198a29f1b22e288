// wgmma: the 4-bit linear as weights times activations, the weights being the tensor cores' register operand.
//
// Computes      as stream.cu
// Tensors       as stream.cu
// Mapping       grid x: workers of CLUSTER blocks; a worker takes every (gridDim.x / CLUSTER)-th tile of BLOCK_N = 64 * TEAMS
//               output features; its blocks split K. A block has TEAMS warpgroups; each owns 64 output features. grid y: TILE_M rows
#include "barrier.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "int4.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "vectors.cuh"
#include "wgmma.cuh"

constexpr int K64 = (K + 63) / 64, N64 = (N + 63) / 64;
constexpr int GROUPS = GROUP >= K ? 1 : (K64 * 64 + GROUP - 1) / GROUP;
// A unit is 128 input features: eight steps of the tensor cores, and the scales of PARTS groups.
constexpr int PARTS = GROUP >= 128 || GROUP >= K ? 1 : 128 / GROUP, STEPS = 8 / PARTS;
constexpr int TOGETHER = PARTS * TILE_M / 2 <= 32 ? PARTS : (64 / TILE_M > 1 ? 64 / TILE_M : 1);  // parts summed at once
constexpr int THREADS = 128 * TEAMS * SLICES;
constexpr int BLOCK_N = 64 * TEAMS, BLOCK_OUT = ACT == 3 ? BLOCK_N / 2 : BLOCK_N;
constexpr int N_OUT = ACT == 3 ? N / 2 : N;
constexpr int TILES = (N_OUT + BLOCK_OUT - 1) / BLOCK_OUT;
constexpr int UNITS = (K64 + 2 * CLUSTER - 1) / (2 * CLUSTER);  // of a block
constexpr int RANGE = 2 * UNITS;                                // chunks of 64 features of a block
// Sums are exchanged SUM_ROWS rows at a time, in blocks of 8; of the tile's strips of 16 features every block of the
// cluster adds up and stores OWNED.
constexpr int PASSES = TILE_M / SUM_ROWS, PASS_BLOCKS = SUM_ROWS / 8;
constexpr int OWNED = 4 * TEAMS / CLUSTER, SOURCES = CLUSTER * SLICES;
static_assert(OWNED * CLUSTER == 4 * TEAMS && (ACT != 3 || OWNED % 2 == 0), "a block owns whole strips, with silu_mul pairs");

constexpr int X_BYTES = RANGE * TILE_M * 128;
constexpr int STAGE_SCALES = 2 * THREADS * 16, STAGE_ZEROS = STAGE_SCALES + PARTS * THREADS * 2 * sizeof(S);
constexpr int STAGE = STAGE_ZEROS + (ZEROS ? PARTS * THREADS * 4 : 0);  // bytes of a unit in the ring
constexpr int SUMS = SOURCES * OWNED * PASS_BLOCKS * 128;               // floats
constexpr int STATISTICS_BYTES = NORM ? CLUSTER * TILE_M * 16 : 0;
constexpr int BYTES = X_BYTES + AHEAD * STAGE + BUFFERS * SUMS * 4 + STATISTICS_BYTES + (2 * BUFFERS + 1) * 8;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

struct Scales {
    unsigned word[sizeof(S) / 2];
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wgmma_kernel(const X* __restrict__ x, const uint4* __restrict__ qweight, const S* __restrict__ scales,
              const unsigned char* __restrict__ qzeros, const int* __restrict__ perm, const X* __restrict__ bias,
              const X* __restrict__ residual, const X* __restrict__ norm_weight, const X* __restrict__ norm_bias,
              X* __restrict__ y, long long rows, double eps) {
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char* const tile = shared;
    unsigned char* const ring = shared + X_BYTES;
    float* const all_sums = reinterpret_cast<float*>(ring + AHEAD * STAGE);
    float* const statistics = all_sums + BUFFERS * SUMS;
    Barrier* const full = reinterpret_cast<Barrier*>(statistics + STATISTICS_BYTES / 4);
    Barrier* const empty = full + BUFFERS;
    Barrier* const measured = empty + BUFFERS;

    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), row8 = lane / 4;
    const int warp_n = warp % (4 * TEAMS), slice = warp / (4 * TEAMS);
    const int rank = cluster_rank();
    const int worker = blockIdx.x / CLUSTER, workers = gridDim.x / CLUSTER;
    const long long first_row = static_cast<long long>(blockIdx.y) * TILE_M;
    const int begin = rank * RANGE, end = min(begin + RANGE, K64);
    const int rows_here = static_cast<int>(min(static_cast<long long>(TILE_M), rows - first_row));
    const int units = max((end - begin + 1) / 2, 0), mine = (units - slice + SLICES - 1) / SLICES;

    if (threadIdx.x == 0) {
#pragma unroll
        for (int b = 0; b < BUFFERS; ++b) barrier_init(full + b, 1), barrier_init(empty + b, CLUSTER * THREADS / 32);
        barrier_init(measured, 1);
        if (NORM) barrier_expect(measured, CLUSTER * rows_here * 16);
        barrier_init_done();
    }

    // Phase 1: the weights on their way, AHEAD units of them. Every lane copies what it will read itself, so the ring needs
    // no barrier.
    int asked_tile = worker, asked_unit = 0, asked_at = 0;
    const uint4* words;
    const S* tile_scales;
    const unsigned char* tile_zeros;
    auto turn_to = [&](int n_tile) {
        int strip;
        if constexpr (ACT == 3) strip = n_tile * TEAMS * 2 + warp_n / 2 + (warp_n % 2 == 0 ? 0 : N / 32);
        else strip = n_tile * TEAMS * 4 + warp_n;
        strip = min(strip, N64 * 4 - 1);
        const long long block = strip / 4;
        words = qweight + (block * K64 * 4 + (begin + slice * 2) * 4 + strip % 4) * 32 + lane;
        tile_scales = scales + block * GROUPS * 64 + strip % 4 * 16 + row8 * 2;
        tile_zeros = qzeros + block * GROUPS * 32 + strip % 4 * 8 + (row8 & 4);
    };
    unsigned char* const my_ring = ring + threadIdx.x * 16;
    unsigned char* const my_scales = ring + STAGE_SCALES + threadIdx.x * 2 * sizeof(S);
    unsigned char* const my_zeros = ring + STAGE_ZEROS + threadIdx.x * 4;
    turn_to(worker);
    auto ask = [&] {
        if (asked_tile < TILES && mine > 0) {
            const int chunk = begin + (asked_unit * SLICES + slice) * 2;
            unsigned char* const to = my_ring + asked_at;
            copy_async_16(to, words, true);
            copy_async_16(to + THREADS * 16, words + 128, K64 % 2 == 0 || chunk + 1 < K64);
            words += 256 * SLICES;
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                const int group = GROUP >= K ? 0 : (chunk * 64 + i * STEPS * 16) / GROUP;
                const bool valid = K64 % 2 == 0 || GROUP >= 128 || group < GROUPS;
                copy_async<2 * sizeof(S)>(my_scales + asked_at + i * THREADS * 2 * sizeof(S), tile_scales + group * 64, valid);
                if constexpr (ZEROS) copy_async<4>(my_zeros + asked_at + i * THREADS * 4, tile_zeros + group * 32, valid);
            }
            if (++asked_unit == mine) {
                asked_unit = 0;
                asked_tile += workers;
                if (asked_tile < TILES) turn_to(asked_tile);
            }
        }
        commit_copies();
        asked_at = asked_at == (AHEAD - 1) * STAGE ? 0 : asked_at + STAGE;
    };
#pragma unroll 1
    for (int d = 0; d < AHEAD; ++d) ask();
    for (int i = threadIdx.x; i < TILE_M * RANGE; i += THREADS) {
        const int row = i / RANGE, chunk = begin + i % RANGE;
        if (first_row + row < rows && chunk < end) prefetch_l2(x + (first_row + row) * K + chunk * 64);
    }
    __syncthreads();
    cluster_arrive();  // this block's barriers are there
    wait_for_previous();
    allow_next();

    // Phase 2: the block's range of x to shared memory, swizzled as the tensor cores read it.
    auto piece_at = [&](int row, int column) {  // of eight features
        return reinterpret_cast<X*>(tile + (column / 64 * TILE_M + row) * 128 + ((column / 8 % 8) ^ (row % 8)) * 16);
    };
    for (int piece = threadIdx.x; piece < TILE_M * RANGE * 8; piece += THREADS) {
        const int row = piece / (RANGE * 8), column = piece % (RANGE * 8) * 8;
        const int k = begin * 64 + column;
        const bool valid = first_row + row < rows && k < K;
        X* target = piece_at(row, column);
        Vector<X, 8> gathered;
        int from[8] = {};
        if (PERM && valid) {
            // Act-order: the packed weights are sorted by group, so x is gathered instead. 2-byte loads, from L2.
            *reinterpret_cast<int4*>(from) = *reinterpret_cast<const int4*>(perm + k);
            *reinterpret_cast<int4*>(from + 4) = *reinterpret_cast<const int4*>(perm + k + 4);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) gathered.lane[e] = from_float<X>(0.0f);
        if (valid) {
            if constexpr (PERM) {
#pragma unroll
                for (int e = 0; e < 8; ++e) gathered.lane[e] = x[(first_row + row) * K + from[e]];
            } else {
                gathered = *reinterpret_cast<const Vector<X, 8>*>(x + (first_row + row) * K + k);
            }
        }
        *reinterpret_cast<Vector<X, 8>*>(target) = gathered;
    }
    if constexpr (NORM == 0) fence_async();
    __syncthreads();
    cluster_wait();

    // Phase 3: the norm of the rows, in place. A block has a part of each row, the cluster the whole of it.
    if constexpr (NORM > 0) {
        const int width = max(min(end * 64, K) - begin * 64, 0);  // columns of this block
        for (int row = warp; row < rows_here; row += THREADS / 32) {
            float mean = 0.0f, first = 0.0f, second = 0.0f;
            if constexpr (NORM == 1) {
                for (int k = lane * 8; k < width; k += 256) {
                    float value[8];
                    load_vector(piece_at(row, k), value);
#pragma unroll
                    for (int e = 0; e < 8; ++e) mean += value[e];
                }
                mean = width > 0 ? warp_sum(mean) / width : 0.0f;
            }
            for (int k = lane * 8; k < width; k += 256) {
                float value[8];
                load_vector(piece_at(row, k), value);
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const float deviation = value[e] - mean;
                    first += deviation;
                    second += deviation * deviation;
                }
            }
            first = warp_sum(first);
            second = warp_sum(second);
            if (lane < CLUSTER) send(statistics + (rank * TILE_M + row) * 4, mean, first, second, 0.0f, measured, lane);
        }
        barrier_wait(measured, 0);
        for (int row = warp; row < rows_here; row += THREADS / 32) {
            auto of_rank = [&](int which, int r) { return statistics[(r * TILE_M + row) * 4 + which]; };
            const float centre = of_rank(0, 0);
            float first = 0.0f, second = 0.0f;
#pragma unroll
            for (int r = 0; r < CLUSTER; ++r) {
                const int count = max(min(min((r + 1) * RANGE, K64) * 64, K) - r * RANGE * 64, 0);
                const float apart = NORM == 1 ? of_rank(0, r) - centre : 0.0f, sum1 = of_rank(1, r);
                first += sum1 + count * apart;
                second += of_rank(2, r) + apart * (2.0f * sum1 + count * apart);
            }
            const float off = NORM == 1 ? first / K : 0.0f;
            float variance = fmaxf(second / K - off * off, 0.0f);
            if (isnan(second)) variance = second;
            const float scale = rsqrtf(variance + static_cast<float>(eps));
            for (int k = lane * 8; k < width; k += 256) {
                float value[8];
                load_vector(piece_at(row, k), value);
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const int feature = PERM ? perm[begin * 64 + k + e] : begin * 64 + k + e;
                    float h = ((value[e] - centre) - off) * scale * to_float(norm_weight[feature]);
                    if constexpr (NORM_BIAS) h += to_float(norm_bias[feature]);
                    value[e] = h;
                }
                store_vector(piece_at(row, k), value);
            }
        }
        fence_async();
        __syncthreads();
    }

    // Phase 6: a step's sums, SUM_ROWS rows of a tile, are all there: add them up in order, so that the result never
    // depends on timing, and store. Four features a thread.
    const int passes = PASSES == 1 ? 1 : (rows_here + SUM_ROWS - 1) / SUM_ROWS;
    const int steps = (TILES - worker + workers - 1) / workers * passes;  // of this worker; it has at least one tile
    auto blocks_of = [&](int pass) { return min((rows_here + 7) / 8 - pass * PASS_BLOCKS, PASS_BLOCKS); };
    auto expect = [&](int step) {
        if (threadIdx.x == 0 && step < steps) barrier_expect(full + step % BUFFERS, SOURCES * OWNED * 512 * blocks_of(step % passes));
    };
    auto finish = [&](int step, int n_tile) {
        const int pass = step % passes, blocks = blocks_of(pass);
        const float* const sums = all_sums + step % BUFFERS * SUMS;
        barrier_wait(full + step % BUFFERS, step / BUFFERS % 2);
        expect(step + BUFFERS);
        constexpr int STRIPS_OUT = ACT == 3 ? OWNED / 2 : OWNED;
        for (int piece = threadIdx.x; piece < STRIPS_OUT * blocks * 32; piece += THREADS) {
            const int strip = piece / 32 % STRIPS_OUT, block = piece / (32 * STRIPS_OUT);
            const int row = pass * SUM_ROWS + block * 8 + lane / 4, column = lane % 4 * 4;  // of the tile; of the strip
            const int feature = n_tile * BLOCK_OUT + (rank * STRIPS_OUT + strip) * 16 + column;
            const long long m = first_row + row;
            if (row >= rows_here || feature >= N_OUT) continue;
            // A strip's sums lie as the tensor cores left them: lane 4 g + t has rows 2 t, 2 t + 1 of features g and g + 8.
            const int at = column % 8 * 16 + row % 8 / 2 * 4 + column / 8 * 2 + row % 2;
            auto add_up = [&](int which, int of_bias, float (&value)[4]) {
#pragma unroll
                for (int e = 0; e < 4; ++e) value[e] = 0.0f;
#pragma unroll
                for (int source = 0; source < SOURCES; ++source)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        value[e] += sums[((source * OWNED + which) * PASS_BLOCKS + block) * 128 + at + e * 16];
                if constexpr (BIAS) {
                    float extra[4];
                    load_vector(bias + of_bias, extra);
#pragma unroll
                    for (int e = 0; e < 4; ++e) value[e] += extra[e];
                }
            };
            float value[4];
            if constexpr (ACT == 3) {
                float up[4];
                add_up(strip * 2, feature, value);
                add_up(strip * 2 + 1, feature + N / 2, up);
#pragma unroll
                for (int e = 0; e < 4; ++e) value[e] = value[e] / (1.0f + __expf(-value[e])) * up[e];
            } else {
                add_up(strip, feature, value);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float v = value[e];
                    if constexpr (ACT == 1) value[e] = 0.5f * v * (1.0f + erff(v * 0.70710678f));
                    if constexpr (ACT == 2) value[e] = 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
                }
            }
            if constexpr (RESIDUAL) {
                float extra[4];
                load_vector(residual + m * N_OUT + feature, extra);
#pragma unroll
                for (int e = 0; e < 4; ++e) value[e] += extra[e];
            }
            X* to = y + m * N_OUT + feature;
            if constexpr (ACT != 3 && SPLIT1 < N) {
                to = feature < SPLIT1   ? y + m * SPLIT1 + feature
                     : feature < SPLIT2 ? y + rows * SPLIT1 + m * (SPLIT2 - SPLIT1) + (feature - SPLIT1)
                                        : y + rows * SPLIT2 + m * (N - SPLIT2) + (feature - SPLIT2);
            }
            store_vector(to, value);
        }
        __syncwarp();
        // Not after the last steps: nobody waits for it, and the other block might be gone.
        if (lane < CLUSTER && step + BUFFERS < steps) barrier_arrive(empty + step % BUFFERS, lane);
    };

    // Phase 4: the product, tile after tile.
    const unsigned x_rows = wgmma_rows(tile);
    int read_at = 0, step = 0, unfinished = -1;
#pragma unroll
    for (int b = 0; b < BUFFERS; ++b) expect(b);
    for (int n_tile = worker; n_tile < TILES; n_tile += workers) {
        float total[TILE_M / 2];
#pragma unroll
        for (int i = 0; i < TILE_M / 2; ++i) total[i] = 0.0f;
#pragma unroll 1
        for (int unit = slice; unit < units; unit += SLICES) {
            wait_copies<AHEAD - 1>();
            const unsigned x_unit = x_rows + unit * (2 * TILE_M * 128 / 16);
            uint4 both[2];
            both[0] = *reinterpret_cast<const uint4*>(my_ring + read_at);
            both[1] = *reinterpret_cast<const uint4*>(my_ring + read_at + THREADS * 16);
            Scales scale[PARTS];
            unsigned zero[PARTS];
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                scale[i] = *reinterpret_cast<const Scales*>(my_scales + read_at + i * THREADS * 2 * sizeof(S));
                zero[i] = 0x88;
                if constexpr (ZEROS) zero[i] = *reinterpret_cast<const unsigned*>(my_zeros + read_at + i * THREADS * 4) >> row8 % 4 * 8;
            }
            read_at = read_at == (AHEAD - 1) * STAGE ? 0 : read_at + STAGE;
            const unsigned word[8] = {both[0].x, both[0].y, both[0].z, both[0].w, both[1].x, both[1].y, both[1].z, both[1].w};
            unsigned a[8][4];
#pragma unroll
            for (int first = 0; first < PARTS; first += TOGETHER) {
                float part[TOGETHER][TILE_M / 2];
#pragma unroll
                for (int half = 0; half < TOGETHER * STEPS; half += 4) {
                    const int from = first * STEPS + half;
                    const int upto = from + (TOGETHER * STEPS < 4 ? TOGETHER * STEPS : 4);
#pragma unroll
                    for (int step = from; step < upto; ++step) {
                        const unsigned z = zero[step / STEPS];
                        unpack_int4<X>(word[step], zero_pair<X>(z & 15), zero_pair<X>(z >> 4 & 15), a[step]);
                    }
                    wgmma_fence();
#pragma unroll
                    for (int step = from; step < upto; ++step)
                        wgmma_add<X>(part[step / STEPS - first], a[step],
                                     x_unit + (step / 4 * TILE_M * 128 + step % 4 * 32) / 16, step % STEPS != 0);
                }
                wgmma_commit();
                if (first == 0) ask();
                wgmma_wait<0>();
#pragma unroll
                for (int p = 0; p < TOGETHER; ++p) {
                    arrived(part[p]);
                    const Vector<S, 2> pair = reinterpret_cast<const Vector<S, 2>&>(scale[first + p]);
                    const float top = to_float(pair.lane[0]), bottom = to_float(pair.lane[1]);
#pragma unroll
                    for (int i = 0; i < TILE_M / 2; ++i) total[i] += (i % 4 < 2 ? top : bottom) * part[p][i];
                }
            }
        }

        // Phase 5: every warp sends its sums to the block that owns their features, and goes on. What the step before
        // last has sent is added up meanwhile.
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass, ++step) {
            if (pass >= passes) break;
            if (BUFFERS == 1 && step > 0) finish(step - 1, pass > 0 ? n_tile : n_tile - workers);
            float* const to = all_sums + step % BUFFERS * SUMS +
                              (((rank * SLICES + slice) * OWNED + warp_n % OWNED) * PASS_BLOCKS) * 128 + lane * 4;
            if (step >= BUFFERS) barrier_wait(empty + step % BUFFERS, (step / BUFFERS - 1) % 2);
#pragma unroll
            for (int block = 0; block < PASS_BLOCKS; ++block) {
                const float* v = total + (pass * PASS_BLOCKS + block) * 4;
                if (block < blocks_of(pass)) send(to + block * 128, v[0], v[1], v[2], v[3], full + step % BUFFERS, warp_n / OWNED);
            }
            if (BUFFERS == 2 && step > 0) finish(step - 1, pass > 0 ? n_tile : n_tile - workers);
        }
        unfinished = n_tile;
    }
    if (unfinished >= 0) finish(step - 1, unfinished);
}
