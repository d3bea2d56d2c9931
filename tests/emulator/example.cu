// The smallest use of the emulator: a kernel, and a main() that runs it. README.md has the line that compiles this.
//
// Each block reverses its 64 numbers by way of shared memory. With the word "faulty" it leaves out the barrier between
// writing and reading, and the emulator says where threads race.
#include <cstdio>
#include <cstring>
#include <numeric>
#include <vector>

#include <device.cuh>

namespace {

using namespace qlk::cuda;

constexpr int kThreads = 64;

struct Shared {
    int numbers[kThreads];
};

struct Arguments {
    const int* in;
    int* out;
    bool faulty;
};

__global__ void reverse(const Arguments a) {
    auto& shared = shared_memory<Shared>();
    const int lane = threadIdx.x, first = blockIdx.x * kThreads;
    store_shared(&shared.numbers[lane], load_global(a.in + first + lane));
    if (!a.faulty) __syncthreads();
    store_global(a.out + first + lane, load_shared(&shared.numbers[kThreads - 1 - lane]));
}

}  // namespace

int main(int count, char** words) {
    const bool faulty = count > 1 && std::strcmp(words[1], "faulty") == 0;
    std::vector<int> in(2 * kThreads), out(in.size());
    std::iota(in.begin(), in.end(), 0);
    emu::options().order = emu::Order::kRandom;
    try {
        launch(reverse, 2, kThreads, sizeof(Shared), Stream{}, Arguments{in.data(), out.data(), faulty});
    } catch (const emu::Error& error) {
        std::printf("%s\n", error.what());
        return 1;
    }
    std::printf("%d %d ... %d %d\n%s\n", out[0], out[1], out[126], out[127], emu::counters().json().c_str());
    return 0;
}
