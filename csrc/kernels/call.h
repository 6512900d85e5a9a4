// Functions called by name with arguments whose types are known at run time only: what the bindings do, and the tests
// that run the kernels on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace megatron_mm {

union Argument {
  int64_t whole;  // also bool
  double real;
  void* pointer;
};

struct Entry {
  const char* name;
  size_t arguments;
  int (*call)(const Argument*);
};

template <typename T>
T as(const Argument& argument) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(argument.pointer);
  } else if constexpr (std::is_floating_point_v<T>) {
    return argument.real;
  } else {
    return argument.whole;
  }
}

template <auto function>
struct Caller;
template <typename... Arguments, int (*function)(Arguments...)>
struct Caller<function> {
  template <size_t... places>
  static int call_with(const Argument* arguments, std::index_sequence<places...>) {
    return function(as<Arguments>(arguments[places])...);
  }
  static int call(const Argument* arguments) {
    return call_with(arguments, std::index_sequence_for<Arguments...>());
  }
  static constexpr Entry entry(const char* name) { return {name, sizeof...(Arguments), call}; }
};

}  // namespace megatron_mm

#define MM_ENTRY(function, name) megatron_mm::Caller<&function>::entry(#name),
