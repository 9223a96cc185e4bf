//! Small files for the tests: a tokenizer, tables, and a folder that goes away.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, DataType, Int32Type, Int64Type};
use parquet::file::properties::{WriterProperties, WriterPropertiesBuilder};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tempfile::TempDir;
use token_batches::{Corpus, Joining, Place, TextSource, TextTokenizer};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// Ids of the test tokenizer: 256 bytes, 3 merges, 2 special tokens.
pub(crate) const VOCAB_SIZE: u32 = 261;
pub(crate) const BEGIN: u32 = 259;
pub(crate) const END: u32 = 260;

pub(crate) struct Folder {
    pub(crate) dir: TempDir,
}

impl Folder {
    /// A folder with a byte-level BPE `tokenizer.json` in it.
    pub(crate) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let pieces = alphabet.into_iter().map(String::from);
        let pieces = pieces.chain(["th", "the", "Ġthe"].map(String::from));
        let vocab: Vocab = pieces.zip(0..).collect();
        let merge = |left: &str, right: &str| (left.to_owned(), right.to_owned());
        let merges = vec![merge("t", "h"), merge("th", "e"), merge("Ġ", "the")];
        let model = BPE::builder().vocab_and_merges(vocab, merges).build().unwrap();
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.add_special_tokens(["<s>", "</s>"].map(|text| AddedToken::from(text, true))).unwrap();
        tokenizer.save(dir.path().join("tokenizer.json"), false).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    /// A corpus over files whose format is known from their names.
    pub(crate) fn corpus(&self, names: &[&str], joining: Joining) -> Corpus {
        let sources = names.iter().map(|name| TextSource::from_path(self.path(name)).unwrap());
        self.corpus_of(sources.collect(), joining)
    }

    pub(crate) fn corpus_of(&self, sources: Vec<TextSource>, joining: Joining) -> Corpus {
        let tokenizer_json = self.path("tokenizer.json");
        Corpus { sources, tokenizer_json, vocab_size: VOCAB_SIZE, joining }
    }

    /// Ids of a text that is tokenised at once.
    pub(crate) fn ids(&self, text: &str) -> Vec<u32> {
        let tokenizer = TextTokenizer::load(&self.path("tokenizer.json"), VOCAB_SIZE).unwrap();
        tokenizer.encode(text, Path::new("the test"), Place::WholeFile).unwrap()
    }
}

pub(crate) fn properties(compression: Compression) -> WriterPropertiesBuilder {
    WriterProperties::builder().set_compression(compression)
}

/// A table with the columns `id` (INT32) and `text` (nullable string), two row groups.
pub(crate) fn write_text_table(path: &Path, rows: &[Option<&[u8]>], properties: WriterPropertiesBuilder) {
    let schema = "message rows { required int32 id; optional binary text (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties.build())).unwrap();
    for rows in rows.chunks(rows.len().div_ceil(2).max(1)) {
        let mut group = writer.next_row_group().unwrap();
        let ids: Vec<i32> = (0..).take(rows.len()).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let texts: Vec<ByteArray> =
            rows.iter().flatten().map(|text| ByteArray::from(text.to_vec())).collect();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

/// A table with the column `input_ids`, a list of integers in each row; `None` is a null item.
pub(crate) fn write_token_table(path: &Path, rows: &[Vec<Option<i64>>], wide: bool) {
    let item = if wide { "int64" } else { "int32" };
    let schema = format!(
        "message rows {{ optional group input_ids (LIST) {{ repeated group list {{ optional {item} element; }} }} }}"
    );
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let (mut def_levels, mut rep_levels, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        if row.is_empty() {
            def_levels.push(1);
            rep_levels.push(0);
        }
        for (index, item) in row.iter().enumerate() {
            def_levels.push(if item.is_some() { 3 } else { 2 });
            rep_levels.push(i16::from(index > 0));
            values.extend(item);
        }
    }
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    if wide {
        write_leaf::<Int64Type>(&mut column, &values, &def_levels, &rep_levels);
    } else {
        let values: Vec<i32> = values.iter().map(|id| i32::try_from(*id).unwrap()).collect();
        write_leaf::<Int32Type>(&mut column, &values, &def_levels, &rep_levels);
    }
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

fn write_leaf<T: DataType>(
    column: &mut parquet::file::writer::SerializedColumnWriter<'_>,
    values: &[T::T],
    def_levels: &[i16],
    rep_levels: &[i16],
) {
    column.typed::<T>().write_batch(values, Some(def_levels), Some(rep_levels)).unwrap();
}
