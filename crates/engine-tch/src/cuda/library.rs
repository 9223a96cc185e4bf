//! Shared libraries that are found at run time or not at all.

use std::ffi::{CStr, CString, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

/// An open library; it stays open for the life of the process.
pub(crate) struct Library {
    handle: *mut c_void,
    name: String,
}

impl Library {
    /// The first of `names` that can be opened: as the system finds it, or beside libtorch's CUDA half, where wheels put
    /// NVIDIA's libraries.
    pub(crate) fn open(names: &[&str]) -> Result<Self, String> {
        let mut problems = Vec::new();
        for name in names {
            let beside =
                wheel_folders().into_iter().map(|folder| folder.join(name).to_string_lossy().into_owned());
            for path in std::iter::once((*name).to_owned()).chain(beside) {
                match open(&path, libc::RTLD_NOW | libc::RTLD_LOCAL) {
                    Ok(handle) => return Ok(Self { handle, name: path }),
                    Err(problem) => problems.push(problem),
                }
            }
        }
        Err(problems.into_iter().next().unwrap_or_else(|| "no name was given".into()))
    }

    /// The function `name`.
    ///
    /// # Safety
    /// `F` is a pointer to a function, of the signature that the library gives it.
    pub(crate) unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F, String> {
        // SAFETY: the handle is open.
        let address = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        if address.is_null() || size_of::<F>() != size_of::<*mut c_void>() {
            return Err(format!("`{}` has no function `{}`", self.name, name.to_string_lossy()));
        }
        // SAFETY: both are one pointer wide; the caller vouches for the signature.
        Ok(unsafe { std::mem::transmute_copy::<*mut c_void, F>(&address) })
    }
}

fn open(path: &str, flags: libc::c_int) -> Result<*mut c_void, String> {
    let Ok(name) = CString::new(path) else { return Err(format!("`{}` is no name", path.escape_debug())) };
    // SAFETY: opens a library and runs its initialisers; it is never closed.
    let handle = unsafe { libc::dlopen(name.as_ptr(), flags) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: the message of the call just made, in this thread.
    let why = unsafe { libc::dlerror() };
    if why.is_null() {
        return Err(format!("`{path}` cannot be opened"));
    }
    // SAFETY: a NUL-terminated string that is valid until the next call.
    Err(unsafe { CStr::from_ptr(why) }.to_string_lossy().into_owned())
}

/// Opens the CUDA half of libtorch, once. Its initialisers register the CUDA kernels, so that the same program computes
/// on a GPU; where it is missing, nothing changes.
pub(crate) fn libtorch_cuda() -> Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(|| open("libtorch_cuda.so", libc::RTLD_NOW | libc::RTLD_GLOBAL).map(|_| ())).clone()
}

/// Folders of NVIDIA's wheels, as seen from where libtorch's CUDA half lies: `torch/lib`, `nvidia/*/lib`.
fn wheel_folders() -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Some(torch_lib) = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .map(PathBuf::from)
        .find(|path| path.file_name().is_some_and(|name| name == "libtorch_cuda.so"))
        .and_then(|path| path.parent().map(PathBuf::from))
    else {
        return Vec::new();
    };
    let mut folders = vec![torch_lib.clone()];
    let packages = torch_lib.join("../../nvidia");
    for package in ["cu13", "nccl", "cuda_nvrtc"] {
        folders.push(packages.join(package).join("lib"));
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_is_named() {
        let problem = Library::open(&["libnosuchthing.so.7"]).err().unwrap();
        assert!(problem.contains("libnosuchthing.so.7"), "{problem}");
    }

    #[test]
    fn functions_are_found_by_name_or_refused_by_name() {
        let library = Library::open(&["libnosuchthing.so.7", "libm.so.6"]).unwrap();
        // SAFETY: the C library's own signature.
        let cosine: extern "C" fn(f64) -> f64 = unsafe { library.function(c"cos") }.unwrap();
        assert_eq!(cosine(0.0), 1.0);
        // SAFETY: there is no such function to call.
        let missing = unsafe { library.function::<extern "C" fn()>(c"no_such_function") };
        assert!(missing.err().unwrap().contains("no_such_function"));
    }
}
