//! Everything wrong that can be given: each a clear error, none a panic.

mod support;

use std::error::Error as _;
use std::fs;

use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use support::{BEGIN, Folder, VOCAB_SIZE, properties, write_text_table, write_token_table};
use token_batches::{Corpus, DataError, EvaluationSet, Joining, TextFormat, TextSource, TrainingSet};

/// The error of a corpus with its causes, the folder's name left out.
fn message(folder: &Folder, corpus: &Corpus) -> String {
    let error = TrainingSet::load(corpus, 4).unwrap_err();
    without_folder(folder, &error)
}

fn without_folder(folder: &Folder, error: &DataError) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    message.replace(&format!("{}/", folder.dir.path().display()), "")
}

#[test]
fn every_wrong_file_gets_an_error_that_names_file_and_place() {
    let folder = Folder::new();
    fs::create_dir(folder.path("folder.txt")).unwrap();
    let good = "{\"text\": \"a\"}\n";
    for (name, content, expected) in [
        ("empty.txt", &b""[..], "`empty.txt` is empty"),
        ("latin.txt", b"caf\xe9\n", "`latin.txt` is not UTF-8 text: bad byte at offset 3, line 1"),
        ("late.txt", b"ok\nok\n\xff", "`late.txt` is not UTF-8 text: bad byte at offset 6, line 3"),
        (
            "cut.txt",
            "é".as_bytes().split_last().unwrap().1,
            "`cut.txt` is not UTF-8 text: bad byte at offset 0, line 1",
        ),
        (
            "short.txt",
            b"a",
            "the data give 1 tokens, fewer than one window of 4: add text or choose a shorter window",
        ),
        (
            "broken.jsonl",
            format!("{good}{{\"text\": \"a\n").as_bytes(),
            "`broken.jsonl` line 2 is not JSON: control character (\\u0000-\\u001F) found while parsing a string, column 0",
        ),
        (
            "half.jsonl",
            format!("{good}\n{{\"text\": ").as_bytes(),
            "`half.jsonl` line 3 is not JSON: EOF while parsing a value, column 9",
        ),
        (
            "twice.jsonl",
            b"{\"text\": \"a\"} {}\n",
            "`twice.jsonl` line 1 is not JSON: trailing characters, column 15",
        ),
        (
            "surrogate.jsonl",
            br#"{"text": "\ud83d"}"#,
            "`surrogate.jsonl` line 1 is not JSON: unexpected end of hex escape, column 17",
        ),
        (
            "bytes.jsonl",
            b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n",
            "`bytes.jsonl` is not UTF-8 text: bad byte at offset 24, line 2",
        ),
        (
            "array.json",
            b"[{\"text\": \"a\"}]",
            "`array.json` line 1 holds an array, one JSON object a line is needed",
        ),
        ("number.jsonl", b"7\n", "`number.jsonl` line 1 holds a number, one JSON object a line is needed"),
        (
            "pretty.json",
            b"{\n  \"text\": \"a\"\n}\n",
            "`pretty.json` line 1 is not JSON: EOF while parsing an object, column 0",
        ),
        (
            "field.jsonl",
            b"{\"body\": \"a\", \"url\": 1}\n",
            "`field.jsonl` line 1 has no field `text`, its fields are: body, url",
        ),
        ("bare.jsonl", b"{}\n", "`bare.jsonl` line 1 has no field `text`, its fields are: none"),
        (
            "null.jsonl",
            b"{\"text\": null}\n",
            "`null.jsonl` line 1: field `text` holds null, a string is needed",
        ),
        (
            "list.jsonl",
            b"{\"text\": [\"a\"]}\n",
            "`list.jsonl` line 1: field `text` holds an array, a string is needed",
        ),
        ("blank.jsonl", b"\n \n\n", "`blank.jsonl` holds no text: every document in it is empty"),
        (
            "hollow.jsonl",
            b"{\"text\": \"\"}\n",
            "`hollow.jsonl` holds no text: every document in it is empty",
        ),
        (
            "a.tokens.jsonl",
            b"{\"input_ids\": \"1 2\"}\n",
            "`a.tokens.jsonl` line 1: field `input_ids` holds a string, an array of token ids is needed",
        ),
        (
            "b.tokens.jsonl",
            b"{\"input_ids\": [1]}\n{\"input_ids\": [1, 2.5]}\n",
            "`b.tokens.jsonl` line 2: field `input_ids` holds a number among its items that is no token id, an array of token ids is needed",
        ),
        (
            "c.tokens.jsonl",
            b"{\"input_ids\": [1, null]}\n",
            "`c.tokens.jsonl` line 1: field `input_ids` holds an item that is no number, an array of token ids is needed",
        ),
        (
            "d.tokens.jsonl",
            b"{\"input_ids\": [1, 261]}\n",
            "`d.tokens.jsonl`, line 1: token id 261 is outside the model's vocabulary of 261; were the ids made with another tokenizer?",
        ),
        (
            "e.tokens.jsonl",
            b"{\"input_ids\": [-1]}\n",
            "`e.tokens.jsonl`, line 1: token id -1 is outside the model's vocabulary of 261; were the ids made with another tokenizer?",
        ),
        (
            "f.tokens.jsonl",
            b"{\"input_ids\": [18446744073709551615]}\n",
            "`f.tokens.jsonl`, line 1: token id 18446744073709551615 is outside the model's vocabulary of 261; were the ids made with another tokenizer?",
        ),
        (
            "g.tokens.jsonl",
            b"{\"text\": \"a\"}\n",
            "`g.tokens.jsonl` line 1 has no field `input_ids`, its fields are: text",
        ),
        ("odd.u16", b"\x01\x00\x02", "`odd.u16` has 3 bytes, not a whole number of 2-byte token ids"),
        (
            "odd.u32",
            b"\x01\x00\x00\x00\x02\x00",
            "`odd.u32` has 6 bytes, not a whole number of 4-byte token ids",
        ),
        (
            "high.u16",
            b"\x01\x00\x05\x01",
            "`high.u16`, token index 1: token id 261 is outside the model's vocabulary of 261; were the ids made with another tokenizer?",
        ),
        (
            "high.u32",
            b"\xff\xff\xff\xff",
            "`high.u32`, token index 0: token id 4294967295 is outside the model's vocabulary of 261; were the ids made with another tokenizer?",
        ),
        (
            "text.parquet",
            b"this is no table at all",
            "`text.parquet` is not a sound Parquet file: Parquet error: Invalid Parquet file. Corrupt footer",
        ),
        (
            "tiny.parquet",
            b"PAR1",
            "`tiny.parquet` is not a sound Parquet file: EOF: Parquet file too small. Size is 4 but need 8",
        ),
    ] {
        folder.write(name, content);
        assert_eq!(message(&folder, &folder.corpus(&[name], Joining::Stream)), expected);
    }
    for (name, expected) in [
        ("missing.txt", "failed to open `missing.txt`: No such file or directory (os error 2)"),
        (
            "missing/missing.jsonl",
            "failed to open `missing/missing.jsonl`: No such file or directory (os error 2)",
        ),
        ("short.txt/below.txt", "failed to open `short.txt/below.txt`: Not a directory (os error 20)"),
        ("folder.txt", "`folder.txt` is a directory, a regular file is needed"),
    ] {
        assert_eq!(message(&folder, &folder.corpus(&[name], Joining::Stream)), expected);
    }
}

#[test]
fn a_wrong_table_names_its_columns_and_rows() {
    let folder = Folder::new();
    let table = |name: &str, rows: &[Option<&[u8]>]| {
        write_text_table(&folder.path(name), rows, properties(Compression::SNAPPY));
    };
    table("null.parquet", &[Some(b"a"), Some(b"b"), None]);
    table("bytes.parquet", &[Some(b"a"), Some(b"b\xff")]);
    table("empty.parquet", &[]);
    table("plain.parquet", &[Some(b"a")]);
    write_token_table(&folder.path("list.parquet"), &[vec![Some(1)]], false);
    write_token_table(&folder.path("item.tokens.parquet"), &[vec![Some(1)], vec![Some(2), None]], true);
    write_token_table(&folder.path("high.tokens.parquet"), &[vec![Some(1)], vec![Some(1 << 40)]], true);
    write_token_table(&folder.path("low.tokens.parquet"), &[vec![Some(-3)]], false);
    for (name, column, expected) in [
        ("null.parquet", "text", "`null.parquet`: column `text` is null at row index 2"),
        (
            "bytes.parquet",
            "text",
            "`bytes.parquet`: column `text` is not UTF-8 text at row index 1, byte 1 of the row",
        ),
        ("empty.parquet", "text", "`empty.parquet` holds no text: every document in it is empty"),
        ("plain.parquet", "body", "`plain.parquet` has no column `body`, its columns are: id, text"),
        (
            "plain.parquet",
            "id",
            "`plain.parquet`: column `id` holds values of type INT32, a string in each row is needed",
        ),
        (
            "list.parquet",
            "input_ids",
            "`list.parquet`: column `input_ids` holds a group, a string in each row is needed",
        ),
        (
            "list.parquet",
            "input_ids.list.element",
            "`list.parquet`: column `input_ids.list.element` holds lists of values of type INT32, a string in each row is needed",
        ),
        (
            "item.tokens.parquet",
            "input_ids",
            "`item.tokens.parquet`: column `input_ids` is null at row index 1",
        ),
        (
            "high.tokens.parquet",
            "input_ids",
            "`high.tokens.parquet`, row index 1: token id 1099511627776 is outside the model's vocabulary of 261; were the ids made with another tokenizer?",
        ),
        (
            "low.tokens.parquet",
            "input_ids",
            "`low.tokens.parquet`, row index 0: token id -3 is outside the model's vocabulary of 261; were the ids made with another tokenizer?",
        ),
        ("low.tokens.parquet", "ids", "`low.tokens.parquet` has no column `ids`, its columns are: input_ids"),
    ] {
        let source = TextSource::from_path(folder.path(name)).unwrap().with_field(column).unwrap();
        assert_eq!(message(&folder, &folder.corpus_of(vec![source], Joining::Stream)), expected);
    }
    let format = TextFormat::TokenParquet { column: "text".to_owned() };
    let source = TextSource::new(folder.path("plain.parquet"), format);
    assert_eq!(
        message(&folder, &folder.corpus_of(vec![source], Joining::Stream)),
        "`plain.parquet`: column `text` holds values of type BYTE_ARRAY, a list of integers in each row is needed",
    );
}

#[test]
fn wrong_options_are_refused_before_anything_long_begins() {
    let folder = Folder::new();
    folder.write("a.txt", "the text of this file");
    folder.write("a.u16", [1, 0, 2, 0]);
    let outside = |role| format!("the {role} token id 261 is outside the model's vocabulary of {VOCAB_SIZE}");
    for (names, joining, expected) in [
        (&[][..], Joining::Stream, "no data files are given: name at least one".to_owned()),
        (&["a.txt"], Joining::Documents { begin: Some(261), end: None }, outside("begin")),
        (&["a.txt"], Joining::Documents { begin: None, end: Some(261) }, outside("end")),
        (&["a.txt"], Joining::Stories { begin: 261 }, outside("begin")),
        (
            &["a.u16"],
            Joining::Stories { begin: BEGIN },
            "`a.u16` has no borders between documents, which joining by stories needs: join as a stream"
                .to_owned(),
        ),
        (
            &["a.txt", "b.txt"],
            Joining::Stream,
            "failed to open `b.txt`: No such file or directory (os error 2)".to_owned(),
        ),
    ] {
        assert_eq!(message(&folder, &folder.corpus(names, joining)), expected);
    }
    let corpus = folder.corpus(&["a.txt"], Joining::Stream);
    for window_tokens in [0, 1] {
        let error = EvaluationSet::load(&corpus, window_tokens, None).unwrap_err();
        assert!(matches!(error, DataError::WindowTooShort { .. }), "{error}");
    }
    let error = EvaluationSet::load(&corpus, 4, Some(3)).unwrap_err();
    assert!(matches!(error, DataError::TooFewTokens { token_count: 3, window_tokens: 4 }), "{error}");
    assert!(TextSource::from_path("a.bin").is_err());
}

#[test]
fn a_story_of_one_token_leaves_nothing_to_predict() {
    let folder = Folder::new();
    folder.write("a.tokens.jsonl", "{\"input_ids\": [1]}\n{\"input_ids\": [2]}\n");
    let corpus = folder.corpus(&["a.tokens.jsonl"], Joining::Stories { begin: BEGIN });
    let error = EvaluationSet::load(&corpus, 4, None).unwrap_err();
    assert!(matches!(error, DataError::NothingToPredict), "{error}");
}

#[test]
fn a_wrong_tokenizer_is_refused() {
    let folder = Folder::new();
    folder.write("a.txt", "the text <s> of this file");
    let whole = fs::read(folder.path("tokenizer.json")).unwrap();
    let corpus = folder.corpus(&["a.txt"], Joining::Stream);
    for (content, expected) in [
        (&b""[..], "failed to load the tokenizer `tokenizer.json`: EOF while parsing"),
        (b"{}", "failed to load the tokenizer `tokenizer.json`: "),
        (b"\xff\xfe", "failed to load the tokenizer `tokenizer.json`: "),
        (&whole[..whole.len() / 2], "failed to load the tokenizer `tokenizer.json`: EOF while parsing"),
    ] {
        folder.write("tokenizer.json", content);
        let message = message(&folder, &corpus);
        assert!(message.starts_with(expected), "{message}");
    }
    fs::remove_file(folder.path("tokenizer.json")).unwrap();
    assert!(message(&folder, &corpus).contains("No such file or directory"));
    fs::create_dir(folder.path("tokenizer.json")).unwrap();
    assert!(message(&folder, &corpus).ends_with("it is not a regular file"));
    fs::remove_dir(folder.path("tokenizer.json")).unwrap();
    folder.write("tokenizer.json", whole);
    let small = Corpus { vocab_size: BEGIN, ..corpus };
    assert_eq!(
        message(&folder, &small),
        "the tokenizer `tokenizer.json` gives token id 259, the model's vocabulary has 259: they do not belong together",
    );
}

/// Tables of text and of token ids in all compressions, small enough to break in every byte,
/// beside a tokenizer that loads fast.
fn small_tables(folder: &Folder) -> Vec<(String, Vec<u8>)> {
    folder.write(
        "tokenizer.json",
        r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "decoder": null, "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}"#,
    );
    let rows: Vec<Option<&[u8]>> = vec![Some(b" = the title = \n"), Some(b""), Some(b" the rest \n")];
    let mut tables = Vec::new();
    for (name, compression) in [
        ("none.parquet", Compression::UNCOMPRESSED),
        ("snappy.parquet", Compression::SNAPPY),
        ("gzip.parquet", Compression::GZIP(GzipLevel::default())),
        ("zstd.parquet", Compression::ZSTD(ZstdLevel::default())),
    ] {
        write_text_table(&folder.path(name), &rows, properties(compression));
        tables.push(name.to_owned());
    }
    let ids = vec![vec![Some(1), Some(2)], vec![], vec![Some(3), Some(200), Some(3)]];
    write_token_table(&folder.path("a.tokens.parquet"), &ids, false);
    write_token_table(&folder.path("b.tokens.parquet"), &ids, true);
    tables.extend(["a.tokens.parquet", "b.tokens.parquet"].map(str::to_owned));
    let read = |name: String| {
        let bytes = fs::read(folder.path(&name)).unwrap();
        (name, bytes)
    };
    tables.into_iter().map(read).collect()
}

#[test]
fn a_table_cut_at_any_byte_is_an_error() {
    let folder = Folder::new();
    for (name, bytes) in small_tables(&folder) {
        let corpus = folder.corpus(&[&name], Joining::Stream);
        assert!(TrainingSet::load(&corpus, 2).is_ok(), "{name}");
        for length in 1..bytes.len() {
            folder.write(&name, &bytes[..length]);
            let error = TrainingSet::load(&corpus, 2).unwrap_err();
            assert!(matches!(error, DataError::CorruptParquet { .. }), "{name} at {length}: {error}");
        }
    }
}

#[test]
fn a_table_with_any_byte_changed_never_panics() {
    let folder = Folder::new();
    let mut error_count = 0;
    for (name, bytes) in small_tables(&folder) {
        let corpus = folder.corpus(&[&name], Joining::Stream);
        for index in 0..bytes.len() {
            for change in [0x01, 0xff] {
                let mut changed = bytes.clone();
                changed[index] ^= change;
                folder.write(&name, &changed);
                // A changed letter is still sound text: what matters is that this returns.
                error_count += usize::from(TrainingSet::load(&corpus, 2).is_err());
            }
        }
    }
    assert!(error_count > 1000, "{error_count}");
}
