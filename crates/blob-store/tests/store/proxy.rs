//! Stands between a store and its server, and makes trouble.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fate {
    Passes,
    /// Answered with 503.
    Fails,
    /// Never answered.
    Waits,
    /// Answered by as many bytes a second.
    Trickles(usize),
    /// Cut off after as many bytes of the answer.
    BreaksAfter(usize),
}

/// A proxy that asks `fate` about each request: its first line, and how many came before.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl Proxy {
    pub(crate) async fn start(
        server: SocketAddr,
        fate: impl Fn(&str, usize) -> Fate + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let (fate, count) = (Arc::new(fate), asked.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (fate, count) = (fate.clone(), count.clone());
                // Either side may hang up whenever it likes.
                tokio::spawn(async move {
                    pass(client, server, |line| fate(line, count.fetch_add(1, Ordering::SeqCst))).await
                });
            }
        });
        Self { address, asked }
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// One request: the connection ends with its answer.
async fn pass(
    mut client: TcpStream,
    server: SocketAddr,
    fate: impl FnOnce(&str) -> Fate,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await?);
    }
    let text = String::from_utf8_lossy(&head).into_owned();
    let (line, fields) = text.split_once("\r\n").unwrap_or_default();
    let (bytes_a_second, most) = match fate(line) {
        Fate::Passes => (usize::MAX, usize::MAX),
        Fate::Trickles(bytes) => (bytes, usize::MAX),
        Fate::BreaksAfter(most) => (usize::MAX, most),
        Fate::Waits => {
            tokio::time::sleep(Duration::from_secs(600)).await;
            return Ok(());
        }
        Fate::Fails => {
            let answer = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            // The request is read to its end, or the answer would be lost with the rest of it.
            drain(&mut client, Duration::from_millis(50)).await;
            client.write_all(answer).await?;
            drain(&mut client, Duration::from_secs(5)).await;
            return Ok(());
        }
    };
    let mut upstream = TcpStream::connect(server).await?;
    upstream.write_all(format!("{line}\r\nConnection: close\r\n{fields}").as_bytes()).await?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = upstream.split();
    let answer = async {
        let (mut piece, mut sent) = (vec![0; 64 << 10], 0);
        loop {
            let count = from_server.read(&mut piece).await?;
            let count = count.min(most - sent);
            if count == 0 {
                return Ok(());
            }
            to_client.write_all(&piece[..count]).await?;
            sent += count;
            if bytes_a_second != usize::MAX {
                tokio::time::sleep(Duration::from_secs_f64(count as f64 / bytes_a_second as f64)).await;
            }
        }
    };
    let request = async {
        tokio::io::copy(&mut from_client, &mut to_server).await?;
        std::future::pending::<std::io::Result<()>>().await
    };
    tokio::select! {
        done = answer => done,
        failed = request => failed,
    }
}

/// Reads on until the other side hangs up, for at most `time`.
async fn drain(client: &mut TcpStream, time: Duration) {
    let mut nowhere = tokio::io::sink();
    let _ = tokio::time::timeout(time, tokio::io::copy(client, &mut nowhere)).await;
}
