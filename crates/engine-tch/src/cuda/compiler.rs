//! `kernels.cu` compiled for the device at hand by NVRTC, loaded by the driver, launched on libtorch's stream.
//!
//! Where a library is missing or does not know the device, compositions of libtorch operators do the same work; that is
//! said once in the log.

use super::launch::{Args, Launcher};
use super::library::Library;
use super::stream::handle_of;
use crate::fault::{Fault, Result};
use cudarc::driver::{result as driver, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tch::Device;

const SOURCE: &str = include_str!("kernels.cu");
/// The largest rank for which the score kernel keeps a column's factors in registers.
pub(crate) const MOST_SCORED_RANK: usize = 32;

type Code = c_int;
type Program = *mut c_void;

/// The functions of NVRTC that are used.
struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Code,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Code,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    destroy: unsafe extern "C" fn(*mut Program) -> Code,
}

impl Nvrtc {
    fn get() -> std::result::Result<&'static Self, String> {
        static NVRTC: OnceLock<std::result::Result<Nvrtc, String>> = OnceLock::new();
        NVRTC.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> std::result::Result<Self, String> {
        let library = Library::open(&["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"])?;
        // SAFETY: the names are NVRTC's, with these signatures since CUDA 11.1.
        unsafe {
            Ok(Self {
                create: library.function(c"nvrtcCreateProgram")?,
                compile: library.function(c"nvrtcCompileProgram")?,
                log_size: library.function(c"nvrtcGetProgramLogSize")?,
                log: library.function(c"nvrtcGetProgramLog")?,
                cubin_size: library.function(c"nvrtcGetCUBINSize")?,
                cubin: library.function(c"nvrtcGetCUBIN")?,
                destroy: library.function(c"nvrtcDestroyProgram")?,
            })
        }
    }

    /// Machine code of `source` for devices of capability `architecture`, 90 for 9.0.
    fn compile(
        &self,
        source: &str,
        architecture: u32,
        lora_rank: usize,
    ) -> std::result::Result<Vec<u8>, String> {
        let source = CString::new(source).map_err(|error| error.to_string())?;
        let mut options = vec![format!("--gpu-architecture=sm_{architecture}"), "--std=c++17".into()];
        if (1..=MOST_SCORED_RANK).contains(&lora_rank) {
            options.push(format!("--define-macro=LORA_RANK={lora_rank}"));
        }
        let options: Vec<CString> = options
            .into_iter()
            .map(CString::new)
            .collect::<std::result::Result<_, _>>()
            .map_err(|error| error.to_string())?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        let failed = |what: &str, code: Code| format!("{what} failed (NVRTC code {code})");
        // SAFETY: all pointers are live for their calls; sizes are asked for before buffers are filled.
        unsafe {
            let code = (self.create)(
                &raw mut program,
                source.as_ptr(),
                c"kernels.cu".as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            );
            if code != 0 {
                return Err(failed("reading the kernels", code));
            }
            let compiled = (self.compile)(program, options.len() as c_int, options.as_ptr());
            let made = if compiled == 0 {
                self.read(program, self.cubin_size, self.cubin)
                    .map_err(|code| failed("linking the kernels", code))
            } else {
                let log = self.read(program, self.log_size, self.log).unwrap_or_default();
                let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
                Err(format!("{}: {log}", failed("compiling the kernels", compiled)))
            };
            let _ = (self.destroy)(&raw mut program);
            made
        }
    }

    /// # Safety
    /// `size` and `fill` belong together and to the live `program`.
    unsafe fn read(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> Code,
        fill: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    ) -> std::result::Result<Vec<u8>, Code> {
        let mut bytes = 0;
        // SAFETY: fills a number, then a buffer of that size.
        unsafe {
            let code = size(program, &raw mut bytes);
            if code != 0 {
                return Err(code);
            }
            let mut out = vec![0u8; bytes];
            let code = fill(program, out.as_mut_ptr().cast());
            if code == 0 { Ok(out) } else { Err(code) }
        }
    }
}

/// The kernels on one device, for one LoRA rank.
pub(crate) struct Kernels {
    index: usize,
    module: sys::CUmodule,
    functions: Mutex<HashMap<String, usize>>,
}

// SAFETY: the driver lets any thread use a module whose context is current in it, which libtorch sees to.
unsafe impl Send for Kernels {}
// SAFETY: as above; the table of functions is behind a lock.
unsafe impl Sync for Kernels {}

/// The kernels of `device`, with the score pass for `lora_rank`; none on a CPU or where they cannot be had.
pub(crate) fn kernels(device: Device, lora_rank: usize) -> Option<Arc<Kernels>> {
    type Known = Mutex<HashMap<(usize, usize), Option<Arc<Kernels>>>>;
    static KNOWN: OnceLock<Known> = OnceLock::new();
    let Device::Cuda(index) = device else { return None };
    let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    known
        .entry((index, lora_rank))
        .or_insert_with(|| match Kernels::make(index, lora_rank) {
            Ok(kernels) => Some(Arc::new(kernels)),
            Err(why) => {
                tracing::warn!(
                    device = index,
                    why,
                    "no kernels of our own: libtorch's operators do their work, slower"
                );
                None
            }
        })
        .clone()
}

/// The kernels that do not depend on a rank.
pub(crate) fn elementwise(device: Device) -> Option<Arc<Kernels>> {
    kernels(device, 0)
}

impl Kernels {
    fn make(index: usize, lora_rank: usize) -> std::result::Result<Self, String> {
        // SAFETY: looks whether the library can be opened.
        if !unsafe { sys::is_culib_present() } {
            return Err("the CUDA driver's library was not found".into());
        }
        let text = |error: driver::DriverError| format!("the CUDA driver answers {error:?}");
        driver::init().map_err(text)?;
        let ordinal = c_int::try_from(index).map_err(|error| error.to_string())?;
        let device = driver::device::get(ordinal).map_err(text)?;
        let attribute = |attribute| {
            // SAFETY: the device was just got.
            unsafe { driver::device::get_attribute(device, attribute) }.map_err(text)
        };
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let code = compile(u32::try_from(major * 10 + minor).unwrap_or_default(), lora_rank)?;
        // SAFETY: machine code of NVRTC; the device's context is current, as libtorch has made tensors in this thread.
        let module = unsafe { driver::module::load_data(code.as_ptr().cast()) }.map_err(text)?;
        Ok(Self { index, module, functions: Mutex::default() })
    }

    fn function(&self, name: &str) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = functions.get(name) {
            return Ok(*known as sys::CUfunction);
        }
        let c_name = CString::new(name).map_err(|error| Fault::Refused(error.to_string()))?;
        // SAFETY: the module is live.
        let function = unsafe { driver::module::get_function(self.module, c_name) }
            .map_err(|error| Fault::Refused(format!("there is no kernel `{name}`: {error:?}")))?;
        functions.insert(name.to_owned(), function as usize);
        Ok(function)
    }
}

impl Launcher for Kernels {
    fn launch(&self, kernel: &str, grid: [u32; 2], threads: u32, args: &Args) -> Result<()> {
        let function = self.function(kernel)?;
        let stream = handle_of(self.index)?;
        let mut args = *args;
        // SAFETY: the kernel takes one `Args` by value; the tensors behind its pointers outlive the launch in stream
        // order, as libtorch's allocator hands their memory out anew on this stream alone.
        unsafe {
            driver::launch_kernel(
                function,
                (grid[0], grid[1], 1),
                (threads, 1, 1),
                0,
                stream.cast(),
                &mut [(&raw mut args).cast()],
            )
        }
        .map_err(|error| Fault::Refused(format!("kernel `{kernel}` cannot start: {error:?}")))
    }
}

/// See [`Nvrtc::compile`].
fn compile(architecture: u32, lora_rank: usize) -> std::result::Result<Vec<u8>, String> {
    Nvrtc::get()?.compile(SOURCE, architecture, lora_rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_has_no_kernels() {
        assert!(kernels(Device::Cpu, 8).is_none());
        assert!(elementwise(Device::Cpu).is_none());
    }

    /// Where NVRTC is on the library path, the kernels are compiled for real devices; where it is not, that is said.
    #[test]
    fn kernels_compile_for_hopper_wherever_the_compiler_is() {
        match Nvrtc::get() {
            Ok(nvrtc) => {
                for lora_rank in [0, 8, MOST_SCORED_RANK, MOST_SCORED_RANK + 1] {
                    let code = nvrtc.compile(SOURCE, 90, lora_rank).unwrap();
                    assert_eq!(&code[..4], b"\x7fELF");
                }
                let problem = nvrtc.compile("KERNEL nonsense;", 90, 0).unwrap_err();
                assert!(problem.contains("nonsense") || problem.contains("KERNEL"), "{problem}");
            }
            Err(why) => assert!(why.contains("libnvrtc"), "{why}"),
        }
    }
}
