// megatron_tcod._C: the CPU kernels for Python. Addresses come as integers; megatron_tcod/ops/cpp_chunk.py has checked
// what they belong to and holds the tensors. What only the data can tell, the range of the targets, is checked here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_logits.h"
#include "cpu/divergence.h"
#include "divergence_api.h"

namespace py = pybind11;

namespace {

void check_columns(const int64_t* column, const TcodLogits& logits) {
  for (int64_t row = 0; column != nullptr && row < logits.rows; ++row) {
    if (column[row] < -1 || column[row] >= logits.columns) {
      throw py::value_error("column[" + std::to_string(row) + "] must be -1 or in [0, " +
                            std::to_string(logits.columns) + "), the columns of this shard, got " +
                            std::to_string(column[row]) + "; use -1 for a target that is elsewhere");
    }
  }
}

void partial_sums(const TcodLogits& logits, std::uintptr_t column, std::uintptr_t packed_student,
                  std::uintptr_t packed_gap, int64_t packed_row_stride, std::uintptr_t sums, int num_threads) {
  TcodPartialSums args = {};
  args.logits = logits;
  args.column = at<const int64_t>(column);
  args.packed_student = at<void>(packed_student);
  args.packed_gap = at<void>(packed_gap);
  args.packed_row_stride = packed_row_stride;
  args.sums = at<double>(sums);
  args.sums_stride = logits.rows;
  check_columns(args.column, logits);
  tcod_cpu_partial_sums(&args, num_threads);
}

void mixture_sums(const TcodLogits& logits, std::uintptr_t table, int64_t table_stride, double beta,
                  std::uintptr_t sums, int num_threads) {
  TcodMixtureSums args = {};
  args.logits = logits;
  args.table = at<const double>(table);
  args.table_stride = table_stride;
  args.beta = beta;
  args.sums = at<double>(sums);
  args.sums_stride = logits.rows;
  tcod_cpu_mixture_sums(&args, num_threads);
}

void logits_gradient(const TcodLogits& logits, std::uintptr_t table, int64_t table_stride, std::uintptr_t row_scale,
                     std::uintptr_t column, int kind, double beta, std::uintptr_t out, int64_t out_row_stride,
                     int out_dtype, int num_threads) {
  TcodLogitsGradient args = {};
  args.logits = logits;
  args.table = at<const double>(table);
  args.table_stride = table_stride;
  args.row_scale = at<const float>(row_scale);
  args.column = at<const int64_t>(column);
  args.kind = kind;
  args.beta = beta;
  args.out = at<void>(out);
  args.out_row_stride = out_row_stride;
  args.out_dtype = out_dtype;
  check_columns(args.column, logits);
  tcod_cpu_logits_gradient(&args, num_threads);
}

void select_isa(const std::string& name) {
  if (tcod_cpu_select_isa(name)) return;
  std::string known;
  for (const std::string& isa : tcod_cpu_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw py::value_error("instruction set '" + name + "' is unknown or not on this machine; it runs " + known);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of megatron_tcod; call them through megatron_tcod.ops.cpp_chunk";
  py::class_<TcodLogits>(module, "Logits")
      .def(py::init(&logits_of), py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("student_row_stride"),
           py::arg("teacher_row_stride"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("is_packed"),
           py::arg("student_scale"), py::arg("teacher_scale"));
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("partial_sums", &partial_sums, release, py::arg("logits"), py::kw_only(), py::arg("column"),
             py::arg("packed_student"), py::arg("packed_gap"), py::arg("packed_row_stride"), py::arg("sums"),
             py::arg("num_threads"));
  module.def("mixture_sums", &mixture_sums, release, py::arg("logits"), py::kw_only(), py::arg("table"),
             py::arg("table_stride"), py::arg("beta"), py::arg("sums"), py::arg("num_threads"));
  module.def("logits_gradient", &logits_gradient, release, py::arg("logits"), py::kw_only(), py::arg("table"),
             py::arg("table_stride"), py::arg("row_scale"), py::arg("column"), py::arg("kind"), py::arg("beta"),
             py::arg("out"), py::arg("out_row_stride"), py::arg("out_dtype"), py::arg("num_threads"));
  module.def("isas", &tcod_cpu_isas, "Instruction sets that this machine runs, fastest first.");
  module.def("isa", &tcod_cpu_isa, "The instruction set in use.");
  module.def("select_isa", &select_isa, py::arg("name"), "Use another instruction set from now on; for tests.");
#if defined(_OPENMP)
  module.attr("has_openmp") = true;
#else
  module.attr("has_openmp") = false;
#endif
}
