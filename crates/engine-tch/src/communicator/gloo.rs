//! Gloo over TCP, as it is inside libtorch, and the store in which its ranks meet. With libtorch's CUDA half it takes
//! tensors of a GPU as well, through the host.

use super::{Communicator, ReduceOp};
use crate::fault::{Fault, Result};
use crate::ffi;
use std::ffi::{CString, c_int};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tch::Tensor;

/// A key-value store over TCP in which ranks find each other.
pub(crate) struct Store {
    raw: *mut ffi::RawStore,
    port: u16,
}

impl Store {
    /// Serves a store on `host`, on a port that the system picks.
    pub(crate) fn serve(host: &str, timeout: Duration) -> Result<Self> {
        Self::open(host, 0, true, timeout)
    }

    pub(crate) fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        Self::open(host, port, false, timeout)
    }

    fn open(host: &str, port: u16, server: bool, timeout: Duration) -> Result<Self> {
        let host = c_string(host)?;
        let (mut raw, mut bound) = (std::ptr::null_mut(), 0);
        // SAFETY: the pointers are live for the call; on success `raw` owns a store.
        let message = unsafe {
            ffi::esp_store_new(
                host.as_ptr(),
                port,
                server,
                milliseconds(timeout),
                &raw mut raw,
                &raw mut bound,
            )
        };
        ffi::check(message, Fault::Collective)?;
        Ok(Self { raw, port: bound })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `esp_store_new` and is freed once.
        unsafe { ffi::esp_store_free(self.raw) }
    }
}

/// Gloo over TCP, as it is inside libtorch.
pub(crate) struct Gloo {
    raw: *mut ffi::RawGroup,
    tp_rank: usize,
    tp_degree: usize,
    /// What the group looks at; it lives as long.
    _gives_up: Arc<AtomicBool>,
    /// Outlives the group: rank 0's store is the server that the others talk to.
    _store: Store,
}

impl Gloo {
    /// Joins the group that meets in `store`; sockets listen on `host`. Waits for all ranks, at most `timeout`. A collective
    /// ends within a fraction of a second once `gives_up` is set.
    pub(crate) fn join(
        store: Store,
        host: &str,
        tp_rank: usize,
        tp_degree: usize,
        timeout: Duration,
        gives_up: Arc<AtomicBool>,
    ) -> Result<Self> {
        let host = c_string(host)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointers are live for the call; on success `raw` owns a group, which looks at `gives_up` as long as
        // it lives, and `Self` keeps that. An AtomicBool is laid out as a bool, and so is C++'s atomic of one.
        let message = unsafe {
            ffi::esp_gloo_new(
                store.raw,
                host.as_ptr(),
                tp_rank as c_int,
                tp_degree as c_int,
                milliseconds(timeout),
                Arc::as_ptr(&gives_up),
                &raw mut raw,
            )
        };
        ffi::check(message, Fault::Collective)?;
        Ok(Self { raw, tp_rank, tp_degree, _gives_up: gives_up, _store: store })
    }
}

impl Communicator for Gloo {
    fn tp_degree(&self) -> usize {
        self.tp_degree
    }

    fn tp_rank(&self) -> usize {
        self.tp_rank
    }

    fn all_reduce(&mut self, values: &mut Tensor, op: ReduceOp) -> Result<()> {
        if values.numel() == 0 {
            return Ok(());
        }
        // SAFETY: the group is live and the tensor is one; Gloo writes within its storage.
        let message = unsafe { ffi::esp_all_reduce(self.raw, ffi::raw(values), op as c_int) };
        ffi::check(message, Fault::Collective)
    }
}

impl Drop for Gloo {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `esp_gloo_new` and is freed once.
        unsafe { ffi::esp_group_free(self.raw) }
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text)
        .map_err(|_| Fault::Refused(format!("host name `{}` holds a zero byte", text.escape_debug())))
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
