// The same over cpu/packing.cpp.

#include <vector>

static void run(long long tokens, long long channels, long long first, long long gap) {
    const long long T = 2, batch = 2, heads = 3, row = channels + gap;
    std::vector<IO_T> spikes(T * batch * tokens * heads * row - gap);
    Call call = {spikes.data(), nullptr, T, batch, tokens, heads, channels, first, 2};
    call.strides[3] = row, call.strides[2] = heads * row;
    call.strides[1] = tokens * call.strides[2], call.strides[0] = batch * call.strides[1];
    for (bool of_channels : {true, false}) {
        call.words = ((of_channels ? channels : first + tokens) + 31) / 32;
        std::vector<uint32_t> packed(T * batch * heads * call.words * (of_channels ? tokens : channels), ~0u);
        call.packed = packed.data();
        if (of_channels ? pack_channels(&call) : pack_tokens(&call)) std::abort();
        for (uint32_t word : packed)
            if (word) std::abort();
    }
}

int main() {
    for (long long tokens : {1, 31, 32, 33, 65, 130})
        for (long long channels : {1, 15, 31, 32, 33, 64, 80})
            for (long long gap : {0, 3}) run(tokens, channels, tokens % 3 * 15, gap);
}
