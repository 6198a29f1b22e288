// Norm: LayerNorm or RMSNorm of a sum of one to three tensors, with the residual additions around it.
//
// Computes      h = x0 (+ x1 (+ x2)), in fp32, not rounded before the statistics
//               LayerNorm:  y = (h - mean(h)) / sqrt(var(h) + eps) * weight (+ bias) (+ after)
//               RMSNorm:    y = h / sqrt(mean(h^2) + eps) * weight
//               NORMS == 2: a second y from the same statistics with its own weight and bias
//               STORE_SUM:  sum = h rounded to T
// Tensors       x0 x1 x2 after y1 y2 sum: T [rows, HIDDEN], contiguous; w1 b1 w2 b2: T [HIDDEN];
//               all aligned to VEC * sizeof(T) bytes; unused ones are null
// Layout        a row is HIDDEN / VEC vectors; thread t owns vectors t, t + THREADS, t + 2 * THREADS, ...
//               so that a warp reads 32 consecutive vectors (512 bytes at 16 bytes a vector)
// Mapping       block b -> rows b, b + gridDim.x, ...; one row at a time
// Shared memory partial: 3 floats a warp (mean, sum and sum of squares of the deviations from it), at most 384 bytes
// Constants     T: float, half_t, bf16_t; VEC: 1 or 16 / sizeof(T); THREADS: 32..1024; ADDENDS: 1..3;
//               RMS, BIAS, AFTER, STORE_SUM: 0/1; NORMS: 1..2;
//               KEEP: 1 keeps the row in registers, 0 reads it again in each pass (rows too wide for registers)
//               EARLY: 1 asks for weights and biases together with the row and keeps them in registers, for few rows
// Roof          memory: (inputs + outputs) * rows * HIDDEN * sizeof(T) bytes when KEEP; the weights stay in cache
// Source        own work. Statistics: each warp takes the deviations from its own mean, then the warps are merged
//               (Chan, Golub and LeVeque 1983), because E[x^2] - E[x]^2 loses everything at mean 1e4 and deviation 1.
#include "reduce.cuh"
#include "vectors.cuh"

static_assert(HIDDEN >= 1, "a row has at least one element");
static_assert(HIDDEN % VEC == 0, "a row must be a whole number of vectors");
static_assert(VEC * sizeof(T) <= 16, "a vector is at most 16 bytes");
static_assert(ADDENDS >= 1 && ADDENDS <= 3, "one to three tensors are summed");
static_assert(NORMS == 1 || NORMS == 2, "one or two outputs share the statistics");

constexpr int VECTORS = HIDDEN / VEC;
constexpr int PER_THREAD = (VECTORS + THREADS - 1) / THREADS;
static_assert(!KEEP || PER_THREAD * VEC <= 32, "a thread keeps at most 32 values in registers");
static_assert(!EARLY || (KEEP && PER_THREAD <= 2), "early weights must fit in registers beside the row");
// The residual that is added last is asked for together with the row, so that its reading does not wait for the
// statistics. So are the weights if the rows are few: later, with many blocks on an SM, they come from cache, and their
// registers cost more than the wait.
constexpr bool EARLY_AFTER = AFTER && KEEP;
constexpr int OPERANDS = NORMS * (1 + BIAS);

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

// Elements of the row that a warp's 32 threads own.
__device__ __forceinline__ int owned(int warp) {
    if constexpr (VECTORS % THREADS == 0) return PER_THREAD * 32 * VEC;
    int vectors = 0;
#pragma unroll(PER_THREAD <= 8 ? PER_THREAD : 1)
    for (int i = 0; i < PER_THREAD; ++i) vectors += min(max(VECTORS - i * THREADS - warp * 32, 0), 32);
    return vectors * VEC;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
norm_kernel(const T* __restrict__ x0, const T* __restrict__ x1, const T* __restrict__ x2,
            const T* __restrict__ after, const T* __restrict__ w1, const T* __restrict__ b1,
            const T* __restrict__ w2, const T* __restrict__ b2, T* __restrict__ y1, T* __restrict__ y2,
            T* __restrict__ sum, long long rows, double eps) {
    constexpr int WARPS = THREADS / 32;
    __shared__ float partial[3 * WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float kept[KEEP ? PER_THREAD : 1][VEC];
    Vector<T, VEC> residual[EARLY_AFTER ? PER_THREAD : 1], operand[EARLY ? PER_THREAD : 1][OPERANDS];

    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const long long start = row * HIDDEN;

        // body(i, vector) for each vector this thread owns; i indexes `kept`, so it must unroll when KEEP.
        auto for_each_vector = [&](auto body) {
#pragma unroll(KEEP ? PER_THREAD : 1)
            for (int i = 0; i < PER_THREAD; ++i) {
                const int vector = threadIdx.x + i * THREADS;
                if (VECTORS % THREADS == 0 || vector < VECTORS) body(i, vector * VEC);
            }
        };
        auto read_sum = [&](int column, float (&h)[VEC]) {
            load_vector(x0 + start + column, h);
            float addend[VEC];
            if constexpr (ADDENDS >= 2) {
                load_vector(x1 + start + column, addend);
#pragma unroll
                for (int e = 0; e < VEC; ++e) h[e] += addend[e];
            }
            if constexpr (ADDENDS >= 3) {
                load_vector(x2 + start + column, addend);
#pragma unroll
                for (int e = 0; e < VEC; ++e) h[e] += addend[e];
            }
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
            if constexpr (EARLY_AFTER) residual[i] = *reinterpret_cast<const Vector<T, VEC>*>(after + start + column);
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
            if constexpr (STORE_SUM) store_vector(sum + start + column, h);
        });

        // Phase 2: statistics, with one barrier.
        float centre = 0.0f, shift = 0.0f, variance;
        if constexpr (RMS) {
            variance = block_sum<THREADS>(total, partial) / HIDDEN;
        } else {
            // A warp's deviations from its own mean are exact where the mean is large, whatever the mean's rounding.
            const float mean = warp_sum(total) / owned(warp);
            float first = 0.0f, second = 0.0f;
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
            first = warp_sum(first);
            second = warp_sum(second);
            centre = mean;
            if constexpr (WARPS > 1) {
                if (lane == 0) partial[warp] = mean, partial[WARPS + warp] = first, partial[2 * WARPS + warp] = second;
                __syncthreads();
                // Merge: the same sums about the first warp's mean, whose own rounding the shift mends.
                centre = partial[0];
                const int other = lane < WARPS ? lane : 0;
                const float apart = partial[other] - centre, sum1 = partial[WARPS + other];
                const float count = owned(other);
                first = warp_sum(lane < WARPS ? sum1 + count * apart : 0.0f);
                second = warp_sum(
                    lane < WARPS ? partial[2 * WARPS + other] + apart * (2.0f * sum1 + count * apart) : 0.0f);
            }
            shift = first / HIDDEN;
            variance = fmaxf(second / HIDDEN - shift * shift, 0.0f);
            // fmaxf drops a NaN: give it back, so that a row with a NaN or an Inf comes out as NaN.
            if (isnan(second)) variance = second;
        }
        const float scale = 1.0f / sqrtf(variance + float(eps));

        // Phase 3: normalise and write.
        for_each_vector([&](int i, int column) {
            float h[VEC];
            values_of(i, column, h);
#pragma unroll
            for (int e = 0; e < VEC; ++e) h[e] = ((h[e] - centre) - shift) * scale;
            auto take = [&](int slot, const T* from, float (&values)[VEC]) {
                if constexpr (EARLY) {
#pragma unroll
                    for (int e = 0; e < VEC; ++e) values[e] = to_float(operand[i][slot].lane[e]);
                } else {
                    load_vector(from + column, values);
                }
            };
            auto write = [&](int slot, const T* weight, const T* bias, T* y) {
                float result[VEC], other[VEC];
                take(slot, weight, other);
#pragma unroll
                for (int e = 0; e < VEC; ++e) result[e] = h[e] * other[e];
                if constexpr (BIAS) {
                    take(slot + 1, bias, other);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) result[e] += other[e];
                }
                if constexpr (AFTER) {
                    if constexpr (!EARLY_AFTER) load_vector(after + start + column, other);
#pragma unroll
                    for (int e = 0; e < VEC; ++e)
                        result[e] += EARLY_AFTER ? to_float(residual[i].lane[e]) : other[e];
                }
                store_vector(y + start + column, result);
            };
            write(0, w1, b1, y1);
            if constexpr (NORMS == 2) write(1 + BIAS, w2, b2, y2);
        });
        // The next row's phase 1 writes `partial` again; its readers of this row must be done.
        __syncthreads();
    }
}
