// s8.cuh of the emulator: the fragments as the PTX ISA lays them out.
#pragma once
#include "scalar.cuh"

constexpr unsigned SEED_BITS = 0x4b400000u;
constexpr float SEED = 12582912.0f;

static void mma_16832_seeded(unsigned (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    auto& words = warp_of().words;
    const int g = self->lane / 4, t = self->lane % 4;
    for (int i = 0; i < 4; ++i) words[self->lane][i] = a[i];
    words[self->lane][4] = b0, words[self->lane][5] = b1;
    warp_barrier();
    for (int i = 0; i < 4; ++i) {
        const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
        int sum = int(SEED_BITS);
        for (int k = 0; k < 32; ++k) {
            const unsigned wa = words[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2];
            const unsigned wb = words[column * 4 + k % 16 / 4][4 + k / 16];
            sum += int(int8_t(wa >> (8 * (k % 4)))) * int(int8_t(wb >> (8 * (k % 4))));
        }
        d[i] = unsigned(sum);
    }
    warp_barrier();
}
static unsigned signed_nibbles(unsigned word) { return (word & 0xf0f0f0f0u) ^ 0x80808080u; }
static int round_away(float v) { return std::isnan(v) ? 0 : int(std::trunc(v + std::copysign(0.49999997f, v))); }
static unsigned pack_bytes(int a, int b, int c, int d) {
    unsigned word = 0;
    const int values[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
        if (values[i] < -128 || values[i] > 127) fail("an integer beyond int8");
        word |= unsigned(values[i] & 255) << (8 * i);
    }
    return word;
}
template <unsigned SELECTOR> static unsigned pick_bytes(unsigned a, unsigned b) {
    const uint64_t both = a | uint64_t(b) << 32;
    unsigned word = 0;
    for (int i = 0; i < 4; ++i) word |= unsigned(both >> (8 * (SELECTOR >> (4 * i) & 7)) & 255) << (8 * i);
    return word;
}
static float as_float(unsigned bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
static unsigned as_bits(float v) {
    unsigned bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}
static unsigned as_bits(half_t v) { return v.bits; }
static half_t as_half(unsigned bits) { return {uint16_t(bits)}; }
static uint4 load_in_order(const uint4* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("a misaligned 16-byte access");
    return *from;
}
static unsigned load_in_order(const unsigned* from) { return *from; }
