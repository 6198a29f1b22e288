// mma.cuh of the emulator: the fragments as the PTX ISA lays them out, the products in fp32.
#pragma once
#include "scalar.cuh"

static void pin(unsigned&) {}
template <typename T> static void pin(const T*&) {}

template <typename T> static float half_of(unsigned word, int which) {
    T v;
    v.bits = word >> (16 * which);
    return to_float(v);
}
template <typename T> static void mma_16816(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    auto& words = warp_of().words;
    const int g = self->lane / 4, t = self->lane % 4;
    for (int i = 0; i < 4; ++i) words[self->lane][i] = a[i];
    words[self->lane][4] = b0, words[self->lane][5] = b1;
    warp_barrier();
    for (int i = 0; i < 4; ++i) {
        const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
        for (int k = 0; k < 16; ++k) {
            const unsigned wa = words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const unsigned wb = words[column * 4 + k % 8 / 2][4 + k / 8];
            d[i] += half_of<T>(wa, k % 2) * half_of<T>(wb, k % 2);
        }
    }
    warp_barrier();
}
static void load_matrices(unsigned (&r)[4], unsigned address) {
    if (address % 16) fail("a misaligned ldmatrix");
    auto& addresses = warp_of().address;
    addresses[self->lane] = address;
    warp_barrier();
    for (int i = 0; i < 4; ++i)
        std::memcpy(&r[i], shared_at(*self->block, addresses[i * 8 + self->lane / 4], 16) + self->lane % 4 * 4, 4);
    warp_barrier();
}
static void load_matrices(unsigned (&r)[4], const void* row) { load_matrices(r, unsigned(__cvta_generic_to_shared(row))); }
static void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    auto& addresses = warp_of().address;
    addresses[self->lane] = __cvta_generic_to_shared(row);
    if (addresses[self->lane] % 16) fail("a misaligned ldmatrix");
    warp_barrier();
    for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e)
            std::memcpy(reinterpret_cast<unsigned char*>(&r[i]) + 2 * e,
                        shared_at(*self->block, addresses[i * 8 + self->lane % 4 * 2 + e], 16) + self->lane / 4 * 2, 2);
    warp_barrier();
}
static unsigned transposed(unsigned of) {
    auto& words = warp_of().words;
    words[self->lane][0] = of;
    warp_barrier();
    unsigned d = 0;
    const int row = self->lane / 4;
    for (int e = 0; e < 2; ++e) d |= (words[(self->lane % 4 * 2 + e) * 4 + row / 2][0] >> 16 * (row % 2) & 0xffff) << 16 * e;
    warp_barrier();
    return d;
}
struct Split {
    unsigned high, low;
};
static unsigned to_tf32(float v) {  // nearest, ties away; infinities and NaN as they are
    const unsigned bits = __float_as_uint(v);
    return std::isfinite(v) ? (bits + 0x1000u) & 0xffffe000u : bits;
}
static Split split(float v) {
    const unsigned high = to_tf32(v);
    return {high, to_tf32(v - __int_as_float(int(high)))};
}
static void mma_split(float (&d)[4], const Split (&a)[4], Split b0, Split b1) {
    auto& words = warp_of().words;
    const int g = self->lane / 4, t = self->lane % 4;
    const unsigned parts[3][6] = {{a[0].low, a[1].low, a[2].low, a[3].low, b0.high, b1.high},
                                  {a[0].high, a[1].high, a[2].high, a[3].high, b0.low, b1.low},
                                  {a[0].high, a[1].high, a[2].high, a[3].high, b0.high, b1.high}};
    for (const auto& part : parts) {
        for (int i = 0; i < 6; ++i) words[self->lane][i] = part[i];
        warp_barrier();
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 8; ++k)
                d[i] += __int_as_float(int(words[g * 4 + k % 4][i / 2 + k / 4 * 2])) *
                        __int_as_float(int(words[(2 * t + i % 2) * 4 + k % 4][4 + k / 4]));
        warp_barrier();
    }
}
static void store_transposed(unsigned first, unsigned second, void* row) {
    auto& warp = warp_of();
    warp.address[self->lane] = __cvta_generic_to_shared(row);
    warp.words[self->lane][0] = first, warp.words[self->lane][1] = second;
    warp_barrier();
    if (self->lane < 16) {
        const int matrix = self->lane / 8, r = self->lane % 8;
        if (warp.address[self->lane] % 16) fail("a misaligned stmatrix");
        unsigned char* const to = shared_at(*self->block, warp.address[self->lane], 16);
        for (int c = 0; c < 8; ++c) {
            const uint16_t value = warp.words[c * 4 + r / 2][matrix] >> (16 * (r % 2));
            std::memcpy(to + c * 2, &value, 2);
        }
    }
    warp_barrier();
}
