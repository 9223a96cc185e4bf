//! The page of the API is what the schema says.

use std::fs;
use tidy_tests::{api, root};

#[test]
fn the_page_of_the_api_is_what_the_schema_says() {
    let committed = fs::read_to_string(root().join(api::PAGE)).unwrap_or_default();
    let expected = api::page();
    let mut lines = committed.lines().zip(expected.lines()).enumerate();
    let line = lines.find_map(|(number, (one, other))| (one != other).then_some(number + 1));
    assert!(
        committed == expected,
        "{} differs from the schema at line {}; write it anew: {}",
        api::PAGE,
        line.unwrap_or_else(|| committed.lines().count().min(expected.lines().count()) + 1),
        api::COMMAND
    );
}
