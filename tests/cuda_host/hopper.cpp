// The part of hopper.h that keeps state: barriers, copies and products of a block.

#include "hopper.h"

#include <map>

namespace emulation {
namespace {

struct Barrier {
  int expected, pending;
  int64_t bytes = 0;    // announced and not yet copied
  unsigned phases = 0;  // that have ended
  std::vector<std::function<void()>> copies;
};

struct Named {
  int threads = 0, arrived = 0;
};

/// What a block holds beside its memory.
struct Held {
  std::map<const void*, Barrier> barriers;
  std::array<Named, 16> named;
};

/// What a thread holds: its products, by group.
struct Products {
  bool begun = false;
  bool now = false;  // the open group is made as it is issued
  int late = 0;      // products that are not made yet
  std::vector<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open;
};

template <typename Kind>
Kind& in(std::shared_ptr<void>& storage) {
  if (!storage) storage = std::make_shared<Kind>();
  return *static_cast<Kind*>(storage.get());
}
Held& held() { return in<Held>(block_storage()); }
Products& products() { return in<Products>(thread_storage()); }

Barrier& known(const uint64_t* barrier) {
  const auto found = held().barriers.find(barrier);
  if (found == held().barriers.end()) fail("an mbarrier is used before it is initialized");
  return found->second;
}

void end_phase_if_complete(const uint64_t* barrier, Barrier& of) {
  if (of.pending > 0 || of.bytes != 0) return;
  ++of.phases;
  of.pending = of.expected;
  wake(barrier);
}

}  // namespace

unsigned shared_address(const void* p) {
  const auto* begin = static_cast<const unsigned char*>(dynamic_shared_memory());
  return static_cast<unsigned>(static_cast<const unsigned char*>(p) - begin);
}

unsigned char* shared_bytes(unsigned address, int count) {
  if (address + count > dynamic_shared_bytes())
    fail("TMA beyond the shared memory: at " + std::to_string(address));
  return static_cast<unsigned char*>(dynamic_shared_memory()) + address;
}

Operand::Operand(uint64_t descriptor)
    : start((descriptor & 0x3fff) << 4),
      leading((descriptor >> 16 & 0x3fff) << 4),
      stride((descriptor >> 32 & 0x3fff) << 4),
      memory(static_cast<const unsigned char*>(dynamic_shared_memory())),
      size(dynamic_shared_bytes()) {
  if (descriptor >> 62 != 1) fail("wgmma: the emulation has the swizzle of 128 bytes only");
  if (descriptor >> 49 & 7 || start / 128 % 8)
    fail("wgmma: a tile must begin at a multiple of 1024 bytes, without a base offset");
}

void barrier_init(uint64_t* barrier, int arrivals) {
  *barrier = 0;  // the address must be that of shared memory
  if (!held().barriers.try_emplace(barrier, Barrier{arrivals, arrivals, 0, 0, {}}).second)
    fail("an mbarrier is initialized twice");
}

void barrier_arrive(uint64_t* barrier, int bytes) {
  Barrier& of = known(barrier);
  if (of.pending == 0) fail("more threads arrive at an mbarrier than its phase expects");
  of.bytes += bytes;
  --of.pending;
  end_phase_if_complete(barrier, of);
}

void barrier_wait(uint64_t* barrier, int parity, Site site) {
  Barrier& of = known(barrier);
  while (of.phases % 2 == static_cast<unsigned>(parity)) {
    if (of.copies.empty()) {
      wait_on(barrier, site);
      continue;
    }
    const auto copies = std::move(of.copies);
    of.copies.clear();
    for (const auto& copy : copies) copy();
  }
}

void load_tile(void* tile, const TensorMap& map, std::array<int, 4> at, uint64_t* barrier) {
  const unsigned to = shared_address(tile);
  if (to % 128) fail("TMA to a tile that is not aligned to 128 bytes");
  for (int i = 1; i < 4; ++i)
    if (map.strides[i - 1] % 16) fail("TMA from a tensor whose strides are not multiples of 16");
  Barrier& of = known(barrier);
  const auto copy = [to, map, at, barrier, &of] {
    unsigned row = 0;
    const int64_t row_bytes = 2 * map.box[0];
    for (int i3 = 0; i3 < map.box[3]; ++i3)
      for (int i2 = 0; i2 < map.box[2]; ++i2)
        for (int i1 = 0; i1 < map.box[1]; ++i1, ++row) {
          const int64_t place[4] = {0, at[1] + i1, at[2] + i2, at[3] + i3};
          bool inside = true;
          int64_t offset = 0;
          for (int i = 1; i < 4; ++i) {
            inside = inside && place[i] >= 0 && place[i] < map.sizes[i];
            offset += place[i] * map.strides[i - 1];
          }
          for (int c = 0; c < map.box[0]; ++c) {
            const unsigned flat = static_cast<unsigned>(to + row * row_bytes + 2 * c);
            unsigned char* const target = shared_bytes(flat ^ (flat >> 7 & 7) << 4, 2);
            const int64_t column = at[0] + c;
            if (inside && column >= 0 && column < map.sizes[0])
              std::memcpy(target, map.data + offset + 2 * column, 2);
            else
              std::memset(target, 0, 2);
          }
        }
    of.bytes -= row * row_bytes;
    end_phase_if_complete(barrier, of);
  };
  if (asynchronous_now()) {
    copy();
  } else {
    of.copies.push_back(copy);
    wake(barrier);  // who waits already makes the copy
  }
}

void named_barrier(int id, int threads, bool waits, Site site) {
  if (id < 1 || id > 15 || threads % kWarp) fail("a named barrier from 1 to 15, and whole warps");
  // a warp arrives as one
  exchange(~0u, &id, sizeof id, site);
  Named& of = held().named[static_cast<size_t>(id)];
  if (of.arrived > 0 && of.threads != threads)
    fail("a named barrier with two counts of threads");
  of.threads = threads;
  if (++of.arrived == threads) {
    of.arrived = 0;
    wake(&of);
  } else if (waits) {
    wait_on(&of, site);
  }
}

void products_begin() { products().begun = true; }

void product(std::function<void()> make) {
  Products& own = products();
  if (!own.begun) fail("wgmma without wgmma.fence before it");
  // a thread's products are made in their order: none overtakes one that is late
  const bool waits = own.late > 0 || !(own.open.empty() ? asynchronous_now() : own.now);
  own.now = !waits;
  own.late += waits;
  if (waits) {
    own.open.push_back(std::move(make));
  } else {
    make();
    own.open.emplace_back();
  }
}

void products_commit() {
  Products& own = products();
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

void products_wait(int groups_left) {
  Products& own = products();
  if (own.late > 0) pause();  // what a thread did too early, others see before the products are made
  while (static_cast<int>(own.groups.size()) > groups_left) {
    for (const auto& make : own.groups.front())
      if (make) {
        make();
        --own.late;
      }
    own.groups.erase(own.groups.begin());
  }
  own.begun = false;
  exchange(~0u, &groups_left, sizeof groups_left, EMULATION_SITE("wgmma.wait_group"));
}

void thread_ends() {
  if (!thread_storage()) return;
  if (!products().open.empty() || !products().groups.empty())
    fail("a thread ends with products not waited for");
}

void block_ends() {
  if (!block_storage()) return;
  for (const auto& [address, barrier] : held().barriers)
    if (!barrier.copies.empty() || barrier.bytes != 0)
      fail("a block ends with copies not waited for");
  for (const Named& barrier : held().named)
    if (barrier.arrived > 0) fail("a block ends with threads that wait at a named barrier");
}

}  // namespace emulation
