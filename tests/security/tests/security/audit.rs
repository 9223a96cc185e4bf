use prost::Message;
use security_tests::{Files, PATIENCE, call, serve};
use service_kit::access::create_token;
use service_kit::{Grant, ListenArgs, Role, TokenArgs};
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tonic::Code;
use wire::client::{ClientSecurity, TlsFiles, Token};
use wire::pb;

#[tokio::test]
async fn every_changing_call_is_told_with_who_what_and_how_it_ended() {
    let files = Files::default();
    let (anna, ben) =
        (create_token("anna", Role::Operate).unwrap(), create_token("ben", Role::Read).unwrap());
    let tokens = Some(files.write("tokens", &format!("{}\n{}", anna.line, ben.line)));
    let args = ListenArgs { tokens: TokenArgs { tokens, ..TokenArgs::default() }, ..ListenArgs::default() };
    let served = serve(&args).await;
    let url = served.url("http");
    let connection = |token: Option<&str>| {
        let token = token.map(|token| Token::new(token).unwrap());
        ClientSecurity::new(TlsFiles::default(), token, false).unwrap().lazy(&url).unwrap()
    };
    let id = |id: &str| pb::CancelRunRequest { id: id.into(), discard: false }.encode_to_vec();
    for (token, method, message) in [
        (Some(&anna.token), "CreateRun", Vec::new()),
        (Some(&anna.token), "CancelRun", id("run-1")),
        (Some(&anna.token), "ExportRun", id("run-2")),
        (Some(&anna.token), "GetRun", id("run-3")),
        (Some(&ben.token), "DeleteRun", id("run-4")),
        (None, "CancelRun", id("run-5")),
    ] {
        let path = format!("/espalier.v1.RunService/{method}");
        let _ = call(connection(token.map(String::as_str)), &path, message).await;
    }
    timeout(PATIENCE, async {
        while served.audited.entries().len() < 5 {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("five entries");
    let entries: Vec<_> = served
        .audited
        .entries()
        .into_iter()
        .map(|entry| {
            assert!(entry.peer.is_some_and(|peer| peer.ip().is_loopback()));
            let method = entry.method.rsplit('/').next().unwrap_or_default();
            (entry.principal.name, entry.principal.grant, method, entry.run_id, entry.outcome)
        })
        .collect();
    let run = |id: &str| Some(id.to_owned());
    let (anna, ben) = (Grant::Role(Role::Operate), Grant::Role(Role::Read));
    assert_eq!(
        entries,
        [
            ("anna".into(), anna, "CreateRun", run("run-7"), Code::Ok),
            ("anna".into(), anna, "CancelRun", run("run-1"), Code::Ok),
            // A stub answers without reading: nothing says which run it would have been.
            ("anna".into(), anna, "ExportRun", None, Code::Unimplemented),
            ("ben".into(), ben, "DeleteRun", None, Code::PermissionDenied),
            ("anonymous".into(), Grant::Nothing, "CancelRun", None, Code::Unauthenticated),
        ]
    );
}
