use super::blocks::BlockType;
use super::values::{Scalar, Value};
use std::collections::BTreeMap;

const DEFAULT_ALIGNMENT: u64 = 32;
/// More than any model has; bounds what a header can make us remember.
const MAX_ENTRIES: u64 = 1 << 16;
const MAX_DIMENSIONS: u32 = 4;
const TEXT_TAG: u32 = 8;
const ARRAY_TAG: u32 = 9;

/// Why the bytes are no GGUF file that we read. Positions are byte offsets in the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufHeaderError {
    #[error("it does not begin with `GGUF`; give a GGUF file")]
    NotGguf,
    #[error(
        "its version is {version}, supported are 2 and 3 (little-endian); convert it with a current llama.cpp"
    )]
    Version { version: u32 },
    #[error(
        "the file ends where {what} should be: {wanted} bytes at {position}, {available} are left; fetch it again"
    )]
    Truncated { what: &'static str, position: u64, wanted: u64, available: u64 },
    #[error("it claims {count} {what}, at most {MAX_ENTRIES} are possible; fetch it again")]
    TooMany { what: &'static str, count: u64 },
    #[error("{what} at {position} is not UTF-8; fetch the file again")]
    NotUtf8 { what: &'static str, position: u64 },
    #[error("metadata `{key}` has the unknown or nested value type {tag}; fetch the file again")]
    ValueType { key: String, tag: u32 },
    #[error("{what} `{name}` occurs twice; fetch the file again")]
    Duplicate { what: &'static str, name: String },
    #[error("`general.alignment` is {actual}, expected a power of two from 8 to 65536")]
    Alignment { actual: String },
    #[error("tensor `{tensor}` has {count} dimensions, expected 1 to {MAX_DIMENSIONS}")]
    DimensionCount { tensor: String, count: u32 },
    #[error(
        "tensor `{tensor}` has the dimensions {dimensions:?}, which is no size of a tensor in whole blocks of {block_elements}"
    )]
    Dimensions { tensor: String, dimensions: Vec<u64>, block_elements: usize },
    #[error(
        "tensor `{tensor}` has the block type {tag}, supported are {supported}; convert the file to one of them"
    )]
    BlockType { tensor: String, tag: u32, supported: String },
    #[error("tensor `{tensor}` has offset {offset}, which is no multiple of the alignment {alignment}")]
    Offset { tensor: String, offset: u64, alignment: u64 },
    #[error(
        "tensor `{tensor}` should lie at bytes {start} to {end}, the file has {file_bytes}; it is truncated, fetch it again"
    )]
    BeyondEnd { tensor: String, start: u64, end: u64, file_bytes: u64 },
}

/// A tensor of the file. The shape is row-major: `[rows, columns]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tensor<'a> {
    pub(super) shape: Vec<usize>,
    pub(super) kind: BlockType,
    /// Whole blocks; every row begins with one.
    pub(super) bytes: &'a [u8],
}

/// What a GGUF file says and holds, borrowed from its bytes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Header<'a> {
    pub(super) metadata: BTreeMap<&'a str, Value<'a>>,
    pub(super) tensors: BTreeMap<&'a str, Tensor<'a>>,
}

impl<'a> Header<'a> {
    /// Reads and checks everything but the elements. Memory used is bounded by the entries, not by what they claim.
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, GgufHeaderError> {
        let mut cursor = Cursor { file, position: 0 };
        if !file.starts_with(b"GGUF") {
            return Err(GgufHeaderError::NotGguf);
        }
        cursor.take("the magic", 4)?;
        let version = cursor.u32("the version")?;
        if !matches!(version, 2 | 3) {
            return Err(GgufHeaderError::Version { version });
        }
        let tensor_count = cursor.count("tensors")?;
        let metadata_count = cursor.count("metadata entries")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..metadata_count {
            let key = cursor.text("a metadata key")?;
            let value = cursor.value(key)?;
            if metadata.insert(key, value).is_some() {
                return Err(GgufHeaderError::Duplicate { what: "metadata", name: key.to_owned() });
            }
        }
        let mut entries = BTreeMap::new();
        for _ in 0..tensor_count {
            let (name, entry) = cursor.tensor_entry()?;
            if entries.insert(name, entry).is_some() {
                return Err(GgufHeaderError::Duplicate { what: "tensor", name: name.to_owned() });
            }
        }
        let alignment = alignment(&metadata)?;
        // The header lies in memory, so its length plus an alignment is far from overflowing.
        let data_start = (cursor.position as u64).next_multiple_of(alignment);
        let place =
            |(name, entry): (&'a str, Entry)| Ok((name, entry.place(name, file, data_start, alignment)?));
        let tensors = entries.into_iter().map(place).collect::<Result<_, GgufHeaderError>>()?;
        Ok(Self { metadata, tensors })
    }
}

fn alignment(metadata: &BTreeMap<&str, Value<'_>>) -> Result<u64, GgufHeaderError> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    value
        .as_u64()
        .filter(|alignment| alignment.is_power_of_two() && (8..=65_536).contains(alignment))
        .ok_or_else(|| GgufHeaderError::Alignment { actual: value.describe() })
}

/// A tensor as the header announces it, not yet looked up in the data.
struct Entry {
    /// Innermost first, as the file has them.
    dimensions: Vec<u64>,
    tag: u32,
    offset: u64,
}

impl Entry {
    fn place<'a>(
        self,
        name: &str,
        file: &'a [u8],
        data_start: u64,
        alignment: u64,
    ) -> Result<Tensor<'a>, GgufHeaderError> {
        let tensor = || name.to_owned();
        let Some(kind) = BlockType::from_tag(self.tag) else {
            let supported = BlockType::ALL.map(|kind| format!("{} ({})", kind.name(), kind.tag())).join(", ");
            return Err(GgufHeaderError::BlockType { tensor: tensor(), tag: self.tag, supported });
        };
        let block_elements = kind.block_elements();
        let whole = || -> Option<(Vec<usize>, u64)> {
            let shape: Vec<usize> = self
                .dimensions
                .iter()
                .rev()
                .map(|&width| usize::try_from(width).ok())
                .collect::<Option<_>>()?;
            let columns = *self.dimensions.first()?;
            let rows = self.dimensions[1..].iter().try_fold(1_u64, |rows, &width| rows.checked_mul(width))?;
            let blocks = columns.checked_div(block_elements as u64)?.checked_mul(rows)?;
            let is_whole = columns.is_multiple_of(block_elements as u64) && blocks > 0;
            is_whole.then_some((shape, blocks.checked_mul(kind.block_bytes() as u64)?))
        };
        let Some((shape, size_bytes)) = whole() else {
            let dimensions = self.dimensions;
            return Err(GgufHeaderError::Dimensions { tensor: tensor(), dimensions, block_elements });
        };
        if !self.offset.is_multiple_of(alignment) {
            return Err(GgufHeaderError::Offset { tensor: tensor(), offset: self.offset, alignment });
        }
        let start = data_start.saturating_add(self.offset);
        let end = start.saturating_add(size_bytes);
        let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
        let bytes = range.and_then(|(start, end)| file.get(start..end)).ok_or_else(|| {
            GgufHeaderError::BeyondEnd { tensor: tensor(), start, end, file_bytes: file.len() as u64 }
        })?;
        Ok(Tensor { shape, kind, bytes })
    }
}

/// A place in the file; every step forward is checked.
struct Cursor<'a> {
    file: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, what: &'static str, wanted: u64) -> Result<&'a [u8], GgufHeaderError> {
        let rest = &self.file[self.position..];
        let taken = usize::try_from(wanted).ok().and_then(|wanted| rest.get(..wanted)).ok_or(
            GgufHeaderError::Truncated {
                what,
                position: self.position as u64,
                wanted,
                available: rest.len() as u64,
            },
        )?;
        self.position += taken.len();
        Ok(taken)
    }

    fn array<const WIDTH: usize>(&mut self, what: &'static str) -> Result<[u8; WIDTH], GgufHeaderError> {
        let mut array = [0; WIDTH];
        array.copy_from_slice(self.take(what, WIDTH as u64)?);
        Ok(array)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufHeaderError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufHeaderError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &'static str) -> Result<u64, GgufHeaderError> {
        match self.u64(what)? {
            count if count <= MAX_ENTRIES => Ok(count),
            count => Err(GgufHeaderError::TooMany { what, count }),
        }
    }

    fn sized_bytes(&mut self, what: &'static str) -> Result<&'a [u8], GgufHeaderError> {
        let length = self.u64(what)?;
        self.take(what, length)
    }

    fn text(&mut self, what: &'static str) -> Result<&'a str, GgufHeaderError> {
        let position = self.position as u64;
        std::str::from_utf8(self.sized_bytes(what)?).map_err(|_| GgufHeaderError::NotUtf8 { what, position })
    }

    fn value(&mut self, key: &str) -> Result<Value<'a>, GgufHeaderError> {
        let unknown = |tag| GgufHeaderError::ValueType { key: key.to_owned(), tag };
        let tag = self.u32("a value type")?;
        match tag {
            TEXT_TAG => Ok(Value::Text(self.sized_bytes("a string")?)),
            ARRAY_TAG => {
                let tag = self.u32("an element type")?;
                let count = self.u64("an array length")?;
                if tag == TEXT_TAG {
                    return self.texts(count);
                }
                let kind = Scalar::from_tag(tag).ok_or_else(|| unknown(tag))?;
                // What does not fit 64 bits does not fit the file either.
                let wanted = count.saturating_mul(kind.byte_width() as u64);
                Ok(Value::Scalars { kind, bytes: self.take("an array", wanted)? })
            }
            tag => {
                let kind = Scalar::from_tag(tag).ok_or_else(|| unknown(tag))?;
                Ok(Value::Scalar { kind, bytes: self.take("a value", kind.byte_width() as u64)? })
            }
        }
    }

    /// Walks over the strings; a count that lies ends at the end of the file.
    fn texts(&mut self, count: u64) -> Result<Value<'a>, GgufHeaderError> {
        let start = self.position;
        for _ in 0..count {
            self.sized_bytes("a string of an array")?;
        }
        // Each string took 8 bytes at least, so the count is smaller than the file.
        Ok(Value::Texts { count: count as usize, bytes: &self.file[start..self.position] })
    }

    fn tensor_entry(&mut self) -> Result<(&'a str, Entry), GgufHeaderError> {
        let name = self.text("a tensor name")?;
        let count = self.u32("a number of dimensions")?;
        if !(1..=MAX_DIMENSIONS).contains(&count) {
            return Err(GgufHeaderError::DimensionCount { tensor: name.to_owned(), count });
        }
        let dimensions = (0..count).map(|_| self.u64("a dimension")).collect::<Result<_, _>>()?;
        let tag = self.u32("a block type")?;
        Ok((name, Entry { dimensions, tag, offset: self.u64("a tensor offset")? }))
    }
}
