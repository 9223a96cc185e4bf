//! Writes the table of docs/telemetry.md from the code.

use tidy_tests::{root, telemetry};

fn main() -> std::io::Result<()> {
    std::fs::write(root().join(telemetry::PAGE), telemetry::page())
}
