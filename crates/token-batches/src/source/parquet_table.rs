//! A column of a Parquet table, as text or as lists of token ids.
//!
//! The decoder was written for files that its own kind wrote: every call into it is guarded
//! against panics, and [`page_check`] refuses pages that would make it take memory without bound.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::basic::{Repetition, Type as PhysicalType};
use parquet::column::page::PageReader;
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{ByteArray, ByteArrayType, DataType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescPtr;

use self::page_check::CheckedPages;
use super::{Record, RecordSink, token_in_vocabulary};
use crate::error::{DataError, Place};
use crate::guard::guard;

mod page_check;

/// Rows decoded at a time.
const BATCH_ROWS: usize = 256;
/// Columns named in the complaint that one is missing.
const COLUMNS_SHOWN: usize = 20;

pub(super) fn read_texts(
    path: &Path,
    file: File,
    column: &str,
    sink: &mut RecordSink<'_>,
) -> Result<(), DataError> {
    let table = Table::open(path, file, column)?;
    let expected = "a string in each row";
    let Some(leaf) = table.leaf(|leaf| leaf.path().string() == column)? else {
        return Err(table.wrong_type(expected, "a group".to_owned()));
    };
    if leaf.physical_type() != PhysicalType::BYTE_ARRAY || leaf.max_rep_level() != 0 {
        return Err(table.wrong_type(expected, describe(&leaf)));
    }
    let present_level = leaf.max_def_level();
    table.for_each_batch::<ByteArrayType>(&leaf, &mut |batch, first_row| {
        let mut values = batch.values.iter();
        for row in 0..batch.row_count {
            let row_index = first_row + row as u64;
            // A column that cannot be null stores no levels.
            if batch.def_levels.get(row).is_some_and(|level| *level != present_level) {
                return Err(DataError::NullRow {
                    path: path.to_owned(),
                    column: column.to_owned(),
                    row_index,
                });
            }
            let value = values.next().ok_or_else(|| table.corrupt("a page misses values"))?;
            let text = table.text(value, row_index)?;
            if sink(Record::Text(text), Place::RowIndex(row_index))?.is_break() {
                return Ok(Progress::Stop);
            }
        }
        Ok(Progress::Go)
    })
}

pub(super) fn read_tokens(
    path: &Path,
    file: File,
    column: &str,
    vocab_size: u32,
    sink: &mut RecordSink<'_>,
) -> Result<(), DataError> {
    let table = Table::open(path, file, column)?;
    let expected = "a list of integers in each row";
    let Some(leaf) = table.leaf(|leaf| leaf.path().parts().first().is_some_and(|name| name == column))?
    else {
        return Err(table.wrong_type(expected, "a group of several columns".to_owned()));
    };
    if leaf.max_rep_level() != 1 {
        return Err(table.wrong_type(expected, describe(&leaf)));
    }
    let (table, leaf) = (&table, &leaf);
    match leaf.physical_type() {
        PhysicalType::INT32 => table.read_lists::<Int32Type>(leaf, vocab_size, |id| i128::from(*id), sink),
        PhysicalType::INT64 => table.read_lists::<Int64Type>(leaf, vocab_size, |id| i128::from(*id), sink),
        PhysicalType::BOOLEAN
        | PhysicalType::INT96
        | PhysicalType::FLOAT
        | PhysicalType::DOUBLE
        | PhysicalType::BYTE_ARRAY
        | PhysicalType::FIXED_LEN_BYTE_ARRAY => Err(table.wrong_type(expected, describe(leaf))),
    }
}

enum Progress {
    Go,
    Stop,
}

/// Rows decoded together: the values that are there, and the levels that say where.
struct Batch<T> {
    row_count: usize,
    values: Vec<T>,
    def_levels: Vec<i16>,
    rep_levels: Vec<i16>,
}

type BatchSink<'a, T> = dyn FnMut(&Batch<T>, u64) -> Result<Progress, DataError> + 'a;

struct Table<'a> {
    path: &'a Path,
    column: &'a str,
    reader: SerializedFileReader<File>,
}

impl<'a> Table<'a> {
    fn open(path: &'a Path, file: File, column: &'a str) -> Result<Self, DataError> {
        let reader = guarded(path, || SerializedFileReader::new(file))?;
        Ok(Self { path, column, reader })
    }

    /// The one leaf column that `wanted` picks; `None` when it picks several or a group of that
    /// name exists instead.
    fn leaf(&self, wanted: impl Fn(&ColumnDescPtr) -> bool) -> Result<Option<ColumnDescPtr>, DataError> {
        let schema = self.reader.metadata().file_metadata().schema_descr();
        let mut found = schema.columns().iter().filter(|leaf| wanted(leaf));
        if let Some(first) = found.next() {
            return Ok(found.next().is_none().then(|| first.clone()));
        }
        let fields = schema.root_schema().get_fields();
        if fields.iter().any(|field| field.name() == self.column) {
            return Ok(None);
        }
        let mut names: Vec<&str> = fields.iter().take(COLUMNS_SHOWN).map(|field| field.name()).collect();
        if fields.len() > COLUMNS_SHOWN {
            names.push("…");
        }
        Err(DataError::MissingColumn {
            path: self.path.to_owned(),
            column: self.column.to_owned(),
            present: names.join(", "),
        })
    }

    /// Hands the column to `each` batch by batch, with the index of the batch's first row.
    fn for_each_batch<T: DataType>(
        &self,
        leaf: &ColumnDescPtr,
        each: &mut BatchSink<'_, T::T>,
    ) -> Result<(), DataError> {
        let metadata = self.reader.metadata();
        let leaves = metadata.file_metadata().schema_descr().columns();
        let leaf_index = leaves.iter().position(|other| other.path() == leaf.path()).unwrap_or(0);
        let mut first_row = 0;
        for group_index in 0..metadata.num_row_groups() {
            let group_end = first_row
                + u64::try_from(metadata.row_group(group_index).num_rows())
                    .map_err(|_| self.corrupt("a row group has a negative length"))?;
            let mut column: ColumnReaderImpl<T> = guarded(self.path, || {
                let group = self.reader.get_row_group(group_index)?;
                let chunk = group.metadata().column(leaf_index);
                let start = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
                if start < 0 || chunk.compressed_size() < 0 {
                    return Err(ParquetError::General("a column begins before the file".to_owned()));
                }
                let pages: Box<dyn PageReader> = group.get_column_page_reader(leaf_index)?;
                Ok(ColumnReaderImpl::new(leaf.clone(), Box::new(CheckedPages::new(pages, leaf))))
            })?;
            loop {
                let mut batch = Batch {
                    row_count: 0,
                    values: Vec::new(),
                    def_levels: Vec::new(),
                    rep_levels: Vec::new(),
                };
                (batch.row_count, _, _) = guarded(self.path, || {
                    column.read_records(
                        BATCH_ROWS,
                        Some(&mut batch.def_levels),
                        Some(&mut batch.rep_levels),
                        &mut batch.values,
                    )
                })?;
                if batch.row_count == 0 {
                    break;
                }
                if group_end - first_row < batch.row_count as u64 {
                    return Err(self.corrupt("a column is longer than its row group"));
                }
                if matches!(each(&batch, first_row)?, Progress::Stop) {
                    return Ok(());
                }
                first_row += batch.row_count as u64;
            }
            if first_row != group_end {
                return Err(self.corrupt("a column is shorter than its row group"));
            }
        }
        Ok(())
    }

    fn read_lists<T: DataType>(
        &self,
        leaf: &ColumnDescPtr,
        vocab_size: u32,
        number: impl Fn(&T::T) -> i128,
        sink: &mut RecordSink<'_>,
    ) -> Result<(), DataError> {
        let item_level = leaf.max_def_level();
        let item_may_be_null = leaf.self_type().get_basic_info().repetition() == Repetition::OPTIONAL;
        self.for_each_batch::<T>(leaf, &mut |batch, first_row| {
            let (mut values, mut level_index) = (batch.values.iter(), 0);
            for row in 0..batch.row_count {
                let row_index = first_row + row as u64;
                let place = Place::RowIndex(row_index);
                let mut token_ids = Vec::new();
                let mut first_of_row = true;
                while let Some(rep_level) = batch.rep_levels.get(level_index) {
                    if *rep_level == 0 && !first_of_row {
                        break;
                    }
                    first_of_row = false;
                    let def_level = batch.def_levels.get(level_index).copied().unwrap_or(item_level);
                    level_index += 1;
                    if def_level == item_level {
                        let value = values.next().ok_or_else(|| self.corrupt("a page misses values"))?;
                        token_ids.push(token_in_vocabulary(self.path, place, number(value), vocab_size)?);
                    } else if item_may_be_null && def_level == item_level - 1 {
                        return Err(DataError::NullRow {
                            path: self.path.to_owned(),
                            column: self.column.to_owned(),
                            row_index,
                        });
                    }
                }
                if sink(Record::Tokens(token_ids), place)?.is_break() {
                    return Ok(Progress::Stop);
                }
            }
            Ok(Progress::Go)
        })
    }

    fn text(&self, value: &ByteArray, row_index: u64) -> Result<String, DataError> {
        let bytes = guarded(self.path, || Ok(value.data().to_vec()))?;
        String::from_utf8(bytes).map_err(|error| DataError::RowNotUtf8 {
            path: self.path.to_owned(),
            column: self.column.to_owned(),
            row_index,
            byte_index: error.utf8_error().valid_up_to(),
        })
    }

    fn wrong_type(&self, expected: &'static str, found: String) -> DataError {
        DataError::WrongColumnType {
            path: self.path.to_owned(),
            column: self.column.to_owned(),
            expected,
            found,
        }
    }

    fn corrupt(&self, reason: &str) -> DataError {
        corrupt(self.path.to_owned(), reason.to_owned())
    }
}

fn describe(leaf: &ColumnDescPtr) -> String {
    let lists = if leaf.max_rep_level() > 0 { "lists of " } else { "" };
    format!("{lists}values of type {}", leaf.physical_type())
}

fn corrupt(path: PathBuf, reason: String) -> DataError {
    DataError::CorruptParquet { path, reason }
}

/// Runs one call of the decoder; its errors and its panics alike say that the file is unsound.
fn guarded<T>(path: &Path, call: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, DataError> {
    let reason = match guard(call) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic,
    };
    Err(corrupt(path.to_owned(), reason))
}
