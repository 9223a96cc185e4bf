//! What both ends of an encrypted connection need: TLS 1.3 by `rustls`, keys and certificates from PEM files.

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Versions spoken: both ends are ours, and every gRPC library of today speaks the newest.
pub const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
/// What both ends must agree on during the handshake.
pub const ALPN: &[u8] = b"h2";

/// Why a TLS file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("`{path}` holds no usable PEM; certificates and keys are given as PEM files")]
    Pem {
        path: PathBuf,
        #[source]
        cause: pem::Error,
    },
    #[error("`{path}` holds no certificate")]
    NoCertificate { path: PathBuf },
    #[error("`{path}` holds a certificate that cannot sign others' certificates")]
    NotAnAuthority {
        path: PathBuf,
        #[source]
        cause: rustls::Error,
    },
    #[error("certificate `{certificate}` and key `{key}` do not work together")]
    Pair {
        certificate: PathBuf,
        key: PathBuf,
        #[source]
        cause: rustls::Error,
    },
    #[error("client certificates cannot be checked by `{path}`")]
    Verifier {
        path: PathBuf,
        #[source]
        cause: rustls::server::VerifierBuilderError,
    },
    #[error("--tls-cert and --tls-key go together; {missing} is missing")]
    Half { missing: &'static str },
    #[error("{flag} needs --tls-cert and --tls-key")]
    NeedsCertificate { flag: &'static str },
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
}

/// The cryptography used, named so that no other crate's choice changes it.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The certificates of a PEM file, in its order.
///
/// # Errors
/// When it cannot be read or holds none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unusable = |cause| TlsError::Pem { path: path.to_owned(), cause };
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(unusable)?.collect::<Result<_, _>>().map_err(unusable)?;
    if found.is_empty() { Err(TlsError::NoCertificate { path: path.to_owned() }) } else { Ok(found) }
}

/// The first private key of a PEM file.
///
/// # Errors
/// When it cannot be read or holds none.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|cause| TlsError::Pem { path: path.to_owned(), cause })
}

/// The authorities of a PEM file.
///
/// # Errors
/// When it cannot be read, holds none, or one that cannot be an authority.
pub fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store.add(certificate).map_err(|cause| TlsError::NotAnAuthority { path: path.to_owned(), cause })?;
    }
    Ok(store)
}

/// A certificate file and its key's, when both are given.
///
/// # Errors
/// When one of them is.
pub fn pair(
    certificate: Option<&PathBuf>,
    key: Option<&PathBuf>,
) -> Result<Option<(PathBuf, PathBuf)>, TlsError> {
    match (certificate, key) {
        (Some(certificate), Some(key)) => Ok(Some((certificate.clone(), key.clone()))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(TlsError::Half { missing: "--tls-key" }),
        (None, Some(_)) => Err(TlsError::Half { missing: "--tls-cert" }),
    }
}
