// A bank of neurons and the projections behind it in one call. Behind gather.hpp and codes.hpp.

constexpr long long WORTH_THREADS = 1 << 17;  // bytes of weights that are read

// Outputs of one projection, from .. to.
template <int tokens>
static void project_outputs(
    const Call& call, const Active& active, const Groups* groups, const Projection& p, long long from, long long to,
    float* sums) {
    if constexpr (CODE_BITS == 0) {
        sum_rows<tokens>(active, p, from, to, sums);
    } else {
        constexpr long long block = BLOCK * CODES;  // outputs
        const long long end = to == p.outputs ? (to + block - 1) / block * BLOCK : to / CODES;
        for (int token = 0; token < tokens; ++token)
            sum_packed(p, groups[token], from / CODES, end, sums + token * p.outputs);
    }
    finish_outputs<tokens>(call, active, p, from, to, sums);
}

template <int tokens> static int run_bank(const Call& call, Workspace& workspace) {
    constexpr int grouped = CODE_BITS ? tokens : 0;
    long long outputs = 0, row_bytes = 0;
    for (int i = 0; i < call.projections; ++i) {
        outputs += call.projection[i].outputs;
        row_bytes += call.projection[i].stride;
    }
    if (!workspace.reserve(Workspace::bytes_of<int>(call.channels) * (1 + grouped) +
                           Workspace::bytes_of<float>(call.channels * tokens) +
                           Workspace::bytes_of<float>(outputs * tokens)))
        return 1;
    Active active{workspace.take<int>(call.channels), workspace.take<float>(call.channels * tokens)};
    find_active<tokens>(call, active);
    *call.active = active.count;
    if (active.count > call.most) return 0;
    Groups groups[grouped + 1];
    for (int token = 0; token < grouped; ++token) {
        groups[token].channels = workspace.take<int>(call.channels);
        group(active, token, tokens, groups[token]);
    }
    float* sums = workspace.take<float>(outputs * tokens);
    const long long threads = active.count * row_bytes < WORTH_THREADS ? 1 : call.threads;
    in_threads(threads, [&](long long thread, long long threads) {
        float* place = sums;
        for (int i = 0; i < call.projections; ++i) {
            const Projection& p = call.projection[i];
            constexpr long long unit = CODE_BITS ? VECTOR_BYTES * CODES : LANES;  // outputs that are not parted
            const Share share(p.outputs, unit, thread, threads);
            if (share.from < share.to) project_outputs<tokens>(call, active, groups, p, share.from, share.to, place);
            place += p.outputs * tokens;
        }
    });
    return 0;
}

// Finds the active channels of the bank and, unless they are too many, fills y of every projection; 1 without memory.
static int run_bank(const Call& call, Workspace& workspace) {
    switch (call.tokens) {
        case 1: return run_bank<1>(call, workspace);
        case 2: return run_bank<2>(call, workspace);
        case 3: return run_bank<3>(call, workspace);
        default: return run_bank<4>(call, workspace);
    }
}
