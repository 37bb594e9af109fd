// Threads that stay: they wait for a step by spinning for a moment and sleeping after that, and meet at barriers in it.
// Plain system calls and built-ins, because the standard library's headers would be most of what is compiled.
#pragma once
#include <cstdint>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace graft {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

inline double seconds_now() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// A number that threads share, on a cache line of its own.
struct alignas(64) Shared {
    uint32_t value = 0;

    uint32_t read() const { return __atomic_load_n(&value, __ATOMIC_ACQUIRE); }
    void write(uint32_t to) { __atomic_store_n(&value, to, __ATOMIC_RELEASE); }
    uint32_t add(uint32_t more) { return __atomic_fetch_add(&value, more, __ATOMIC_SEQ_CST); }

    // Sleeps as long as the number is `seen`; may wake early.
    void sleep(uint32_t seen) {
#if defined(__linux__)
        syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
        if (read() == seen) usleep(50);
#endif
    }
    void wake() {
#if defined(__linux__)
        syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
    }
};

class Team {
  public:
    explicit Team(int wanted) : size(start(wanted)), process(getpid()) {}

    ~Team() {
        if (here()) {  // a forked child has the object but not the threads
            job = nullptr;
            begin();
            for (int thread = 1; thread < size; ++thread) pthread_join(members[thread].handle, nullptr);
        }
        delete[] members;
    }

    // Runs task(thread) on every thread, the caller being thread 0; returns when all are done.
    template <class Task> void run(const Task& task) {
        job = [](const void* data, int thread) { (*(const Task*)data)(thread); };
        data = &task;
        begin();
        task(0);
        barrier();
    }

    // Returns when every thread has come here. What each wrote before is visible to all after.
    void barrier() {
        if (size == 1) return;
        const uint32_t round = rounds.read();
        if (arrived.add(1) == uint32_t(size - 1)) {
            arrived.write(0);
            rounds.write(round + 1);
            return;
        }
        for (int spins = 0; rounds.read() == round; ++spins) {
            relax();
            if (spins > 20000) sched_yield();  // the other thread has lost its core
        }
    }

    bool here() const { return process == getpid(); }

  private:
    struct Member {
        Team* team;
        int number;
        pthread_t handle;
    };

    // Starts the other threads; returns how many there are with the caller, fewer than wanted where the system refuses.
    int start(int wanted) {
        members = new Member[wanted];
        int count = 1;
        for (; count < wanted; ++count) {
            members[count] = {this, count, {}};
            const auto body = [](void* one) -> void* {
                ((Member*)one)->team->work(((Member*)one)->number);
                return nullptr;
            };
            if (pthread_create(&members[count].handle, nullptr, body, &members[count])) break;
        }
        return count;
    }

    void begin() {
        generation.add(1);
        if (sleepers.read()) generation.wake();
    }

    void work(int thread) {
        for (uint32_t seen = 0;; ++seen) {
            wait(seen);
            if (!job) return;
            job(data, thread);
            barrier();
        }
    }

    // Between the steps of one text there is some Python, so the next step is worth waiting for awake.
    void wait(uint32_t seen) {
        const double start = seconds_now();
        while (generation.read() == seen) {
            for (int spin = 0; spin < 64; ++spin) relax();
            if (seconds_now() - start > 500e-6) break;
        }
        if (generation.read() != seen) return;
        sleepers.add(1);
        while (generation.read() == seen) generation.sleep(seen);
        sleepers.add(-1);
    }

    void (*job)(const void*, int) = nullptr;
    const void* data = nullptr;
    Member* members = nullptr;
    Shared generation, sleepers, arrived, rounds;

  public:
    const int size;

  private:
    const pid_t process;
};

}  // namespace graft
