//! Binding an address, and refusing one that strangers could reach.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use tokio::net::TcpListener;

/// Where a server listens.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ListenArgs {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, env = "ESPALIER_LISTEN", value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Serve without encryption and authentication on addresses that other machines can reach
    #[arg(long, env = "ESPALIER_INSECURE", value_parser = clap::builder::BoolishValueParser::new(),
          num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub insecure: bool,
}

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "refusing to listen on {address}, which other machines can reach, without encryption and authentication; \
         use 127.0.0.1, or pass --insecure where the network itself is closed"
    )]
    NotLoopback { address: SocketAddr },
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

/// A bound socket.
#[derive(Debug)]
pub struct Listener {
    pub(crate) socket: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// The address bound, with the port that the system chose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl ListenArgs {
    /// Binds the address given, else `default`.
    ///
    /// # Errors
    /// When the address is taken, not ours, or not loopback without `--insecure`.
    pub async fn bind(&self, default: SocketAddr) -> Result<Listener, ListenError> {
        let address = self.listen.unwrap_or(default);
        if !address.ip().is_loopback() && !self.insecure {
            return Err(ListenError::NotLoopback { address });
        }
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
        Ok(Listener { socket, address })
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
        let again = ListenArgs { listen: Some(first.address()), insecure: false };
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
            let args = ListenArgs { listen: Some(address.parse().unwrap()), insecure };
            assert_eq!(args.bind(loopback()).await.is_ok(), bound, "{address}");
        }
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_named() {
        let args = ListenArgs { listen: Some("192.0.2.1:0".parse().unwrap()), insecure: true };
        assert!(matches!(args.bind(loopback()).await, Err(ListenError::NotOurs { .. })));
    }
}
