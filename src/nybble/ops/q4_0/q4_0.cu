// q4_0: a 4-bit weight of llama.cpp's Q4_0 times activations in Q8_1, on the 8-bit tensor cores; the activations are
// quantised here, or were before.
//
// Computes      y[m, n] = sum over blocks b of 32 features: d4[b, n] * d8[m, b] * sum_k (q4[k, n] - 8) * q8[m, k]
//               the inner sum is exact, d8 times it is rounded once, and so is each addition to the fp32 sum. FUSED: q8, d8
//               from x as q8_1.cuh quantises, d8 rounded to float16
// Tensors       x: X [M, K], or without FUSED uint32 [M, K / 32, 9], blocks of Q8_1; qweight: uint4 [N64, K64, 4, 32];
//               scales: half [N64, GROUPS, 64]; y: Y [M, N]. N64 = ceil(N / 64), K64 = ceil(K / 64); 16-byte aligned, Q8_1
//               4-byte
// Layout        formats/tiles.py has the weight's diagram. A word is 16 output by 16 input features: of it a lane has the
//               even nibbles of feature g, the odd ones of feature g + 8, each the input features 2t, 2t+8, 2t+1, 2t+9. These
//               are four neighbours along k for the tensor cores once x is put in the same order:
//                 q8 [chunk of 64 features][8 rows][lane: 32][16 features: 4] word, bytes 2t, 2t+8, 2t+1, 2t+9 of row g
//                 d8 [chunk][pair of rows][block of 32: 2][row: 2] float, divided by 16 as the nibbles stay 4 bits high
// Mapping       grid x: workers of CLUSTER blocks. A job is TILE_M rows by 64 * TEAMS output features; a worker has neighbouring
//               jobs, all features of some rows before the next rows, whose x it quantises once. Its blocks split K. In a
//               block a warp has STRIPS strips of 16 features and every SLICES-th unit of 128 input features of the block's
//               range; one more warp asks for the weights
// Shared memory q8, d8 of the block's range; the ring: AHEAD stages of a unit for every team and slice, with its scales; sums:
//               [BUFFERS][SOURCES][OWNED][SUM_ROWS / 8][128] float, as fragments; barriers
// Constants     X: half_t, bf16_t, float (unused without FUSED); Y: float, half_t, bf16_t; FUSED: 0/1; N: multiple of 8; K:
//               multiple of 32, more than 32; TILE_M: 8, 16, 32, 64; TEAMS; STRIPS: 1, 2, 4; SLICES: TEAMS * 4 / STRIPS *
//               SLICES warps, up to 31; CLUSTER: 1, 2, 4, 8, dividing 4 * TEAMS; AHEAD: stages; SUM_ROWS: rows exchanged at a
//               time, dividing TILE_M; BUFFERS: 1..2; BLOCKS: on an SM
// Roof          few rows: N * K / 2 bytes of weights; many: two fused multiply-adds for 32 products, 4 an SM and cycle
// Source        own work; the formats are llama.cpp's (MIT).
#include "arrive.cuh"
#include "barrier.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "mma.cuh"
#include "packed.cuh"
#include "q8_1.cuh"
#include "reduce.cuh"

static_assert(K % 32 == 0 && K > 32, "K is several blocks of 32");
static_assert(TILE_M % SUM_ROWS == 0 && SUM_ROWS % 8 == 0, "rows are exchanged eight at a time");
static_assert(STRIPS == 1 || STRIPS == 2 || STRIPS == 4, "a warp has 16, 32 or 64 features");

using Weights = Packed<half_t, N, K, 32, false, 4>;
constexpr int K64 = Weights::K64, K32 = K / 32, MBLOCKS = TILE_M / 8;
constexpr int WARPS_N = TEAMS * 4 / STRIPS, WARPS = WARPS_N * SLICES, THREADS = 32 * WARPS;  // one more warp asks for weights
constexpr int BLOCK_N = 64 * TEAMS, TILES = (N + BLOCK_N - 1) / BLOCK_N;
constexpr int UNITS = (K64 + 2 * CLUSTER - 1) / (2 * CLUSTER), RANGE = 2 * UNITS;  // of a block: units, chunks of 64 features
constexpr int PASSES = TILE_M / SUM_ROWS, PASS_BLOCKS = SUM_ROWS / 8;
constexpr int OWNED = 4 * TEAMS / CLUSTER, SOURCES = CLUSTER * SLICES;  // strips that a block adds up
static_assert(OWNED * CLUSTER == 4 * TEAMS, "a block owns whole strips");

constexpr int Q_BYTES = RANGE * TILE_M * 64, D_BYTES = RANGE * TILE_M * 8;
constexpr int WEIGHT_BYTES = Weights::WEIGHT_BYTES, SCALE_BYTES = Weights::SCALE_BYTES;  // of a unit
constexpr int STAGE_SCALES = TEAMS * SLICES * WEIGHT_BYTES, STAGE = STAGE_SCALES + TEAMS * SLICES * SCALE_BYTES;
constexpr int SUMS = SOURCES * OWNED * PASS_BLOCKS * 128;  // floats
constexpr int BYTES = Q_BYTES + D_BYTES + AHEAD * STAGE + BUFFERS * SUMS * 4 + (2 * AHEAD + 2 * BUFFERS) * 8;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

// 16 values of x of a thread: on their way from global memory, then as int8 and a scale.
template <bool> struct Incoming {
    HalfBlockValues<X> values;
    __device__ __forceinline__ void load(const void* x, long long row, int k, bool there) {
        values.load(static_cast<const X*>(x) + row * K + k, there);
    }
    __device__ __forceinline__ float arrive(unsigned (&word)[4]) const {
        const HalfBlock half = quantize<false>(values);
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = half.word[i];
        return to_float(from_float<half_t>(half.d));
    }
};
template <> struct Incoming<false> {
    unsigned words[4], head;
    __device__ __forceinline__ void load(const void* x, long long row, int k, bool there) {
        const unsigned* const block = static_cast<const unsigned*>(x) + (row * K32 + k / 32) * 9;
        head = there ? __ldg(block) : 0u;
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = there ? __ldg(block + 1 + k % 32 / 4 + i) : 0u;
    }
    __device__ __forceinline__ float arrive(unsigned (&word)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = words[i];
        return to_float(as_half(head & 0xffffu));
    }
};

// Who a thread is, asked anew: what is computed from it is then computed where it is needed, and takes no register from the
// product between.
struct Me {
    int lane, warp, warp_n, slice;
    __device__ __forceinline__ Me() {
        unsigned thread = threadIdx.x;
        pin(thread);
        lane = thread % 32, warp = thread / 32, warp_n = warp % WARPS_N, slice = warp / WARPS_N;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, BLOCKS)
q4_0_kernel(const void* __restrict__ x, const uint4* __restrict__ qweight, const half_t* __restrict__ scales, Y* __restrict__ y,
            long long rows) {
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned* const q8 = reinterpret_cast<unsigned*>(shared);
    float* const d8 = reinterpret_cast<float*>(shared + Q_BYTES);
    unsigned char* const ring = shared + Q_BYTES + D_BYTES;
    float* const all_sums = reinterpret_cast<float*>(ring + AHEAD * STAGE);
    Barrier* const filled = reinterpret_cast<Barrier*>(all_sums + BUFFERS * SUMS);  // a stage of the ring
    Barrier* const used = filled + AHEAD;
    Barrier* const summed = used + AHEAD;  // a step's sums
    Barrier* const stored = summed + BUFFERS;

    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
    const int warp_n = warp % WARPS_N, slice = warp / WARPS_N, team = warp_n * STRIPS / 4, strip = warp_n * STRIPS % 4;
    const int rank = cluster_rank();
    const int jobs = static_cast<int>((rows + TILE_M - 1) / TILE_M) * TILES, worker = blockIdx.x / CLUSTER;
    const int workers = gridDim.x / CLUSTER, each = jobs / workers, more = jobs % workers;
    const int first_job = worker * each + min(worker, more), last_job = first_job + each + (worker < more);
    const int begin = rank * RANGE, end = min(begin + RANGE, K64);
    const int units = max((end - begin + 1) / 2, 0), stages = (units + SLICES - 1) / SLICES;  // a job's

    // Phase 1: one warp asks for all weights, AHEAD stages of them before anything is waited for: no kernel writes them.
    if (warp == WARPS) {
        int job = first_job, n_tile = first_job % TILES, stage = 0, slot = 0, turn = 0;
        auto ask = [&] {
            const int chunk = begin + stage * SLICES * 2, chunks = min(SLICES * 2, end - chunk);
            if (turn > 0) barrier_wait(used + slot, (turn - 1) % 2);
            barrier_expect(filled + slot, TEAMS * Weights::bytes(chunk, chunks));
            unsigned char* const to = ring + slot * STAGE;
#pragma unroll
            for (int t = 0; t < TEAMS; ++t)
                Weights::copy(to + t * SLICES * WEIGHT_BYTES, to + STAGE_SCALES + t * SLICES * SCALE_BYTES, nullptr, qweight, scales,
                              nullptr, n_tile * TEAMS + t, chunk, chunks, filled + slot);
            if (++slot == AHEAD) slot = 0, ++turn;
            if (++stage == stages) stage = 0, ++job, n_tile = n_tile + 1 == TILES ? 0 : n_tile + 1;
        };
        const bool asks = elected();
        if (asks) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) barrier_init(filled + i, 1), barrier_init(used + i, WARPS * ARRIVALS);
#pragma unroll
            for (int b = 0; b < BUFFERS; ++b) barrier_init(summed + b, 1), barrier_init(stored + b, CLUSTER * WARPS * ARRIVALS);
            barrier_init_done();
            while (turn == 0 && job < last_job && units > 0) ask();
        }
        __syncthreads();
        cluster_arrive();
        cluster_wait();
        if (asks && units > 0)
            while (job < last_job) ask();
        return;
    }
    // A hint for L2: the block's range of the rows of its first job.
    constexpr int CHUNK_BYTES = FUSED ? 64 * static_cast<int>(sizeof(X)) : 72, ROW_BYTES = K / 32 * (CHUNK_BYTES / 2);
    constexpr int LINES = (RANGE * CHUNK_BYTES + 127) / 128;
    const long long row_from = static_cast<long long>(first_job / TILES) * TILE_M;
    for (int i = threadIdx.x; i < min(static_cast<long long>(TILE_M), rows - row_from) * LINES; i += THREADS) {
        const int at = begin * CHUNK_BYTES + i % LINES * 128;
        if (at < ROW_BYTES) prefetch_l2(static_cast<const char*>(x) + (row_from + i / LINES) * ROW_BYTES + at);
    }
    __syncthreads();
    cluster_arrive();  // this block's barriers are there
    wait_for_previous();
    allow_next();
    cluster_wait();

    // Phase 2: TILE_M rows of the block's range of x, quantised and in the order of the tensor cores. Rows that are not there
    // stay what they were: a row of x reaches its own row of y only. What is past K has a scale of zero.
    auto bring = [&](long long first_row, int rows_here) {
        const Me me;
        const int lane = me.lane;
        const int bits = rows_here > 32 ? 6 : rows_here > 16 ? 5 : rows_here > 8 ? 4 : rows_here > 4 ? 3 : rows_here > 2 ? 2 : rows_here > 1;
        const int pieces = RANGE * 4 << bits;  // of 16 features: four a chunk and row, of rows up to a power of two
        constexpr int TOGETHER = 2;  // on their way at once
#pragma unroll 1
        for (int base = me.warp * 32; base < pieces; base += THREADS * TOGETHER) {
            Incoming<FUSED> in[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const int piece = base + i * THREADS + lane, row = piece / 4 & ((1 << bits) - 1);
                const int k = (begin + (piece >> (2 + bits))) * 64 + piece % 4 * 16;
                const bool there = piece < pieces && row < rows_here && k < K;
                in[i].load(x, there ? first_row + row : first_row, there ? k : 0, there);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const int piece = base + i * THREADS + lane, part = piece % 4, row = piece / 4 & ((1 << bits) - 1);
                const int chunk = piece >> (2 + bits);
                unsigned word[4];
                const float scale = in[i].arrive(word);
                if (piece >= pieces || row >= rows_here) continue;
                unsigned turned[4] = {pick_bytes<0x5140>(word[0], word[2]), pick_bytes<0x7362>(word[0], word[2]),
                                      pick_bytes<0x5140>(word[1], word[3]), pick_bytes<0x7362>(word[1], word[3])};
                // Eight rows of a lane's words are 64 bytes apart: each begins with another t, so that no two meet in a bank.
                const int first = row / 2 % 4;
                if (first & 1) {
                    const unsigned kept = turned[0];
                    turned[0] = turned[1], turned[1] = turned[2], turned[2] = turned[3], turned[3] = kept;
                }
                if (first & 2) {
                    const unsigned kept[2] = {turned[0], turned[1]};
                    turned[0] = turned[2], turned[1] = turned[3], turned[2] = kept[0], turned[3] = kept[1];
                }
                unsigned* const to = q8 + ((chunk * MBLOCKS + row / 8) * 32 + row % 8 * 4) * 4 + part;
#pragma unroll
                for (int t = 0; t < 4; ++t) to[(t + first) % 4 * 4] = turned[t];
                if (part % 2 == 0) d8[(chunk * (TILE_M / 2) + row / 2) * 4 + part + row % 2] = scale * 0.0625f;
            }
        }
    };

    // Phase 4, of a step: SUM_ROWS rows of a job. When all its sums are there, they are added up in order, so that the result
    // never depends on timing, and stored. Four features a thread.
    const int steps = (last_job - first_job) * PASSES;
    auto expect = [&](int step) {
        if (Me().warp == 0 && Me().lane == 0 && step < steps) barrier_expect(summed + step % BUFFERS, SOURCES * OWNED * 512 * PASS_BLOCKS);
    };
    auto finish = [&](int step) {
        const Me me;
        const int lane = me.lane, rank = cluster_rank();
        const int job = first_job + step / PASSES, n_tile = job % TILES;
        const long long first_row = static_cast<long long>(job / TILES) * TILE_M + step % PASSES * SUM_ROWS;
        const float* const sums = all_sums + step % BUFFERS * SUMS;
        barrier_wait(summed + step % BUFFERS, step / BUFFERS % 2);
        expect(step + BUFFERS);
#pragma unroll 1
        for (int piece = me.warp * 32 + lane; piece < OWNED * PASS_BLOCKS * 32; piece += THREADS) {
            const int owned = piece / 32 % OWNED, block = piece / (32 * OWNED);
            const int row = block * 8 + lane / 4, column = lane % 4 * 4;  // of the step; of the strip
            const int feature = n_tile * BLOCK_N + (rank * OWNED + owned) * 16 + column;
            if (first_row + row >= rows || feature >= N) continue;
            // A strip's sums lie as the tensor cores left them: lane 4 g + t has rows 2 t, 2 t + 1 of features g and g + 8.
            const int at = column % 8 * 16 + row % 8 / 2 * 4 + column / 8 * 2 + row % 2;
            float value[4] = {};
#pragma unroll 1
            for (int source = 0; source < SOURCES; ++source)
#pragma unroll
                for (int e = 0; e < 4; ++e) value[e] += sums[((source * OWNED + owned) * PASS_BLOCKS + block) * 128 + at + e * 16];
            store_vector(y + (first_row + row) * N + feature, value);
        }
        __syncwarp();
        // Not after the last steps: nobody waits for it, and the other block might be gone.
        if (step + BUFFERS < steps) warp_arrive_at<CLUSTER>(stored + step % BUFFERS, lane);
    };

    // Phase 3: the product, job after job.
    const unsigned char* const my_weights = ring + team * SLICES * WEIGHT_BYTES + slice * WEIGHT_BYTES + strip * 512 + lane * 16;
    const unsigned char* const my_scales = ring + STAGE_SCALES + (team * SLICES + slice) * SCALE_BYTES + (strip * 16 + lane / 4 * 2) * 2;
    const uint4* const my_q8 = reinterpret_cast<const uint4*>(q8) + lane;
    const uint4* const my_d8 = reinterpret_cast<const uint4*>(d8) + lane % 4;
    int slot = 0, turn = 0, step = 0;
    int held = -1;  // the rows of x that are in shared memory
#pragma unroll
    for (int b = 0; b < BUFFERS; ++b) expect(b);
#pragma unroll 1
    for (int job = first_job; job < last_job; ++job) {
        if (job / TILES != held) {
            if (held >= 0) sync_part(1, THREADS);  // nobody reads it any more
            held = job / TILES;
            const long long first_row = static_cast<long long>(held) * TILE_M;
            bring(first_row, static_cast<int>(min(static_cast<long long>(TILE_M), rows - first_row)));
            sync_part(1, THREADS);
        }
        float total[STRIPS][MBLOCKS][4];
#pragma unroll
        for (int s = 0; s < STRIPS; ++s)
#pragma unroll
            for (int block = 0; block < MBLOCKS; ++block)
#pragma unroll
                for (int e = 0; e < 4; ++e) total[s][block][e] = 0.0f;
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
            const int unit = stage * SLICES + slice;
            barrier_wait(filled + slot, turn);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int chunk = unit * 2 + c;
                if (unit >= units || (K64 % 2 != 0 && begin + chunk >= end)) break;  // only the last unit may be half a one
                unsigned a[STRIPS][2][4];
                float d4[STRIPS][2][2];
#pragma unroll
                for (int s = 0; s < STRIPS; ++s) {
#pragma unroll
                    for (int b = 0; b < 2; ++b) {
                        const unsigned pair = load_in_order(reinterpret_cast<const unsigned*>(my_scales + slot * STAGE + (c * 2 + b) * 128 + s * 32));
                        d4[s][b][0] = to_float(as_half(pair & 0xffffu)), d4[s][b][1] = to_float(as_half(pair >> 16));
                    }
                    const uint4 packed = load_in_order(reinterpret_cast<const uint4*>(my_weights + slot * STAGE + c * 2048 + s * 512));
                    const unsigned word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
                    for (int tile = 0; tile < 4; ++tile) {
                        a[s][tile / 2][tile % 2 * 2] = signed_nibbles(word[tile] << 4);
                        a[s][tile / 2][tile % 2 * 2 + 1] = signed_nibbles(word[tile]);
                    }
                }
#pragma unroll
                for (int block = 0; block < MBLOCKS; ++block) {
                    const uint4 q = load_in_order(my_q8 + (chunk * MBLOCKS + block) * 32), scale = load_in_order(my_d8 + chunk * (TILE_M / 2) + block * 4);
                    const float d[2][2] = {{as_float(scale.x), as_float(scale.y)}, {as_float(scale.z), as_float(scale.w)}};
                    const unsigned b0[2] = {q.x, q.z}, b1[2] = {q.y, q.w};
#pragma unroll
                    for (int b = 0; b < 2; ++b) {
                        // SEED * d is exact, as d has 11 bits: so (SEED + sum) * d - SEED * d is sum * d, rounded once.
                        const float minus[2] = {-SEED * d[b][0], -SEED * d[b][1]};
#pragma unroll
                        for (int s = 0; s < STRIPS; ++s) {
                            unsigned sum[4];
                            mma_16832_seeded(sum, a[s][b], b0[b], b1[b]);
#pragma unroll
                            for (int e = 0; e < 4; ++e)
                                total[s][block][e] = fmaf(d4[s][b][e / 2], fmaf(as_float(sum[e]), d[b][e % 2], minus[e % 2]), total[s][block][e]);
                        }
                    }
                }
            }
            __syncwarp();
            warp_arrive(used + slot, lane);  // this warp has read the stage
            if (++slot == AHEAD) slot = 0, turn ^= 1;
        }

        // Every warp sends its sums to the block that owns their features, and goes on; those of the step before are added up
        // meanwhile.
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass, ++step) {
            if (BUFFERS == 1 && step > 0) finish(step - 1);
            const Me me;
            if (step >= BUFFERS) barrier_wait(stored + step % BUFFERS, (step / BUFFERS - 1) % 2);
#pragma unroll
            for (int s = 0; s < STRIPS; ++s) {
                const int of = me.warp_n * STRIPS + s;
                float* const to = all_sums + step % BUFFERS * SUMS + ((cluster_rank() * SLICES + me.slice) * OWNED + of % OWNED) * PASS_BLOCKS * 128 + me.lane * 4;
#pragma unroll
                for (int block = 0; block < PASS_BLOCKS; ++block) {
                    const float* v = total[s][pass * PASS_BLOCKS + block];
                    send(to + block * 128, v[0], v[1], v[2], v[3], summed + step % BUFFERS, of / OWNED);
                }
            }
            if (BUFFERS == 2 && step > 0) finish(step - 1);
        }
    }
    if (step > 0) finish(step - 1);
}
