// The scheduler behind emulation.h: fibers, barriers, warps, shared memory.

#include "emulation.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
// A fiber never returns from these functions, so they must not leave red zones on its stack
#define NO_RED_ZONES __attribute__((no_sanitize("address")))

// Switches stacks. A block switches about 10,000 times, and ucontext makes two system calls each.
#if defined(__x86_64__)
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
extern "C" void emulation_switch(void** keep_stack_pointer, void* stack_pointer);

struct Context {
  void* stack_pointer = nullptr;

  void start(char* stack, size_t size, void (*function)()) {
    void** top = reinterpret_cast<void**>(stack + size) - 2;
    *top = reinterpret_cast<void*>(function);
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
    stack_pointer = top - 6;
  }
};
static inline void switch_context(Context& from, Context& to) {
  emulation_switch(&from.stack_pointer, to.stack_pointer);
}
#else
struct Context {
  ucontext_t context;

  void start(char* stack, size_t size, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
  }
};
static inline void switch_context(Context& from, Context& to) {
  swapcontext(&from.context, &to.context);
}
#endif

namespace emulation {

View view;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;
constexpr int kMaxCluster = 16;

enum class State { ready, waiting, done };
enum Order { forward = 0, reverse = 1, shuffled = 2 };

struct Copy {
  void* target;
  const void* source;
  int bytes, valid;
};

struct Block;

struct Fiber {
  Context context;
  Block* block = nullptr;
  bool arrived = false;  // has arrived at the cluster barrier but not waited there
  unsigned turn = 0;     // the turn of that barrier at which it arrived
  char* stack = nullptr;
  dim3 thread;
  State state = State::done;
  Site site{};
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // issued but not committed
  const void* waits_on = nullptr;         // see wait_on
  std::shared_ptr<void> storage;
  void* fake_stack = nullptr;
};

struct Warp {
  Slots deposit, published;
  unsigned arrived = 0, mask = 0;
  Site site{};
};

/// Heap memory of exactly the requested size, so that AddressSanitizer detects one byte too many.
struct Memory {
  explicit Memory(size_t bytes) : data(std::aligned_alloc(1024, rounded(bytes))), size(bytes) {
    std::memset(data, 0xff, rounded(bytes));  // NaN in every floating-point type
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(static_cast<char*>(data) + bytes, rounded(bytes) - bytes);
#endif
  }
  ~Memory() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(data, rounded(size));
#endif
    std::free(data);
  }
  Memory(const Memory&) = delete;
  void lose() {
    std::memset(data, 0xff, size);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(data, rounded(size));
#endif
  }
  static size_t rounded(size_t bytes) { return (bytes + 1023) / 1024 * 1024 + 1024; }
  void* data;
  size_t size;
};

/// A running block. Its fibers are consecutive among those of the machine.
struct Block {
  /// Invalidates the block's shared memory: fills it with NaN and poisons it for AddressSanitizer.
  void leave() {
    for (auto& [key, memory] : shared) memory->lose();
    dynamic->lose();
  }

  dim3 index;
  int rank = 0;
  size_t first = 0, at_barrier = 0, done = 0;
  Site barrier{};
  std::map<const void*, std::unique_ptr<Memory>> shared;
  std::unique_ptr<Memory> dynamic;
  std::shared_ptr<void> storage;
};

struct Machine {
  std::vector<Fiber> fibers{kMaxThreads * kMaxCluster};
  std::vector<Warp> warps{kMaxThreads * kMaxCluster / kWarp};
  std::vector<Block> blocks;  // of the running cluster
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  Context home;
  const void* home_stack = nullptr;
  size_t home_size = 0;
  size_t threads = 0;  // per block
  size_t arrived = 0;  // threads at the cluster barrier
  unsigned turn = 0;   // number of times this barrier has been passed
  Site cluster_barrier{};
  int cluster_limit = kMaxCluster, cluster_room = kMaxCluster;
  std::string fault;
  bool faulted = false;
  Order order = forward;
  std::mt19937_64 random{0};
};

Machine& machine() {
  static Machine m;
  return m;
}

NO_RED_ZONES void leave_for(Context& from, Context& to, void** fake, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, stack, size);
#else
  (void)fake, (void)stack, (void)size;
#endif
  switch_context(from, to);
}

NO_RED_ZONES void arrived_from(void* fake, const void** stack, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, stack, size);
#else
  (void)fake, (void)stack, (void)size;
#endif
}

/// Switches from a fiber to the scheduler, and returns when the scheduler resumes the fiber.
NO_RED_ZONES void yield() {
  Machine& m = machine();
  Fiber& self = *m.current;
  const bool ends = self.state == State::done;
  leave_for(self.context, m.home, ends ? nullptr : &self.fake_stack, m.home_stack, m.home_size);
  arrived_from(self.fake_stack, nullptr, nullptr);
}

void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  view.thread = fiber.thread;
  view.block = fiber.block->index;
  view.rank = fiber.block->rank;
  void* fake = nullptr;
  leave_for(m.home, fiber.context, &fake, fiber.stack, kStack);
  arrived_from(fake, nullptr, nullptr);
}

NO_RED_ZONES void entry() {
  Machine& m = machine();
  arrived_from(nullptr, &m.home_stack, &m.home_size);
  Fiber& self = *m.current;
  (*m.body)();
  if (!self.open.empty() || !self.groups.empty()) fail("a thread ends with copies not waited for");
  if (self.arrived) fail("a thread ends between cluster_arrive and cluster_wait");
  thread_ends();
  if (self.block->done + 1 == m.threads) block_ends();
  self.state = State::done;
  if (++self.block->done == m.threads) self.block->leave();
  yield();
  std::abort();  // unreachable: a finished thread is never resumed
}

size_t index_of(const Fiber& fiber) { return static_cast<size_t>(&fiber - machine().fibers.data()); }

std::string name(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(site.what) + " (" + (slash ? slash + 1 : site.file) + ":" +
         std::to_string(site.line) + ")";
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

/// Describes where the threads are when none can continue.
std::string standstill() {
  Machine& m = machine();
  std::map<std::string, std::pair<size_t, size_t>> places;  // place -> (threads, first thread)
  for (size_t i = 0; i < m.threads * m.blocks.size(); ++i) {
    const Fiber& fiber = m.fibers[i];
    const std::string place = fiber.state == State::done ? "the end" : name(fiber.site);
    auto& entry = places.try_emplace(place, 0, i).first->second;
    ++entry.first;
  }
  std::string text = "divergent barrier:";
  for (const auto& [place, threads] : places)
    text += " " + std::to_string(threads.first) + " threads (first " +
            std::to_string(threads.second) + ") at " + place + ";";
  return text;
}

void start(Fiber& fiber, Block& block, unsigned linear) {
#if defined(__SANITIZE_ADDRESS__)
  if (fiber.state != State::done) __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
  fiber.state = State::ready;
  fiber.block = &block;
  fiber.arrived = false;
  fiber.groups.clear();
  fiber.open.clear();
  fiber.waits_on = nullptr;
  fiber.storage.reset();
  fiber.fake_stack = nullptr;
  fiber.thread = dim3(linear % view.block_size.x, linear / view.block_size.x % view.block_size.y,
                      linear / view.block_size.x / view.block_size.y);
  fiber.context.start(fiber.stack, kStack, entry);
}

/// Runs the blocks of a cluster; `number` is the index of its first block in the grid.
void run_cluster(uint64_t number, size_t shared_bytes) {
  Machine& m = machine();
  m.arrived = 0;
  m.turn = 0;
  const size_t threads = m.threads * m.blocks.size();
  for (size_t r = 0; r < m.blocks.size(); ++r) {
    Block& block = m.blocks[r];
    const uint64_t b = number + r;
    block.index = dim3(static_cast<unsigned>(b % view.grid.x),
                       static_cast<unsigned>(b / view.grid.x % view.grid.y),
                       static_cast<unsigned>(b / view.grid.x / view.grid.y));
    block.rank = static_cast<int>(r);
    block.first = r * m.threads;
    block.at_barrier = block.done = 0;
    block.shared.clear();
    block.storage.reset();
    block.dynamic = std::make_unique<Memory>(shared_bytes);
    for (size_t i = 0; i < m.threads; ++i)
      start(m.fibers[block.first + i], block, static_cast<unsigned>(i));
  }
  for (size_t w = 0; w < threads / kWarp; ++w) m.warps[w].arrived = 0;
  std::vector<size_t> order(threads);
  for (size_t i = 0; i < threads; ++i) order[i] = m.order == reverse ? threads - 1 - i : i;
  size_t left = threads;
  while (left > 0) {
    if (m.order == shuffled) std::shuffle(order.begin(), order.end(), m.random);
    bool progress = false;
    for (size_t i : order) {
      if (m.fibers[i].state != State::ready) continue;
      progress = true;
      resume(m.fibers[i]);
      if (m.faulted) throw Fault(m.fault);
      left -= m.fibers[i].state == State::done;
      // the last thread runs ahead as far as it can, overwriting memory that others still read
      if (m.order == reverse) break;
    }
    if (!progress) throw Fault(standstill());
  }
}

/// The shared memory of a block that contains an address, or null; sets `key` to its key, which is
/// null for dynamic shared memory.
const Memory* holder(const Block& block, const void* address, const void*& key) {
  const auto within = [address](const Memory& memory) {
    const auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(memory.data);
    return offset < memory.size;
  };
  key = nullptr;
  if (within(*block.dynamic)) return block.dynamic.get();
  for (const auto& [declared, memory] : block.shared) {
    key = declared;
    if (within(*memory)) return memory.get();
  }
  return nullptr;
}

void make(const Copy& copy) {
  std::memcpy(copy.target, copy.source, copy.valid);
  std::memset(static_cast<char*>(copy.target) + copy.valid, 0, copy.bytes - copy.valid);
}

}  // namespace

void fail(const std::string& message) {
  Machine& m = machine();
  const dim3 t = view.thread, b = view.block;
  m.fault = message + " [thread " + std::to_string(t.x) + ", block " + std::to_string(b.x) + "," +
            std::to_string(b.y) + "]";
  m.faulted = true;
  yield();
  std::abort();
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body,
         unsigned cluster) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  Machine& m = machine();
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || threads % kWarp != 0)
    throw Fault("a block must have a multiple of 32 threads, up to 1024, got " +
                std::to_string(threads));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    throw Fault("invalid grid " + std::to_string(grid.x) + "," + std::to_string(grid.y) + "," +
                std::to_string(grid.z));
  if (shared_bytes > kMaxShared)
    throw Fault("shared memory must be <= 227 KiB, got " + std::to_string(shared_bytes));
  if (cluster == 0 || cluster > static_cast<unsigned>(m.cluster_room) || grid.x % cluster != 0)
    throw Fault("a cluster must have up to " + std::to_string(m.cluster_room) +
                " blocks and divide the grid's x, got " + std::to_string(cluster) + " of " +
                std::to_string(grid.x));
  for (size_t i = 0; i < threads * cluster; ++i) {
    if (m.fibers[i].stack != nullptr) continue;
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw Fault("no memory for a fiber's stack");
    m.fibers[i].stack = static_cast<char*>(stack);
  }
  m.threads = threads;
  m.blocks = std::vector<Block>(cluster);
  m.body = &body;
  m.faulted = false;
  view.block_size = block;
  view.grid = grid;
  view.ranks = static_cast<int>(cluster);
  const uint64_t clusters = static_cast<uint64_t>(grid.x) * grid.y * grid.z / cluster;
  for (uint64_t step = 0; step < clusters; ++step)
    run_cluster((m.order == forward ? step : clusters - 1 - step) * cluster, shared_bytes);
  m.blocks.clear();
}

int cluster_limit() { return machine().cluster_limit; }
int cluster_room() { return machine().cluster_room; }

void sync_threads(Site site) {
  Machine& m = machine();
  Block& block = *m.current->block;
  if (block.at_barrier == 0)
    block.barrier = site;
  else if (!same(block.barrier, site))
    fail("divergent barrier: some threads at " + name(block.barrier) + ", this one at " +
         name(site));
  if (++block.at_barrier == m.threads) {
    block.at_barrier = 0;
    for (size_t i = 0; i < m.threads; ++i) m.fibers[block.first + i].state = State::ready;
    yield();  // the last to arrive must not run out of turn
    return;
  }
  m.current->site = site;
  m.current->state = State::waiting;
  yield();
}

void cluster_arrive(const char* file, int line) {
  Machine& m = machine();
  Fiber& self = *m.current;
  const Site site{"cluster_arrive", file, line};
  if (self.arrived) fail(name(site) + ": the thread has arrived already and not waited");
  if (m.arrived == 0)
    m.cluster_barrier = site;
  else if (!same(m.cluster_barrier, site))
    fail("divergent cluster barrier: some threads at " + name(m.cluster_barrier) +
         ", this one at " + name(site));
  self.arrived = true;
  self.turn = m.turn;
  const size_t threads = m.threads * m.blocks.size();
  if (++m.arrived < threads) return;
  m.arrived = 0;
  ++m.turn;
  for (size_t i = 0; i < threads; ++i)  // some may not have reached cluster_wait yet
    if (m.fibers[i].state == State::waiting &&
        std::strcmp(m.fibers[i].site.what, "cluster_wait") == 0)
      m.fibers[i].state = State::ready;
}

void cluster_wait(const char* file, int line) {
  Machine& m = machine();
  Fiber& self = *m.current;
  self.site = {"cluster_wait", file, line};
  if (!self.arrived) fail(name(self.site) + ": the thread has not arrived");
  if (self.turn == m.turn) self.state = State::waiting;
  yield();  // even if all have arrived, since the last must not run out of turn
  self.arrived = false;
}

void* map_shared(const void* address, int rank) {
  Machine& m = machine();
  const void* key = nullptr;
  const Memory* mine = holder(*m.current->block, address, key);
  if (mine == nullptr) fail("map_shared: not in this block's shared memory");
  if (rank < 0 || rank >= static_cast<int>(m.blocks.size()))
    fail("map_shared: no block " + std::to_string(rank) + " in a cluster of " +
         std::to_string(m.blocks.size()));
  Block& other = m.blocks[rank];
  if (other.done == m.threads)
    fail("map_shared: the block " + std::to_string(rank) +
         " of the cluster has ended, and its shared memory with it");
  const Memory* theirs = other.dynamic.get();
  if (key != nullptr) {
    auto& slot = other.shared[key];
    if (!slot) slot = std::make_unique<Memory>(mine->size);
    theirs = slot.get();
  }
  return static_cast<char*>(theirs->data) +
         (static_cast<const char*>(address) - static_cast<const char*>(mine->data));
}

const Slots& exchange(unsigned mask, const void* data, size_t size, Site site) {
  Machine& m = machine();
  const size_t self = index_of(*m.current);
  const int at = static_cast<int>(self % kWarp);
  Warp& warp = m.warps[self / kWarp];
  if (!(mask >> at & 1)) fail(name(site) + ": the mask lacks the calling lane");
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.site = site;
  } else if (warp.mask != mask || !same(warp.site, site)) {
    fail("divergent warp: some lanes at " + name(warp.site) + ", this one at " + name(site));
  }
  std::memcpy(warp.deposit.bytes[at], data, size);
  warp.arrived |= 1u << at;
  if (warp.arrived == mask) {
    std::memcpy(&warp.published, &warp.deposit, sizeof warp.deposit);
    warp.arrived = 0;
    const size_t first = self / kWarp * kWarp;
    for (int i = 0; i < kWarp; ++i)
      if (mask >> i & 1) m.fibers[first + i].state = State::ready;
    return warp.published;
  }
  m.current->site = site;
  m.current->state = State::waiting;
  yield();
  return warp.published;
}

void* shared_memory(const void* key, size_t bytes) {
  auto& slot = machine().current->block->shared[key];
  if (!slot) slot = std::make_unique<Memory>(bytes);
  if (slot->size != bytes) fail("one declaration of shared memory with two sizes");
  return slot->data;
}

void* dynamic_shared_memory() { return machine().current->block->dynamic->data; }

bool asynchronous_now() {
  Machine& m = machine();
  return m.order == reverse || (m.order == shuffled && m.random() % 2);
}

void wait_on(const void* what, Site site) {
  Fiber& self = *machine().current;
  self.site = site;
  self.waits_on = what;
  self.state = State::waiting;
  yield();
}

void wake(const void* what) {
  Machine& m = machine();
  const Block& block = *m.current->block;
  for (size_t i = block.first; i < block.first + m.threads; ++i)
    if (m.fibers[i].state == State::waiting && m.fibers[i].waits_on == what) {
      m.fibers[i].waits_on = nullptr;
      m.fibers[i].state = State::ready;
    }
}

void pause() { yield(); }

std::shared_ptr<void>& block_storage() { return machine().current->block->storage; }
std::shared_ptr<void>& thread_storage() { return machine().current->storage; }
size_t dynamic_shared_bytes() { return machine().current->block->dynamic->size; }

void copy_async(void* target, const void* source, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(target) % bytes || reinterpret_cast<uintptr_t>(source) % bytes)
    fail("cp.async of " + std::to_string(bytes) + " bytes is not aligned");
  Machine& m = machine();
  const Copy copy{target, source, bytes, valid};
  if (asynchronous_now())
    make(copy);
  else
    m.current->open.push_back(copy);
}

void commit_copies() {
  Fiber& self = *machine().current;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void wait_for_copies(int groups_left) {
  Fiber& self = *machine().current;
  while (static_cast<int>(self.groups.size()) > groups_left) {
    for (const Copy& copy : self.groups.front()) make(copy);
    self.groups.erase(self.groups.begin());
  }
}

}  // namespace emulation

/// Sets the order of threads for later launches: 0 forward, 1 reverse, 2 shuffled with the seed.
extern "C" __attribute__((visibility("default"))) void emulation_set_order(int order, uint64_t seed) {
  auto& m = emulation::machine();
  m.order = static_cast<emulation::Order>(order);
  m.random.seed(seed);
}

/// Sets the most blocks per cluster (16 as on sm_90, 1 as on older GPUs), and the available room.
extern "C" __attribute__((visibility("default"))) void emulation_set_clusters(int limit, int room) {
  emulation::machine().cluster_limit = limit;
  emulation::machine().cluster_room = room;
}
