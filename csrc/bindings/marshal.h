// Reads the fields of a Python dict, one after another, and binds the class Weight.
//
// An operation is called with one dict, whose keys are the names of its struct's fields in their order (kernels.h).
// That costs the host less than passing each field as an argument, and a missing or misplaced field is an error.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "error.h"
#include "kernels.h"

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

inline qlk::DType dtype_of(int code) {
    QLK_CHECK(code >= 0 && code <= 2, "unknown dtype code " + std::to_string(code));
    return static_cast<qlk::DType>(code);
}

// The values of a dict, one after another.
class Fields {
  public:
    explicit Fields(const py::dict& dict) : dict_(dict.ptr()) {}

    template <class T>
    T* pointer(const char* name) {
        const unsigned long long address = PyLong_AsUnsignedLongLong(next(name));
        if (address == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw py::error_already_set();
        return at<T>(static_cast<Address>(address));
    }
    int64_t integer(const char* name) {
        const long long value = PyLong_AsLongLong(next(name));
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    // Any integer, modulo 2^64.
    uint64_t bits(const char* name) {
        const unsigned long long value = PyLong_AsUnsignedLongLongMask(next(name));
        if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    double number(const char* name) {
        const double value = PyFloat_AsDouble(next(name));
        if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    bool flag(const char* name) {
        const int value = PyObject_IsTrue(next(name));
        if (value < 0) throw py::error_already_set();
        return value == 1;
    }
    qlk::DType dtype(const char* name) { return dtype_of(static_cast<int>(integer(name))); }
    // A Weight of this extension.
    qlk::WeightView weight(const char* name) { return py::handle(next(name)).cast<const qlk::WeightView&>(); }

    // Throws if a field is left over.
    void end() {
        PyObject *key, *value;
        QLK_CHECK(PyDict_Next(dict_, &position_, &key, &value) == 0, "there is no field '" + text(key) + "'");
    }

  private:
    PyObject* next(const char* name) {
        PyObject *key, *value;
        QLK_CHECK(PyDict_Next(dict_, &position_, &key, &value) != 0,
                  "the field '" + std::string(name) + "' is missing");
        const char* key_name = PyUnicode_AsUTF8(key);
        if (key_name == nullptr) throw py::error_already_set();
        QLK_CHECK(std::strcmp(key_name, name) == 0,
                  "the field '" + std::string(name) + "' is missing, or '" + text(key) + "' comes before it");
        return value;
    }
    static std::string text(PyObject* key) { return py::str(key).cast<std::string>(); }

    PyObject* dict_;
    Py_ssize_t position_ = 0;
};

// The class Weight: a WeightView, made once for a weight and kept while its tensors stay where they are.
// module_local: the emulator's module has one of its own.
inline void bind_weight(py::module_& m) {
    py::class_<qlk::WeightView>(m, "Weight", py::module_local()).def(py::init([](const py::dict& fields) {
        Fields f(fields);
        qlk::WeightView weight = {
            f.pointer<const uint8_t>("packed"),
            f.pointer<const float>("absmax"),
            f.pointer<const uint8_t>("absmax_code"),
            f.pointer<const float>("nested_absmax"),
            f.pointer<const float>("nested_table"),
            f.pointer<const float>("nested_offset"),
            f.integer("n"),
            f.integer("k"),
        };
        // An address on the host, whichever device the rest is on; 0 for NF4.
        if (const float* const levels = f.pointer<const float>("levels")) {
            float values[16];
            for (int i = 0; i < 16; ++i) {
                QLK_CHECK(levels[i] >= -1 && levels[i] <= 1, "levels should be from -1 to 1");
                values[i] = levels[i];
            }
            weight.levels = qlk::levels_from(values);
        }
        f.end();
        return weight;
    }));
}
