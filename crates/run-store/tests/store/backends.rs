//! The two back ends, each in a folder of its own.

use run_store::{RunStore, StoreOptions, StoreUrl};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A store that a test may open as often as it likes.
pub(crate) struct Backend {
    pub(crate) url: StoreUrl,
    _folder: Option<TempDir>,
}

impl Backend {
    pub(crate) fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { url: StoreUrl::file(folder.path().join("espalier.db")), _folder: Some(folder) }
    }

    /// A database of its own in the one server of the tests.
    pub(crate) fn postgres(name: &str) -> Self {
        let server = server();
        server.sql("postgres", &format!("CREATE DATABASE {name}"));
        let url = format!("postgres://postgres@127.0.0.1:{}/{name}", server.port);
        Self { url: url.parse().unwrap(), _folder: None }
    }

    pub(crate) async fn open(&self) -> RunStore {
        RunStore::open(&self.url, StoreOptions { deadline: Duration::from_secs(20) }).await.unwrap()
    }
}

struct Server {
    programs: PathBuf,
    port: u16,
}

/// Started once, and ended by the kernel together with the tests.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let programs = programs();
        // The server refuses to run as root: it runs as `postgres`, whom Debian's package makes.
        let folder = tempfile::Builder::new().prefix("espalier-pg-").tempdir().unwrap().keep();
        let data = folder.join("data");
        if is_root() {
            run(Command::new("chown").arg("postgres").arg(&folder));
        }
        run(as_user(&programs.join("initdb")).args(["--auth=trust", "--username=postgres", "-D"]).arg(&data));
        let port = free_port();
        let mut command = as_user(&programs.join("postgres"));
        command.arg("-D").arg(&data).args(["-p", &port.to_string(), "-h", "127.0.0.1", "-k"]).arg(&folder);
        command.stdout(Stdio::null()).stderr(fs::File::create(folder.with_extension("log")).unwrap());
        // The kernel's signal follows the thread that started it, so that one must live as long as the tests.
        std::thread::spawn(move || {
            let _process = command.spawn();
            loop {
                std::thread::park();
            }
        });
        let server = Server { programs, port };
        let give_up = Instant::now() + Duration::from_secs(60);
        while !server.answers() {
            assert!(
                Instant::now() < give_up,
                "PostgreSQL did not start; its log is beside {}",
                folder.display()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    })
}

impl Server {
    fn answers(&self) -> bool {
        let mut command = Command::new(self.programs.join("pg_isready"));
        command.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]);
        command.status().is_ok_and(|status| status.success())
    }

    fn sql(&self, database: &str, statement: &str) {
        let mut command = Command::new(self.programs.join("psql"));
        command.args(["-q", "-h", "127.0.0.1", "-U", "postgres", "-p", &self.port.to_string()]);
        run(command.args(["-d", database, "-c", statement]));
    }
}

/// Where Debian puts the programs.
fn programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|entry| entry.path().join("bin")).find(|bin| bin.join("postgres").is_file());
    found.unwrap_or_else(|| panic!("PostgreSQL is missing; run `apt-get install postgresql`"))
}

/// The program, told to end with us, as a user whom it accepts.
fn as_user(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "INT"]);
    if is_root() {
        command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]);
    }
    command.arg(program);
    command
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| {
        use std::os::unix::fs::MetadataExt;
        metadata.uid() == 0
    })
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}
