//! A TCP link that can be broken, silenced and slowed while bytes are on their way.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How a link behaves now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    Open,
    /// Connections break, new ones are closed at once.
    Reset,
    /// Connections stay, and what is sent waits.
    Silent,
    /// Every piece comes so much later.
    Slow(Duration),
}

/// Listens in place of a server; ends its connections when dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    link: watch::Sender<Link>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn start(target: String) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (link, follows) = watch::channel(Link::Open);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let target = target.clone();
                tokio::spawn(carry(client, target, follows.clone()));
            }
        });
        Ok(Self { address, link, accepting })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn set(&self, link: Link) {
        self.link.send_replace(link);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.link.send_replace(Link::Reset);
    }
}

/// One connection, until one side ends it or the link breaks. A failure ends it, as it would without us.
async fn carry(client: TcpStream, target: String, link: watch::Receiver<Link>) {
    let mut broken = link.clone();
    let connection = async {
        let mut opened = link.clone();
        // A silent network does not even answer a connection that is asked for.
        let _ = opened.wait_for(|link| *link != Link::Silent).await;
        let server = TcpStream::connect(target).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (client, server) = (client.into_split(), server.into_split());
        tokio::try_join!(pump(client.0, server.1, link.clone()), pump(server.0, client.1, link))
    };
    tokio::select! {
        _ = broken.wait_for(|link| *link == Link::Reset) => {}
        _ = connection => {}
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut link: watch::Receiver<Link>,
) -> io::Result<()> {
    let mut piece = vec![0; 16 << 10];
    loop {
        let length = from.read(&mut piece).await?;
        let late = match *link.borrow() {
            Link::Slow(latency) => latency,
            Link::Open | Link::Silent | Link::Reset => Duration::ZERO,
        };
        if !late.is_zero() {
            tokio::time::sleep(late).await;
        }
        if link.wait_for(|link| *link != Link::Silent).await.is_err() {
            return Ok(());
        }
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&piece[..length]).await?;
    }
}
