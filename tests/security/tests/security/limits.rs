use http_body::Frame;
use security_tests::{Authority, Files, Leaf, PATIENCE, call, client, serve, unread_stream};
use service_kit::{LimitArgs, ListenArgs, TlsArgs};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{Body as HttpBody, Bytes};
use tonic::{Code, Status};
use tower::{Service, ServiceExt};
use wire::client::{ClientSecurity, Connection, lazy_channel};
use wire::status::{Reason, reason};

const READ: &str = "/espalier.v1.RunService/GetRun";

async fn plain(limits: LimitArgs) -> (security_tests::Served, Connection) {
    let served = serve(&ListenArgs { limits, ..ListenArgs::default() }).await;
    let connection = ClientSecurity::default().connect(&served.url("http")).await.unwrap();
    (served, connection)
}

/// Whether the other side ends a connection that says nothing more.
async fn is_ended(socket: &mut TcpStream, within: Duration) -> bool {
    let mut bytes = [0; 1024];
    timeout(within, async { while socket.read(&mut bytes).await.is_ok_and(|read| read > 0) {} }).await.is_ok()
}

#[tokio::test]
async fn slow_handshakes_hold_up_no_other_and_end() {
    let (files, authority) = (Files::default(), Authority::default());
    let ca = files.write("ca.crt", &authority.pem());
    let (certificate, key) = files.identity("server", &authority, &Leaf::new(&["127.0.0.1"]));
    let tls = TlsArgs { tls_cert: Some(certificate), tls_key: Some(key), ..TlsArgs::default() };
    let limits = LimitArgs { handshake_seconds: 1, ..LimitArgs::default() };
    let served = serve(&ListenArgs { tls, limits, ..ListenArgs::default() }).await;
    let mut slow = Vec::new();
    for _ in 0..50 {
        let mut socket = TcpStream::connect(served.address).await.unwrap();
        // The start of a TLS record that never goes on.
        socket.write_all(&[0x16, 3, 1, 2, 0]).await.unwrap();
        slow.push(socket);
    }
    let began = Instant::now();
    let connection = client(&ca, None, None).connect(&served.url("https")).await.unwrap();
    assert_eq!(call(connection, READ, Vec::new()).await.unwrap_err().code(), Code::Unimplemented);
    assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
    for socket in &mut slow {
        assert!(is_ended(socket, PATIENCE).await);
    }
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let (served, connection) = plain(LimitArgs { handshake_seconds: 1, ..LimitArgs::default() }).await;
    for start in ["", "PRI * HTTP/2.0"] {
        let mut socket = TcpStream::connect(served.address).await.unwrap();
        socket.write_all(start.as_bytes()).await.unwrap();
        assert!(is_ended(&mut socket, PATIENCE).await, "{start:?}");
    }
    // The limit is on the start alone.
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(call(connection, READ, Vec::new()).await.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_until_others_end() {
    let (served, connection) = plain(LimitArgs { max_connections: 2, ..LimitArgs::default() }).await;
    let second = TcpStream::connect(served.address).await.unwrap();
    sleep(Duration::from_millis(100)).await;
    let mut third = TcpStream::connect(served.address).await.unwrap();
    assert!(is_ended(&mut third, Duration::from_secs(2)).await);
    assert_eq!(call(connection, READ, Vec::new()).await.unwrap_err().code(), Code::Unimplemented);
    drop(second);
    sleep(Duration::from_millis(100)).await;
    let again = ClientSecurity::default().connect(&served.url("http")).await.unwrap();
    assert_eq!(call(again, READ, Vec::new()).await.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test]
async fn calls_beyond_the_limit_of_a_connection_are_refused() {
    let (_served, connection) = plain(LimitArgs { max_calls: 2, ..LimitArgs::default() }).await;
    let hanging: Vec<_> = (0..2)
        .map(|_| tokio::spawn(call(connection.clone(), "/espalier.v1.RunService/GetKeepMask", Vec::new())))
        .collect();
    sleep(Duration::from_millis(200)).await;
    let status = call(connection, READ, Vec::new()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    hanging.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_connection_that_grew_old_is_made_anew_by_the_certificates_of_then() {
    let (files, authority) = (Files::default(), Authority::default());
    let ca = files.write("ca.crt", &authority.pem());
    let (certificate, key) = files.identity("server", &authority, &Leaf::new(&["127.0.0.1"]));
    let tls = TlsArgs {
        tls_cert: Some(certificate),
        tls_key: Some(key),
        tls_client_ca: Some(ca.clone()),
        ..TlsArgs::default()
    };
    let limits = LimitArgs { max_connection_seconds: Some(1), ..LimitArgs::default() };
    let served = serve(&ListenArgs { tls, limits, ..ListenArgs::default() }).await;
    let identity = files.identity("client", &authority, &Leaf::new(&["someone"]));
    let connection = client(&ca, Some(identity), None).connect(&served.url("https")).await.unwrap();
    let command = || call(connection.clone(), "/espalier.v1.WorkerService/Load", Vec::new());
    assert_eq!(command().await.unwrap_err().code(), Code::PermissionDenied);
    files.identity("client", &authority, &Leaf::new(&["espalier-coordinator"]));
    assert_eq!(command().await.unwrap_err().code(), Code::PermissionDenied, "the connection is the old one");
    timeout(PATIENCE, async {
        while command().await.unwrap_err().code() != Code::Unimplemented {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("a new connection in time");
}

#[tokio::test]
async fn messages_and_headers_that_are_too_large_are_refused() {
    let (served, connection) = plain(LimitArgs { max_header_bytes: 4096, ..LimitArgs::default() }).await;
    let path = "/espalier.v1.RegistryService/Renew";
    let status = call(connection, path, vec![0; 5000]).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    // A length is believed before the bytes are there: 4 GiB are refused, not waited for.
    let (status, _) = raw(&served.url("http"), path, &[], endless(&[0, 0xff, 0xff, 0xff, 0xff, 1])).await;
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    let header = "x".repeat(20_000);
    let (status, _) = raw(&served.url("http"), path, &[("x-large", &header)], whole(&[0; 5])).await;
    assert_ne!(status.code(), Code::Unimplemented, "{status:?}");
    assert!(served.stub.calls().is_empty());
}

/// Bytes, and then nothing for ever, or the end.
struct Slow {
    bytes: Option<Vec<u8>>,
    ends: bool,
}

fn endless(bytes: &[u8]) -> Slow {
    Slow { bytes: Some(bytes.to_vec()), ends: false }
}

fn whole(bytes: &[u8]) -> Slow {
    Slow { bytes: Some(bytes.to_vec()), ends: true }
}

impl HttpBody for Slow {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.bytes.take() {
            Some(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes.into())))),
            None if self.ends => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

/// Sends a body as it is; gives the status and how long it took.
async fn raw(url: &str, path: &str, headers: &[(&str, &str)], body: Slow) -> (Status, Duration) {
    let mut request = Request::post(format!("{url}{path}")).header("content-type", "application/grpc");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Body::new(body)).unwrap();
    let mut channel = lazy_channel(url).unwrap();
    let began = Instant::now();
    let answer = channel.ready().await.unwrap().call(request);
    let answered: Result<Response<Body>, _> = timeout(PATIENCE, answer).await.expect("an answer in time");
    let status = match answered {
        Ok(response) => Status::from_header_map(response.headers()).unwrap_or_else(|| {
            Status::unknown(format!("status {} without a gRPC status", response.status()))
        }),
        Err(error) => Status::unavailable(error.to_string()),
    };
    (status, began.elapsed())
}

#[tokio::test]
async fn a_request_that_never_ends_hits_a_deadline() {
    let (served, _) = plain(LimitArgs { request_seconds: 1, ..LimitArgs::default() }).await;
    for path in ["/espalier.v1.RegistryService/Renew", "/espalier.v1.RunService/CancelRun"] {
        let body = endless(&[0, 0, 0, 0, 9, 1]);
        let (status, took) = raw(&served.url("http"), path, &[], body).await;
        assert_eq!(reason(&status), Some(Reason::DeadlineExceeded), "{path}: {status:?}");
        assert!(took < Duration::from_secs(3), "{took:?}");
    }
}

#[tokio::test]
async fn a_call_without_a_deadline_ends_by_the_servers() {
    let (_served, connection) = plain(LimitArgs { call_seconds: 1, ..LimitArgs::default() }).await;
    let path = "/espalier.v1.RunService/GetKeepMask";
    let status = call(connection, path, Vec::new()).await.unwrap_err();
    assert_eq!(reason(&status), Some(Reason::DeadlineExceeded), "{status:?}");
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_little_and_not_for_long() {
    let (served, connection) = plain(LimitArgs { stream_idle_seconds: 1, ..LimitArgs::default() }).await;
    let mut stream =
        unread_stream(connection.clone(), "/espalier.v1.RunService/WatchRun", Vec::new()).await.unwrap();
    assert!(stream.message().await.unwrap().is_some());
    sleep(Duration::from_millis(500)).await;
    assert!(!served.stub.stream_dropped());
    let streamed = served.stub.streamed_bytes();
    // The client's window of 2 MiB is full, and the server's buffer.
    assert!(streamed < 3 << 20, "{streamed} bytes for a reader that does not read");
    sleep(Duration::from_millis(2500)).await;
    assert!(served.stub.stream_dropped(), "its handler must be gone");
    assert_eq!(served.stub.streamed_bytes(), streamed);
    // The connection lives on, and the stream ends with the reason.
    assert_eq!(call(connection, READ, Vec::new()).await.unwrap_err().code(), Code::Unimplemented);
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream must not look complete"),
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&status), Some(Reason::DeadlineExceeded), "{status:?}");
}

#[tokio::test]
async fn a_reader_that_reads_slowly_is_not_cut_off() {
    let (served, connection) = plain(LimitArgs { stream_idle_seconds: 1, ..LimitArgs::default() }).await;
    let mut stream = unread_stream(connection, "/espalier.v1.RunService/WatchRun", Vec::new()).await.unwrap();
    for _ in 0..25 {
        for _ in 0..8 {
            assert!(stream.message().await.unwrap().is_some());
        }
        sleep(Duration::from_millis(100)).await;
    }
    assert!(!served.stub.stream_dropped());
}
