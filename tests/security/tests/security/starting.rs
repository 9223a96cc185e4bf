use security_tests::{Authority, Files, Leaf};
use service_kit::access::create_token;
use service_kit::{ListenArgs, ListenError, Role, TlsArgs, TokenArgs};

#[tokio::test]
async fn what_strangers_reach_needs_encryption_and_authentication() {
    let (files, authority) = (Files::default(), Authority::default());
    let ca = files.write("ca.crt", &authority.pem());
    let (certificate, key) = files.identity("server", &authority, &Leaf::new(&["127.0.0.1"]));
    let tokens = files.write("tokens", &create_token("a", Role::Read).unwrap().line);
    for (address, tls, clients, by_token, insecure, starts) in [
        ("0.0.0.0:0", false, false, false, false, false),
        ("[::]:0", false, false, false, false, false),
        ("0.0.0.0:0", true, false, false, false, false),
        ("0.0.0.0:0", false, false, true, false, false),
        ("0.0.0.0:0", true, true, false, false, true),
        ("0.0.0.0:0", true, false, true, false, true),
        ("0.0.0.0:0", false, false, false, true, true),
        ("0.0.0.0:0", false, false, true, true, true),
        ("127.0.0.1:0", false, false, false, false, true),
        ("127.0.0.1:0", true, false, false, false, true),
        ("127.0.0.1:0", false, false, true, false, true),
    ] {
        let args = ListenArgs {
            listen: Some(address.parse().unwrap()),
            insecure,
            tls: TlsArgs {
                tls_cert: tls.then(|| certificate.clone()),
                tls_key: tls.then(|| key.clone()),
                tls_client_ca: clients.then(|| ca.clone()),
                ..TlsArgs::default()
            },
            tokens: TokenArgs { tokens: by_token.then(|| tokens.clone()), ..TokenArgs::default() },
            ..ListenArgs::default()
        };
        let case = (address, tls, clients, by_token, insecure);
        match args.bind(([127, 0, 0, 1], 0).into()).await {
            Ok(_) => assert!(starts, "{case:?}"),
            Err(error) => {
                assert!(!starts && matches!(error, ListenError::NotLoopback { .. }), "{case:?}: {error}");
            }
        }
    }
}

#[tokio::test]
async fn broken_files_are_named_at_the_start() {
    let (files, authority) = (Files::default(), Authority::default());
    let (certificate, key) = files.identity("server", &authority, &Leaf::new(&["127.0.0.1"]));
    let (_, other_key) = files.identity("other", &authority, &Leaf::new(&["127.0.0.1"]));
    let broken = files.write("broken", "nothing");
    let tls = |cert, key, client_ca| TlsArgs {
        tls_cert: cert,
        tls_key: key,
        tls_client_ca: client_ca,
        ..TlsArgs::default()
    };
    let (some_cert, some_key) = (Some(certificate), Some(key));
    for (tls, tokens, word) in [
        (tls(some_cert.clone(), None, None), None, "--tls-key"),
        (tls(None, some_key.clone(), None), None, "--tls-cert"),
        (tls(None, None, Some(broken.clone())), None, "--tls-client-ca"),
        (tls(Some(broken.clone()), some_key.clone(), None), None, "broken"),
        (tls(some_cert.clone(), Some(broken.clone()), None), None, "broken"),
        (tls(some_cert.clone(), Some(other_key), None), None, "other.key"),
        (tls(some_cert.clone(), some_key.clone(), Some(broken.clone())), None, "broken"),
        (tls(some_cert, some_key, Some(files.path("missing"))), None, "missing"),
        (TlsArgs::default(), Some(broken), "line 1"),
        (TlsArgs::default(), Some(files.path("missing")), "missing"),
    ] {
        let args =
            ListenArgs { tls, tokens: TokenArgs { tokens, ..TokenArgs::default() }, ..ListenArgs::default() };
        let error = args.bind(([127, 0, 0, 1], 0).into()).await.expect_err(word);
        let text = wire::status::chain(&error);
        assert!(text.contains(word), "{word} in {text}");
    }
}
