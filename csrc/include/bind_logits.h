// What both pybind11 modules make of Python's integers: addresses, and the struct TcodLogits.

#pragma once

#include <cstdint>

#include "divergence_api.h"

namespace {

template <class T>
inline T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline TcodLogits logits_of(std::uintptr_t student, std::uintptr_t teacher, int64_t student_row_stride,
                            int64_t teacher_row_stride, int64_t rows, int64_t columns, int dtype, bool is_packed,
                            double student_scale, double teacher_scale) {
  TcodLogits logits = {};
  logits.student = at<const void>(student);
  logits.teacher = at<const void>(teacher);
  logits.student_row_stride = student_row_stride;
  logits.teacher_row_stride = teacher_row_stride;
  logits.rows = rows;
  logits.columns = columns;
  logits.dtype = dtype;
  logits.is_packed = is_packed;
  logits.student_scale = static_cast<float>(student_scale);
  logits.teacher_scale = static_cast<float>(teacher_scale);
  return logits;
}

}  // namespace
