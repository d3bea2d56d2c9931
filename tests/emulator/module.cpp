// The Python module _emulated: the kernels of csrc/cuda on the emulator, its options and counters, and kernels with and
// without faults that test it.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_conformance.h"
#include "bindings/cuda.h"
#include "calls.h"
#include "emulator.h"
#include "managed.h"
#include "operands.h"
#include "samples.h"

namespace {

uintptr_t offset_in_file(const void* kernel) {
    Dl_info module{};
    const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    if (!dladdr(kernel, &module)) throw std::runtime_error("a kernel lies in no module");
    return address(kernel) - address(module.dli_fbase);
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
    namespace py = pybind11;
    bind_cuda(m);
    state_operands(m);
    py::register_exception<emu::Error>(m, "EmulatorError", PyExc_RuntimeError);
    m.def(
        "configure",
        [](const std::string& order, const std::string& landing, uint64_t seed, bool find_races, int resident_blocks,
           int multiprocessors, int architecture, size_t max_shared_bytes, bool managed, size_t page_bytes,
           size_t managed_limit, bool forbid_faults, size_t free_bytes, bool capturing, bool early_launches,
           bool executes, int driver_version) {
            emu::Options o;
            const auto pick = [](const std::string& name, std::initializer_list<const char*> names) {
                int i = 0;
                for (const char* one : names) {
                    if (name == one) return i;
                    ++i;
                }
                throw std::invalid_argument("'" + name + "' is not an option");
            };
            o.order = static_cast<emu::Order>(pick(order, {"forward", "reverse", "random"}));
            o.landing = static_cast<emu::Landing>(pick(landing, {"earliest", "latest", "random"}));
            o.seed = seed;
            o.find_races = find_races;
            o.resident_blocks = resident_blocks;
            o.multiprocessors = multiprocessors;
            o.architecture = architecture;
            o.max_shared_bytes = max_shared_bytes;
            o.managed = managed;
            o.page_bytes = page_bytes;
            o.managed_limit = managed_limit;
            o.forbid_faults = forbid_faults;
            o.free_bytes = free_bytes;
            o.capturing = capturing;
            o.early_launches = early_launches;
            o.executes = executes;
            o.driver_version = driver_version;
            emu::options() = o;
            emu::forget_held();
            emu::forget_misstated();
            emu::forget_devices();
            emu::set_device(0);
        },
        py::arg("order") = "forward", py::arg("landing") = "latest", py::arg("seed") = 0, py::arg("find_races") = true,
        py::arg("resident_blocks") = 1, py::arg("multiprocessors") = 2, py::arg("architecture") = 90,
        py::arg("max_shared_bytes") = 227 * 1024, py::arg("managed") = true, py::arg("page_bytes") = 65536,
        py::arg("managed_limit") = size_t{1} << 40, py::arg("forbid_faults") = false,
        py::arg("free_bytes") = size_t{64} << 30, py::arg("capturing") = false, py::arg("early_launches") = true,
        py::arg("executes") = true, py::arg("driver_version") = emu::kRuntimeVersion);
    m.def("forget_devices", &emu::forget_devices, "As if process and thread had just begun.");
    m.def("set_device", &emu::set_device);
    m.def("current_device", &emu::current_device);
    m.def("contexts", [] {
        std::vector<int> devices;
        for (int device = 0; device < emu::kDevices; ++device) {
            if (emu::has_context(device)) devices.push_back(device);
        }
        return devices;
    });
    m.def("misstate", &emu::misstate, py::arg("name"), py::arg("fewer") = 0, py::arg("read_only") = false,
          "Operands of that name count as so many bytes shorter, or as only read, until configure() is called.");
    m.def("paging", [] { return emu::paging().json(); });
    m.def("reset_paging", &emu::reset_paging);
    m.def("counters", [] { return emu::counters().json(); });
    m.def("reset_counters", &emu::reset_counters);
    m.def(
        "kernels_run",
        [] {
            std::vector<uintptr_t> offsets;
            for (const void* kernel : emu::kernels_run()) offsets.push_back(offset_in_file(kernel));
            return offsets;
        },
        "The kernels that have run since reset_counters(), as addresses in the module's file: nm gives their names.");
    m.def(
        "carveouts",
        [] {
            std::map<uintptr_t, int> percent;
            for (const auto& [kernel, share] : emu::carveouts()) percent[offset_in_file(kernel)] = share;
            return percent;
        },
        "The carve-outs of shared memory that kernels have asked for since configure(), by such addresses.");
    qlk::conformance::bind_conformance(m);
    qlk::conformance::bind_sm90(m);
    m.def("samples", &emu::samples, "Names of the kernels that test the emulator.");
    m.def(
        "run_sample",
        [](const std::string& name, const std::vector<uint32_t>& input, size_t output, int threads, int blocks) {
            return emu::run_sample(name, input, output, threads, blocks);
        },
        py::arg("name"), py::arg("input"), py::arg("output"), py::arg("threads") = 64, py::arg("blocks") = 1);
    m.def("device_samples", &emu::device_samples, "Names of calls that need their device to be current.");
    m.def("run_device_sample", &emu::run_device_sample, py::arg("name"), py::arg("guarded"));
    m.def("operand_samples", &emu::operand_samples, "Names of the kernels with an access outside their operands.");
    m.def("run_operand_sample", &emu::run_operand_sample, py::arg("name"), py::arg("stated"));
    m.def("sm90_samples", &emu::sm90_samples, "Names of the samples for sm_90.");
    m.def("run_sm90_sample", &emu::run_sm90_sample, py::arg("name"), py::arg("input"));
}
