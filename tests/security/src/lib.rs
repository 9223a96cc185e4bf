//! Stage for attacks: an authority that signs any certificate, a real server over services that do next to nothing, and
//! a client that calls any method.

mod authority;
mod raw;
mod stub;

pub use authority::{Authority, Leaf};
pub use raw::{call, unread_stream};
pub use stub::{Call, Registry, Stub};

use service_kit::{AuditEntry, AuditSink, GrpcServer, ListenArgs};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio_util::sync::{CancellationToken, DropGuard};
use wire::client::{ClientSecurity, TlsFiles, Token};
use wire::pb::registry_service_server::RegistryServiceServer;

/// Longest that anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A folder of certificates, keys and tokens.
#[derive(Debug)]
pub struct Files {
    folder: tempfile::TempDir,
}

impl Default for Files {
    fn default() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }
}

impl Files {
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file as a whole, the way secrets are swapped.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let (new, path) = (self.path("new"), self.path(name));
        fs::write(&new, text).expect("a file");
        fs::rename(&new, &path).expect("a file moved");
        path
    }

    /// Writes `name.crt` and `name.key`.
    pub fn identity(&self, name: &str, authority: &Authority, leaf: &Leaf) -> (PathBuf, PathBuf) {
        let (certificate, key) = authority.sign(leaf);
        (self.write(&format!("{name}.crt"), &certificate), self.write(&format!("{name}.key"), &key))
    }
}

/// A client that trusts the authorities in a file.
#[must_use]
pub fn client(ca: &Path, identity: Option<(PathBuf, PathBuf)>, token: Option<&str>) -> ClientSecurity {
    let token = token.map(|token| Token::new(token).expect("a token"));
    ClientSecurity::new(TlsFiles { ca: Some(ca.to_owned()), identity }, token, false).expect("good files")
}

/// A running server.
#[derive(Debug)]
pub struct Served {
    pub address: SocketAddr,
    pub stub: Stub,
    pub audited: Arc<Audited>,
    _stop: DropGuard,
}

impl Served {
    #[must_use]
    pub fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}", self.address)
    }
}

/// Keeps what it is told.
#[derive(Debug, Default)]
pub struct Audited(Mutex<Vec<AuditEntry>>);

impl Audited {
    #[must_use]
    pub fn entries(&self) -> Vec<AuditEntry> {
        self.0.lock().expect("no panic").clone()
    }
}

impl AuditSink for Audited {
    fn record(&self, entry: &AuditEntry) {
        self.0.lock().expect("no panic").push(entry.clone());
    }
}

/// Serves all services of the schema on loopback.
pub async fn serve(args: &ListenArgs) -> Served {
    let stub = Stub::default();
    let audited = Arc::new(Audited::default());
    let listener = args.bind(([127, 0, 0, 1], 0).into()).await.expect("a listener");
    let address = listener.address();
    let server = GrpcServer::new(wire::pb::DESCRIPTORS)
        .expect("descriptors")
        .with_audit(audited.clone())
        .with_service(stub.runs())
        .with_service(stub.workers())
        .with_service(RegistryServiceServer::new(Registry(stub.clone())).max_decoding_message_size(4096));
    let stop = CancellationToken::new();
    tokio::spawn(server.serve(listener, stop.clone(), Duration::ZERO));
    Served { address, stub, audited, _stop: stop.drop_guard() }
}
