// The model's Python face (csrc/sim/__init__.py): dials, counters and reports as objects. Part of the tests' library, never of a wheel.
#include "face.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace gk::sim;

PYBIND11_MODULE(_cuda_sim, m, py::mod_gil_not_used()) {
  py::class_<Dials>(m, "Dials", py::module_local(), "What is played; README.md says what each means.")
      .def_readwrite("seed", &Dials::seed)
      .def_readwrite("count", &Dials::count)
      .def_readwrite("arch", &Dials::arch)
      .def_readwrite("processors", &Dials::processors)
      .def_readwrite("trap", &Dials::trap);
  m.attr("dials") = py::cast(&dials, py::return_value_policy::reference);

  py::class_<Counters>(m, "Counters", py::module_local(), "What a kernel's launches did.")
#define GK_COUNTER(name) .def_readonly(#name, &Counters::name)
      GK_COUNTER(launches) GK_COUNTER(blocks) GK_COUNTER(mma) GK_COUNTER(ldmatrix) GK_COUNTER(cp_async)
          GK_COUNTER(shared_requests) GK_COUNTER(shared_wavefronts) GK_COUNTER(shared_ideal) GK_COUNTER(global_requests)
              GK_COUNTER(global_sectors) GK_COUNTER(global_ideal) GK_COUNTER(global_bytes) GK_COUNTER(global_bytes_16)
                  .def("__repr__", [](const Counters& c) {
    return "Counters(launches=" + std::to_string(c.launches) + ", blocks=" + std::to_string(c.blocks) +
           ", mma=" + std::to_string(c.mma) + ", shared_wavefronts=" + std::to_string(c.shared_wavefronts) +
           ", global_sectors=" + std::to_string(c.global_sectors) + ")";
  });
  m.def("take_counters", &take_counters, "Kernel -> Counters, since the last call.");

  py::class_<Wait>(m, "Wait", py::module_local(), "What some lanes of a warp wait for in a deadlock.")
      .def_readonly("warp", &Wait::warp)
      .def_readonly("lanes", &Wait::lanes)
      .def_readonly("at", &Wait::at, "\"barrier\", a warp operation's name, or \"\" where they have exited")
      .def_readonly("barrier", &Wait::barrier)
      .def_readonly("arrived", &Wait::arrived)
      .def_readonly("expected", &Wait::expected)
      .def("__repr__", [](const Wait& w) { return "Wait(warp=" + std::to_string(w.warp) + ", at='" + w.at + "')"; });
  py::class_<Report>(m, "Report", py::module_local(), "Of a launch that went wrong.")
      .def_readonly("kernel", &Report::kernel)
      .def_property_readonly("block", [](const Report& r) { return py::make_tuple(r.block[0], r.block[1], r.block[2]); })
      .def_readonly("warp", &Report::warp)
      .def_readonly("lane", &Report::lane)
      .def_readonly("what", &Report::what)
      .def_readonly("text", &Report::text)
      .def_readonly("waits", &Report::waits);
  m.def("take_report", &take_report, "The Report of the last launch that went wrong, once; None where none has.");
}
