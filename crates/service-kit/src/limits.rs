//! Bounds on what callers may make a server hold: connections, streams, bytes and time.

use std::time::Duration;

/// Bounds of a server; the defaults suit a coordinator of some hundred workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Connections at a time; more are closed at once
    #[arg(long, env = "ESPALIER_MAX_CONNECTIONS", value_name = "N", default_value_t = 1024,
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub max_connections: u32,
    /// Connections at a time that have not finished their TLS handshake; more wait
    #[arg(long, env = "ESPALIER_MAX_HANDSHAKES", value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub max_handshakes: u32,
    /// Longest from a connection's start to the end of its handshake, and from there to its first bytes of HTTP/2
    #[arg(long, env = "ESPALIER_HANDSHAKE_SECONDS", value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=600))]
    pub handshake_seconds: u64,
    /// Age at which a connection takes no new calls, so that its client connects anew, by the certificates of then; a
    /// call that comes at that moment may have to be repeated [default: none]
    #[arg(long, env = "ESPALIER_MAX_CONNECTION_SECONDS", value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub max_connection_seconds: Option<u64>,
    /// Streams at a time on one connection, running calls among them
    #[arg(long, env = "ESPALIER_MAX_STREAMS", value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub max_streams: u32,
    /// Calls at a time on one connection that are not answered yet; more are refused
    #[arg(long, env = "ESPALIER_MAX_CALLS", value_name = "N", default_value_t = 128,
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub max_calls: u32,
    /// Largest sum of a call's headers
    #[arg(long, env = "ESPALIER_MAX_HEADER_BYTES", value_name = "BYTES", default_value_t = 64 << 10,
          value_parser = clap::value_parser!(u32).range(4096..=1 << 20))]
    pub max_header_bytes: u32,
    /// Silence on a connection before its client is asked for a sign of life, and longest that this may take
    #[arg(long, env = "ESPALIER_KEEP_ALIVE_SECONDS", value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub keep_alive_seconds: u64,
    /// Longest that a request may take to arrive
    #[arg(long, env = "ESPALIER_REQUEST_SECONDS", value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub request_seconds: u64,
    /// Longest that a call may take to be answered, whatever deadline its client asks for
    #[arg(long, env = "ESPALIER_CALL_SECONDS", value_name = "SECONDS", default_value_t = 7200,
          value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub call_seconds: u64,
    /// Longest that a client may leave a stream's next message unread
    #[arg(long, env = "ESPALIER_STREAM_IDLE_SECONDS", value_name = "SECONDS", default_value_t = 300,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub stream_idle_seconds: u64,
}

impl Default for LimitArgs {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_handshakes: 256,
            handshake_seconds: 10,
            max_connection_seconds: None,
            max_streams: 256,
            max_calls: 128,
            max_header_bytes: 64 << 10,
            keep_alive_seconds: 10,
            request_seconds: 30,
            call_seconds: 7200,
            stream_idle_seconds: 300,
        }
    }
}

impl LimitArgs {
    pub(crate) fn handshake(&self) -> Duration {
        Duration::from_secs(self.handshake_seconds)
    }

    pub(crate) fn request(&self) -> Duration {
        Duration::from_secs(self.request_seconds)
    }

    pub(crate) fn call(&self) -> Duration {
        Duration::from_secs(self.call_seconds)
    }

    pub(crate) fn stream_idle(&self) -> Duration {
        Duration::from_secs(self.stream_idle_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        limits: LimitArgs,
    }

    #[test]
    fn the_flags_default_to_the_defaults() {
        assert_eq!(Line::parse_from(["server"]).limits, LimitArgs::default());
    }
}
