//! Devices by their names, and what a device says of itself.

use crate::cuda::library::libtorch_cuda;
use crate::cuda::stream::c_index;
use crate::fault::{Fault, Result};
use crate::ffi;
use crate::memory;
use tch::Device;

/// Why there is no such device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("`{name}` is no device; use cpu, cuda or cuda:N")]
    Name { name: String },
    #[error(
        "`{name}` needs the CUDA half of libtorch, which was not found ({why}); install torch 2.11.0 for CUDA and put its \
         `torch/lib` on LD_LIBRARY_PATH"
    )]
    NoCudaLibrary { name: String, why: String },
    #[error(
        "`{name}` is not there: libtorch sees {count} CUDA devices; check the driver (`nvidia-smi`) and CUDA_VISIBLE_DEVICES"
    )]
    NoDevice { name: String, count: i64 },
}

/// The device `name`: `cpu`, `cuda` (the first) or `cuda:N`. A CUDA device is there when this returns.
///
/// # Errors
/// When the name is none, libtorch's CUDA half is not installed, or there is no such device.
pub fn open_device(name: &str) -> std::result::Result<Device, DeviceError> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|index| index.parse().ok()),
    };
    let Some(index) = index else { return Err(DeviceError::Name { name: name.to_owned() }) };
    libtorch_cuda().map_err(|why| DeviceError::NoCudaLibrary { name: name.to_owned(), why })?;
    let count = if tch::Cuda::is_available() { tch::Cuda::device_count() } else { 0 };
    if index as i64 >= count {
        return Err(DeviceError::NoDevice { name: name.to_owned(), count });
    }
    Ok(Device::Cuda(index))
}

/// Memory of a device in bytes; of the process and the machine on a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceMemory {
    /// Held by tensors.
    pub allocated: u64,
    /// The most that tensors held since the start or [`reset_peak`].
    pub peak: u64,
    /// Kept from the device by this process.
    pub reserved: u64,
    pub free: u64,
    pub total: u64,
}

/// What the device's allocator and driver say; on a CPU only `reserved`, the resident bytes.
///
/// # Errors
/// When the device does not answer.
pub fn device_memory(device: Device) -> std::result::Result<DeviceMemory, engine::EngineError> {
    Ok(memory_of(device)?)
}

pub(crate) fn memory_of(device: Device) -> Result<DeviceMemory> {
    let Device::Cuda(index) = device else {
        let resident = memory::resident_bytes();
        return Ok(DeviceMemory { reserved: resident, ..DeviceMemory::default() });
    };
    let mut bytes = [0u64; 5];
    // SAFETY: fills five numbers.
    ffi::check(unsafe { ffi::esp_device_memory(c_index(index)?, bytes.as_mut_ptr()) }, Fault::Refused)?;
    let [allocated, peak, reserved, free, total] = bytes;
    Ok(DeviceMemory { allocated, peak, reserved, free, total })
}

/// Starts the measure of [`DeviceMemory::peak`] anew.
///
/// # Errors
/// When the device does not answer.
pub fn reset_peak(device: Device) -> std::result::Result<(), engine::EngineError> {
    if let Device::Cuda(index) = device {
        // SAFETY: takes a number.
        ffi::check(unsafe { ffi::esp_device_reset_peak(c_index(index)?) }, Fault::Refused)?;
    }
    Ok(())
}

/// Waits until the device has done all that was queued. Nothing but the device's own work is waited for.
///
/// # Errors
/// When that work failed.
pub fn synchronize(device: Device) -> std::result::Result<(), engine::EngineError> {
    if let Device::Cuda(index) = device {
        // SAFETY: takes a number.
        ffi::check(unsafe { ffi::esp_device_synchronize(c_index(index)?) }, Fault::Refused)?;
    }
    Ok(())
}

/// Makes `device` the one that this thread's work without a device of its own goes to.
pub(crate) fn make_current(device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => {
            // SAFETY: takes a number.
            ffi::check(unsafe { ffi::esp_device_set(c_index(index)?) }, Fault::Refused)?;
            // The runtime binds the device's context to a thread at the thread's first work, and the driver, which starts
            // our kernels, needs it bound.
            let _ = tch::Tensor::f_zeros([1], (tch::Kind::Float, device))?;
            Ok(())
        }
        Device::Cpu | Device::Mps | Device::Vulkan => Ok(()),
    }
}

/// Gives memory that no tensor holds back to the device and the system.
pub(crate) fn give_back(device: Device) -> Result<()> {
    memory::give_back();
    if device.is_cuda() {
        // SAFETY: frees blocks that hold nothing.
        ffi::check(unsafe { ffi::esp_device_release_cache() }, Fault::Refused)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_devices_or_refused_with_what_to_do() {
        assert_eq!(open_device("cpu").unwrap(), Device::Cpu);
        for name in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "cpu:0"] {
            let error = open_device(name).unwrap_err();
            assert!(matches!(&error, DeviceError::Name { .. }), "{name}: {error}");
        }
        // 999 devices are nowhere: without libtorch's CUDA half, without a driver and with one.
        let error = open_device("cuda:999").unwrap_err();
        let text = error.to_string();
        match error {
            DeviceError::NoCudaLibrary { .. } => assert!(text.contains("LD_LIBRARY_PATH"), "{text}"),
            DeviceError::NoDevice { .. } => assert!(text.contains("nvidia-smi"), "{text}"),
            DeviceError::Name { .. } => panic!("{text}"),
        }
    }

    #[test]
    fn a_cpu_answers_like_a_device() {
        let memory = memory_of(Device::Cpu).unwrap();
        assert!(memory.reserved > 1 << 20);
        synchronize(Device::Cpu).unwrap();
        reset_peak(Device::Cpu).unwrap();
        make_current(Device::Cpu).unwrap();
        give_back(Device::Cpu).unwrap();
    }
}
