"""C source of what surrounds a compiled step: the loop, and small triangular solves."""

from __future__ import annotations

__all__ = ["SOLVE_SHIM", "SOURCE"]

SOLVE_SHIM = (
    "AOTITorchError aoti_torch_cpu_solve_triangular("
    "AtenTensorHandle a, AtenTensorHandle b, int32_t upper, int32_t unitriangular, "
    "AtenTensorHandle* ret)"
)

# Only torch's stable C interface is used. A step takes its inputs' handles over, so each step
# gets new ones.
SOURCE = r"""
#include <stddef.h>
#include <stdint.h>

typedef void* handle;
typedef int32_t (*step_t)(void*, handle*, size_t, handle*, size_t, void*, void*);

extern int32_t aoti_torch_new_tensor_handle(handle, handle*);
extern int32_t aoti_torch_delete_tensor_object(handle);
extern int32_t aoti_torch_get_data_ptr(handle, void**);
extern int32_t aoti_torch_get_dim(handle, int64_t*);
extern int32_t aoti_torch_get_sizes(handle, int64_t**);
extern int32_t aoti_torch_get_strides(handle, int64_t**);
extern int32_t aoti_torch_get_dtype(handle, int32_t*);
extern int32_t aoti_torch_dtype_float64(void);
extern int32_t aoti_torch_empty_strided(
    int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, handle*);

/* Runs a step many times; gives 0, or the error of the step that failed. */
int32_t flowvi_run(
    step_t step, void* container, handle* inputs, size_t num_inputs, handle* scratch,
    int64_t num_steps) {
  for (int64_t k = 0; k < num_steps; ++k) {
    for (size_t i = 0; i < num_inputs; ++i) {
      int32_t error = aoti_torch_new_tensor_handle(inputs[i], &scratch[i]);
      if (error) return error;
    }
    int32_t error = step(container, scratch, num_inputs, NULL, 0, NULL, NULL);
    if (error) return error;
  }
  return 0;
}

void flowvi_free(handle* inputs, size_t num_inputs) {
  for (size_t i = 0; i < num_inputs; ++i) aoti_torch_delete_tensor_object(inputs[i]);
}

/* Rows of a are contiguous: dot products. Columns are: updates of the rest. */
#define SOLVE(NAME, T)                                                                          \
  static void NAME(                                                                             \
      const T* a, int64_t down, int64_t along, T* x, int64_t n, int64_t k, int upper,           \
      int unit) {                                                                               \
    for (int64_t step = 0; step < n; ++step) {                                                  \
      int64_t i = upper ? n - 1 - step : step;                                                  \
      int64_t low = upper ? i + 1 : 0, high = upper ? n : i;                                    \
      if (k == 1 && along == 1) {                                                               \
        T sum = 0;                                                                              \
        for (int64_t j = low; j < high; ++j) sum += a[i * down + j] * x[j];                     \
        x[i] = unit ? x[i] - sum : (x[i] - sum) / a[i * down + i];                              \
        continue;                                                                               \
      }                                                                                         \
      if (k == 1) {                                                                             \
        if (!unit) x[i] /= a[i * down + i * along];                                             \
        T top = x[i];                                                                           \
        const T* column = a + i * along;                                                        \
        int64_t from = upper ? 0 : i + 1, to = upper ? i : n;                                   \
        for (int64_t j = from; j < to; ++j) x[j] -= column[j * down] * top;                     \
        continue;                                                                               \
      }                                                                                         \
      for (int64_t j = low; j < high; ++j) {                                                    \
        T factor = a[i * down + j * along];                                                     \
        for (int64_t c = 0; c < k; ++c) x[i * k + c] -= factor * x[j * k + c];                  \
      }                                                                                         \
      if (!unit)                                                                                \
        for (int64_t c = 0; c < k; ++c) x[i * k + c] /= a[i * down + i * along];                \
    }                                                                                           \
  }

SOLVE(solve_float, float)
SOLVE(solve_double, double)

#define COPY(T)                                                                                 \
  for (int64_t i = 0; i < n; ++i)                                                               \
    for (int64_t c = 0; c < k; ++c)                                                             \
      ((T*)x)[offset_x + i * k + c] = ((const T*)b)[offset_b + i * sb[rank - 2] + c * sb[rank - 1]]

/* Batches of a and b agree in shape. */
int32_t aoti_torch_cpu_solve_triangular(
    handle a_handle, handle b_handle, int32_t upper, int32_t unitriangular, handle* result) {
  void *a, *b, *x;
  int64_t rank, *sizes, *sa, *sb, contiguous[16], total = 1;
  int32_t dtype, error;
  if ((error = aoti_torch_get_data_ptr(a_handle, &a))) return error;
  if ((error = aoti_torch_get_data_ptr(b_handle, &b))) return error;
  if ((error = aoti_torch_get_dim(b_handle, &rank))) return error;
  if ((error = aoti_torch_get_sizes(b_handle, &sizes))) return error;
  if ((error = aoti_torch_get_strides(a_handle, &sa))) return error;
  if ((error = aoti_torch_get_strides(b_handle, &sb))) return error;
  if ((error = aoti_torch_get_dtype(b_handle, &dtype))) return error;
  if (rank > 16) return 1;
  for (int64_t d = rank - 1; d >= 0; --d) {
    contiguous[d] = total;
    total *= sizes[d];
  }
  error = aoti_torch_empty_strided(rank, sizes, contiguous, dtype, 0, 0, result);
  if (error) return error;
  if ((error = aoti_torch_get_data_ptr(*result, &x))) return error;
  int64_t n = sizes[rank - 2], k = sizes[rank - 1];
  int is_double = dtype == aoti_torch_dtype_float64();
  for (int64_t start = 0; start < total; start += n * k) {
    int64_t left = start / (n * k), offset_a = 0, offset_b = 0, offset_x = start;
    for (int64_t d = rank - 3; d >= 0; --d) {
      offset_a += (left % sizes[d]) * sa[d];
      offset_b += (left % sizes[d]) * sb[d];
      left /= sizes[d];
    }
    int64_t down = sa[rank - 2], along = sa[rank - 1];
    if (is_double) {
      COPY(double);
      solve_double(
          (const double*)a + offset_a, down, along, (double*)x + offset_x, n, k, upper,
          unitriangular);
    } else {
      COPY(float);
      solve_float(
          (const float*)a + offset_a, down, along, (float*)x + offset_x, n, k, upper,
          unitriangular);
    }
  }
  return 0;
}
"""
