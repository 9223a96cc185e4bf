//! The run that a message is about, read from its first bytes without decoding the rest.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// Enough for an id that stands first, as all of ours do.
const MOST_BYTES: usize = 1024;
const MOST_ID_BYTES: usize = 128;
/// Compression flag and length of a gRPC message.
const PREFIX_BYTES: usize = 5;

/// The first bytes of a gRPC body.
#[derive(Debug, Default)]
pub(crate) struct Opening {
    bytes: Vec<u8>,
}

impl Opening {
    pub(crate) fn take(&mut self, bytes: &[u8]) {
        let room = MOST_BYTES.saturating_sub(self.bytes.len());
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// The text that lies at `fields`, each number a message within the one before.
    pub(crate) fn id(&self, fields: &[u32]) -> Option<String> {
        let (prefix, mut rest) = self.bytes.split_at_checked(PREFIX_BYTES)?;
        if prefix[0] != 0 {
            return None;
        }
        for (depth, &field) in fields.iter().enumerate() {
            let bytes = entry(rest, field)?;
            if depth + 1 == fields.len() {
                let (length, text) = bytes;
                let text = std::str::from_utf8(text.get(..length)?).ok()?;
                let fits = !text.is_empty() && text.len() <= MOST_ID_BYTES;
                return (fits && text.bytes().all(|byte| byte.is_ascii_graphic())).then(|| text.to_owned());
            }
            rest = bytes.1;
        }
        None
    }
}

/// Length of a field, and what there is from its start on.
fn entry(mut rest: &[u8], field: u32) -> Option<(usize, &[u8])> {
    while !rest.is_empty() {
        let (tag, kind) = decode_key(&mut rest).ok()?;
        if tag == field && kind == WireType::LengthDelimited {
            return Some((usize::try_from(decode_varint(&mut rest).ok()?).ok()?, rest));
        }
        skip_field(kind, tag, &mut rest, DecodeContext::default()).ok()?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use wire::pb;

    fn opening(message: &impl Message) -> Opening {
        let mut bytes = vec![0];
        bytes.extend_from_slice(&(message.encoded_len() as u32).to_be_bytes());
        bytes.extend_from_slice(&message.encode_to_vec());
        let mut opening = Opening::default();
        bytes.chunks(7).for_each(|chunk| opening.take(chunk));
        opening
    }

    #[test]
    fn the_run_is_found_in_requests_and_answers() {
        let cancel = pb::CancelRunRequest { id: "run-1".into(), discard: true };
        assert_eq!(opening(&cancel).id(&[1]).as_deref(), Some("run-1"));
        let run = pb::Run { id: "run-2".into(), status_message: "x".repeat(100_000), ..pb::Run::default() };
        let created = pb::CreateRunResponse { run: Some(run) };
        assert_eq!(opening(&created).id(&[1, 1]).as_deref(), Some("run-2"));
    }

    #[test]
    fn what_is_no_id_is_left_out() {
        for id in ["", "two\nlines", "\u{7}", &"x".repeat(500), &"x".repeat(5000)] {
            let cancel = pb::CancelRunRequest { id: id.into(), discard: false };
            assert_eq!(opening(&cancel).id(&[1]), None, "{id:?}");
        }
        for bytes in
            [&[][..], &[0, 0, 0], &[1, 0, 0, 0, 3, 0x0a, 1, b'a'], &[0, 0, 0, 0, 9, 0x0a, 0xff], &[0xff; 40]]
        {
            let mut opening = Opening::default();
            opening.take(bytes);
            assert_eq!(opening.id(&[1]), None, "{bytes:?}");
        }
    }
}
