// cluster.cuh of the emulator.
#pragma once
#include "cuda.h"

static int cluster_rank() { return self->block->rank; }
static void cluster_sync() { wait_at(self->block->cluster->barrier, self->block->cluster->threads); }
static void cluster_arrive() {}
static void cluster_wait() { cluster_sync(); }
template <typename T> static T load_from(const float* here, int rank) {
    const size_t address = __cvta_generic_to_shared(here);
    if (address % sizeof(T)) fail("a misaligned load from another block");
    T value;
    std::memcpy(&value, shared_at(self->block->cluster->blocks[rank], address, sizeof(T)), sizeof(T));
    return value;
}
static float cluster_load(const float* here, int rank) { return load_from<float>(here, rank); }
static float4 cluster_load4(const float* here, int rank) { return load_from<float4>(here, rank); }
