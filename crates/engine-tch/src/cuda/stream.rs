//! The stream that libtorch computes on, and marks on it.

use crate::fault::{Fault, Result};
use crate::ffi;
use std::ffi::{c_int, c_void};
use tch::Device;

/// A queue of work on a device.
pub(crate) trait Stream {
    /// The device's own handle.
    fn handle(&self) -> Result<*mut c_void>;

    /// Sets the mark behind all work queued so far.
    fn record(&mut self) -> Result<()>;

    /// Whether the work before the mark is done.
    fn reached(&mut self) -> Result<bool>;
}

/// The stream of `device` that libtorch computes on in this thread.
pub(crate) fn of(device: Device) -> Result<Box<dyn Stream>> {
    match device {
        Device::Cuda(index) => {
            Ok(Box::new(DeviceStream { index: c_index(index)?, event: std::ptr::null_mut() }))
        }
        Device::Cpu | Device::Mps | Device::Vulkan => {
            Err(Fault::Refused(format!("NCCL needs a CUDA device, this rank computes on {device:?}")))
        }
    }
}

pub(crate) fn c_index(index: usize) -> Result<c_int> {
    c_int::try_from(index).map_err(|_| Fault::Refused(format!("there is no CUDA device {index}")))
}

/// The handle alone, to launch a kernel on.
pub(crate) fn handle_of(index: usize) -> Result<*mut c_void> {
    let mut handle = std::ptr::null_mut();
    // SAFETY: fills the handle.
    ffi::check(unsafe { ffi::esp_stream_handle(c_index(index)?, &raw mut handle) }, Fault::Refused)?;
    Ok(handle)
}

struct DeviceStream {
    index: c_int,
    event: *mut ffi::RawEvent,
}

impl Stream for DeviceStream {
    fn handle(&self) -> Result<*mut c_void> {
        handle_of(usize::try_from(self.index).unwrap_or_default())
    }

    fn record(&mut self) -> Result<()> {
        // SAFETY: makes the event at the first call and uses it again later.
        ffi::check(unsafe { ffi::esp_event_record(self.index, &raw mut self.event) }, Fault::Collective)
    }

    fn reached(&mut self) -> Result<bool> {
        if self.event.is_null() {
            return Ok(true);
        }
        let mut reached = false;
        // SAFETY: the event is live.
        ffi::check(unsafe { ffi::esp_event_reached(self.event, &raw mut reached) }, Fault::Collective)?;
        Ok(reached)
    }
}

impl Drop for DeviceStream {
    fn drop(&mut self) {
        // SAFETY: null, or an event that is freed once.
        unsafe { ffi::esp_event_free(self.event) }
    }
}
