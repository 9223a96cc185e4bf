use crate::backends::{Backend, limits};
use blob_store::{BlobError, BlobStore, Limits, Location};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::time::Duration;

/// Every promise over both kinds of store.
macro_rules! promises {
    ($($name:ident),* $(,)?) => {
        mod in_a_folder {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(Backend::folder()).await; })*
        }
        mod in_s3 {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() {
                super::$name(Backend::s3(stringify!($name))).await;
            })*
        }
    };
}

promises!(
    what_was_put_is_read_back_whatever_its_size,
    a_name_is_kept_as_it_is,
    a_folder_goes_and_its_neighbour_stays,
    names_that_lead_elsewhere_are_refused_by_every_call,
    what_is_missing_or_too_large_is_said_to_be,
    another_blob_than_expected_is_refused_and_leaves_no_file,
    what_was_put_later_replaces_what_was_there,
    a_put_that_is_given_up_leaves_nothing,
    a_put_of_what_cannot_be_read_leaves_nothing,
);

/// Bytes without a pattern that a lost or swapped part could hide in.
pub(crate) fn bytes(count: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut words = Vec::with_capacity(count + 8);
    while words.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words.extend_from_slice(&state.to_le_bytes());
    }
    words.truncate(count);
    words
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn files_in(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

async fn what_was_put_is_read_back_whatever_its_size(backend: Backend) {
    let store = backend.open();
    let here = tempfile::tempdir().unwrap();
    let part = 8 << 20;
    for (place, size) in [0, 1, part - 1, part, part + 1, 2 * part + 4321].into_iter().enumerate() {
        let (name, content) = (format!("r/{place}/blob.bin"), bytes(size));
        let source = here.path().join(format!("source-{place}"));
        std::fs::write(&source, &content).unwrap();
        store.put_file(&name, &source).await.unwrap();
        store.put_bytes(&format!("{name}.copy"), content.clone()).await.unwrap();
        // What another process sees.
        let store = backend.open();
        assert_eq!(store.size(&name).await.unwrap(), size as u64);
        for name in [name.clone(), format!("{name}.copy")] {
            assert!(store.get_bytes(&name, size as u64).await.unwrap() == content, "{name} of {size}");
        }
        let fetched = here.path().join(format!("fetched-{place}"));
        store.fetch_file(&name, &fetched, Some(&hex(&content).to_uppercase())).await.unwrap();
        assert!(std::fs::read(&fetched).unwrap() == content, "{name} of {size}");
        if size > part {
            let range = part as u64 - 10..part as u64 + 1;
            let expected = &content[part - 10..=part];
            assert_eq!(store.get_range(&name, range).await.unwrap(), expected);
        }
    }
}

async fn a_name_is_kept_as_it_is(backend: Backend) {
    let store = backend.open();
    let mut names = ["a b", "r/~x", "r/[1]{2}.json", "r/é", "r/a+b=c&d", "..a/b", "r/a:b|c\"d", "r/*<>^`"]
        .map(str::to_owned);
    for name in &names {
        store.put_bytes(name, name.clone().into_bytes()).await.unwrap();
        assert_eq!(store.get_bytes(name, 100).await.unwrap(), name.as_bytes(), "{name}");
        if let Some(path) = store.local_path(name).unwrap() {
            assert_eq!(std::fs::read(path).unwrap(), name.as_bytes());
        }
    }
    names.sort();
    let in_folder: Vec<&String> = names.iter().filter(|name| name.starts_with("r/")).collect();
    assert_eq!(store.list("r").await.unwrap().iter().collect::<Vec<_>>(), in_folder);
    store.delete_folder("r").await.unwrap();
    assert_eq!(store.list("r").await.unwrap(), Vec::<String>::new());
}

async fn a_folder_goes_and_its_neighbour_stays(backend: Backend) {
    let store = backend.open();
    for name in ["r1/a/x", "r1/a/y", "r1/b/z/deep", "r1/c", "r10/a/x"] {
        store.put_bytes(name, b"x".to_vec()).await.unwrap();
    }
    assert_eq!(store.list("r1").await.unwrap(), ["r1/a/x", "r1/a/y", "r1/b/z/deep", "r1/c"]);
    assert_eq!(store.folders("r1").await.unwrap(), ["a", "b"]);
    store.delete_folder("r1/a").await.unwrap();
    assert_eq!(store.folders("r1").await.unwrap(), ["b"]);
    store.delete_folder("r1").await.unwrap();
    store.delete_folder("r1").await.unwrap();
    assert_eq!(store.list("r1").await.unwrap(), Vec::<String>::new());
    assert_eq!(store.folders("r1").await.unwrap(), Vec::<String>::new());
    assert_eq!(store.list("r10").await.unwrap(), ["r10/a/x"]);
}

async fn names_that_lead_elsewhere_are_refused_by_every_call(backend: Backend) {
    let store = backend.open();
    let here = tempfile::tempdir().unwrap();
    let file = here.path().join("file");
    std::fs::write(&file, b"x").unwrap();
    let long = "x".repeat(2000);
    for name in [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        ".",
        "a//b",
        "a/",
        "a\nb",
        "a\0b",
        "a\\b",
        "a%2e%2e/b",
        &long,
    ] {
        let refusals = [
            store.put_bytes(name, b"x".to_vec()).await.err(),
            store.put_file(name, &file).await.err(),
            store.get_bytes(name, 9).await.err(),
            store.get_range(name, 0..1).await.err(),
            store.size(name).await.err(),
            store.fetch_file(name, &file, None).await.err(),
            store.list(name).await.err(),
            store.folders(name).await.err(),
            store.delete_folder(name).await.err(),
            store.local_path(name).err(),
        ];
        for (call, refusal) in refusals.into_iter().enumerate() {
            assert!(
                matches!(refusal, Some(BlobError::BadName { .. })),
                "{name:?} in call {call}: {refusal:?}"
            );
        }
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
    assert!(!backend.has_leftovers());
}

async fn what_is_missing_or_too_large_is_said_to_be(backend: Backend) {
    let store = backend.open();
    let here = tempfile::tempdir().unwrap();
    store.put_bytes("r/x", vec![1; 11]).await.unwrap();
    let error = store.get_bytes("r/x", 10).await.unwrap_err();
    assert!(matches!(error, BlobError::TooLarge { actual: 11, most: 10, .. }), "{error}");
    let errors = [
        store.get_bytes("r/y", 10).await.unwrap_err(),
        store.size("r/y").await.unwrap_err(),
        store.get_range("r/y", 0..1).await.unwrap_err(),
        store.fetch_file("r/y", &here.path().join("y"), None).await.unwrap_err(),
        // A folder is no blob.
        store.get_bytes("r", 10).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(&error, BlobError::Missing { .. }), "{error:?}");
        assert!(error.is_damage());
    }
    assert_eq!(files_in(here.path()), 0);
}

async fn another_blob_than_expected_is_refused_and_leaves_no_file(backend: Backend) {
    let store = backend.open();
    let here = tempfile::tempdir().unwrap();
    let to = here.path().join("x");
    let mut content = bytes(9 << 20);
    let expected = hex(&content);
    content[(8 << 20) + 5] ^= 1;
    store.put_bytes("r/x", content).await.unwrap();
    let error = store.fetch_file("r/x", &to, Some(&expected)).await.unwrap_err();
    assert!(matches!(error, BlobError::WrongDigest { .. }) && error.is_damage(), "{error}");
    assert!(error.to_string().contains(&store.location().to_string()), "{error}");
    assert_eq!(files_in(here.path()), 0);
    // What was there before stays.
    std::fs::write(&to, b"before").unwrap();
    store.fetch_file("r/x", &to, Some(&expected)).await.unwrap_err();
    assert_eq!(std::fs::read(&to).unwrap(), b"before");
    assert_eq!(files_in(here.path()), 1);
}

async fn what_was_put_later_replaces_what_was_there(backend: Backend) {
    let store = backend.open();
    for content in [bytes(9 << 20), b"short".to_vec(), bytes(10 << 20)] {
        store.put_bytes("r/x", content.clone()).await.unwrap();
        assert!(store.get_bytes("r/x", 16 << 20).await.unwrap() == content);
    }
}

async fn a_put_that_is_given_up_leaves_nothing(backend: Backend) {
    let hurried = Limits { transfer: Duration::from_nanos(1), ..limits() };
    let store = backend.open_within(hurried);
    let error = store.put_bytes("r/x", bytes(20 << 20)).await.unwrap_err();
    assert!(matches!(error, BlobError::Deadline { .. }), "{error}");
    gone(&backend, &store).await;
}

async fn a_put_of_what_cannot_be_read_leaves_nothing(backend: Backend) {
    let store = backend.open();
    let here = tempfile::tempdir().unwrap();
    for source in [here.path().to_owned(), here.path().join("none")] {
        let error = store.put_file("r/x", &source).await.unwrap_err();
        assert!(matches!(error, BlobError::Local { .. }), "{error}");
    }
    gone(&backend, &store).await;
}

async fn gone(backend: &Backend, store: &BlobStore) {
    assert_eq!(store.list("r").await.unwrap(), Vec::<String>::new());
    assert!(!backend.has_leftovers(), "something of it takes up room");
}

#[tokio::test]
async fn what_a_crash_left_of_a_put_is_in_no_list_but_in_a_folder_that_can_be_swept() {
    let backend = Backend::folder();
    let store = backend.open();
    let Location::Folder(root) = &backend.location else { unreachable!("it is a folder") };
    std::fs::create_dir_all(root.join("r/00000020-1")).unwrap();
    std::fs::write(root.join("r/00000020-1/coordinator.bin#1"), b"half").unwrap();
    assert_eq!(store.list("r").await.unwrap(), Vec::<String>::new());
    assert_eq!(store.folders("r").await.unwrap(), ["00000020-1"]);
    store.delete_folder("r/00000020-1").await.unwrap();
    assert!(!backend.has_leftovers());
    assert_eq!(store.folders("r").await.unwrap(), Vec::<String>::new());
}
