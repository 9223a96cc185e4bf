//! How a client proves who it is and checks whom it talks to.

use super::token::{Token, TokenError};
use super::{ConnectError, Connection, described};
use crate::reloading::Reloading;
use crate::tls::{self, TlsError};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};

const HTTPS_PORT: u16 = 443;

/// Why a client cannot be secured as asked.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Token(#[from] TokenError),
}

/// Files of the TLS side of a client.
#[derive(Debug, Clone, Default)]
pub struct TlsFiles {
    /// Who may sign servers' certificates.
    pub ca: Option<PathBuf>,
    /// Own certificate and key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Makes connections that are encrypted, authenticated, or neither. Files that change are used from the next connection
/// (certificates) or call (token) on.
#[derive(Debug, Clone, Default)]
pub struct ClientSecurity {
    tls: Option<Arc<Reloading<ClientConfig>>>,
    token: Option<Token>,
    plain_token: bool,
}

impl ClientSecurity {
    /// `plain_token`: the token may travel unencrypted to other machines.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn new(files: TlsFiles, token: Option<Token>, plain_token: bool) -> Result<Self, SecurityError> {
        let TlsFiles { ca, identity } = files;
        let tls = match ca {
            None => None,
            Some(ca) => {
                let mut paths = vec![ca.clone()];
                paths.extend(
                    identity.iter().flat_map(|(certificate, key)| [certificate.clone(), key.clone()]),
                );
                let read = move || client_config(&ca, identity.as_ref());
                Some(Arc::new(Reloading::new(paths, read)?))
            }
        };
        Ok(Self { tls, token, plain_token })
    }

    /// A connection made at its first use, and again after it broke.
    ///
    /// # Errors
    /// When `endpoint` is no URL, or one that this client must not use.
    pub fn lazy(&self, endpoint: &str) -> Result<Connection, ConnectError> {
        let channel = match self.target(endpoint)? {
            Target::Plain(endpoint) => endpoint.connect_lazy(),
            Target::Tls(endpoint, connector) => endpoint.connect_with_connector_lazy(connector.service()),
        };
        Ok(self.with_token(channel))
    }

    /// A connection that stands.
    ///
    /// # Errors
    /// When `endpoint` is no URL or one that this client must not use, nobody answers there, or one side does not trust
    /// the other's certificate.
    pub async fn connect(&self, endpoint: &str) -> Result<Connection, ConnectError> {
        let connected = match self.target(endpoint)? {
            Target::Plain(endpoint) => endpoint.connect().await,
            Target::Tls(endpoint, connector) => endpoint.connect_with_connector(connector.service()).await,
        };
        let channel =
            connected.map_err(|cause| ConnectError::Unreachable { endpoint: endpoint.to_owned(), cause })?;
        Ok(self.with_token(channel))
    }

    /// Whether a server that another names by `endpoint` could be called at all.
    ///
    /// # Errors
    /// As [`ClientSecurity::lazy`].
    pub fn check(&self, endpoint: &str) -> Result<(), ConnectError> {
        self.target(endpoint).map(drop)
    }

    fn with_token(&self, channel: Channel) -> Connection {
        Connection { channel, token: self.token.clone() }
    }

    fn target(&self, endpoint: &str) -> Result<Target, ConnectError> {
        let named = || endpoint.to_owned();
        let bad_url = || ConnectError::BadUrl { endpoint: named() };
        if let Some(rest) = endpoint.strip_prefix("https://") {
            let Some(config) = self.tls.clone() else {
                return Err(ConnectError::NoAuthority { endpoint: named() });
            };
            // The connector encrypts; the library below is told `http` so that it does not want to as well.
            let described = described(&format!("http://{rest}")).map_err(|_| bad_url())?;
            let origin: Uri = endpoint.parse().map_err(|_| bad_url())?;
            let host = host(described.uri()).ok_or_else(bad_url)?.to_owned();
            let port = described.uri().port_u16().unwrap_or(HTTPS_PORT);
            let name = ServerName::try_from(host.clone()).map_err(|_| bad_url())?;
            return Ok(Target::Tls(described.origin(origin), TlsDialer { host, port, name, config }));
        }
        let described = described(endpoint)?;
        if self.tls.is_some() {
            return Err(ConnectError::Plain { endpoint: named() });
        }
        if self.token.is_some() && !self.plain_token && !is_loopback(described.uri()) {
            return Err(ConnectError::PlainToken { endpoint: named() });
        }
        Ok(Target::Plain(described))
    }
}

enum Target {
    Plain(Endpoint),
    Tls(Endpoint, TlsDialer),
}

/// Opens encrypted connections to one server.
#[derive(Clone)]
struct TlsDialer {
    host: String,
    port: u16,
    name: ServerName<'static>,
    config: Arc<Reloading<ClientConfig>>,
}

impl TlsDialer {
    fn service(
        self,
    ) -> impl tower::Service<Uri, Response = TokioIo<TlsStream<TcpStream>>, Error = io::Error, Future: Send>
    + Send
    + 'static {
        tower::service_fn(move |_: Uri| {
            let dialer = self.clone();
            async move { dialer.dial().await.map(TokioIo::new) }
        })
    }

    async fn dial(self) -> io::Result<TlsStream<TcpStream>> {
        let socket = TcpStream::connect((self.host.as_str(), self.port)).await?;
        socket.set_nodelay(true)?;
        let stream = TlsConnector::from(self.config.current()).connect(self.name, socket).await?;
        if stream.get_ref().1.alpn_protocol() == Some(tls::ALPN) {
            Ok(stream)
        } else {
            Err(io::Error::other("the server does not speak HTTP/2"))
        }
    }
}

fn client_config(ca: &Path, identity: Option<&(PathBuf, PathBuf)>) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(tls::VERSIONS)
        .map_err(TlsError::Setup)?
        .with_root_certificates(tls::authorities(ca)?);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(tls::certificates(certificate)?, tls::private_key(key)?)
            .map_err(|cause| TlsError::Pair { certificate: certificate.clone(), key: key.clone(), cause })?,
    };
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    // A resumed session would skip the look at the certificates; connections are long, handshakes few.
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn host(uri: &Uri) -> Option<&str> {
    let host = uri.host()?;
    Some(host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host))
}

fn is_loopback(uri: &Uri) -> bool {
    host(uri).is_some_and(|host| {
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_travels_in_the_clear_on_this_machine_alone() {
        let client =
            |plain| ClientSecurity::new(TlsFiles::default(), Some(Token::new("t").unwrap()), plain).unwrap();
        for endpoint in ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"] {
            assert!(client(false).lazy(endpoint).is_ok(), "{endpoint}");
        }
        for endpoint in ["http://10.0.0.1:1", "http://coordinator:7070", "http://localhost.example:1"] {
            let refused = client(false).lazy(endpoint);
            assert!(matches!(refused, Err(ConnectError::PlainToken { .. })), "{endpoint}");
            assert!(client(true).lazy(endpoint).is_ok(), "{endpoint}");
        }
    }

    #[tokio::test]
    async fn https_needs_to_know_whom_to_trust() {
        let refused = ClientSecurity::default().lazy("https://coordinator:7070");
        assert!(matches!(refused, Err(ConnectError::NoAuthority { .. })));
    }
}
