use super::*;
use proptest::prelude::*;
use std::time::Duration;

fn run(id: &'static str, state: RunState, display_name: &'static str, created: u64) -> RunFields<'static> {
    RunFields {
        id,
        state,
        display_name,
        model: "/models/llama-7b",
        create_time: SystemTime::UNIX_EPOCH + Duration::from_secs(created),
        end_time: state.has_ended().then(|| SystemTime::UNIX_EPOCH + Duration::from_secs(created + 60)),
        number: created,
    }
}

fn runs() -> [RunFields<'static>; 4] {
    [
        run("run-a", RunState::Running, "half of 7B", 100),
        run("run-b", RunState::Succeeded, "fifth", 200),
        run("run-c", RunState::Failed, "Half again", 300),
        run("run-d", RunState::Queued, "", 400),
    ]
}

#[test]
fn a_filter_picks_what_it_says() {
    for (filter, expected) in [
        ("", "abcd"),
        ("state = RUNNING", "a"),
        ("state = RUN_STATE_FAILED", "c"),
        ("state != RUNNING", "bcd"),
        ("-state = RUNNING", "bcd"),
        ("NOT (state = RUNNING OR state = FAILED)", "bd"),
        ("display_name : half", "ac"),
        ("display_name = \"half of 7B\"", "a"),
        ("display_name = ''", "d"),
        ("model:llama AND id >= \"run-b\" AND id < \"run-d\"", "bc"),
        // OR binds tighter than AND.
        ("state = RUNNING OR state = FAILED AND display_name : again", "c"),
        ("state = RUNNING OR (state = FAILED AND display_name : again)", "ac"),
        ("state = FAILED display_name : half", "c"),
        ("create_time > \"1970-01-01T00:03:20Z\"", "cd"),
        ("create_time <= \"1970-01-01T00:01:40Z\"", "a"),
        ("end_time >= \"1970-01-01T00:00:00Z\"", "bc"),
    ] {
        let parsed = Filter::parse(filter).unwrap_or_else(|error| panic!("{filter}: {error}"));
        let picked: String =
            runs().iter().filter(|run| parsed.matches(run)).map(|run| &run.id[4..]).collect();
        assert_eq!(picked, expected, "{filter}");
    }
}

#[test]
fn a_filter_that_cannot_be_read_names_the_place() {
    for (filter, expected) in [
        ("colour = red", "at byte 0: expected a field"),
        ("state", "at byte 5: expected =, !=, <"),
        ("state = SLEEPING", "at byte 8: expected the name of a state"),
        ("state < RUNNING", "at byte 6: expected = or !="),
        ("state = ", "at byte 8: expected a value"),
        ("create_time > yesterday", "at byte 14: expected a time"),
        ("(state = RUNNING", "at byte 16: expected `)`"),
        ("state = RUNNING)", "at byte 15: expected AND, OR or the end"),
        ("display_name = \"half", "at byte 15: the quotes are not closed"),
        ("state ! RUNNING", "at byte 6: `!` must be `!=`"),
        ("state = RUNNING AND", "at byte 19: expected a field"),
        ("state = ; drop", "at byte 8: `;` is not expected"),
    ] {
        let error = Filter::parse(filter).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{filter}: {error}");
    }
    assert!(Filter::parse(&"(".repeat(500)).is_err());
    assert!(Filter::parse(&"x".repeat(5000)).is_err());
}

#[test]
fn runs_are_ordered_by_each_field_in_turn_and_else_newest_first() {
    for (order, expected) in [
        ("", "dcba"),
        ("create_time", "abcd"),
        ("create_time desc", "dcba"),
        ("display_name", "dcba"),
        ("state, create_time", "cdab"),
        ("end_time desc", "cbda"),
    ] {
        let parsed = Order::parse(order).unwrap();
        let mut sorted = runs();
        sorted.sort_by(|one, other| parsed.compare(one, other));
        let ids: String = sorted.iter().map(|run| &run.id[4..]).collect();
        assert_eq!(ids, expected, "{order}");
    }
    for bad in ["colour", "state up", "state,", "state desc desc", ","] {
        assert!(Order::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn every_state_has_one_name() {
    for (state, name) in STATES {
        assert_eq!(state_name(state), name);
        assert_eq!(state_of(name), Some(state));
    }
}

fn any_filter() -> impl Strategy<Value = Filter> {
    let operator = || {
        prop_oneof![
            Just(Operator::Equal),
            Just(Operator::NotEqual),
            Just(Operator::Less),
            Just(Operator::GreaterEqual),
            Just(Operator::Has)
        ]
    };
    let field = prop_oneof![Just(TextField::Id), Just(TextField::DisplayName), Just(TextField::Model)];
    let text = (field, operator(), "[ -~é]{0,8}").prop_map(|(field, operator, value)| Comparison::Text {
        field,
        operator,
        value,
    });
    let state = (prop_oneof![Just(Operator::Equal), Just(Operator::NotEqual)], 0..STATES.len())
        .prop_map(|(operator, place)| Comparison::State { operator, value: STATES[place].0 });
    let time = (operator(), 0u64..4_000_000_000).prop_map(|(operator, seconds)| Comparison::Time {
        field: TimeField::Create,
        operator,
        value: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
    });
    let leaf = prop_oneof![text, state, time].prop_map(Filter::Compare);
    leaf.prop_recursive(4, 16, 3, |inner| {
        let some = || proptest::collection::vec(inner.clone(), 2..4);
        prop_oneof![
            some().prop_map(Filter::And),
            some().prop_map(Filter::Or),
            inner.clone().prop_map(|filter| Filter::Not(Box::new(filter)))
        ]
    })
}

proptest! {
    #[test]
    fn a_printed_filter_reads_as_the_same(filter in any_filter()) {
        prop_assert_eq!(Filter::parse(&filter.to_string()), Ok(filter));
    }

    #[test]
    fn no_text_makes_it_panic(text in "[ -~é\\n]{0,60}", order in "[a-z_, ]{0,30}") {
        let _ = Filter::parse(&text).map(|filter| runs().map(|run| filter.matches(&run)));
        let _ = Order::parse(&order);
    }
}
