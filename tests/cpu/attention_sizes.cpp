// A program over cpu/attention.cpp, which stands before it: every tensor in a buffer that ends where the last thing to
// be read or written does, so that AddressSanitizer sees an access outside. Run by test_source.py.

#include <vector>

static void run(long long batch, long long heads, long long length, long long num_keys, long long gap) {
    const long long key_words = (num_keys + 31) / 32, key_row = num_keys + gap, value_row = CHANNELS + gap;
    const long long rows = T_STEPS * batch * heads, of_queries = rows * WORDS * length;
    std::vector<uint32_t> queries(of_queries, 0x55555555), keys(rows * WORDS * key_row - gap, 0x33333333);
    std::vector<uint32_t> values(rows * key_words * value_row - gap, ~0u);
    std::vector<SPIKE_T> out(T_STEPS * batch * length * heads * CHANNELS);
    std::vector<int> fired(T_STEPS * batch * length * heads, -1);
    Call call = {queries.data(), keys.data(), values.data(), out.data(), fired.data()};
    call.batch = batch, call.heads = heads, call.length = length, call.num_keys = num_keys, call.threads = 2;
    const auto strides = [&](long long (&to)[4], long long words, long long row) {
        to[3] = row, to[2] = words * row, to[1] = heads * to[2], to[0] = batch * to[1];
    };
    strides(call.query_strides, WORDS, length);
    strides(call.key_strides, WORDS, key_row);
    strides(call.value_strides, key_words, value_row);
    call.beta = 0.9, call.threshold = 1;
    if (attend(&call)) std::abort();
    for (int count : fired)
        if (count < 1 || count > num_keys) std::abort();
}

int main() {
    for (long long length : {1, 2, 4, 7, 17})
        for (long long more : {0, 1, 14, 15, 31, 60})
            for (long long gap : {0, 5}) run(1 + more % 2, 2, length, length + more, gap);
}
