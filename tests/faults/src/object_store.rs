//! A server of S3 that all seeds share, each with a bucket of its own and a link that can be broken.

use crate::proxy::{Link, Proxy};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// A bucket, and the way to it.
pub(crate) struct ObjectStore {
    bucket: String,
    way: Proxy,
}

impl ObjectStore {
    /// # Errors
    /// When the bucket cannot be made or no port is to be had.
    pub(crate) async fn start() -> std::io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let bucket = format!("seed-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let server = tokio::task::spawn_blocking(server).await.map_err(std::io::Error::other)?;
        create(server, &bucket)?;
        Ok(Self { bucket, way: Proxy::start(server.to_string()).await? })
    }

    pub(crate) fn url(&self) -> String {
        format!("s3://{}/runs", self.bucket)
    }

    /// What a process must be told to reach it.
    pub(crate) fn variables(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT", self.way.url()),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", "tests".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "tests".to_owned()),
        ]
    }

    pub(crate) fn set(&self, link: Link) {
        self.way.set(link);
    }
}

/// moto, started once; it ends with the tests, when its standard input does.
fn server() -> SocketAddr {
    static SERVER: OnceLock<(Child, SocketAddr)> = OnceLock::new();
    let (_, address) = SERVER.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let python = root.join(".cache/s3-server/bin/python");
        assert!(python.is_file(), "the server of S3 is missing; run `make s3-server`");
        let mut process = Command::new(python)
            .arg(root.join("crates/blob-store/tests/s3_server.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python starts");
        let mut line = String::new();
        let output = process.stdout.take().expect("its output is piped");
        BufReader::new(output).read_line(&mut line).expect("its output can be read");
        let port: u16 = line.trim().parse().unwrap_or_else(|_| panic!("the server of S3 said {line:?}"));
        (process, SocketAddr::from(([127, 0, 0, 1], port)))
    });
    *address
}

/// One request by hand: the server does not ask who one is.
fn create(server: SocketAddr, bucket: &str) -> std::io::Result<()> {
    let mut connection = TcpStream::connect(server)?;
    let head = "HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    connection.write_all(format!("PUT /{bucket} {head}").as_bytes())?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(std::io::Error::other(answer)) }
}
