//! The `worker` binary as a process: flags, signals, its parent, and the logits of a folder.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(30);

fn worker() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_worker"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ESPALIER_") || name == "RUST_LOG")
    {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").canonicalize().unwrap()
}

/// Ends the process with the test, whatever happens.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < DEADLINE, "the process does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn run(mut command: Command) -> Output {
    let mut running = Running(command.spawn().unwrap());
    let status = running.wait();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    running.0.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
    running.0.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
    Output { status, stdout, stderr }
}

/// A worker that waits for a coordinator which is not there.
fn waiting_worker(folder: &Path) -> Command {
    let mut command = worker();
    command.args(["--coordinator", "http://127.0.0.1:9", "--threads", "1", "--root"]).arg(folder);
    command
}

#[test]
fn help_names_every_flag_and_its_variable() {
    let mut command = worker();
    command.arg("--help");
    let output = run(command);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for (flag, variable) in [
        ("--listen", "ESPALIER_LISTEN"),
        ("--coordinator", "ESPALIER_COORDINATOR"),
        ("--advertise", "ESPALIER_ADVERTISE"),
        ("--data-host", "ESPALIER_DATA_HOST"),
        ("--id", "ESPALIER_WORKER_ID"),
        ("--device", "ESPALIER_DEVICE"),
        ("--collectives", "ESPALIER_COLLECTIVES"),
        ("--threads", "ESPALIER_THREADS"),
        ("--root", "ESPALIER_ROOTS"),
        ("--insecure", "ESPALIER_INSECURE"),
        ("--log-format", "ESPALIER_LOG_FORMAT"),
        ("--log-level", "RUST_LOG"),
        ("--otlp-endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ("--collective-timeout-seconds", "ESPALIER_COLLECTIVE_TIMEOUT_SECONDS"),
        ("--register-timeout-seconds", "ESPALIER_REGISTER_TIMEOUT_SECONDS"),
        ("--exit-with-parent", ""),
    ] {
        assert!(text.contains(flag) && text.contains(variable), "{flag} {variable}");
    }
}

#[test]
fn what_cannot_work_ends_the_process_with_a_clear_message() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().display().to_string();
    let coordinator = ["--coordinator", "http://127.0.0.1:9", "--register-timeout-seconds", "1"];
    let cases: [(&[&str], &str); 10] = [
        (&["--root", &root], "--coordinator"),
        (&["--root", &root, "--device", "tpu"], "tpu"),
        (&["--root", &root, "--device", "cuda:999"], "CUDA"),
        (&["--root", &root, "--collectives", "nccl"], "CUDA device"),
        (&["--root", &root, "--threads", "0"], "--threads"),
        (&["--root", &root, "--listen", "nowhere"], "--listen"),
        (&[], "--root"),
        (&["--root", "/no/such/folder"], "/no/such/folder"),
        (&["--root", &root, "--listen", "0.0.0.0:0"], "--insecure"),
        (&["--root", &root], "127.0.0.1:9"),
    ];
    for (place, (arguments, part)) in cases.into_iter().enumerate() {
        let mut command = worker();
        command.args(arguments);
        if place > 0 {
            command.args(coordinator);
        }
        let started = Instant::now();
        let output = run(command);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && output.status.signal().is_none(), "{arguments:?}: {text}");
        assert!(text.contains(part), "{part}: {text}");
        assert!(!text.contains("panicked"), "{text}");
        assert!(started.elapsed() < Duration::from_secs(15), "{arguments:?}");
    }
}

#[test]
fn signals_end_the_process_in_order() {
    let folder = tempfile::tempdir().unwrap();
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut running = Running(waiting_worker(folder.path()).spawn().unwrap());
        wait_for_line(&mut running, "worker serves");
        // SAFETY: sends a signal to a child that has not been waited for, so the id is still its own.
        assert_eq!(unsafe { libc::kill(running.0.id().cast_signed(), signal) }, 0);
        let status = running.wait();
        assert_eq!(status.code(), Some(0), "{status:?}");
    }
}

/// Reads standard error until `part` is seen; the rest of it is thrown away as it comes.
fn wait_for_line(running: &mut Running, part: &str) {
    use std::io::BufRead;
    let mut lines = std::io::BufReader::new(running.0.stderr.take().unwrap()).lines();
    let found = lines.by_ref().map_while(Result::ok).any(|line| line.contains(part));
    assert!(found, "the process never said `{part}`");
    std::thread::spawn(move || lines.for_each(drop));
}

#[test]
fn a_worker_ends_with_the_process_that_started_it() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    // The shell starts the worker, says its id, and ends when its input is closed.
    let script = format!(
        "{} --coordinator http://127.0.0.1:9 --exit-with-parent --threads 1 --root {} 2>{} & echo $!; read line",
        env!("CARGO_BIN_EXE_worker"),
        folder.path().display(),
        log.display()
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut shell = Running(shell.spawn().unwrap());
    let mut first_line = String::new();
    {
        use std::io::BufRead;
        std::io::BufReader::new(shell.0.stdout.take().unwrap()).read_line(&mut first_line).unwrap();
    }
    let stat = PathBuf::from(format!("/proc/{}/stat", first_line.trim()));
    // A process that ended may stay as a zombie where nobody waits for orphans.
    let alive = || std::fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z "));
    let serves = || std::fs::read_to_string(&log).is_ok_and(|text| text.contains("worker serves"));
    wait_until("the worker serves", serves);
    assert!(alive());
    drop(shell.0.stdin.take());
    wait_until("the worker has ended", || !alive());
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_worker_of_another_parent_does_not_even_begin() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = waiting_worker(folder.path());
    command.arg("--exit-with-parent=1");
    let output = run(command);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("has ended already"), "{text}");
}

#[test]
fn logits_of_a_folder_are_written_and_variables_of_the_server_do_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let (tokens, out) = (folder.path().join("tokens.json"), folder.path().join("logits.safetensors"));
    std::fs::write(&tokens, "[[1, 2, 3], [4, 5]]").unwrap();
    let mut command = worker();
    command
        .env("ESPALIER_ROOTS", "/models")
        .env("ESPALIER_LISTEN", "0.0.0.0:7071")
        .arg("logits")
        .arg("--model")
        .arg(fixtures().join("models/gqa"))
        .arg("--tokens-file")
        .arg(&tokens)
        .arg("--out")
        .arg(&out);
    let output = run(command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = std::fs::read(&out).unwrap();
    let header_bytes = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    assert_eq!(header["logits.0"]["shape"], serde_json::json!([3, 96]));
    assert_eq!(header["logits.1"]["shape"], serde_json::json!([2, 96]));
    assert_eq!(header["logits.0"]["dtype"], "F32");

    for (model, tokens) in [(folder.path().join("none"), &tokens), (fixtures().join("models/gqa"), &out)] {
        let mut command = worker();
        command
            .arg("logits")
            .arg("--model")
            .arg(model)
            .arg("--tokens-file")
            .arg(tokens)
            .arg("--out")
            .arg(&out);
        let output = run(command);
        assert!(!output.status.success() && !output.stderr.is_empty());
    }
}
