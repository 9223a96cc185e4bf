//! Numbers as people read them.

use std::time::Duration;

/// Groups of three digits: `134,515,008`.
#[must_use]
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Three significant figures and a letter: `135 M`, `6.74 B`.
#[must_use]
pub(crate) fn short_count(count: u64) -> String {
    scaled(count as f64, 1000.0, &["", " K", " M", " B", " T"])
}

/// Binary multiples: `1.23 GiB`.
#[must_use]
pub(crate) fn bytes(count: u64) -> String {
    scaled(count as f64, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB"])
}

fn scaled(value: f64, base: f64, units: &[&str]) -> String {
    let mut value = value;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let decimals = if unit == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.decimals$}{}", units[unit])
}

/// `850 ms`, `4.2 s`, `2m 10s`, `1h 02m`.
#[must_use]
pub(crate) fn duration(span: Duration) -> String {
    let seconds = span.as_secs_f64();
    let whole = seconds.round() as u64;
    if seconds < 0.9995 {
        format!("{:.0} ms", seconds * 1000.0)
    } else if seconds < 59.95 {
        format!("{seconds:.1} s")
    } else if whole < 3600 {
        format!("{}m {:02}s", whole / 60, whole % 60)
    } else {
        format!("{}h {:02}m", whole / 3600, whole % 3600 / 60)
    }
}

/// A fraction as `49.8 %`.
#[must_use]
pub(crate) fn percent(fraction: f64) -> String {
    format!("{:.1} %", fraction * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        for (count, expected) in [(0, "0"), (999, "999"), (1000, "1,000"), (134_515_008, "134,515,008")] {
            assert_eq!(grouped(count), expected);
        }
        for (count, expected) in
            [(7, "7"), (1500, "1.50 K"), (134_515_008, "135 M"), (6_738_415_616, "6.74 B")]
        {
            assert_eq!(short_count(count), expected);
        }
        for (count, expected) in
            [(12, "12 B"), (1023, "1.00 KiB"), (1 << 20, "1.00 MiB"), (5 << 30, "5.00 GiB")]
        {
            assert_eq!(bytes(count), expected);
        }
        let spans =
            [(0.85, "850 ms"), (4.21, "4.2 s"), (59.97, "1m 00s"), (130.0, "2m 10s"), (3720.0, "1h 02m")];
        for (seconds, expected) in spans {
            assert_eq!(duration(Duration::from_secs_f64(seconds)), expected);
        }
        assert_eq!(percent(0.4982), "49.8 %");
    }
}
