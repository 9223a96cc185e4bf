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
