// Makes a device current for a while. For CUDA and for the emulator (tests/emulator) alike; each brings its calls.
#pragma once

namespace qlk {

// Api: current() and set(device), as cudaGetDevice and cudaSetDevice; has_context(device): whether set(device) would
// find a context to make current.
template <class Api>
class DeviceGuardOf {
  public:
    explicit DeviceGuardOf(int device) : before_(Api::current()) {
        if (device == before_) return;
        // Device 0 is also what a thread is told that has used none yet. To make it current then would create a context
        // there, which takes memory and time on a card that this process may have nothing to do with.
        const bool had_context = Api::has_context(before_);
        Api::set(device);
        restores_ = had_context;
    }
    ~DeviceGuardOf() {
        if (restores_) Api::restore(before_);
    }
    DeviceGuardOf(const DeviceGuardOf&) = delete;
    DeviceGuardOf& operator=(const DeviceGuardOf&) = delete;

  private:
    int before_;
    bool restores_ = false;
};

}  // namespace qlk
