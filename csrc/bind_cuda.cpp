// megatron_tcod._C_cuda: the CUDA kernels for Python. Addresses and the stream come as integers;
// megatron_tcod/ops/cuda_chunk.py has checked what they belong to, set the device and holds the tensors.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_logits.h"
#include "cuda/runtime.h"
#include "divergence_api.h"

namespace py = pybind11;

namespace {

void check(const char* kernel, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(kernel) + " did not start: " + tcod_cuda_error_string(error));
}

void partial_sums(const TcodLogits& logits, std::uintptr_t column, std::uintptr_t packed_student,
                  std::uintptr_t packed_gap, int64_t packed_row_stride, std::uintptr_t sums, std::uintptr_t stream) {
  TcodPartialSums args = {};
  args.logits = logits;
  args.column = at<const int64_t>(column);
  args.packed_student = at<void>(packed_student);
  args.packed_gap = at<void>(packed_gap);
  args.packed_row_stride = packed_row_stride;
  args.sums = at<double>(sums);
  args.sums_stride = logits.rows;
  check("partial_sums", tcod_cuda_partial_sums(&args, at<void>(stream)));
}

void mixture_sums(const TcodLogits& logits, std::uintptr_t table, int64_t table_stride, double beta,
                  std::uintptr_t sums, std::uintptr_t stream) {
  TcodMixtureSums args = {};
  args.logits = logits;
  args.table = at<const double>(table);
  args.table_stride = table_stride;
  args.beta = beta;
  args.sums = at<double>(sums);
  args.sums_stride = logits.rows;
  check("mixture_sums", tcod_cuda_mixture_sums(&args, at<void>(stream)));
}

void logits_gradient(const TcodLogits& logits, std::uintptr_t table, int64_t table_stride, std::uintptr_t row_scale,
                     std::uintptr_t column, int kind, double beta, std::uintptr_t out, int64_t out_row_stride,
                     int out_dtype, std::uintptr_t stream) {
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
  check("logits_gradient", tcod_cuda_logits_gradient(&args, at<void>(stream)));
}

std::vector<std::string> archs() {
  std::vector<std::string> names;
  std::istringstream capabilities(tcod_cuda_archs());
  for (std::string capability; std::getline(capabilities, capability, ',');) {
    names.push_back("sm_" + std::to_string(std::stoi(capability) / 10));
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "CUDA kernels of megatron_tcod; call them through megatron_tcod.ops.cuda_chunk";
  py::class_<TcodLogits>(module, "Logits", py::module_local())
      .def(py::init(&logits_of), py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("student_row_stride"),
           py::arg("teacher_row_stride"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("is_packed"),
           py::arg("student_scale"), py::arg("teacher_scale"));
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("partial_sums", &partial_sums, release, py::arg("logits"), py::kw_only(), py::arg("column"),
             py::arg("packed_student"), py::arg("packed_gap"), py::arg("packed_row_stride"), py::arg("sums"),
             py::arg("stream"));
  module.def("mixture_sums", &mixture_sums, release, py::arg("logits"), py::kw_only(), py::arg("table"),
             py::arg("table_stride"), py::arg("beta"), py::arg("sums"), py::arg("stream"));
  module.def("logits_gradient", &logits_gradient, release, py::arg("logits"), py::kw_only(), py::arg("table"),
             py::arg("table_stride"), py::arg("row_scale"), py::arg("column"), py::arg("kind"), py::arg("beta"),
             py::arg("out"), py::arg("out_row_stride"), py::arg("out_dtype"), py::arg("stream"));
  module.def("device_count", &tcod_cuda_device_count, "Devices that this process can use; 0 also without a driver.");
  module.def("archs", &archs, "Architectures that the kernels were compiled for; newer ones use the PTX of the last.");
}
