//! Every format and every joining, held against the tokens of the text that they stand for.

mod support;

use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use proptest::prelude::*;
use support::{BEGIN, END, Folder, VOCAB_SIZE, properties, write_text_table, write_token_table};
use token_batches::{
    BatchOrder, Corpus, EvaluationSet, Joining, RowJoining, TextFormat, TextSource, TrainingSet,
};

const DOCUMENTS: Joining = Joining::Documents { begin: None, end: Some(END) };

/// All tokens of a corpus, as far as windows of 2 hold them.
fn tokens(corpus: &Corpus) -> Vec<u32> {
    EvaluationSet::load(corpus, 2, None).unwrap().rows().concat()
}

/// The same of an expected sequence.
fn in_pairs(mut token_ids: Vec<u32>) -> Vec<u32> {
    token_ids.truncate(token_ids.len() / 2 * 2);
    token_ids
}

fn json_lines(rows: &[&str]) -> String {
    rows.iter().map(|row| serde_json::json!({"id": 1, "text": row}).to_string() + "\n").collect()
}

#[test]
fn a_plain_text_is_tokenised_at_once_as_it_stands() {
    let folder = Folder::new();
    let text = " \n = The Title = \n \n the other\r\n\tthe end’s 漢字 <s> \n";
    folder.write("a.txt", text);
    assert_eq!(tokens(&folder.corpus(&["a.txt"], Joining::Stream)), in_pairs(folder.ids(text)));
}

#[test]
fn a_stream_of_json_lines_has_a_blank_line_between_documents() {
    let folder = Folder::new();
    folder.write("a.jsonl", json_lines(&["one\nthe", "", "the two"]));
    let expected = in_pairs(folder.ids("one\nthe\n\n\n\nthe two"));
    assert_eq!(tokens(&folder.corpus(&["a.jsonl"], Joining::Stream)), expected);
}

#[test]
fn json_lines_may_have_a_byte_order_mark_blank_lines_and_no_last_newline() {
    let folder = Folder::new();
    folder.write("a.jsonl", "\u{feff}{\"text\": \"the\"}\r\n\n \n{\"x\": [], \"text\": \"a\\u00e9\"}");
    let expected = in_pairs(folder.ids("the\n\naé"));
    assert_eq!(tokens(&folder.corpus(&["a.jsonl"], Joining::Stream)), expected);
}

#[test]
fn the_rows_of_a_table_of_lines_are_joined_as_wikitext_writes_them() {
    let folder = Folder::new();
    let rows = ["", " = the = \n", "", " the first line \n", " the second \n"];
    let rows: Vec<Option<&[u8]>> = rows.iter().map(|row| Some(row.as_bytes())).collect();
    let expected = in_pairs(folder.ids(" \n = the = \n \n the first line \n the second \n"));
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        for dictionary in [true, false] {
            let properties = properties(compression).set_dictionary_enabled(dictionary);
            write_text_table(&folder.path("a.parquet"), &rows, properties);
            assert_eq!(tokens(&folder.corpus(&["a.parquet"], Joining::Stream)), expected, "{compression}");
        }
    }
}

#[test]
fn many_rows_over_many_pages_come_back_in_order() {
    let folder = Folder::new();
    let rows: Vec<String> = (0..3000).map(|row| format!("row {row} of the table\n")).collect();
    let cells: Vec<Option<&[u8]>> = rows.iter().map(|row| Some(row.as_bytes())).collect();
    let properties =
        properties(Compression::SNAPPY).set_data_page_row_count_limit(100).set_write_batch_size(50);
    write_text_table(&folder.path("a.parquet"), &cells, properties);
    let expected = in_pairs(folder.ids(&rows.concat()));
    assert_eq!(tokens(&folder.corpus(&["a.parquet"], Joining::Stream)), expected);
}

#[test]
fn another_text_between_rows_can_be_chosen() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", json_lines(&["the", "a\n"]));
    let source =
        TextSource::from_path(path).unwrap().with_row_joining(RowJoining::Separator(" | ".to_owned()));
    let corpus = folder.corpus_of(vec![source], Joining::Stream);
    assert_eq!(tokens(&corpus), in_pairs(folder.ids("the | a\n")));
}

#[test]
fn documents_are_tokenised_alone_between_their_tokens() {
    let folder = Folder::new();
    folder.write("a.jsonl", json_lines(&["a th", "", "e b"]));
    folder.write("b.txt", "the whole\n\nfile\n");
    let documents = ["a th", "e b", "the whole\n\nfile\n"].map(|text| folder.ids(text));
    for (begin, end) in [(None, None), (Some(BEGIN), None), (None, Some(END)), (Some(BEGIN), Some(END))] {
        let corpus = folder.corpus(&["a.jsonl", "b.txt"], Joining::Documents { begin, end });
        let expected = documents
            .iter()
            .flat_map(|document| begin.into_iter().chain(document.iter().copied()).chain(end));
        assert_eq!(tokens(&corpus), in_pairs(expected.collect()), "{begin:?} {end:?}");
    }
}

#[test]
fn each_story_is_a_row_cut_to_the_window_and_predicted_behind_its_first_token() {
    let folder = Folder::new();
    let text =
        "\n the first \n<|endoftext|>\nthe second, a longer one\n<|endoftext|>\n \n<|endoftext|>\nxy\n";
    folder.write("a.txt", text);
    let corpus = folder.corpus(&["a.txt"], Joining::Stories { begin: BEGIN });
    let set = EvaluationSet::load(&corpus, 8, None).unwrap();
    let expected: Vec<Vec<u32>> = ["the first", "the second, a longer one", "xy"]
        .iter()
        .map(|story| std::iter::once(BEGIN).chain(folder.ids(story)).take(8).collect())
        .collect();
    assert_eq!(set.rows(), expected);
    assert_eq!(set.predicted_count(), 7 + 7 + 2);
    // Reading ends behind the story that fills the limit, as the reference script does.
    let lengths = |limit| -> Vec<usize> {
        let set = EvaluationSet::load(&corpus, 8, Some(limit)).unwrap();
        set.rows().iter().map(|row| row.len()).collect()
    };
    assert_eq!((lengths(8), lengths(9), lengths(17)), (vec![8], vec![8, 8], vec![8, 8, 3]));
}

#[test]
fn stories_are_packed_for_training() {
    let folder = Folder::new();
    folder.write("a.txt", "the a\n<|endoftext|>\nb\n");
    let corpus = folder.corpus(&["a.txt"], Joining::Stories { begin: BEGIN });
    let expected = [vec![BEGIN], folder.ids("the a"), vec![BEGIN], folder.ids("b")].concat();
    let set = TrainingSet::load(&corpus, expected.len()).unwrap();
    assert_eq!(set.windows().iter().collect::<Vec<_>>(), [expected]);
}

#[test]
fn token_ids_are_taken_as_they_stand_from_every_format_and_need_no_tokenizer() {
    let folder = Folder::new();
    let documents = [vec![0, 258, 7], vec![], vec![5, 5, 5, 260, 1]];
    let flat: Vec<u32> = documents.concat();
    let lines = documents.iter().map(|ids| serde_json::json!({"input_ids": ids}).to_string() + "\n");
    folder.write("a.tokens.jsonl", lines.collect::<String>());
    folder.write("a.u16", flat.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect::<Vec<_>>());
    folder.write("a.u32", flat.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>());
    let rows: Vec<Vec<Option<i64>>> =
        documents.iter().map(|ids| ids.iter().map(|id| Some(i64::from(*id))).collect()).collect();
    write_token_table(&folder.path("narrow.tokens.parquet"), &rows, false);
    write_token_table(&folder.path("wide.tokens.parquet"), &rows, true);
    for name in ["a.tokens.jsonl", "a.u16", "a.u32", "narrow.tokens.parquet", "wide.tokens.parquet"] {
        for joining in [Joining::Stream, DOCUMENTS] {
            let mut corpus = folder.corpus(&[name], joining);
            corpus.tokenizer_json = folder.path("there is none");
            assert_eq!(tokens(&corpus), flat, "{name}");
        }
    }
    for name in ["a.tokens.jsonl", "wide.tokens.parquet"] {
        let corpus = folder.corpus(&[name], Joining::Stories { begin: BEGIN });
        let set = EvaluationSet::load(&corpus, 4, None).unwrap();
        assert_eq!(set.rows(), [&[0, 258, 7][..], &[5, 5, 5, 260]], "{name}");
    }
}

#[test]
fn long_files_of_token_ids_come_back_whole() {
    let folder = Folder::new();
    let ids: Vec<u32> = (0..600_000).map(|index| index * 7 % VOCAB_SIZE).collect();
    folder.write("a.u16", ids.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect::<Vec<_>>());
    let corpus = folder.corpus(&["a.u16"], Joining::Stream);
    assert_eq!(TrainingSet::load(&corpus, 1000).unwrap().windows().iter().collect::<Vec<_>>().concat(), ids);
}

#[test]
fn only_the_first_tokens_are_read_where_a_limit_is_set() {
    let folder = Folder::new();
    folder.write("a.u32", (0..250_u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
    folder.write("a.txt", "the quick brown fox jumps over the lazy dog");
    for (names, joining) in [(["a.u32", "a.txt"], Joining::Stream), (["a.txt", "a.u32"], DOCUMENTS)] {
        let corpus = folder.corpus(&names, joining);
        let whole = EvaluationSet::load(&corpus, 10, None).unwrap().rows().concat();
        for (limit, expected) in [(10, 10), (25, 20), (100, 100), (100_000, whole.len())] {
            let set = EvaluationSet::load(&corpus, 10, Some(limit)).unwrap();
            assert_eq!(set.rows().concat(), whole[..expected]);
            assert_eq!(set.predicted_count(), expected / 10 * 9);
        }
    }
}

#[test]
fn a_micro_batch_is_the_windows_that_the_order_names() {
    let folder = Folder::new();
    folder.write("a.u32", (0..260_u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
    let set = TrainingSet::load(&folder.corpus(&["a.u32"], Joining::Stream), 10).unwrap();
    let order = BatchOrder { seed: 9, micro_batches_per_step: 2, rows_per_micro_batch: 13 };
    let step: Vec<&[u32]> = (0..2).flat_map(|micro_batch| set.micro_batch(&order, 0, micro_batch)).collect();
    assert_eq!(step.len(), 26);
    let mut firsts: Vec<u32> = step.iter().map(|row| row[0]).collect();
    assert!(!firsts.is_sorted());
    firsts.sort_unstable();
    assert_eq!(firsts, (0..260).step_by(10).collect::<Vec<u32>>());
    for (index, row) in order.window_indices(1, 1, set.windows().count()).zip(set.micro_batch(&order, 1, 1)) {
        assert_eq!(set.windows().get(index), Some(row));
    }
}

#[test]
fn equal_tokens_have_equal_digests_and_any_difference_shows() {
    let folder = Folder::new();
    folder.write("a.txt", "some of the same");
    folder.write("b.jsonl", json_lines(&["some of the same"]));
    folder.write("c.txt", "some on the same");
    let digest = |name: &str, joining, window_tokens| {
        let corpus = folder.corpus(&[name], joining);
        TrainingSet::load(&corpus, window_tokens).unwrap().digest().to_owned()
    };
    let base = digest("a.txt", Joining::Stream, 3);
    assert_eq!(base.len(), 64);
    assert_eq!(base, digest("a.txt", Joining::Stream, 3));
    assert_eq!(base, digest("b.jsonl", Joining::Stream, 3));
    assert_ne!(base, digest("c.txt", Joining::Stream, 3));
    assert_ne!(base, digest("a.txt", Joining::Stream, 4));
    assert_ne!(base, digest("a.txt", Joining::Documents { begin: None, end: None }, 3));
    let corpus = folder.corpus(&["a.txt"], Joining::Stream);
    assert_ne!(base, EvaluationSet::load(&corpus, 3, None).unwrap().digest());
}

#[test]
fn truncation_and_padding_in_the_tokenizer_file_are_left_out() {
    let folder = Folder::new();
    folder.write("a.txt", "the cat and the hat");
    let expected = in_pairs(folder.ids("the cat and the hat"));
    let mut tokenizer: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path("tokenizer.json")).unwrap()).unwrap();
    tokenizer["truncation"] = serde_json::json!(
        {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = serde_json::json!({"strategy": {"Fixed": 99}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    folder.write("tokenizer.json", tokenizer.to_string());
    assert_eq!(tokens(&folder.corpus(&["a.txt"], Joining::Stream)), expected);
}

#[test]
fn a_corpus_survives_being_written_as_json() {
    let folder = Folder::new();
    let format = TextFormat::Parquet { column: "body".to_owned() };
    let source = TextSource::new("a.bin", format).with_row_joining(RowJoining::Lines);
    let corpus = folder.corpus_of(vec![source], Joining::Stories { begin: 1 });
    let text = serde_json::to_string(&corpus).unwrap();
    assert_eq!(serde_json::from_str::<Corpus>(&text).unwrap(), corpus);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn json_lines_and_tables_of_the_same_rows_give_the_same_tokens(
        rows in proptest::collection::vec("[a-z \n\u{e9}\u{6f22}]{0,12}", 1..40),
    ) {
        let folder = Folder::new();
        let rows: Vec<&str> = std::iter::once("the").chain(rows.iter().map(String::as_str)).collect();
        folder.write("a.jsonl", json_lines(&rows));
        let cells: Vec<Option<&[u8]>> = rows.iter().map(|row| Some(row.as_bytes())).collect();
        write_text_table(&folder.path("a.parquet"), &cells, properties(Compression::SNAPPY));
        for joining in [Joining::Stream, DOCUMENTS, Joining::Stories { begin: BEGIN }] {
            let lines = EvaluationSet::load(&folder.corpus(&["a.jsonl"], joining), 2, None).unwrap();
            let table = EvaluationSet::load(&folder.corpus(&["a.parquet"], joining), 2, None).unwrap();
            prop_assert_eq!(lines, table);
        }
    }
}
