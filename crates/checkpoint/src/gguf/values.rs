//! Metadata values, left in the file until they are asked for: an array costs no memory before it is needed.

/// Type tags of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scalar {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl Scalar {
    pub(super) fn from_tag(tag: u32) -> Option<Self> {
        Some(match tag {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    pub(super) fn byte_width(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64)
    }

    /// `bytes` has [`Scalar::byte_width`] bytes; the value is sign-extended. `None` for floats.
    fn integer(self, bytes: &[u8]) -> Option<i128> {
        if self.is_float() {
            return None;
        }
        let mut wide = [0; 16];
        wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
        let unsigned = i128::from_le_bytes(wide);
        let bits = 8 * bytes.len() as u32;
        let is_signed = matches!(self, Self::I8 | Self::I16 | Self::I32 | Self::I64);
        Some(match is_signed && unsigned >> (bits - 1) == 1 {
            true => unsigned - (1 << bits),
            false => unsigned,
        })
    }

    fn number(self, bytes: &[u8]) -> Option<f64> {
        match self {
            Self::F32 => Some(f64::from(f32::from_le_bytes(bytes.try_into().ok()?))),
            Self::F64 => Some(f64::from_le_bytes(bytes.try_into().ok()?)),
            Self::U8
            | Self::I8
            | Self::U16
            | Self::I16
            | Self::U32
            | Self::I32
            | Self::Bool
            | Self::U64
            | Self::I64 => self.integer(bytes).map(|integer| integer as f64),
        }
    }
}

/// A metadata value, borrowed from the mapped file. Its extent has been checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    Scalar {
        kind: Scalar,
        bytes: &'a [u8],
    },
    Text(&'a [u8]),
    /// `bytes` holds `count` elements of `kind`, close together.
    Scalars {
        kind: Scalar,
        bytes: &'a [u8],
    },
    /// `count` strings, each with its length in 8 bytes before it.
    Texts {
        count: usize,
        bytes: &'a [u8],
    },
}

impl<'a> Value<'a> {
    pub(super) fn as_u64(self) -> Option<u64> {
        match self {
            Self::Scalar { kind, bytes } => u64::try_from(kind.integer(bytes)?).ok(),
            Self::Text(_) | Self::Scalars { .. } | Self::Texts { .. } => None,
        }
    }

    pub(super) fn as_f64(self) -> Option<f64> {
        match self {
            Self::Scalar { kind, bytes } => kind.number(bytes),
            Self::Text(_) | Self::Scalars { .. } | Self::Texts { .. } => None,
        }
    }

    pub(super) fn as_bool(self) -> Option<bool> {
        match self {
            Self::Scalar { kind: Scalar::Bool, bytes } => Some(bytes != [0]),
            Self::Scalar { .. } | Self::Text(_) | Self::Scalars { .. } | Self::Texts { .. } => None,
        }
    }

    pub(super) fn as_text(self) -> Option<&'a str> {
        match self {
            Self::Text(bytes) => std::str::from_utf8(bytes).ok(),
            Self::Scalar { .. } | Self::Scalars { .. } | Self::Texts { .. } => None,
        }
    }

    pub(super) fn as_integers(self) -> Option<Vec<i128>> {
        match self {
            Self::Scalars { kind, bytes } => {
                bytes.chunks_exact(kind.byte_width()).map(|element| kind.integer(element)).collect()
            }
            Self::Scalar { .. } | Self::Text(_) | Self::Texts { .. } => None,
        }
    }

    pub(super) fn as_numbers(self) -> Option<Vec<f64>> {
        match self {
            Self::Scalars { kind, bytes } => {
                bytes.chunks_exact(kind.byte_width()).map(|element| kind.number(element)).collect()
            }
            Self::Scalar { .. } | Self::Text(_) | Self::Texts { .. } => None,
        }
    }

    /// The strings, or the index of the first that is not UTF-8. `None` when it is no array of strings.
    pub(super) fn as_texts(self) -> Option<Result<Vec<&'a str>, usize>> {
        let Self::Texts { count, bytes } = self else { return None };
        let mut rest = bytes;
        let mut texts = Vec::with_capacity(count);
        for index in 0..count {
            let (length, after) = rest.split_first_chunk::<8>()?;
            let (text, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            let Ok(text) = std::str::from_utf8(text) else { return Some(Err(index)) };
            texts.push(text);
            rest = after;
        }
        Some(Ok(texts))
    }

    /// What a message calls it.
    pub(super) fn describe(self) -> String {
        match self {
            Self::Scalar { kind: Scalar::Bool, bytes } => (bytes != [0]).to_string(),
            Self::Scalar { kind, bytes } => match kind.integer(bytes) {
                Some(integer) => integer.to_string(),
                None => kind.number(bytes).map_or_else(|| "a number".to_owned(), |number| number.to_string()),
            },
            Self::Text(bytes) => {
                let text = String::from_utf8_lossy(bytes);
                format!("{:?}", text.chars().take(60).collect::<String>())
            }
            Self::Scalars { kind, bytes } => {
                format!("an array of {} numbers", bytes.len() / kind.byte_width())
            }
            Self::Texts { count, .. } => format!("an array of {count} strings"),
        }
    }
}
