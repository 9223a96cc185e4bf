//! docs/telemetry.md against the code.

use tidy_tests::{read, telemetry};

#[test]
fn the_page_of_the_metrics_is_what_the_code_says() {
    assert_eq!(
        read(telemetry::PAGE),
        telemetry::page(),
        "{} is not current; run `{}`",
        telemetry::PAGE,
        telemetry::COMMAND
    );
}
