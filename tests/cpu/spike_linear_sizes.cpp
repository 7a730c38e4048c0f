// A program over cpu/spike_linear.cpp, which stands before it: every tensor in a buffer that ends where the last thing
// to be read or written does, so that AddressSanitizer sees an access outside. Run by test_source.py.

#include <vector>

static void run(long long tokens, long long channels, std::vector<long long> outputs, long long gap, bool single) {
    constexpr long long block = BLOCK * CODES;  // outputs
    std::vector<IO_T> x(tokens * channels);
    std::memset(x.data(), 0x3f, x.size() * sizeof(IO_T));  // some number of about 0.75 in every type but half
    std::vector<float> threshold(single ? 1 : channels, 0.25f), scale, bias;
    long long active = -1;
    Call call = {x.data(), threshold.data(), &active};
    call.tokens = tokens, call.channels = channels, call.thresholds = threshold.size(), call.T = 3;
    call.most = channels, call.threads = 2, call.projections = outputs.size();
    call.decay = call.frame_weight = call.value_scale = call.output_scale = 1, call.levels = 4;
    std::vector<std::vector<WEIGHT_T>> rows;
    std::vector<std::vector<IO_T>> y;
    std::vector<std::vector<float>> factors;
    for (size_t i = 0; i < outputs.size(); ++i) {
        const long long length = CODE_BITS ? (outputs[i] + block - 1) / block * BLOCK : outputs[i];
        const long long stride = length + gap;
        rows.emplace_back(channels * stride - gap);
        y.emplace_back(tokens * outputs[i]);
        factors.emplace_back(outputs[i], 1.f);
        const float* one = factors.back().data();
        call.projection[i] = {rows.back().data(), one, one, y.back().data(), outputs[i],
                              stride * (long long)sizeof(WEIGHT_T), single ? 1 : outputs[i]};
    }
    if (project(&call) || active != channels) std::abort();
}

int main() {
    for (long long tokens : {1, 2, 3, 4})
        for (long long channels : {1, 7, 16, 33, 300})
            for (long long outputs : {1, 63, 64, 130, 1000})
                for (long long gap : {0, 16})
                    for (bool single : {true, false}) run(tokens, channels, {outputs, 5}, gap, single);
}
