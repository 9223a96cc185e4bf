//! What the ranks of a group need to find each other, as the bytes that go through the coordinator.

use super::nccl::{UNIQUE_ID_BYTES, UniqueId};
use crate::fault::{Fault, Result};

const NCCL: &[u8] = b"nccl:";

/// Where and by which library a group meets; rank 0 decides it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Meeting {
    /// `host:port` of a store.
    Gloo { host: String, port: u16 },
    /// `nccl:` and the unique id's bytes.
    Nccl(UniqueId),
}

impl Meeting {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Gloo { host, port } => format!("{host}:{port}").into_bytes(),
            Self::Nccl(id) => [NCCL, id.0.as_slice()].concat(),
        }
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(bytes);
        let address =
            text.rsplit_once(':').and_then(|(host, port)| Some((host.to_owned(), port.parse::<u16>().ok()?)));
        // A host may be called `nccl`; then digits follow, and not an id.
        if let (Some(id), None) = (bytes.strip_prefix(NCCL), &address) {
            let id = <[u8; UNIQUE_ID_BYTES]>::try_from(id).map_err(|_| {
                Fault::Refused(format!(
                    "an NCCL rendezvous holds an id of {UNIQUE_ID_BYTES} bytes, this one has {}",
                    id.len()
                ))
            })?;
            return Ok(Self::Nccl(UniqueId(id)));
        }
        match address {
            Some((host, port)) if !host.is_empty() => Ok(Self::Gloo { host, port }),
            Some(_) | None => Err(Fault::Refused(format!(
                "rendezvous `{}` is neither `host:port` nor an NCCL id",
                text.escape_debug()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meeting_survives_its_encoding() {
        let mut id = [0; UNIQUE_ID_BYTES];
        id.iter_mut().zip(0u8..).for_each(|(byte, value)| *byte = value.wrapping_mul(37));
        for meeting in [
            Meeting::Gloo { host: "10.0.0.7".into(), port: 4711 },
            Meeting::Gloo { host: "fe80::1".into(), port: 1 },
            Meeting::Gloo { host: "nccl".into(), port: 80 },
            Meeting::Nccl(UniqueId(id)),
            Meeting::Nccl(UniqueId([0; UNIQUE_ID_BYTES])),
        ] {
            assert_eq!(Meeting::parse(&meeting.to_bytes()).unwrap(), meeting);
        }
    }

    #[test]
    fn bytes_that_are_no_meeting_are_refused_with_what_they_are() {
        let short = [NCCL, &[7; UNIQUE_ID_BYTES - 1]].concat();
        let long = [NCCL, &[7; UNIQUE_ID_BYTES + 1]].concat();
        for (bytes, problem) in [
            (short.as_slice(), "127"),
            (long.as_slice(), "129"),
            (NCCL, "this one has 0"),
            (b"".as_slice(), "neither"),
            (b"host".as_slice(), "neither"),
            (b":80".as_slice(), "neither"),
            (b"host:65536".as_slice(), "neither"),
            (b"\xff\x00".as_slice(), "neither"),
        ] {
            match Meeting::parse(bytes) {
                Err(Fault::Refused(text)) => assert!(text.contains(problem), "{text}"),
                other => panic!("{bytes:?} gave {other:?}"),
            }
        }
    }
}
