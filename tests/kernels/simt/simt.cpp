// The scheduler behind simt.h, and the loop that answers simt.py.
#include "simt.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace simt {

dim3 grid_size, block_size;
uint3 block_index, thread_index;
const int mutant = std::getenv("MEGATRON_MM_MUTANT") ? std::atoi(std::getenv("MEGATRON_MM_MUTANT")) : 0;

namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  enum State { kReady, kAtBarrier, kInWarp, kExited };
  ucontext_t context;
  void* fake_stack = nullptr;
  State state = kReady;
  unsigned line = 0;       // of the barrier or warp operation that it waits at
  unsigned mask = 0;       // of the warp operation
  uint64_t given = 0;      // to the warp operation
  uint64_t taken[kWarp];   // what each lane of the warp gave
};

std::vector<Fiber> fibers(kMostThreads);
char* stacks = static_cast<char*>(std::aligned_alloc(4096, kMostThreads * kStackBytes));
ucontext_t scheduler;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

unsigned threads, current;
unsigned epoch;  // barriers that the block has passed
std::vector<unsigned> ready;
std::map<const void*, std::unique_ptr<Shared>> shared_arrays;
uint64_t seed = 0;
std::mt19937_64 random_order;
void (*kernel_body)(void*);
void* kernel_closure;

uint3 index_of(unsigned thread) {
  return {thread % block_size.x, thread / block_size.x % block_size.y, thread / block_size.x / block_size.y};
}

void run_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  kernel_body(kernel_closure);
  fibers[current].state = Fiber::kExited;
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fibers[current].context, &scheduler);
}

void wait(Fiber::State state, unsigned line) {
  Fiber& own = fibers[current];
  own.state = state;
  own.line = line;
  __sanitizer_start_switch_fiber(&own.fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&own.context, &scheduler);
  __sanitizer_finish_switch_fiber(own.fake_stack, nullptr, nullptr);
}

void make_ready(unsigned thread) {
  fibers[thread].state = Fiber::kReady;
  ready.push_back(thread);
}

// Seed 0 takes threads in order, seed 1 in the opposite order, any other in a random one.
unsigned take_ready() {
  size_t place = seed == 0 ? 0 : ready.size() - 1;
  if (seed > 1) place = random_order() % ready.size();
  const unsigned thread = ready[place];
  ready.erase(ready.begin() + place);
  return thread;
}

// Lets the lanes go on once all that the mask names have come.
void release_warp_of(unsigned thread) {
  const Fiber& own = fibers[thread];
  const unsigned first = thread / kWarp * kWarp, mask = own.mask;
  std::vector<unsigned> lanes;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= threads) fail("a warp operation at line %u names lane %u, which the block lacks", own.line, lane);
    const Fiber& other = fibers[first + lane];
    if (other.state == Fiber::kExited) {
      fail("a warp operation at line %u names lane %u, which has exited", own.line, lane);
    }
    if (other.state != Fiber::kInWarp || other.mask != mask || other.line != own.line) return;
    lanes.push_back(lane);
  }
  for (const unsigned lane : lanes) {
    std::fill_n(fibers[first + lane].taken, kWarp, 0);
    for (const unsigned from : lanes) fibers[first + lane].taken[from] = fibers[first + from].given;
  }
  for (const unsigned lane : lanes) make_ready(first + lane);
}

// No thread can run: all have exited (returns false), all wait at one barrier (opens it), or the block hangs.
bool pass_barrier() {
  unsigned exited = 0, line = 0;
  for (current = 0; current < threads; ++current) {
    const Fiber& fiber = fibers[current];
    if (fiber.state == Fiber::kInWarp) {
      release_warp_of(current);  // names the lane that has exited since, if that is why
      fail("waits in a warp operation at line %u for lanes that do not come", fiber.line);
    }
    exited += fiber.state == Fiber::kExited;
  }
  if (exited == threads) return false;
  for (current = 0; current < threads; ++current) {
    const Fiber& fiber = fibers[current];
    if (exited && fiber.state == Fiber::kAtBarrier) {
      fail("divergent barrier: waits at line %u, and %u threads have exited", fiber.line, exited);
    }
    if (exited) continue;
    if (line && fiber.line != line) fail("divergent barrier: waits at line %u, others at line %u", fiber.line, line);
    line = fiber.line;
  }
  ++epoch;
  for (unsigned thread = 0; thread < threads; ++thread) make_ready(thread);
  return true;
}

void run_block() {
  epoch = 0;
  shared_arrays.clear();
  ready.clear();
  for (unsigned thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + thread * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.fake_stack = nullptr;
    __asan_unpoison_memory_region(stacks + thread * kStackBytes, kStackBytes);
    makecontext(&fiber.context, run_fiber, 0);
    make_ready(thread);
  }
  do {
    while (!ready.empty()) {
      current = take_ready();
      thread_index = index_of(current);
      void* fake_stack = nullptr;
      __sanitizer_start_switch_fiber(&fake_stack, stacks + current * kStackBytes, kStackBytes);
      swapcontext(&scheduler, &fibers[current].context);
      __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
      if (fibers[current].state == Fiber::kInWarp) release_warp_of(current);
    }
  } while (pass_barrier());
}

}  // namespace

void fail(const char* format, ...) {
  std::fprintf(stderr, "simt fault: block (%u, %u, %u) thread %u: ", block_index.x, block_index.y, block_index.z, current);
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(3);
}

void run(dim3 grid, dim3 block, void (*kernel)(void*), void* closure) {
  grid_size = grid;
  block_size = block;
  block_index = {0, 0, 0};
  threads = block.x * block.y * block.z;
  current = 0;
  if (threads == 0 || threads > kMostThreads) fail("a block of %u threads", threads);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("an empty grid");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("a grid larger than a GPU takes");
  kernel_body = kernel;
  kernel_closure = closure;
  std::vector<uint64_t> order(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = seed == 1 ? order.size() - 1 - i : i;
  random_order.seed(seed);
  if (seed > 1) std::shuffle(order.begin(), order.end(), random_order);
  for (const uint64_t flat : order) {
    block_index = {static_cast<unsigned>(flat % grid.x), static_cast<unsigned>(flat / grid.x % grid.y),
                   static_cast<unsigned>(flat / grid.x / grid.y)};
    run_block();
  }
}

void wait_at_barrier(unsigned line) { wait(Fiber::kAtBarrier, line); }

unsigned own_lane() { return current % kWarp; }

const uint64_t* exchange(unsigned mask, uint64_t value, unsigned line) {
  Fiber& own = fibers[current];
  if (!(mask >> own_lane() & 1)) fail("a warp operation at line %u whose mask lacks its own lane", line);
  own.mask = mask;
  own.given = value;
  wait(Fiber::kInWarp, line);
  return own.taken;
}

uint64_t from_lane(unsigned mask, uint64_t value, unsigned lane, unsigned line) {
  if (!(mask >> lane & 1)) fail("a shuffle at line %u from lane %u, which is not in its mask", line, lane);
  return exchange(mask, value, line)[lane];
}

struct Shared {
  struct Element {
    uint64_t bits = 0;
    bool written = false, read = false, several_readers = false;
    unsigned writer = 0, write_epoch = 0, reader = 0, read_epoch = 0;
  };
  const char* name;
  std::vector<Element> elements;

  Element& at(int64_t place) {
    if (place < 0 || place >= static_cast<int64_t>(elements.size())) {
      fail("shared %s[%ld] is out of its bounds", name, static_cast<long>(place));
    }
    return elements[place];
  }

  void race(unsigned other) const { fail("race on shared %s with thread %u: no barrier between them", name, other); }
};

Shared* shared(const void* declaration, const char* name, int64_t size) {
  auto& place = shared_arrays[declaration];
  if (!place) place.reset(new Shared{name, std::vector<Shared::Element>(size)});
  return place.get();
}

uint64_t read(Shared* array, int64_t place) {
  Shared::Element& element = array->at(place);
  if (!element.written) fail("shared %s[%ld] is read before it is written", array->name, static_cast<long>(place));
  if (element.write_epoch == epoch && element.writer != current) array->race(element.writer);
  const bool again = element.read && element.read_epoch == epoch;
  element.several_readers = again && (element.several_readers || element.reader != current);
  element.read = true;
  element.reader = current;
  element.read_epoch = epoch;
  return element.bits;
}

void write(Shared* array, int64_t place, uint64_t bits) {
  Shared::Element& element = array->at(place);
  if (element.written && element.write_epoch == epoch && element.writer != current) array->race(element.writer);
  if (element.read && element.read_epoch == epoch && (element.several_readers || element.reader != current)) {
    array->race(element.reader);
  }
  element.bits = bits;
  element.written = true;
  element.writer = current;
  element.write_epoch = epoch;
}

namespace {

template <typename T>
T take() {
  T value;
  if (std::fread(&value, sizeof(T), 1, stdin) != 1) std::_Exit(0);
  return value;
}

// Each buffer is an allocation of its own and of its exact size, so that the address sanitizer sees an access one
// element beyond it. `offset` bytes before its start make it as unaligned as the caller wants.
struct Buffer {
  char* memory;
  int64_t bytes, offset;
};

Buffer take_buffer() {
  const auto bytes = take<int64_t>(), offset = take<int64_t>();
  const Buffer buffer{static_cast<char*>(std::malloc(bytes + offset)), bytes, offset};
  if (bytes && std::fread(buffer.memory + offset, bytes, 1, stdin) != 1) std::_Exit(4);
  return buffer;
}

}  // namespace

void serve(const megatron_mm::Entry* entries, int count) {
  while (true) {
    std::string name(take<int64_t>(), ' ');
    if (std::fread(name.data(), name.size(), 1, stdin) != 1) std::_Exit(4);
    seed = take<int64_t>();
    std::vector<megatron_mm::Argument> arguments(take<int64_t>());
    std::vector<Buffer> buffers;
    for (megatron_mm::Argument& argument : arguments) {
      const auto kind = take<int64_t>();
      if (kind == 'i') argument.whole = take<int64_t>();
      if (kind == 'f') argument.real = take<double>();
      if (kind == 'n') argument.pointer = nullptr;
      if (kind == 'b') {
        buffers.push_back(take_buffer());
        argument.pointer = buffers.back().memory + buffers.back().offset;
      }
    }
    const auto* entry = std::find_if(entries, entries + count, [&](const auto& one) { return one.name == name; });
    if (entry == entries + count || entry->arguments != arguments.size()) fail("there is no entry %s of so many", name.c_str());
    const int64_t result = entry->call(arguments.data());
    std::fwrite(&result, sizeof(result), 1, stdout);
    for (const Buffer& buffer : buffers) {
      std::fwrite(buffer.memory + buffer.offset, 1, buffer.bytes, stdout);
      std::free(buffer.memory);
    }
    std::fflush(stdout);
  }
}

}  // namespace simt

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
