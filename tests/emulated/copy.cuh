// copy.cuh of the emulator: copies arrive at once.
#pragma once
#include "cuda.h"

static void aligned(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16) fail("a misaligned 16-byte access");
}
static void copy_async_16(void* to_shared, const void* from, bool valid) {
    aligned(to_shared);
    aligned(from);
    if (valid) std::memcpy(to_shared, from, 16);
    else std::memset(to_shared, 0, 16);
}
template <int BYTES> static void copy_async(void* to_shared, const void* from) {
    if (reinterpret_cast<uintptr_t>(to_shared) % BYTES || reinterpret_cast<uintptr_t>(from) % BYTES) fail("a misaligned copy");
    std::memcpy(to_shared, from, BYTES);
}
static void commit_copies() {}
template <int PENDING> static void wait_copies() {}
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
