// Threads that stay: they wait for a task by spinning for a moment, sleeping after that, and join in while it is open.
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

// One turn of waiting for what another thread is about to do.
inline void pause(int spins) {
    relax();
    if (spins > 2000) sched_yield();  // it has lost its core
}

inline double seconds_now() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// A number that threads share, on a cache line of its own.
struct alignas(64) Shared {
    uint32_t value = 0;

    uint32_t read() const { return __atomic_load_n(&value, __ATOMIC_SEQ_CST); }
    void write(uint32_t to) { __atomic_store_n(&value, to, __ATOMIC_SEQ_CST); }
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
            stopping = true;
            begin();
            for (int thread = 1; thread < size; ++thread) pthread_join(members[thread], nullptr);
        }
        delete[] members;
    }

    // Runs task() on the caller, and on every other thread that comes in time; returns when none is in it any more. The
    // task shares its work out by itself, so that it never waits for a thread that has no core.
    template <class Task> void run(const Task& task) {
        job = [](const void* data) { (*(const Task*)data)(); };
        data = &task;
        begin();
        task();
        open.write(0);
        for (int spins = 0; inside.read(); ++spins) pause(spins);
    }

    bool here() const { return process == getpid(); }

  private:
    // Starts the other threads; returns how many there are with the caller, fewer than wanted where the system refuses.
    int start(int wanted) {
        members = new pthread_t[wanted];
        int count = 1;
        for (; count < wanted; ++count) {
            const auto body = [](void* one) -> void* {
                ((Team*)one)->work();
                return nullptr;
            };
            if (pthread_create(&members[count], nullptr, body, this)) break;
        }
        return count;
    }

    void begin() {
        open.write(1);
        generation.add(1);
        if (sleepers.read()) generation.wake();
    }

    void work() {
        for (uint32_t seen = 0;;) {
            wait(seen);
            seen = generation.read();
            inside.add(1);
            const bool stop = stopping;
            if (!stop && open.read()) job(data);
            inside.add(-1);
            if (stop) return;
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

    void (*job)(const void*) = nullptr;
    const void* data = nullptr;
    bool stopping = false;
    pthread_t* members = nullptr;
    Shared generation, open, inside, sleepers;

  public:
    const int size;

  private:
    const pid_t process;
};

}  // namespace graft
