use security_tests::{Files, call, serve};
use service_kit::access::create_token;
use service_kit::{ListenArgs, Role, TokenArgs};
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use wire::client::{ClientSecurity, TlsFiles, Token};

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Everything that any crate logs at DEBUG, of both sides: runtime and tasks are of this thread.
#[tokio::test]
async fn no_log_line_has_a_token() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let files = Files::default();
    let known = create_token("anna", Role::Operate).unwrap();
    let unknown = create_token("eve", Role::Admin).unwrap();
    let tokens = Some(files.write("tokens", &known.line));
    let args = ListenArgs { tokens: TokenArgs { tokens, ..TokenArgs::default() }, ..ListenArgs::default() };
    let served = serve(&args).await;
    for token in [&known, &unknown] {
        let sent = Some(Token::new(&token.token).unwrap());
        let client = ClientSecurity::new(TlsFiles::default(), sent, false).unwrap();
        let connection = client.connect(&served.url("http")).await.unwrap();
        for method in ["GetRun", "CancelRun", "DeleteRun"] {
            let path = format!("/espalier.v1.RunService/{method}");
            if let Err(status) = call(connection.clone(), &path, Vec::new()).await {
                assert!(!format!("{status:?}").contains(&token.token), "{status:?}");
            }
        }
        // Someone puts the token where its hash belongs.
        files.write("tokens", &format!("{}\nanna admin {}", known.line, token.token));
        let _ = call(connection, "/espalier.v1.RunService/GetRun", Vec::new()).await;
        files.write("tokens", &known.line);
    }
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    for expected in ["audit", "anna", "changed files cannot be used", "UNAUTHENTICATED"] {
        assert!(text.to_lowercase().contains(&expected.to_lowercase()), "{expected} in {text}");
    }
    for token in [&known, &unknown] {
        let secret = token.token.strip_prefix("espalier_").unwrap();
        assert!(!text.contains(secret), "a token is in the log");
    }
}
