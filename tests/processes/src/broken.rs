//! Models and texts with one fault each, made from the sound ones of `tests/fixtures`.

use parquet::data_type::Int64Type;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A copy of a model of the fixtures.
///
/// # Panics
/// When it cannot be copied.
#[must_use]
pub fn copy_model(name: &str, to: &Path) -> PathBuf {
    fs::create_dir_all(to).expect("a folder for the copy");
    for entry in fs::read_dir(crate::fixture(&format!("models/{name}"))).expect("the model is a folder") {
        let path = entry.expect("the model can be listed").path();
        fs::copy(&path, to.join(path.file_name().expect("a file has a name"))).expect("the copy is written");
    }
    to.to_owned()
}

/// A copy of a model with another `config.json`.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn with_config(name: &str, to: &Path, change: impl FnOnce(&mut Value)) -> PathBuf {
    let folder = copy_model(name, to);
    let path = folder.join("config.json");
    let mut config =
        serde_json::from_slice(&fs::read(&path).expect("config.json")).expect("config.json is JSON");
    change(&mut config);
    fs::write(&path, config.to_string()).expect("config.json is written");
    folder
}

/// A copy of a model with one of its files changed.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn damaged(name: &str, to: &Path, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> PathBuf {
    let folder = copy_model(name, to);
    let path = folder.join(file);
    let bytes = fs::read(&path).expect("the file is there");
    fs::write(&path, change(bytes)).expect("the file is written");
    folder
}

/// A copy of a model without one of its files.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn broken_model(name: &str, to: &Path, without: &str) -> PathBuf {
    let folder = copy_model(name, to);
    fs::remove_file(folder.join(without)).expect("the file was there");
    folder
}

/// A sound Parquet file with one column of numbers, `number`.
///
/// # Panics
/// When it cannot be written.
pub fn parquet_file(path: &Path) {
    let schema = Arc::new(parse_message_type("message rows { required int64 number; }").expect("a schema"));
    let file = fs::File::create(path).expect("the file");
    let mut writer =
        SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::default())).expect("a writer");
    let mut group = writer.next_row_group().expect("a row group");
    while let Some(mut column) = group.next_column().expect("a column") {
        column.typed::<Int64Type>().write_batch(&[1, 2, 3], None, None).expect("three rows");
        column.close().expect("the column ends");
    }
    group.close().expect("the group ends");
    writer.close().expect("the file ends");
}
