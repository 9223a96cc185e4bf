use clap::Args;
use std::path::PathBuf;
use wire::client::{ClientSecurity, SecurityError, TlsFiles, Token};
use wire::tls;

/// How the coordinator is trusted, and what it is shown.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct SecurityArgs {
    /// Certificates (PEM) of who may sign the coordinator's; needed for https:// URLs
    #[arg(long, env = "ESPALIER_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Certificate (PEM) to show, where the coordinator asks for one
    #[arg(long, env = "ESPALIER_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Key (PEM) of --tls-cert
    #[arg(long, env = "ESPALIER_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// File with the token to send; the token itself may stand in $ESPALIER_TOKEN
    #[arg(long, env = "ESPALIER_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Send the token over http:// to another machine too
    #[arg(long, env = "ESPALIER_INSECURE", value_parser = clap::builder::BoolishValueParser::new(),
          num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub insecure: bool,
}

impl SecurityArgs {
    /// Reads the files. `token` is that of the environment, which counts where no file is given.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub(crate) fn open(&self, token: Option<&str>) -> Result<ClientSecurity, SecurityError> {
        let token = match (&self.token_file, token) {
            (Some(path), _) => Some(Token::from_file(path)?),
            (None, Some(text)) if !text.trim().is_empty() => Some(Token::new(text)?),
            (None, _) => None,
        };
        let files = TlsFiles {
            ca: self.tls_ca.clone(),
            identity: tls::pair(self.tls_cert.as_ref(), self.tls_key.as_ref())?,
        };
        ClientSecurity::new(files, token, self.insecure)
    }
}
