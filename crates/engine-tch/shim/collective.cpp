// C face over libtorch's own Gloo process group and its TCP store.
#include "group.h"

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/version.h>

#include <atomic>
#include <cstdlib>
#include <thread>

static_assert(
    TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR == 11,
    "the declarations in gloo_decls were checked against libtorch 2.11 only");

using std::chrono::milliseconds;

// libtorch's flight recorder keeps the last collectives of a process in maps that it changes without a lock, so two
// groups in one process (ranks as threads, or an old session ending while a new one begins) can destroy them. Nobody
// here reads it: it is off, unless asked for. Set before main, while there is one thread.
__attribute__((constructor)) static void no_flight_recorder() {
  setenv("TORCH_FR_BUFFER_SIZE", "0", /*overwrite=*/0);
}

struct Store {
  c10::intrusive_ptr<c10d::TCPStore> tcp;
};

struct Group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::Backend> backend;
  // Set by another thread once nobody wants the outcome of a collective any more. The caller keeps it.
  const std::atomic<bool>* gives_up;

  // Looks at the flag now and then: a wait that was begun cannot be broken off otherwise.
  void finish(const c10::intrusive_ptr<c10d::Work>& work) const {
    for (;;) {
      try {
        if (!work->wait(milliseconds(100)))
          throw std::runtime_error("collective aborted");
        return;
      } catch (...) {
        if (work->isCompleted())
          throw;
      }
      if (gives_up->load(std::memory_order_acquire))
        throw std::runtime_error("given up while waiting for the other ranks");
    }
  }
};

extern "C" {

// Opens a store. The server picks a free port when `port` is 0.
char* esp_store_new(
    const char* host, uint16_t port, bool server, int64_t timeout_ms, Store** out, uint16_t* bound) {
  return guard([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = server;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(host, options);
    *bound = tcp->getPort();
    *out = new Store{tcp};
  });
}

void esp_store_free(Store* store) {
  delete store;
}

// Joins a Gloo group whose ranks meet in `store`; `bind` is the address that this rank's sockets listen on.
char* esp_gloo_new(
    Store* store, const char* bind, int rank, int world, int64_t timeout_ms,
    const std::atomic<bool>* gives_up, Group** out) {
  return guard([&] {
    auto prefixed = c10::make_intrusive<c10d::PrefixStore>("espalier", store->tcp);
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(bind));
    auto gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(prefixed, rank, world, options);
    *out = new Group{prefixed, gloo, gives_up};
  });
}

char* esp_all_reduce(Group* group, void* values, int op) {
  return guard([&] {
    std::vector<at::Tensor> list{tensor(values)};
    c10d::AllreduceOptions options;
    options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(op);
    group->finish(group->backend->allreduce(list, options));
  });
}

// Ending a group waits for its collectives. Of one that was given up they end with their timeout, which nobody waits for.
void esp_group_free(Group* group) {
  if (group->gives_up->load(std::memory_order_acquire)) {
    group->gives_up = nullptr;
    std::thread([group] { delete group; }).detach();
  } else {
    delete group;
  }
}
}
