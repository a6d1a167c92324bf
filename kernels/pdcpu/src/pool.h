// Threads that help with one loop at a time.
//
// A loop is cut into tiles; whoever is free takes the next one from a counter, so a thread that shares its core
// with another process does less, and holds nobody up for longer than one tile. Helpers spin for a while after
// a loop, for the next is usually some microseconds away, and then sleep.
//
// A helper may stand on a borrowed core: then it is told where to see whether the core's owners are busy (one
// byte each), looks before every tile, and leaves at once when one of them is. Where strangers use that core too,
// a helper may lose it in the middle of a tile, for which the caller must wait: `Patience` ends that.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "simd.h"

namespace pdcpu {

struct HelperSpec {
    int cpu;                                      // -1: anywhere
    std::vector<const volatile uint8_t*> owners;  // nonzero: busy
};

// Whether helpers on borrowed cores are worth what they cost: the time of loops, against what the caller then waited
// for tiles of others, where that was longer than any tile takes. Judged every 20 ms; where more than a fifth was lost
// they rest, twice as long each time in a row, up to two seconds. Nanoseconds; pure.
class Patience {
  public:
    void note(int64_t shared, int64_t waited, int64_t now) {
        shared_ += shared;
        waited_ += waited > LONGEST_TILE ? waited : 0;
        if (shared_ + waited_ < WINDOW) return;
        if (waited_ * 5 > shared_ + waited_) {
            rests_until_ = now + rest_;
            rest_ = std::min(2 * rest_, LONGEST_REST);
        } else {
            rest_ = SHORTEST_REST;
        }
        shared_ = waited_ = 0;
    }
    bool rests(int64_t now) const { return now < rests_until_; }

  private:
    static constexpr int64_t LONGEST_TILE = 400'000, WINDOW = 20'000'000;
    static constexpr int64_t SHORTEST_REST = 100'000'000, LONGEST_REST = 2'000'000'000;
    int64_t shared_ = 0, waited_ = 0, rest_ = SHORTEST_REST, rests_until_ = 0;
};

class Pool {
  public:
    using Tile = void (*)(void* context, long tile);

    // Ends the helpers there are, and starts these. Waits for a loop that runs.
    void set_helpers(std::vector<HelperSpec> wanted) {
        std::lock_guard<std::mutex> one(caller_);
        for (auto& helper : helpers_) helper->ending.store(true);
        for (auto& helper : helpers_) {
            helper->poke();
            helper->thread.join();
        }
        helpers_.clear();
        borrows_ = false;
        patience_ = Patience();
        resting_.store(false);
        for (auto& spec : wanted) {
            borrows_ = borrows_ || !spec.owners.empty();
            helpers_.push_back(std::make_unique<Helper>());
            Helper* helper = helpers_.back().get();
            helper->spec = std::move(spec);
            helper->thread = std::thread([this, helper] { help(*helper); });
        }
        num_helpers_.store(int(helpers_.size()));
    }

    // tile(context, i) for every i in [0, tiles), each once, in any order, on any threads.
    void run(long tiles, Tile tile, void* context) {
        // When another thread of this process computes, it has the helpers.
        if (tiles > 1 && num_helpers_.load(std::memory_order_relaxed) > 0 && caller_.try_lock()) {
            std::lock_guard<std::mutex> one(caller_, std::adopt_lock);
            share(tiles, tile, context);
        } else {
            for (long i = 0; i < tiles; i++) tile(context, i);
        }
    }

    // Threads that would take part in a loop now, the caller's included.
    int num_threads() const {
        return 1 + num_helpers_.load(std::memory_order_relaxed);
    }

  private:
    struct Helper {
        HelperSpec spec;
        std::thread thread;
        std::mutex lock;
        std::condition_variable wake;
        bool poked = false;
        std::atomic<bool> asleep{false};
        std::atomic<bool> ending{false};

        bool lent(const std::atomic<bool>& resting) const {
            if (!spec.owners.empty() && resting.load(std::memory_order_relaxed)) return false;
            for (auto* owner : spec.owners)
                if (*owner) return false;
            return true;
        }

        void poke() {
            std::lock_guard<std::mutex> guard(lock);
            poked = true;
            wake.notify_one();
        }
    };

    void share(long tiles, Tile tile, void* context) {
        const int64_t began = borrows_ ? now() : 0;
        if (borrows_) resting_.store(patience_.rests(began), std::memory_order_relaxed);
        tile_ = tile;
        context_ = context;
        tiles_ = tiles;
        next_.store(0, std::memory_order_relaxed);
        open_.store(true, std::memory_order_seq_cst);
        epoch_.fetch_add(1, std::memory_order_seq_cst);
        for (auto& helper : helpers_)
            if (helper->asleep.load(std::memory_order_seq_cst) && helper->lent(resting_)) helper->poke();
        for (long i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tiles;) tile(context, i);
        open_.store(false, std::memory_order_seq_cst);
        const int64_t ended = borrows_ ? now() : 0;
        for (int spins = 0; inside_.load(std::memory_order_seq_cst) > 0; spins++)
            if (spins < 10000) _mm_pause();
            else std::this_thread::yield();  // a helper has lost its core in the middle of a tile
        if (borrows_) patience_.note(ended - began, now() - ended, ended);
    }

    static int64_t now() {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count();
    }

    void help(Helper& helper) {
        pin(helper.spec.cpu);
        for (uint64_t seen = 0; !helper.ending.load(std::memory_order_relaxed);) {
            wait(helper, seen);
            seen = epoch_.load(std::memory_order_seq_cst);
            // Whoever is counted here keeps the caller from changing or leaving the loop that is open.
            inside_.fetch_add(1, std::memory_order_seq_cst);
            if (open_.load(std::memory_order_seq_cst)) {
                while (helper.lent(resting_)) {
                    long i = next_.fetch_add(1, std::memory_order_relaxed);
                    if (i >= tiles_) break;
                    tile_(context_, i);
                }
            }
            inside_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    // Until there is a loop after `seen` and the core is lent.
    void wait(Helper& helper, uint64_t seen) {
        for (int i = 0; i < SPINS; i++) {
            if (epoch_.load(std::memory_order_acquire) != seen) {
                if (helper.lent(resting_)) return;
                break;
            }
            if ((i & 255) == 255 && !helper.lent(resting_)) break;
            _mm_pause();
        }
        std::unique_lock<std::mutex> guard(helper.lock);
        helper.asleep.store(true, std::memory_order_seq_cst);
        if (epoch_.load(std::memory_order_seq_cst) == seen || !helper.lent(resting_))
            helper.wake.wait(guard, [&] { return helper.poked; });
        helper.poked = false;
        helper.asleep.store(false, std::memory_order_seq_cst);
    }

    static void pin(int cpu) {
#if defined(__linux__)
        if (cpu < 0) return;
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // not allowed there: runs anywhere
#else
        (void)cpu;
#endif
    }

    static constexpr int SPINS = 5000;  // some 60 microseconds

    std::mutex caller_;  // whose loop it is
    std::vector<std::unique_ptr<Helper>> helpers_;
    std::atomic<int> num_helpers_{0};
    bool borrows_ = false;  // some helper stands on a core of others
    Patience patience_;
    std::atomic<bool> resting_{false};

    Tile tile_ = nullptr;  // these three: of the open loop
    void* context_ = nullptr;
    long tiles_ = 0;
    alignas(64) std::atomic<long> next_{0};
    alignas(64) std::atomic<uint64_t> epoch_{0};
    std::atomic<bool> open_{false};
    alignas(64) std::atomic<int> inside_{0};
};

// Never destroyed: helpers may sleep in it when the process ends.
inline Pool& pool() {
    static Pool* one = new Pool;
    return *one;
}

template <class Body>
void parallel(long tiles, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    pool().run(tiles, [](void* context, long i) { (*static_cast<Plain*>(context))(i); }, &body);
}

}  // namespace pdcpu
