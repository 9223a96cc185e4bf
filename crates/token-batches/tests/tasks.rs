//! Files of multiple-choice questions, good and bad.

use std::error::Error as _;
use std::fs;
use std::path::{Path, PathBuf};

use token_batches::{TaskLimits, TaskSet, TextTokenizer};

const POSITIONS: usize = 512;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn tokenizer() -> TextTokenizer {
    TextTokenizer::load(&fixtures().join("models/stories260k/tokenizer.json"), 512).unwrap()
}

fn ids(text: &str) -> Vec<u32> {
    tokenizer().encode(text, Path::new("test"), token_batches::Place::WholeFile).unwrap()
}

/// What is read from a file of these lines, or the error with its causes.
fn load(lines: &[u8], limits: TaskLimits) -> Result<TaskSet, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("task.jsonl");
    fs::write(&path, lines).unwrap();
    TaskSet::load(&path, "task".into(), &tokenizer(), limits).map_err(|error| {
        let cause = error.source().map_or(String::new(), |cause| format!(": {cause}"));
        format!("{error}{cause}").replace(&format!("{}/", folder.path().display()), "")
    })
}

const ALL: TaskLimits = TaskLimits { max_rows: None, positions: POSITIONS };

#[test]
fn choices_are_judged_behind_their_query_and_contexts_by_what_follows() {
    let set = load(
        b"{\"query\": \"Once upon a time \", \"choices\": [\"there was\", \"caf\xc3\xa9\"], \"gold\": 1}\n\n\
          {\"context_options\": [\"The dog\", \"The big cat\"], \"continuation\": \"ran.\", \"gold\": 0}\n",
        ALL,
    )
    .unwrap();
    let [first, second] = set.questions() else { panic!("two rows") };
    assert_eq!((first.gold, second.gold), (1, 0));
    // The space at the end of the query belongs to what follows, in front of the one that joins.
    let context = ids("Once upon a time");
    for (choice, text) in first.choices.iter().zip(["there was", "café"]) {
        assert_eq!(choice.context, context);
        assert_eq!(
            [choice.context.clone(), choice.continuation.clone()].concat(),
            ids(&format!("Once upon a time  {text}"))
        );
        assert_eq!(choice.characters, Some(text.chars().count()), "characters, not bytes");
    }
    for (choice, context) in second.choices.iter().zip(["The dog", "The big cat"]) {
        assert_eq!(choice.context, ids(context));
        assert_eq!(
            [choice.context.clone(), choice.continuation.clone()].concat(),
            ids(&format!("{context} ran."))
        );
        assert_eq!(choice.characters, None);
    }
}

#[test]
fn what_is_too_long_loses_the_beginning_of_its_context() {
    let row = b"{\"query\": \"Lily saw a big dog in the park and the dog\", \"choices\": [\"ran\", \"was very very happy\"], \"gold\": 0}";
    let whole = load(row, ALL).unwrap();
    let cut = load(row, TaskLimits { positions: 12, ..ALL }).unwrap();
    for (whole, cut) in whole.choices().zip(cut.choices()) {
        assert_eq!(whole.continuation, cut.continuation);
        // The last token is only predicted.
        assert_eq!(cut.context.len() + cut.continuation.len(), 13);
        assert!(whole.context.ends_with(&cut.context) && cut.context.len() < whole.context.len());
    }
    let error = load(row, TaskLimits { positions: 2, ..ALL }).unwrap_err();
    assert!(error.contains("line 1") && error.contains("longer than the model's 2 positions"), "{error}");
}

#[test]
fn only_the_first_rows_are_read_when_there_is_a_limit() {
    let row = "{\"query\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 0}\n";
    let text = format!("{row}{row}this is never looked at");
    assert!(load(text.as_bytes(), ALL).is_err());
    let set = load(text.as_bytes(), TaskLimits { max_rows: Some(2), ..ALL }).unwrap();
    assert_eq!((set.questions().len(), set.choices().count()), (2, 4));
}

#[test]
fn every_wrong_row_gets_an_error_that_names_file_and_line() {
    let good = "{\"query\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 0}\n";
    for (row, expected) in [
        (
            "{\"query\": \"a\", \"choices\": [\"b\", \"c\"]}",
            "`task.jsonl` line 2 has no field `gold`, its fields are: choices, query",
        ),
        ("{\"choices\": [\"b\", \"c\"], \"gold\": 0}", "line 2 has no field `query`"),
        ("{\"query\": \"a\", \"gold\": 0}", "line 2 has no field `choices`"),
        ("{\"context_options\": [\"a\", \"b\"], \"gold\": 0}", "line 2 has no field `continuation`"),
        ("{\"text\": \"a\"}", "line 2 has no field `query`, its fields are: text"),
        (
            "{\"query\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 2}",
            "`task.jsonl` line 2 is no row of a task: field `gold` is 2, an index in 0..2 is needed",
        ),
        ("{\"query\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": -1}", "field `gold` is -1"),
        ("{\"query\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 0.5}", "field `gold` is 0.5"),
        (
            "{\"query\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": \"b\"}",
            "field `gold` holds a string, the index of the right choice is needed",
        ),
        (
            "{\"query\": \"a\", \"choices\": [], \"gold\": 0}",
            "field `choices` holds 0 of the at least 2 choices",
        ),
        (
            "{\"query\": \"a\", \"choices\": [\"b\"], \"gold\": 0}",
            "field `choices` holds 1 of the at least 2 choices",
        ),
        (
            "{\"query\": \"a\", \"choices\": \"b\", \"gold\": 0}",
            "field `choices` holds a string, an array of strings is needed",
        ),
        (
            "{\"query\": \"a\", \"choices\": [\"b\", 7], \"gold\": 0}",
            "field `choices[1]` holds a number, a string is needed",
        ),
        ("{\"query\": \"a\", \"choices\": [\"b\", \" \"], \"gold\": 0}", "`choices[1]` is empty"),
        ("{\"query\": \" \", \"choices\": [\"b\", \"c\"], \"gold\": 0}", "field `query` is empty"),
        (
            "{\"query\": 3, \"choices\": [\"b\", \"c\"], \"gold\": 0}",
            "field `query` holds a number, a string is needed",
        ),
        ("[1]", "`task.jsonl` line 2 holds an array, one JSON object a line is needed"),
        ("question", "`task.jsonl` line 2 is not JSON: expected value, column 1"),
    ] {
        let error = load(format!("{good}{row}\n").as_bytes(), ALL).unwrap_err();
        assert!(error.contains(expected), "{row} gives {error:?}, not {expected:?}");
    }
    assert_eq!(load(b"", ALL).unwrap_err(), "`task.jsonl` is empty");
    assert!(load(b"\n\n", ALL).unwrap_err().contains("`task.jsonl` holds no row"));
    assert!(load(b"{\"query\": \"\xff\"}", ALL).unwrap_err().contains("not UTF-8"));
    let missing = TaskSet::load(Path::new("/nowhere/t.jsonl"), "t".into(), &tokenizer(), ALL).unwrap_err();
    assert!(missing.to_string().contains("failed to open `/nowhere/t.jsonl`"), "{missing}");
}
