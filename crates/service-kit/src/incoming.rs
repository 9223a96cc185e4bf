//! Connections as they come: counted, encrypted where asked, and closed when they keep silent.

use crate::access::Principal;
use crate::limits::LimitArgs;
use crate::tls::ServerTls;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

/// Bytes with which each HTTP/2 connection starts.
const PREFACE_BYTES: usize = 24;
/// Pause after the system refused a connection, such as for want of file descriptors.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);
/// Time between two warnings that there are too many connections.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// Who is at the other end; the guard finds it in each request's extensions.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) certificate: Option<Arc<Principal>>,
}

/// The stream of connections of a listener, which never ends. Handshakes run beside each other: a slow one holds up no
/// other.
pub(crate) struct Incoming {
    socket: TcpListener,
    tls: Option<Arc<ServerTls>>,
    limits: LimitArgs,
    free: Arc<Semaphore>,
    handshakes: JoinSet<io::Result<ServerStream>>,
    pause: Option<Pin<Box<Sleep>>>,
    warned: Option<Instant>,
}

impl Incoming {
    pub(crate) fn new(socket: TcpListener, tls: Option<Arc<ServerTls>>, limits: LimitArgs) -> Self {
        let free = Arc::new(Semaphore::new(limits.max_connections as usize));
        Self { socket, tls, limits, free, handshakes: JoinSet::new(), pause: None, warned: None }
    }

    fn begin(&mut self, socket: TcpStream, address: SocketAddr) {
        let Ok(permit) = self.free.clone().try_acquire_owned() else {
            if self.warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY) {
                let most = self.limits.max_connections;
                warn!(peer = %address, most, "too many connections; new ones are closed (--max-connections)");
                self.warned = Some(Instant::now());
            }
            return;
        };
        let (tls, limit) = (self.tls.clone(), self.limits.handshake());
        self.handshakes.spawn(async move {
            let opened = async {
                socket.set_nodelay(true)?;
                let (io, certificate) = match tls {
                    None => (Io::Plain(socket), None),
                    Some(tls) => {
                        let (stream, principal) = tls.accept(socket).await?;
                        (Io::Tls(Box::new(stream)), principal)
                    }
                };
                let peer = Peer { address, certificate: certificate.map(Arc::new) };
                let silence = Some((Box::pin(sleep(limit)), PREFACE_BYTES));
                Ok(ServerStream { io, peer, silence, _permit: permit })
            };
            let opened = timeout(limit, opened).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            opened.inspect_err(|error| debug!(peer = %address, %error, "no handshake"))
        });
    }
}

impl Stream for Incoming {
    type Item = io::Result<ServerStream>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            match this.handshakes.poll_join_next(context) {
                Poll::Ready(Some(Ok(Ok(stream)))) => return Poll::Ready(Some(Ok(stream))),
                // Said by the task itself; an aborted or panicked one has closed its socket.
                Poll::Ready(Some(Ok(Err(_)) | Err(_))) => continue,
                Poll::Ready(None) | Poll::Pending => {}
            }
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(context));
                this.pause = None;
            }
            if this.handshakes.len() >= this.limits.max_handshakes as usize {
                return Poll::Pending;
            }
            match ready!(this.socket.poll_accept(context)) {
                Ok((socket, address)) => this.begin(socket, address),
                Err(error) => {
                    warn!(%error, "a connection could not be accepted");
                    this.pause = Some(Box::pin(sleep(REFUSED_PAUSE)));
                }
            }
        }
    }
}

/// A connection, which counts until it is dropped.
pub(crate) struct ServerStream {
    io: Io,
    peer: Peer,
    /// Until the preface is here: when to give up, and bytes to come.
    silence: Option<(Pin<Box<Sleep>>, usize)>,
    _permit: OwnedSemaphorePermit,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for ServerStream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for ServerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = match &mut self.io {
            Io::Plain(socket) => Pin::new(socket).poll_read(context, buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        if let Some((sleep, missing)) = &mut self.silence {
            *missing = missing.saturating_sub(buffer.filled().len() - before);
            if *missing == 0 {
                self.silence = None;
            } else if sleep.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl AsyncWrite for ServerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(socket) => Pin::new(socket).poll_write_vectored(context, slices),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(socket) => socket.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(socket) => Pin::new(socket).poll_flush(context),
            Io::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(socket) => Pin::new(socket).poll_shutdown(context),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
