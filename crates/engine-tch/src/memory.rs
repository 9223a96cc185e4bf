//! What a process takes of the machine's memory.

/// Resident bytes of this process; 0 where the system does not say.
pub(crate) fn resident_bytes() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/statm") else { return 0 };
    let pages = text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    // SAFETY: asks for a constant of the system.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages.unwrap_or(0) * u64::try_from(page_bytes).unwrap_or(4096)
}

/// The largest block that glibc lets its heap hold; a larger threshold is ignored.
#[cfg(target_env = "gnu")]
const MOST_KEPT_BYTES: libc::c_int = 32 << 20;

/// Makes the process keep memory that it has freed, in blocks of up to 32 MiB, instead of giving it back at once.
///
/// Activations of megabytes come and go many times a second. By default each would be mapped anew from the system, which
/// zeroes its pages: a quarter of a training step. Call [`give_back`] when less is needed for good.
pub(crate) fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets parameters of the C library's allocator; values out of its range are ignored.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MOST_KEPT_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// Gives freed memory back to the system.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the C library gives back pages of its own that hold nothing.
    unsafe {
        libc::malloc_trim(0);
    }
}
