//! The two kinds of store, each test with a place of its own.

use blob_store::{BlobStore, Limits, Location};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;
use tempfile::TempDir;

/// Never to be seen in an error.
pub(crate) const SECRET: &str = "the-secret-of-the-tests";

/// Generous: the machine may be busy.
pub(crate) fn limits() -> Limits {
    Limits { call: Duration::from_secs(60), transfer: Duration::from_secs(120), retries: 5 }
}

/// A store that a test may open as often as it likes.
pub(crate) struct Backend {
    pub(crate) location: Location,
    endpoint: Option<SocketAddr>,
    folder: Option<TempDir>,
}

impl Backend {
    pub(crate) fn folder() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let location = format!("file://{}/blobs", folder.path().display()).parse().unwrap();
        Self { location, endpoint: None, folder: Some(folder) }
    }

    /// A bucket of its own in the one server of the tests.
    pub(crate) fn s3(name: &str) -> Self {
        let bucket = name.replace('_', "-").chars().take(60).collect::<String>();
        let bucket = bucket.trim_end_matches('-');
        let answer = ask(&format!("PUT /{bucket}"));
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let location = format!("s3://{bucket}/some/prefix").parse().unwrap();
        Self { location, endpoint: Some(server()), folder: None }
    }

    pub(crate) fn open(&self) -> BlobStore {
        self.open_within(limits())
    }

    pub(crate) fn open_within(&self, limits: Limits) -> BlobStore {
        match self.endpoint {
            None => BlobStore::open(&self.location, limits).unwrap(),
            Some(endpoint) => self.open_through(endpoint, limits),
        }
    }

    /// Through another address than the server's own.
    pub(crate) fn open_through(&self, endpoint: SocketAddr, limits: Limits) -> BlobStore {
        let endpoint = format!("http://{endpoint}");
        let variables = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "tests"),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
        ];
        BlobStore::open_with(&self.location, limits, variables).unwrap()
    }

    /// Whether there is nothing left of uploads that were given up.
    pub(crate) fn has_leftovers(&self) -> bool {
        match (&self.location, &self.folder) {
            (Location::S3 { bucket, .. }, _) => ask(&format!("GET /{bucket}?uploads")).contains("<UploadId>"),
            (Location::Folder(path), _) => files_below(path).next().is_some(),
        }
    }
}

fn files_below(folder: &Path) -> Box<dyn Iterator<Item = PathBuf>> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    Box::new(entries.flat_map(|path| -> Box<dyn Iterator<Item = PathBuf>> {
        if path.is_dir() { files_below(&path) } else { Box::new(std::iter::once(path)) }
    }))
}

/// moto, started once; it ends with the tests, when its standard input does.
pub(crate) fn server() -> SocketAddr {
    static SERVER: OnceLock<(Child, SocketAddr)> = OnceLock::new();
    let (_, address) = SERVER.get_or_init(|| {
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/s3-server/bin/python");
        assert!(python.is_file(), "the server of S3 is missing; run `make s3-server`");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/s3_server.py");
        let mut process = Command::new(python)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port: u16 = line.trim().parse().unwrap_or_else(|_| panic!("the server of S3 said {line:?}"));
        // Its standard input is kept open until this process ends.
        (process, SocketAddr::from(([127, 0, 0, 1], port)))
    });
    *address
}

/// One request to the server by hand: it does not ask who one is.
fn ask(request: &str) -> String {
    let mut connection = TcpStream::connect(server()).unwrap();
    let head = "HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    connection.write_all(format!("{request} {head}").as_bytes()).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    answer
}
