//! Holds one thread of a process while the others go on, as a hung kernel or driver call would.

use std::time::{Duration, Instant};

/// The compute thread of a worker bears this name.
const DEVICE_THREAD: &str = "device";

/// Ids of a process's compute threads.
fn device_threads(process: u32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    tasks
        .filter(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            name.trim() == DEVICE_THREAD
        })
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .collect()
}

/// Longest that a thread is waited for to compute.
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits until a thread computes, and is not in a collective with others: then its rank alone is at fault.
fn await_computing(process: u32, thread: i32) {
    let end = Instant::now() + PATIENCE;
    let computes = || {
        let status =
            std::fs::read_to_string(format!("/proc/{process}/task/{thread}/stat")).unwrap_or_default();
        // The state follows the name, which ends with the last parenthesis.
        status.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('R'))
    };
    while !computes() && Instant::now() < end {
        std::thread::yield_now();
    }
}

/// Holds the compute threads that the process has now, for `lasts`. False when it has none or holding is not allowed here.
pub(crate) fn hold_device_threads(process: u32, lasts: Duration) -> bool {
    let mut held = Vec::new();
    for thread in device_threads(process) {
        await_computing(process, thread);
        if hold(thread) {
            held.push(thread);
        }
    }
    if !held.is_empty() {
        std::thread::sleep(lasts);
    }
    for thread in &held {
        // SAFETY: `PTRACE_DETACH` takes no memory; a thread that has ended meanwhile is an error that changes nothing.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, *thread, 0, 0) };
    }
    !held.is_empty()
}

fn hold(thread: i32) -> bool {
    // SAFETY: neither request takes memory, and `waitpid` writes to a local alone. The thread belongs to a child of ours.
    unsafe {
        if libc::ptrace(libc::PTRACE_SEIZE, thread, 0, 0) != 0 {
            return false;
        }
        if libc::ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0) != 0 {
            return false;
        }
        let mut status = 0;
        libc::waitpid(thread, &mut status, libc::__WALL) == thread && libc::WIFSTOPPED(status)
    }
}
