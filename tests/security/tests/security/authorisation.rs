use prost_reflect::DescriptorPool;
use security_tests::{Authority, Files, Leaf, call, client, serve};
use service_kit::access::create_token;
use service_kit::{Grant, ListenArgs, Role, TlsArgs, TokenArgs};
use tonic::Code;
use wire::client::Connection;

/// Who may call each method, written down apart from the server's table.
const READ: &[&str] = &[
    "RunService/GetRun",
    "RunService/ListRuns",
    "RunService/WatchRun",
    "RunService/ListDecisions",
    "RunService/GetKeepMask",
    "RunService/WatchImportance",
    "RunService/QueryWhatIf",
    "RunService/ListArtifacts",
    "RunService/DownloadArtifact",
    "RegistryService/ListWorkers",
    "ServerReflection/ServerReflectionInfo",
];
const OPERATE: &[&str] = &[
    "RunService/CreateRun",
    "RunService/PauseRun",
    "RunService/ResumeRun",
    "RunService/CancelRun",
    "RunService/ForkRun",
    "RunService/EvaluateRun",
    "RunService/ExportRun",
    "RegistryService/DrainWorker",
];
const ADMIN: &[&str] = &["RunService/DeleteRun"];
const WORKER: &[&str] = &["RegistryService/Register", "RegistryService/Renew", "RegistryService/Deregister"];
const OPEN: &[&str] = &["Health/Check", "Health/Watch"];
/// A stub of it never answers; the guard lets it through or not like the others of its role.
const SILENT: &str = "RunService/GetKeepMask";

fn may(caller: &str, method: &str) -> bool {
    let within = |lists: &[&[&str]]| lists.iter().any(|list| list.contains(&method));
    within(&[OPEN])
        || match caller {
            "read" => within(&[READ]),
            "operate" => within(&[READ, OPERATE]),
            "admin" => within(&[READ, OPERATE, ADMIN]),
            "internal" => within(&[WORKER]) || method.starts_with("WorkerService/"),
            "coordinator certificate" => method.starts_with("WorkerService/"),
            "worker certificate" => within(&[WORKER]),
            _ => false,
        }
}

/// Paths of all methods served, and what the lists above call them.
fn methods() -> Vec<(String, String)> {
    let mut pool = DescriptorPool::decode(wire::pb::DESCRIPTORS).unwrap();
    pool.decode_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET).unwrap();
    pool.decode_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET).unwrap();
    pool.decode_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET).unwrap();
    let named = pool.services().flat_map(|service| service.methods().collect::<Vec<_>>());
    named
        .map(|method| {
            let service = method.parent_service();
            let path = format!("/{}/{}", service.full_name(), method.name());
            (path, format!("{}/{}", service.name(), method.name()))
        })
        .collect()
}

#[tokio::test]
async fn every_caller_may_call_what_its_role_allows_and_nothing_else() {
    let (files, authority) = (Files::default(), Authority::default());
    let ca = files.write("ca.crt", &authority.pem());
    let (certificate, key) = files.identity("server", &authority, &Leaf::new(&["127.0.0.1"]));
    let tokens = ["read", "operate", "admin", "internal"].map(|name| {
        (name, create_token(name, Role::ALL.into_iter().find(|role| role.name() == name).unwrap()).unwrap())
    });
    let lines: Vec<&str> = tokens.iter().map(|(_, token)| token.line.as_str()).collect();
    let args = ListenArgs {
        tls: TlsArgs {
            tls_cert: Some(certificate),
            tls_key: Some(key),
            tls_client_ca: Some(ca.clone()),
            ..TlsArgs::default()
        },
        tokens: TokenArgs { tokens: Some(files.write("tokens", &lines.join("\n"))), ..TokenArgs::default() },
        ..ListenArgs::default()
    };
    let served = serve(&args).await;
    let url = served.url("https");
    let identity = |name: &str| Some(files.identity(name, &authority, &Leaf::new(&[name])));
    let mut callers = vec![
        ("nobody", client(&ca, None, None)),
        ("wrong token", client(&ca, None, Some("espalier_0000"))),
        ("coordinator certificate", client(&ca, identity("espalier-coordinator.ns.svc"), None)),
        ("worker certificate", client(&ca, identity("espalier-worker-3.pool.ns.svc"), None)),
        ("other certificate", client(&ca, identity("espalier-workers.ns.svc"), None)),
    ];
    callers.extend(tokens.iter().map(|(name, token)| (*name, client(&ca, None, Some(&token.token)))));
    for (caller, security) in &callers {
        let connection = security.connect(&url).await.unwrap();
        for (path, method) in methods() {
            let allowed = may(caller, &method);
            if allowed && method == SILENT {
                continue;
            }
            let code = code_of(connection.clone(), &path).await;
            if allowed {
                assert!(
                    !matches!(code, Code::Unauthenticated | Code::PermissionDenied),
                    "{caller} {path} {code}"
                );
            } else if matches!(*caller, "nobody" | "wrong token") {
                assert_eq!(code, Code::Unauthenticated, "{caller} {path}");
            } else {
                assert_eq!(code, Code::PermissionDenied, "{caller} {path}");
            }
        }
    }
    for seen in served.stub.calls() {
        assert!(!seen.authorization, "no service sees a token");
        let principal = seen.principal.unwrap();
        assert_ne!(principal.grant, Grant::Everything, "{principal:?}");
        assert_ne!(principal.grant, Grant::Nothing, "{principal:?}");
    }
}

async fn code_of(connection: Connection, path: &str) -> Code {
    match call(connection, path, Vec::new()).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}

#[tokio::test]
async fn a_method_that_does_not_exist_is_told_to_admins_alone() {
    let files = Files::default();
    let (admin, reader) = (create_token("a", Role::Admin).unwrap(), create_token("r", Role::Read).unwrap());
    let tokens = Some(files.write("tokens", &format!("{}\n{}", admin.line, reader.line)));
    let args = ListenArgs { tokens: TokenArgs { tokens, ..TokenArgs::default() }, ..ListenArgs::default() };
    let served = serve(&args).await;
    for (token, expected) in [(admin, Code::Unimplemented), (reader, Code::PermissionDenied)] {
        for path in [
            "/espalier.v1.RunService/GetRun/",
            "/espalier.v1.RunService/getrun",
            "/espalier.v1.RunService/Get%52un",
            "/espalier.v1.OtherService/GetRun",
            "//espalier.v1.RunService/GetRun",
        ] {
            let client = wire::client::ClientSecurity::new(
                wire::client::TlsFiles::default(),
                Some(wire::client::Token::new(&token.token).unwrap()),
                false,
            )
            .unwrap();
            let code = code_of(client.lazy(&served.url("http")).unwrap(), path).await;
            assert_eq!(code, expected, "{path}");
        }
    }
}

#[tokio::test]
async fn on_loopback_without_tokens_everything_is_open() {
    let served = serve(&ListenArgs::default()).await;
    let connection = wire::client::ClientSecurity::default().connect(&served.url("http")).await.unwrap();
    for (path, method) in methods() {
        if method == SILENT {
            continue;
        }
        let code = code_of(connection.clone(), &path).await;
        assert!(!matches!(code, Code::Unauthenticated | Code::PermissionDenied), "{path} {code}");
    }
}
