// A program that runs one recorded call of the kernels on memory of exactly the sizes that it had: AddressSanitizer
// finds what is beyond. The record: struct Call, a size and the bytes of every tensor, and the launches.

int main(int, char** arguments) {
    FILE* record = fopen(arguments[1], "rb");
    const auto read = [record](void* to, size_t size) {
        if (fread(to, 1, size, record) != size) abort();
    };
    Call call;
    read(&call, sizeof call);
    void** pointers = (void**)&call.a;
    for (int i = 0; i < 11; ++i) {
        long long size;  // -1: no tensor
        read(&size, sizeof size);
        pointers[i] = size < 0 ? nullptr : malloc(size);
        if (size > 0) read(pointers[i], size);
    }
    for (long long next[3]; fread(next, sizeof next, 1, record) == 1;) launch(&call, next[0], next[1], next[2], 0);
    puts("done");
}
