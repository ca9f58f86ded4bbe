// flash_attn/lib/small_calls: the short way of eager calls of q, k, v and perhaps a mask, see
// flash_attn/torch_op/plain.py, as functions of Python's C interface. What it asks takes as long as a small kernel, and
// twice that as Python.
//
// Python says once, by configure(), whom to ask and call: what torch has no public name for is known there alone.
#include <Python.h>

#include <initializer_list>
#include <utility>

extern "C" {
// From Python 3.11 on, though named by headers for its stable interface from 3.12 on.
__attribute__((weak)) PyObject* PyObject_Vectorcall(PyObject* callable, PyObject* const* args, size_t count,
                                                    PyObject* names);
}

namespace {

struct Raised {};  // Python's error is set

/// A reference that is owned.
class Object {
 public:
  Object() = default;
  /// What a function of Python returned, nullptr with an error.
  explicit Object(PyObject* returned) : object_(returned) {
    if (object_ == nullptr) throw Raised();
  }
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&&) = delete;
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() && { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_ = nullptr;
};

PyObject* shared(PyObject* object) {
  Py_INCREF(object);
  return object;
}

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

/// What configure() was given, in its order; references that are kept for ever.
struct Given {
  PyObject *tensor_type, *parameter_type, *bool_dtype;
  PyObject *functions, *at_rest;  // private.Watchers
  PyObject *has_torch_function, *any_autocast, *autocast_changes, *is_deterministic;
  unsigned long long is_grad_enabled;  // address of torch's C function, which takes a tenth of the time of Python's
  PyObject *plain, *extension;         // names of the modules, of which op functions and `LARGEST` are read
  PyObject *mark, *raise_out_of_memory;
  int full, causal, shared_heads, without_lse, deterministic;  // options of the plain ops
} given;

struct Names {
  PyObject *is_cuda = interned("is_cuda"), *is_cpu = interned("is_cpu"), *requires_grad = interned("requires_grad"),
           *dtype = interned("dtype"), *ndim = interned("ndim"), *numel = interned("numel"),
           *plain_forward = interned("_forward"), *masked_forward = interned("_masked_forward"),
           *apply = interned("_apply"), *forward = interned("forward"), *largest = interned("LARGEST"),
           *scale = Py_BuildValue("(s)", "scale");
} const* names = nullptr;

/// `keywords`: names of the last arguments, a tuple.
PyObject* called(PyObject* function, std::initializer_list<PyObject*> args, PyObject* keywords = nullptr) {
  const auto count = Py_ssize_t(args.size()), named = keywords == nullptr ? 0 : PyTuple_Size(keywords);
  if (PyObject_Vectorcall != nullptr) {
    return PyObject_Vectorcall(function, args.begin(), size_t(count - named), keywords);
  }
  const Object positional(PyTuple_New(count - named)), by_name(PyDict_New());
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const argument = args.begin()[i];
    if (i < count - named) {
      PyTuple_SetItem(positional.get(), i, shared(argument));
    } else if (PyDict_SetItem(by_name.get(), PyTuple_GetItem(keywords, i - (count - named)), argument) != 0) {
      throw Raised();
    }
  }
  return PyObject_Call(function, positional.get(), by_name.get());
}

Object call(PyObject* function, std::initializer_list<PyObject*> args) { return Object(called(function, args)); }

bool is_true(const Object& object) {
  if (object.get() == Py_True) return true;
  if (object.get() == Py_False) return false;
  const int truth = PyObject_IsTrue(object.get());
  if (truth < 0) throw Raised();
  return truth != 0;
}

bool are_equal(PyObject* a, PyObject* b) {
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw Raised();
  return equal != 0;
}

Object attribute(PyObject* object, PyObject* name) { return Object(PyObject_GetAttr(object, name)); }

/// As `names[name]`.
Object named(PyObject* names, PyObject* name) {
  PyObject* const found = PyDict_GetItemWithError(names, name);
  if (found == nullptr) {
    if (PyErr_Occurred() == nullptr) PyErr_SetObject(PyExc_KeyError, name);
    throw Raised();
  }
  return Object(shared(found));
}

long long integer(const Object& number) {
  const long long value = PyLong_AsLongLong(number.get());
  if (value == -1 && PyErr_Occurred() != nullptr) throw Raised();
  return value;
}

/// As `private.ops_are_watched`.
bool ops_are_watched() {
  for (Py_ssize_t i = 0, count = PyTuple_Size(given.functions); i < count; ++i) {
    if (is_true(call(PyTuple_GetItem(given.functions, i), {}))) return true;
  }
  for (Py_ssize_t i = 0, count = PyTuple_Size(given.at_rest); i < count; ++i) {
    PyObject* const rest = PyTuple_GetItem(given.at_rest, i);  // (names, name, value)
    const Object value = named(PyTuple_GetItem(rest, 0), PyTuple_GetItem(rest, 1));
    if (!are_equal(value.get(), PyTuple_GetItem(rest, 2))) return true;
  }
  return false;
}

/// The results of an op, or Py_None where it raised what the long way says better.
Object results_of(PyObject* op, std::initializer_list<PyObject*> args, PyObject* keywords = nullptr) {
  PyObject* const results = called(op, args, keywords);
  if (results != nullptr || PyErr_ExceptionMatches(PyExc_RuntimeError) == 0) return Object(results);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // what replaces them is of Python 3.12
  PyObject *type, *error, *traceback;
  PyErr_Fetch(&type, &error, &traceback);
  PyErr_NormalizeException(&type, &error, &traceback);
#pragma GCC diagnostic pop
  const Object owned_type(type), owned_error(error);
  Py_XDECREF(traceback);
  call(given.raise_out_of_memory, {error});
  return Object(shared(Py_None));
}

Object item(const Object& results, Py_ssize_t index) {
  if (results.get() == Py_None) return Object(shared(Py_None));
  PyObject* const found = PyTuple_GetItem(results.get(), index);
  return Object(found == nullptr ? nullptr : shared(found));
}

struct Problem {
  PyObject *q, *k, *v, *mask, *scale;
  double dropout_p;
};

bool requires_grad(const Problem& p) {
  if (!reinterpret_cast<bool (*)()>(given.is_grad_enabled)()) return false;
  for (PyObject* tensor : {p.q, p.k, p.v, p.mask}) {
    if (tensor != Py_None && is_true(attribute(tensor, names->requires_grad))) return true;
  }
  return false;
}

/// Autocast might change a mask of another dtype.
bool takes_mask(const Problem& p) {
  const Object dtype = attribute(p.mask, names->dtype);
  return dtype.get() == given.bool_dtype || dtype.get() == attribute(p.q, names->dtype).get();
}

/// `plain.try_attend`.
Object try_attend(const Problem& p, long options) {
  const bool has_mask = p.mask != Py_None;
  if (!is_true(attribute(p.q, names->is_cuda)) && !is_true(attribute(p.q, names->is_cpu)))
    return Object(shared(Py_None));
  if (ops_are_watched()) return Object(shared(Py_None));
  if (is_true(call(given.any_autocast, {})) && is_true(call(given.autocast_changes, {p.q, p.k, p.v}))) {
    return Object(shared(Py_None));
  }
  if (has_mask && !takes_mask(p)) return Object(shared(Py_None));

  if (!requires_grad(p)) {
    if (p.dropout_p > 0) return Object(shared(Py_None));  // which nobody does often
    const Object op = named(given.plain, has_mask ? names->masked_forward : names->plain_forward);
    const Object number(PyLong_FromLong(options | given.without_lse));
    return item(has_mask ? results_of(op.get(), {p.q, p.k, p.v, p.mask, p.scale, number.get()})
                         : results_of(op.get(), {p.q, p.k, p.v, p.scale, number.get()}),
                0);
  }
  if (is_true(call(given.is_deterministic, {}))) options |= given.deterministic;
  const Object differentiable = named(given.extension, names->forward);
  const Object numel(PyObject_CallMethodObjArgs(p.q, names->numel, nullptr));
  if (differentiable.get() == Py_None || integer(numel) > integer(named(given.extension, names->largest))) {
    if (has_mask || p.dropout_p > 0) return Object(shared(Py_None));
    const Object apply = named(given.plain, names->apply), settings(Py_BuildValue("(Ol)", p.scale, options));
    return results_of(apply.get(), {p.q, p.k, p.v, settings.get()});
  }
  const Object carried(PyFloat_FromDouble(-1.0 - double(options) - p.dropout_p));
  const Object results = p.scale == Py_None ? results_of(differentiable.get(), {p.q, p.k, p.v, p.mask, carried.get()})
                                            : results_of(differentiable.get(),
                                                         {p.q, p.k, p.v, p.mask, carried.get(), p.scale}, names->scale);
  if (results.get() == Py_None || are_equal(item(results, 4).get(), given.mark)) return item(results, 0);
  if (PyDict_SetItem(given.extension, names->forward, Py_None) != 0) throw Raised();
  return Object(shared(Py_None));
}

bool is_bool(PyObject* object) { return object == Py_True || object == Py_False; }

bool is_tensor(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == given.tensor_type; }

/// What is to be dropped, a float or an int, fits beside the options, which cost it its lowest bits: what these would
/// make 0 or 1 does not, nor what is wrong.
bool takes_dropout(PyObject* number) {
  constexpr double kLeast = 0x1p-32;
  if (!PyFloat_CheckExact(number)) return PyObject_IsTrue(number) == 0;
  const double dropout_p = PyFloat_AsDouble(number);
  return dropout_p == 0 || (dropout_p >= kLeast && dropout_p <= 1 - kLeast);
}

/// `plain.try_sdpa`.
Object try_sdpa(Problem p, PyObject* dropout_p, PyObject* is_causal, PyObject* enable_gqa) {
  const bool types_fit = is_tensor(p.q) && is_tensor(p.k) && is_tensor(p.v) &&
                         (p.mask == Py_None || is_tensor(p.mask) ||
                          reinterpret_cast<PyObject*>(Py_TYPE(p.mask)) == given.parameter_type) &&
                         is_bool(is_causal) && is_bool(enable_gqa) &&
                         (p.scale == Py_None || PyFloat_CheckExact(p.scale)) &&
                         (PyFloat_CheckExact(dropout_p) || PyLong_CheckExact(dropout_p));
  if (!types_fit || !takes_dropout(dropout_p) || is_true(call(given.has_torch_function, {p.q})) ||
      integer(attribute(p.q, names->ndim)) != 4) {
    return Object(shared(Py_None));
  }
  p.dropout_p = PyFloat_AsDouble(dropout_p);
  const int shared_heads = enable_gqa == Py_True ? given.shared_heads : 0;
  return try_attend(p, (is_causal == Py_True ? given.causal : given.full) | shared_heads);
}

template <typename Function>
PyObject* without_throwing(const Function& function) {
  try {
    return function().release();
  } catch (const Raised&) {
    return nullptr;
  }
}

bool takes(Py_ssize_t expected, Py_ssize_t count) {
  if (count == expected) return true;
  PyErr_Format(PyExc_TypeError, "takes %zd arguments, but got %zd", expected, count);
  return false;
}

PyObject* py_try_attend(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(7, count)) return nullptr;
  return without_throwing([&] {
    const long options = PyLong_AsLong(args[5]);
    if (options == -1 && PyErr_Occurred() != nullptr) throw Raised();
    if (!PyFloat_CheckExact(args[6]) || !takes_dropout(args[6])) return Object(shared(Py_None));
    return try_attend({args[0], args[1], args[2], args[3], args[4], PyFloat_AsDouble(args[6])}, options);
  });
}

PyObject* py_try_sdpa(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(8, count)) return nullptr;
  return without_throwing(
      [&] { return try_sdpa({args[0], args[1], args[2], args[3], args[6], 0.0}, args[4], args[5], args[7]); });
}

PyObject* configure(PyObject*, PyObject* args) {
  Given g;
  if (PyArg_ParseTuple(args, "OOOO!O!OOOOKO!O!OOiiiii", &g.tensor_type, &g.parameter_type, &g.bool_dtype, &PyTuple_Type,
                       &g.functions, &PyTuple_Type, &g.at_rest, &g.has_torch_function, &g.any_autocast,
                       &g.autocast_changes, &g.is_deterministic, &g.is_grad_enabled, &PyDict_Type, &g.plain,
                       &PyDict_Type, &g.extension, &g.mark, &g.raise_out_of_memory, &g.full, &g.causal, &g.shared_heads,
                       &g.without_lse, &g.deterministic) == 0) {
    return nullptr;
  }
  Py_INCREF(args);  // keeps them all, also those of a package that was imported again, whose functions may be held
  given = g;
  Py_RETURN_NONE;
}

template <typename Function>
PyCFunction as_function(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"configure", configure, METH_VARARGS, nullptr},
    {"try_attend", as_function(py_try_attend), METH_FASTCALL, nullptr},
    {"try_sdpa", as_function(py_try_sdpa), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "small_calls", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_small_calls() {
  if (names == nullptr) names = new Names();
  PyObject* const created = PyModule_Create(&module);
#ifdef Py_GIL_DISABLED
  if (created != nullptr) PyUnstable_Module_SetGIL(created, Py_MOD_GIL_NOT_USED);
#endif
  return created;
}
