// barrier.cuh of the emulator. A barrier is its eight bytes: the phase, arrivals a phase, those still to come, bytes to come.
#pragma once
#include "cuda.h"

using Barrier = unsigned long long;
struct Phases {
    uint16_t phase, count;
    int16_t pending, eights;  // of bytes
    void settle() {
        if (pending == 0 && eights == 0) ++phase, pending = count;
        if (pending < 0) fail("more arrivals than a barrier expects");
    }
};
static_assert(sizeof(Phases) == sizeof(Barrier));
static Phases& phases(Barrier* at, int rank) {
    const size_t address = __cvta_generic_to_shared(at);
    if (address % 8) fail("a misaligned barrier");
    return *reinterpret_cast<Phases*>(shared_at(self->block->cluster->blocks[rank], address, 8));
}
static Phases& phases(Barrier* at) { return phases(at, self->block->rank); }
static void barrier_init(Barrier* at, int count) {
    phases(at) = {0, uint16_t(count), int16_t(count), 0};
}
static void barrier_init_done() {}
static void barrier_expect(Barrier* at, int bytes) {
    phases(at).eights += bytes / 8;
    --phases(at).pending;
    phases(at).settle();
}
static void barrier_arrive(Barrier* at, int rank) {
    --phases(at, rank).pending;
    phases(at, rank).settle();
}
static void barrier_arrive(Barrier* at) { barrier_arrive(at, self->block->rank); }
static void barrier_wait(Barrier* at, int parity) {
    while (phases(at).phase % 2 == parity) swapcontext(&self->context, &scheduler);
    moved = true;
}
static void send(float* to, float a, float b, float c, float d, Barrier* at, int rank) {
    const size_t address = __cvta_generic_to_shared(to);
    if (address % 16) fail("a misaligned store to another block");
    const float values[4] = {a, b, c, d};
    std::memcpy(shared_at(self->block->cluster->blocks[rank], address, 16), values, 16);
    phases(at, rank).eights -= 2;
    phases(at, rank).settle();
}
static void send(float* to, float a, float b, Barrier* at, int rank) {
    const size_t address = __cvta_generic_to_shared(to);
    if (address % 8) fail("a misaligned store to another block");
    const float values[2] = {a, b};
    std::memcpy(shared_at(self->block->cluster->blocks[rank], address, 8), values, 8);
    --phases(at, rank).eights;
    phases(at, rank).settle();
}
static bool elected() { return self->lane == 0; }
static void copy_bulk(void* to_shared, const void* from, int bytes, Barrier* at) {
    const size_t address = __cvta_generic_to_shared(to_shared);
    if (address % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) fail("a misaligned bulk copy");
    std::memcpy(shared_at(*self->block, address, bytes), from, bytes);
    phases(at).eights -= bytes / 8;
    phases(at).settle();
}
