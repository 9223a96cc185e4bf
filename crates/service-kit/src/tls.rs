//! The server's side of TLS: certificates that are read anew when they change, and the names of clients.

use crate::access::{Grant, Principal, Process};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use wire::reloading::Reloading;
use wire::tls::{self, TlsError};

/// How connections to a server, and from it to its peers, are encrypted.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Security")]
pub struct TlsArgs {
    /// Certificate chain (PEM) of this process, shown to clients and, as a client, to servers
    #[arg(long, env = "ESPALIER_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Key (PEM) of --tls-cert
    #[arg(long, env = "ESPALIER_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Certificates (PEM) of who may sign clients' certificates
    #[arg(long, env = "ESPALIER_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// Whether a client without certificate may connect [default: optional with --tokens, else required]
    #[arg(long, env = "ESPALIER_TLS_CLIENT_AUTH", value_name = "WHEN")]
    pub tls_client_auth: Option<ClientAuth>,
    /// Name in the certificate of a coordinator: a DNS name or URI that is this or goes on with `.`, `-` or `/`
    #[arg(
        long,
        env = "ESPALIER_TLS_COORDINATOR_NAME",
        value_name = "NAME",
        default_value = "espalier-coordinator"
    )]
    pub tls_coordinator_name: Option<String>,
    /// Name in the certificate of a worker, as above
    #[arg(long, env = "ESPALIER_TLS_WORKER_NAME", value_name = "NAME", default_value = "espalier-worker")]
    pub tls_worker_name: Option<String>,
    /// Certificates (PEM) of who may sign the certificates of the processes that this one calls by https:// URLs
    #[arg(long, env = "ESPALIER_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
}

/// Whether clients must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ClientAuth {
    Required,
    Optional,
}

impl TlsArgs {
    /// What accepts encrypted connections, if a certificate is given.
    pub(crate) fn open(&self, default: ClientAuth) -> Result<Option<ServerTls>, TlsError> {
        let Some((certificate, key)) = tls::pair(self.tls_cert.as_ref(), self.tls_key.as_ref())? else {
            return match self.tls_client_ca {
                Some(_) => Err(TlsError::NeedsCertificate { flag: "--tls-client-ca" }),
                None => Ok(None),
            };
        };
        let clients = self.tls_client_ca.clone().map(|ca| (ca, self.tls_client_auth.unwrap_or(default)));
        let mut paths = vec![certificate.clone(), key.clone()];
        paths.extend(clients.iter().map(|(ca, _)| ca.clone()));
        let read =
            move || server_config(&certificate, &key, clients.as_ref().map(|(ca, auth)| (&**ca, *auth)));
        let name =
            |given: &Option<String>, default: &str| given.clone().unwrap_or_else(|| default.to_owned());
        Ok(Some(ServerTls {
            config: Reloading::new(paths, read)?,
            coordinator: name(&self.tls_coordinator_name, "espalier-coordinator"),
            worker: name(&self.tls_worker_name, "espalier-worker"),
        }))
    }
}

/// Accepts encrypted connections.
#[derive(Debug)]
pub(crate) struct ServerTls {
    config: Reloading<ServerConfig>,
    coordinator: String,
    worker: String,
}

impl ServerTls {
    /// Shakes hands by the certificates of now; says who the client is, if it showed a certificate.
    pub(crate) async fn accept(
        &self,
        socket: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, Option<Principal>)> {
        let stream = TlsAcceptor::from(self.config.current()).accept(socket).await?;
        // A client that asks for no protocol speaks no gRPC.
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(tls::ALPN) {
            return Err(io::Error::other("the client did not ask for HTTP/2"));
        }
        let principal =
            session.peer_certificates().and_then(|chain| chain.first()).map(|own| self.principal(own));
        Ok((stream, principal))
    }

    fn principal(&self, certificate: &CertificateDer<'_>) -> Principal {
        let names: Vec<String> = match webpki::EndEntityCert::try_from(certificate) {
            Ok(parsed) => {
                parsed.valid_dns_names().chain(parsed.valid_uri_names()).map(str::to_owned).collect()
            }
            // The handshake has parsed it before; one without readable names has no grant.
            Err(_) => Vec::new(),
        };
        let called = |wanted: &str| names.iter().find(|name| is_called(name, wanted)).cloned();
        let process = [(&self.coordinator, Process::Coordinator), (&self.worker, Process::Worker)]
            .into_iter()
            .find_map(|(wanted, process)| called(wanted).map(|name| (name, Grant::Process(process))));
        let (name, grant) = process.unwrap_or_else(|| {
            (names.first().cloned().unwrap_or_else(|| "certificate without a name".into()), Grant::Nothing)
        });
        Principal { name, grant }
    }
}

/// `espalier-worker` calls `espalier-worker`, `espalier-worker-0.pool` and `espalier-worker.ns.svc`, but no
/// `espalier-workers`.
fn is_called(name: &str, wanted: &str) -> bool {
    let (Some(start), Some(rest)) = (name.get(..wanted.len()), name.get(wanted.len()..)) else {
        return false;
    };
    !wanted.is_empty()
        && start.eq_ignore_ascii_case(wanted)
        && (rest.is_empty() || rest.starts_with(['.', '-', '/']))
}

fn server_config(
    certificate: &Path,
    key: &Path,
    clients: Option<(&Path, ClientAuth)>,
) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(tls::VERSIONS)
        .map_err(TlsError::Setup)?;
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some((ca, auth)) => {
            let roots = Arc::new(tls::authorities(ca)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, tls::provider());
            let verifier = match auth {
                ClientAuth::Required => verifier,
                ClientAuth::Optional => verifier.allow_unauthenticated(),
            };
            let unusable = |cause| TlsError::Verifier { path: ca.to_owned(), cause };
            builder.with_client_cert_verifier(verifier.build().map_err(unusable)?)
        }
    };
    let mut config =
        builder.with_single_cert(tls::certificates(certificate)?, tls::private_key(key)?).map_err(
            |cause| TlsError::Pair { certificate: certificate.to_owned(), key: key.to_owned(), cause },
        )?;
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    // A resumed session would skip the look at the client's certificate.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_goes_on_only_behind_a_separator() {
        for (name, wanted, expected) in [
            ("espalier-worker", "espalier-worker", true),
            ("Espalier-Worker-0.pool.svc", "espalier-worker", true),
            ("espalier-worker.ns.svc", "espalier-worker", true),
            ("espalier-workers", "espalier-worker", false),
            ("my-espalier-worker", "espalier-worker", false),
            ("espalier", "espalier-worker", false),
            ("spiffe://td/ns/a/sa/worker", "spiffe://td/ns/a/sa/worker", true),
            ("spiffe://td/ns/a/sa/worker/x", "spiffe://td/ns/a/sa/worker", true),
            ("spiffe://td/ns/a/sa/worker2", "spiffe://td/ns/a/sa/worker", false),
            ("anything", "", false),
            ("é-worker", "e", false),
        ] {
            assert_eq!(is_called(name, wanted), expected, "{name} {wanted}");
        }
    }
}
