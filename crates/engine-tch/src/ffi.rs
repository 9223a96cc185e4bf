//! The C++ shim's functions and how their errors come back. All `extern` declarations of the crate are here.

use crate::fault::Fault;
use std::ffi::{CStr, c_char, c_int, c_void};
use tch::Tensor;

#[repr(C)]
pub(crate) struct RawStore {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct RawGroup {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    pub(crate) fn esp_store_new(
        host: *const c_char,
        port: u16,
        server: bool,
        timeout_ms: i64,
        out: *mut *mut RawStore,
        bound: *mut u16,
    ) -> *mut c_char;
    pub(crate) fn esp_store_set_timeout(store: *mut RawStore, timeout_ms: i64) -> *mut c_char;
    pub(crate) fn esp_store_set(store: *mut RawStore, key: *const c_char) -> *mut c_char;
    pub(crate) fn esp_store_has(store: *mut RawStore, key: *const c_char, out: *mut bool) -> *mut c_char;
    pub(crate) fn esp_store_free(store: *mut RawStore);
    pub(crate) fn esp_gloo_new(
        store: *mut RawStore,
        bind: *const c_char,
        rank: c_int,
        world: c_int,
        timeout_ms: i64,
        out: *mut *mut RawGroup,
    ) -> *mut c_char;
    pub(crate) fn esp_all_reduce(group: *mut RawGroup, values: *mut c_void, op: c_int) -> *mut c_char;
    pub(crate) fn esp_group_give_up(group: *mut RawGroup) -> *mut c_char;
    pub(crate) fn esp_group_free(group: *mut RawGroup);
    pub(crate) fn esp_fused_adamw(
        param: *mut c_void,
        grad: *mut c_void,
        exp_avg: *mut c_void,
        exp_avg_sq: *mut c_void,
        step: *mut c_void,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> *mut c_char;
    pub(crate) fn esp_rms_norm(
        x: *mut c_void,
        weight: *mut c_void,
        eps: f64,
        rstd: *mut c_void,
        y: *mut c_void,
    ) -> *mut c_char;
    pub(crate) fn esp_rms_norm_apply(
        x: *mut c_void,
        rstd: *mut c_void,
        weight: *mut c_void,
        y: *mut c_void,
    ) -> *mut c_char;
    pub(crate) fn esp_rms_norm_backward_add(
        grad_x: *mut c_void,
        grad_y: *mut c_void,
        x: *mut c_void,
        rstd: *mut c_void,
        weight: *mut c_void,
    ) -> *mut c_char;
    pub(crate) fn esp_rotate(
        x: *mut c_void,
        y: *mut c_void,
        cos: *mut c_void,
        sin: *mut c_void,
        sign: f64,
        heads: i64,
    ) -> *mut c_char;
    pub(crate) fn esp_swiglu(gate_up: *mut c_void, act: *mut c_void) -> *mut c_char;
    pub(crate) fn esp_swiglu_backward(
        grad_act: *mut c_void,
        gate_up: *mut c_void,
        grad_gate_up: *mut c_void,
    ) -> *mut c_char;
    pub(crate) fn esp_matmul(left: *mut c_void, right: *mut c_void, out: *mut c_void) -> *mut c_char;
    pub(crate) fn esp_project(x: *mut c_void, thin: *mut c_void, scale: f64, y: *mut c_void) -> *mut c_char;
    pub(crate) fn esp_outer_add(low: *mut c_void, x: *mut c_void, sum: *mut c_void) -> *mut c_char;
    pub(crate) fn esp_expand_add(low: *mut c_void, thin: *mut c_void, y: *mut c_void) -> *mut c_char;
    pub(crate) fn esp_low_rank_scores(
        weight: *mut c_void,
        a: *mut c_void,
        a_less: *mut c_void,
        grad_a: *mut c_void,
        b: *mut c_void,
        grad_b: *mut c_void,
        scaling: f64,
        square: bool,
        by_column: bool,
        sums: *mut c_void,
    ) -> *mut c_char;
    pub(crate) fn esp_attention_lanes(element_bytes: i64) -> i64;
    pub(crate) fn esp_attention(
        q: *mut c_void,
        k: *mut c_void,
        v: *mut c_void,
        out: *mut c_void,
        log_sum_exp: *mut c_void,
    ) -> *mut c_char;
    pub(crate) fn esp_attention_backward(
        grad_out: *mut c_void,
        q: *mut c_void,
        k: *mut c_void,
        v: *mut c_void,
        out: *mut c_void,
        log_sum_exp: *mut c_void,
        grad_q: *mut c_void,
        grad_k: *mut c_void,
        grad_v: *mut c_void,
    ) -> *mut c_char;
    pub(crate) fn esp_row_max(x: *mut c_void, highest: *mut c_void) -> *mut c_char;
    pub(crate) fn esp_exp_sum(x: *mut c_void, highest: *mut c_void, sum: *mut c_void) -> *mut c_char;
    pub(crate) fn esp_scale_rows(x: *mut c_void, sum: *mut c_void, scale: f64) -> *mut c_char;
    pub(crate) fn esp_dropout(
        x: *mut c_void,
        y: *mut c_void,
        features: *mut c_void,
        key: u32,
        first_token: u32,
        threshold: u64,
        scale: f64,
    ) -> *mut c_char;
}

#[repr(C)]
pub(crate) struct RawEvent {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    pub(crate) fn esp_device_set(index: c_int) -> *mut c_char;
    pub(crate) fn esp_device_synchronize(index: c_int) -> *mut c_char;
    pub(crate) fn esp_device_memory(index: c_int, out: *mut u64) -> *mut c_char;
    pub(crate) fn esp_device_reset_peak(index: c_int) -> *mut c_char;
    pub(crate) fn esp_device_release_cache() -> *mut c_char;
    pub(crate) fn esp_stream_handle(index: c_int, out: *mut *mut c_void) -> *mut c_char;
    pub(crate) fn esp_event_record(index: c_int, event: *mut *mut RawEvent) -> *mut c_char;
    pub(crate) fn esp_event_reached(event: *mut RawEvent, out: *mut bool) -> *mut c_char;
    pub(crate) fn esp_event_free(event: *mut RawEvent);
    pub(crate) fn esp_flash_attention(
        q: *mut c_void,
        k: *mut c_void,
        v: *mut c_void,
        out: *mut *mut c_void,
        log_sum_exp: *mut *mut c_void,
        state: *mut *mut c_void,
        state_offset: *mut *mut c_void,
        max_q: *mut i64,
        max_k: *mut i64,
    ) -> *mut c_char;
    pub(crate) fn esp_flash_attention_backward(
        grad_out: *mut c_void,
        q: *mut c_void,
        k: *mut c_void,
        v: *mut c_void,
        out: *mut c_void,
        log_sum_exp: *mut c_void,
        state: *mut c_void,
        state_offset: *mut c_void,
        max_q: i64,
        max_k: i64,
        grad_q: *mut *mut c_void,
        grad_k: *mut *mut c_void,
        grad_v: *mut *mut c_void,
    ) -> *mut c_char;
}

/// Turns the shim's message, null for success, into a result.
pub(crate) fn check(message: *mut c_char, fault: impl FnOnce(String) -> Fault) -> Result<(), Fault> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim hands over a NUL-terminated string made by strdup.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        libc::free(message.cast());
        text
    };
    Err(fault(text))
}

/// The `at::Tensor*` behind a tensor.
pub(crate) fn raw(tensor: &Tensor) -> *mut c_void {
    tensor.as_ptr().cast_mut().cast()
}
