// flag.cuh in plain C++: clusters run one after the other, so what is waited for has been raised, or never will be.
#pragma once
#include "cuda.h"

static void raise_flag(unsigned* flag) { *flag = 1; }
static void wait_for_flag(const unsigned* flag) {
    if (*flag == 0) fail("a flag is waited for that no earlier block has raised");
    warp_barrier();
}
static void lower_flag(unsigned* flag) { *flag = 0; }
static float4 load_of_other(const float* from) { return *reinterpret_cast<const float4*>(from); }
