//! Writes docs/api.md from the schema.

use tidy_tests::{api, root};

fn main() -> std::io::Result<()> {
    std::fs::write(root().join(api::PAGE), api::page())
}
