use security_tests::{Authority, Files, Leaf, PATIENCE, call, client, serve};
use service_kit::{ClientAuth, Grant, ListenArgs, Process, TlsArgs};
use std::path::PathBuf;
use tokio::time::timeout;
use tonic::{Code, Status};
use wire::client::ClientSecurity;
use wire::status::reason;

const PATH: &str = "/espalier.v1.RunService/GetRun";
const COMMAND: &str = "/espalier.v1.WorkerService/Load";

async fn attempt(client: &ClientSecurity, url: &str, path: &str) -> Result<(), Status> {
    let connected = timeout(PATIENCE, client.connect(url)).await.expect("an answer in time");
    let connection = connected.map_err(|error| Status::unavailable(wire::status::chain(&error)))?;
    timeout(PATIENCE, call(connection, path, Vec::new())).await.expect("an answer in time").map(drop)
}

fn server(files: &Files, authority: &Authority, leaf: &Leaf, clients: Option<PathBuf>) -> ListenArgs {
    let (certificate, key) = files.identity("server", authority, leaf);
    let tls = TlsArgs {
        tls_cert: Some(certificate),
        tls_key: Some(key),
        tls_client_ca: clients,
        ..TlsArgs::default()
    };
    ListenArgs { tls, ..ListenArgs::default() }
}

#[tokio::test]
async fn a_server_that_cannot_prove_itself_is_not_talked_to() {
    let (files, authority, other) = (Files::default(), Authority::default(), Authority::default());
    let ca = files.write("ca.crt", &authority.pem());
    let good = || Leaf::new(&["127.0.0.1"]);
    for (name, signer, leaf, works) in [
        ("good", &authority, good(), true),
        ("expired", &authority, good().expired(), false),
        ("not yet valid", &authority, good().not_yet_valid(), false),
        ("another's name", &authority, Leaf::new(&["127.0.0.2", "localhost"]), false),
        ("signed by another", &other, good(), false),
    ] {
        let served = serve(&server(&files, signer, &leaf, None)).await;
        let done = attempt(&client(&ca, None, None), &served.url("https"), PATH).await.unwrap_err();
        assert_eq!(done.code() == Code::Unimplemented, works, "{name}: {done:?}");
        assert_eq!(!served.stub.calls().is_empty(), works, "{name}");
    }
}

#[tokio::test]
async fn a_client_that_cannot_prove_itself_calls_nothing() {
    let (files, authority, other) = (Files::default(), Authority::default(), Authority::default());
    let ca = files.write("ca.crt", &authority.pem());
    let served = serve(&server(&files, &authority, &Leaf::new(&["127.0.0.1"]), Some(ca.clone()))).await;
    let good = || Leaf::new(&["espalier-coordinator"]);
    for (name, signer, leaf, expected) in [
        ("good", &authority, Some(good()), Some(Code::Unimplemented)),
        ("expired", &authority, Some(good().expired()), None),
        ("not yet valid", &authority, Some(good().not_yet_valid()), None),
        ("signed by another", &other, Some(good()), None),
        ("none", &authority, None, None),
        ("another's name", &authority, Some(Leaf::new(&["someone"])), Some(Code::PermissionDenied)),
        ("a worker's name", &authority, Some(Leaf::new(&["espalier-worker"])), Some(Code::PermissionDenied)),
    ] {
        let before = served.stub.calls().len();
        let identity = leaf.map(|leaf| files.identity("client", signer, &leaf));
        let status = attempt(&client(&ca, identity, None), &served.url("https"), COMMAND).await.unwrap_err();
        match expected {
            Some(code) => assert_eq!(status.code(), code, "{name}: {status:?}"),
            // Ended in the handshake: no answer of ours.
            None => {
                assert_eq!((status.code() == Code::Unimplemented, reason(&status)), (false, None), "{name}")
            }
        }
        let reached = served.stub.calls().len() > before;
        assert_eq!(reached, expected == Some(Code::Unimplemented), "{name}");
    }
}

#[tokio::test]
async fn a_process_may_be_named_by_a_uri() {
    let (files, authority) = (Files::default(), Authority::default());
    let ca = files.write("ca.crt", &authority.pem());
    let mut args = server(&files, &authority, &Leaf::new(&["127.0.0.1"]), Some(ca.clone()));
    args.tls.tls_coordinator_name = Some("spiffe://cluster/ns/espalier/sa/coordinator".into());
    args.tls.tls_client_auth = Some(ClientAuth::Required);
    let served = serve(&args).await;
    for (uri, expected) in [
        ("spiffe://cluster/ns/espalier/sa/coordinator", Code::Unimplemented),
        ("spiffe://cluster/ns/espalier/sa/coordinator2", Code::PermissionDenied),
    ] {
        let identity = files.identity("client", &authority, &Leaf::new(&["any"]).with_uri(uri));
        let done = attempt(&client(&ca, Some(identity), None), &served.url("https"), COMMAND).await;
        assert_eq!(done.unwrap_err().code(), expected, "{uri}");
    }
    let principal = served.stub.calls()[0].principal.clone().unwrap();
    assert_eq!(principal.grant, Grant::Process(Process::Coordinator));
}

#[tokio::test]
async fn plain_text_and_tls_do_not_mix() {
    let (files, authority) = (Files::default(), Authority::default());
    let ca = files.write("ca.crt", &authority.pem());
    let encrypted = serve(&server(&files, &authority, &Leaf::new(&["127.0.0.1"]), None)).await;
    let plain = serve(&ListenArgs::default()).await;
    let status = attempt(&ClientSecurity::default(), &encrypted.url("http"), PATH).await.unwrap_err();
    assert_ne!(status.code(), Code::Unimplemented, "{status:?}");
    let status = attempt(&client(&ca, None, None), &plain.url("https"), PATH).await.unwrap_err();
    assert_ne!(status.code(), Code::Unimplemented, "{status:?}");
    assert!(encrypted.stub.calls().is_empty() && plain.stub.calls().is_empty());
    // A client told to encrypt is not talked out of it by a URL.
    let status = attempt(&client(&ca, None, None), &plain.url("http"), PATH).await.unwrap_err();
    assert!(status.message().contains("use https://"), "{status:?}");
}
