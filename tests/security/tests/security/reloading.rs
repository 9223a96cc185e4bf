use security_tests::{Authority, Files, Leaf, call, client, serve};
use service_kit::access::create_token;
use service_kit::{ListenArgs, Role, TlsArgs, TokenArgs};
use tonic::Code;
use wire::client::{ClientSecurity, TlsFiles, Token};

const READ: &str = "/espalier.v1.RunService/GetRun";
const COMMAND: &str = "/espalier.v1.WorkerService/Load";

#[tokio::test]
async fn new_handshakes_show_the_new_certificate_and_a_broken_one_changes_nothing() {
    let (files, old, new) = (Files::default(), Authority::default(), Authority::default());
    let (old_ca, new_ca) = (files.write("old.ca", &old.pem()), files.write("new.ca", &new.pem()));
    let leaf = Leaf::new(&["127.0.0.1"]);
    let (certificate, key) = files.identity("server", &old, &leaf);
    let tls = TlsArgs { tls_cert: Some(certificate), tls_key: Some(key), ..TlsArgs::default() };
    let served = serve(&ListenArgs { tls, ..ListenArgs::default() }).await;
    let (by_old, by_new) = (client(&old_ca, None, None), client(&new_ca, None, None));
    let standing = by_old.connect(&served.url("https")).await.unwrap();
    assert!(by_new.connect(&served.url("https")).await.is_err());
    // Half of a rotation: the certificate without its key, then rubbish.
    let (certificate, key) = new.sign(&leaf);
    for half in [certificate.as_str(), "rubbish", ""] {
        files.write("server.crt", half);
        assert!(by_old.connect(&served.url("https")).await.is_ok(), "{half}");
        assert!(by_new.connect(&served.url("https")).await.is_err(), "{half}");
    }
    files.write("server.crt", &certificate);
    files.write("server.key", &key);
    assert!(by_new.connect(&served.url("https")).await.is_ok());
    assert!(by_old.connect(&served.url("https")).await.is_err());
    let status = call(standing, READ, Vec::new()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "what stands goes on");
}

#[tokio::test]
async fn a_client_shows_its_new_certificate_when_it_connects_again() {
    let (files, authority) = (Files::default(), Authority::default());
    let ca = files.write("ca.crt", &authority.pem());
    let (certificate, key) = files.identity("server", &authority, &Leaf::new(&["127.0.0.1"]));
    let tls = TlsArgs {
        tls_cert: Some(certificate),
        tls_key: Some(key),
        tls_client_ca: Some(ca.clone()),
        ..TlsArgs::default()
    };
    let served = serve(&ListenArgs { tls, ..ListenArgs::default() }).await;
    let identity = files.identity("client", &authority, &Leaf::new(&["someone"]));
    let client = client(&ca, Some(identity), None);
    for (name, expected) in
        [("someone", Code::PermissionDenied), ("espalier-coordinator", Code::Unimplemented)]
    {
        files.identity("client", &authority, &Leaf::new(&[name]));
        let connection = client.connect(&served.url("https")).await.unwrap();
        assert_eq!(call(connection, COMMAND, Vec::new()).await.unwrap_err().code(), expected, "{name}");
    }
}

#[tokio::test]
async fn tokens_come_and_go_without_a_restart() {
    let files = Files::default();
    let (first, second) = (create_token("a", Role::Read).unwrap(), create_token("b", Role::Read).unwrap());
    let tokens = Some(files.write("tokens", &first.line));
    let args = ListenArgs { tokens: TokenArgs { tokens, ..TokenArgs::default() }, ..ListenArgs::default() };
    let served = serve(&args).await;
    let sent = files.write("token", &first.token);
    let token = Some(Token::from_file(&sent).unwrap());
    let client = ClientSecurity::new(TlsFiles::default(), token, false).unwrap();
    let connection = client.connect(&served.url("http")).await.unwrap();
    let (known, unknown) = (Code::Unimplemented, Code::Unauthenticated);
    for (accepted, shown, expected) in [
        (Some(&first.line), Some(&first.token), known),
        (Some(&second.line), None, unknown),
        (None, Some(&second.token), known),
        // A file that means nothing leaves those in force that were.
        (Some(&second.token), None, known),
        (Some(&String::new()), None, unknown),
    ] {
        if let Some(line) = accepted {
            files.write("tokens", line);
        }
        if let Some(token) = shown {
            files.write("token", token);
        }
        let code = call(connection.clone(), READ, Vec::new()).await.unwrap_err().code();
        assert_eq!(code, expected, "{accepted:?} {shown:?}");
    }
}
