// The part of CUDA C++ that the kernels use, on a CPU: a thread is a fiber, a block's fibers take turns at every place where
// threads wait for each other, and the blocks of a cluster run together. Slow, and exact: what a kernel computes where is
// tested without a GPU. Races and speed are not seen.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

struct Dim {
    unsigned x, y, z;
};
struct Meeting {
    int waiting = 0;
    long turn = 0;
};
struct Warp {
    Meeting barrier;
    float value[32];
    unsigned words[32][6];  // of an mma: four of A, two of B
    unsigned address[32];
};
struct Cluster;
constexpr size_t STATIC = 48 << 10;
struct Block {
    std::vector<unsigned char> shared;  // STATIC bytes for __shared__ arrays, then the dynamic ones
    unsigned char* dynamic() { return shared.data() + STATIC; }
    std::vector<Warp> warps;
    Meeting barrier, named[16];
    int threads, rank;
    Cluster* cluster;
};
struct Cluster {
    std::vector<Block> blocks;
    Meeting barrier;
    int threads;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    Dim thread, block_index;
    Block* block;
    int warp, lane;
    std::vector<std::vector<std::function<void()>>> copies{1};  // groups of what was asked for in the background, the last one open
};
static Fiber* self;
static ucontext_t scheduler;
static Dim grid;

static bool moved;  // whether a thread went on since this was last asked
[[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel: %s\n", what);
    std::abort();
}
static void wait_at(Meeting& barrier, int threads) {
    const long turn = barrier.turn;
    if (++barrier.waiting == threads) {
        barrier.waiting = 0;
        ++barrier.turn;
    } else {
        while (barrier.turn == turn) swapcontext(&self->context, &scheduler);
    }
    moved = true;
}
static Warp& warp_of() { return self->block->warps[self->warp]; }
static void warp_barrier() { wait_at(warp_of().barrier, 32); }

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define threadIdx (self->thread)
#define blockIdx (self->block_index)
#define gridDim grid

static void __syncthreads() { wait_at(self->block->barrier, self->block->threads); }
template <typename T> static T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) == 4);
    std::memcpy(&warp_of().value[self->lane], &value, 4);
    warp_barrier();
    T other;
    std::memcpy(&other, &warp_of().value[self->lane ^ mask], 4);
    warp_barrier();
    return other;
}
static int __shfl_sync(unsigned, int value, int lane) {
    warp_of().words[self->lane][0] = value;
    warp_barrier();
    const int other = warp_of().words[lane][0];
    warp_barrier();
    return other;
}
static bool __any_sync(unsigned, bool value) {
    warp_of().words[self->lane][0] = value;
    warp_barrier();
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= warp_of().words[i][0] != 0;
    warp_barrier();
    return any;
}
static void __syncwarp() { warp_barrier(); }
// A static __shared__ array: the same place for all threads of a block, told apart by its line.
static unsigned char* static_shared(int line, size_t bytes) {
    static std::vector<std::pair<int, size_t>> places;
    static size_t used = 0;
    for (auto& [known, at] : places)
        if (known == line) return self->block->shared.data() + at;
    places.push_back({line, used});
    used += (bytes + 15) / 16 * 16;
    if (used > STATIC) fail("more than 48 KB of static shared memory");
    return self->block->shared.data() + places.back().second;
}
// Addresses of shared memory count from the beginning of the block's.
static size_t __cvta_generic_to_shared(const void* at) {
    return static_cast<const unsigned char*>(at) - self->block->shared.data();
}
static unsigned char* shared_at(Block& block, size_t address, size_t bytes) {
    if (address + bytes > block.shared.size()) fail("an address outside of shared memory");
    return block.shared.data() + address;
}

// Byte i of the result is that of the eight bytes {a, b} which nibble i of the selector names.
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}

struct uint4 {
    unsigned x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
struct float2 {
    float x, y;
};
struct int2 {
    int x, y;
};
struct int4 {
    int x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static long long min(long long a, long long b) { return a < b ? a : b; }
#define __expf(v) std::exp(float(v))
static float __fmul_rn(float a, float b) { return a * b; }
static float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
static float __fdividef(float a, float b) { return a / b; }
template <typename T> static T __ldg(const T* from) { return *from; }
template <typename T> static void __stcs(T* to, T value) { *to = value; }
static unsigned __float_as_uint(float v) {
    unsigned bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}
static float __int_as_float(int bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
static int __float2int_rn(float v) {
    if (std::isnan(v)) return 0;
    return v >= 2147483648.0f ? INT32_MAX : v < -2147483648.0f ? INT32_MIN : int(std::nearbyint(v));
}
static int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return sum;
}
using std::isnan;
