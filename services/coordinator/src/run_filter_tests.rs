use super::{Filter, MAX_BYTES, MAX_NESTING, Order, RunFields};
use proptest::prelude::*;
use std::cmp::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use wire::pb::RunState;

/// 2026-01-01T00:00:00Z.
const NEW_YEAR: u64 = 1_767_225_600;

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn run() -> RunFields<'static> {
    RunFields {
        id: "r-17",
        state: RunState::Running,
        display_name: "half of SmolLM2",
        model: "/models/smollm2",
        create_time: at(NEW_YEAR),
        end_time: None,
    }
}

#[test]
fn a_filter_matches_what_it_says() {
    for (filter, expected) in [
        ("", true),
        ("  \n ", true),
        ("state = RUNNING", true),
        ("state=RUN_STATE_RUNNING", true),
        ("state:\"RUNNING\"", true),
        ("state != RUNNING", false),
        ("state = PAUSED", false),
        ("id = r-17", true),
        ("id='r-17'", true),
        ("id < r-18 AND id >= r-17 AND id > r-16 AND id <= r-17", true),
        ("model = /models/smollm2", true),
        ("display_name:SmolLM2", true),
        ("display_name:smollm2", false),
        ("display_name:*", true),
        ("display_name:\"*\"", false),
        ("display_name = \"half of SmolLM2\"", true),
        ("display_name = \"half of \\SmolLM2\"", true),
        ("create_time = 2026-01-01T00:00:00Z", true),
        ("create_time = \"2026-01-01T02:30:00+02:30\"", true),
        ("create_time > \"2025-12-31T23:59:59.999999999Z\"", true),
        ("create_time < \"2026-01-01T00:00:00Z\"", false),
        ("NOT state = PAUSED", true),
        ("-state = RUNNING", false),
        ("NOT (state = PAUSED OR id = r-17)", false),
        // OR binds tighter than AND: this is (id = r-17 OR id = a) AND state = PAUSED.
        ("id = r-17 OR id = a AND state = PAUSED", false),
        ("id = r-17 OR (id = a AND state = PAUSED)", true),
        ("state = PAUSED AND id = a OR id = r-17", false),
    ] {
        let read = Filter::parse(filter).unwrap_or_else(|error| panic!("`{filter}`: {error}"));
        assert_eq!(read.matches(&run()), expected, "`{filter}`");
    }
}

#[test]
fn a_filter_that_cannot_be_read_says_where_and_what_would_do() {
    for (filter, expected) in [
        ("status = RUNNING", "character 1: found `status = RUNNING`, expected one of `id`, `state`, "),
        ("running", "character 1: found `running`, expected one of `id`"),
        ("state", "character 6: found the end, expected = or !=, as states have no order"),
        ("state < RUNNING", "character 7: found `< RUNNING`, expected = or !="),
        ("state = RUNING", "character 9: found `RUNING`, expected a state, such as RUNNING"),
        ("state = UNSPECIFIED", "character 9: found `UNSPECIFIED`, expected a state"),
        ("state = ", "character 9: found the end, expected a state"),
        ("id = AND", "character 6: found `AND`, expected a value"),
        ("id = a b", "character 8: found `b`, expected AND, OR or the end"),
        ("id = a AND", "character 11: found the end, expected one of `id`"),
        ("id = a and id = b", "character 8: found `and id = b`, expected AND, OR or the end"),
        ("(id = a", "character 8: found the end, expected AND, OR or `)`"),
        ("id = a)", "character 7: found `)`, expected AND, OR or the end"),
        ("id ~ a", "character 4: found `~ a`, expected one of = != < <= > >= :"),
        ("id = \"a", "character 8: found the end, expected a closing \""),
        ("id = \"a\\", "character 9: found the end, expected a closing \""),
        ("id = 'ä' OR 'b'", "character 13: found `'b'`, expected one of `id`"),
        ("create_time:*", "character 12: found `:*`, expected one of = != < <= > >=, as this"),
        ("create_time > 2026", "character 15: found `2026`, expected an RFC 3339 time"),
        (
            "create_time > \"2026-02-30T00:00:00Z\"",
            "character 15: found `\"2026-02-30T00:00:00Z\"`, expected an RFC",
        ),
        ("NOT NOT id = a", "character 5: found `NOT id = a`, expected one of `id`"),
    ] {
        let error = Filter::parse(filter).expect_err(filter).to_string();
        assert!(error.starts_with(expected), "`{filter}`: {error}");
    }
}

#[test]
fn length_and_nesting_are_bounded() {
    let nested = |depth: usize| format!("{}id = a{}", "(".repeat(depth), ")".repeat(depth));
    assert!(Filter::parse(&nested(MAX_NESTING)).is_ok());
    let error = Filter::parse(&nested(MAX_NESTING + 1)).expect_err("too deep");
    assert_eq!(error.position, MAX_NESTING + 1);
    assert_eq!(error.expected, format!("at most {MAX_NESTING} parentheses around each other"));

    let padded = |bytes: usize| format!("{:bytes$}", "id = a");
    assert!(Filter::parse(&padded(MAX_BYTES)).is_ok());
    let too_long = padded(MAX_BYTES + 1);
    for error in [Filter::parse(&too_long).expect_err("long"), Order::parse(&too_long).expect_err("long")] {
        assert_eq!(error.found, format!("{} bytes", MAX_BYTES + 1));
        assert_eq!(error.expected, format!("at most {MAX_BYTES} bytes"));
    }
}

#[test]
fn an_order_goes_by_its_fields_then_by_creation_newest_first() {
    let run = |id, state, display_name, created, ended: Option<u64>| RunFields {
        id,
        state,
        display_name,
        model: "",
        create_time: at(created),
        end_time: ended.map(at),
    };
    let runs = [
        run("a", RunState::Succeeded, "x", 10, Some(50)),
        run("b", RunState::Failed, "y", 20, Some(40)),
        run("c", RunState::Running, "x", 30, None),
        run("d", RunState::Running, "y", 30, None),
    ];
    for (order, expected) in [
        ("", "cdba"),
        (" ", "cdba"),
        ("create_time", "abcd"),
        ("create_time desc", "cdba"),
        ("display_name", "cadb"),
        ("display_name desc, create_time", "bdac"),
        ("display_name,create_time   desc", "cadb"),
        ("state", "bcda"),
        ("state desc,display_name desc", "adcb"),
        ("end_time", "bacd"),
        ("end_time desc", "cdab"),
    ] {
        let order_read = Order::parse(order).unwrap_or_else(|error| panic!("`{order}`: {error}"));
        let mut sorted = runs;
        sorted.sort_by(|one, other| order_read.compare(one, other));
        let ids: String = sorted.iter().map(|run| run.id).collect();
        assert_eq!(ids, expected, "`{order}`");
    }
}

#[test]
fn an_order_that_cannot_be_read_says_where_and_what_would_do() {
    for (order, expected) in [
        ("model", "character 1: found `model`, expected one of `state`, `display_name`, "),
        ("state,", "character 7: found the end, expected one of `state`"),
        ("state asc", "character 7: found `asc`, expected `desc`, a comma or the end"),
        ("state desc desc", "character 12: found `desc`, expected a comma or the end"),
        ("state, state desc", "character 8: found `state desc`, expected a field not named before"),
        (",", "character 1: found `,`, expected one of"),
    ] {
        let error = Order::parse(order).expect_err(order).to_string();
        assert!(error.starts_with(expected), "`{order}`: {error}");
    }
}

/// A filter as a person would define it: by what it accepts, with every parenthesis written out.
#[derive(Debug, Clone)]
enum Plain {
    Text(&'static str, &'static str, String),
    State(bool, RunState),
    Created(&'static str, u64),
    Not(Box<Plain>),
    Both(Box<Plain>, Box<Plain>),
    Either(Box<Plain>, Box<Plain>),
}

impl Plain {
    fn accepts(&self, run: &RunFields<'_>) -> bool {
        match self {
            Self::Text(field, operator, value) => {
                let text = match *field {
                    "id" => run.id,
                    "model" => run.model,
                    _ => run.display_name,
                };
                if *operator == ":" {
                    text.contains(value.as_str())
                } else {
                    plain(operator, text, value.as_str())
                }
            }
            Self::State(is, state) => (run.state as i32 == *state as i32) == *is,
            Self::Created(operator, seconds) => {
                let created = run.create_time.duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
                plain(operator, created, *seconds)
            }
            Self::Not(inner) => !inner.accepts(run),
            Self::Both(one, other) => one.accepts(run) & other.accepts(run),
            Self::Either(one, other) => one.accepts(run) | other.accepts(run),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Text(field, operator, value) => {
                format!("{field} {operator} \"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
            }
            Self::State(is, state) => {
                format!("state {} {}", if *is { "=" } else { "!=" }, state.as_str_name())
            }
            Self::Created(operator, seconds) => {
                let time = super::OffsetDateTime::from(at(*seconds));
                format!(
                    "create_time{operator}{}",
                    time.format(&super::Rfc3339).expect("a year of four digits")
                )
            }
            Self::Not(inner) => format!("NOT ({})", inner.text()),
            Self::Both(one, other) => format!("(({}) AND ({}))", one.text(), other.text()),
            Self::Either(one, other) => format!("(({}) OR ({}))", one.text(), other.text()),
        }
    }
}

fn plain<T: PartialOrd>(operator: &str, one: T, other: T) -> bool {
    match operator {
        "=" => one == other,
        "!=" => one != other,
        "<" => one < other,
        "<=" => one <= other,
        ">" => one > other,
        _ => one >= other,
    }
}

fn states() -> impl Strategy<Value = RunState> {
    (1..=11).prop_map(|number| RunState::try_from(number).expect("a state of the schema"))
}

fn plain_filters() -> impl Strategy<Value = Plain> {
    let fields = prop::sample::select(vec!["id", "model", "display_name"]);
    let relations = || prop::sample::select(vec!["=", "!=", "<", "<=", ">", ">="]);
    let text_operators = prop::sample::select(vec!["=", "!=", "<", "<=", ">", ">=", ":"]);
    let leaf = prop_oneof![
        (fields, text_operators, "[a-c\"\\\\ *]{0,3}")
            .prop_map(|(field, operator, value)| Plain::Text(field, operator, value)),
        (any::<bool>(), states()).prop_map(|(is, state)| Plain::State(is, state)),
        (relations(), 0..4_u64).prop_map(|(operator, seconds)| Plain::Created(operator, seconds)),
    ];
    leaf.prop_recursive(5, 24, 2, |inner| {
        let pair = (inner.clone(), inner.clone());
        prop_oneof![
            inner.prop_map(|one| Plain::Not(Box::new(one))),
            pair.clone().prop_map(|(one, other)| Plain::Both(Box::new(one), Box::new(other))),
            pair.prop_map(|(one, other)| Plain::Either(Box::new(one), Box::new(other))),
        ]
    })
}

proptest! {
    #[test]
    fn a_filter_accepts_what_a_plain_evaluation_accepts(
        filter in plain_filters(),
        texts in prop::array::uniform3("[a-c\"\\\\ *]{0,3}"),
        state in states(),
        created in 0..4_u64,
    ) {
        let [id, display_name, model] = &texts;
        let run = RunFields { id, state, display_name, model, create_time: at(created), end_time: None };
        let read = Filter::parse(&filter.text()).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(read.matches(&run), filter.accepts(&run), "{}", filter.text());
    }

    #[test]
    fn a_printed_filter_reads_as_the_same_filter(filter in plain_filters()) {
        let read = Filter::parse(&filter.text()).map_err(|error| TestCaseError::fail(error.to_string()))?;
        let printed = read.to_string();
        prop_assert_eq!(Filter::parse(&printed), Ok(read), "{}", printed);
    }

    #[test]
    fn no_text_makes_the_readers_panic(
        text in prop_oneof![
            any::<String>(),
            "((id|state|create_time|desc|NOT|AND|OR|-|\\(|\\)|=|!=|<|:|\"|'|\\\\|\\*|RUNNING|ä|,)[ ]?){0,12}",
        ],
    ) {
        if let Ok(filter) = Filter::parse(&text) {
            let _ = filter.matches(&run());
            prop_assert_eq!(Filter::parse(&filter.to_string()), Ok(filter));
        }
        if let Ok(order) = Order::parse(&text) {
            prop_assert_eq!(order.compare(&run(), &run()), Ordering::Equal);
        }
    }
}
