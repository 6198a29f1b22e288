// tensor.cuh of the emulator: a map is an address, the matrix's columns and rows, and a tile's rows.
#pragma once
#include "barrier.cuh"

struct alignas(64) TensorMap {
    const uint16_t* base;
    long long columns, rows, tile_rows;
    unsigned char rest[96];
};
static void copy_tile(void* to_shared, const TensorMap& map, int column, int row, Barrier* at, int blocks) {
    const size_t to = __cvta_generic_to_shared(to_shared), bytes = map.tile_rows * 128;
    if (to % 1024) fail("a tile that does not begin at a multiple of 1024 bytes");
    for (int r = 0; r < map.tile_rows; ++r)
        for (int c = 0; c < 64; ++c) {
            const bool inside = row + r < map.rows && column + c < map.columns;
            const uint16_t value = inside ? map.base[(row + r) * map.columns + column + c] : 0;
            const size_t place = r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2;
            for (int b = 0; b < int(self->block->cluster->blocks.size()); ++b)
                if (blocks >> b & 1) std::memcpy(shared_at(self->block->cluster->blocks[b], to + place, 2), &value, 2);
        }
    for (int b = 0; b < int(self->block->cluster->blocks.size()); ++b)
        if (blocks >> b & 1) phases(at, b).eights -= bytes / 8, phases(at, b).settle();
}
static void copy_tile(void* to_shared, const TensorMap& map, int column, int row, Barrier* at) {
    copy_tile(to_shared, map, column, row, at, 1 << self->block->rank);
}
template <int COUNT> static void fewer_registers() {}
template <int COUNT> static void more_registers() {}
