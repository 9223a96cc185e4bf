//! Filters and orders of ListRuns. What is read prints as something that reads as the same.

#![no_main]

#[path = "../../services/coordinator/src/run_filter.rs"]
mod run_filter;

use libfuzzer_sys::fuzz_target;
use pruning_run::RunState;
use run_filter::{Filter, Order, RunFields};
use std::cmp::Ordering;
use std::time::{Duration, UNIX_EPOCH};

fuzz_target!(|data: &str| {
    let run = RunFields {
        id: "r-17",
        state: RunState::Running,
        display_name: "half",
        model: "/models/small",
        create_time: UNIX_EPOCH + Duration::from_secs(1_767_225_600),
        end_time: None,
        number: 17,
    };
    if let Ok(filter) = Filter::parse(data) {
        let printed = filter.to_string();
        // Quotes and parentheses may make it longer than a filter may be.
        if let Ok(again) = Filter::parse(&printed) {
            assert_eq!(again, filter, "{printed}");
            assert_eq!(again.matches(&run), filter.matches(&run));
        }
    }
    if let Ok(order) = Order::parse(data) {
        assert_eq!(order.compare(&run, &run), Ordering::Equal);
        let other = RunFields { id: "r-18", number: 18, end_time: Some(UNIX_EPOCH), ..run };
        assert_eq!(order.compare(&run, &other), order.compare(&other, &run).reverse());
    }
});
