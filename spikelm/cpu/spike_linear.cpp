// The CPU's driver of projections behind neurons: cuda/projection.cuh over SIMD lanes. cpu/module.py puts the definitions
// before it and the included files in.

#include <initializer_list>

#include "parallel.hpp"
#include "lanes.hpp"
#include "bits.hpp"
#include "steps.cuh"
#include "projection.cuh"
#include "gather.hpp"
#include "codes.hpp"
#include "bank.hpp"

extern "C" int project(const Call* call) {
    static thread_local Workspace workspace;
    return run_bank(*call, workspace);
}
