use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use std::time::Duration;
use time::OffsetDateTime;

/// Signs certificates.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

/// What a certificate says.
#[derive(Debug, Clone)]
pub struct Leaf {
    names: Vec<String>,
    uri: Option<String>,
    from: OffsetDateTime,
    until: OffsetDateTime,
}

const HOUR: Duration = Duration::from_secs(3600);

impl Leaf {
    /// A certificate of today for DNS names and addresses.
    #[must_use]
    pub fn new(names: &[&str]) -> Self {
        let now = OffsetDateTime::now_utc();
        let names = names.iter().map(|&name| name.to_owned()).collect();
        Self { names, uri: None, from: now - HOUR, until: now + HOUR }
    }

    #[must_use]
    pub fn with_uri(self, uri: &str) -> Self {
        Self { uri: Some(uri.to_owned()), ..self }
    }

    #[must_use]
    pub fn expired(self) -> Self {
        let now = OffsetDateTime::now_utc();
        Self { from: now - 2 * HOUR, until: now - HOUR, ..self }
    }

    #[must_use]
    pub fn not_yet_valid(self) -> Self {
        let now = OffsetDateTime::now_utc();
        Self { from: now + HOUR, until: now + 2 * HOUR, ..self }
    }
}

impl Default for Authority {
    fn default() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self { issuer: CertifiedIssuer::self_signed(params, key).expect("a certificate") }
    }
}

impl Authority {
    #[must_use]
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate and its key in PEM.
    #[must_use]
    pub fn sign(&self, leaf: &Leaf) -> (String, String) {
        let mut params = CertificateParams::new(leaf.names.clone()).expect("good names");
        if let Some(uri) = &leaf.uri {
            params.subject_alt_names.push(SanType::URI(uri.as_str().try_into().expect("an ASCII URI")));
        }
        (params.not_before, params.not_after) = (leaf.from, leaf.until);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }
}
