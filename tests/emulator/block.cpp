// One block: its threads, barriers and warps.
#include "block.h"

#include <algorithm>
#include <cstdlib>

#include "wgmma.h"

namespace emu {
namespace {

struct Cancelled {};
thread_local Thread* running = nullptr;

std::string text(Dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::vector<std::unique_ptr<Thread>>& spare_threads() {
    static thread_local std::vector<std::unique_ptr<Thread>> all;
    return all;
}

}  // namespace

std::string place(Site site) {
    const char* slash = std::strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool coin() { return running->block->device.random() & 1; }

Block* holder(const void* address) {
    Block& own = *this_thread().block;
    if (own.holds(address)) return &own;
    for (Block* block : own.cluster->blocks) {
        if (block->holds(address)) return block;
    }
    return nullptr;
}

Thread& this_thread() {
    if (!running) throw Error("device code runs outside of a launch");
    return *running;
}
Dim3 thread_index() { return this_thread().index; }
Dim3 block_index() { return this_thread().block->index; }
Dim3 block_dim() { return this_thread().block->dim; }
Dim3 grid_dim() { return this_thread().block->device.grid; }
unsigned lane() { return static_cast<unsigned>(this_thread().linear) % 32; }
unsigned char* shared_bytes() { return this_thread().block->shared; }
size_t shared_size() { return this_thread().block->shared_size; }

void fail(Site site, const std::string& message) {
    const Thread& t = this_thread();
    throw Error(place(site) + ": thread " + text(t.index) + " of block " + text(t.block->index) + ": " + message);
}

// ------------------------------------------------------------------------------------------------------ threads

void Thread::reset(Block* owner, int number, Dim3 position) {
    block = owner;
    linear = number;
    index = position;
    state = kReady;
    started = cancelled = waited = let_next = false;
    error = nullptr;
    std::fill(executions.begin(), executions.end(), 0);
    open.clear();
    groups.clear();
    exchange = {};
    stores = {};
    in_cluster_barrier = false;
    racer = static_cast<int>(owner->rank) * owner->live + number;
    if (!fiber) fiber = std::make_unique<Fiber>();
}

void Thread::pause(State how, const char* what, Site where) {
    waiting_for = what;
    site = where;
    state = how;
    block->make_ready(*this, how == kReady);
    fiber->leave();
    if (cancelled) throw Cancelled();
}

// ------------------------------------------------------------------------------------------------------- blocks

Block::Block(Device& launch, uint64_t place_in_grid, Dim3 position, Dim3 size, size_t shared_bytes,
             std::shared_ptr<Cluster> others)
    : device(launch),
      number(place_in_grid),
      index(position),
      dim(size),
      live(static_cast<int>(size.x * size.y * size.z)),
      cluster(std::move(others)),
      rank(static_cast<unsigned>(cluster->blocks.size())) {
    cluster->blocks.push_back(this);
    cluster->live += live;
    shared_size = shared_bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, std::max<size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
    shared = static_cast<unsigned char*>(memory);
    // All bits set: NaN in every floating type, an index far out of range in every integer.
    std::memset(shared, 0xff, shared_bytes);
    if (device.options.find_races && rank == 0) {
        const int blocks = static_cast<int>(device.cluster_size);
        cluster->races = std::make_unique<Races>(shared_bytes * device.cluster_size, live * blocks, blocks);
    }
    races = cluster->races.get();
    warps.resize((live + 31) / 32);
    warp_groups.resize((live + 127) / 128);
    ready_.assign((live + 63) / 64, 0);
    auto& spare = spare_threads();
    for (int i = 0; i < live; ++i) {
        if (spare.empty()) spare.push_back(std::make_unique<Thread>());
        threads.push_back(std::move(spare.back()));
        spare.pop_back();
        const unsigned n = static_cast<unsigned>(i);
        threads.back()->reset(this, i, {n % size.x, n / size.x % size.y, n / size.x / size.y});
        ready_[i / 64] |= 1ull << (i % 64);
    }
    count_block();
}

Block::~Block() {
    for (auto& thread : threads) spare_threads().push_back(std::move(thread));
    std::free(shared);
}

void Block::make_ready(Thread& thread, bool ready) {
    const uint64_t bit = 1ull << (thread.linear % 64);
    uint64_t& word = ready_[thread.linear / 64];
    word = ready ? word | bit : word & ~bit;
}

void Block::wake(Thread& thread) {
    thread.state = Thread::kReady;
    make_ready(thread, true);
}

Thread* Block::pick() {
    const int words = static_cast<int>(ready_.size());
    const Order order = device.options.order;
    const int start = order == Order::kRandom ? static_cast<int>(device.random() % words) : 0;
    for (int i = 0; i < words; ++i) {
        const int at = order == Order::kReverse ? words - 1 - i : (start + i) % words;
        uint64_t word = ready_[at];
        if (word == 0) continue;
        int bit;
        if (order == Order::kForward) {
            bit = __builtin_ctzll(word);
        } else if (order == Order::kReverse) {
            bit = 63 - __builtin_clzll(word);
        } else {
            for (int skip = static_cast<int>(device.random() % __builtin_popcountll(word)); skip > 0; --skip) {
                word &= word - 1;
            }
            bit = __builtin_ctzll(word);
        }
        return threads[at * 64 + bit].get();
    }
    return nullptr;
}

void Block::run(Thread& thread) {
    struct Job {
        static void go(void* pointer) {
            auto* self = static_cast<Thread*>(pointer);
            try {
                self->block->device.body();
            } catch (const Cancelled&) {
            } catch (...) {
                self->error = std::current_exception();
            }
            self->state = Thread::kDone;
        }
    };
    if (!thread.started) {
        thread.started = true;
        thread.fiber->start(&Job::go, &thread);
    }
    Thread* const before = running;
    running = &thread;
    thread.fiber->resume();
    running = before;
    if (thread.state != Thread::kDone) return;
    ++device.progress;
    make_ready(thread, false);
    --live;
    --cluster->live;
    if (thread.error) std::rethrow_exception(thread.error);
    if (device.early && !thread.waited) {
        throw Error("thread " + text(thread.index) + " of block " + text(index) +
                    " has ended without griddepcontrol.wait: the launch before this one may still run");
    }
    if (device.overtaken && !thread.let_next) {
        throw Error("thread " + text(thread.index) + " of block " + text(index) +
                    " has ended without griddepcontrol.launch_dependents: the next launch cannot begin early");
    }
    check_all_waited(thread);
    if (races) races->ended(thread.racer);
    // A barrier of all threads only waits for those that still run.
    if (cluster->arrived > 0 && cluster->arrived >= cluster->live) cluster->complete_phase();
    for (Barrier& barrier : barriers) {
        if (barrier.open_to_all && barrier.arrived > 0 && barrier.arrived >= live) complete(barrier);
    }
    for (const auto& meeting : warps[thread.linear / 32].meetings) {
        if (!meeting->done && meeting->mask >> (thread.linear % 32) & 1) {
            throw Error("thread " + text(thread.index) + " of block " + text(index) +
                        " has ended, but other lanes of " + "its warp wait for it in " + meeting->operation);
        }
    }
}

bool Block::all_spin_to_ready() {
    bool any = false;
    for (auto& thread : threads) {
        if (thread->state == Thread::kSpinning) {
            wake(*thread);
            any = true;
        }
    }
    return any;
}

// Unwinds threads that still run, so that their fibers can be reused.
void Block::cancel() {
    for (auto& thread : threads) {
        if (!thread->started || thread->state == Thread::kDone) continue;
        thread->cancelled = true;
        Thread* const before = running;
        running = thread.get();
        while (thread->state != Thread::kDone) thread->fiber->resume();
        running = before;
    }
}

std::string Block::who_waits_for_what() const {
    std::map<std::string, int> groups;
    for (const auto& thread : threads) {
        if (thread->state == Thread::kWaiting || thread->state == Thread::kSpinning) {
            ++groups[std::string(thread->waiting_for) + " at " + place(thread->site)];
        }
    }
    std::string out;
    for (const auto& [what, many] : groups) out += "; " + std::to_string(many) + " threads in " + what;
    return "block " + text(index) + out;
}

void Block::finish_requests() {
    for (Warp& warp : warps) {
        for (uint32_t slot = 0; slot < warp.requests.size(); ++slot) {
            for (const Request& request : warp.requests[slot].open) {
                // Complete requests have been counted already.
                if (request.lanes != 0 && request.lanes != 0xffffffffu) finish(slot, request);
            }
        }
        warp.requests.clear();
    }
}

// ----------------------------------------------------------------------------------------------------- barriers

void Exchange::learn(Exchange& theirs) {
    unpublished.insert(unpublished.end(), theirs.unpublished.begin(), theirs.unpublished.end());
    theirs.unpublished.clear();
    taken_up = std::max(taken_up, theirs.taken_up);
}

void Block::complete(Barrier& barrier) {
    ++device.progress;
    barrier.result = barrier.predicates;
    if (barrier.open_to_all) {
        for (const auto& thread : threads) exchange.learn(thread->exchange);
    }
    for (Thread* thread : barrier.arrivals) barrier.exchange.learn(thread->exchange);
    barrier.arrivals.clear();
    if (races && barrier.open_to_all && cluster->blocks.size() == 1) {
        races->all_meet();
    } else if (races && barrier.open_to_all) {
        std::vector<int> those;
        for (const auto& thread : threads) {
            if (thread->state != Thread::kDone) those.push_back(thread->racer);
        }
        races->meet(those);
    } else if (races) {
        for (const Thread* thread : barrier.waiting) races->acquire(thread->racer, barrier.clock);
        barrier.clock.clear();
    }
    barrier.arrived = barrier.expected = barrier.predicates = 0;
    barrier.open_to_all = false;
    for (Thread* thread : barrier.waiting) wake(*thread);
    barrier.waiting.clear();
}

void Block::arrive(int id, int count, bool wait, bool predicate, Site site) {
    if (id < 0 || id > 15) fail(site, "barrier " + std::to_string(id) + ": there are 0 to 15");
    if (count % 32 != 0) fail(site, "a barrier of " + std::to_string(count) + " threads: not a multiple of 32");
    Barrier& barrier = barriers[id];
    if (barrier.arrived > 0 && (barrier.expected != count || barrier.open_to_all != (count == 0))) {
        fail(site, "barrier " + std::to_string(id) + " for " + std::to_string(count) +
                       " threads, while a thread waits there for " + std::to_string(barrier.expected));
    }
    Thread& self = this_thread();
    barrier.expected = count;
    barrier.open_to_all = count == 0;
    barrier.predicates += predicate;
    ++barrier.arrived;
    if (count != 0) barrier.arrivals.push_back(&self);
    if (count != 0 && wait) self.met |= 1u << id;
    if (races && count != 0) races->release(self.racer, barrier.clock);
    if (barrier.arrived >= (count == 0 ? live : count)) {
        if (races && count != 0 && wait) races->acquire(self.racer, barrier.clock);
        complete(barrier);
        // The last to arrive may go on at once, or the others may run first.
        if (device.options.order == Order::kRandom && coin()) self.pause(Thread::kReady, "a barrier", site);
        return;
    }
    if (!wait) return;
    barrier.waiting.push_back(&self);
    self.pause(Thread::kWaiting, "a barrier", site);
}

void barrier(int id, int threads, Site site) {
    count("barrier", site);
    this_thread().block->arrive(id, threads, true, false, site);
}

void barrier_arrive(int id, int threads, Site site) {
    count("barrier", site);
    if (threads == 0) fail(site, "barrier.arrive needs a number of threads");
    this_thread().block->arrive(id, threads, false, false, site);
}

int barrier_count(bool predicate, Site site) {
    count("barrier", site);
    Block& block = *this_thread().block;
    block.arrive(0, 0, true, predicate, site);
    return block.barriers[0].result;
}

// -------------------------------------------------------------------------------------------------------- warps

namespace {

// The open meeting of a mask's lanes, or a new one. Fails if some of the lanes are in a different operation.
Meeting* find_meeting(Warp& warp, const char* operation, uint32_t mask, size_t input_bytes, Site site) {
    for (auto& m : warp.meetings) {
        if (m->done || !(m->mask & mask)) continue;
        if (m->mask != mask || std::strcmp(m->operation, operation) != 0 || m->input_bytes != input_bytes) {
            fail(site, std::string(operation) + ", while other lanes of its mask are in " + m->operation +
                           ", or have another mask");
        }
        return m.get();
    }
    if (warp.spare.empty()) warp.spare.push_back(std::make_unique<Meeting>());
    warp.meetings.push_back(std::move(warp.spare.back()));
    warp.spare.pop_back();
    Meeting* const meeting = warp.meetings.back().get();
    meeting->operation = operation;
    meeting->mask = mask;
    meeting->arrived = meeting->left = 0;
    meeting->done = false;
    meeting->input_bytes = input_bytes;
    return meeting;
}

// Makes a meeting that all lanes have left available for reuse.
void recycle(Warp& warp, const Meeting* meeting) {
    for (auto& m : warp.meetings) {
        if (m.get() != meeting) continue;
        warp.spare.push_back(std::move(m));
        std::swap(m, warp.meetings.back());
        warp.meetings.pop_back();
        return;
    }
}

}  // namespace

void warp_meet(const char* operation, uint32_t mask, const void* input, size_t input_bytes, void* output,
               size_t output_bytes, const std::function<void(uint32_t, LaneData&, LaneData&)>& whole, Site site,
               bool orders_memory) {
    Thread& self = this_thread();
    Block& block = *self.block;
    const int lane = self.linear % 32, first = self.linear - lane;
    count(operation, site);
    if (!(mask >> lane & 1)) fail(site, std::string(operation) + " with a mask that the thread itself is not in");
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        const size_t other = static_cast<size_t>(first + i);
        if (other >= block.threads.size() || block.threads[other]->state == Thread::kDone) {
            fail(site, std::string(operation) + " with lane " + std::to_string(i) + " in its mask, which has ended");
        }
    }
    Warp& warp = block.warps[self.linear / 32];
    Meeting* const meeting = find_meeting(warp, operation, mask, input_bytes, site);
    if (input_bytes) std::memcpy(meeting->in[lane], input, input_bytes);
    meeting->arrived |= 1u << lane;
    if (meeting->arrived == mask) {
        whole(mask, meeting->in, meeting->out);
        meeting->done = true;
        if (block.races && orders_memory) {
            std::vector<int> lanes;
            for (int i = 0; i < 32; ++i) {
                if (mask >> i & 1) lanes.push_back(self.racer - lane + i);
            }
            block.races->meet(lanes);
        }
        ++block.device.progress;
        for (int i = 0; i < 32; ++i) {
            if (i != lane && mask >> i & 1) block.wake(*block.threads[first + i]);
        }
        if (block.device.options.order == Order::kRandom && coin()) self.pause(Thread::kReady, operation, site);
    } else {
        self.pause(Thread::kWaiting, operation, site);
    }
    if (output_bytes) std::memcpy(output, meeting->out[lane], output_bytes);
    meeting->left |= 1u << lane;
    if (meeting->left == mask) recycle(warp, meeting);
}

void spin(Site site) { this_thread().pause(Thread::kSpinning, "a loop that waits for memory", site); }

}  // namespace emu
