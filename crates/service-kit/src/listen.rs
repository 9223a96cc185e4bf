//! Binding an address, and refusing one that strangers could reach.

use crate::access::{Grant, Policy, Role, TokenFileError, TokenTable};
use crate::limits::LimitArgs;
use crate::tls::{ClientAuth, ServerTls, TlsArgs};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;
use wire::client::{ClientSecurity, SecurityError, TlsFiles, Token};
use wire::reloading::Reloading;
use wire::tls::{self, TlsError};

/// Where a server listens, and who may call it.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ListenArgs {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, env = "ESPALIER_LISTEN", value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Serve other machines without encryption and authentication: whoever reaches the address may call everything, or,
    /// with --tokens, act as coordinator or worker
    #[arg(long, env = "ESPALIER_INSECURE", value_parser = clap::builder::BoolishValueParser::new(),
          num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub insecure: bool,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub tokens: TokenArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// Tokens: those that are accepted, and the one that is sent.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Security")]
pub struct TokenArgs {
    /// File of the tokens that callers may show, a line `name role sha256:hash` each, as `espalier token create` prints
    #[arg(long, env = "ESPALIER_TOKENS", value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// File with the token that this process sends to others, where it has no client certificate
    #[arg(long, env = "ESPALIER_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "refusing to listen on {address}, which other machines can reach, without {missing}; \
         use 127.0.0.1, give --tls-cert, --tls-key and --tls-client-ca or --tokens, \
         or pass --insecure where the network itself is closed"
    )]
    NotLoopback { address: SocketAddr, missing: &'static str },
    #[error("connections cannot be encrypted")]
    Tls(#[source] TlsError),
    #[error("callers cannot be told apart")]
    Tokens(#[source] TokenFileError),
    #[error("other processes cannot be called")]
    Peers(#[source] SecurityError),
    #[error("{address} is in use by another process; choose another port with --listen, or 0 for a free one")]
    InUse { address: SocketAddr },
    #[error(
        "not allowed to listen on {address}; ports below 1024 need privileges, choose a higher one with --listen"
    )]
    NotAllowed { address: SocketAddr },
    #[error("{address} is not an address of this machine; choose one that is with --listen")]
    NotOurs { address: SocketAddr },
    #[error("failed to listen on {address}")]
    Other {
        address: SocketAddr,
        #[source]
        cause: io::Error,
    },
}

/// A bound socket, and the rules for who comes there.
#[derive(Debug)]
pub struct Listener {
    pub(crate) socket: TcpListener,
    pub(crate) tls: Option<Arc<ServerTls>>,
    pub(crate) policy: Policy,
    pub(crate) limits: LimitArgs,
    peers: ClientSecurity,
    address: SocketAddr,
}

impl Listener {
    /// The address bound, with the port that the system chose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How this process calls others: by its own certificate, its token, or neither.
    #[must_use]
    pub fn peers(&self) -> ClientSecurity {
        self.peers.clone()
    }
}

impl ListenArgs {
    /// Binds the address given, else `default`.
    ///
    /// # Errors
    /// When the address is taken, not ours, or open to others without TLS and authentication or `--insecure`; when a
    /// file of certificates or tokens is missing or broken.
    pub async fn bind(&self, default: SocketAddr) -> Result<Listener, ListenError> {
        let address = self.listen.unwrap_or(default);
        let by_default =
            if self.tokens.tokens.is_some() { ClientAuth::Optional } else { ClientAuth::Required };
        let tls = self.tls.open(by_default).map_err(ListenError::Tls)?.map(Arc::new);
        let tokens = self.tokens.open().map_err(ListenError::Tokens)?;
        let controlled = tokens.is_some() || self.tls.tls_client_ca.is_some();
        if !address.ip().is_loopback() && !self.insecure {
            let missing = match (tls.is_some(), controlled) {
                (true, true) => None,
                (true, false) => Some("authentication"),
                (false, true) => Some("encryption"),
                (false, false) => Some("encryption and authentication"),
            };
            if let Some(missing) = missing {
                return Err(ListenError::NotLoopback { address, missing });
            }
        }
        let anonymous = match (&tokens, self.insecure) {
            (None, true) => Some(Grant::Everything),
            (None, false) => (!controlled).then_some(Grant::Everything),
            (Some(_), true) => Some(Grant::Role(Role::Internal)),
            (Some(_), false) => None,
        };
        let policy = Policy { tokens, anonymous };
        let peers = self.peers().map_err(ListenError::Peers)?;
        let named = |cause: io::Error| {
            let kind = cause.kind();
            if kind == ErrorKind::AddrInUse {
                ListenError::InUse { address }
            } else if kind == ErrorKind::PermissionDenied {
                ListenError::NotAllowed { address }
            } else if kind == ErrorKind::AddrNotAvailable {
                ListenError::NotOurs { address }
            } else {
                ListenError::Other { address, cause }
            }
        };
        let socket = TcpListener::bind(address).await.map_err(named)?;
        let address = socket.local_addr().map_err(named)?;
        Ok(Listener { socket, tls, policy, limits: self.limits, peers, address })
    }

    fn peers(&self) -> Result<ClientSecurity, SecurityError> {
        let identity = tls::pair(self.tls.tls_cert.as_ref(), self.tls.tls_key.as_ref())?;
        let token = self.tokens.token_file.as_deref().map(Token::from_file).transpose()?;
        ClientSecurity::new(TlsFiles { ca: self.tls.tls_ca.clone(), identity }, token, self.insecure)
    }
}

impl TokenArgs {
    fn open(&self) -> Result<Option<Reloading<TokenTable>>, TokenFileError> {
        let read = |path: PathBuf| Reloading::new(vec![path.clone()], move || TokenTable::read(&path));
        self.tokens.clone().map(read).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback() -> SocketAddr {
        ([127, 0, 0, 1], 0).into()
    }

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let first = ListenArgs::default().bind(loopback()).await.unwrap();
        let again = ListenArgs { listen: Some(first.address()), ..ListenArgs::default() };
        let error = again.bind(loopback()).await.unwrap_err();
        assert!(matches!(error, ListenError::InUse { address } if address == first.address()), "{error}");
    }

    #[tokio::test]
    async fn an_address_that_others_reach_needs_insecure() {
        for (address, insecure, bound) in [
            ("0.0.0.0:0", false, false),
            ("[::]:0", false, false),
            ("0.0.0.0:0", true, true),
            ("127.0.0.2:0", false, true),
        ] {
            let args =
                ListenArgs { listen: Some(address.parse().unwrap()), insecure, ..ListenArgs::default() };
            assert_eq!(args.bind(loopback()).await.is_ok(), bound, "{address}");
        }
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_named() {
        let args = ListenArgs {
            listen: Some("192.0.2.1:0".parse().unwrap()),
            insecure: true,
            ..ListenArgs::default()
        };
        assert!(matches!(args.bind(loopback()).await, Err(ListenError::NotOurs { .. })));
    }
}
