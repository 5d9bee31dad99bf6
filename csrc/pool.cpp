#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {
namespace {

// A worker that has nothing to do looks for so long before it sleeps: the next kernel of a step comes within microseconds, and
// waking takes about as long as a small kernel.
constexpr auto PATIENCE = std::chrono::microseconds(200);
constexpr int LOOKS = 64;  // between two looks at the clock

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
public:
    explicit Pool(int count) : shares_(new Share[count]), count_(count) {
        for (int i = 1; i < count; i++) workers_.emplace_back([this, i] { work(i); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(sleep_);
            ending_ = true;
            round_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto &worker : workers_) worker.join();
    }

    int size() const { return count_; }

    void run(int64_t tasks, void (*body)(void *, int64_t), void *context) {
        body_ = body, context_ = context;
        for (int t = 0; t < size(); t++) {
            shares_[t].end = tasks * (t + 1) / size();
            shares_[t].next.store(tasks * t / size(), std::memory_order_relaxed);
        }
        gate_.store(OPEN, std::memory_order_release);
        {
            // Under the lock, so that no worker misses it between its last look and its sleep.
            std::lock_guard<std::mutex> lock(sleep_);
            round_.fetch_add(1, std::memory_order_release);
        }
        if (sleepers_.load() > 0) wake_.notify_all();
        take(0);
        // Every task is taken. Whoever still sleeps is not waited for: it finds the gate closed.
        gate_.fetch_and(~OPEN, std::memory_order_acq_rel);
        for (int look = 0; gate_.load(std::memory_order_acquire) > 0; look++)
            if (look < 32 * LOOKS)
                pause();
            else
                std::this_thread::yield();
    }

private:
    // Consecutive tasks of one share: tasks that lie side by side read memory side by side. What is left of the others' after that.
    void take(int me) {
        for (int k = 0; k < size(); k++) {
            Share &share = shares_[(me + k) % size()];
            for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) body_(context_, task);
        }
    }

    bool nothing_since(uint64_t seen) const { return round_.load(std::memory_order_acquire) == seen; }

    void work(int me) {
        for (uint64_t seen = 0;;) {
            const auto give_up = std::chrono::steady_clock::now() + PATIENCE;
            while (nothing_since(seen) && std::chrono::steady_clock::now() < give_up)
                for (int look = 0; look < LOOKS && nothing_since(seen); look++) pause();
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                sleepers_.fetch_add(1);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
                sleepers_.fetch_sub(1);
            }
            seen = round_.load(std::memory_order_acquire);
            if (ending_) return;
            uint32_t inside = gate_.load(std::memory_order_acquire);
            while (inside & OPEN && !gate_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) {}
            if (!(inside & OPEN)) continue;
            take(me);
            gate_.fetch_sub(1, std::memory_order_release);
        }
    }

    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    std::unique_ptr<Share[]> shares_;
    const int count_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> round_{0};
    // How many workers are at a round's tasks, and whether more may come.
    static constexpr uint32_t OPEN = 1u << 31;
    std::atomic<uint32_t> gate_{0};
    std::atomic<int> sleepers_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
    bool ending_ = false;
    void (*body_)(void *, int64_t) = nullptr;
    void *context_ = nullptr;
};

std::mutex holding;
// Never destroyed at exit: a worker may still run when static objects go.
Pool *pool = nullptr;
int wanted = 1;

void after_fork() {
    // The child has none of the threads. The old pool's memory is left: its locks may be held by nobody.
    pool = nullptr;
    new (&holding) std::mutex;
}

struct AtFork {
    AtFork() { pthread_atfork(nullptr, nullptr, after_fork); }
} at_fork;

struct Buffer {
    void *memory = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(memory); }
};

}  // namespace

void run_tasks(int64_t tasks, void (*body)(void *, int64_t), void *context) {
    if (wanted > 1 && tasks > 1 && holding.try_lock()) {
        std::lock_guard<std::mutex> lock(holding, std::adopt_lock);
        if (!pool || pool->size() != wanted) {
            delete pool;
            pool = new Pool(wanted);
        }
        pool->run(tasks, body, context);
        return;
    }
    for (int64_t task = 0; task < tasks; task++) body(context, task);
}

int set_threads(int count) {
    if (count < 1 || count > 1024) return -1;
    std::lock_guard<std::mutex> lock(holding);
    wanted = count;
    return 0;
}

int threads() { return wanted; }

void *scratch(int slot, int64_t bytes) {
    static thread_local Buffer buffers[8];
    Buffer &buffer = buffers[slot];
    if (buffer.bytes < bytes) {
        std::free(buffer.memory);
        buffer.bytes = (bytes + 4095) / 4096 * 4096;
        buffer.memory = std::aligned_alloc(64, size_t(buffer.bytes));
        if (!buffer.memory) std::abort();
    }
    return buffer.memory;
}

}  // namespace quire
