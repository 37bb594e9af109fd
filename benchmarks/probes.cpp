// What memory and arithmetic give at best, for the same threads and with the same instructions as generated code.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>
#include <sys/mman.h>
#include "vec.h"

using namespace graft;
namespace {

#if defined(__AVX512F__)
constexpr int CHAINS = 16;
#elif defined(__AVX2__)
constexpr int CHAINS = 5;
#else
constexpr int CHAINS = 3;
#endif
// Enough independent sums that none waits for its last addition, and no more than there are registers.

constexpr int READERS = 8;

// Calls work(thread) on so many threads; the seconds from when all are there to when all are done.
template <class Work> double seconds(int threads, Work work) {
    std::atomic<int> ready{0};
    std::vector<std::thread> others;
    const auto meet = [&] {
        for (++ready; ready.load() < threads;) std::this_thread::yield();
    };
    for (int thread = 1; thread < threads; ++thread) others.emplace_back([&, thread] { meet(), work(thread); });
    meet();
    const auto start = std::chrono::steady_clock::now();
    work(0);
    for (auto& other : others) other.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Probe {
    int threads;
    int64_t lines;  // of 64 bytes, for each thread
    u32v* data;

    Probe(int threads, int64_t lines) : threads(threads), lines(lines) {
        constexpr size_t huge = size_t(2) << 20;
        const size_t size = threads * lines * sizeof(u32v);
        data = (u32v*)std::aligned_alloc(huge, (size + huge - 1) / huge * huge);
        if (!data) return;
        madvise(data, size, MADV_HUGEPAGE);
        // A page lies where the thread runs that writes it first.
        seconds(threads, [&](int thread) {
            for (int64_t i = thread * lines; i < (thread + 1) * lines; ++i) data[i] = u32v{} + 1;
        });
    }
    ~Probe() { std::free(data); }
};

uint64_t read(const u32v* data, int64_t lines, int64_t ahead) {
    u32v sums[READERS]{};
    for (int64_t i = 0; i + READERS <= lines; i += READERS)
        for (int k = 0; k < READERS; ++k) {
            if (ahead) __builtin_prefetch((const char*)(data + i + k) + ahead, 0, 2);
            sums[k] += data[i + k];
        }
    uint64_t total = 0;
    for (const u32v& sum : sums)
        for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
    return total;
}

float work_float(int64_t rounds) {
    f32v sums[CHAINS];
    for (int j = 0; j < CHAINS; ++j) sums[j] = splat(float(j));
    // The sum is a factor, so that no product can be taken out of the loop; it tends to 2.
    for (int64_t i = 0; i < rounds; ++i)
        for (f32v& sum : sums) sum = fma(sum, splat(0.5f), splat(1.0f));
    f32v total{};
    for (const f32v& sum : sums) total += sum;
    return fold<float>(total, [](auto a, auto b) { return a + b; });
}

#if defined(__AVX512BF16__)
float work_bf16(int64_t rounds) {
    f32v sums[CHAINS];
    for (int j = 0; j < CHAINS; ++j) sums[j] = splat(float(j));  // equal sums would be computed once
    const __m512bh ones = bits<__m512bh>(u32v{} + 0x3f803f80);
    for (int64_t i = 0; i < rounds; ++i)
        for (f32v& sum : sums) sum = (f32v)_mm512_dpbf16_ps((__m512)sum, ones, ones);
    f32v total{};
    for (const f32v& sum : sums) total += sum;
    return fold<float>(total, [](auto a, auto b) { return a + b; });
}
#endif

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// nullptr where there is no memory for `lines` lines of 64 bytes for every thread, a multiple of READERS.
API Probe* probe_open(int threads, int64_t lines) {
    Probe* probe = new Probe(threads, lines);
    if (probe->data) return probe;
    delete probe;
    return nullptr;
}
API void probe_close(Probe* probe) { delete probe; }

// Seconds to read everything once; `total` becomes its sum, 16 for each line.
API double probe_read(Probe* probe, int64_t ahead, uint64_t* total) {
    std::atomic<uint64_t> sum{0};
    const double spent = seconds(probe->threads, [&](int thread) {
        sum += read(probe->data + thread * probe->lines, probe->lines, ahead);
    });
    *total = sum;
    return spent;
}

// Floating-point operations per second of the instruction that products use: bfloat16's own where there is one, and
// otherwise float32's multiply-add. `sink` takes what was computed.
API double probe_peak(Probe* probe, int is_bf16, int64_t rounds, float* sink) {
    int64_t operations = 2 * LANES * CHAINS * rounds * probe->threads;
    auto work = work_float;
#if defined(__AVX512BF16__)
    if (is_bf16) work = work_bf16, operations *= 2;
#endif
    std::atomic<float> result{0};
    const double spent = seconds(probe->threads, [&](int) { result = work(rounds); });
    *sink = result;
    return operations / spent;
}
