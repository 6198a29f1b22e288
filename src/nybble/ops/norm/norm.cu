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
// Shared memory partial: 3 floats a warp (row sum; shifted sum and sum of squares), at most 384 bytes
// Constants     T: float, half_t, bf16_t; VEC: 1 or 16 / sizeof(T); THREADS: 32..1024; ADDENDS: 1..3;
//               RMS, BIAS, AFTER, STORE_SUM: 0/1; NORMS: 1..2;
//               KEEP: 1 keeps the row in registers, 0 reads it again in each pass (rows too wide for registers)
// Roof          memory: (inputs + outputs) * rows * HIDDEN * sizeof(T) bytes when KEEP; the weights stay in cache
// Source        own work. Statistics: two passes over registers with a shifted mean (Chan, Golub and LeVeque 1983),
//               because E[x^2] - E[x]^2 loses everything at mean 1e4 and deviation 1.
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
// The residual that is added last is asked for together with the row, so that its reading does not wait for the
// statistics. The weights are not: they come from cache, and their registers cost more than their wait.
constexpr bool EARLY = AFTER && KEEP;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
norm_kernel(const T* __restrict__ x0, const T* __restrict__ x1, const T* __restrict__ x2,
            const T* __restrict__ after, const T* __restrict__ w1, const T* __restrict__ b1,
            const T* __restrict__ w2, const T* __restrict__ b2, T* __restrict__ y1, T* __restrict__ y2,
            T* __restrict__ sum, long long rows, double eps) {
    __shared__ float partial[3 * (THREADS / 32)];
    float kept[KEEP ? PER_THREAD : 1][VEC];
    Vector<T, VEC> residual[EARLY ? PER_THREAD : 1];

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

        // Phase 1: read the row once, write the sum, and find the mean (LayerNorm).
        float total[1] = {0.0f};
        for_each_vector([&](int i, int column) {
            float h[VEC];
            if constexpr (EARLY) residual[i] = *reinterpret_cast<const Vector<T, VEC>*>(after + start + column);
            read_sum(column, h);
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                total[0] += RMS ? h[e] * h[e] : h[e];
                if constexpr (KEEP) kept[i][e] = h[e];
            }
            if constexpr (STORE_SUM) store_vector(sum + start + column, h);
        });
        block_sum<THREADS>(total, partial);

        // Phase 2: deviations from that mean. Their own mean (shift) mends the rounding of the first one: at mean 1e4
        // the fp32 sum is off by about 1e-3 deviations, the shift by about 1e-7.
        float centre = 0.0f, shift = 0.0f, variance;
        if constexpr (RMS) {
            variance = total[0] / HIDDEN;
        } else {
            centre = total[0] / HIDDEN;
            float moments[2] = {0.0f, 0.0f};
            for_each_vector([&](int i, int column) {
                float h[VEC];
                values_of(i, column, h);
#pragma unroll
                for (int e = 0; e < VEC; ++e) {
                    const float deviation = h[e] - centre;
                    moments[0] += deviation;
                    moments[1] += deviation * deviation;
                }
            });
            block_sum<THREADS>(moments, partial + THREADS / 32);
            shift = moments[0] / HIDDEN;
            variance = fmaxf(moments[1] / HIDDEN - shift * shift, 0.0f);
            // fmaxf drops a NaN: give it back, so that a row with a NaN or an Inf comes out as NaN.
            if (isnan(moments[1])) variance = moments[1];
        }
        const float scale = 1.0f / sqrtf(variance + float(eps));

        // Phase 3: normalise and write.
        for_each_vector([&](int i, int column) {
            float h[VEC], gain[VEC], extra[VEC];
            values_of(i, column, h);
#pragma unroll
            for (int e = 0; e < VEC; ++e) h[e] = ((h[e] - centre) - shift) * scale;
            auto write = [&](const T* weight, const T* bias, T* y) {
                float result[VEC];
                load_vector(weight + column, gain);
#pragma unroll
                for (int e = 0; e < VEC; ++e) result[e] = h[e] * gain[e];
                if constexpr (BIAS) {
                    load_vector(bias + column, extra);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) result[e] += extra[e];
                }
                if constexpr (AFTER) {
                    if constexpr (!EARLY) load_vector(after + start + column, extra);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) result[e] += EARLY ? to_float(residual[i].lane[e]) : extra[e];
                }
                store_vector(y + start + column, result);
            };
            write(w1, b1, y1);
            if constexpr (NORMS == 2) write(w2, b2, y2);
        });
        // The next row's phase 1 writes `partial` again; its readers of this row must be done.
        __syncthreads();
    }
}
