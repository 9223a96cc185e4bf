//! The coordinator's process: its start, and what it takes.

use anyhow::{Context as _, bail};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Of `/proc`, on every Linux that this runs on.
const TICKS_A_SECOND: f64 = 100.0;

/// A process that is killed with its holder.
#[derive(Debug)]
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Starts the coordinator that lies beside this program, with `root` for its files. Returns its endpoint as well.
    ///
    /// # Errors
    /// When it is not there, or ends before it listens.
    pub(crate) fn coordinator(root: &Path) -> anyhow::Result<(Self, String)> {
        let program = std::env::current_exe()?.with_file_name("coordinator");
        let mut child = Command::new(&program)
            .args(["--listen", "127.0.0.1:0", "--log-level", "info", "--data-dir"])
            .arg(root.join("state"))
            .arg("--root")
            .arg(root)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("`{}` cannot be started; build it first", program.display()))?;
        let errors = child.stderr.take().context("its log is piped")?;
        let process = Self(child);
        let mut lines = BufReader::new(errors).lines();
        while let Some(line) = lines.next() {
            let line = line?;
            if let Some((_, address)) = line.split_once("coordinator listens") {
                let address = address.split_once("address=").context("it names its address")?.1.trim();
                let endpoint = format!("http://{address}");
                // A pipe that nobody reads would stop it.
                std::thread::spawn(move || {
                    let problems = lines
                        .map_while(Result::ok)
                        .filter(|line| line.contains("WARN") || line.contains("ERROR"));
                    problems.for_each(|line| eprintln!("coordinator: {line}"));
                });
                return Ok((process, endpoint));
            }
        }
        bail!("the coordinator ended before it listened")
    }

    /// Resident memory, in bytes.
    pub(crate) fn resident_bytes(&self) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))
            .context("the coordinator is gone")?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("it has no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().context("VmRSS is no number")?;
        Ok(kib * 1024)
    }

    /// Time on a processor so far.
    pub(crate) fn processor_time(&self) -> anyhow::Result<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))
            .context("the coordinator is gone")?;
        // The name, in brackets, may hold anything; user and system time are fields 14 and 15.
        let fields = text.rsplit_once(')').context("a line of `stat` has a name")?.1;
        let mut times = fields.split_whitespace().skip(11).map(str::parse::<u64>);
        let mut next =
            || times.next().context("a line of `stat` has 52 fields")?.context("times are numbers");
        Ok(Duration::from_secs_f64((next()? + next()?) as f64 / TICKS_A_SECOND))
    }
}
