#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__x86_64__)
// void emu_switch(void** save, void* load): pushes the callee-saved registers, switches stack pointers and pops the
// other side's registers. About ten times as fast as swapcontext, which asks the kernel for the signal mask each time.
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
extern "C" void emu_switch(void** save, void* load);
#endif

namespace emu {
namespace {
// Under sanitizers frames are several times as large. Pages that are never touched cost nothing.
constexpr size_t kStack = EMU_ASAN ? 512 * 1024 : 128 * 1024;
}  // namespace

Fiber::Fiber() : size_(kStack) {
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<unsigned char*>(memory);
    mprotect(stack_, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
    prepare_stack();
}

Fiber::~Fiber() {
    munmap(stack_, size_);
#if !defined(__x86_64__)
    delete static_cast<ucontext_t*>(job_context_);
    delete static_cast<ucontext_t*>(caller_context_);
#endif
}

void Fiber::start(void (*job)(void*), void* argument) {
    job_ = job;
    argument_ = argument;
}

void Fiber::resume() {
#if EMU_ASAN
    __sanitizer_start_switch_fiber(&caller_fake_stack_, stack_, size_);
#endif
    switch_to_job();
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(caller_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::leave() {
#if EMU_ASAN
    __sanitizer_start_switch_fiber(&job_fake_stack_, caller_bottom_, caller_size_);
#endif
    switch_to_caller();
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(job_fake_stack_, &caller_bottom_, &caller_size_);
#endif
}

// The first frame of the stack. It never returns: when a job is done it leaves, and the next one starts in this frame.
void Fiber::entry(Fiber* self) {
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &self->caller_bottom_, &self->caller_size_);
#endif
    for (;;) {
        self->job_(self->argument_);
        self->leave();
    }
}

#if defined(__x86_64__)

namespace {
// entry(self) needs its argument in a register that emu_switch restores.
asm(R"(
.text
.type emu_fiber_start, @function
emu_fiber_start:
    movq %r12, %rdi
    call *%r13
    ud2
.size emu_fiber_start, .-emu_fiber_start
)");
extern "C" void emu_fiber_start();
}  // namespace

void Fiber::prepare_stack() {
    // What emu_switch pops: r15, r14, r13, r12, rbx, rbp, the return address. The stack is 16-byte aligned at the call.
    void** top = reinterpret_cast<void**>(stack_ + size_ - 64);
    void* image[7] = {nullptr, nullptr, reinterpret_cast<void*>(&Fiber::entry),   this,
                      nullptr, nullptr, reinterpret_cast<void*>(&emu_fiber_start)};
    top -= 7;
    std::memcpy(top, image, sizeof image);
    job_context_ = top;
}
void Fiber::switch_to_job() { emu_switch(&caller_context_, job_context_); }
void Fiber::switch_to_caller() { emu_switch(&job_context_, caller_context_); }

#else

void Fiber::prepare_stack() {
    auto* context = new ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = stack_;
    context->uc_stack.ss_size = size_;
    context->uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(this);
    auto start =
        +[](unsigned high, unsigned low) { entry(reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low)); };
    makecontext(context, reinterpret_cast<void (*)()>(start), 2, static_cast<unsigned>(address >> 32),
                static_cast<unsigned>(address));
    job_context_ = context;
    caller_context_ = new ucontext_t;
}
void Fiber::switch_to_job() {
    swapcontext(static_cast<ucontext_t*>(caller_context_), static_cast<ucontext_t*>(job_context_));
}
void Fiber::switch_to_caller() {
    swapcontext(static_cast<ucontext_t*>(job_context_), static_cast<ucontext_t*>(caller_context_));
}

#endif

}  // namespace emu
