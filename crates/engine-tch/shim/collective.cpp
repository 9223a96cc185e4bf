// C face over libtorch's own Gloo process group and its TCP store.
#include "group.h"

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/version.h>

#include <cstdlib>

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

// A group that another thread can end: its connections are failed as Gloo fails them after a timeout, so whoever waits in
// a collective, here and on the other ranks, gets an error at once, and so does every later collective.
class Gloo : public c10d::ProcessGroupGloo {
 public:
  using ProcessGroupGloo::ProcessGroupGloo;

  void give_up(const std::string& why) {
    for (const auto& context : contexts_) {
      for (int peer = 0; peer < getSize(); ++peer) {
        if (peer == getRank())
          continue;
        if (auto* pair = context->getPair(peer).get())
          reinterpret_cast<gloo::transport::tcp::Pair*>(pair)->signalExceptionExternal(why);
      }
    }
  }
};

struct Group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<Gloo> gloo;

  static void finish(const c10::intrusive_ptr<c10d::Work>& work) {
    if (!work->wait())
      throw std::runtime_error("collective aborted");
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

// How long later calls wait for the server.
char* esp_store_set_timeout(Store* store, int64_t timeout_ms) {
  return guard([&] { store->tcp->setTimeout(milliseconds(timeout_ms)); });
}

char* esp_store_set(Store* store, const char* key) {
  return guard([&] { store->tcp->set(key, std::vector<uint8_t>{1}); });
}

// Whether somebody has set `key`; does not wait for it.
char* esp_store_has(Store* store, const char* key, bool* out) {
  return guard([&] { *out = store->tcp->check({key}); });
}

void esp_store_free(Store* store) {
  delete store;
}

// Joins a Gloo group whose ranks meet in `store`; `bind` is the address that this rank's sockets listen on.
char* esp_gloo_new(
    Store* store, const char* bind, int rank, int world, int64_t timeout_ms, Group** out) {
  return guard([&] {
    auto prefixed = c10::make_intrusive<c10d::PrefixStore>("espalier", store->tcp);
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(bind));
    auto gloo = c10::make_intrusive<Gloo>(prefixed, rank, world, options);
    *out = new Group{prefixed, gloo};
  });
}

char* esp_all_reduce(Group* group, void* values, int op) {
  return guard([&] {
    std::vector<at::Tensor> list{tensor(values)};
    c10d::AllreduceOptions options;
    options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(op);
    Group::finish(group->gloo->allreduce(list, options));
  });
}

// Called from another thread than the one that may be in a collective.
char* esp_group_give_up(Group* group) {
  return guard([&] { group->gloo->give_up("given up: the session is over"); });
}

void esp_group_free(Group* group) {
  delete group;
}
}
