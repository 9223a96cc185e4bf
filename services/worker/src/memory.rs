//! Memory of this process and of the machine, as the kernel tells it; 0 where it does not.

use std::fs;

/// Resident memory of this process in bytes.
pub(crate) fn resident_bytes() -> u64 {
    fs::read_to_string("/proc/self/status").ok().and_then(|text| kilobytes(&text, "VmRSS:")).unwrap_or(0)
}

/// Memory that this process may take: the machine's, or its container's if that is less.
pub(crate) fn available_to_process_bytes() -> u64 {
    let machine =
        fs::read_to_string("/proc/meminfo").ok().and_then(|text| kilobytes(&text, "MemTotal:")).unwrap_or(0);
    let container =
        fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    container.map_or(machine, |limit: u64| limit.min(machine))
}

/// The value of a line such as `VmRSS:     1234 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(number * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_follows_what_is_touched() {
        let before = resident_bytes();
        let block = vec![1_u8; 64 << 20];
        assert!(std::hint::black_box(&block).iter().all(|byte| *byte == 1));
        let after = resident_bytes();
        assert!(after > before + (32 << 20), "{before} {after}");
        assert!(available_to_process_bytes() > after);
    }

    #[test]
    fn a_line_without_a_number_is_nothing() {
        assert_eq!(kilobytes("VmRSS:\t  12 kB\n", "VmRSS:"), Some(12 * 1024));
        for text in ["", "VmRSS:", "VmRSS: x kB", "VmRSS: 12 MB"] {
            assert_eq!(kilobytes(text, "VmRSS:"), None);
        }
    }
}
