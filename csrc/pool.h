// Threads that wait for work together. Knows nothing of what they compute.
#pragma once

#include <cstdint>

namespace quire {

// Runs body(task) for every task of [0, tasks), each once, on the pool's threads and the calling one; returns when all
// are done. Which thread takes which task is not defined. While another caller holds the pool, the tasks run here alone.
void run_tasks(int64_t tasks, void (*body)(void *, int64_t), void *context);

template <class Body> void parallel(int64_t tasks, const Body &body) {
    run_tasks(
        tasks, [](void *context, int64_t task) { (*static_cast<const Body *>(context))(task); },
        const_cast<void *>(static_cast<const void *>(&body)));
}

int set_threads(int count);
int threads();

// Memory of the calling thread, aligned to 64 bytes, that is used again from call to call; `slot` tells apart what lives
// at the same time.
void *scratch(int slot, int64_t bytes);

}  // namespace quire
