// Fibers: functions with their own stacks, switched by hand on one host thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu {

// A stack that runs one job after another. resume() continues the job until it calls leave() or returns.
class Fiber {
  public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next resume() starts job(argument). The job must not throw.
    void start(void (*job)(void*), void* argument);
    void resume();
    // Called by the job: returns to the caller of resume().
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
    void* job_context_ = nullptr;  // where each side continues: a stack pointer or a ucontext_t
    void* caller_context_ = nullptr;
    // AddressSanitizer has to be told about each change of stacks.
    void* job_fake_stack_ = nullptr;
    void* caller_fake_stack_ = nullptr;
    const void* caller_bottom_ = nullptr;
    size_t caller_size_ = 0;
};

}  // namespace emu
