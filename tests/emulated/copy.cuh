// copy.cuh of the emulator: copies read when they are asked for, and arrive when their thread waits for them.
#pragma once
#include <array>

#include "cuda.h"

static void aligned(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16) fail("a misaligned 16-byte access");
}
template <int BYTES> static std::array<char, BYTES> read(const void* from) {
    std::array<char, BYTES> bytes;
    std::memcpy(bytes.data(), from, BYTES);
    return bytes;
}
static void copy_async_16(void* to_shared, const void* from, bool valid) {
    aligned(to_shared);
    aligned(from);
    self->copies.back().push_back([to_shared, bytes = valid ? read<16>(from) : std::array<char, 16>{}] { std::memcpy(to_shared, bytes.data(), 16); });
}
template <int BYTES> static void copy_async(void* to_shared, const void* from) {
    if (reinterpret_cast<uintptr_t>(to_shared) % BYTES || reinterpret_cast<uintptr_t>(from) % BYTES) fail("a misaligned copy");
    self->copies.back().push_back([to_shared, bytes = read<BYTES>(from)] { std::memcpy(to_shared, bytes.data(), BYTES); });
}
static void commit_copies() { self->copies.emplace_back(); }
template <int PENDING> static void wait_copies() {
    for (int left = int(self->copies.size()) - 1 - PENDING, i = 0; i < left; ++i) {
        for (const auto& copy : self->copies.front()) copy();
        self->copies.erase(self->copies.begin());
    }
}
static uint4 load_streaming(const uint4* from) {
    aligned(from);
    return *from;
}
template <typename Value> static Value load_of(const Value* from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(Value)) fail("a misaligned access");
    return *from;
}
static uint2 load_streaming(const uint2* from) { return load_of(from); }
static unsigned load_streaming(const unsigned* from) { return load_of(from); }
static unsigned load_streaming(const unsigned short* from) { return load_of(from); }
static uint4 load_early(const uint4* from) { return load_streaming(from); }
static void sync_part(int id, int threads) { wait_at(self->block->named[id], threads); }
