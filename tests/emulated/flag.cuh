// flag.cuh in plain C++: clusters run one after the other, so what is waited for has been raised, or never will be.
#pragma once

inline void raise_flag(unsigned* flag) { *flag = 1; }
inline void wait_for_flag(const unsigned* flag) {
    if (*flag == 0) {
        std::fprintf(stderr, "a flag is waited for that no earlier block raised\n");
        std::abort();
    }
    __syncwarp();
}
inline void lower_flag(unsigned* flag) { *flag = 0; }
inline float4 load_of_other(const float* from) { return *reinterpret_cast<const float4*>(from); }
