// Threads that stay: they wait for a step by spinning for a moment and sleeping after that, and meet at barriers in it.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>
#include <sched.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace graft {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

class Team {
  public:
    explicit Team(int size) : size(size), process(getpid()) {
        for (int thread = 1; thread < size; ++thread) threads.emplace_back([this, thread] { work(thread); });
    }
    ~Team() {
        if (process != getpid()) {  // a forked child has the objects but not the threads
            for (auto& thread : threads) thread.detach();
            return;
        }
        stopping = true;
        begin();
        for (auto& thread : threads) thread.join();
    }

    // Runs job(thread) on every thread, the caller being thread 0; returns when all are done.
    void run(std::function<void(int)> task) {
        job = std::move(task);
        begin();
        job(0);
        barrier();
    }

    // Returns when every thread has come here. What each wrote before is visible to all after.
    void barrier() {
        if (size == 1) return;
        const uint32_t round = rounds.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            rounds.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; rounds.load(std::memory_order_acquire) == round; ++spins) {
            relax();
            if (spins > 20000) sched_yield();  // the other thread has lost its core
        }
    }

    bool here() const { return process == getpid(); }

    const int size;

  private:
    void begin() {
        generation.fetch_add(1, std::memory_order_release);
        generation.notify_all();
    }

    void work(int thread) {
        uint32_t seen = 0;
        for (;;) {
            wait(seen);
            ++seen;
            if (stopping) return;
            job(thread);
            barrier();
        }
    }

    // Between the steps of one text there is some Python, so the next step is worth waiting for awake.
    void wait(uint32_t seen) {
        using clock = std::chrono::steady_clock;
        const auto start = clock::now();
        while (generation.load(std::memory_order_acquire) == seen) {
            for (int spin = 0; spin < 64; ++spin) relax();
            if (clock::now() - start > std::chrono::microseconds(500)) {
                generation.wait(seen, std::memory_order_acquire);
                return;
            }
        }
    }

    std::function<void(int)> job;
    std::vector<std::thread> threads;
    const pid_t process;
    std::atomic<bool> stopping{false};
    alignas(64) std::atomic<uint32_t> generation{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> rounds{0};
};

}  // namespace graft
