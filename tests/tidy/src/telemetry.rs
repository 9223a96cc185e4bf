//! The table of docs/telemetry.md: every metric that the programs have.

use service_kit::metrics::catalogue::ALL;

pub const PAGE: &str = "docs/telemetry.md";
pub const COMMAND: &str = "cargo run -p tidy-tests --bin telemetry_page";
const START: &str = "<!-- metrics: written by the command above -->\n";
const END: &str = "<!-- end of metrics -->\n";

/// The page with its table as the code has it.
///
/// # Panics
/// When the page has no place for the table.
#[must_use]
pub fn page() -> String {
    let text = crate::read(PAGE);
    let (before, rest) = text.split_once(START).expect("the page has a place for its table");
    let (_, after) = rest.split_once(END).expect("the table has an end");
    format!("{before}{START}{}{END}{after}", table())
}

fn table() -> String {
    let mut table = String::from(
        "| OpenTelemetry | Prometheus | kind | unit | attributes | what it says |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for metric in ALL {
        let attributes: Vec<String> = metric.attributes.iter().map(|name| format!("`{name}`")).collect();
        table.push_str(&format!(
            "| `{}` | `{}` | {} | `{}` | {} | {} |\n",
            metric.name,
            metric.prometheus_name(),
            metric.kind,
            metric.unit,
            attributes.join(", "),
            metric.says
        ));
    }
    table
}
