#pragma once
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <cstring>
#include <stdexcept>

// Runs `f`; an exception becomes a malloc'd message that the caller frees.
template <typename F>
char* guard(F&& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const c10::Error& e) {
    return strdup(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

// What tch::Tensor::as_ptr returns.
inline at::Tensor& tensor(void* p) {
  return *static_cast<at::Tensor*>(p);
}
