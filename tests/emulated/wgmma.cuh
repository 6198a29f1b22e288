// wgmma.cuh of the emulator: a warp's sixteen rows at a time, which is all that a warp gives and gets; products in fp32.
#pragma once
#include "mma.cuh"

static void wgmma_fence() {}
static void wgmma_commit() {}
template <int PENDING> static void wgmma_wait() {}
template <typename D, int COUNT> static void arrived(D (&)[COUNT]) {}
static void fence_async() {}
static unsigned wgmma_rows(const void* where) {
    const size_t at = __cvta_generic_to_shared(where);
    if (at % 1024) fail("a tile of B that does not begin at a multiple of 1024 bytes");
    return at >> 4;
}
// Where in the low half; how far 64 columns are from the next 64 in the high one, both in units of 16 bytes.
static unsigned wgmma_columns(const void* where, int apart) { return wgmma_rows(where) | unsigned(apart / 16) << 16; }
// `place(k, column)`: where an element of B is, before it is swizzled.
template <typename T, int COUNT, typename Place>
static void wgmma_of(float (&d)[COUNT], const unsigned (&a)[4], int add, Place place) {
    auto& words = warp_of().words;
    const int g = self->lane / 4, t = self->lane % 4;
    for (int i = 0; i < 4; ++i) words[self->lane][i] = a[i];
    warp_barrier();
    for (int i = 0; i < COUNT; ++i) {
        const int row = g + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + 2 * t + i % 2;
        float sum = add ? d[i] : 0.0f;
        for (int k = 0; k < 16; ++k) {
            size_t at = place(k, column);
            at ^= at >> 3 & 0x70;
            uint16_t bits;
            std::memcpy(&bits, shared_at(*self->block, at, 2), 2);
            sum += half_of<T>(words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) * half_of<T>(bits, 0);
        }
        d[i] = sum;
    }
    warp_barrier();
}
template <typename T, int COUNT>
static void wgmma_add(float (&d)[COUNT], const unsigned (&a)[4], unsigned b, int add) {
    wgmma_of<T>(d, a, add, [&](int k, int column) { return size_t(b) * 16 + column / 8 * 1024 + column % 8 * 128 + k * 2; });
}
template <typename T, int COUNT>
static void wgmma_add_columns(float (&d)[COUNT], const unsigned (&a)[4], unsigned b, int add) {
    wgmma_of<T>(d, a, add, [&](int k, int column) {
        return size_t(b & 0xffff) * 16 + column / 64 * size_t(b >> 16) * 16 + k * 128 + column % 64 * 2;
    });
}
static unsigned wgmma_pieces(const void* where, int apart) {
    const size_t at = __cvta_generic_to_shared(where);
    if (at % 16 || apart % 16) fail("pieces of B that do not begin at multiples of 16 bytes");
    return unsigned(at >> 4) | unsigned(apart / 16) << 16;
}
template <int COUNT> static void wgmma_add_pieces(int (&d)[COUNT], const unsigned (&a)[4], unsigned b) {
    auto& words = warp_of().words;
    const int g = self->lane / 4, t = self->lane % 4;
    for (int i = 0; i < 4; ++i) words[self->lane][i] = a[i];
    warp_barrier();
    for (int i = 0; i < COUNT; ++i) {
        const int row = g + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + 2 * t + i % 2;
        for (int k = 0; k < 32; ++k) {
            const size_t at = size_t(b & 0xffff) * 16 + k / 16 * size_t(b >> 16) * 16 + column * 16 + k % 16;
            const unsigned word = words[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2];
            d[i] += int(uint8_t(word >> (k % 4 * 8))) * int(int8_t(*shared_at(*self->block, at, 1)));
        }
    }
    warp_barrier();
}
template <int COUNT> static void wgmma_add(int (&d)[COUNT], const unsigned (&a)[4], unsigned b, int add) {
    auto& words = warp_of().words;
    const int g = self->lane / 4, t = self->lane % 4;
    for (int i = 0; i < 4; ++i) words[self->lane][i] = a[i];
    warp_barrier();
    for (int i = 0; i < COUNT; ++i) {
        const int row = g + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + 2 * t + i % 2;
        int sum = add ? d[i] : 0;
        for (int k = 0; k < 32; ++k) {
            size_t at = size_t(b) * 16 + column / 8 * 1024 + column % 8 * 128 + k;
            at ^= at >> 3 & 0x70;
            const unsigned word = words[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2];
            sum += int(int8_t(word >> (k % 4 * 8))) * int(int8_t(*shared_at(*self->block, at, 1)));
        }
        d[i] = sum;
    }
    warp_barrier();
}
