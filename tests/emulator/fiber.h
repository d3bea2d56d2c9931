// Fibers: functions with stacks of their own, switched by hand on one thread of the processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu {

// A stack that runs one job after another. resume() goes on with the job until it calls Fiber::leave() or returns.
class Fiber {
  public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next resume() starts job(argument). It must not let an exception out.
    void start(void (*job)(void*), void* argument);
    void resume();
    // From within a job: back to whoever resumed.
    void leave();

  private:
    static void entry(Fiber* self);
    void prepare_stack();
    void switch_to_job();
    void switch_to_caller();

    void (*job_)(void*) = nullptr;
    void* argument_ = nullptr;
    unsigned char* stack_ = nullptr;  // mmapped, the lowest page unreadable
    size_t size_ = 0;
    void* job_context_ = nullptr;  // where each side goes on: a stack pointer, or a ucontext_t
    void* caller_context_ = nullptr;
    // AddressSanitizer has to be told of each change of stack.
    void* job_fake_stack_ = nullptr;
    void* caller_fake_stack_ = nullptr;
    const void* caller_bottom_ = nullptr;
    size_t caller_size_ = 0;
};

}  // namespace emu
