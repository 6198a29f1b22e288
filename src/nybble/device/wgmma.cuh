// wgmma: the tensor-core product of four warps together (sm_90a). A from registers, B from shared memory, D in registers;
// of 16-bit values with sums in fp32, and of int8 with sums in int32.
#pragma once
#include "scalar.cuh"

// What was written to registers, or to shared memory before a fence_async, is there for the products that follow.
// PTX ISA, "wgmma.fence".
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// What has been asked for becomes one group, and all but the newest PENDING groups are waited for.
// PTX ISA, "wgmma.commit_group", "wgmma.wait_group".
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A register that a product in flight writes is not read before this point in the program.
template <int COUNT> __device__ __forceinline__ void arrived(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int COUNT> __device__ __forceinline__ void arrived(int (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Ordinary stores to shared memory become visible to the tensor cores. PTX ISA, "fence.proxy.async".
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The half of B's descriptor that says where: rows of 128 bytes along k, eight of them 1024 bytes, their 16-byte pieces
// swizzled: piece p of row r is at p ^ (r % 8). `at` is a shared address; add 2 for the next 16 elements along k.
// PTX ISA, "Matrix-descriptor format".
__device__ __forceinline__ unsigned wgmma_rows(const void* at) {
    return (static_cast<unsigned>(__cvta_generic_to_shared(at)) & 0x3ffffu) >> 4 | 1u << 16;
}

// The same of B whose columns are neighbours in memory: tiles of 64 columns lie `apart` bytes from each other, each of them
// rows of k, 128 bytes each, swizzled as above. Add 128 for the next 16 rows.
__device__ __forceinline__ unsigned wgmma_columns(const void* at, int apart) {
    return (static_cast<unsigned>(__cvta_generic_to_shared(at)) & 0x3ffffu) >> 4 | static_cast<unsigned>(apart / 16) << 16;
}

// d (+)= A B, m64 nCOLS k16; warp w of the four has rows 16 w .. 16 w + 15 of A and D, as in mma.cuh, and
// d[4 j ..] is D's columns 8 j .. 8 j + 7. wgmma_add takes B of wgmma_rows, wgmma_add_columns of wgmma_columns. PTX ISA,
// "wgmma.mma_async".
#define NYBBLE_WGMMA_OF(NAME, TRANSPOSED, COLS, COUNT, D, A, B, P, ...)                                                 \
    template <typename T>                                                                                               \
    __device__ __forceinline__ void NAME(float (&d)[COUNT], const unsigned (&a)[4], unsigned b, int add) {              \
        if constexpr (same<T, half_t>)                                                                                  \
            asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 rows;\n\tsetp.ne.b32 p, " P ", 0;\n\t"                        \
                         "mov.b64 rows, {" B ", 0x40000040};\n\t"                                                       \
                         "wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32.f16.f16 {" D "}, {" A "}, rows"             \
                         ", p, 1, 1, " TRANSPOSED ";\n\t}"                                                              \
                         : __VA_ARGS__                                                                                  \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));                               \
        else                                                                                                            \
            asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 rows;\n\tsetp.ne.b32 p, " P ", 0;\n\t"                        \
                         "mov.b64 rows, {" B ", 0x40000040};\n\t"                                                       \
                         "wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32.bf16.bf16 {" D "}, {" A "}, rows"           \
                         ", p, 1, 1, " TRANSPOSED ";\n\t}"                                                              \
                         : __VA_ARGS__                                                                                  \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));                               \
    }
#define NYBBLE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NYBBLE_WGMMA(...) NYBBLE_WGMMA_OF(wgmma_add, "0", __VA_ARGS__)
#define NYBBLE_WGMMA_COLUMNS(...) NYBBLE_WGMMA_OF(wgmma_add_columns, "1", __VA_ARGS__)
NYBBLE_WGMMA(8, 4, "%0,%1,%2,%3", "%4,%5,%6,%7", "%8", "%9", NYBBLE_D4(0))
NYBBLE_WGMMA(16, 8, "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12", "%13", NYBBLE_D4(0), NYBBLE_D4(4))
NYBBLE_WGMMA(32, 16, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20", "%21",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12))
NYBBLE_WGMMA(64, 32,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
             "%32,%33,%34,%35", "%36", "%37", NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16),
             NYBBLE_D4(20), NYBBLE_D4(24), NYBBLE_D4(28))
NYBBLE_WGMMA(128, 64,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63",
             "%64,%65,%66,%67", "%68", "%69",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40), NYBBLE_D4(44),
             NYBBLE_D4(48), NYBBLE_D4(52), NYBBLE_D4(56), NYBBLE_D4(60))
NYBBLE_WGMMA(256, 128,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
             "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
             "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
             "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
             "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127",
             "%128,%129,%130,%131", "%132", "%133",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40), NYBBLE_D4(44),
             NYBBLE_D4(48), NYBBLE_D4(52), NYBBLE_D4(56), NYBBLE_D4(60), NYBBLE_D4(64), NYBBLE_D4(68),
             NYBBLE_D4(72), NYBBLE_D4(76), NYBBLE_D4(80), NYBBLE_D4(84), NYBBLE_D4(88), NYBBLE_D4(92),
             NYBBLE_D4(96), NYBBLE_D4(100), NYBBLE_D4(104), NYBBLE_D4(108), NYBBLE_D4(112), NYBBLE_D4(116),
             NYBBLE_D4(120), NYBBLE_D4(124))
NYBBLE_WGMMA(88, 44,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43",
             "%44,%45,%46,%47", "%48", "%49",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40))
NYBBLE_WGMMA(112, 56,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
             "%48,%49,%50,%51,%52,%53,%54,%55",
             "%56,%57,%58,%59", "%60", "%61",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40), NYBBLE_D4(44),
             NYBBLE_D4(48), NYBBLE_D4(52))
NYBBLE_WGMMA_COLUMNS(64, 32,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
             "%32,%33,%34,%35", "%36", "%37",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28))
NYBBLE_WGMMA_COLUMNS(80, 40,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39",
             "%40,%41,%42,%43", "%44", "%45",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36))
NYBBLE_WGMMA_COLUMNS(88, 44,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43",
             "%44,%45,%46,%47", "%48", "%49",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40))
NYBBLE_WGMMA_COLUMNS(112, 56,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
             "%48,%49,%50,%51,%52,%53,%54,%55",
             "%56,%57,%58,%59", "%60", "%61",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40), NYBBLE_D4(44),
             NYBBLE_D4(48), NYBBLE_D4(52))
NYBBLE_WGMMA_COLUMNS(128, 64,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63",
             "%64,%65,%66,%67", "%68", "%69",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40), NYBBLE_D4(44),
             NYBBLE_D4(48), NYBBLE_D4(52), NYBBLE_D4(56), NYBBLE_D4(60))
NYBBLE_WGMMA_COLUMNS(224, 112,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
             "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
             "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
             "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111",
             "%112,%113,%114,%115", "%116", "%117",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40), NYBBLE_D4(44),
             NYBBLE_D4(48), NYBBLE_D4(52), NYBBLE_D4(56), NYBBLE_D4(60), NYBBLE_D4(64), NYBBLE_D4(68),
             NYBBLE_D4(72), NYBBLE_D4(76), NYBBLE_D4(80), NYBBLE_D4(84), NYBBLE_D4(88), NYBBLE_D4(92),
             NYBBLE_D4(96), NYBBLE_D4(100), NYBBLE_D4(104), NYBBLE_D4(108))
#undef NYBBLE_D4
#undef NYBBLE_WGMMA
#undef NYBBLE_WGMMA_COLUMNS
#undef NYBBLE_WGMMA_OF

// The same of int8, k32, sums in int32: rows of B are 128 values, add 2 for the next 32. A's registers: rows g, g + 8, g, g + 8 of
// k = 4 t .. 4 t + 3, and of 16 more.
#define NYBBLE_WGMMA_INT(COLS, COUNT, D, A, B, P, ...)                                                          \
    __device__ __forceinline__ void wgmma_add(int (&d)[COUNT], const unsigned (&a)[4], unsigned b, int add) {   \
        asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 rows;\n\tsetp.ne.b32 p, " P ", 0;\n\t"                 \
                     "mov.b64 rows, {" B ", 0x40000040};\n\t"                                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #COLS "k32.s32.s8.s8 {" D "}, {" A "}, rows, p;\n\t}" \
                     : __VA_ARGS__                                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));                           \
    }
#define NYBBLE_D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
NYBBLE_WGMMA_INT(8, 4, "%0,%1,%2,%3", "%4,%5,%6,%7", "%8", "%9", NYBBLE_D4(0))
NYBBLE_WGMMA_INT(16, 8, "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12", "%13", NYBBLE_D4(0), NYBBLE_D4(4))
NYBBLE_WGMMA_INT(32, 16, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20", "%21",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12))
NYBBLE_WGMMA_INT(64, 32,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
             "%32,%33,%34,%35", "%36", "%37", NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16),
             NYBBLE_D4(20), NYBBLE_D4(24), NYBBLE_D4(28))
NYBBLE_WGMMA_INT(128, 64,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63",
             "%64,%65,%66,%67", "%68", "%69",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40), NYBBLE_D4(44),
             NYBBLE_D4(48), NYBBLE_D4(52), NYBBLE_D4(56), NYBBLE_D4(60))
NYBBLE_WGMMA_INT(256, 128,
             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
             "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
             "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
             "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
             "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127",
             "%128,%129,%130,%131", "%132", "%133",
             NYBBLE_D4(0), NYBBLE_D4(4), NYBBLE_D4(8), NYBBLE_D4(12), NYBBLE_D4(16), NYBBLE_D4(20),
             NYBBLE_D4(24), NYBBLE_D4(28), NYBBLE_D4(32), NYBBLE_D4(36), NYBBLE_D4(40), NYBBLE_D4(44),
             NYBBLE_D4(48), NYBBLE_D4(52), NYBBLE_D4(56), NYBBLE_D4(60), NYBBLE_D4(64), NYBBLE_D4(68),
             NYBBLE_D4(72), NYBBLE_D4(76), NYBBLE_D4(80), NYBBLE_D4(84), NYBBLE_D4(88), NYBBLE_D4(92),
             NYBBLE_D4(96), NYBBLE_D4(100), NYBBLE_D4(104), NYBBLE_D4(108), NYBBLE_D4(112), NYBBLE_D4(116),
             NYBBLE_D4(120), NYBBLE_D4(124))
#undef NYBBLE_WGMMA_INT

// The descriptor of B without swizzle: 16 values of k of a column are 16 bytes, those of the next column follow, and the next 16
// of k lie `apart` bytes on. Where columns overlap with what is `apart`, they have the same values. `at` is a multiple of 16; add
// 2 apart / 16 for the next 32 values.
__device__ __forceinline__ unsigned wgmma_pieces(const void* at, int apart) {
    return (static_cast<unsigned>(__cvta_generic_to_shared(at)) & 0x3ffffu) >> 4 | static_cast<unsigned>(apart / 16) << 16;
}
// d += A B of unsigned A and signed B of wgmma_pieces.
#define NYBBLE_WGMMA_PIECES(COLS, COUNT, D, A, B, ...)                                                                      \
    __device__ __forceinline__ void wgmma_add_pieces(int (&d)[COUNT], const unsigned (&a)[4], unsigned b) {                 \
        asm volatile("{\n\t.reg .b64 columns;\n\tmov.b64 columns, {" B ", 8};\n\t"                                        \
                     "wgmma.mma_async.sync.aligned.m64n" #COLS "k32.s32.u8.s8 {" D "}, {" A "}, columns, 1;\n\t}"           \
                     : __VA_ARGS__                                                                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));                                                 \
    }
NYBBLE_WGMMA_PIECES(8, 4, "%0,%1,%2,%3", "%4,%5,%6,%7", "%8", NYBBLE_D4(0))
NYBBLE_WGMMA_PIECES(16, 8, "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12", NYBBLE_D4(0), NYBBLE_D4(4))
#undef NYBBLE_D4
#undef NYBBLE_WGMMA_PIECES
