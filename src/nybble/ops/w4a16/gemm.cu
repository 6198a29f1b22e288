// gemm: the 4-bit or 8-bit linear for many rows. Weights are unpacked into the tensor cores' registers a few steps ahead of
// them, x streams past through the copy engine. Where the tiles of the result are too few for the GPU, K is split as well.
//
// Computes      y[m, n] = f(sum_k x[m, k] * scale[k / GROUP, n] * (q[k, n] - zero[k / GROUP, n]) (+ bias[n])) (+ residual[m, n])
//               f: identity, gelu, gelu by tanh, or silu(first half of n) * second half. The weight is not rounded:
//               q - zero is exact, sums are fp32, the scale multiplies the sum of a group, or of 128 features of it. Only
//               with FOLD scale * (q - zero) is rounded to X, as a model in 16 bits has it
// Tensors       x_map: of x, X [M, K], in tiles of TILE_M rows, or a block's share of them; qweight: uint4 [N64, K64, BITS / 4, 4,
//               32]; scales: S [N64, GROUPS, 64]; qzeros: uint8 [N64, GROUPS, 8 BITS]; bias: X [N]; residual: X [M, N or N / 2]; y: Y
//               [M, SPLIT1], [M, SPLIT2 - SPLIT1], [M, N - SPLIT2] after each other, or [M, N / 2] for silu_mul; workspace:
//               FLAG_BYTES of flags, zero before and after, and [blocks][TEAMS][4 warps][TILE_M / 8][32 lanes][4] float, with
//               STREAM_K; unused ones are null. With act-order x is gathered before (gather.cu). N64 = ceil(N / 64), K64 =
//               ceil(K / 64); all 16-byte aligned
// Layout        formats/tiles.py has the diagram; x in shared memory as wgmma.cuh wants B
// Mapping       grid x: clusters of CLUSTER blocks, which take every (gridDim.x / CLUSTER)-th tile, row tiles first, so that
//               clusters side by side share weights in L2. A block has TILE_M rows by 64 * TEAMS output features. The blocks
//               of a cluster have other features each, and fetch x for each other (WAYS = 1); or the same, and each a part of K
//               (WAYS = CLUSTER). A warpgroup has 64 of the features, and every SLICES-th unit of 128 input features; one
//               more warpgroup asks for the tiles. With STREAM_K clusters first share the tiles of the last turns evenly, by
//               units: whoever has the end of a tile adds what those before it have left in the workspace. So every cluster
//               must have a unit: there are at most as many as units
// Shared memory AHEAD stages of SLICES units: x, weights, scales, zero points; [TEAMS][PASS][68] float for the results; where
//               K is split the others' sums, [SOURCES - 1][TEAMS][4 warps][OWN_M / 8][32 lanes][4] float
// Constants     BITS: 4, 8; X: half_t, bf16_t; Y: X or float; S: half_t, bf16_t, float; N, K: multiples of 8; GROUP: 16, 32, 64, a
//               multiple of 128 or >= K; TILE_M: 16, 32, 64, 128, 256; TEAMS, SLICES: together up to 4, without SLICES up to 3 at
//               TILE_M 128 and 2 at 256; CLUSTER: 1, 2, 4; WAYS: 1 or CLUSTER; STREAM_K: 0/1, without WAYS and SLICES; EARLY: 0/1,
//               weights are unpacked while the tensor cores still read the step before; AHEAD: stages; PASS_M: rows stored at a
//               time; ZEROS, BIAS, RESIDUAL, GATHERED: 0/1; ACT: 0, 1 gelu, 2 gelu by tanh, 3 silu_mul (N a multiple of 128,
//               TEAMS even: every other warpgroup has features of up)
// Roof          the larger of N * K * BITS / 8 bytes of weights and 2 M N K operations
// Source        own work. Weights as wgmma's register operand, y^T = W^T x^T: the idea of Machete (vLLM, 2024).
#include "arrive.cuh"
#include "barrier.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "epilogue.cuh"
#include "flag.cuh"
#include "mma.cuh"
#include "packed.cuh"
#include "reduce.cuh"
#include "tensor.cuh"
#include "vectors.cuh"
#include "wgmma.cuh"

static_assert(ACT != SILU_MUL || (N % 128 == 0 && TEAMS % 2 == 0), "silu_mul pairs 64 features of the two halves");
static_assert(SPLIT1 % 8 == 0 && SPLIT2 % 8 == 0 && SPLIT1 <= SPLIT2 && SPLIT2 <= N, "planes are multiples of 8 wide");

using Weights = Packed<S, N, K, GROUP, ZEROS, BITS>;
constexpr int K64 = Weights::K64, UNITS = Weights::UNITS, PARTS = Weights::PARTS, STEPS = Weights::STEPS;
constexpr int TOGETHER = PARTS * TILE_M <= 64 ? PARTS : TILE_M < 64 ? 64 / TILE_M : 1;
// Where there are no registers for the sums of a group beside those of the tile, scales are multiplied into weights.
constexpr bool FOLD = TILE_M == 256 || (TILE_M == 128 && TEAMS == 3);
constexpr int BATCH = !FOLD && TOGETHER * STEPS < 4 ? TOGETHER * STEPS : 4;  // steps asked for at a time
// Scales that are multiplied into fp16 weights are made larger, so that weights down to 2^-20 keep all their bits.
// bf16 weights of 8 bits are smaller by as much as their scales are larger.
constexpr float LARGER = FOLD && same<X, half_t> ? 64.0f : Weights::LARGER<X>;
static_assert(!FOLD || (EARLY && SLICES == 1), "no sums of a unit that are not of the tile");
static_assert(!EARLY || AHEAD > 1, "a stage is unpacked before the one before it has been read");
static_assert(!STREAM_K || (SLICES == 1 && WAYS == 1), "K is shared in one way");
constexpr int WARPGROUPS = TEAMS * SLICES, THREADS = 128 * WARPGROUPS;  // that compute
constexpr int BLOCK_N = 64 * TEAMS, BLOCK_OUT = ACT == SILU_MUL ? BLOCK_N / 2 : BLOCK_N;
constexpr int N_OUT = ACT == SILU_MUL ? N / 2 : N;

// Blocks that share x fetch SHARE_M rows of a tile for all of them; of blocks that split K each owns OWN_M rows of the sums.
constexpr int WIDE = CLUSTER / WAYS;
static_assert(WAYS == 1 || WAYS == CLUSTER, "a cluster shares x or splits K");
constexpr int SHARE_M = TILE_M / WIDE, OWN_M = TILE_M / WAYS, SOURCES = WAYS * SLICES;
constexpr int CLUSTER_OUT = WIDE * BLOCK_OUT, TILES_N = (N_OUT + CLUSTER_OUT - 1) / CLUSTER_OUT;
constexpr int BLOCK_UNITS = (UNITS + WAYS - 1) / WAYS, STAGES = (BLOCK_UNITS + SLICES - 1) / SLICES;
static_assert(SHARE_M * WIDE == TILE_M && SHARE_M % 8 == 0 && OWN_M * WAYS == TILE_M && OWN_M % 8 == 0, "parts of 8 rows");
static_assert((WAYS - 1) * BLOCK_UNITS < UNITS, "every block has a part of K");
constexpr int X_BYTES = 2 * TILE_M * 128, WEIGHT_BYTES = Weights::WEIGHT_BYTES;  // of a unit
constexpr int SCALE_BYTES = Weights::SCALE_BYTES, ZERO_BYTES = Weights::ZERO_BYTES;  // of 64 output features
constexpr int STAGE_WEIGHTS = SLICES * X_BYTES;
constexpr int STAGE_SCALES = STAGE_WEIGHTS + WARPGROUPS * WEIGHT_BYTES, STAGE_ZEROS = STAGE_SCALES + WARPGROUPS * SCALE_BYTES;
constexpr int STAGE = (STAGE_ZEROS + WARPGROUPS * ZERO_BYTES + 1023) / 1024 * 1024;  // x begins at a multiple of 1024
// Where even shares of an SM's registers are too few, the warpgroup that only asks gives its own away; all together have
// what the launch gave them: 640 * 96, 512 * 128 and 384 * 168.
constexpr bool CROWDED = TILE_M > 64 || (TILE_M == 64 && BITS == 8);
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 4 ? 32 : WARPGROUPS == 3 && CROWDED ? 32 : WARPGROUPS == 2 && TILE_M > 64 ? 40 : 0;
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 4 ? 112 : WARPGROUPS == 3 ? 160 : 232;
static_assert(WARPGROUPS != 4 || 4 * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= 5 * 96, "more than there are");
static_assert(WARPGROUPS != 3 || 3 * CONSUMER_REGISTERS + 32 <= 4 * 128, "more than there are");
static_assert(TILE_M < 128 || (SLICES == 1 && TEAMS <= (TILE_M == 128 ? 3 : 2)), "more than there are");
static_assert(WARPGROUPS != 2 || TILE_M != 128 || 2 * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= 3 * 168, "more than there are");
constexpr int PAD = 68;  // floats of a row of results: the rows of a fragment's lanes lie in different banks
constexpr int PASS = OWN_M < PASS_M ? OWN_M : PASS_M;  // rows of results at a time
static_assert(OWN_M % PASS == 0, "passes of the same number of rows");
constexpr int SUMS = (SOURCES - 1) * TEAMS * 4 * OWN_M / 8 * 128;  // floats of others
constexpr int BYTES = AHEAD * STAGE + TEAMS * PASS * PAD * 4 + SUMS * 4 + 2 * AHEAD * 8 + 16;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");
constexpr int FLAG_BYTES = 16384;  // of the workspace

struct Piece { int tile, from, upto; };  // stages of a tile
struct Place { int n, m; };  // of a tile, along the features and along the rows

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
gemm_kernel(const __grid_constant__ TensorMap x_map, const uint4* __restrict__ qweight, const S* __restrict__ scales,
            const unsigned char* __restrict__ qzeros, const X* __restrict__ bias, const X* __restrict__ residual,
            Y* __restrict__ y, unsigned char* workspace, long long rows) {
    extern __shared__ __align__(1024) unsigned char shared[];
    float* const results = reinterpret_cast<float*>(shared + AHEAD * STAGE);
    float* const sums = results + TEAMS * PASS * PAD;  // [SOURCES - 1][TEAMS][4 warps][OWN_M / 8][32 lanes][4]
    Barrier* const filled = reinterpret_cast<Barrier*>(sums + SUMS);
    Barrier* const used = filled + AHEAD;
    Barrier* const summed = used + AHEAD;
    Barrier* const taken = summed + 1;

    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), row8 = lane / 4;
    const int team = warp / 4 % TEAMS, slice = warp / (4 * TEAMS), strip = warp % 4;  // the same in all lanes: no register of a lane
    const int rank = CLUSTER > 1 ? cluster_rank() : 0, worker = blockIdx.x / CLUSTER, workers = gridDim.x / CLUSTER;
    const int tiles_m = static_cast<int>((rows + TILE_M - 1) / TILE_M), tiles = tiles_m * TILES_N;
    // Tiles go down up to four along the rows, then on along the features, then to the next band of rows: what runs at a time
    // reads the least of x and of the weight together, as a tile of x has four times the bytes of a tile of weights.
    auto place_of = [](int tile, int tiles_m) {
        const int band = tile / (4 * TILES_N), height = min(4, tiles_m - band * 4), in_band = tile - band * (4 * TILES_N);
        const int n = height == 3 ? in_band / 3 : in_band >> height / 2;  // in_band / height, by constants
        return Place{n, band * 4 + in_band - n * height};
    };
    const int wide_rank = rank / WAYS, rank_k = rank % WAYS;
    const int first_unit = rank_k * BLOCK_UNITS, units = min(BLOCK_UNITS, UNITS - first_unit);
    const int stages = WAYS == 1 ? STAGES : (units + SLICES - 1) / SLICES;

    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) barrier_init(filled + i, 1), barrier_init(used + i, WIDE * THREADS / 32 * ARRIVALS);
        barrier_init(summed, 1 + (SLICES - 1) * TEAMS * 4 * ARRIVALS), barrier_init(taken, WAYS * TEAMS * 4 * ARRIVALS);
        barrier_init_done();
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) cluster_arrive();  // this block's barriers are there

    // The work of this worker, piece after piece: tiles, or first a share of the last turns' tiles, which all workers have as
    // many stages of. Of these the last comes first: who has the end of a tile then finds what others have of it there, and
    // waits only for blocks that were scheduled before it.
    const int shared_tiles = !STREAM_K || tiles % workers == 0 ? 0 : tiles < workers ? tiles : tiles % workers + workers;
    auto share_of = [&](int w) { return w * (shared_tiles * STAGES) / workers; };  // where the share of a worker begins
    const int begins = STREAM_K ? share_of(worker) : 0, ends = STREAM_K ? share_of(worker + 1) : 0;
    const int pieces_shared = begins < ends ? (ends - 1) / STAGES - begins / STAGES + 1 : 0;
    const int whole = (tiles - shared_tiles - worker + workers - 1) / workers;  // tiles of its own
    const int all = ends - begins + whole * stages;
    auto piece_of = [&](int i) {
        if (!STREAM_K || i >= pieces_shared) return Piece{shared_tiles + (i - pieces_shared) * workers + worker, 0, stages};
        const int tile = (ends - 1) / STAGES - i;
        return Piece{tile, max(begins - tile * STAGES, 0), min(ends - tile * STAGES, STAGES)};
    };

    // The 64 features of N of a warpgroup; with silu_mul of its two halves in turn.
    auto features_of = [&](int tile_n, int t) {
        const int at = (tile_n * WIDE + wide_rank) * TEAMS + t;
        if constexpr (ACT == SILU_MUL) return min(at / 2, N / 128 - 1) + at % 2 * (N / 128);
        return at;
    };

    // The last warpgroup asks for everything: weights before the previous kernel is complete, x after.
    if (slice == SLICES) {
        if constexpr (PRODUCER_REGISTERS > 0) fewer_registers<PRODUCER_REGISTERS>();
        if (warp != THREADS / 32) {
            if constexpr (CLUSTER > 1) cluster_wait();
            return;
        }
        int piece, stage, upto, n_tile, row, slot, turn, asked;  // of what is asked for next
        auto turn_to = [&](int i) {
            const Piece next = piece_of(i);
            piece = i, stage = next.from, upto = next.upto;
            const Place at = place_of(next.tile, tiles_m);
            n_tile = at.n, row = at.m * TILE_M + wide_rank * SHARE_M;
        };
        auto begin = [&] { turn_to(0), slot = turn = asked = 0; };
        auto next = [&] {
            if (++stage == upto) turn_to(piece + 1);
            if (++slot == AHEAD) slot = 0, ++turn;
            ++asked;
        };
        auto ask_weights = [&] {
            const int count = min(SLICES, units - stage * SLICES), chunk = (first_unit + stage * SLICES) * 2;
            const int chunks = min(2 * count, K64 - chunk);
            unsigned char* const to = shared + slot * STAGE;
            Barrier* const at = filled + slot;
            barrier_expect(at, count * X_BYTES + TEAMS * Weights::bytes(chunk, chunks));
#pragma unroll
            for (int t = 0; t < TEAMS; ++t) {
                Weights::copy(to + STAGE_WEIGHTS + t * SLICES * WEIGHT_BYTES, to + STAGE_SCALES + t * SLICES * SCALE_BYTES,
                              to + STAGE_ZEROS + t * SLICES * ZERO_BYTES, qweight, scales, qzeros, features_of(n_tile, t), chunk, chunks, at);
            }
        };
        auto ask_x = [&] {
            const int count = min(SLICES, units - stage * SLICES);
#pragma unroll
            for (int c = 0; c < 2 * SLICES; ++c) {
                if (SLICES > 1 && c >= 2 * count) break;
                unsigned char* const part = shared + slot * STAGE + (c * TILE_M + wide_rank * SHARE_M) * 128;
                const int column = ((first_unit + stage * SLICES) * 2 + c) * 64;
                if constexpr (WIDE > 1) copy_tile(part, x_map, column, row, filled + slot, (1 << CLUSTER) - 1);
                else copy_tile(part, x_map, column, row, filled + slot);
            }
        };
        const bool asks = elected();
        begin();
        if (asks)
            for (; asked < min(AHEAD, all); next()) ask_weights();
        __syncwarp();
        if constexpr (CLUSTER > 1) cluster_wait();  // all blocks' are
        if (!asks) return;
        wait_for_previous();
        allow_next();
        begin();
        for (; asked < min(AHEAD, all); next()) ask_x();
        for (; asked < all; next()) {
            barrier_wait(used + slot, (turn - 1) % 2);
            ask_weights();
            ask_x();
        }
        return;
    }
    if constexpr (PRODUCER_REGISTERS > 0) more_registers<CONSUMER_REGISTERS>();
    if constexpr (CLUSTER > 1) cluster_wait();
    wait_for_previous();  // of this kernel's writes to y, and its reads of residual

    const int mine = team * SLICES + slice;
    const unsigned x_rows = wgmma_rows(shared + slice * X_BYTES);
    const unsigned char* const my_weights = shared + STAGE_WEIGHTS + mine * WEIGHT_BYTES + strip * 512 + lane * 16;
    const unsigned char* const my_scales = shared + STAGE_SCALES + mine * SCALE_BYTES + (strip * 16 + row8 * 2) * sizeof(S);
    const unsigned char* const my_zeros = shared + STAGE_ZEROS + mine * ZERO_BYTES + strip * (2 * BITS) + row8 * (BITS / 4);
    int slot = 0, turn = 0, step = 0;
    auto expect = [&] {
        if (SOURCES > 1 && threadIdx.x == 0) barrier_expect(summed, (WAYS - 1) * SLICES * TEAMS * 4 * (OWN_M / 8) * 512);
    };
    expect();
    // Weights are unpacked a batch of steps ahead of the tensor cores, into the registers that they no longer read.
    unsigned a[2][BATCH][4];
    auto unpack = [&](int at, int batch, bool absent = false) {  // of the stage at `at` in the ring
        constexpr int LOADED = Weights::LOADED, LOADS = BATCH > LOADED ? BATCH / LOADED : 1;
        const int from = batch * BATCH;
        const auto words = Weights::load<LOADS>(my_weights + at + from / LOADED * 2048);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            unsigned z = Weights::MIDDLE;
            if constexpr (ZEROS) z = Weights::zeros_of(my_zeros + (at + (from + i) / STEPS * Weights::ZERO_ROW));
            Weights::unpack<X>(words.word + (from + i) % (LOADS * LOADED) * Weights::WORDS, z, a[batch % 2][i]);
            if constexpr (FOLD) {
                const Vector<S, 2> of_rows = *reinterpret_cast<const Vector<S, 2>*>(my_scales + at + (from + i) / STEPS * 64 * sizeof(S));
                unsigned twice[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float scale = absent ? 0.0f : to_float(of_rows.lane[r]) * LARGER;
                    const float two[2] = {scale, scale};
                    const Vector<X, 2> pair = rounded<X>(two);
                    twice[r] = *reinterpret_cast<const unsigned*>(&pair);
                }
                scale_fragment<X>(a[batch % 2][i], twice[0], twice[1]);
            }
        }
    };
    if (EARLY && all > 0) barrier_wait(filled, 0), unpack(0, 0);
    int done = 0;  // stages
    for (int piece = 0; done < all; ++piece) {
        const Piece now_of = piece_of(piece);
        const int tile = now_of.tile, from = now_of.from, upto = now_of.upto;
        float total[TILE_M / 2];
#pragma unroll
        for (int i = 0; i < TILE_M / 2; ++i) total[i] = 0.0f;
#pragma unroll 1
        for (int stage = from; stage < upto; ++stage) {
            const int unit = first_unit + stage * SLICES + slice, at = slot * STAGE;
            const unsigned x_unit = x_rows + slot * (STAGE / 16);
            const bool last = ++done == all;
            const int now = slot;
            if (!EARLY) barrier_wait(filled + slot, turn);
            if (++slot == AHEAD) slot = 0, turn ^= 1;
            // Every block of the cluster writes x here. Not after the last stages: nobody waits, and it might be gone.
            auto release = [&](int slot_read, int number) {
                if (WIDE == 1) warp_arrive(used + slot_read, lane);
                if (WIDE > 1 && number + AHEAD <= all) warp_arrive_at<CLUSTER>(used + slot_read, lane);
            };
            if constexpr (FOLD) {  // the tensor cores add up all of K; a stage has been read when the next one's first products wait
#pragma unroll
                for (int batch = 0; batch < 2; ++batch) {
                    wgmma_fence();
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        wgmma_add<X>(total, a[batch][i], x_unit + (batch * TILE_M * 128 + i * 32) / 16, stage - from + batch + i);
                    wgmma_commit();
                    if (batch == 1 && !last) barrier_wait(filled + slot, turn);
                    wgmma_wait<1>();
                    if (batch == 0) {
                        if (stage > from) release((now == 0 ? AHEAD : now) - 1, done - 1);
                        unpack(at, 1, K64 % 2 != 0 && unit * 2 + 1 >= K64);
                    } else if (!last) {
                        unpack(slot * STAGE, 0);
                    }
                }
                if (stage + 1 < upto) continue;
                wgmma_wait<0>();
                release(now, done);
                arrived(total);
#pragma unroll
                for (int i = 0; i < TILE_M / 2; ++i) total[i] *= Weights::LARGER<X> / LARGER;
                continue;
            }
            float part[TOGETHER][TILE_M / 2], scale[TOGETHER][2];  // of features g and g + 8
#pragma unroll
            for (int batch = 0; batch < 8 / BATCH; ++batch) {
                const int first = batch * BATCH / (TOGETHER * STEPS) * TOGETHER;  // of the groups summed now
                if (!EARLY) unpack(at, batch);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    const int step = batch * BATCH + i;
                    wgmma_add<X>(part[step / STEPS - first], a[batch % 2][i],
                                 x_unit + (step / 4 * TILE_M * 128 + step % 4 * 32) / 16, step % STEPS != 0);
                }
                wgmma_commit();
                if (batch * BATCH == first * STEPS)
#pragma unroll
                    for (int p = 0; p < TOGETHER; ++p) {
                        const Vector<S, 2> pair = *reinterpret_cast<const Vector<S, 2>*>(my_scales + at + (first + p) * 64 * sizeof(S));
                        scale[p][0] = to_float(pair.lane[0]) * LARGER, scale[p][1] = to_float(pair.lane[1]) * LARGER;
                        // Half a unit has no scales for its other half, only what was in the ring before.
                        if (K64 % 2 != 0 && PARTS > 1 && first + p >= PARTS / 2 && unit * 2 + 1 >= K64) scale[p][0] = scale[p][1] = 0.0f;
                    }
                const bool ends = batch + 1 == 8 / BATCH, sums = (batch + 1) * BATCH % (TOGETHER * STEPS) == 0;
                if constexpr (EARLY) {
                    if (ends && !last) barrier_wait(filled + slot, turn);
                    wgmma_wait<1>();
                    if (!ends) unpack(at, batch + 1);
                    else if (!last) unpack(slot * STAGE, 0);
                }
                if (!sums) continue;
                wgmma_wait<0>();
                if (ends) release(now, done);  // all of the stage has been read: weights to registers, x by products that are complete
                const bool there = SLICES == 1 || stage * SLICES + slice < units;  // or what the ring had there before
#pragma unroll
                for (int p = 0; p < TOGETHER; ++p) {
                    arrived(part[p]);
                    if (there)
#pragma unroll
                        for (int i = 0; i < TILE_M / 2; ++i) total[i] += scale[p][i / 2 % 2] * part[p][i];
                }
            }
        }

        // Results, PASS rows at a time: from the tensor cores' fragments to rows in shared memory, and on. Warpgroups that
        // have gate and up go together.
        unsigned index = threadIdx.x, rows_again = rows;  // what is computed from them would keep registers through the product
        pin(index), pin(rows_again);
        const Place place_of_tile = place_of(tile, (rows_again + TILE_M - 1) / TILE_M);
        const int n_tile = place_of_tile.n, m_tile = place_of_tile.m;
        const int lane = index % 32, row8 = lane / 4;
        auto store = [&](const auto& values, int from_row) {  // from_row: of the tile
            if constexpr (ACT != SILU_MUL && !RESIDUAL && same<X, Y>) {
                // Rounded in registers, turned around by stmatrix: half the bytes and a quarter of the instructions.
                constexpr int HELD = sizeof(values) / 2, STEP = HELD < 2 * PASS ? HELD : 2 * PASS;  // rows
                X* const place = reinterpret_cast<X*>(results + team * PASS * PAD);  // [STEP][64], swizzled
                const long long first_row = static_cast<long long>(m_tile) * TILE_M + from_row;
                const int first = features_of(n_tile, team) * 64, own = first + strip * 16 + row8, thread = index % 128;
                float bias_of[2] = {};  // of features g and g + 8
                if constexpr (BIAS) {
                    if (own < N) bias_of[0] = to_float(bias[own]);
                    if (own + 8 < N) bias_of[1] = to_float(bias[own + 8]);
                }
                const int feature = first + thread % 8 * 8, width = plane_width<N, SPLIT1, SPLIT2>(feature);
                Y* const to = in_planes<N, SPLIT1, SPLIT2>(y, rows, 0, feature);
#pragma unroll
                for (int pass = 0; pass < HELD / STEP; ++pass) {
                    if (first_row + pass * STEP >= rows) break;
                    sync_part(1 + team, 128);
#pragma unroll
                    for (int block = 0; block < STEP / 8; ++block) {
                        unsigned pair[2];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const float* const v = values + (pass * (STEP / 8) + block) * 4 + i * 2;
                            const float two[2] = {activate<ACT>(v[0] + bias_of[i]), activate<ACT>(v[1] + bias_of[i])};
                            const Vector<X, 2> packed = rounded<X>(two);
                            pair[i] = *reinterpret_cast<const unsigned*>(&packed);
                        }
                        const int row = block * 8 + lane % 8;
                        store_transposed(pair[0], pair[1], place + row * 64 + ((strip * 2 + lane / 8 % 2) ^ lane % 8) * 8);
                    }
                    sync_part(1 + team, 128);
                    if (feature >= N_OUT) continue;
                    for (int row = thread / 8; row < STEP; row += 16) {
                        const long long m = first_row + pass * STEP + row;
                        if (m >= rows) break;
                        *reinterpret_cast<uint4*>(to + m * width) =
                            *reinterpret_cast<const uint4*>(place + row * 64 + (thread % 8 ^ row % 8) * 8);
                    }
                }
                return;
            }
            constexpr int SHARERS = ACT == SILU_MUL ? 2 : 1;
            constexpr int HELD = sizeof(values) / 2, STEP = HELD < PASS ? HELD : PASS;  // rows
            float* const place = results + team * PASS * PAD;
            const float* const gate = results + team / SHARERS * SHARERS * PASS * PAD;
            const int group = 1 + team / SHARERS, thread = index % (128 * SHARERS);
            const long long first_row = static_cast<long long>(m_tile) * TILE_M + from_row;
            // A thread has the same four features of every eighth row, so it looks once which plane they are in.
            const int row0 = thread / 16, column = thread % 16 * 4;
            const int feature = column + (ACT == SILU_MUL ? ((n_tile * WIDE + wide_rank) * TEAMS + team) / 2 : features_of(n_tile, team)) * 64;
            const int width = ACT == SILU_MUL ? N_OUT : plane_width<N, SPLIT1, SPLIT2>(feature);
            Y* const to = ACT == SILU_MUL ? y + feature : in_planes<N, SPLIT1, SPLIT2>(y, rows, 0, feature);
#pragma unroll
            for (int pass = 0; pass < HELD / STEP; ++pass) {
                if (first_row + pass * STEP >= rows) break;
                sync_part(group, 128 * SHARERS);
#pragma unroll
                for (int i = 0; i < STEP / 2; ++i) {
                    const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
                    place[row * PAD + strip * 16 + row8 + i % 4 / 2 * 8] = values[pass * (STEP / 2) + i];
                }
                sync_part(group, 128 * SHARERS);
                if (feature >= N_OUT) continue;
                for (int row = row0; row < STEP; row += 8 * SHARERS) {
                    const long long m = first_row + pass * STEP + row;
                    if (m >= rows) break;
                    finish_at<ACT, BIAS, RESIDUAL, N>(bias, residual + m * N_OUT + feature, to + m * width, feature,
                                                      [&](int which, float (&value)[4]) {
                        const float4 v = *reinterpret_cast<const float4*>(gate + (which * PASS + row) * PAD + column);
                        value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
                    });
                }
            }
        };
        // Sums of the other parts of K come to the warp that owns the rows, as fragments, and are added in the order of sources.
        auto send_part = [&](const float* v, float* to, int blocks, int owner) {
#pragma unroll
            for (int block = 0; block < blocks; ++block)
                send(to + block * 128, v[block * 4], v[block * 4 + 1], v[block * 4 + 2], v[block * 4 + 3], summed, owner);
        };
        auto add_part = [&](float* v, const float* from, int blocks) {
#pragma unroll
            for (int block = 0; block < blocks; ++block) {
                const float4 more = *reinterpret_cast<const float4*>(from + block * 128);
                v[block * 4] += more.x, v[block * 4 + 1] += more.y, v[block * 4 + 2] += more.z, v[block * 4 + 3] += more.w;
            }
        };
        if constexpr (SOURCES > 1) {
            float own[OWN_M / 2];
            if (step > 0) barrier_wait(taken, (step - 1) % 2);
#pragma unroll
            for (int owner = 0; owner < WAYS; ++owner) {
                const float* const v = total + owner * (OWN_M / 2);
                if (owner == rank_k && slice == 0) {
#pragma unroll
                    for (int i = 0; i < OWN_M / 2; ++i) own[i] = v[i];
                    continue;
                }
                // The owner is no source of its own: the others are numbered without it.
                const int source = rank_k == owner ? slice - 1 : SLICES - 1 + ((rank_k + WAYS - owner) % WAYS - 1) * SLICES + slice;
                float* const to = sums + ((source * TEAMS + team) * 4 + strip) * (OWN_M / 8) * 128 + lane * 4;
                if (owner != rank_k) send_part(v, to, OWN_M / 8, owner);
                else
#pragma unroll
                    for (int block = 0; block < OWN_M / 8; ++block)
                        *reinterpret_cast<float4*>(to + block * 128) = float4{v[block * 4], v[block * 4 + 1], v[block * 4 + 2], v[block * 4 + 3]};
            }
            if (slice > 0) {
                __syncwarp();
                warp_arrive(summed, lane);
            } else {
                barrier_wait(summed, step % 2);
                if (done < all) expect();
#pragma unroll
                for (int source = 0; source < SOURCES - 1; ++source)
                    add_part(own, sums + ((source * TEAMS + team) * 4 + strip) * (OWN_M / 8) * 128 + lane * 4, OWN_M / 8);
                __syncwarp();
                if (done < all && WAYS > 1) warp_arrive_at<WAYS>(taken, lane);
                if (done < all && WAYS == 1) warp_arrive(taken, lane);
                store(own, rank_k * OWN_M);
            }
            ++step;
        } else if (STREAM_K && (from > 0 || upto < STAGES)) {
            // A block leaves the beginning of a tile to the block that has its end. Warp by warp: a fragment is one warp's.
            const int warp = uniform(index / 32);
            auto left_by = [&](int block) {
                return reinterpret_cast<float*>(workspace + FLAG_BYTES) + (block * (TEAMS * 4) + warp) * (TILE_M / 8 * 128) + lane * 4;
            };
            auto flag_of = [&](int block) { return reinterpret_cast<unsigned*>(workspace) + block * (TEAMS * 4) + warp; };
            if (upto < STAGES) {
                float* const to = left_by(blockIdx.x);
#pragma unroll
                for (int i = 0; i < TILE_M / 8; ++i)
                    *reinterpret_cast<float4*>(to + i * 128) = float4{total[i * 4], total[i * 4 + 1], total[i * 4 + 2], total[i * 4 + 3]};
                __syncwarp();
                if (lane == 0) raise_flag(flag_of(blockIdx.x));
            } else {
                for (int other = worker - 1; from > 0; --other) {
                    const int block = other * CLUSTER + rank;
                    wait_for_flag(flag_of(block));
                    const float* const more = left_by(block);
#pragma unroll
                    for (int i = 0; i < TILE_M / 8; ++i) {
                        const float4 v = load_of_other(more + i * 128);
                        total[i * 4] += v.x, total[i * 4 + 1] += v.y, total[i * 4 + 2] += v.z, total[i * 4 + 3] += v.w;
                    }
                    __syncwarp();
                    if (lane == 0) lower_flag(flag_of(block));
                    if (share_of(other) <= tile * STAGES) break;
                }
                store(total, 0);
            }
        } else {
            store(total, 0);
        }
    }
}
