// Norm: LayerNorm or RMSNorm of a sum of one to three tensors, with the residual additions around it.
//
// Computes      h = x0 (+ x1 (+ x2)), in fp32, not rounded before the statistics
//               LayerNorm:  y = (h - mean(h)) / sqrt(var(h) + eps) * weight (+ bias) (+ after)
//               RMSNorm:    y = h / sqrt(mean(h^2) + eps) * weight
//               NORMS == 2: a second y from the same statistics with its own weight and bias
//               STORE_SUM:  sum = h rounded to T
// Tensors       x0 x1 x2 after y1 y2 sum: T [rows, HIDDEN], contiguous; w1 b1 w2 b2: T [HIDDEN];
//               all aligned to VEC * sizeof(T) bytes; unused ones are null
// Layout        a row is HIDDEN / VEC vectors; of the row's threads, t owns vectors t, t + THREADS, t + 2 * THREADS, ...
//               so that a warp reads 32 consecutive vectors (512 bytes at 16 bytes a vector)
// Mapping       block b, group g of THREADS threads -> row b * ROWS + g. With CLUSTER > 1 that many blocks share a row
//               and their threads count through: row = cluster, and t runs over CLUSTER * THREADS threads
// Shared memory partial: 3 floats a warp (mean, sum and sum of squares of the deviations from it), at most 384 bytes
// Constants     T: float, half_t, bf16_t; ADDENDS: 1..3;
//               VEC: elements a vector, a power of two up to 16 / sizeof(T) that divides HIDDEN;
//               RMS, BIAS, AFTER, STORE_SUM: 0/1; NORMS: 1..2;
//               THREADS: threads a row in this block, 4, 8, 16 or whole warps up to 1024; ROWS: rows a block;
//               CLUSTER: blocks a row, 1..8
//               KEEP: 1 keeps the row in registers, 0 reads it again in each pass (rows too wide for registers)
//               EARLY: 1 asks for weights and biases together with the row and keeps them in registers, for few rows
//               AHEAD: 1 brings the row into L2 while the previous kernel still runs, for few rows
//               STREAM: 1 reads rows past L1 and writes them as the first to leave L2
// Roof          memory: (inputs + outputs) * rows * HIDDEN * sizeof(T) bytes when KEEP; the weights stay in cache
// Source        own work. Statistics: each warp takes the deviations from its own mean, then the warps are merged
//               (Chan, Golub and LeVeque 1983), because E[x^2] - E[x]^2 loses everything at mean 1e4 and deviation 1.
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

static_assert(HIDDEN >= 1, "a row has at least one element");
static_assert(HIDDEN % VEC == 0, "a row must be a whole number of vectors");
static_assert(VEC * sizeof(T) <= 16, "a vector is at most 16 bytes");
static_assert(ADDENDS >= 1 && ADDENDS <= 3, "one to three tensors are summed");
static_assert(NORMS == 1 || NORMS == 2, "one or two outputs share the statistics");
static_assert(THREADS % 32 == 0 || THREADS == 4 || THREADS == 8 || THREADS == 16, "whole warps or a part of one");
static_assert(THREADS * ROWS % 32 == 0 && THREADS * ROWS <= 1024, "a block is whole warps, at most 32");
static_assert(ROWS <= 15 || THREADS <= 32, "a row of several warps needs a barrier of its own");
static_assert(CLUSTER == 1 || (ROWS == 1 && CLUSTER * THREADS <= 8192), "a cluster of up to 8 blocks shares one row");

constexpr int VECTORS = HIDDEN / VEC;
constexpr int ACROSS = CLUSTER * THREADS;  // threads a row
constexpr int PER_THREAD = (VECTORS + ACROSS - 1) / ACROSS;
static_assert(VECTORS + (THREADS < 32 ? THREADS : 32) > ACROSS, "every warp owns a part of the row");
static_assert(!KEEP || PER_THREAD * VEC <= 32, "what a thread keeps must fit in registers");
static_assert(!EARLY || (KEEP && PER_THREAD * VEC <= 16), "early weights must fit in registers");
static_assert(!STREAM || VEC * sizeof(T) == 16, "streaming accesses are 16 bytes");
// The residual that is added last is asked for together with the row, so that its reading does not wait for the
// statistics. So are the weights if the rows are few: later, with many blocks on an SM, they come from cache, and their
// registers cost more than the wait.
constexpr bool EARLY_AFTER = AFTER && KEEP;
constexpr int OPERANDS = NORMS * (1 + BIAS);
constexpr int LANES = THREADS < 32 ? THREADS : 32;  // threads of a warp that share a row
constexpr int WARPS = ACROSS / LANES;               // warps a row
constexpr int WARPS_HERE = THREADS / LANES;         // of them in this block
constexpr int MERGE = WARPS > 16 ? 32 : WARPS > 8 ? 16 : WARPS > 4 ? 8 : WARPS > 2 ? 4 : 2;  // threads that merge them

// A vector, now: `volatile` keeps the compiler from moving the load down to its first use.
__device__ __forceinline__ Vector<T, VEC> load_now(const T* from) {
    Vector<T, VEC> v;
    if constexpr (sizeof(v) == 16) {
        uint4& w = reinterpret_cast<uint4&>(v);
        asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                     : "l"(from));
    } else {
        v = *reinterpret_cast<const Vector<T, VEC>*>(from);
    }
    return v;
}

// Part of a row, which is read once and written once.
__device__ __forceinline__ Vector<T, VEC> load_row(const T* from) {
    Vector<T, VEC> v;
    if constexpr (STREAM) reinterpret_cast<uint4&>(v) = load_streaming(reinterpret_cast<const uint4*>(from));
    else v = *reinterpret_cast<const Vector<T, VEC>*>(from);
    return v;
}
__device__ __forceinline__ void store_row(T* to, const float (&values)[VEC]) {
    const Vector<T, VEC> v = rounded<T>(values);
    if constexpr (STREAM) __stcs(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(v));
    else *reinterpret_cast<Vector<T, VEC>*>(to) = v;
}

// Elements of the row that the 32 threads of one of its warps own.
__device__ __forceinline__ int owned(int warp) {
    if constexpr (VECTORS % ACROSS == 0) return PER_THREAD * LANES * VEC;
    int vectors = 0;
#pragma unroll(PER_THREAD <= 8 ? PER_THREAD : 1)
    for (int i = 0; i < PER_THREAD; ++i) vectors += min(max(VECTORS - i * ACROSS - warp * LANES, 0), LANES);
    return vectors * VEC;
}

extern "C" __global__ void __launch_bounds__(THREADS * ROWS, 1)
norm_kernel(const T* __restrict__ x0, const T* __restrict__ x1, const T* __restrict__ x2,
            const T* __restrict__ after, const T* __restrict__ w1, const T* __restrict__ b1,
            const T* __restrict__ w2, const T* __restrict__ b2, T* __restrict__ y1, T* __restrict__ y2,
            T* __restrict__ sum, long long rows, double eps) {
    __shared__ float partial[WARPS > 1 ? ROWS : 1][3][WARPS_HERE];
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int group = ROWS > 1 ? threadIdx.x / THREADS : 0, here = ROWS > 1 ? threadIdx.x % THREADS : threadIdx.x;
    const int thread = rank * THREADS + here, lane = here % LANES;
    const long long first_row = static_cast<long long>(CLUSTER > 1 ? blockIdx.x / CLUSTER : blockIdx.x) * ROWS + group;
    const long long stride = static_cast<long long>(CLUSTER > 1 ? gridDim.x / CLUSTER : gridDim.x) * ROWS;
    float kept[KEEP ? PER_THREAD : 1][VEC];
    Vector<T, VEC> residual[EARLY_AFTER ? PER_THREAD : 1], operand[EARLY ? PER_THREAD : 1][OPERANDS];

    bool active = true;  // this thread has a row
    // body(i, column) for each vector this thread owns; i indexes `kept`, so it must unroll when KEEP.
    auto for_each_vector = [&](auto body) {
#pragma unroll(KEEP ? PER_THREAD : 1)
        for (int i = 0; i < PER_THREAD; ++i) {
            const int vector = thread + i * ACROSS;
            if ((VECTORS % ACROSS == 0 || vector < VECTORS) && active) body(i, vector * VEC);
        }
    };
    // Everyone who shares the row, and what they wrote to shared memory.
    auto sync_row = [&] {
        if constexpr (CLUSTER > 1) cluster_sync();
        else if constexpr (ROWS > 1) sync_part(1 + group, THREADS);
        else __syncthreads();
    };

    if constexpr (AHEAD) {
        if (first_row < rows) {
            for_each_vector([&](int, int column) {
                const long long at = first_row * HIDDEN + column;
                prefetch_l2(x0 + at);
                if constexpr (ADDENDS >= 2) prefetch_l2(x1 + at);
                if constexpr (ADDENDS >= 3) prefetch_l2(x2 + at);
                if constexpr (AFTER) prefetch_l2(after + at);
                prefetch_l2(w1 + column);
                if constexpr (BIAS) prefetch_l2(b1 + column);
                if constexpr (NORMS == 2) prefetch_l2(w2 + column);
                if constexpr (NORMS == 2 && BIAS) prefetch_l2(b2 + column);
            });
        }
    }
    wait_for_previous();
    allow_next();

    // Warps that several rows share leave the loop together, as they shuffle together.
    const long long last_row = LANES < 32 ? (rows + 32 / LANES - 1) / (32 / LANES) * (32 / LANES) : rows;
    for (long long row = first_row; row < last_row; row += stride) {
        if constexpr (LANES < 32) active = row < rows;
        const long long start = row * HIDDEN;
        auto read_sum = [&](int column, float (&h)[VEC]) {
            auto add = [&](const T* x) {
                const Vector<T, VEC> addend = load_row(x + start + column);
#pragma unroll
                for (int e = 0; e < VEC; ++e) h[e] += to_float(addend.lane[e]);
            };
            const Vector<T, VEC> v = load_row(x0 + start + column);
#pragma unroll
            for (int e = 0; e < VEC; ++e) h[e] = to_float(v.lane[e]);
            if constexpr (ADDENDS >= 2) add(x1);
            if constexpr (ADDENDS >= 3) add(x2);
        };
        auto values_of = [&](int i, int column, float (&h)[VEC]) {
            if constexpr (KEEP) {
#pragma unroll
                for (int e = 0; e < VEC; ++e) h[e] = kept[i][e];
            } else {
                read_sum(column, h);
            }
        };

        // Phase 1: read the row once and write the sum.
        float total = 0.0f;
        for_each_vector([&](int i, int column) {
            float h[VEC];
            if constexpr (EARLY_AFTER) residual[i] = load_row(after + start + column);
            read_sum(column, h);
            if constexpr (EARLY) {
                operand[i][0] = load_now(w1 + column);
                if constexpr (BIAS) operand[i][1] = load_now(b1 + column);
                if constexpr (NORMS == 2) operand[i][1 + BIAS] = load_now(w2 + column);
                if constexpr (NORMS == 2 && BIAS) operand[i][3] = load_now(b2 + column);
            }
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                total += RMS ? h[e] * h[e] : h[e];
                if constexpr (KEEP) kept[i][e] = h[e];
            }
            if constexpr (STORE_SUM) store_row(sum + start + column, h);
        });

        // Phase 2: statistics, with one barrier. A warp's deviations from its own mean are exact where the mean is
        // large, whatever the mean's rounding.
        float mean = 0.0f, first = 0.0f, second = total;
        if constexpr (!RMS) {
            mean = __fdividef(warp_sum<LANES>(total), owned(thread / LANES));
            second = 0.0f;
            for_each_vector([&](int i, int column) {
                float h[VEC];
                values_of(i, column, h);
#pragma unroll
                for (int e = 0; e < VEC; ++e) {
                    const float deviation = h[e] - mean;
                    first += deviation;
                    second += deviation * deviation;
                }
            });
            first = warp_sum<LANES>(first);
        }
        second = warp_sum<LANES>(second);
        float centre = mean;
        if constexpr (WARPS > 1) {
            float* mine = &partial[group][0][here / LANES];
            if (lane == 0) mine[0] = mean, mine[WARPS_HERE] = first, mine[2 * WARPS_HERE] = second;
            sync_row();
            // Merge: the same sums about the row's first warp's mean, whose own rounding `off` mends.
            auto of_warp = [&](int which, int warp) {
                const float* at = &partial[group][which][warp % WARPS_HERE];
                return CLUSTER > 1 ? cluster_load(at, warp / WARPS_HERE) : *at;
            };
            centre = RMS ? 0.0f : of_warp(0, 0);
            first = second = 0.0f;
#pragma unroll
            for (int warp = lane % MERGE; warp < WARPS; warp += 32) {
                const float sum2 = of_warp(2, warp);
                if constexpr (RMS) {
                    second += sum2;
                } else {
                    const float apart = of_warp(0, warp) - centre, sum1 = of_warp(1, warp), count = owned(warp);
                    first += sum1 + count * apart;
                    second += sum2 + apart * (2.0f * sum1 + count * apart);
                }
            }
            if constexpr (!RMS) first = warp_sum<MERGE>(first);
            second = warp_sum<MERGE>(second);
        }
        constexpr float PER_ELEMENT = 1.0f / HIDDEN;
        const float off = first * PER_ELEMENT;
        float variance = fmaxf(second * PER_ELEMENT - off * off, 0.0f);
        // fmaxf drops a NaN: give it back, so that a row with a NaN or an Inf comes out as NaN.
        if (isnan(second)) variance = second;
        const float scale = rsqrtf(variance + float(eps));  // within 2 units in the last place

        // Phase 3: normalise and write.
        for_each_vector([&](int i, int column) {
            float h[VEC];
            values_of(i, column, h);
#pragma unroll
            for (int e = 0; e < VEC; ++e) h[e] = RMS ? h[e] * scale : ((h[e] - centre) - off) * scale;
            auto take = [&](int slot, const T* from) {
                if constexpr (EARLY) return operand[i][slot];
                else return *reinterpret_cast<const Vector<T, VEC>*>(from + column);
            };
            auto write = [&](int slot, const T* weight, const T* bias, T* y) {
                float result[VEC];
                Vector<T, VEC> other = take(slot, weight);
#pragma unroll
                for (int e = 0; e < VEC; ++e) result[e] = h[e] * to_float(other.lane[e]);
                if constexpr (BIAS) {
                    other = take(slot + 1, bias);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) result[e] += to_float(other.lane[e]);
                }
                if constexpr (AFTER) {
                    other = EARLY_AFTER ? residual[i] : load_row(after + start + column);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) result[e] += to_float(other.lane[e]);
                }
                store_row(y + start + column, result);
            };
            write(0, w1, b1, y1);
            if constexpr (NORMS == 2) write(1 + BIAS, w2, b2, y2);
        });
        // The next row's phase 1 writes `partial` again, and no block leaves while another reads from it.
        if (CLUSTER > 1 || (WARPS > 1 && row + stride < rows)) sync_row();
    }
}
