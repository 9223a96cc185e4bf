// The accelerator through libtorch's device-neutral interface: nothing of CUDA is needed to build, and all of it is
// there once libtorch_cuda has been opened. And attention by libtorch's flash kernels, which tch's bindings leave out.
#include "group.h"

#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <c10/core/Event.h>

extern "C" {

char* esp_device_set(int index) {
  return guard([&] { at::accelerator::setDeviceIndex(static_cast<c10::DeviceIndex>(index)); });
}

char* esp_device_synchronize(int index) {
  return guard([&] { at::accelerator::synchronizeDevice(static_cast<c10::DeviceIndex>(index)); });
}

// Bytes: held by tensors now, held by tensors at most, kept from the device now, free on the device, the device's all.
char* esp_device_memory(int index, uint64_t* out) {
  return guard([&] {
    const auto device = static_cast<c10::DeviceIndex>(index);
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto stats = at::accelerator::getDeviceStats(device);
    const auto [free, total] = at::accelerator::getMemoryInfo(device);
    out[0] = stats.allocated_bytes[all].current;
    out[1] = stats.allocated_bytes[all].peak;
    out[2] = stats.reserved_bytes[all].current;
    out[3] = free;
    out[4] = total;
  });
}

char* esp_device_reset_peak(int index) {
  return guard([&] { at::accelerator::resetPeakStats(static_cast<c10::DeviceIndex>(index)); });
}

char* esp_device_release_cache() {
  return guard([&] { at::accelerator::emptyCache(); });
}

// The device's own handle of the stream that libtorch computes on.
char* esp_stream_handle(int index, void** out) {
  return guard([&] { *out = at::accelerator::getCurrentStream(static_cast<c10::DeviceIndex>(index)).native_handle(); });
}

// A mark on that stream: reached once all work queued before it is done.
char* esp_event_record(int index, c10::Event** event) {
  return guard([&] {
    if (*event == nullptr)
      *event = new c10::Event(at::accelerator::getAccelerator(/*checked=*/true).value());
    (*event)->record(at::accelerator::getCurrentStream(static_cast<c10::DeviceIndex>(index)));
  });
}

char* esp_event_reached(c10::Event* event, bool* out) {
  return guard([&] { *out = event->query(); });
}

void esp_event_free(c10::Event* event) {
  delete event;
}

// Causal attention of [b, h, t, k] tensors. `state` is for the backward pass alone.
char* esp_flash_attention(
    void* q, void* k, void* v, void** out, void** log_sum_exp, void** state, void** state_offset, int64_t* max_q,
    int64_t* max_k) {
  return guard([&] {
    at::NoGradGuard no_grad;
    auto result = at::_scaled_dot_product_flash_attention(
        tensor(q), tensor(k), tensor(v), 0.0, /*is_causal=*/true, /*return_debug_mask=*/false, std::nullopt);
    *max_q = std::get<4>(result).expect_int();
    *max_k = std::get<5>(result).expect_int();
    *out = new at::Tensor(std::get<0>(result));
    *log_sum_exp = new at::Tensor(std::get<1>(result));
    *state = new at::Tensor(std::get<6>(result));
    *state_offset = new at::Tensor(std::get<7>(result));
  });
}

char* esp_flash_attention_backward(
    void* grad_out, void* q, void* k, void* v, void* out, void* log_sum_exp, void* state, void* state_offset,
    int64_t max_q, int64_t max_k, void** grad_q, void** grad_k, void** grad_v) {
  return guard([&] {
    at::NoGradGuard no_grad;
    auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_backward(
        tensor(grad_out), tensor(q), tensor(k), tensor(v), tensor(out), tensor(log_sum_exp), at::Tensor(),
        at::Tensor(), max_q, max_k, 0.0, /*is_causal=*/true, tensor(state), tensor(state_offset), std::nullopt);
    *grad_q = new at::Tensor(dq);
    *grad_k = new at::Tensor(dk);
    *grad_v = new at::Tensor(dv);
  });
}
}
